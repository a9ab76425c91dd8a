"""Products whose lanes are rows against float64: odd sizes, several tiles, parts, epilogues."""

import math
import re
from functools import cache

import numpy as np
import pytest
from sparsegraph.targets import host, inner_loop
from sparsegraph.targets.kernels import convert
from sparsegraph.targets.kernels.panel_product import (
    VECTORS,
    PanelProduct,
    Turn,
    kernels,
    most_points,
    turns,
)
from sparsegraph.targets.layout import FeatureMajor

from sparsegraph import targets

TARGET = targets.native()
LANES = TARGET.lanes
KERNELS = kernels(LANES)


@cache
def library() -> host.Library:
    return host.Library(KERNELS, TARGET)


def layout(kernel: PanelProduct, images: int, features: int, *, planes: bool) -> FeatureMajor:
    tiles, block = len(kernel.points), kernel.block
    points = (tiles - 1) * block + kernel.points[-1]
    row = tiles * block if planes else block
    tile = block if planes else features * block
    return FeatureMajor(images, features, points, block, tiles * features * block, tile, row, 1)


@pytest.mark.parametrize("planes", [False, True])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 3), (32, 8), (65, 7), (100, 129)])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_panels(
    kernel: PanelProduct, rows: int, columns: int, images: int, parts: int, planes: bool
) -> None:
    rng = np.random.default_rng(rows + columns)
    xl, yl = (layout(kernel, images, n, planes=planes) for n in (columns, rows))
    weight = rng.standard_normal((rows, columns)).astype(np.float32)
    bias, scale = (rng.standard_normal(rows).astype(np.float32) for _ in range(2))
    x = rng.standard_normal((images, columns, xl.points)).astype(np.float32)
    rest = rng.standard_normal((images, rows, yl.points)).astype(np.float32)
    y = host.empty(yl.size + 64)
    y[:] = 7
    packed_rest = host.aligned(convert.pack(rest, yl, fill=0.5))
    operands = []
    for kind in kernel.operands:
        operands += [packed_rest, yl.image, yl.tile, yl.row] if kind == "same" else [scale]
    panels = -(-rows // kernel.rows)
    streams = [host.aligned(array) for _, array in kernel.streams(weight, bias)]
    library().call(
        kernel, y, yl.image, yl.tile, yl.row,
        host.aligned(convert.pack(x, xl, fill=np.nan)), xl.image, xl.tile, xl.row,
        images, xl.tiles, rows, columns, panels, parts, *streams, *operands,
        end=images * xl.tiles * parts,
    )  # fmt: skip
    wide = x.astype(np.float64)
    expected = np.einsum("nk,ikp->inp", weight, wide) + bias[:, None]
    size = np.einsum("nk,ikp->inp", np.abs(weight), np.abs(wide)) + np.abs(bias[:, None])
    if kernel.operands:
        expected = expected * scale[:, None] + rest
        size = size * np.abs(scale[:, None]) + np.abs(rest)
    if kernel.epilogue and kernel.epilogue[0] == "Relu":
        expected = np.maximum(expected, 0)
    if kernel.epilogue and kernel.epilogue[0] == "Gelu":
        erf = np.vectorize(math.erf)
        expected = expected * 0.5 * (1 + erf(expected / np.sqrt(2)))
    got = convert.unpack(y[: yl.size], yl)
    assert (np.abs(got - expected) <= 1e-6 * size + 1e-6).all()
    assert (y[yl.size :] == 7).all(), "wrote past the end"


def test_points_are_shared_out() -> None:
    assert list(turns(49, 14, 64, 16)) == [Turn(0, 13, 1, 16), Turn(13, 12, 3, 16)]
    assert list(turns(196, 14, 208, 16)) == [Turn(0, 14, 14, 16)]
    assert list(turns(64, 14, 64, 16)) == [Turn(0, 13, 4, 16), Turn(52, 12, 1, 12)]
    assert list(turns(1, 6, 8, 8)) == [Turn(0, 1, 1, 8)]


@pytest.mark.parametrize(
    ("points", "block"), [(1, 8), (5, 8), (8, 8), (23, 24), (24, 24), (13, 40), (37, 40), (40, 40)]
)
def test_every_point_is_computed_once_and_no_store_leaves_the_tile(points: int, block: int) -> None:
    at = 0
    for turn in turns(points, 6, block, 8):
        for _ in range(turn.times):
            assert turn.points <= 6
            assert turn.points <= turn.stored
            assert at + turn.stored <= block
            at += turn.points
    assert at == points


@pytest.mark.parametrize("name", ["x86-64-v3", "x86-64-v4"])
def test_sums_stay_in_registers(name: str) -> None:
    """Two loads of weights, a broadcast for each point, and multiply-adds; nothing on the stack."""
    target = targets.get(name)
    syntax, most = inner_loop.SYNTAX[target.arch], most_points(target)
    kernel = PanelProduct(target.lanes, 4 * target.lanes, (most,), most, ("Relu", ("arg", 0)))
    loops = inner_loop.inner_loops(inner_loop.assembly(target, kernel), syntax)
    assert len(loops) == 1
    fused = [x for x in loops[0] if re.search(syntax.fused, x)]
    n_columns = len(fused) // (VECTORS * most)
    assert len(fused) == n_columns * VECTORS * most
    assert sum(bool(re.search(syntax.load, x)) for x in loops[0]) == n_columns * (VECTORS + most)
    assert not any(re.search(syntax.stack, x) for x in loops[0])
