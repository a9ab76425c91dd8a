"""From objects and C sources to a library or module, through the C compiler of the target."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from sparsegraph.targets.target import PACKAGES, Target

from sparsegraph.errors import UnsupportedError, message

_C_FLAGS = ("-std=c11", "-Wall", "-Wextra", "-Werror", "-g0", "-I.")
_NO_HEADER = re.compile(r"fatal error: .*(No such file|file not found)")  # all of ours are there
_WEIGHTS = """.section .rodata.sg_weights, "a"
.balign 64
.global sg_weights
sg_weights:
.incbin "weights.bin"
.size sg_weights, . - sg_weights
"""
_MATH_H = """#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
"""


def driver(target: Target) -> list[str]:
    """The command that compiles and links C for `target`.

    The system's compiler first, then the `ziglang` wheel.

    Raises:
        UnsupportedError: if there is none; names what to install.
    """
    for name in target.linker:
        path = shutil.which(name)
        if path and (name not in ("cc", "gcc") or _is_native(target)):
            return [path]
    if find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "cc", "-target", target.triple]
    need = " or ".join(target.linker)
    fix = f"install the Debian package {PACKAGES[target.linker[0]]}, or `pip install ziglang`"
    raise UnsupportedError(message("target", str(target), "no C compiler driver", need, fix))


def _is_native(target: Target) -> bool:
    return os.uname().machine == target.arch


def shared_library(
    objects: Sequence[Path], sources: Sequence[Path], target: Target, output: Path
) -> None:
    """Compile `sources`, link them with `objects` into the shared library `output`.

    The result depends on the contents of the inputs only, not on paths or time.

    Raises:
        UnsupportedError: if there is no compiler or it fails (its message is kept).
    """
    flags = ["-fPIC", "-shared", "-pthread", "-Wl,--build-id=none", "-s"]
    flags.append(f"-Wl,-soname,{output.name}")  # CMake links by -l what has no name
    _link([*driver(target), *flags], ["-lm"], objects, sources, target, output)


def program(source: Path, library: Path, target: Target, output: Path) -> None:
    """Compile one C file into a program that finds `library` beside itself.

    Raises:
        UnsupportedError: if there is no compiler or it fails (its message is kept).
    """
    flags = ["-pthread", "-Wl,-rpath,$ORIGIN"]
    _link([*driver(target), *flags], [], [library], [source], target, output)


def wasm_module(
    objects: Sequence[Path], sources: Sequence[Path], target: Target, output: Path
) -> None:
    """Compile `sources` without a C library, link them with `objects` into the module `output`.

    Raises:
        UnsupportedError: if clang or wasm-ld is missing or fails (its message is kept).
    """
    for name in target.linker:
        if shutil.which(name) is None:
            fix = f"install the Debian package {PACKAGES[name]}"
            raise UnsupportedError(message("target", str(target), f"no {name}", name, fix))
    flags = ["--target=wasm32", "-ffreestanding", "-fno-builtin", "-nostdlib", "-Wl,--no-entry"]
    exports = [f"-Wl,--export={name}" for name in (*_functions(), "__heap_base")]
    command = [target.linker[0], *flags, "-Wl,--strip-all", "-Wl,-z,stack-size=262144", *exports]
    _link(command, [], objects, sources, target, output, {"math.h": _MATH_H})


_BARE = ("-Os", "-ffreestanding", "-ffunction-sections", "-fdata-sections")


def static_library(
    objects: Sequence[Path], sources: Sequence[Path], weights: Path, target: Target, output: Path
) -> None:
    """Compile `sources` for a machine without an operating system; archive them with `objects`.

    The weights become the constant `sg_weights`, aligned to 64 bytes.

    Raises:
        UnsupportedError: if the compiler is missing or fails (its message is kept).
    """
    compiler = _bare_compiler(target)
    with _copies((*sources, *objects), target) as (folder, names):
        shutil.copyfile(weights, folder / "weights.bin")
        (folder / "weights.s").write_text(_WEIGHTS)
        compiled = [n for n in (*names, "weights.s") if not n.endswith(".o")]
        flags = (*_C_FLAGS, *_BARE, *target.c_flags)
        _execute([compiler, *flags, "-c", *compiled], folder, target)
        members = [Path(n).with_suffix(".o").name for n in (*names, "weights.s")]
        archiver = compiler.removesuffix("gcc") + "ar"
        _execute([archiver, "rcsD", "out", *members], folder, target)
        shutil.move(folder / "out", output)


def footprint(library: Path, main: Path, target: Target) -> tuple[int, int]:
    """Bytes of flash and of RAM that the program of `main` and the library take, without stack.

    Start-up code is left out, and so is what the linker finds unused.

    Raises:
        UnsupportedError: if the compiler is missing or fails.
    """
    compiler = _bare_compiler(target)
    with _copies((main, library), target) as (folder, names):
        for header in library.parent.glob("*.h"):
            shutil.copyfile(header, folder / header.name)
        flags = (*_C_FLAGS, *_BARE, *target.c_flags, "-nostartfiles", "-Wl,--gc-sections,-emain")
        _execute([compiler, *flags, *names, "-lm", "-o", "out"], folder, target)
        sizes = _execute([compiler.removesuffix("gcc") + "size", "out"], folder, target)
    text, data, bss = map(int, sizes.splitlines()[1].split()[:3])
    return text + data, data + bss


def _bare_compiler(target: Target) -> str:
    found = shutil.which(target.linker[0])
    if found is None:
        need = target.linker[0]
        fix = f"install the Debian package {PACKAGES[need]}"
        raise UnsupportedError(message("target", str(target), f"no {need}", need, fix))
    return found


def _functions() -> list[str]:
    """What `runtime.h` declares, except for what needs threads."""
    text = Path(__file__).with_name("runtime.h").read_text()
    found = re.findall(r"^SG_API [^(]*?(sg_\w+)\(", text, re.MULTILINE)
    return [name for name in found if not name.startswith("sg_pool")]


def _link(
    command: Sequence[str],
    libraries: Sequence[str],
    objects: Sequence[Path],
    sources: Sequence[Path],
    target: Target,
    output: Path,
    headers: Mapping[str, str] | None = None,
) -> None:
    with _copies((*sources, *objects), target) as (folder, names):
        for name, text in (headers or {}).items():
            (folder / name).write_text(text)
        full = [*command, *_C_FLAGS, "-O2", "-fvisibility=hidden", *names, "-o", "out", *libraries]
        _execute(full, folder, target)
        shutil.move(folder / "out", output)


@contextmanager
def _copies(files: Sequence[Path], target: Target) -> Iterator[tuple[Path, list[str]]]:
    """A folder with the files under names that are the same in every build, and their headers."""
    with tempfile.TemporaryDirectory() as folder:
        names = []
        for i, path in enumerate(files):
            name = f"{i}{path.suffix}"
            shutil.copyfile(path, Path(folder, name))
            names.append(name)
        for parent in {p.parent for p in files if p.suffix == ".c"}:
            for path in parent.glob("*.h"):
                shutil.copyfile(path, Path(folder, path.name))
        yield Path(folder), names


def _execute(command: Sequence[str], folder: Path, target: Target) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        fix = "report this with the message above"
        if _NO_HEADER.search(done.stderr) and target.linker:
            fix = f"install the Debian packages {PACKAGES[target.linker[0]]}"
        text = message("building for", str(target), done.stderr[-2000:], "no errors", fix)
        raise UnsupportedError(text)
    return done.stdout
