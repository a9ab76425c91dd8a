"""32-bit Arm machines with NEON (ARMv7-A, hard-float ABI)."""

import dataclasses

from sparsegraph.targets.target import Feature, Target

FEATURES = (Feature("neon"), Feature("vfp4", ("neon",), "vfpv4"))

NEON = Target(
    name="armv7",
    arch="armv7l",
    triple="armv7-unknown-linux-gnueabihf",
    cpu="cortex-a8",
    features=("neon",),
    lanes=4,
    n_registers=16,
    l1_bytes=32 << 10,
    l2_bytes=256 << 10,
    linker=("arm-linux-gnueabihf-gcc",),
    emulator=("qemu-arm", "-L", "/usr/arm-linux-gnueabihf"),
    code_features=("neon", "use-misched"),
    function_attributes=("minsize",),  # or LLVM has no vmla: two instructions for one
    abi="hard",
    known_features=FEATURES,
    narrow_index=True,
    index_unit=0,
    coded_blocks=(*((2, (n,)) for n in range(1, 6)), (2, (3, 3)), (2, (4, 3)), (2, (4, 4))),
)  # fmt: skip
A7 = dataclasses.replace(
    NEON, name="cortex-a7", cpu="cortex-a7", features=("neon", "vfp4"), l2_bytes=512 << 10
)

TARGETS = [A7, NEON]
