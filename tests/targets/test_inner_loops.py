"""Emitted inner loops: what they are made of, counted in the assembly, for every target."""

import dataclasses
import re
import shutil

import numpy as np
import pytest
from sparsegraph.targets import inner_loop
from sparsegraph.targets.kernels import depthwise, depthwise_masked, norm, recurrent
from sparsegraph.targets.kernels import slots as slots_kernel
from sparsegraph.targets.kernels.direct import Axis, Direct
from sparsegraph.targets.kernels.gather import FLAT
from sparsegraph.targets.kernels.product import Product
from sparsegraph.targets.kernels.recurrent import Recurrent

from benchmarks import inner_loops
from sparsegraph import targets
from sparsegraph.errors import UnsupportedError
from sparsegraph.formats import ALIKE
from sparsegraph.lower.choose import alike_vectors

# target: (multiply-adds, loads of a round, vector register) of dense and of coded products.
# Without fused instructions a multiplication and an addition count as one multiply-add.
MIX = {
    "x86-64-v2": ((8, 4, r"%xmm"), (32, 32, r"%xmm")),
    "x86-64-v3": ((12, 7, r"%ymm"), (32, 20, r"%ymm")),
    "x86-64-v4": ((24, 10, r"%zmm"), (32, 20, r"%zmm")),
    "aarch64": ((24, 3, r"\bv\d+\.4s"), (32, 9, r"\bv\d+\.4s")),
    "aarch64-sve256": ((24, 4, r"\bz\d+\.s"), (32, 17, r"\bz\d+\.s")),
    "a64fx": ((96, 40, r"\bz\d+\.s"), (64, 35, r"\bz\d+\.s")),
    "riscv64": ((20, 9, r"\bf[tsa]\d+"), (32, 24, r"\bf[tsa]\d+")),
    "riscv64-v128": ((2, 3, r"\bv\d+"), (8, 16, r"\bv\d+")),  # of four vectors each
    "riscv64-v256": ((2, 3, r"\bv\d+"), (8, 16, r"\bv\d+")),
    "armv7": ((12, 7, r"\bq\d+"), (32, 18, r"\bq\d+")),
    "cortex-m7": ((64, 32, r"\bs\d+"), (64, 48, r"\bs\d+")),
    "cortex-m55": ((4, 2, r"\bq\d+"), (16, 17, r"\bq\d+")),
}  # fmt: skip


@pytest.mark.parametrize("weight", ["dense", "coded"])
@pytest.mark.parametrize("name", MIX)
def test_inner_loops(name: str, weight: str) -> None:
    target = targets.get(name)
    kernel = inner_loops.kernel_for(target, weight)
    loop = inner_loop.look(target, kernel)
    assert loop.spills == 0
    expected = MIX[name][weight == "coded"]
    if expected is None:
        return
    n_fused, n_loads, register = expected
    assert loop.fused + loop.products == n_fused
    assert loop.loads <= n_loads
    assert (loop.fused > 0) == (name != "x86-64-v2")
    syntax = inner_loop.SYNTAX[target.arch]
    body = inner_loop.inner_loop(inner_loop.assembly(target, kernel), syntax)
    work = [x for x in body if re.search(f"{syntax.fused}|{syntax.product}", x)]
    assert all(re.search(register, x) for x in work)


@pytest.mark.parametrize("weight", ["dense", "coded"])
@pytest.mark.parametrize("name", MIX)
def test_no_tile_spills(name: str, weight: str) -> None:
    """Tiles of other widths, small maps too; of the widest behind a gather and an epilogue, too."""
    target = targets.get(name)
    kernels = [inner_loops.kernel_for(target, weight, n) for n in (3, 6, 8)]
    step = FLAT if target.is_flat else 1
    kernels.append(dataclasses.replace(kernels[-1], gather=step, epilogue=("Relu", ("arg", 0))))
    found = {k.name: inner_loop.look(target, k).spills for k in kernels}
    assert found == dict.fromkeys(found, 0)


