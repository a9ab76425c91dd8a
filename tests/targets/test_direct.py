"""Convolutions whose maps are read in place, against float64: geometries, layouts, borders."""

from functools import cache
from typing import Any

import numpy as np
import pytest
from sparsegraph.targets import host
from sparsegraph.targets.kernels import convert, expression
from sparsegraph.targets.kernels.direct import Axis, Direct, pack
from sparsegraph.targets.layout import FeatureMajor, planar

from sparsegraph import targets
from sparsegraph.lower.direct import _macs
from sparsegraph.lower.windows import Window
from tests.targets.test_gather import convolve
from tests.targets.test_product import sparse

TARGET = targets.native()
A0, A1, A2 = ("arg", 0), ("arg", 1), ("arg", 2)
RESIDUAL = ("Relu", ("Add", ("Mul", A0, A2), A1))
GEOMETRIES = [  # size, kernel, stride, dilation, pads, tile
    ((2, 2), (3, 3), (1, 1), (1, 1), (1, 1, 1, 1), (2, 2)),
    ((4, 4), (3, 3), (1, 1), (1, 1), (1, 1, 1, 1), (4, 4)),
    ((8, 8), (3, 3), (1, 1), (1, 1), (1, 1, 1, 1), (2, 8)),
    ((16, 16), (3, 3), (2, 2), (1, 1), (1, 1, 1, 1), (2, 8)),
    ((9, 21), (3, 3), (1, 1), (1, 1), (1, 1, 1, 1), (1, 7)),
    ((7, 7), (5, 3), (1, 1), (1, 1), (2, 1, 2, 1), (1, 7)),
    ((12, 10), (3, 3), (1, 1), (3, 2), (3, 2, 3, 2), (4, 5)),
    ((16, 16), (1, 1), (2, 2), (1, 1), (0, 0, 0, 0), (1, 8)),
    ((1, 18), (1, 5), (1, 3), (1, 1), (0, 3, 0, 0), (1, 3)),
    ((6, 9), (2, 4), (1, 1), (1, 1), (0, 3, 1, 0), (6, 3)),
]


@cache
def library(kernel: Direct) -> host.Library:
    return host.Library([kernel], TARGET)


def direct(window: Window, tile: tuple[int, int], **rest: Any) -> Direct:
    """The kernel of a window."""
    w = window
    rows, columns = (
        Axis(w.size[i], w.out[i], w.kernel[i], w.stride[i], w.pads[i], w.dilation[i])
        for i in (0, 1)
    )
    return Direct(rows, columns, tile, **rest)


