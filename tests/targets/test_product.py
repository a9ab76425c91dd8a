"""Product kernels against float64: every variant, odd sizes, all densities, threads, epilogues."""

import dataclasses
from functools import cache
from typing import Any

import numpy as np
import pytest
from sparsegraph.targets import host
from sparsegraph.targets.kernels import convert
from sparsegraph.targets.kernels.product import (
    BYTES,
    Product,
    computed_points,
    joined,
    reference,
)
from sparsegraph.targets.layout import FeatureMajor, blocked
from sparsegraph.targets.target import Target

from sparsegraph import formats, targets

TARGET = targets.native()
SPARING = dataclasses.replace(TARGET, narrow_index=True, scalar_factors=True, joined=4)
"""This machine, with code as for those where instructions are what counts."""
V4 = targets.get("x86-64-v4")
SHORT = dataclasses.replace(TARGET, short_vectors=True)
LANES = TARGET.lanes
DENSITIES = (0.0, 0.01, 0.5, 0.9, 1.0)
A0, A1, A2 = ("arg", 0), ("arg", 1), ("arg", 2)
BLOCKS = [  # weight, group, split
    ("dense", 1, (1,)), ("dense", 1, (8,)), ("dense", 2, (6,)), ("dense", 3, (4,)),
    ("dense", 2, (5,)), ("dense", 3, (4, 3)), ("dense", 3, (4, 4)), ("dense", 1, (7,)),
    ("coded", 1, (1,)), ("coded", 1, (8,)), ("coded", 2, (6,)), ("coded", 2, (4,)),
    ("coded", 2, (5,)), ("coded", 2, (1,)), ("coded", 2, (4, 3)), ("coded", 1, (7,)),
    ("dense", 6, (4, 3, 3, 3)), ("coded", 2, (4, 3, 3, 3)),
    ("coded", 4, (3,)), ("coded", 4, (3, 3)), ("coded", 4, (3, 2, 2)), ("coded", 4, (1,)),
]  # fmt: skip
EPILOGUES = [
    (None, ()),
    (("Relu", A0), ()),
    (("Gelu", ("Add", A0, A1)), ("feature",)),
    (("Clip", ("Add", ("Mul", A0, A1), A2), ("const", 0.0), ("const", 6.0)), ("feature", "same")),
]


@cache
def library(kernel: Product, target: Target = TARGET) -> host.Library:
    return host.Library([kernel], target)


