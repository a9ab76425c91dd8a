"""Element-wise kernels against NumPy in float64; |error| <= 1e-6 * max(1, |value|)."""

import numpy as np
import pytest
from sparsegraph.targets import emit, host, layout
from sparsegraph.targets.kernel import prim_func
from sparsegraph.targets.kernels import elementwise
from sparsegraph.targets.kernels.elementwise import FeatureMap, collapse, row_map

from sparsegraph import targets

A, B, C = ("arg", 0), ("arg", 1), ("arg", 2)
F = "float32"
ROWS = [
    (("Relu", A), (1, 3, 7, 11), [(1, 3, 7, 11)], (F,)),
    (("Relu", A), (), [()], (F,)),
    (("Add", A, B), (5, 6, 33), [(5, 6, 33), (33,)], (F, F)),
    (("Add", A, B), (5, 6, 33), [(5, 6, 33), (6, 33)], (F, F)),
    (("Mul", A, B), (5, 6, 33), [(5, 6, 33), (5, 1, 1)], (F, F)),
    (("Mul", A, B), (2, 3, 4, 5), [(2, 1, 4, 1), (3, 1, 5)], (F, F)),
    (("Sub", A, B), (3, 1, 9), [(9,), (3, 1, 1)], (F, F)),
    (("Gelu", ("Add", A, B)), (4, 50), [(4, 50), (50,)], (F, F)),
    (("Where", A, B, C), (4, 1, 6, 21), [(6, 21), (4, 1, 6, 21), ()], ("bool", F, F)),
    (("Add", A, ("const", 3)), (37,), [(37,)], ("int64",)),
    (("Div", A, B), (37,), [(37,), ()], ("int64", "int64")),
    (("Mod", A, B, ("const", 0)), (37,), [(37,), ()], ("int64", "int64")),
    (("Equal", A, B), (3, 19), [(3, 19), (3, 1)], ("int64", "int64")),
    (("Cast", ("Not", A), ("type", F)), (3, 19), [(3, 19)], ("bool",)),
    (("Cast", A, ("type", "int64")), (100,), [(100,)], (F,)),
]
FEATURES = [k for k in elementwise.KERNELS if isinstance(k, FeatureMap)]
TARGET = targets.get("native")


@pytest.fixture(scope="module")
def library() -> host.Library:
    rows = [row_map(*case).kernel for case in ROWS]
    return host.Library([*rows, *elementwise.KERNELS], TARGET)


def sample(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    if dtype == "bool":
        return rng.random(shape) < 0.5
    if dtype == "int64":
        whole = rng.integers(-9, 9, shape)
        return np.asarray(np.where(whole == 0, 5, whole), np.int64)
    return np.asarray(rng.standard_normal(shape) * 3, np.float32)


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    error = np.abs(found.astype(np.float64) - expected) / np.maximum(1, np.abs(expected))
    assert error.max(initial=0) <= 1e-6


@pytest.mark.parametrize("chunk", [8, 40, elementwise.CHUNK])
@pytest.mark.parametrize("case", ROWS, ids=lambda c: f"{c[0][0]}-{c[1]}")
def test_row_map(case: tuple, chunk: int, library: host.Library) -> None:
    tree, shape, shapes, dtypes = case
    rng = np.random.default_rng(7)
    inputs = [sample(rng, s, d) for s, d in zip(shapes, dtypes)]
    call = row_map(*case, chunk=chunk)
    size = int(np.prod(shape))
    y = host.empty(size + 8, call.kernel.out_dtype)
    y[size:] = 1
    library.call(call.kernel, y, *[host.aligned(x) for x in inputs], *call.scalars, end=call.items)
    expected = np.broadcast_to(elementwise.reference(tree, *inputs), shape)
    assert_close(y[:size].reshape(shape), expected.astype(np.float64))
    assert (y[size:] == 1).all(), "wrote past the end"


@pytest.mark.parametrize("kernel", FEATURES, ids=lambda k: k.name)
@pytest.mark.parametrize("features", [1, 5])
@pytest.mark.parametrize("points", [3, 49, 130])
def test_feature_map(kernel: FeatureMap, features: int, points: int, library: host.Library) -> None:
    rng = np.random.default_rng(points)
    planar = layout.planar(2, features, points, 1, TARGET)
    blocked = layout.blocked(2, features, points, 1, TARGET)
    args, logical = [], []
    for i, (kind, dtype) in enumerate(zip(kernel.kinds, kernel.dtypes)):
        if kind == "full":
            where = planar if i % 2 else blocked
            memory = host.aligned(sample(rng, (where.size,), dtype))
            args += [memory, where.image, where.tile, where.row]
            logical.append(logical_view(memory, where))
        else:
            memory = host.aligned(sample(rng, (features if kind == "feature" else 1,), dtype))
            args.append(memory)
            logical.append(memory[:, None])
    y = host.empty(planar.size, kernel.out_dtype)
    shape = (planar.tiles, features, planar.block)
    library.call(
        kernel, y, planar.image, planar.tile, planar.row, *args, *shape, end=2 * planar.tiles
    )
    expected = elementwise.reference(kernel.tree, *logical)
    assert_close(logical_view(y, planar), expected)


def logical_view(memory: np.ndarray, where: layout.FeatureMajor) -> np.ndarray:
    """[images, features, points] of a feature-major buffer."""
    n, c, p = np.ix_(range(where.images), range(where.features), range(where.points))
    return memory[n * where.image + c * where.row + p // where.block * where.tile + p % where.block]


def test_row_stride_zero_repeats_a_row_of_points(library: host.Library) -> None:
    kernel = FeatureMap(("Add", ("Mul", A, B), C), ("full", "scalar", "full"), (F, F, F))
    block, features = 2 * TARGET.lanes, 3
    x = host.aligned(np.arange(block, dtype=np.float32))
    one = host.aligned(np.ones(1, np.float32))
    y = host.empty(features * block)
    strides = (features * block, features * block, block)
    library.call(kernel, y, *strides, x, 0, 0, 0, one, x, 0, 0, 0, 1, features, block, end=1)
    np.testing.assert_array_equal(y.reshape(features, block), np.tile(2 * x, (features, 1)))


def test_collapse_merges_axes() -> None:
    assert collapse((2, 3, 4), [(2, 3, 4), (3, 4)]) == ((2, 12), ((12, 1), (0, 1)))
    assert collapse((2, 3, 4), [(2, 3, 4), (2, 1, 1)]) == ((2, 12), ((12, 1), (1, 0)))
    assert collapse((1, 1), [(1, 1)]) == ((1,), ((0,),))
    assert collapse((2, 3, 4), [(2, 3, 4), (1, 3, 1)]).extents == (2, 3, 4)


@pytest.mark.parametrize("name", ["aarch64", "x86-64-v4"])
def test_other_machines_compile(name: str, tmp_path) -> None:
    other = targets.get(name)
    kernels = [elementwise.KERNELS[1], elementwise.KERNELS[6]]
    emit.write_object({k.name: prim_func(k, other) for k in kernels}, other, tmp_path / "k.o")
    assert (tmp_path / "k.o").stat().st_size > 1000
