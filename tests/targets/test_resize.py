"""Resize and pixel shuffle equal the float64 reference; padding of tiles comes out as 0."""

import numpy as np
import pytest
from sparsegraph.targets import emit, host
from sparsegraph.targets.kernel import prim_func
from sparsegraph.targets.kernels import conv_transpose, convert, resize
from sparsegraph.targets.kernels.conv_transpose import PixelShuffle
from sparsegraph.targets.kernels.resize import Resize
from sparsegraph.targets.layout import FeatureMajor, blocked, planar
from sparsegraph.targets.target import Target

from sparsegraph import targets

SIZES = [(1, 1, 1, 1), (1, 2, 2, 3), (2, 3, 9, 13), (1, 2, 16, 16), (1, 1, 7, 40), (1, 2, 41, 53)]
EPSILON = 2.0**-24


@pytest.fixture(scope="module")
def machine() -> Target:
    return targets.native()


@pytest.fixture(scope="module")
def library(machine: Target) -> host.Library:
    kernels = [*resize.kernels(machine.lanes), *conv_transpose.kernels(machine.lanes)]
    return host.Library(kernels, machine)


def source(x: np.ndarray, machine: Target) -> tuple[np.ndarray, FeatureMajor]:
    """x as planes with huge padding."""
    images, features, height, width = x.shape
    layout = planar(images, features, height * width, 1, machine)
    flat = convert.pack(x.reshape(images, features, -1), layout, fill=1e30)
    return host.aligned(np.concatenate([flat, np.full(64, 1e30, np.float32)])), layout


def results(size: tuple[int, int], points: int, machine: Target) -> list[FeatureMajor]:
    whole = blocked(size[0], size[1] + 2, points, 1, machine)
    return [planar(*size, points, 1, machine), whole.slice(1, size[1])]


def values(y: np.ndarray, layout: FeatureMajor) -> np.ndarray:
    """The result; checks its padding."""
    padded = FeatureMajor(**{**layout.__dict__, "points": layout.tiles * layout.block})
    assert (convert.unpack(y, padded)[:, :, layout.points :] == 0).all()
    return convert.unpack(y, layout)


def positions(columns: str, mode: str, size: int) -> np.ndarray:
    """Source positions of one axis."""
    if columns == "same":
        return np.arange(size)
    if columns == "double":
        double = np.arange(2 * size)
        return double // 2 if mode == "nearest" else (double + 0.5) / 2 - 0.5
    random = np.random.default_rng(size)
    if mode == "nearest":
        return random.integers(0, size, 2 * size + 3)
    return np.sort(random.uniform(-1, size, 2 * size + 3))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("columns", ["same", "double", "table"])
@pytest.mark.parametrize("rows", ["same", "double", "table"])
def test_resize(
    library: host.Library, machine: Target, size: tuple[int, int, int, int], mode: str,
    columns: str, rows: str,
) -> None:  # fmt: skip
    x = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    spec = Resize(mode, columns, machine.lanes)
    ry, rx = positions(rows, mode, size[2]), positions(columns, mode, size[3])
    if mode == "nearest":
        tables = [(ry * size[3]).astype(np.int32)]
        picked = [np.append(rx, np.zeros(machine.lanes, np.int64)).astype(np.int32)]
    else:
        low, high, weight = resize.neighbours(ry, size[2])
        tables = [resize.blend_rows(low, high, size[3]), weight, spec.row_elements(len(rx))]
        low, high, weight = resize.neighbours(rx, size[3])
        spare = np.zeros(machine.lanes, np.int64)
        both = np.concatenate([low, spare, high, spare]).astype(np.int32)
        picked = [both, np.append(weight, spare).astype(np.float32)]
    tables = [t if isinstance(t, int) else host.aligned(t) for t in tables]
    tables += [host.aligned(t) for t in picked] if columns == "table" else []
    flat, layout = source(x, machine)
    for to in results(size[:2], len(ry) * len(rx), machine):
        y = host.aligned(np.full(to.offset + to.size, np.nan, np.float32))
        n_bytes = spec.scratch_bytes(len(rx), to.block)
        scratch = host.aligned(np.full(n_bytes // 4, np.nan, np.float32))
        library.call(
            spec, y[to.offset :], to.image, to.tile, to.row, flat, layout.image, layout.row,
            size[1], size[3], len(ry), len(rx), to.tiles, to.block, *tables, scratch,
            end=size[0] * size[1],
        )  # fmt: skip
        got = values(y, to).reshape(*size[:2], len(ry), len(rx))
        for image in range(size[0]):
            expected = resize.reference(mode, x[image], ry, rx)
            # a blend of blends: four roundings per axis of values below 5, weights to 2^-24
            limit = 0.0 if mode == "nearest" else 12 * EPSILON * np.abs(x).max()
            assert np.abs(got[image] - expected).max() <= limit


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("columns", [1, 2, 3, 4])
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_pixel_shuffle(
    library: host.Library, machine: Target, size: tuple[int, int, int, int], rows: int,
    columns: int,
) -> None:  # fmt: skip
    images, features, height, width = size
    x = np.arange(images * features * rows * columns * height * width, dtype=np.float32)
    x = x.reshape(images, features * rows * columns, height, width)
    spec = PixelShuffle(columns, machine.lanes)
    flat, layout = source(x, machine)
    out = (height * rows, width * columns)
    for to in results(size[:2], out[0] * out[1], machine):
        y = host.aligned(np.full(to.offset + to.size, np.nan, np.float32))
        n_bytes = spec.scratch_bytes(out[1], to.block)
        scratch = host.aligned(np.full(n_bytes // 4, np.nan, np.float32))
        library.call(
            spec, y[to.offset :], to.image, to.tile, to.row, flat, layout.image,
            rows * columns * layout.row, columns * layout.row, layout.row, features,
            width, rows, *out, to.tiles, to.block, scratch, end=images * features,
        )  # fmt: skip
        for image in range(images):
            expected = conv_transpose.reference(x[image], rows, columns)
            np.testing.assert_array_equal(values(y, to)[image], expected.reshape(features, -1))


@pytest.mark.parametrize("name", ["aarch64", "x86-64-v4"])
def test_compiles_for_other_machines(name: str) -> None:
    machine = targets.get(name)
    kernels = [*resize.kernels(machine.lanes), PixelShuffle(2, machine.lanes)]
    functions = {k.name: prim_func(k, machine) for k in kernels}
    text = emit.assembly(functions, machine)
    assert all(f"{name}:" in text for name in functions)
