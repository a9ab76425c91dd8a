import math

import numpy as np
import pytest

from sparsegraph import repair
from sparsegraph.budget.allocate import ALLOCATIONS, lamp_score
from sparsegraph.criteria.known import Known, output_error
from sparsegraph.criteria.structure import OUTPUTS, Structure, keep_best, keep_mask
from sparsegraph.criteria.table import CRITERIA
from sparsegraph.sparsity import analyze

SEED = 11
STRUCTURES = {
    "share": Structure(0.75),
    "share per row": Structure(0.75, per_row=True),
    "2:4": Structure(n=2, m=4),
    "3:7": Structure(n=3, m=7),
    "1:5 outputs": Structure(n=1, m=5, axis=OUTPUTS),
    "2:4 outputs": Structure(n=2, m=4, axis=OUTPUTS),
    "8x1": Structure(0.75, rows=8, per_row=True),
    "1x4": Structure(0.5, columns=4),
    "4x4": Structure(0.75, rows=4, columns=4, per_row=True),
    "2:4 of 8x1": Structure(n=2, m=4, rows=8),
    "1:2 of 1x2 outputs": Structure(n=1, m=2, columns=2, axis=OUTPUTS),
    "channels": Structure(0.5, channels=True).of(40, 1),
    "channels of 4 taps": Structure(0.5, channels=True).of(40, 4),
    "1:2 of channels": Structure(n=1, m=2, channels=True).of(40, 1),
}
SOLVERS = ("admm", "sparsegpt", "lasso")


