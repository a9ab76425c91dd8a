"""A target is a page of facts about one machine: what it can do, how wide, how much cache.

Text form: `name` or `name:feature,feature`, for example `x86-64-v3:avxvnni`. It parses and prints
back; a feature brings along what it implies. Kernels ask for properties (`target.lanes`,
`target.has("avx2")`), never for a name.
"""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from sparsegraph.errors import UnsupportedError, message

NARROW_TILES = (4, 6, 5, 8, 7)
WIDE_TILES = (8, 4, 6, 5, 7)
"""`Target.tile_vectors` where instructions are what counts: an index is read once per tile.

Instructions of a run of ResNet-18 with 90 % zeros at 64x64 pixels, against tiles of 4 vectors:
AArch64 and WebAssembly 96 %, RV64GC 89 %, but RVV 113 %: there every vector takes an address.
"""
PACKAGES = {  # command -> Debian package
    "aarch64-linux-gnu-gcc": "gcc-aarch64-linux-gnu libc6-dev-arm64-cross",
    "arm-linux-gnueabihf-gcc": "gcc-arm-linux-gnueabihf libc6-dev-armhf-cross",
    "riscv64-linux-gnu-gcc": "gcc-riscv64-linux-gnu libc6-dev-riscv64-cross",
    "x86_64-linux-gnu-gcc": "gcc-x86-64-linux-gnu",
    "cc": "gcc",
    "gcc": "gcc",
    "clang": "clang",
    "cmake": "cmake",
    "arm-none-eabi-gcc": "gcc-arm-none-eabi",
    "qemu-system-arm": "qemu-system-arm",
    "wasm-ld": "lld",
    "llvm-mca": "llvm",
    "node": "nodejs",
    "chromium": "chromium",
    "qemu-aarch64": "qemu-user",
    "qemu-arm": "qemu-user",
    "qemu-riscv64": "qemu-user",
    "qemu-x86_64": "qemu-user",
    "bochs": "bochs bochs-term",
    "sshd": "openssh-server",
}


Blocks = tuple[tuple[int, tuple[int, ...]], ...]
"""Rows of a group and vectors of each pass, for tiles of 1, 2, 3 ... vectors."""


class Feature(NamedTuple):
    """A CPU feature: LLVM's name, the features that it implies, and Linux's word for it."""

    name: str
    implies: tuple[str, ...] = ()
    word: str = ""

    @property
    def linux_word(self) -> str:
        """The word in /proc/cpuinfo."""
        return self.word or self.name


