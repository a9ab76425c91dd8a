"""x86-64 machines: SSE4, AVX2 and AVX-512 levels as the psABI names them."""

from sparsegraph.targets.target import Feature, Target

FEATURES = (
    Feature("cx16"),
    Feature("sahf", word="lahf_lm"),
    Feature("popcnt"),
    Feature("sse3", word="pni"),
    Feature("ssse3", ("sse3",)),
    Feature("sse4.1", ("ssse3",), "sse4_1"),
    Feature("sse4.2", ("sse4.1",), "sse4_2"),
    Feature("avx", ("sse4.2",)),
    Feature("avx2", ("avx",)),
    Feature("fma", ("avx",)),
    Feature("f16c", ("avx",)),
    Feature("bmi", word="bmi1"),
    Feature("bmi2"),
    Feature("lzcnt", word="abm"),
    Feature("movbe"),
    Feature("avxvnni", ("avx2",), "avx_vnni"),
    Feature("avx512f", ("avx2", "f16c", "fma")),
    Feature("avx512bw", ("avx512f",)),
    Feature("avx512cd", ("avx512f",)),
    Feature("avx512dq", ("avx512f",)),
    Feature("avx512vl", ("avx512f",)),
    Feature("avx512vnni", ("avx512f",), "avx512_vnni"),
    Feature("avx512bf16", ("avx512bw",), "avx512_bf16"),
)

V2 = Target(
    name="x86-64-v2",
    arch="x86_64",
    triple="x86_64-linux-gnu",
    cpu="x86-64-v2",
    features=("cx16", "sahf", "popcnt", "sse3", "ssse3", "sse4.1", "sse4.2"),
    lanes=4,
    n_registers=16,
    l1_bytes=32 << 10,
    l2_bytes=256 << 10,
    linker=("x86_64-linux-gnu-gcc", "cc", "gcc"),
    emulator=("qemu-x86_64",),
    known_features=FEATURES,
    tile_vectors=(6, 4, 5, 8, 7),
    narrow_index=True,
    scalar_factors=True,
    index_unit=0,
    # a product takes a register, a weight that is used again a copy: three rows of 4 vectors, pairs
    # of `coded` rows from 4 on, and 8 vectors behind a gather spill
    dense_blocks=(
        (6, (1,)), (6, (2,)), (3, (3,)), (2, (4,)), (2, (5,)), (2, (6,)), (2, (4, 3)), (2, (4, 4)),
    ),
    coded_blocks=(
        (2, (1,)), (2, (2,)), (2, (3,)), (1, (4,)), (1, (5,)), (1, (6,)), (1, (4, 3)), (1, (4, 4)),
    ),
)  # fmt: skip
V3 = Target(
    name="x86-64-v3",
    arch="x86_64",
    triple="x86_64-linux-gnu",
    cpu="x86-64-v3",
    features=(*V2.features, "avx", "avx2", "fma", "f16c", "bmi", "bmi2", "lzcnt", "movbe"),
    lanes=8,
    n_registers=16,
    l1_bytes=32 << 10,
    l2_bytes=1 << 20,
    indices_ahead=2,
    linker=V2.linker,
    emulator=V2.emulator,
    known_features=FEATURES,
)
V4 = Target(
    name="x86-64-v4",
    arch="x86_64",
    triple="x86_64-linux-gnu",
    cpu="x86-64-v4",
    features=(*V3.features, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"),
    lanes=16,
    n_registers=32,
    l1_bytes=32 << 10,
    l2_bytes=1 << 20,
    tile_vectors=(4, 3, 13, 2, 6, 5),
    sparse_tiles=(4,),
    short_vectors=True,
    chains=9,
    indices_ahead=2,
    linker=V2.linker,
    known_features=FEATURES,
)

TARGETS = [V4, V3, V2]
