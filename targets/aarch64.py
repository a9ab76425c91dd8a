"""64-bit Arm machines with NEON, on Linux: a baseline for all, and presets for common cores.

Cache sizes are those of one core as its maker documents them; where the maker leaves a choice,
that of the named board. `sve` and `sve2` allow these instructions, but vectors of 128 bits stay in
NEON registers. The targets that declare longer registers (`aarch64-sve256`, `a64fx`) use SVE, and
their code also runs, with the same results, on registers longer than declared.
"""

import dataclasses

from sparsegraph.targets.target import WIDE_TILES, Feature, Target

FEATURES = (
    Feature("neon", word="asimd"),
    Feature("fullfp16", ("neon",), "asimdhp"),
    Feature("dotprod", ("neon",), "asimddp"),
    Feature("bf16", ("neon",)),
    Feature("i8mm", ("neon",)),
    Feature("sve", ("fullfp16",)),
    Feature("sve2", ("sve",)),
)

NEON = Target(
    name="aarch64",
    arch="aarch64",
    triple="aarch64-linux-gnu",
    cpu="generic",  # scheduled for a named core, LLVM spills in dense products that gather
    features=("neon",),
    lanes=4,
    n_registers=32,
    l1_bytes=32 << 10,
    l2_bytes=512 << 10,
    linker=("aarch64-linux-gnu-gcc",),
    emulator=("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"),
    known_features=FEATURES,
    tile_vectors=WIDE_TILES,
    narrow_index=True,
    index_unit=4,
)
SVE_BITS = (256, 512)  # register lengths that targets declare, as features `sve256b`, `sve512b`
_V82 = ("neon", "dotprod", "fullfp16")
_SVE = (*_V82, "bf16", "i8mm", "sve")


def _core(name: str, cpu: str, features: tuple[str, ...], l1_kib: int, l2_kib: int) -> Target:
    return dataclasses.replace(
        NEON, name=name, cpu=cpu, features=features, l1_bytes=l1_kib << 10, l2_bytes=l2_kib << 10
    )


def _sve(
    name: str, cpu: str, features: tuple[str, ...], bits: int, l1_kib: int, l2_kib: int
) -> Target:
    lengths = tuple(Feature(f"sve{n}b", ("sve",)) for n in SVE_BITS if n <= bits)
    core = _core(name, cpu, (*features, *(f.name for f in lengths)), l1_kib, l2_kib)
    known = (*FEATURES, *lengths)
    return dataclasses.replace(core, lanes=bits // 32, sve_bits=bits, known_features=known)


TARGETS = [
    NEON,
    _core("cortex-a53", "cortex-a53", ("neon",), 32, 512),
    _core("cortex-a55", "cortex-a55", _V82, 32, 128),
    _core("raspberry-pi-4", "cortex-a72", ("neon",), 32, 1024),
    _core("raspberry-pi-5", "cortex-a76", _V82, 64, 512),
    _core("neoverse-n1", "neoverse-n1", _V82, 64, 1024),
    _core("neoverse-v1", "neoverse-v1", _SVE, 64, 1024),
    _core("neoverse-v2", "neoverse-v2", (*_SVE, "sve2"), 64, 2048),
    _core("apple-m1", "apple-m1", _V82, 128, 12 << 10),
    _sve("aarch64-sve256", "neoverse-v1", _SVE, 256, 64, 1024),
    _sve("a64fx", "a64fx", ("neon", "fullfp16", "sve"), 512, 64, 640),
]