@dataclass(frozen=True)
class Target:
    """One machine.

    Attributes:
        name: the text before the colon.
        arch: machine family as `uname -m` spells it (`x86_64`, `aarch64`).
        triple: LLVM target triple.
        cpu: LLVM processor name whose scheduling model is used.
        features: CPU features that generated code may use, in LLVM's words.
        lanes: float32 values in one vector; 1 for a machine without vectors.
        n_registers: vectors that the registers hold (for lanes = 1: floating-point registers).
        l1_bytes: level 1 data cache of one core.
        l2_bytes: level 2 cache of one core.
        linker: candidate C compiler drivers that link for this machine, best first; for a module
            all the commands that are needed.
        emulator: command that runs a program of this machine elsewhere, or empty.
        code_features: features that LLVM has to be told beside `cpu`, for families whose
            processor names leave them open.
        function_attributes: what LLVM has to be told about every function.
        abi: LLVM's name of the calling convention where the triple leaves it open.
        sve_bits: least length of the SVE registers that code counts on; 0: vectors are NEON's.
        known_features: all features of the family.
        extra_features: closed under implication, sorted; what the text form lists.
        output: what is made: a shared library, a WebAssembly module, C source, or a static library
            for a machine without an operating system; of GPUs the text of single kernels.
        c_flags: what the C compiler has to be told about the machine.
        tile_vectors: sizes of a tile of points in vectors, in order of preference.
        sparse_tiles: the same where most weights have few non-zeros; empty: no different.
        short_vectors: shorter vectors take less time (Zen 4 computes 512 bits in halves), so that
            products compute of the last tile of points only those there are.
        chains: sums of a coded product that have to be under way for every multiply-add to start as
            soon as it can: more than the latency of one times how many start in a cycle; 0:
            registers are few, or take all of them anyway.
        indices_ahead: quads by which the indices of a coded product are loaded ahead. Zen 5, AVX2
            and AVX-512: 1 instead of 0 takes 1 to 5 % less time, 2 instead of 1 another 2 to 9; 3
            gain 1 more with matrices but registers run out where panels are gathered.
        narrow_index: instructions are what counts: four column indices are loaded one by one, quads
            multiplied two at a time, parted tiles of a gather filled vector by vector.
        scalar_factors: factors are loaded one by one: a vector is multiplied by a scalar register,
            or (SSE) spreading one of four loaded at once takes a copy and a register more.
            Elsewhere four loaded at once make spreading cheap.
        index_unit: float32 values by which addresses are scaled for nothing; 0: they are not, so
            that indices count bytes where these fit.
        row_vectors: vectors of a tile where `coded` products of one row fill the registers; 0: the
            tiles of all other kernels are best.
        segment: most vectors that a segment of a gather copies.
        joined: most vectors that one instruction computes (RVV: groups of registers).
        dense_blocks, coded_blocks: register blocks of products where LLVM spills those that the
            number of registers suggests; empty: by that number.
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
    code_features: tuple[str, ...] = ()
    function_attributes: tuple[str, ...] = ()
    abi: str = ""
    sve_bits: int = 0
    known_features: tuple[Feature, ...] = field(default=(), repr=False)
    extra_features: tuple[str, ...] = ()
    output: Literal["library", "wasm", "c", "bare", "ptx"] = "library"
    c_flags: tuple[str, ...] = ()
    tile_vectors: tuple[int, ...] = NARROW_TILES
    sparse_tiles: tuple[int, ...] = ()
    short_vectors: bool = False
    chains: int = 0
    indices_ahead: int = 1
    narrow_index: bool = False
    scalar_factors: bool = False
    index_unit: int = 2
    row_vectors: int = 0
    segment: int = 4
    joined: int = 1
    dense_blocks: Blocks = ()
    coded_blocks: Blocks = ()

    @property
    def is_flat(self) -> bool:
        """True if maps are gathered flat: whole vectors, what lies outside masked to zero.

        Not where a vector is one value, which is inside or outside, and instructions count.
        """
        return self.lanes > 1 or not self.narrow_index

    @property
    def shuffle_lanes(self) -> int:
        """Lanes of vectors whose lanes are exchanged or picked.

        LLVM takes the lanes of an SVE register, which may be longer, through memory.
        """
        return 4 if self.sve_bits else self.lanes

    @property
    def panel_line(self) -> int:
        """Float32 values of which a row of a gathered panel takes a multiple: whole vectors.

        A row of whole cache lines would make larger panels, of fewer columns: more partial sums.
        """
        return max(self.lanes, self.index_unit, 2)

    @property
    def lookup_lanes(self) -> int:
        """Lanes that one instruction looks up in a table of 8 (`emit.look_up`); 0: none does."""
        has = self.arch == "x86_64" and self.output in ("library", "bare") and self.has("avx2")
        return self.lanes if has else 0

    def has(self, feature: str) -> bool:
        """True if generated code may use `feature`."""
        return feature in self.features or feature in self.extra_features

    def with_features(self, extra: Iterable[str]) -> "Target":
        """The same machine with more features and what they imply.

        Raises:
            UnsupportedError: the family has no such feature; names the nearest.
        """
        table = {f.name: f for f in self.known_features}
        for name in extra:
            if name not in table:
                raise UnsupportedError(_unknown("feature", name, table, str(self)))
        closed = closure(extra, table) - set(self.features)
        return dataclasses.replace(self, extra_features=tuple(sorted(closed)))

    @property
    def packages(self) -> tuple[str, ...]:
        """Debian packages that link for this machine and run its programs elsewhere."""
        linker = self.linker if self.output == "wasm" else self.linker[:1]
        tools = (*linker, *self.emulator[:1])
        return tuple(dict.fromkeys(PACKAGES[tool] for tool in tools))

    def __str__(self) -> str:
        return self.name + (":" + ",".join(self.extra_features) if self.extra_features else "")


def closure(names: Iterable[str], table: Mapping[str, Feature]) -> set[str]:
    """`names` and everything that they imply, directly or not."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += table[name].implies
    return found


def parse(text: str, known: Mapping[str, Target]) -> Target:
    """Read a target's text form.

    Raises:
        UnsupportedError: for a name or a feature that is not known; names the nearest.
    """
    name, _, features = text.partition(":")
    if name not in known:
        raise UnsupportedError(_unknown("target", name, known, "the table"))
    extra = [f for f in features.split(",") if f]
    return known[name].with_features(extra) if extra else known[name]


def _unknown(what: str, name: str, known: Mapping[str, object], owner: str) -> str:
    names = ", ".join(sorted(known)) or "none"
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    fix = f"write {near[0]}" if near else f"take one that {owner} has"
    return message(what, name, "an unknown name", names, fix + "; `sparsegraph targets` lists all")
