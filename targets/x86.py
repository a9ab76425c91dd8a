"""x86-64 machines: AVX2 and AVX-512 levels as the psABI names them."""

from sparsegraph.targets.target import Target

V3 = Target(
    name="x86-64-v3",
    arch="x86_64",
    triple="x86_64-linux-gnu",
    cpu="x86-64-v3",
    features=("avx", "avx2", "fma", "f16c", "bmi2"),
    lanes=8,
    n_registers=16,
    l1_bytes=32 << 10,
    l2_bytes=1 << 20,
    linker=("x86_64-linux-gnu-gcc", "cc", "gcc"),
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
    linker=V3.linker,
)

TARGETS = [V4, V3]
