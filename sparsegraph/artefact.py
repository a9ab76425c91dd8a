"""Write a `Plan` as an artefact: a folder that runs without a compiler, TVM or Python.

    model.so         kernels, driver and runtime, with the C interface of runtime.h; other targets
                     get a WebAssembly module or C files (targets/bundle.py)
    weights.bin      weights, each on a cache line, stored once per content
    task_NAME.patch  what a task changes in them, if there are several (patch.py)
    runtime.h        the C interface, with main.c, an example, bench.c, a timing, and CMakeLists.txt
    fallback_0.onnx  a segment that ONNX Runtime runs, if there are any
    manifest.json    what the artefact is, with the SHA-256 of every other member
    manifest.sha256  the checksum of the manifest, in the form of `sha256sum`

Equal plans give equal bytes: no member holds a time, a path or a random number. The checksums find
damage and accidental changes; they are no signature.
"""

import ctypes
import errno
import hashlib
import itertools
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import JsonValue

from sparsegraph import loading, memory
from sparsegraph.errors import UsageError, message
from sparsegraph.manifest import (
    Code,
    Footprint,
    Manifest,
    MemberRecord,
    TaskRecord,
    all_segments,
    describe,
    fallback_name,
)
from sparsegraph.patch import WORD, Patch
from sparsegraph.program import Fallback, Plan, Program, Ref
from sparsegraph.progress import Progress, silent
from sparsegraph.targets import bundle, driver, features
from sparsegraph.targets.compiler import Job, compile_all
from sparsegraph.targets.target import Target

Check = Callable[[Path], Mapping[str, JsonValue]]

_ALIGNMENT = 64
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def write(
    plan: Plan,
    target: Target,
    path: str | os.PathLike[str],
    meta: Mapping[str, Any],
    progress: Progress | None = None,
    check: Check | None = None,
    better: Sequence[Code] = (),
) -> Manifest:
    """Compile `plan` for `target` into the folder `path`.

    The folder appears, or replaces an earlier artefact, in one step at the end; whatever stops
    the work before leaves `path` as it was.

    Args:
        meta: JSON values for the manifest: `model_sha256`, and optionally `passes`,
            `verification` and `tools` (more versions). Times would make builds differ.
        progress: called as `progress("compile kernels", done, total)`.
        check: runs the finished folder before it appears under `path`; what it returns is the
            verification record, what it raises stops the work.
        better: the same model for CPUs that have all features of `target` and more, the best first;
            the library picks one when it is loaded. All of it must be native.

    Raises:
        UsageError: `path` cannot be written, or holds something that is not an artefact.
        UnsupportedError: there is no C compiler for the target.
        KernelError: the code generator failed at kernels.
    """
    output = Path(path)
    _check_output(output)
    with _output_errors(output), _sibling(output) as folder:
        codes = [*better, Code(target, plan)]
        placed, n_weight_bytes = _place([c.plan for c in codes], folder / loading.WEIGHTS)
        tasks = _write_patches(plan, placed[-1], folder)
        used = _build_library(codes, placed, n_weight_bytes, folder, progress or silent)
        _write_fallbacks(plan, folder)
        manifest = describe(codes, placed, meta, _members(folder))
        manifest = manifest.model_copy(update={"footprint": used, "tasks": tasks})
        _write_manifest(manifest, folder)
        if check is not None:
            manifest = manifest.model_copy(update={"verification": check(folder)})
            _write_manifest(manifest, folder)
        _publish(folder, output)
    return manifest


# ---------------------------------------------------------------- weights


def _place(plans: Sequence[Plan], path: Path) -> tuple[list[list[driver.Segment]], int]:
    """Write the weight file; per plan where memory and weights of its programs lie; its size."""
    places: dict[bytes, int] = {}
    with path.open("wb") as file:
        placed = [[_segment(p, file, places) for p in _by_task(plan)] for plan in plans]
        file.write(bytes(memory.SLACK))
        return placed, file.tell()


def _programs(plan: Plan) -> list[Program]:
    return [s for s in all_segments(plan) if isinstance(s, Program)]


def _by_task(plan: Plan) -> list[tuple[Program, ...]]:
    """Per segment its program, and the same with the weights of each task."""
    return list(zip(_programs(plan), *map(_programs, plan.tasks.values()), strict=True))


def _segment(programs: Sequence[Program], file: Any, places: dict[bytes, int]) -> driver.Segment:
    program = programs[0]
    weights = {
        name: _append(file, [p.weights[name] for p in programs], places)
        for name in _weights_in_use(program)
    }
    return driver.Segment(program, memory.plan(program), weights)


def _weights_in_use(program: Program) -> list[str]:
    """Weights in the order of their first use: that is also how a run walks through the file."""
    names = (
        arg.buffer
        for step in program.steps
        for arg in step.args
        if isinstance(arg, Ref) and arg.buffer in program.weights
    )
    return list(dict.fromkeys(names))


def _append(file: Any, forms: Sequence[np.ndarray], places: dict[bytes, int]) -> int:
    """Offset of the weight's bytes in `file`; writes them unless they are there.

    `forms` are the weight and what the tasks have in its place: all must be equal to share room.
    """
    raw, *others = map(_bytes, forms)
    digest = hashlib.sha256(raw.data)
    for other in others:
        if not np.array_equal(raw, other):
            digest.update(other.data)
        digest.update(b"|")
    key = digest.digest()
    if key not in places:
        file.write(bytes(-file.tell() % _ALIGNMENT))
        places[key] = file.tell()
        file.write(raw.data)
    return places[key]


