"""Rows of tables without zeros are exact, and wrong indices stay inside the table."""

import numpy as np
import pytest
from sparsegraph.targets import host
from sparsegraph.targets.kernels import embedding
from sparsegraph.targets.kernels.embedding import Embedding

from sparsegraph import compressed_rows, targets

INDICES = [0, 6, -1, -7, 3, 10**9, -(10**9)]
CLAMPED = [0, 6, 6, 0, 3, 6, 0]


@pytest.fixture(scope="module")
def library() -> host.Library:
    return host.Library(embedding.KERNELS, targets.get("native"))


def table(inner: int) -> np.ndarray:
    rng = np.random.default_rng(inner)
    found = rng.standard_normal((7, inner)).astype("f4")
    found[rng.random(found.shape) < 0.5] = 0
    found[[1, 3, 6]] = 0
    return found


@pytest.mark.parametrize("kernel", embedding.KERNELS, ids=lambda k: k.name)
@pytest.mark.parametrize("inner", [1, 3, 40])
def test_rows(kernel: Embedding, inner: int, library: host.Library) -> None:
    x, indices = table(inner), np.array(INDICES, kernel.index)
    if kernel.coded:
        values, *rest = compressed_rows.pack(x, np.uint16)
    else:
        values, *rest = embedding.keep_rows(x)
        assert len(values) == np.count_nonzero(x.any(axis=1))
    y = np.full(len(indices) * inner, np.nan, "f4")
    streams = [host.aligned(a) for a in (values, *rest)]
    library.call(kernel, y, *streams, indices, inner, 7, end=len(indices))
    np.testing.assert_array_equal(y.reshape(-1, inner), x[CLAMPED])
