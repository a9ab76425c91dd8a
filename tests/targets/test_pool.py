"""Pooling equals the float64 reference over odd sizes; padding of tiles never counts."""

import numpy as np
import pytest
from sparsegraph.targets import emit, host
from sparsegraph.targets.kernel import prim_func
from sparsegraph.targets.kernels import convert, pool
from sparsegraph.targets.kernels.pool import GlobalPool, Pool
from sparsegraph.targets.layout import FeatureMajor, blocked, planar
from sparsegraph.targets.target import Target

from sparsegraph import targets

SIZES = [(1, 1, 1, 1), (1, 2, 9, 9), (2, 3, 12, 13), (1, 1, 7, 40), (1, 5, 31, 17), (1, 1, 70, 67)]
EPSILON = 2.0**-24


@pytest.fixture(scope="module")
def machine() -> Target:
    return targets.native()


@pytest.fixture(scope="module")
def library(machine: Target) -> host.Library:
    return host.Library(pool.kernels(machine.lanes), machine)


def windows(machine: Target) -> list[Pool]:
    return [k for k in pool.kernels(machine.lanes) if isinstance(k, Pool)]


def extent(size: int, kernel: int, stride: int, dilation: int, pads: int) -> int:
    return (size + pads - dilation * (kernel - 1) - 1) // stride + 1


