"""How far the losses of single layers decide a plan."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from sparsegraph.budget import trust
from sparsegraph.budget.plan import FLOPS, Budget, plan
from sparsegraph.budget.table import LayerOptions, Table
from sparsegraph.budget.trust import blended, trusted
from sparsegraph.recipe import Recipe
from tests.test_budget_measured import DENSITIES, LAYERS, RECIPE, by_model
from tests.test_prune import encoder, feeds

HALF = Budget(FLOPS, 0.5, is_share=True)


def with_losses(weights: Sequence[float]) -> Table:
    """The table of `by_model`, with the loss of each layer times a weight."""
    rows = [
        LayerOptions(x.layer, x.n_weights, tuple(replace(o, loss=w * (1 - o.density) ** 2)
                                                 for o in x.options))
        for x, w in zip(by_model().layers, weights)
    ]  # fmt: skip
    return replace(by_model(), layers=tuple(rows))


def loss_of(weights: Mapping[str, float]) -> object:
    """The loss that a table with these weights predicts without error."""

    def loss(model: ir.Model) -> float:
        return sum(w * zeros(model, name) ** 2 for name, w in weights.items())

    return loss


def zeros(model: ir.Model, layer: str) -> float:
    node = next(n for n in model.graph if n.name == layer)
    arrays = [v.const_value.numpy() for v in node.inputs if v is not None and v.const_value]
    return float(np.mean(max(arrays, key=np.size) == 0))


def densities(table: Table) -> list[float]:
    return [plan(table, HALF).densities[name] for name in LAYERS]


@pytest.mark.parametrize("real", [(1.0, 4.0, 16.0), (16.0, 4.0, 1.0), (4.0, 4.0, 4.0)])
def test_a_plan_that_loses_more_than_equal_densities_is_not_taken(real: tuple[float, ...]) -> None:
    """The table says 1, 4, 16: right, the wrong way round, or seeing what is not there."""
    table, loss = with_losses((1.0, 4.0, 16.0)), loss_of(dict(zip(LAYERS, real)))
    found = densities(trusted(encoder(), RECIPE, feeds(), table, HALF, loss=loss))
    if real == (1.0, 4.0, 16.0):
        assert found == densities(table)
        assert max(found) > 1.5 * min(found)
    else:
        assert max(found) < 1.1 * min(found)


def test_half_way_may_be_best() -> None:
    table, loss = with_losses((1.0, 4.0, 16.0)), loss_of(dict(zip(LAYERS, (1.0, 2.0, 4.0))))
    found = trusted(encoder(), RECIPE, feeds(), table, HALF, loss=loss)
    assert densities(found) == densities(with_losses((1.0, 2.0, 4.0)))


def test_what_is_predicted_is_what_was_measured() -> None:
    table, measured = with_losses((1.0, 4.0, 16.0)), loss_of(dict(zip(LAYERS, (3.0, 12.0, 48.0))))
    found = plan(trusted(encoder(), RECIPE, feeds(), table, HALF, loss=measured), HALF)
    assert found.loss == pytest.approx(3 * plan(table, HALF).loss, rel=0.02)


def test_blending_keeps_both_ends() -> None:
    """Without trust, the last layer loses most for being largest: 21 shared out as 1, 1, 3."""
    table = with_losses((1.0, 4.0, 16.0))
    large = replace(table.layers[2], options=tuple(replace(o, macs=3 * o.macs)
                                                   for o in table.layers[2].options))  # fmt: skip
    table = replace(table, layers=(*table.layers[:2], large))
    losses = {share: np.array([[o.loss for o in x.options]
                               for x in blended(table, FLOPS, share).layers])
              for share in (1.0, 0.5, 0.0)}  # fmt: skip
    square = (1 - np.array(DENSITIES)) ** 2
    np.testing.assert_allclose(losses[1.0], np.outer((1, 4, 16), square))
    np.testing.assert_allclose(losses[0.0], np.outer((4.2, 4.2, 12.6), square))
    np.testing.assert_allclose(losses[0.5], np.sqrt(losses[0.0] * losses[1.0]))


def test_feeds_that_judge_are_not_pruned_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do trials take the time of the last repairs."""
    seen: dict[str, list[object]] = {"prune": [], "judge": []}
    recipes = []
    prune, judge = trust.prune, trust.Divergence
    monkeypatch.setattr(
        trust,
        "prune",
        lambda m, r, f, **rest: (
            seen["prune"].extend(f) or recipes.append(r) or prune(m, r, f, **rest)
        ),
    )
    monkeypatch.setattr(trust, "Divergence", lambda m, f: seen["judge"].extend(f) or judge(m, f))
    full = Recipe.parse("admm:0.5,swap=yes,refit=yes")
    for n, n_judges in ((16, 4), (15, 15)):
        seen["prune"], seen["judge"] = [], []
        trusted(encoder(), full, feeds(n), by_model(), HALF)
        assert len(seen["judge"]) == n_judges
        shared = {id(f) for f in seen["judge"]} & {id(f) for f in seen["prune"]}
        assert len(shared) == (0 if n == 16 else 15)
    assert {(r.method, r.swap, r.refit) for r in recipes} == {("admm", False, False)}
