"""Scatter kernels are exact: one value after the other in NumPy."""

import numpy as np
import pytest
from sparsegraph.targets import host
from sparsegraph.targets.kernels.scatter import (
    KERNELS,
    REDUCTIONS,
    ScatterElements,
    ScatterRows,
)

from sparsegraph import targets

RNG = np.random.default_rng(5)
JOIN = {"add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum}


@pytest.fixture(scope="module")
def library() -> host.Library:
    return host.Library(KERNELS, targets.get("native"))


def sample(*shape: int) -> np.ndarray:
    return RNG.integers(-500, 500, shape).astype(np.float32)


def joined(reduction: str, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    return new if reduction == "none" else JOIN[reduction](old, new)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("inner", [1, 21])
def test_rows(reduction: str, inner: int, library: host.Library) -> None:
    x, updates = sample(3, 4, inner), sample(5, inner)
    places = np.array([[0, 1], [-1, 3], [0, 1], [2, -4], [99, -99]], np.int64)
    want = x.copy()
    for update, at in zip(updates, [(0, 1), (2, 3), (0, 1), (2, 0), (2, 0)]):
        want[at] = joined(reduction, want[at], update)
    kernel = ScatterRows("float32", depth=2, reduction=reduction)
    y, sizes = host.aligned(x.copy()), (inner, 5, 3, 4 * inner, 4, inner)
    library.call(kernel, y, host.aligned(updates), host.aligned(places), *sizes, end=1)
    np.testing.assert_array_equal(y.reshape(x.shape), want)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_elements(reduction: str, library: host.Library) -> None:
    """Fewer elements than the data has behind the axis; negative and wrong places."""
    x, updates = sample(3, 6, 5), sample(3, 7, 4)
    places = RNG.integers(-6, 6, updates.shape)
    places[0, 0, 0], places[2, 1, 3] = 77, -77
    want = x.copy()
    for (o, j, i), update in np.ndenumerate(updates):
        at = o, {77: 5, -77: 0}.get(places[o, j, i], places[o, j, i] % 6), i
        want[at] = joined(reduction, want[at], update)
    y, sizes = host.aligned(x.copy()), (6, 5, 7, 4)
    kernel = ScatterElements("float32", reduction=reduction)
    library.call(kernel, y, host.aligned(updates), host.aligned(places), *sizes, end=3)
    np.testing.assert_array_equal(y.reshape(x.shape), want)
