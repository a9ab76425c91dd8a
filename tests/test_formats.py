"""Packing is lossless for every density, group, tile and number of chunks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsegraph import formats

DENSITIES = (0.0, 0.01, 0.5, 0.9, 1.0)


def sparse(rows: int, columns: int, density: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((rows, columns)).astype(np.float32)
    weight[rng.random(weight.shape) >= density] = 0
    return weight


@pytest.mark.parametrize("pack", [formats.pack_dense, formats.pack_coded])
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 70),
    group=st.integers(1, 4),
    tile=st.integers(1, 80),
    chunks=st.integers(1, 5),
    density=st.sampled_from(DENSITIES),
    seed=st.integers(0, 99),
)
def test_unpack_returns_what_was_packed(pack, rows, columns, group, tile, chunks, density, seed):  # type: ignore[no-untyped-def]
    weight = sparse(rows, columns, density, seed)
    packed = pack(weight, group, tile, chunks)
    assert np.array_equal(formats.unpack(packed), weight)
    assert packed.chunks[:, 4].sum() == len(packed.row_index) == -(-rows // group)


def test_coded_stores_every_non_zero_value_once_and_no_zero() -> None:
    weight = sparse(33, 50, 0.3, 7)
    packed = formats.pack_coded(weight, 2, 16)
    assert np.array_equal(np.sort(packed.values), np.sort(weight[weight != 0]))


def test_rows_that_share_a_column_share_its_index() -> None:
    weight = np.zeros((2, 8), np.float32)
    weight[:, 3] = (1, 2)
    weight[0, 5] = 3
    packed = formats.pack_coded(weight, 2, 8)
    assert packed.counts.tolist() == [1, 0, 1]  # codes: row 0 only, row 1 only, both
    assert packed.column_index.tolist() == [5, 3]
    assert packed.values.tolist() == [3, 1, 2]


def test_ninety_percent_zeros_take_less_than_a_quarter_of_dense() -> None:
    weight = sparse(256, 1024, 0.1, 1)
    assert formats.pack_coded(weight, 2, 256).n_bytes <= 0.25 * weight.nbytes
