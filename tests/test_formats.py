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
def test_dense_returns_what_was_packed(
    rows: int, columns: int, group: int, tile: int, chunks: int, density: float, seed: int
) -> None:
    weight = sparse(rows, columns, density, seed)
    packed = formats.pack_dense(weight, group, tile, chunks)
    assert np.array_equal(formats.unpack(packed), weight)
    assert packed.chunks[:, 4].sum() == -(-rows // group)


@settings(max_examples=120, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 70),
    group=st.sampled_from((1, 2, 4)),
    tile=st.integers(1, 80),
    reach=st.sampled_from((0, 1, 9, 100)),
    chunks=st.integers(1, 5),
    density=st.sampled_from(DENSITIES),
    alike=st.sampled_from((1, 2, 4)),
    step=st.sampled_from((1, 8)),
    seed=st.integers(0, 99),
)
def test_coded_returns_what_was_packed(
    rows: int, columns: int, group: int, tile: int, reach: int, chunks: int, density: float,
    alike: int, step: int, seed: int,
) -> None:  # fmt: skip
    rows += -rows % group if group == formats.ALIKE else 0
    weight = sparse(rows, columns, density, seed)
    weight *= weight[np.arange(rows) // alike * alike] != 0  # rows of a group share their zeros
    packed = formats.pack_coded(weight, group, tile, chunks, reach=reach, step=step)
    assert np.array_equal(formats.unpack(packed), weight)


def test_coded_holds_every_row_of_every_tile_once() -> None:
    packed = formats.pack_coded(sparse(33, 50, 0.3, 7), 2, 16)
    records = packed.slots.reshape(-1, 4)[: -formats.GROUPS_AHEAD]
    for groups in records.reshape(packed.n_tiles, -1, 4)[:, :, :2]:
        assert sorted(set(groups.ravel().tolist())) == list(range(33))
        assert np.count_nonzero(groups[:, 0] == groups[:, 1]) == 1  # the odd row fills up its pair


def test_rows_with_the_same_zeros_share_every_column() -> None:
    weight = sparse(64, 256, 0.25, 3)
    weight[1::2] = np.where(weight[0::2] != 0, weight[1::2] + 2, 0)
    packed = formats.pack_coded(weight, 2, 256)
    n_pairs, n = len(packed.slots) // 4 - formats.GROUPS_AHEAD, np.count_nonzero(weight)
    assert n_pairs == 32
    assert packed.column_index.size * 4 <= 0.6 * n  # one index for two values, but for remainders
    assert np.array_equal(formats.unpack(packed), weight)


def test_shared_zeros_are_told_from_random_ones() -> None:
    weight = sparse(64, 256, 0.2, 3)
    assert formats.shared_rows(weight) == 1
    assert formats.shared_rows(weight.repeat(2, 0)[1:]) == 1  # pairs that start at odd rows
    assert formats.shared_rows(weight.repeat(2, 0)) == 2
    assert formats.shared_rows(weight.repeat(4, 0)[2:]) == 2
    assert formats.shared_rows(weight.repeat(4, 0).reshape(256, 64, 2, 2)) == 4
    assert formats.shared_rows(np.ones((3, 5), np.float32)) == 2
    assert formats.shared_rows(np.zeros((4, 5), np.float32)) == 1


@pytest.mark.parametrize(("columns", "tile", "reach", "chunks"), [
    (256, 256, 0, 1), (300, 128, 64, 1), (300, 128, 0, 3), (7, 8, 0, 1),
])  # fmt: skip
def test_groups_of_four_rows_share_all_columns(
    columns: int, tile: int, reach: int, chunks: int
) -> None:
    weight = sparse(16, columns, 0.2, 3).repeat(4, 0)
    weight[1, weight[0].nonzero()[0][:1]] = 0  # nearly alike: kept as a value
    packed = formats.pack_coded(weight, 4, tile, chunks, reach=reach)
    records = packed.slots.reshape(-1, 4)
    assert (records[:, 1] - records[:, 0] == 3).all()
    assert not (records[:, 0] % 4).any()
    assert not records[:, 3].any()
    assert np.array_equal(formats.unpack(packed), weight)


def different(packed: formats.Packed) -> int:
    """How often the counts of a group differ from those of the group before."""
    counts = packed.slots.reshape(-1, 4)[: -formats.GROUPS_AHEAD, 2:]
    return int((np.diff(counts, axis=0) != 0).any(1).sum())


def test_a_reach_into_the_next_tile_makes_counts_equal() -> None:
    weight = sparse(512, 1024, 0.1, 1)
    alone, reaching = (formats.pack_coded(weight, 2, 256, reach=r) for r in (0, 128))
    assert different(reaching) < 0.6 * different(alone)
    assert reaching.values.size < 1.03 * np.count_nonzero(weight)


def test_ninety_percent_zeros_take_less_than_a_quarter_of_dense() -> None:
    weight = sparse(256, 1024, 0.1, 1)
    assert formats.pack_coded(weight, 2, 256).n_bytes <= 0.25 * weight.nbytes