@pytest.mark.parametrize(
    ("weight", "group", "split", "points", "step"),
    [
        ("dense", 6, (4,), (52,), None), ("dense", 7, (3,), (48, 4), FLAT),
        ("dense", 6, (4, 3, 3, 3), (200,), 2), ("coded", 2, (2,), (32, 4), FLAT),
        ("coded", 2, (2,), (20,), None), ("coded", 2, (4, 3, 3, 3), (200,), None),
        ("coded", 4, (6,), (96, 72), None), ("dense", 8, (1,), (4,), None),
    ],
)  # fmt: skip
def test_short_vectors_at_the_end_stay_in_registers(
    weight: str, group: int, split: tuple[int, ...], points: tuple[int, ...], step: int | None
) -> None:
    target = targets.get("x86-64-v4")
    kernel = Product(weight, group, split, 16, step, ("Relu", ("arg", 0)), near=True, points=points)
    assert target.short_vectors
    assert inner_loop.look(target, kernel).spills == 0


@pytest.mark.parametrize(("name", "n_asked"), [("x86-64-v4", 0), ("x86-64-v3", 2 * 2)])
def test_sums_are_asked_for_unless_a_store_fills_a_cache_line(name: str, n_asked: int) -> None:
    target = targets.get(name)
    kernel = inner_loops.kernel_for(target, "coded", 32 // target.lanes)  # two lines, two rows
    lines = inner_loop.assembly(target, kernel)
    assert sum("prefetch" in line for line in lines) == n_asked


@pytest.mark.parametrize("vectors", [2, 4])
def test_sums_of_a_pair_take_turns_until_none_waits(vectors: int) -> None:
    target = targets.get("x86-64-v4")
    found = inner_loop.look(target, inner_loops.kernel_for(target, "coded", vectors))
    assert found.registers > 2 * 2 * vectors  # two rows, two turns


SQUARE = Axis(16, 16, 3, 1, 1)


@pytest.mark.parametrize(
    ("axis", "tile"),
    [(SQUARE, (1, 16)), (Axis(8, 8, 3, 1, 1), (2, 8)), (Axis(8, 4, 3, 2, 1), (4, 4))],
)
def test_maps_that_are_read_in_place(axis: Axis, tile: tuple[int, int]) -> None:
    """Four values a round: a load and a multiply-add per point, three instructions per value."""
    kernel = Direct(axis, axis, tile, epilogue=("Relu", ("arg", 0)))
    loop = inner_loop.look(targets.get("riscv64"), kernel)
    assert (loop.fused, loop.products, loop.spills) == (64, 0, 0)
    assert loop.loads == 64 + 4
    assert loop.instructions <= 64 + 68 + 2 * 4 + 3
    assert inner_loop.kernel_of(kernel.name) == dataclasses.replace(kernel, epilogue=None)
    wide = dataclasses.replace(kernel, offset="int32", pad=7, epilogue=None)
    assert inner_loop.kernel_of(wide.name) == wide


@pytest.mark.parametrize("gather", [FLAT, 1, 2, 3])
@pytest.mark.parametrize("vectors", [4, 5, 6, 7, 8])
def test_loops_behind_a_gathered_panel_have_all_registers(vectors: int, gather: int) -> None:
    target = targets.get("x86-64-v3")
    kernel = inner_loops.kernel_for(target, "dense", vectors)
    loop = inner_loop.look(target, dataclasses.replace(kernel, gather=gather))
    assert loop.spills == 0
    assert loop.instructions <= 2.2 * loop.fused


@pytest.mark.parametrize(
    ("name", "vectors"),
    [("x86-64-v3", 3), ("x86-64-v4", 6), ("aarch64", 6), ("aarch64", 4), ("aarch64-sve256", 6)],
)
def test_four_rows_alike_share_every_activation_load(name: str, vectors: int) -> None:
    target = targets.get(name)
    assert alike_vectors(target) >= vectors
    unit = target.index_unit
    kernel = Product("coded", ALIKE, (vectors,), target.lanes, near=True, unit=unit,
                     narrow=target.narrow_index)  # fmt: skip
    loop = inner_loop.look(target, kernel)
    assert loop.spills == 0
    assert loop.fused == 4 * ALIKE * vectors  # of four columns
    assert loop.loads <= 4 * (vectors + ALIKE) + 4


# accesses to the stack in a round of windows of 3x3, of 5x5, of norms, and of windows whose taps
# are a loop; on Arm most are addresses, in norms all. With SSE fewer would cost more than they save
FROM_STACK = {
    "aarch64": (0, 0, 0, 0), "aarch64-sve256": (0, 0, 0, 0), "riscv64": (0, 0, 0, 0),
    "riscv64-v128": (0, 1, 0, 0), "riscv64-v256": (0, 1, 0, 0), "x86-64-v4": (0, 0, 0, 0),
    "x86-64-v3": (0, 0, 3, 0), "x86-64-v2": (1, 3, 0, 0), "armv7": (3, 12, 0, 0),
    "cortex-m55": (9, 8, 2, 2),
}  # fmt: skip


@pytest.mark.parametrize("name", FROM_STACK)
def test_windows_and_norms_stay_in_registers(name: str) -> None:
    target = targets.get(name)
    syntax = inner_loop.SYNTAX[target.arch]
    by_stride = {1: target.lanes, 2: target.shuffle_lanes}  # horizontal; as lowering has it
    windows = [
        dataclasses.replace(k, spread=depthwise_masked.is_spread(k.window, target))
        for n, lanes in by_stride.items() for k in depthwise_masked.kernels(lanes)
        if k.window.stride[1] == n
    ]  # fmt: skip
    small, large = ([k for k in windows if k.window.kernel == (n, n)] for n in (3, 5))
    assert len({k.window.stride for k in small}) == 3
    assert large
    families = (small, large, norm.kernels(target.lanes), depthwise.kernels(target.lanes))
    for kernels, most in zip(families, FROM_STACK[name], strict=True):
        for kernel in kernels:
            loops = inner_loop.inner_loops(inner_loop.assembly(target, kernel), syntax)
            found = [sum(bool(re.search(syntax.stack, x)) for x in loop) for loop in loops]
            assert max(found) <= most, kernel.name


COLUMN = "movzwl|ldrh|lhu"  # loads of 16 bits


@pytest.mark.parametrize(
    ("name", "rows", "instructions"),
    [("x86-64-v3", 4, 14), ("x86-64-v4", 16, 14), ("aarch64", 4, 17), ("riscv64", 1, 27),
     ("riscv64-v256", 16, 31)],
)  # fmt: skip
def test_slots_of_recurrent_weights(name: str, rows: int, instructions: int) -> None:
    """Four of a number, a value that is spread, values and a multiply-add; nothing on the stack."""
    target = targets.get(name)
    syntax = inner_loop.SYNTAX[target.arch]
    lines = inner_loop.assembly(target, Recurrent("lstm", target.lanes, rows, coded=True))
    loops = [x for x in inner_loop.innermost(lines, syntax) if re.search(COLUMN, " ".join(x))]
    fused = [sum(bool(re.search(syntax.fused, line)) for line in loop) for loop in loops]
    slots = loops[int(np.argmax(fused))]
    turns, rest = divmod(max(fused), slots_kernel.UNROLLED)
    assert (turns in (1, 2), rest) == (True, 0)
    assert not any(re.search(syntax.stack, line) for line in slots)
    assert len(slots) <= turns * instructions


@pytest.mark.parametrize(
    ("name", "most"),
    [("x86-64-v2", 0), ("x86-64-v3", 0), ("x86-64-v4", 0), ("aarch64", 6), ("riscv64", 4)],
)
def test_gates_stay_in_registers(name: str, most: int) -> None:
    """`most`: constants that LLVM moves out of the loop, to the stack."""
    target = targets.get(name)
    syntax = inner_loop.SYNTAX[target.arch]
    for kernel in recurrent.kernels(target.lanes):
        loops = inner_loop.inner_loops(inner_loop.assembly(target, kernel), syntax)
        found = [sum(bool(re.search(syntax.stack, x)) for x in loop) for loop in loops]
        assert len(loops) > 1
        assert max(found) <= most, kernel.name


LINES = """
outer:
ldr q1, [x0]
.L1:
fmla v0.4s, v1.4s, v2.s[0]
str q0, [sp, #16]
ldr q3, [x1]
subs x3, x3, #1
b.ne .L1
.L2:
fmla v0.4s, v1.4s, v2.s[0]
fmla v0.4s, v1.4s, v2.s[0]
b.ne .L2
b.ne outer
.L3:
fmla v0.4s, v1.4s, v2.s[0]
fmla v0.4s, v1.4s, v2.s[0]
fmla v0.4s, v1.4s, v2.s[0]
ret
"""


def test_the_innermost_loop_with_the_most_work_is_found() -> None:
    syntax = inner_loop.SYNTAX["aarch64"]
    lines = LINES.split("\n")
    assert len(inner_loop.inner_loop([x for x in lines if x], syntax)) == 3
    first = [x for x in lines[:9] if x]
    body = inner_loop.inner_loop(first, syntax)
    assert sum(bool(re.search(syntax.stack, x)) for x in body) == 1
    assert sum(bool(re.search(syntax.load, x)) for x in body) == 1


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("aarch64", Product("dense", 7, (4,), 4)),
        ("riscv64", Product("dense", 8, (4,), 1)),
        ("riscv64-v128", Product("coded", 2, (6,), 8)),
    ],
    ids=str,
)
def test_a_block_that_is_too_large_spills(name: str, kernel: Product) -> None:
    assert inner_loop.look(targets.get(name), kernel).spills > 0


