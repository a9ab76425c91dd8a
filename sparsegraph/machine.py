"""What this machine is, and which targets it can build for and run."""

import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import sparsegraph.targets as known
from sparsegraph.errors import UnsupportedError
from sparsegraph.targets.target import Target

_TOOLS = ("sparsegraph", "onnxruntime", "onnx", "onnx-ir", "apache-tvm", "numpy")


@dataclass(frozen=True)
class TargetRow:
    """One target.

    Attributes:
        linker, emulator: the installed commands, empty if there are none.
        packages: Debian packages for linking, and for running on other machines.
    """

    name: str
    triple: str
    lanes: int
    n_registers: int
    l1_bytes: int
    l2_bytes: int
    features: tuple[str, ...]
    linker: str
    emulator: str
    packages: tuple[str, ...]
    runs_here: bool
    is_native: bool


def targets() -> list[TargetRow]:
    """Every target, as this machine sees it."""
    try:
        native = known.native().name
    except UnsupportedError:
        native = ""
    return [
        TargetRow(
            name=t.name,
            triple=t.triple,
            lanes=t.lanes,
            n_registers=t.n_registers,
            l1_bytes=t.l1_bytes,
            l2_bytes=t.l2_bytes,
            features=t.features,
            linker=_linker(t),
            emulator=_installed(t.emulator[:1]),
            packages=t.packages,
            runs_here=known.runs_here(t),
            is_native=t.name == native,
        )
        for t in known.KNOWN.values()
    ]


def _linker(target: Target) -> str:
    """What links for the target here, or nothing; C source and PTX need no linker."""
    if target.output in ("c", "ptx"):
        return "none needed"
    if target.output == "wasm":
        return target.linker[0] if all(map(shutil.which, target.linker)) else ""
    return _installed(target.linker)


def _installed(commands: Sequence[str]) -> str:
    """The first command that is installed, or nothing."""
    return next((c for c in commands if shutil.which(c)), "")


def facts() -> dict[str, object]:
    """CPU, cores, system and tool versions, for reports."""
    return {
        "cpu": cpu_name(),
        "arch": platform.machine(),
        "cores": n_cores(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "tools": {name: _version(name) for name in _TOOLS},
    }


def describe() -> str:
    """One line about this machine."""
    native = next((t.name for t in targets() if t.is_native), "no target fits")
    return f"This machine: {cpu_name()}, {n_cores()} cores; native is {native}."


def n_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_name() -> str:
    """What the system calls the processor."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "CPU part"):
            return value.strip()
    return platform.machine()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
