"""A target is a page of facts about one machine: what it can do, how wide, how much cache.

Text form: `name` or `name:feature,feature`, for example `x86-64-v3:avxvnni`. It parses and prints
back. Kernels ask for properties (`target.lanes`, `target.has("avx2")`), never for a name.
"""

import dataclasses
from dataclasses import dataclass

from sparsegraph.errors import UnsupportedError, message


@dataclass(frozen=True)
class Target:
    """One machine.

    Attributes:
        name: the text before the colon.
        arch: machine family as the C compiler's triple spells it (`x86_64`, `aarch64`).
        triple: LLVM target triple.
        cpu: LLVM processor name whose scheduling model is used.
        features: CPU features that generated code may use, in LLVM's words.
        lanes: float32 values in one vector register.
        n_registers: vector registers.
        l1_bytes: level 1 data cache of one core.
        l2_bytes: level 2 cache of one core.
        linker: candidate C compiler drivers that link for this machine, best first.
        emulator: command that runs a program of this machine elsewhere, or empty.
    """

    name: str
    arch: str
    triple: str
    cpu: str
    features: tuple[str, ...]
    lanes: int
    n_registers: int
    l1_bytes: int
    l2_bytes: int
    linker: tuple[str, ...]
    emulator: tuple[str, ...] = ()
    extra_features: tuple[str, ...] = ()

    def has(self, feature: str) -> bool:
        """True if generated code may use `feature`."""
        return feature in self.features or feature in self.extra_features

    def with_features(self, extra: tuple[str, ...]) -> "Target":
        """The same machine with more features."""
        return dataclasses.replace(self, extra_features=tuple(sorted(set(extra))))

    def __str__(self) -> str:
        return self.name + (":" + ",".join(self.extra_features) if self.extra_features else "")


def parse(text: str, known: dict[str, Target]) -> Target:
    """Read a target's text form.

    Raises:
        UnsupportedError: for a name that is not in `known`.
    """
    name, _, features = text.partition(":")
    if name not in known:
        need = ", ".join(sorted(known))
        fix = "take one of these names; `sparsegraph targets` lists them"
        raise UnsupportedError(message("target", text, "an unknown name", need, fix))
    extra = tuple(f for f in features.split(",") if f)
    return known[name].with_features(extra) if extra else known[name]