def inputs(columns: int, n: int = 600) -> np.ndarray:
    generator = np.random.default_rng(SEED)
    mix = generator.normal(size=(columns // 3, columns))
    x = generator.normal(size=(n, columns // 3)) @ mix
    return (x + 0.3 * generator.normal(size=(n, columns))) * generator.lognormal(size=columns)


def known(columns: int, out: int = 40) -> Known:
    """Also the gradients of a loss that counts the outputs unequally."""
    x = inputs(columns)
    second = x.T @ x / len(x)
    weight = np.random.default_rng(SEED).lognormal(size=(out, 1))
    return Known(
        np.sqrt(np.diag(second)),
        second,
        (SEED,),
        weight * np.diag(second),
        weight * x.std(axis=0),
    )


def groups_hold(keep: np.ndarray, structure: Structure) -> bool:
    """Whether a mask has the structure, checked block by block and group by group."""
    out, columns = keep.shape
    blocks = np.zeros((-(-out // structure.rows), -(-columns // structure.columns)), dtype=bool)
    for i in range(blocks.shape[0]):
        for j in range(blocks.shape[1]):
            rows = slice(i * structure.rows, (i + 1) * structure.rows)
            block = keep[rows, j * structure.columns : (j + 1) * structure.columns]
            if block.any() != block.all():
                return False
            blocks[i, j] = block.any()
    if not structure.m:
        return True
    lines = blocks.T if structure.axis == OUTPUTS else blocks
    starts = range(0, lines.shape[1], structure.m)
    return all((lines[:, s : s + structure.m].sum(axis=1) <= structure.n).all() for s in starts)


@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)
@pytest.mark.parametrize("shape", [(40, 56), (37, 51)])
def test_masks_have_their_structure(structure: Structure, shape: tuple[int, int]) -> None:
    keep = keep_mask(np.random.default_rng(SEED).random(shape), structure)
    assert groups_hold(keep, structure)
    assert keep.mean() == pytest.approx(1 - structure.target, abs=0.06)


def test_a_zero_in_a_block_does_not_condemn_it() -> None:
    """Weights are far below one, so a penalty of one per zero would outweigh the whole block."""
    w = np.full((8, 6), 0.02)
    w[:, 3:], w[0, :3], w[:, 5] = 0.001, 0.0, 0.0
    for structure in (Structure(0.5, rows=8), Structure(0.5, channels=True).of(8, 1)):
        kept = keep_best(w, np.abs(w), structure)[1]
        assert kept[1].tolist() == [True, True, True, False, False, False]


def test_the_check_of_structures_can_fail() -> None:
    keep = keep_mask(np.random.default_rng(SEED).random((40, 56)), Structure(0.5))
    held = [name for name, s in STRUCTURES.items() if s.m or s.has_blocks if groups_hold(keep, s)]
    assert held == []


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)
def test_every_criterion_in_every_structure(name: str, structure: Structure) -> None:
    w = np.random.default_rng(SEED).normal(size=(40, 56))
    found = CRITERIA[name].prune(w, known(56), structure, None)
    assert groups_hold(found != 0, structure)
    assert (found != 0).mean() == pytest.approx(1 - structure.target, abs=0.04)
    if not CRITERIA[name].moves_weights and name != "spectrum":
        np.testing.assert_array_equal(found[found != 0], w[found != 0])
    np.testing.assert_array_equal(found, CRITERIA[name].prune(w, known(56), structure, None))


@pytest.mark.parametrize("name", CRITERIA)
def test_frozen_weights_stay_zero(name: str) -> None:
    w = np.random.default_rng(SEED).normal(size=(20, 48))
    frozen = np.random.default_rng(1).random(w.shape) < 0.3
    w[frozen] = 0
    found = CRITERIA[name].prune(w, known(48, 20), Structure(0.5, per_row=True), frozen)
    assert not found[frozen].any()
    assert (found == 0).mean() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)
def test_each_criterion_beats_the_one_that_knows_less(structure: Structure) -> None:
    """Random, magnitude, Wanda and the two that solve for the rest, on unequal inputs."""
    w = np.random.default_rng(SEED).normal(size=(40, 56))
    facts = known(56)
    error = {
        name: output_error(c.prune(w, facts, structure, None) - w, w, facts.second)
        for name, c in CRITERIA.items()
    }
    assert error["wanda"] <= error["magnitude"]
    if not structure.channels:  # whole channels of random weights are of about the same size
        assert error["magnitude"] < error["random"]
    choice_is_within_an_input = structure.axis == OUTPUTS and not structure.has_blocks
    assert (error["wanda"] == error["magnitude"]) == choice_is_within_an_input
    assert max(error[name] for name in SOLVERS) < error["wanda"]


def test_projection_descends_from_wanda() -> None:
    w, facts = np.random.default_rng(SEED).normal(size=(40, 56)), known(56)
    structure = Structure(0.6, per_row=True)
    errors = [
        output_error(CRITERIA[name].prune(w, facts, structure, None) - w, w, facts.second)
        for name in ("projected", "wanda")
    ]
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)
def test_spectrum_loses_less_of_the_spectrum_than_magnitude(structure: Structure) -> None:
    w = np.random.default_rng(SEED).normal(size=(40, 56)) + 0.5
    lost = {
        name: np.linalg.norm(w - CRITERIA[name].prune(w, known(56), structure, None), 2)
        for name in ("spectrum", "magnitude")
    }
    # what is lost with a whole channel, no other channel can make up for
    assert lost["spectrum"] <= (1.0 if structure.channels else 0.97) * lost["magnitude"]


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_lasso_chooses_channels_better_than_their_size(share: float) -> None:
    """The paper's comparison: against the largest weights and the lot, all refitted."""
    w = np.random.default_rng(SEED).normal(size=(40, 56))
    facts = known(56)
    structure = Structure(share, channels=True).of(40, 1)
    error = {}
    for name in ("lasso", "magnitude", "random"):
        found = repair.refit(CRITERIA[name].prune(w, facts, structure, None), w, facts.second)
        error[name] = output_error(found - w, w, facts.second)
    assert error["lasso"] < 0.7 * min(error["magnitude"], error["random"])
    own = CRITERIA["lasso"].prune(w, facts, structure, None)
    assert output_error(own - w, w, facts.second) < 1.01 * error["lasso"]  # it refits by itself


def test_lasso_sees_that_two_channels_say_the_same() -> None:
    """Each of the first two inputs alone tells the other: one of them goes, although larger."""
    w = np.ones((8, 4)) * [3.0, 2.0, 1.0, 1.0]
    second = np.eye(4)
    second[0, 1] = second[1, 0] = 0.999
    facts = Known(np.ones(4), second)
    structure = Structure(0.25, channels=True).of(8, 1)
    kept = {
        name: CRITERIA[name].prune(w, facts, structure, None).any(axis=0).tolist()
        for name in ("lasso", "wanda")
    }
    assert sum(kept["lasso"][:2]) == 1
    assert sum(kept["wanda"][:2]) == 2


def test_taylor_and_fisher_count_what_the_loss_counts() -> None:
    """Zeroing by them costs less of a weighted error than zeroing by the unweighted one."""
    w, facts = np.random.default_rng(SEED).normal(size=(40, 56)), known(56)
    weight = facts.fisher[:, :1] / facts.second[0, 0]
    structure = Structure(0.6)
    lost = {}
    for name in ("fisher", "wanda", "magnitude"):
        delta = CRITERIA[name].prune(w, facts, structure, None) - w
        lost[name] = float((weight * np.square(delta) * np.diag(facts.second)).sum())
    assert lost["fisher"] < 0.9 * lost["wanda"] < lost["magnitude"]
    delta = CRITERIA["taylor"].prune(w, facts, structure, None) - w
    other = CRITERIA["magnitude"].prune(w, facts, structure, None) - w
    first_order = [(np.square(d) * facts.fisher).sum() for d in (delta, other)]
    assert first_order[0] < 0.5 * first_order[1]


def test_other_seeds_draw_other_masks() -> None:
    w = np.ones((16, 32))
    first, second = (
        CRITERIA["random"].prune(w, Known(seed=seed), Structure(0.5), None) for seed in [(0,), (1,)]
    )
    assert (first != second).any()


def test_detection_agrees_with_what_was_imposed() -> None:
    w, facts = np.random.default_rng(SEED).normal(size=(64, 96)), known(96)
    prune = CRITERIA["sparsegpt"].prune
    assert analyze(prune(w, facts, Structure(n=2, m=4, axis=OUTPUTS), None)).axis == "outputs"
    assert analyze(prune(w, facts, Structure(0.75, rows=4, columns=4), None)).block == (4, 4)


# ---- densities per layer ------------------------------------------------------------------------


def layers() -> list[np.ndarray]:
    generator = np.random.default_rng(SEED)
    shapes = [(16, 8, 3, 3), (64, 64, 3, 3), (512, 64), (10, 512)]
    return [generator.normal(size=s) * 0.3**i for i, s in enumerate(shapes)]


@pytest.mark.parametrize("rule", ALLOCATIONS)
@pytest.mark.parametrize("share", [0.3, 0.8, 0.95])
def test_allocations_spend_the_budget(rule: str, share: float) -> None:
    weights = layers()
    density = ALLOCATIONS[rule](weights, share, 0.01)
    kept = sum(d * w.size for d, w in zip(density, weights))
    total = sum(w.size for w in weights)
    assert kept == pytest.approx(total * (1 - share), rel=2e-3)
    assert all(0.01 <= d <= 1 for d in density)


@pytest.mark.parametrize("rule", ALLOCATIONS)
def test_floors_hold(rule: str) -> None:
    density = ALLOCATIONS[rule](layers(), 0.9, 0.08)
    assert min(density) >= 0.08 - 1e-3
    assert sum(d * w.size for d, w in zip(density, layers())) == pytest.approx(
        0.1 * sum(w.size for w in layers()), rel=5e-3
    )


def test_erdos_renyi_favours_small_layers() -> None:
    density = ALLOCATIONS["erk"](layers(), 0.9, 0.0)
    want = [sum(w.shape) / w.size for w in layers()]
    free = [i for i, d in enumerate(density) if d < 1]
    scales = [density[i] / want[i] for i in free]
    assert max(scales) == pytest.approx(min(scales))
    assert density[0] > density[1]


def test_lamp_scores_are_those_of_the_definition() -> None:
    w = np.array([[3.0, -1.0], [2.0, 0.0]])
    np.testing.assert_allclose(lamp_score(w), [0, 1 / 14, 4 / 13, 1])


def test_lamp_does_not_depend_on_the_scale_of_a_layer() -> None:
    weights = layers()
    scaled = [w * 10.0**i for i, w in enumerate(weights)]
    assert ALLOCATIONS["lamp"](weights, 0.8, 0.0) == ALLOCATIONS["lamp"](scaled, 0.8, 0.0)
    assert ALLOCATIONS["global"](weights, 0.8, 0.0) != ALLOCATIONS["global"](scaled, 0.8, 0.0)
    assert all(d * w.size >= 1 for d, w in zip(ALLOCATIONS["lamp"](weights, 0.999, 0.0), weights))


def test_global_magnitude_is_one_threshold() -> None:
    weights = layers()
    density = ALLOCATIONS["global"](weights, 0.7, 0.0)
    cut = np.quantile(np.concatenate([np.abs(w).ravel() for w in weights]), 0.7)
    want = [(np.abs(w) > cut).mean() for w in weights]
    assert all(math.isclose(d, x, abs_tol=2e-3) for d, x in zip(density, want))