@pytest.mark.parametrize(
    ("line", "spilled"),
    [
        ("vl2r.v v12, (s0)", True), ("vs1r.v v8, (a2)", True), ("vl1re32.v v8, (a2)", True),
        ("sd a0, 16(sp)", True), ("vle32.v v12, (s0)", False), ("vse32.v v12, (s0)", False),
    ],
)  # fmt: skip
def test_spills_of_whole_vector_registers_count(line: str, spilled: bool) -> None:
    assert bool(re.search(inner_loop.SYNTAX["riscv64"].stack, line)) == spilled


@pytest.mark.parametrize(
    ("name", "saved"),
    [("aarch64", 2), ("aarch64-sve256", 2), ("riscv64", 4), ("riscv64-v128", 4)],
)
def test_indices_loaded_one_by_one_take_less(name: str, saved: int) -> None:
    target = targets.get(name)
    assert target.narrow_index
    kernel = dataclasses.replace(inner_loops.kernel_for(target, "coded"), near=True)
    whole = dataclasses.replace(kernel, narrow=False, unit=2)
    loops = [inner_loop.look(target, k) for k in (whole, kernel)]
    assert loops[0].fused == loops[1].fused
    assert loops[0].instructions - loops[1].instructions >= saved
    assert loops[1].spills == 0


