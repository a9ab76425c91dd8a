"""Running sums and the k best, against NumPy: the same bits, since the order is the same."""

import numpy as np
import pytest
from sparsegraph.targets import host
from sparsegraph.targets.kernels import reduce, scan
from sparsegraph.targets.kernels.scan import CumulativeSum, TopK

from sparsegraph import targets

TARGET = targets.get("native")
SHAPES = [(1, 1, 1), (3, 7, 1), (2, 1000, 1), (2, 5, 3), (3, 30, 37), (1, 9, 129)]
SUMS = [k for k in scan.KERNELS if isinstance(k, CumulativeSum)]
ORDERS = [k for k in scan.KERNELS if isinstance(k, TopK)]


@pytest.fixture(scope="module")
def library() -> host.Library:
    return host.Library(scan.KERNELS, TARGET)


def sample(shape: tuple[int, int, int], dtype: str) -> np.ndarray:
    rng = np.random.default_rng(3)
    if dtype == "float32":
        return rng.standard_normal(shape).astype(dtype)
    return rng.integers(-(10**9), 10**9, shape).astype(dtype)


CASES = [(k, s) for k in SUMS for s in SHAPES if k.is_rows == (s[2] == 1)]


@pytest.mark.parametrize(("kernel", "shape"), CASES, ids=lambda v: getattr(v, "name", str(v)))
def test_sums(kernel: CumulativeSum, shape: tuple[int, int, int], library: host.Library) -> None:
    x, (outer, n, inner) = sample(shape, kernel.dtype), shape
    y = host.empty(x.size + 16, kernel.dtype)
    y[x.size :] = 7
    end = reduce.items(outer, inner, TARGET)
    for begin, stop in ((0, end // 2), (end // 2, end)):
        library.call(kernel, y, host.aligned(x), n, inner, begin=begin, end=stop)
    expected = scan.running_sums(x, kernel.is_exclusive, kernel.is_reverse)
    np.testing.assert_array_equal(y[: x.size].reshape(shape), expected)
    assert (y[x.size :] == 7).all(), "wrote past the end"


def top(
    kernel: TopK, x: np.ndarray, k: int, library: host.Library
) -> tuple[np.ndarray, np.ndarray]:
    outer, n, inner = x.shape
    size = outer * k * inner
    values, places = host.empty(size + 8, kernel.dtype), host.empty(size + 8, "int64")
    values[size:] = places[size:] = 7
    end = outer * inner
    for begin, stop in ((0, end // 2), (end // 2, end)):
        given = (values, places, host.aligned(x), n, k, inner)
        library.call(kernel, *given, begin=begin, end=stop)
    assert (values[size:] == 7).all(), "wrote past the end"
    assert (places[size:] == 7).all(), "wrote past the end"
    made = (outer, k, inner)
    return values[:size].reshape(made), places[:size].reshape(made)


@pytest.mark.parametrize("k", [1, 2, 5, 9])
@pytest.mark.parametrize("kernel", ORDERS, ids=lambda v: v.name)
def test_the_best(kernel: TopK, k: int, library: host.Library) -> None:
    for shape in SHAPES:
        x = sample(shape, kernel.dtype)
        many = min(k, shape[1])
        values, places = top(kernel, x, many, library)
        expected = scan.best(x, many, kernel.is_largest)
        np.testing.assert_array_equal(values, expected[0])
        np.testing.assert_array_equal(places, expected[1])


@pytest.mark.parametrize("kernel", ORDERS, ids=lambda v: v.name)
@pytest.mark.parametrize("order", ["up", "down", "equal", "few"])
def test_orders_and_equals(kernel: TopK, order: str, library: host.Library) -> None:
    """Of equals the first comes first."""
    n = 40
    rows = {
        "up": np.arange(n), "down": np.arange(n)[::-1], "equal": np.ones(n),
        "few": np.arange(n) * 7 % 3,
    }  # fmt: skip
    x = rows[order].astype(kernel.dtype).reshape(1, n, 1)
    for k in (1, 6, n):
        values, places = top(kernel, x, k, library)
        expected = scan.best(x, k, kernel.is_largest)
        np.testing.assert_array_equal(values, expected[0])
        np.testing.assert_array_equal(places, expected[1])


@pytest.mark.parametrize("is_largest", [True, False])
def test_nan_is_the_worst(is_largest: bool, library: host.Library) -> None:
    x = sample((4, 20, 3), "float32")
    x[np.random.default_rng(0).random(x.shape) < 0.4] = np.nan
    x[0] = np.nan
    for k in (1, 7, 20):
        values, places = top(TopK("float32", is_largest), x, k, library)
        np.testing.assert_array_equal(places, scan.best(x, k, is_largest)[1])
        np.testing.assert_array_equal(values, np.take_along_axis(x, places, 1))
