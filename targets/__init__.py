"""Machines, and the code generated for them: targets, layouts, TIR emission, kernel families."""

import ctypes
import itertools
import platform
from pathlib import Path

from sparsegraph.targets import aarch64, arm, cortex_m, cuda, riscv, source, wasm, x86
from sparsegraph.targets.target import Target, parse

from sparsegraph.errors import UnsupportedError, message

FAMILIES = (x86, aarch64, arm, riscv, cortex_m, wasm, source, cuda)
KNOWN: dict[str, Target] = {t.name: t for family in FAMILIES for t in family.TARGETS}


def get(text: str) -> Target:
    """The target that `text` names; `native` is this machine.

    Raises:
        UnsupportedError: unknown name or feature, or a machine that no target describes.
    """
    return native() if text == "native" else parse(text, KNOWN)


def codes(text: str) -> list[Target]:
    """The targets of `A+B+C`, best first: code of one library that each CPU takes its own from.

    Raises:
        UnsupportedError: as `get`; or they are not shared libraries of one machine family, each of
            which has all features of the next.
    """
    found = sorted(map(get, text.split("+")), key=lambda t: -len(features(t)))
    for better, worse in itertools.pairwise(found):
        same = better.triple == worse.triple and better.output == worse.output == "library"
        if not same or not features(better) > features(worse):
            need = f"all features of {worse} and more, in a shared library for {worse.triple}"
            fix = "compile one bundle per target"
            raise UnsupportedError(message("target", text, f"{better} beside {worse}", need, fix))
    return found


def features(target: Target) -> frozenset[str]:
    """All CPU features that code for `target` may use."""
    return frozenset((*target.features, *target.extra_features))


def native() -> Target:
    """The first target that this machine can run (families list the widest vectors first).

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
    return target.arch == platform.machine() and cpu_features() >= features(target)


def cpu_features() -> set[str]:
    """CPU features of this machine, in Linux's words and in LLVM's."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    words: set[str] = set()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            words.update(value.split())
        elif key.strip() == "isa":
            words.update(_riscv_words(value.strip()))
    words.update(f"sve{n}b" for n in aarch64.SVE_BITS if "sve" in words and _sve_bits() >= n)
    known = {f for t in KNOWN.values() for f in t.known_features}
    return words | {f.name for f in known if f.linux_word in words}


def _sve_bits() -> int:
    """Length of this thread's SVE registers."""
    get_length = 51  # PR_SVE_GET_VL of linux/prctl.h: bytes in the low 16 bits
    found: int = ctypes.CDLL(None).prctl(get_length, 0, 0, 0, 0)
    return (found & 0xFFFF) * 8 if found > 0 else 0


def _riscv_words(isa: str) -> set[str]:
    """`rv64imafdcv_zicsr_zvl256b` -> single letters and the longer names."""
    base, *longer = isa.split("_")
    words = {*base.removeprefix("rv64"), *longer}
    return words | {"zvl128b"} if "v" in words else words
