"""64-bit Arm machines with NEON."""

from sparsegraph.targets.target import Target

NEON = Target(
    name="aarch64",
    arch="aarch64",
    triple="aarch64-linux-gnu",
    cpu="cortex-a76",
    features=("neon",),
    lanes=4,
    n_registers=32,
    l1_bytes=64 << 10,
    l2_bytes=512 << 10,
    linker=("aarch64-linux-gnu-gcc",),
    emulator=("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"),
)

TARGETS = [NEON]
