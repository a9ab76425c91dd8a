"""Kernels compiled in processes of their own: all cores work, and what stops TVM or LLVM stops the
code of one kernel.

A server imports TVM once and forks a process per kernel. Between compilations it waits for more,
`_IDLE_S` at most, and it ends when its parent does. They talk in lines of JSON: to the server
`[number, path, symbol, kernel, target]`, back `[number, exit status, last words]`.
"""

import atexit
import contextlib
import errno
import gc
import itertools
import json
import os
import resource
import selectors
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import IO, NamedTuple, NoReturn

from sparsegraph.targets import c_source, emit, spec
from sparsegraph.targets.kernel import Kernel, prim_func
from sparsegraph.targets.target import Target

from sparsegraph.errors import UnsupportedError, message, one_line
from sparsegraph.machine import n_cores

_IDLE_S = 60.0
_REFUSED, _NO_FILE, _NO_MEMORY = 1, 2, 3  # exit statuses of a kernel's process
_UNWRITTEN = ("IO failure on output stream", "Cannot open file")  # so say LLVM and TVM


class Job(NamedTuple):
    """A kernel to compile, the symbol that it gets, and the object or C file to write."""

    kernel: Kernel
    target: Target
    symbol: str
    path: Path


class KernelError(UnsupportedError):
    """The code generator failed at kernels.

    Attributes:
        reasons: kernel name -> what it said.
    """

    def __init__(self, reasons: dict[str, str]) -> None:
        self.reasons = reasons
        name, reason = next(iter(reasons.items()))
        found = f"a code generator that stopped ({reason})"
        fix = "leave the nodes that it computes to ONNX Runtime, and report the model"
        super().__init__(message("kernel", name, found, "code for it", fix))


def compile_all(jobs: Sequence[Job], on_done: Callable[[], None] = lambda: None) -> None:
    """Write the files of all jobs; the code of each depends on nothing but the job.

    Raises:
        KernelError: TVM or LLVM refused a kernel, or brought their process down.
        OSError: a file could not be written.
        UnsupportedError: there is too little memory.
    """
    reasons = {}
    with contextlib.closing(_results(jobs)) as results:
        for number, status, words in results:
            on_done()
            if status:
                name = jobs[number].kernel.name
                reasons[name] = _reason(name, status, words)
    if reasons:
        raise KernelError(dict(sorted(reasons.items())))


def warm_up() -> None:
    """Let a server import TVM while its parent does other work."""
    with _lock:
        if not _idle:
            _idle.append(_start())


def end_servers() -> None:
    """End the servers that wait for work, and with them all processes of this module."""
    while _idle:
        _end(_idle.pop())


def _reason(name: str, status: int, words: str) -> str:
    """Why a kernel was not compiled; raises what is not the kernel's fault."""
    if status == _NO_FILE or any(text in words for text in _UNWRITTEN):
        number = next((n for n in errno.errorcode if os.strerror(n) in words), errno.EIO)
        raise OSError(number, os.strerror(number))
    if status in (_NO_MEMORY, -signal.SIGKILL) or "bad_alloc" in words:
        _no_memory(name)
    died = [signal.Signals(-status).name] if status < 0 else []
    return ": ".join([*died, words] if words else died)


def _no_memory(name: str) -> NoReturn:
    """Too little memory: no fault of the kernel, and no reason to go without it."""
    fix = "free some, or compile on fewer cores (taskset)"
    raise UnsupportedError(message("kernel", name, "too little memory", "enough for LLVM", fix))


def _server_ended(status: int, jobs: Sequence[Job]) -> NoReturn:
    if status == -signal.SIGKILL:
        _no_memory(jobs[0].kernel.name)
    found, need = f"a process that ended with status {status}", "TVM and this package in it"
    fix = "see what it printed; install sparsegraph and its requirements anew"
    raise UnsupportedError(message("code generator", sys.executable, found, need, fix))


# ---------------------------------------------------------------- the parent

_Server = subprocess.Popen[str]
_idle: list[_Server] = []  # as many as ever were busy at a time
_lock = threading.Lock()
os.register_at_fork(after_in_child=_idle.clear)  # they are the parent's
atexit.register(end_servers)


def _start() -> _Server:
    path = os.pathsep.join(sys.path)  # what the parent imports, wherever it got it from
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "sparsegraph.targets.compiler"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip


