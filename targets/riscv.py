"""64-bit RISC-V machines: RV64GC without vectors, and RVV 1.0 with a declared vector length.

Code for a vector length of 128 bits also runs, with the same results, on longer vectors: it sets
the vector length to its own lanes.
"""

import dataclasses

from sparsegraph.targets.target import NARROW_TILES, WIDE_TILES, Feature, Target

FEATURES = (
    Feature("v", ("zvl128b",)),
    Feature("zvl128b"),
    Feature("zvl256b", ("zvl128b",)),
)
_SYSTEM = ("-L", "/usr/riscv64-linux-gnu")

GC = Target(
    name="riscv64",
    arch="riscv64",
    triple="riscv64-linux-gnu",
    cpu="generic-rv64",
    features=(),
    lanes=1,
    n_registers=32,
    l1_bytes=32 << 10,
    l2_bytes=128 << 10,
    linker=("riscv64-linux-gnu-gcc",),
    emulator=("qemu-riscv64", "-cpu", "rv64", *_SYSTEM),
    code_features=("m", "a", "f", "d", "c"),
    abi="lp64d",
    tile_vectors=WIDE_TILES,
    narrow_index=True,
    index_unit=0,
    row_vectors=16,
    segment=16,
)


def _vector(name: str, bits: int) -> Target:
    features = ("v", *(f"zvl{n}b" for n in (128, 256) if n <= bits))
    cpu = f"rv64,v=true,vext_spec=v1.0,vlen={bits}"
    return dataclasses.replace(
        GC,
        name=name,
        features=features,
        lanes=bits // 16,  # pairs of registers: half the instructions
        n_registers=15,  # pairs, without that of the mask register
        scalar_factors=True,
        row_vectors=0,
        segment=4,
        joined=4,  # groups of 8 registers
        tile_vectors=NARROW_TILES,
        emulator=("qemu-riscv64", "-cpu", cpu, *_SYSTEM),
        code_features=(*GC.code_features, *features),
        known_features=FEATURES,
    )


TARGETS = [_vector("riscv64-v256", 256), _vector("riscv64-v128", 128), GC]
