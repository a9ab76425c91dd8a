"""Plain C11 source for any compiler and machine: scalar code, no threads, no allocation."""

from sparsegraph.targets.target import Target

C11 = Target(
    name="c11",
    arch="c",
    triple="",
    cpu="",
    features=(),
    lanes=1,
    n_registers=16,
    dense_blocks=tuple((2, (n,)) for n in range(1, 9)),
    l1_bytes=16 << 10,
    l2_bytes=128 << 10,
    linker=(),
    output="c",
)

TARGETS = [C11]
