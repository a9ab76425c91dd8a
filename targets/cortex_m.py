"""Arm microcontrollers without an operating system: a static library, weights as a constant.

Memory sizes of a part are not in its core's name: the bundle says what the model takes, and the
linker refuses what does not fit. `l1_bytes` and `l2_bytes` only size the tiles of products: the
data cache of the M7, one bank of the fast memory of the M55.
"""

from sparsegraph.targets.target import Feature, Target

M7 = Target(
    name="cortex-m7",
    arch="armv7e-m",
    triple="thumbv7em-unknown-none-eabihf",
    cpu="cortex-m7",
    features=("fp-armv8d16",),
    lanes=1,
    n_registers=16,  # 32 of single precision; 16 leave room for loads in flight
    l1_bytes=16 << 10,
    l2_bytes=128 << 10,
    linker=("arm-none-eabi-gcc",),
    emulator=("qemu-system-arm", "-M", "mps2-an500"),
    abi="hard",
    c_flags=("-mcpu=cortex-m7", "-mthumb", "-mfpu=fpv5-d16", "-mfloat-abi=hard"),
    known_features=(Feature("fp-armv8d16"),),
    output="bare",
    narrow_index=True,
    index_unit=0,
    dense_blocks=(*((4, (n,)) for n in range(1, 7)), (4, (4, 3)), (4, (4, 4))),
    coded_blocks=tuple((2, (n,)) for n in range(1, 9)),
)
M55 = Target(
    name="cortex-m55",
    arch="armv8.1-m.main",
    triple="thumbv8.1m.main-unknown-none-eabihf",
    cpu="cortex-m55",
    features=("mve.fp",),
    lanes=4,
    n_registers=8,
    l1_bytes=16 << 10,
    l2_bytes=128 << 10,
    linker=("arm-none-eabi-gcc",),
    emulator=("qemu-system-arm", "-M", "mps3-an547"),
    abi="hard",
    c_flags=("-mcpu=cortex-m55", "-mthumb", "-mfloat-abi=hard"),
    known_features=(Feature("mve.fp"),),
    output="bare",
    # a gather keeps a vector of zeros: six sums spill behind it, four do not
    dense_blocks=(
        (3, (1,)), (2, (2,)), (2, (2, 1)), (2, (2, 2)), (2, (2, 2, 1)), (2, (2, 2, 2)),
        (2, (2, 2, 2, 1)), (2, (2, 2, 2, 2)),
    ),
    coded_blocks=(
        (2, (1,)), (2, (2,)), (2, (3,)), (1, (4,)), (1, (5,)), (1, (6,)), (1, (4, 3)), (1, (4, 4)),
    ),
)  # fmt: skip

TARGETS = [M7, M55]
