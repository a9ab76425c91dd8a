"""Products of two row-major matrices against float64: odd sizes, batches, parts of the rows."""

import math
from functools import cache

import numpy as np
import pytest
from sparsegraph.targets import host
from sparsegraph.targets.kernels.matrix import Matrix, kernel_for, reference

from sparsegraph import targets

TARGET = targets.native()
LANES = TARGET.lanes
CASES = [  # batches, m, k, n, rows per item
    (1, 1, 1, 1, 1),
    (2, 3, 7, LANES - 1, 3),
    (3, 13, 5, 3 * LANES + 1, 13),
    (1, 29, 33, 7 * LANES, 10),
    (2, 64, 200, 2 * LANES, 7),
    (1, 6, 1, 50, 6),
    (16, 1, 64, 1, 1),
]


@cache
def library(kernel: Matrix) -> host.Library:
    return host.Library([kernel], TARGET)


def product(kernel: Matrix, a: np.ndarray, w: np.ndarray, span: int) -> np.ndarray:
    """The kernel on [batches, m, k] and [batches, k, n]; a single matrix serves all batches."""
    n_batches, (m, k), n = max(len(a), len(w)), a.shape[1:], w.shape[2]
    y = host.empty(n_batches * m * n)
    panels = -(-n // kernel.width)
    a_step, w_step = (x[0].size if len(x) > 1 else 0 for x in (a, w))
    scratch = host.empty(kernel.scratch_bytes(k) // 4)
    scratch[:] = np.nan
    library(kernel).call(
        kernel, y, host.aligned(a.ravel()), a_step, host.aligned(w.ravel()), w_step, scratch,
        m, k, n, panels, span, end=n_batches * panels * -(-m // span),
    )  # fmt: skip
    return y.reshape(n_batches, m, n)


@pytest.mark.parametrize("shared", ["none", "a", "w"])
@pytest.mark.parametrize("case", CASES)
def test_a_product_equals_the_reference(case: tuple[int, ...], shared: str) -> None:
    n_batches, m, k, n, span = case
    rng = np.random.default_rng(sum(case))
    a = rng.standard_normal((1 if shared == "a" else n_batches, m, k)).astype(np.float32)
    w = rng.standard_normal((1 if shared == "w" else n_batches, k, n)).astype(np.float32)
    got = product(kernel_for(n, TARGET), a, w, span)
    bound = 2e-7 * np.sqrt(k) * (np.abs(a) @ np.abs(w)) + 1e-12
    assert (np.abs(got - reference(a, w)) <= bound).all()


@pytest.mark.parametrize("kernel", [Matrix(1, 1, 1), Matrix(3, 2, 1), Matrix(2, 5, LANES)])
def test_any_block_of_rows_and_vectors(kernel: Matrix) -> None:
    rng = np.random.default_rng(0)
    a, w = (rng.standard_normal(s).astype(np.float32) for s in ((2, 11, 9), (2, 9, 43)))
    np.testing.assert_allclose(product(kernel, a, w, 4), reference(a, w), atol=1e-5)


def test_nan_stays_in_its_row_and_column() -> None:
    a, w = np.ones((1, 6, 5), np.float32), np.ones((1, 5, LANES + 3), np.float32)
    a[0, 2, 1] = w[0, 3, 4] = np.nan
    got = product(kernel_for(LANES + 3, TARGET), a, w, 6)[0]
    expected = np.zeros(got.shape, bool)
    expected[2] = expected[:, 4] = True
    assert (np.isnan(got) == expected).all()


def test_panels_are_even_and_fit_the_registers() -> None:
    for n in range(1, 200):
        kernel = kernel_for(n, TARGET)
        panels = -(-n // kernel.width)
        most = 3 if TARGET.n_registers <= 16 else 4
        assert panels == math.ceil(math.ceil(n / LANES) / most)
        assert kernel.rows * kernel.vectors + kernel.vectors + 1 <= TARGET.n_registers