def _bytes(weight: np.ndarray) -> np.ndarray:
    data = np.ascontiguousarray(weight, weight.dtype.newbyteorder("<"))
    return data.reshape(-1).view(np.uint8)


def _write_patches(
    plan: Plan, placed: Sequence[driver.Segment], folder: Path
) -> tuple[TaskRecord, ...]:
    """One file per task with what it changes in the weight file."""
    records = []
    if plan.tasks:
        before = np.fromfile(folder / loading.WEIGHTS, np.uint8)
    for name, task in plan.tasks.items():
        after = before.copy()
        for segment, program in zip(placed, _programs(task), strict=True):
            for weight, offset in segment.weights.items():
                raw = _bytes(program.weights[weight])
                after[offset : offset + raw.size] = raw
        whole = before.size // WORD * WORD
        patch = Patch.between(before[:whole].view("<u4"), after[:whole].view("<u4"))
        member = f"task_{name}.patch"
        (folder / member).write_bytes(patch.data())
        records.append(
            TaskRecord(name=name, member=member, n_gaps=patch.gaps.size, n_changed=patch.n_changed)
        )
    return tuple(records)


# ---------------------------------------------------------------- code


def _build_library(
    codes: Sequence[Code],
    placed: Sequence[Sequence[driver.Segment]],
    n_weight_bytes: int,
    folder: Path,
    progress: Progress,
) -> Footprint | None:
    target = codes[-1].target
    if not placed[-1]:
        return None
    drivers = [
        driver.Code(
            segments, tuple(sorted(features(code.target))), f"__{i}" if i + 1 < len(codes) else ""
        )
        for i, (code, segments) in enumerate(zip(codes, placed, strict=True))
    ]
    with tempfile.TemporaryDirectory() as temporary:
        text = Path(temporary, "driver.c")
        text.write_text(driver.generate(drivers, n_weight_bytes))
        ending = "c" if target.output == "c" else "o"
        kernels = [
            (kernel, code.target, kernel.name + suffixed.suffix)
            for code, suffixed in zip(codes, drivers, strict=True)
            for kernel in suffixed.kernels.values()
        ]
        files = [Path(temporary, f"{i}.{ending}") for i in range(len(kernels))]
        _compile([Job(*k, file) for k, file in zip(kernels, files, strict=True)], progress)
        if target.output == "c":
            bundle.write_source(files, text, folder, folder / loading.WEIGHTS)
            return None
        if target.output == "bare":
            flash, ram = bundle.write_bare(files, text, target, folder, placed[-1][0])
            return Footprint(flash_bytes=flash, ram_bytes=ram)
        write = bundle.write_wasm if target.output == "wasm" else bundle.write_library
        write(files, text, target, folder)
        return None


def _compile(jobs: Sequence[Job], progress: Progress) -> None:
    """One object per kernel, so that the code does not depend on how many cores compile it."""
    done = itertools.count(1)
    progress("compile kernels", 0, len(jobs))
    compile_all(jobs, lambda: progress("compile kernels", next(done), len(jobs)))


# ---------------------------------------------------------------- manifest


def _write_fallbacks(plan: Plan, folder: Path) -> None:
    for i, segment in enumerate(all_segments(plan)):
        if isinstance(segment, Fallback):
            (folder / fallback_name(i)).write_bytes(segment.model)


def _members(folder: Path) -> dict[str, MemberRecord]:
    records = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        records[path.name] = MemberRecord(sha256=digest, n_bytes=path.stat().st_size)
    return records


def _write_manifest(manifest: Manifest, folder: Path) -> None:
    text = manifest.model_dump_json(indent=1, by_alias=True).encode() + b"\n"
    (folder / loading.MANIFEST).write_bytes(text)
    line = loading.checksum_line(hashlib.sha256(text).hexdigest())
    (folder / loading.CHECKSUM).write_bytes(line)


# ---------------------------------------------------------------- files


def _check_output(output: Path) -> None:
    """Refuse to replace anything but an artefact or an empty folder.

    Raises:
        UsageError: names what is there.
    """
    need, fix = "a new name or an earlier artefact", "name another output"
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise UsageError(message("output", str(output), "a file or link", need, fix))
    if output.is_dir() and any(output.iterdir()) and not (output / loading.MANIFEST).is_file():
        raise UsageError(message("output", str(output), "a folder with other files", need, fix))


@contextmanager
def _output_errors(output: Path) -> Iterator[None]:
    """Turn what the file system says into a UsageError."""
    try:
        yield
    except OSError as error:
        found = error.strerror or str(error)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        need = "enough free space" if full else "a folder that can be written"
        fix = "free some space, or name another output" if full else "name another output"
        raise UsageError(message("output", str(output), found, need, fix)) from error


@contextmanager
def _sibling(output: Path) -> Iterator[Path]:
    """A new folder beside `output`; whatever is left of it goes at the end."""
    folder = output.absolute().with_name(f".{output.name}.{uuid.uuid4().hex}")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _publish(folder: Path, output: Path) -> None:
    """Give the finished `folder` its name; an earlier artefact takes the temporary one."""
    for member in folder.iterdir():
        member.chmod(member.stat().st_mode & ~(stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH))
    if not output.exists():
        folder.rename(output)
    elif not _exchange(folder, output):
        earlier = folder.with_name(folder.name + ".old")
        output.rename(earlier)
        try:
            folder.rename(output)
        except BaseException:
            earlier.rename(output)
            raise
        shutil.rmtree(earlier, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step; False where the system cannot (Linux and glibc 2.28 can)."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    names = os.fsencode(a), os.fsencode(b)
    done: int = renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE)
    return done == 0
