"""WebAssembly with 128-bit SIMD: a module and a JavaScript loader, for browsers and Node.

`wasm:relaxed-simd` uses fused multiply-adds where the CPU has them, so that results differ in the
last bits between machines; Node 20 wants `--experimental-wasm-relaxed-simd`.
"""

from sparsegraph.targets.target import WIDE_TILES, Feature, Target

SIMD = Target(
    name="wasm",
    arch="wasm32",
    triple="wasm32-unknown-unknown",
    cpu="generic",
    features=("simd128",),
    lanes=4,
    n_registers=16,  # of the x86-64 and Arm machines below the engine, the fewest
    l1_bytes=32 << 10,
    l2_bytes=256 << 10,
    linker=("clang", "wasm-ld"),
    emulator=("node",),
    code_features=("simd128",),
    known_features=(Feature("simd128"), Feature("relaxed-simd", ("simd128",))),
    output="wasm",
    tile_vectors=WIDE_TILES,
    narrow_index=True,
    index_unit=0,
)

TARGETS = [SIMD]