def test_estimates_are_of_one_round() -> None:
    if shutil.which("llvm-mca") is None:
        pytest.skip("needs llvm-mca (Debian: llvm)")
    target = targets.get("raspberry-pi-5")
    one = inner_loop.estimate(target, ["fadd v0.4s, v0.4s, v1.4s"])
    four = inner_loop.estimate(target, ["fadd v0.4s, v0.4s, v1.4s"] * 4)
    assert one
    assert four
    assert 1 < one < 10
    assert four == pytest.approx(4 * one, rel=0.1)
    assert inner_loop.estimate(target, ["no such instruction"]) is None


def test_unknown_targets_are_named() -> None:
    with pytest.raises(UnsupportedError, match="rasberry"):
        inner_loops.main(["--on", "rasberry-pi-5"])


def test_kernels_are_known_by_their_names() -> None:
    relu = ("Relu", ("arg", 0))
    for kernel in (
        Product("dense", 6, (4, 4), 4, 2),
        Product("dense", 8, (1,), 4, batch=16),
        Product("coded", 2, (4,), 8, 0, near=True, far=True),
        Product("coded", 1, (7,), 16),
        Product("coded", 2, (8,), 4, near=True, unit=4, narrow=True),
        Product("coded", 2, (8,), 1, narrow=True),
        Product("coded", 2, (4,), 8, near=True, narrow=True, joined=4),
        Product("coded", 2, (2,), 16, 0, near=True, points=(32, 4)),
        Product("dense", 6, (4,), 16, batch=16, points=(52,)),
    ):
        assert inner_loop.kernel_of(kernel.name) == kernel
        assert inner_loop.kernel_of(dataclasses.replace(kernel, epilogue=relu).name) == kernel
    assert inner_loop.kernel_of("winograd_input_f32_m4_l4") is None


def test_estimates_per_core() -> None:
    if shutil.which(inner_loop.TOOL) is None:
        pytest.skip("needs llvm-mca (Debian: llvm)")
    target = targets.get("aarch64")
    cores = inner_loop.CORES[target.arch]
    found = inner_loop.look(target, Product("dense", 4, (4,), 4), cores)
    wide, narrow = found.cycles["cortex-a76"], found.cycles["cortex-a55"]
    assert wide is not None
    assert narrow is not None
    assert wide >= found.work / 2  # two vector pipes
    assert narrow > wide
