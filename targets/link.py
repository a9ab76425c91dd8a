"""From objects and C sources to a shared library, through the C compiler driver of the target."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from sparsegraph.targets.target import PACKAGES, Target

from sparsegraph.errors import UnsupportedError, message

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
    flags = ["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden", "-g0", "-I."]
    with tempfile.TemporaryDirectory() as folder:  # same relative names in every build
        names = []
        for i, path in enumerate((*sources, *objects)):
            name = f"{i}{path.suffix}"
            shutil.copyfile(path, Path(folder, name))
            names.append(name)
        for header in {p.parent for p in sources}:
            for path in header.glob("*.h"):
                shutil.copyfile(path, Path(folder, path.name))
        for name, text in (headers or {}).items():
            Path(folder, name).write_text(text)
        full = [*command, *flags, *names, "-o", "out", *libraries]
        done = subprocess.run(full, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            text = message("linking for", str(target), done.stderr[-2000:], "no errors",
                           "report this with the message above")  # fmt: skip
            raise UnsupportedError(text)
        shutil.move(Path(folder, "out"), output)
