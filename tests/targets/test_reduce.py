"""Reductions against NumPy in float64. Bounds: 1e-6 of sum |x| for sums, 2e-6 for the rest."""

import numpy as np
import pytest
from sparsegraph.targets import emit, host
from sparsegraph.targets.kernel import prim_func
from sparsegraph.targets.kernels import reduce
from sparsegraph.targets.kernels.reduce import Reduction, RowNorm, Softmax

from sparsegraph import targets

TARGET = targets.get("native")
SHAPES = [(1, 1, 1), (3, 7, 1), (5, 65, 1), (2, 1000, 1), (2, 5, 3), (3, 130, 37), (1, 9, 64)]
ALONG = [k for k in reduce.KERNELS if not isinstance(k, RowNorm)]
NORMS = [k for k in reduce.KERNELS if isinstance(k, RowNorm)]


@pytest.fixture(scope="module")
def library() -> host.Library:
    return host.Library(reduce.KERNELS, TARGET)


def op_of(kernel: Reduction | Softmax) -> str:
    if isinstance(kernel, Reduction):
        return kernel.op
    return "LogSoftmax" if kernel.is_log else "Softmax"


def run(library: host.Library, kernel: Reduction | Softmax, x: np.ndarray) -> np.ndarray:
    outer, n, inner = x.shape
    is_map = isinstance(kernel, Softmax)
    size = x.size if is_map else outer * inner
    y = host.empty(size + 16, "float32" if is_map else kernel.out_dtype)
    y[size:] = 7
    end = reduce.items(outer, inner, TARGET)
    library.call(kernel, y, host.aligned(x), n, inner, end=end // 2)
    library.call(kernel, y, host.aligned(x), n, inner, begin=end // 2, end=end)
    assert (y[size:] == 7).all(), "wrote past the end"
    return y[:size].reshape(x.shape if is_map else (outer, inner))


def sample(op: str, shape: tuple[int, int, int], dtype: str) -> np.ndarray:
    rng = np.random.default_rng(3)
    if dtype == "int64":
        return rng.integers(1, 3 if op == "Prod" else 10**12, shape)
    x = rng.standard_normal(shape).astype(np.float32)
    if op == "Prod":
        x = 1 + 0.05 * x
    return np.abs(x) if op == "LogSum" else x


def is_fit(kernel: Reduction | Softmax, shape: tuple[int, int, int]) -> bool:
    is_overflow = isinstance(kernel, Reduction) and kernel.dtype == "int64" and shape[1] > 60
    return kernel.is_rows == (shape[2] == 1) and not (is_overflow and kernel.op == "Prod")


CASES = [(k, s) for k in ALONG for s in SHAPES if is_fit(k, s)]


@pytest.mark.parametrize(("kernel", "shape"), CASES, ids=lambda v: getattr(v, "name", str(v)))
def test_against_numpy(
    kernel: Reduction | Softmax, shape: tuple[int, int, int], library: host.Library
) -> None:
    op = op_of(kernel)
    x = sample(op, shape, getattr(kernel, "dtype", "float32"))
    if getattr(kernel, "is_last", False):
        expected = shape[1] - 1 - reduce.reference(op, x[:, ::-1])
    else:
        expected = reduce.reference(op, x)
    found = run(library, kernel, x)
    if found.dtype.kind == "i":
        np.testing.assert_array_equal(found, expected)
        return
    scale = np.abs(x).sum(1) if op in ("Sum", "L1", "LogSum") else np.abs(expected)
    assert (np.abs(found - expected) <= 2e-6 * np.maximum(scale, 1)).all()


@pytest.mark.parametrize("is_rows", [True, False])
@pytest.mark.parametrize("op", ["ArgMax", "ArgMin"])
def test_first_of_equals_and_nan(op: str, is_rows: bool, library: host.Library) -> None:
    kernel = Reduction(op, "float32", is_rows)
    x = np.zeros((2, 40, 1 if is_rows else 9), np.float32)
    assert (run(library, kernel, x) == 0).all()
    x[1, 17] = np.nan
    assert (run(library, kernel, x) == [[0], [17]]).all()


def test_last_of_equals(library: host.Library) -> None:
    kernel = Reduction("ArgMax", "float32", True, True)
    assert (run(library, kernel, np.zeros((2, 40, 1), np.float32)) == 39).all()


@pytest.mark.parametrize("op", ["Max", "Min", "Sum"])
@pytest.mark.parametrize("is_rows", [True, False])
@pytest.mark.parametrize("place", [0, 33])
def test_nan_is_kept(op: str, is_rows: bool, place: int, library: host.Library) -> None:
    x = np.ones((2, 40, 1 if is_rows else 9), np.float32)
    x[1, place] = np.nan
    found = run(library, Reduction(op, "float32", is_rows), x)
    assert np.isnan(found[1]).all()
    assert np.isfinite(found[0]).all()


@pytest.mark.parametrize(
    "kernel", [k for k in ALONG if isinstance(k, Softmax)], ids=lambda k: k.name
)
def test_softmax_of_masked_and_large_values(kernel: Softmax, library: host.Library) -> None:
    x = np.full((2, 20, 1 if kernel.is_rows else 9), -np.inf, np.float32)
    x[:, 3:6] = np.array([1000.0, 1000.0, -1000.0], np.float32)[:, None]
    found = run(library, kernel, x)
    expected = np.zeros_like(x)
    expected[:, 3:5] = 0.5
    np.testing.assert_allclose(np.exp(found) if kernel.is_log else found, expected, atol=1e-6)


def test_long_sum_is_accurate(library: host.Library) -> None:
    x = np.full((1, 100_000, 8), 0.1, np.float32)
    columns = run(library, Reduction("Sum", "float32", False), x)
    rows = run(library, Reduction("Sum", "float32", True), x.reshape(1, -1, 1))
    np.testing.assert_allclose(columns, 1e4, rtol=1e-5)
    np.testing.assert_allclose(rows, 8e4, rtol=2e-5)


@pytest.mark.parametrize("kernel", NORMS, ids=lambda k: k.name)
@pytest.mark.parametrize("n", [1, 7, 64, 385])
def test_row_norm(kernel: RowNorm, n: int, library: host.Library) -> None:
    rng = np.random.default_rng(n)
    x = (rng.standard_normal((3, n)) + 50).astype(np.float32)
    scale, bias = (host.aligned(rng.standard_normal(n).astype(np.float32)) for _ in range(2))
    y = host.aligned(x)
    extra = [bias] if kernel.has_bias else []
    library.call(kernel, y, host.aligned(x), scale, *extra, n, 1e-5, end=3)
    shift = bias if kernel.has_bias else 0.0
    expected = reduce.row_norm_reference(x, scale, shift, 1e-5, kernel.is_rms)
    np.testing.assert_allclose(y.reshape(3, n), expected, atol=5e-5)


@pytest.mark.parametrize("kernel", [k for k in NORMS if not k.is_rms], ids=lambda k: k.name)
@pytest.mark.parametrize("n", [1, 7, 64, 385])
def test_equal_elements_are_their_mean(kernel: RowNorm, n: int, library: host.Library) -> None:
    """A rounded mean would be divided by sqrt(epsilon)."""
    rng = np.random.default_rng(n)
    x = np.repeat(rng.uniform(-99, 99, (3, 1)).astype(np.float32), n, axis=1)
    scale, bias = (host.aligned(rng.standard_normal(n).astype(np.float32)) for _ in range(2))
    y = host.empty(x.size)
    extra = [bias] if kernel.has_bias else []
    library.call(kernel, y, host.aligned(x), scale, *extra, n, 1e-5, end=3)
    expected = bias if kernel.has_bias else np.zeros(n, np.float32)
    np.testing.assert_array_equal(y.reshape(3, n), np.tile(expected, (3, 1)))


def test_collapse_axes() -> None:
    assert reduce.collapse_axes((2, 3, 4, 5), (1, 2)) == (2, 12, 5)
    assert reduce.collapse_axes((2, 3, 4, 5), (-1,)) == (24, 5, 1)
    assert reduce.collapse_axes((2, 3, 4, 5), (0, 2)) is None
    assert reduce.collapse_axes((2, 1, 4, 5), (0, 2)) == (1, 8, 5)


@pytest.mark.parametrize("name", ["aarch64", "x86-64-v4"])
def test_other_machines_compile(name: str, tmp_path) -> None:
    other = targets.get(name)
    kernels = [Reduction("Max"), Softmax(is_rows=False), Softmax(), RowNorm()]
    emit.write_object({k.name: prim_func(k, other) for k in kernels}, other, tmp_path / "k.o")
    assert (tmp_path / "k.o").stat().st_size > 1000
