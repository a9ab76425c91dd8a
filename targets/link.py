"""From objects and C sources to a shared library, through the C compiler driver of the target."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from sparsegraph.targets.target import PACKAGES, Target

from sparsegraph.errors import UnsupportedError, message


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
    flags = ["-std=c11", "-O2", "-fPIC", "-shared", "-pthread", "-Wall", "-Wextra", "-Werror"]
    flags += ["-fvisibility=hidden", "-g0", "-Wl,--build-id=none", "-s"]
    with tempfile.TemporaryDirectory() as folder:  # same relative names in every build
        names = []
        for i, path in enumerate((*sources, *objects)):
            name = f"{i}{path.suffix}"
            shutil.copyfile(path, Path(folder, name))
            names.append(name)
        for header in {p.parent for p in sources}:
            for path in header.glob("*.h"):
                shutil.copyfile(path, Path(folder, path.name))
        command = [*driver(target), *flags, *names, "-o", "out.so", "-lm"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            text = message("linking for", str(target), done.stderr[-2000:], "no errors",
                           "report this with the message above")  # fmt: skip
            raise UnsupportedError(text)
        shutil.move(Path(folder, "out.so"), output)