def _take() -> _Server:
    """A server that nobody talks to."""
    while True:
        with _lock:
            if not _idle:
                return _start()
            server = _idle.pop()
        with contextlib.suppress(BrokenPipeError):
            if _say(server, "") and _hear(server):
                return server
        _end(server)


def _say(server: _Server, line: str) -> bool:
    assert server.stdin is not None
    server.stdin.write(line + "\n")
    server.stdin.flush()
    return True


def _hear(server: _Server) -> str:
    """The next line; empty if the server has ended."""
    assert server.stdout is not None
    return server.stdout.readline()


def _end(server: _Server) -> None:
    """Stop talking; a server that hears nothing more ends, with all that it runs."""
    with contextlib.suppress(BrokenPipeError):
        server.communicate()


def _results(jobs: Sequence[Job]) -> Generator[tuple[int, int, str]]:
    """Number, exit status and last words of the jobs, in the order in which they end."""
    server = _take()
    try:
        lines = (
            json.dumps(
                [i, str(job.path), job.symbol, spec.plain(job.kernel), spec.plain(job.target)]
            )
            for i, job in enumerate(jobs)
        )
        for line in itertools.islice(lines, n_cores()):
            _say(server, line)
        for _ in jobs:
            result = _hear(server)
            if not result:
                _server_ended(server.wait(), jobs)
            for line in itertools.islice(lines, 1):
                _say(server, line)
            yield tuple(json.loads(result))
    except BaseException:
        _end(server)
        raise
    with _lock:
        _idle.append(server)


# ---------------------------------------------------------------- the server


class _Running(NamedTuple):
    """A kernel's process, and what it has said."""

    number: int
    pid: int
    words: bytearray


def _serve(out: IO[str]) -> None:
    """Fork a process per line of standard input, until that ends or nothing happens for long."""
    running: dict[int, _Running] = {}  # by the pipe that ends with the process
    part = b""
    with selectors.DefaultSelector() as selector:
        selector.register(0, selectors.EVENT_READ)
        while ready := selector.select(None if running else _IDLE_S):
            for key, _ in ready:
                data = os.read(key.fd, 1 << 16)
                if key.fd:
                    running[key.fd].words.extend(data)
                    if not data:
                        selector.unregister(key.fd)
                        print(json.dumps(_ended(key.fd, running.pop(key.fd))), file=out, flush=True)
                    continue
                *lines, part = (part + data).split(b"\n")
                for line in lines:
                    if line:
                        pipe, process = _fork(line, out)
                        running[pipe] = process
                        selector.register(pipe, selectors.EVENT_READ)
                    else:
                        print(file=out, flush=True)  # somebody asks whether we are there
                if not data:
                    for process in running.values():
                        os.kill(process.pid, signal.SIGKILL)
                    return


def _fork(line: bytes, out: IO[str]) -> tuple[int, _Running]:
    number, path, symbol, *specs = json.loads(line)
    kernel, target = map(spec.made, specs)  # here, so that a family is imported once
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        out.close()
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        _compile(Job(kernel, target, symbol, Path(path)))
    os.close(writer)
    return reader, _Running(number, pid, bytearray())


def _compile(job: Job) -> NoReturn:
    """The work of a kernel's process."""
    status = _REFUSED
    try:
        if job.target.output == "c":
            job.path.write_text(c_source.function_text(job.kernel, job.target))
        else:
            function = prim_func(job.kernel, job.target, job.symbol)
            emit.write_object({job.symbol: function}, job.target, job.path)
        status = 0
    except Exception as error:
        if isinstance(error, OSError | MemoryError):
            status = _NO_FILE if isinstance(error, OSError) else _NO_MEMORY
        print(f"{type(error).__name__}: {one_line(error)}", flush=True)
    finally:
        os._exit(status)


def _ended(pipe: int, process: _Running) -> tuple[int, int, str]:
    os.close(pipe)
    _, status = os.waitpid(process.pid, 0)
    lines = process.words.decode(errors="replace").split("\n")
    said = [line.strip() for line in lines if line.strip() and 'File "' not in line]  # no stack
    return process.number, os.waitstatus_to_exitcode(status), said[-1][:400] if said else ""


def _main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.modules["torch"] = None  # type: ignore[assignment]  # TVM would import it
    emit.import_tvm()
    gc.freeze()
    _serve(out)


if __name__ == "__main__":
    _main()