def run(
    library: host.Library, spec: Pool, x: np.ndarray, stride_y: int, dilation_y: int,
    pads: tuple[int, int, int, int], out: tuple[int, int], machine: Target, counts: bool,
    to: FeatureMajor,
) -> np.ndarray:  # fmt: skip
    """One call over planar x whose padding is huge; the output's padding must come out as 0."""
    images, features, height, width = x.shape
    source = planar(images, features, height * width, 1, machine)
    flat = host.aligned(convert.pack(x.reshape(images, features, -1), source, fill=1e30))
    flat = host.aligned(np.concatenate([flat, np.full(64, 1e30, np.float32)]))
    y = host.aligned(np.full(to.offset + to.size, np.nan, np.float32))
    first, count = pool.rows_of_windows(
        height, out[0], spec.kernel[0], stride_y, dilation_y, pads[0]
    )
    rows = np.stack([first * width, count], 1).astype(np.int32)
    row_size = spec.row_elements(width, out[1], pads[1])
    right = max(0, (out[1] - 1) * spec.stride + (spec.kernel[1] - 1) * spec.dilation + 1)
    right = max(0, right - pads[1] - width)
    shares = []
    if spec.kind == "average":
        shares = [
            pool.share_of_windows(height, out[0], spec.kernel[0], stride_y, dilation_y,
                                  (pads[0], pads[2]), counts),
            pool.share_of_windows(width, out[1], spec.kernel[1], spec.stride, spec.dilation,
                                  (pads[1], pads[3]), counts),
        ]  # fmt: skip
        shares = [host.aligned(np.append(s, np.ones(16, np.float32))) for s in shares]
    scratch = host.aligned(
        np.full(spec.scratch_bytes(row_size, out[1], to.block) // 4, np.nan, "f4")
    )
    library.call(
        spec, y[to.offset :], to.image, to.tile, to.row, flat, source.image, source.row, features,
        width, *out, to.tiles, to.block, dilation_y * width, pads[1], right, row_size,
        host.aligned(rows), *shares, scratch, end=images * features,
    )  # fmt: skip
    padded = FeatureMajor(**{**to.__dict__, "points": to.tiles * to.block})
    assert (convert.unpack(y, padded)[:, :, to.points :] == 0).all()
    return convert.unpack(y, to)


@pytest.mark.parametrize("size", SIZES)
def test_windows(library: host.Library, machine: Target, size: tuple[int, int, int, int]) -> None:
    x = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    checked = 0
    for spec in windows(machine):
        kh, kw = spec.kernel
        reach = ((kh - 1) // 2, (kw - 1) * spec.dilation // 2)
        for pads in ((0, 0, 0, 0), (*reach, *reach), (0, reach[1], reach[0], 0)):
            out = (extent(size[2], kh, 2, 1, pads[0] + pads[2]),
                   extent(size[3], kw, spec.stride, spec.dilation, pads[1] + pads[3]))  # fmt: skip
            if min(out) < 1:
                continue
            points = out[0] * out[1]
            counts = pads[0] == 0
            steps = ((2, spec.stride), (1, spec.dilation))
            expected = np.stack(
                [pool.reference(spec.kind, i, spec.kernel, *steps, pads, out, counts) for i in x]
            )
            # sums of kh*kw values up to 5, then two rounded products
            limit = 0.0 if spec.kind == "max" else (kh + kw + 3) * EPSILON * 5
            whole = blocked(size[0], size[1] + 2, points, 1, machine)
            for to in (planar(*size[:2], points, 1, machine), whole.slice(1, size[1])):
                y = run(library, spec, x, 2, 1, pads, out, machine, counts, to)
                error = np.abs(y - expected.reshape(y.shape)).max()
                assert error <= limit, (spec.name, pads)
                checked += 1
    assert checked > (0 if size[2] == 1 else 40)


def test_ceil_mode_window_ends_outside(library: host.Library, machine: Target) -> None:
    x = np.random.default_rng(1).standard_normal((1, 2, 8, 8)).astype(np.float32)
    to = planar(1, 2, 16, 1, machine)
    for kind in ("max", "average"):
        spec = Pool(kind, (3, 3), 2, 1, machine.lanes)
        y = run(library, spec, x, 2, 1, (0, 0, 0, 0), (4, 4), machine, True, to)
        expected = pool.reference(kind, x[0], (3, 3), (2, 2), (1, 1), (0,) * 4, (4, 4), True)
        np.testing.assert_allclose(y[0], expected.reshape(2, -1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [(1, 1, 1), (2, 5, 7), (1, 9, 64), (3, 4, 49), (2, 3, 3137)])
@pytest.mark.parametrize("kind", ["sum", "max", "min"])
def test_global(
    library: host.Library, machine: Target, size: tuple[int, int, int], kind: str
) -> None:
    images, features, points = size
    x = np.random.default_rng(2).standard_normal(size).astype(np.float32)
    spec = GlobalPool(kind, machine.lanes)
    for make in (blocked, planar):
        layout = make(*size, 1, machine)
        flat = host.aligned(convert.pack(x, layout, fill=np.nan))
        y = host.empty(images * features)
        library.call(
            spec, y, flat, layout.image, layout.tile, layout.row, layout.tiles, features, points,
            layout.block, 0.5, end=spec.items(images, features),
        )  # fmt: skip
        fold = {"sum": np.sum, "max": np.max, "min": np.min}[kind]
        expected = 0.5 * fold(x.astype(np.float64), axis=2).ravel()
        limit = points * EPSILON * np.abs(x).sum(2).ravel() if kind == "sum" else 0.0
        assert (np.abs(y - expected) <= limit).all()


def test_part_of_the_items_leaves_the_rest(library: host.Library, machine: Target) -> None:
    layout = planar(1, 12, 30, 1, machine)
    y, spec = host.empty(12), GlobalPool("sum", machine.lanes)
    flat = host.aligned(convert.pack(np.ones((1, 12, 30), np.float32), layout))
    library.call(
        spec, y, flat, layout.image, layout.tile, layout.row, layout.tiles, 12, 30, layout.block,
        1.0, begin=1, end=2,
    )  # fmt: skip
    np.testing.assert_array_equal(y, [0] * 4 + [30] * 4 + [0] * 4)


@pytest.mark.parametrize("name", ["aarch64", "x86-64-v4"])
def test_compiles_for_other_machines(name: str) -> None:
    machine = targets.get(name)
    functions = {k.name: prim_func(k, machine) for k in pool.kernels(machine.lanes)[::4]}
    text = emit.assembly(functions, machine)
    assert all(f"{name}:" in text for name in functions)
