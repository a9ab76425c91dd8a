import numpy as np
import pytest

from sparsegraph import repair
from sparsegraph.criteria.known import Known, dampened, output_error
from sparsegraph.criteria.structure import Structure
from sparsegraph.criteria.table import CRITERIA

SEED = 4


def problem(columns: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """A weight [24, columns] and the second moment of unequal, correlated inputs."""
    generator = np.random.default_rng(SEED)
    mix = generator.normal(size=(columns // 2, columns))
    x = generator.normal(size=(800, columns // 2)) @ mix * generator.lognormal(size=columns)
    x += 0.3 * generator.normal(size=x.shape)
    return generator.normal(size=(24, columns)), x.T @ x / len(x)


def wanda(w: np.ndarray, second: np.ndarray, structure: Structure) -> np.ndarray:
    return CRITERIA["wanda"].prune(w, Known(np.sqrt(np.diag(second))), structure, None)


def test_refit_is_least_squares_over_the_kept_weights() -> None:
    w, second = problem()
    found = wanda(w, second, Structure(0.6, per_row=True))
    refitted, h = repair.refit(found, w, second), dampened(second)
    for row, target, before in zip(refitted, w, found):
        kept = np.flatnonzero(before)
        want = np.linalg.solve(h[np.ix_(kept, kept)], (h @ target)[kept])
        np.testing.assert_allclose(row[kept], want, atol=2e-3 * np.abs(want).max())
        assert not row[before == 0].any()


def test_refit_of_an_unpruned_weight_changes_nothing() -> None:
    w, second = problem()
    np.testing.assert_array_equal(repair.refit(w, w, second), w)


def test_refit_survives_empty_rows_and_singular_moments() -> None:
    w, second = problem()
    found = wanda(w, second, Structure(0.6, per_row=True))
    found[3] = 0.0
    for moment in (second, np.zeros_like(second), np.ones_like(second)):
        refitted = repair.refit(found, w, moment)
        assert np.isfinite(refitted).all()
        assert not refitted[3].any()


@pytest.mark.parametrize("structure", [Structure(0.6, per_row=True), Structure(n=2, m=4)])
def test_swapping_lowers_the_error_and_keeps_the_pattern(structure: Structure) -> None:
    w, second = problem()
    before = wanda(w, second, structure)
    after = repair.swap(before, w, second, structure)
    assert output_error(after - w, w, second) < 0.9 * output_error(before - w, w, second)
    np.testing.assert_array_equal((after != 0).sum(axis=1), (before != 0).sum(axis=1))
    np.testing.assert_array_equal(after[after != 0], w[after != 0])
    if structure.m:
        assert ((after.reshape(24, -1, 4) != 0).sum(axis=2) == 2).all()


def test_swapping_lets_frozen_zeros_be() -> None:
    w, second = problem()
    frozen = np.random.default_rng(1).random(w.shape) < 0.3
    before = wanda(np.where(frozen, 0, w), second, Structure(0.6, per_row=True))
    after = repair.swap(before, w, second, Structure(0.6, per_row=True), frozen)
    assert (after != before).any()
    assert not after[frozen].any()


def test_swapping_leaves_blocks_alone() -> None:
    w, second = problem()
    structure = Structure(0.5, rows=4)
    before = wanda(w, second, structure)
    assert repair.swap(before, w, second, structure) is before


def test_swapping_stops_at_the_best_mask() -> None:
    """With independent inputs Wanda's mask is the best one: there is nothing to exchange."""
    w = problem()[0]
    second = np.diag(np.random.default_rng(2).random(48) + 0.1)
    before = wanda(w, second, Structure(0.5, per_row=True))
    np.testing.assert_array_equal(
        repair.swap(before, w, second, Structure(0.5, per_row=True)), before
    )
