"""Compressed sparse rows."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsegraph.compressed_rows import pack, unpack


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 9), st.integers(1, 9), st.floats(0, 1), st.integers(0, 99))
def test_round_trip(rows: int, columns: int, density: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal((rows, columns)).astype("f4")
    matrix[rng.random(matrix.shape) >= density] = 0
    packed = pack(matrix, np.uint8)
    n = np.count_nonzero(matrix)
    assert packed.starts[-1] == len(packed.columns) == len(packed.values) == n
    assert packed.nbytes == 5 * n + 4 * (rows + 1)
    assert np.array_equal(unpack(packed, columns), matrix)
