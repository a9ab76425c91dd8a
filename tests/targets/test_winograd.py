"""Winograd convolutions against float64: both patch sizes, odd maps, padding, epilogues, images."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
import pytest
from sparsegraph.targets import host
from sparsegraph.targets.kernels import convert, expression, winograd
from sparsegraph.targets.kernels.product import Product
from sparsegraph.targets.kernels.winograd import InputTransform, OutputTransform
from sparsegraph.targets.layout import FeatureMajor, blocked, planar

from sparsegraph import formats, targets
from sparsegraph.lower import windows
from sparsegraph.lower.windows import Window
from tests.targets.test_gather import convolve

TARGET = targets.native()
LANES = TARGET.lanes
A0, A1, A2 = ("arg", 0), ("arg", 1), ("arg", 2)
RESIDUAL = ("Relu", ("Add", ("Mul", A0, A2), A1))
WINDOWS = [  # size, pads
    ((14, 14), (1, 1, 1, 1)),
    ((7, 9), (1, 1, 1, 1)),
    ((3, 3), (0, 0, 0, 0)),
    ((5, 23), (0, 2, 2, 0)),
    ((33, 10), (1, 0, 0, 1)),
    ((1, 1), (1, 1, 1, 1)),
    ((20, 67), (2, 2, 2, 2)),
]


@cache
def library(*kernels: Any) -> host.Library:
    return host.Library(kernels, TARGET)


class Convolution:
    """The three kernel calls of one convolution; all memory that is not an input is NaN at first.

    x is [images, channels, h, w]; stride and kernel are the window's.
    """

    def __init__(
        self, window: Window, m: int, weight: np.ndarray, x: np.ndarray, bias: np.ndarray,
        yl: FeatureMajor, epilogue: Any = None, operands: Sequence[tuple[str, np.ndarray]] = (),
    ) -> None:  # fmt: skip
        kinds = tuple(kind for kind, _ in operands)
        method = windows.filter_of(window)
        assert method is not None
        first = InputTransform(m, LANES, *method)
        last = OutputTransform(m, LANES, epilogue, kinds, method.taps)
        images, channels, n = *x.shape[:2], first.n
        rows, grid = len(weight), winograd.patches(window.out, m)
        v, mid = (
            winograd.places(images, features, grid[0] * grid[1], n, TARGET)
            for features in (channels * method.phases, rows)
        )
        product = Product("dense", 2, (v.block // LANES,), LANES, batch=n**2)
        self.yl, padded = yl, v.tiles * v.block
        self.y, v_memory, mid_memory = (_nan(f.size + 64) for f in (yl, v, mid))
        xl = planar(images, channels, window.size[0] * window.size[1], 1, TARGET)
        planes = _nan(xl.size + 256)
        planes[: xl.size] = convert.pack(x.reshape(images, channels, -1), xl, fill=np.nan)
        input_args: list[Any] = [
            v_memory, v.image, v.tile, v.row, planes, xl.image, xl.row,
            _nan(first.scratch_bytes(grid, padded, window.size[1]) // 4), channels, *window.size,
            *window.pads[:2], *grid, v.tiles, v.block, first.plane(grid, padded),
            first.line(grid[1], window.size[1]),
        ]  # fmt: skip
        matrices = winograd.transform_weights(weight, m, *method)
        packed = [formats.pack_dense(w, 2, 3) for w in matrices]
        chunks = np.concatenate([p.chunks for p in packed])
        chunks[:, 0] += np.arange(len(packed), dtype=np.int32) * packed[0].values.size
        product_args: list[Any] = [
            mid_memory, mid.image, mid.tile, mid.row, v_memory, v.image, v.tile, v.row, v.images,
            v.tiles, channels * method.phases, 3, host.empty(rows),
            host.aligned(np.concatenate([p.values for p in packed])),
            host.aligned(packed[0].slots), host.aligned(chunks),
        ]  # fmt: skip
        output_args: list[Any] = [
            self.y, yl.image, yl.tile, yl.row, mid_memory, mid.image, mid.tile, mid.row,
            _nan(last.scratch_bytes(grid[1], padded, window.out[1], yl.block) // 4),
            host.aligned(bias), rows, *window.out, yl.tiles, yl.block, grid[1], mid.tiles,
            mid.block, last.plane(grid[1], padded),
        ]  # fmt: skip
        for kind, value in operands:
            if kind == "feature":
                output_args.append(host.aligned(value))
            else:
                memory = host.aligned(convert.pack(value, yl))
                output_args += [memory, yl.image, yl.tile, yl.row]
        lib = library(first, product, last)
        self.arrays = input_args, product_args, output_args  # calls hold addresses only
        self.calls: list[Callable[[], None]] = [
            lib.bind(first, *input_args, end=images * channels),
            lib.bind(product, *product_args, end=v.images * v.tiles),
            lib.bind(last, *output_args, end=images * rows),
        ]

    def run(self) -> np.ndarray:
        """Result [images, rows, points]."""
        for call in self.calls:
            call()
        return convert.unpack(self.y, self.yl)


def _nan(size: int) -> np.ndarray:
    memory = host.empty(size)
    memory[:] = np.nan
    return memory


def data(window: Window, channels: int, rows: int, images: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(channels)
    x = rng.standard_normal((images, channels, *window.size)).astype(np.float32)
    weight = rng.standard_normal((rows, channels, *window.kernel)).astype(np.float32)
    return x, weight, rng.standard_normal(rows).astype(np.float32)


def window_of(size: tuple[int, int], pads: tuple[int, int, int, int]) -> Window:
    return Window(size, (3, 3), (1, 1), (1, 1), pads)


@pytest.mark.parametrize("make", [planar, blocked])
@pytest.mark.parametrize("geometry", WINDOWS, ids=str)
@pytest.mark.parametrize("m", windows.PATCHES)
def test_convolution_of_every_geometry(m: int, geometry: Any, make: Any) -> None:
    window, images, channels, rows = window_of(*geometry), 2, 5, 3
    x, weight, bias = data(window, channels, rows, images)
    yl = make(images, rows, window.out[0] * window.out[1], 1, TARGET)
    got = Convolution(window, m, weight, x, bias, yl).run()
    expected = np.stack([convolve(weight, one, window) + bias[:, None] for one in x])
    largest = np.abs(weight).sum((1, 2, 3)).max() * np.abs(x).max()
    assert np.abs(got - expected).max() <= windows.error_bound(m, channels) * largest


@pytest.mark.parametrize("kernel", [(7, 7), (8, 7)])
@pytest.mark.parametrize(
    ("size", "pads"),
    [
        ((32, 32), (3, 3, 3, 3)),
        ((7, 9), (0, 0, 1, 1)),
        ((21, 50), (5, 2, 0, 6)),
        ((64, 13), (3, 3, 3, 3)),
        ((2, 3), (3, 3, 3, 3)),
    ],
    ids=str,
)
def test_kernels_of_stride_two_by_their_phases(kernel: Any, size: Any, pads: Any) -> None:
    window, images, channels, rows = Window(size, kernel, (2, 2), (1, 1), pads), 2, 3, 5
    x, weight, bias = data(window, channels, rows, images)
    yl = blocked(images, rows, window.out[0] * window.out[1], 1, TARGET)
    got = Convolution(window, 4, weight, x, bias, yl).run()
    expected = np.stack([convolve(weight, one, window) + bias[:, None] for one in x])
    largest = np.abs(expected).max()
    assert np.abs(got - expected).max() <= windows.error_bound(4, 4 * channels, 4) * largest


@pytest.mark.parametrize("m", windows.PATCHES)
def test_epilogue_with_a_residual_and_a_scale(m: int) -> None:
    window = window_of((13, 18), (1, 1, 1, 1))
    x, weight, bias = data(window, 4, 6, 2)
    rng = np.random.default_rng(0)
    residual = rng.standard_normal((2, 6, 13 * 18)).astype(np.float32)
    scale = rng.standard_normal(6).astype(np.float32)
    yl = blocked(2, 6, 13 * 18, 1, TARGET)
    operands = [("same", residual), ("feature", scale)]
    got = Convolution(window, m, weight, x, bias, yl, RESIDUAL, operands).run()
    for i in range(2):
        plain = convolve(weight, x[i], window) + bias[:, None]
        expected = expression.evaluate(RESIDUAL, [plain, residual[i], scale[:, None]])
        assert np.abs(got[i] - expected).max() <= 3e-5


@pytest.mark.parametrize("channels", [16, 64, 256, 512])
@pytest.mark.parametrize("m", windows.PATCHES)
def test_error_against_float64_stays_below_the_stated_bound(m: int, channels: int) -> None:
    window = window_of((16, 16), (1, 1, 1, 1))
    x, weight, bias = data(window, channels, 8, 1)
    for relu in (False, True):  # inputs of one sign sum up to more
        x = np.maximum(x, 0) if relu else x
        yl = planar(1, 8, 256, 1, TARGET)
        got = Convolution(window, m, weight, x, bias, yl).run()[0]
        expected = convolve(weight, x[0], window) + bias[:, None]
        error = np.abs(got - expected).max() / np.abs(expected).max()
        assert error <= windows.error_bound(m, channels)


@pytest.mark.parametrize("channels", [3, 64])
def test_error_of_strided_kernels_stays_below_the_stated_bound(channels: int) -> None:
    window = Window((40, 40), (7, 7), (2, 2), (1, 1), (3, 3, 3, 3))
    x, weight, bias = data(window, channels, 8, 1)
    for relu in (False, True):
        x = np.maximum(x, 0) if relu else x
        got = Convolution(window, 4, weight, x, bias, planar(1, 8, 400, 1, TARGET)).run()[0]
        expected = convolve(weight, x[0], window) + bias[:, None]
        error = np.abs(got - expected).max() / np.abs(expected).max()
        assert error <= windows.error_bound(4, 4 * channels, 4)


@pytest.mark.parametrize(("m", "n_taps"), [(2, 3), (4, 3), (4, 4)])
def test_the_matrices_compute_the_filter_exactly(m: int, n_taps: int) -> None:
    at, g, bt = winograd.matrices(m, n_taps)
    d, taps = np.arange(1.0, m + n_taps) ** 2, np.array([2.0, -3.0, 5.0, 7.0])[:n_taps]
    expected = np.correlate(d, taps, "valid")
    assert np.allclose(at @ ((g @ taps) * (bt @ d)), expected, rtol=1e-12)
    assert (Fraction(0) in winograd.points(m + n_taps - 1)) == (n_taps == 3)


def test_patches_that_round_too_much_are_rejected() -> None:
    window = window_of((56, 56), (1, 1, 1, 1))
    assert windows.patch_sizes(window, 64) == (2, 4)
    assert windows.patch_sizes(window, 4096) == (2,)
    assert windows.error_bound(4, 64) <= windows.LARGEST_ERROR < windows.error_bound(4, 4096)


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "pads"),
    [
        ((3, 3), (2, 2), (1, 1), (1, 1, 1, 1)),
        ((3, 3), (1, 1), (2, 2), (1, 1, 1, 1)),
        ((5, 5), (1, 1), (1, 1), (1, 1, 1, 1)),
        ((3, 3), (1, 1), (1, 1), (1, 1, 1, 3)),
    ],
)
def test_other_geometries_are_not_for_winograd(
    kernel: Any, stride: Any, dilation: Any, pads: Any
) -> None:
    window = Window((20, 20), kernel, stride, dilation, pads)
    assert windows.patch_sizes(window, 64) == ()


def test_strided_kernels_go_by_their_phases() -> None:
    window = Window((64, 64), (7, 7), (2, 2), (1, 1), (3, 3, 3, 3))
    assert windows.patch_sizes(window, 3) == (4,)
    assert windows.patch_sizes(window, 64) == ()  # rounds too much
