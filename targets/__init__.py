"""Machines, and the code generated for them: targets, layouts, TIR emission, kernel families."""

import platform
from pathlib import Path

from sparsegraph.targets import aarch64, x86
from sparsegraph.targets.target import Target, parse

from sparsegraph.errors import UnsupportedError, message

FAMILIES = (x86, aarch64)
KNOWN: dict[str, Target] = {t.name: t for family in FAMILIES for t in family.TARGETS}


def get(text: str) -> Target:
    """The target that `text` names; `native` is this machine.

    Raises:
        UnsupportedError: unknown name, or a machine that no target describes.
    """
    return native() if text == "native" else parse(text, KNOWN)


def native() -> Target:
    """The best target that this machine can run.

    Raises:
        UnsupportedError: if none of the targets fits.
    """
    for target in KNOWN.values():
        if runs_here(target):
            return target
    machine = platform.machine()
    need = ", ".join(KNOWN)
    fix = "name a target that you cross-compile for"
    raise UnsupportedError(message("target", "native", f"{machine} without", need, fix))


def runs_here(target: Target) -> bool:
    """True if this machine is of the target's family and has its features."""
    return target.arch == platform.machine() and cpu_features().issuperset(target.features)


def cpu_features() -> set[str]:
    """CPU features of this machine, in LLVM's words (Linux)."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    words: set[str] = set()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            words.update(value.split())
    if "asimd" in words:
        words.add("neon")
    return words