def run(
    kernel: Direct, weight: np.ndarray, x: np.ndarray, bias: np.ndarray, xl: FeatureMajor,
    yl: FeatureMajor, operands: tuple[np.ndarray, ...] = (), parts: int = 1,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """The result [images, rows, points] and y's memory; y and all around x are NaN before."""
    images, packed = len(x), pack(weight, 4 * xl.row, parts)
    assert packed.offsets.dtype == kernel.offset
    memory = host.empty(xl.size + 2 * 256)
    memory[:] = np.nan
    memory[256 : 256 + xl.size] = convert.pack(x, xl, fill=np.nan)
    y = host.empty(yl.size)
    y[:] = np.nan
    args: list[Any] = [y, yl.image, yl.row, memory[256:], xl.image, images]
    args += [host.aligned(bias), *map(host.aligned, packed)]
    for kind, value in zip(kernel.operands, operands, strict=True):
        if kind == "feature":
            args.append(host.aligned(value))
        else:
            args += [host.aligned(convert.pack(value, yl)), yl.image, yl.row]
    items = images * kernel.n_tiles * len(packed.parts)
    for begin in range(0, items, 3):  # as threads would
        library(kernel).call(kernel, *args, begin=begin, end=min(begin + 3, items))
    return convert.unpack(y, yl), y


def data(window: Window, density: float, images: int = 2) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((images, 5, *window.size)).astype(np.float32)
    weight = sparse((6, 5, *window.kernel), density, 1)
    return weight, x, rng.standard_normal(6).astype(np.float32)


def expected(weight: np.ndarray, x: np.ndarray, bias: np.ndarray, window: Window) -> np.ndarray:
    return np.stack([convolve(weight, one, window) + bias[:, None] for one in x])


@pytest.mark.parametrize("density", [0.0, 0.01, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_every_geometry(geometry: Any, density: float) -> None:
    *of_window, tile = geometry
    window = Window(*of_window)
    weight, x, bias = data(window, density)
    xl = planar(2, 5, window.size[0] * window.size[1], 1, TARGET)
    yl = planar(2, 6, window.out[0] * window.out[1], 1, TARGET)
    pad = yl.tiles * yl.block - yl.points
    kernel = direct(window, tile, pad=pad)
    got, y = run(kernel, weight, x.reshape(2, 5, -1), bias, xl, yl, parts=2)
    bound = 1e-6 * (1 + np.abs(weight).sum((1, 2, 3)).max() * np.abs(x).max())
    assert np.abs(got - expected(weight, x, bias, window)).max() <= bound
    behind = y.reshape(2, 6, yl.row)[:, :, yl.points : yl.points + pad]
    assert not behind.any()


def test_an_epilogue_with_a_residual_and_a_scale() -> None:
    window = Window((8, 8), (3, 3), (1, 1), (1, 1), (1, 1, 1, 1))
    weight, x, bias = data(window, 0.5)
    rng = np.random.default_rng(0)
    residual = rng.standard_normal((2, 6, 64)).astype(np.float32)
    scale = rng.standard_normal(6).astype(np.float32)
    xl, yl = (planar(2, n, 64, 1, TARGET) for n in (5, 6))
    operands = ("same", "feature")
    kernel = direct(window, (2, 8), epilogue=RESIDUAL, operands=operands)
    got, _ = run(kernel, weight, x.reshape(2, 5, -1), bias, xl, yl, (residual, scale))
    plain = expected(weight, x, bias, window)
    want = expression.evaluate(RESIDUAL, [plain, residual, scale[:, None]])
    assert np.abs(got - want).max() <= 1e-5


def test_far_channels_take_wide_indices() -> None:
    window = Window((4, 4), (3, 3), (1, 1), (1, 1), (1, 1, 1, 1))
    weight, x, bias = data(window, 0.5, images=1)
    far = planar(1, 5, 1 << 14, 1, TARGET)
    xl = FeatureMajor(1, 5, 16, 16, far.image, 16, far.row, 1)
    yl = planar(1, 6, 16, 1, TARGET)
    kernel = direct(window, (4, 4), offset="int32")
    got, _ = run(kernel, weight, x.reshape(1, 5, -1), bias, xl, yl)
    assert np.abs(got - expected(weight, x, bias, window)).max() <= 1e-5


def test_only_points_inside_the_map_are_counted() -> None:
    weight = np.ones((6, 5, 3, 3), np.float32)
    window = Window((2, 2), (3, 3), (1, 1), (1, 1), (1, 1, 1, 1))
    assert _macs(direct(window, (2, 2)), weight) == 6 * 5 * 16
    weight[:, :, 0, 0] = 0  # reaches one of four points
    assert _macs(direct(window, (2, 2)), weight) == 6 * 5 * 15


def test_bodies_are_counted_by_kinds_of_tiles() -> None:
    axis = Axis(8, 8, 3, 1, 1)
    assert axis.kinds(0, 2) == {(1,): (0, 0), (0, 1): (1, 3)}
    assert axis.kinds(1, 2) == {(0, 1): (0, 3)}
    assert Direct(axis, axis, (2, 8)).n_bodies == 5 * 3
    assert Direct(axis, axis, (1, 8)).n_bodies == 3 * 3