def sparse(shape: tuple[int, ...], density: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(shape).astype(np.float32)
    weight[rng.random(shape) >= density] = 0
    return weight


def pack(planes: np.ndarray, layout: FeatureMajor) -> np.ndarray:
    return host.aligned(convert.pack(planes, layout, fill=0.25))


def with_block(layout: FeatureMajor, block: int) -> FeatureMajor:
    """The same value in tiles of `block` points, blocked."""
    tiles, row = -(-layout.points // block), -(-block // 16) * 16
    image = tiles * layout.features * row
    return FeatureMajor(layout.images, layout.features, layout.points, block, image,
                        layout.features * row, row, layout.axis)  # fmt: skip


def run(
    kernel: Product, weight: np.ndarray, x: np.ndarray, bias: np.ndarray, tile: int, chunks: int,
    operands: list[np.ndarray], reach: int = 0, target: Target = TARGET,
) -> np.ndarray:  # fmt: skip
    """The kernel on planes x [images, columns, points]; result [images, rows, points]."""
    y, layout = written(kernel, weight, x, bias, tile, chunks, operands, reach, target)
    return convert.unpack(y, layout)


def written(
    kernel: Product, weight: np.ndarray, x: np.ndarray, bias: np.ndarray, tile: int, chunks: int,
    operands: list[np.ndarray], reach: int = 0, target: Target = TARGET,
) -> tuple[np.ndarray, FeatureMajor]:  # fmt: skip
    """What `run` leaves in memory that held NaN, and the layout of the result."""
    images, columns, points = x.shape
    rows = len(weight)
    xl = with_block(blocked(images, columns, points, 1, TARGET), kernel.block)
    yl = with_block(blocked(images, rows, points, 1, TARGET), kernel.block)
    y = host.aligned(np.full(yl.size + 64, np.nan, np.float32))
    if kernel.weight == "coded":
        step = (xl.row // kernel.unit if kernel.unit else 4 * xl.row) if kernel.near else 1
        packed = formats.pack_coded(weight, kernel.group, tile, chunks, reach=reach, step=step)
    else:
        packed = formats.pack_dense(weight, kernel.group, tile, chunks)
    args: list[Any] = [y, yl.image, yl.tile, yl.row, pack(x, xl), xl.image, xl.tile, xl.row,
                       images, yl.tiles, columns, tile, host.aligned(bias)]  # fmt: skip
    args += [host.aligned(array) for _, array in kernel.streams(packed)]
    for value, kind in zip(operands, kernel.operands):
        if kind == "feature":
            args.append(host.aligned(value))
        else:
            args += [pack(value, yl), yl.image, yl.tile, yl.row]
    library(kernel, target).call(kernel, *args, end=images * yl.tiles * len(packed.chunks))
    return y, yl


def bound(weight: np.ndarray, x: np.ndarray) -> float:
    """4 sqrt(K) eps sum |w||x|, the largest over the outputs, plus the epilogue's own error."""
    total = np.abs(weight).astype(np.float64) @ np.abs(x)
    return float(4 * np.sqrt(weight.shape[1]) * 6e-8 * total.max() + 4e-6)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
@pytest.mark.parametrize("alike", [1, 4])
def test_every_variant_equals_the_reference(
    alike: int, blocks: tuple[str, int, tuple[int, ...]], density: float
) -> None:
    kernel = Product(*blocks, LANES, near=alike == 4, far=alike == 4)
    for seed, (rows, columns, points, tile, chunks, reach) in enumerate(
        [(1, 1, 1, 1, 1, 0), (7, 13, 50, 5, 1, 2), (37, 50, 131, 64, 3, 0), (40, 90, 70, 24, 2, 12)]
    ):
        rows += -rows % kernel.group if kernel.weight == "coded" and kernel.group == 4 else 0
        weight = sparse((rows, columns), density, seed)
        weight *= weight[np.arange(rows) // alike * alike] != 0  # groups of rows share their zeros
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((2, columns, points)).astype(np.float32)
        bias = rng.standard_normal(rows).astype(np.float32)
        got = run(kernel, weight, x, bias, tile, chunks, [], reach)
        for i in range(2):
            error = np.abs(got[i] - reference(weight, x[i], bias)).max()
            assert error <= bound(weight, x[i])


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
@pytest.mark.parametrize("points", [1, 5, LANES, 2 * LANES + 3, 4 * LANES, 5 * LANES + 7])
def test_of_the_last_tile_only_its_points_are_computed(
    points: int, blocks: tuple[str, int, tuple[int, ...]]
) -> None:
    kernel = Product(*blocks, LANES)
    kernel = dataclasses.replace(kernel, points=computed_points(points, kernel.block, SHORT))
    rng = np.random.default_rng(points)
    weight = sparse((20, 30), 0.3, points)
    weight *= weight[np.arange(20) // 4 * 4] != 0
    bias = rng.standard_normal(20).astype(np.float32)
    x = rng.standard_normal((2, 30, points)).astype(np.float32)
    y, layout = written(kernel, weight, x, bias, 13, 2, [])
    got = convert.unpack(y, layout)
    for i in range(2):
        error = np.abs(got[i] - reference(weight, x[i], bias)).max()
        assert error <= bound(weight, x[i])
    block = kernel.block
    last = (kernel.points or (block,))[-1]
    every = dataclasses.replace(layout, points=layout.tiles * block)
    behind = convert.unpack(y, every)[:, :, (layout.tiles - 1) * block + last :]
    assert np.isnan(behind).all()


def test_whole_vectors_and_a_short_one_are_computed() -> None:
    of = {(p, b): computed_points(p, b, V4) for p, b in (
        (49, 64), (196, 32), (197, 208), (64, 64), (128, 64), (7, 16), (9, 16), (33, 32), (40, 48)
    )}  # fmt: skip
    assert of == {
        (49, 64): (52,), (196, 32): (32, 4), (197, 208): (200,), (64, 64): (), (128, 64): (),
        (7, 16): (8,), (9, 16): (), (33, 32): (32, 4), (40, 48): (40,),
    }  # fmt: skip
    assert computed_points(49, 56, targets.get("x86-64-v3")) == ()


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize(("near", "unit"), [(False, 2), (True, 2), (True, 4), (True, BYTES)])
@pytest.mark.parametrize(("lanes", "vectors"), [(4, 5), (1, 5), (4, 1), (8, 4), (4, 6)])
def test_indices_loaded_one_by_one(
    lanes: int, vectors: int, near: bool, unit: int, group: int
) -> None:
    """Whatever this machine is, as those with `Target.narrow_index` read their weights."""
    n = joined((vectors,), SPARING)
    kernel = Product("coded", group, (vectors,), lanes, near=near, far=near, unit=unit, narrow=True)
    kernel = dataclasses.replace(kernel, joined=n)
    rng, rows = np.random.default_rng(5), 20 if group == 4 else 19
    weight = sparse((rows, 61), 0.3, 5)
    weight *= weight[np.arange(rows) // 2 * 2] != 0
    x = rng.standard_normal((2, 61, 47)).astype(np.float32)
    bias = rng.standard_normal(rows).astype(np.float32)
    got = run(kernel, weight, x, bias, 24, 2, [], reach=12, target=SPARING)
    for i in range(2):
        error = np.abs(got[i] - reference(weight, x[i], bias)).max()
        assert error <= bound(weight, x[i])


def test_vectors_are_joined_where_every_pass_is_a_multiple() -> None:
    splits = ((4,), (8, 4), (6,), (4, 2), (5,), (4, 3))
    assert [joined(s, SPARING) for s in splits] == [4, 4, 2, 2, 1, 1]
    assert {joined(s, TARGET) for s in splits} == {1}


@pytest.mark.parametrize(("split", "n"), [((4,), 4), ((4, 2), 2), ((2, 2, 2), 2)])
@pytest.mark.parametrize("tree", [None, ("Gelu", ("Add", A0, A1))], ids=["sums", "gelu"])
def test_joined_vectors_of_dense_products(split: tuple[int, ...], n: int, tree: Any) -> None:
    kinds = () if tree is None else ("same",)
    kernel = Product("dense", 2, split, 4, None, tree, kinds, joined=n)
    rng = np.random.default_rng(6)
    weight, bias = sparse((7, 23), 1.0, 6), rng.standard_normal(7).astype(np.float32)
    x = rng.standard_normal((2, 23, 45)).astype(np.float32)
    operands = [rng.standard_normal((2, 7, 45)).astype(np.float32) for _ in kinds]
    got = run(kernel, weight, x, bias, 9, 1, operands)
    for i in range(2):
        expected = reference(weight, x[i], bias, tree, *(o[i] for o in operands))
        assert np.abs(got[i] - expected).max() <= bound(weight, x[i])


@pytest.mark.parametrize(("tree", "kinds"), EPILOGUES, ids=str)
@pytest.mark.parametrize("weight_format", ["dense", "coded"])
@pytest.mark.parametrize("points", [70, 5 * LANES + 3])
@pytest.mark.parametrize("target", [TARGET, SHORT], ids=["whole", "short"])
def test_epilogues(
    target: Target, points: int, weight_format: str, tree: Any, kinds: tuple[str, ...]
) -> None:
    kernel = Product(weight_format, 2, (4,), LANES, None, tree, kinds)
    kernel = dataclasses.replace(kernel, points=computed_points(points, kernel.block, target))
    rng = np.random.default_rng(3)
    weight = sparse((9, 40), 0.5, 3)
    x = rng.standard_normal((1, 40, points)).astype(np.float32)
    bias = rng.standard_normal(9).astype(np.float32)
    shapes = {"feature": (9,), "same": (1, 9, points)}
    operands = [rng.standard_normal(shapes[k]).astype(np.float32) for k in kinds]
    got = run(kernel, weight, x, bias, 16, 1, operands)[0]
    wide = [o[:, None] if k == "feature" else o[0] for o, k in zip(operands, kinds)]
    expected = reference(weight, x[0], bias, tree, *wide)
    assert np.abs(got - expected).max() <= bound(weight, x[0])
