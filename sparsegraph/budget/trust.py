"""How far a table of losses can be trusted, measured on whole pruned models.

The table has every layer pruned alone. Where many layers lose much, losses no longer add up, and
choosing the best sum also chooses the luckiest estimates. So plans are made from the table as it
is, from one in which every layer loses the same for its cost, and from their geometric mean; each
is pruned, and the one that loses least on feeds that its pruning did not see is kept. With the
second, densities are about uniform: a plan is not worse than that but for the noise of few feeds.

Measuring single layers around the pruned model instead tells little, since what follows a layer was
fitted to what it had lost: in MiniLM at 70 % zeros, giving one layer half of its weights makes the
output worse for 12 of 36 layers, and better by 12 % of its error for all of them added up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from sparsegraph.budget.plan import Budget, Plan, cost, plan
from sparsegraph.budget.table import LayerOptions, Table
from sparsegraph.calibrate import Feed
from sparsegraph.divergence import Divergence
from sparsegraph.progress import Progress, silent
from sparsegraph.prune import prune
from sparsegraph.recipe import Recipe
from sparsegraph.sensitivity import Loss

Array = np.ndarray[Any, Any]

SHARES = (1.0, 0.5, 0.0)  # of trust in single layers
_JUDGES = 4  # every fourth feed judges, where there are enough to spare
_ENOUGH = 16


def trusted(
    model: ir.Model,
    recipe: Recipe,
    feeds: Sequence[Feed],
    table: Table,
    budget: Budget,
    *,
    loss: Loss | None = None,
    progress: Progress | None = None,
) -> Table:
    """The table with losses blended as far as proves best at this budget.

    Losses are scaled to what was measured of the plan that won. `loss` is as for
    `sensitivity.scan`, by default the divergence on every fourth feed; trials are pruned by the
    recipe without its last repairs. Raises BudgetError where no plan meets the budget.
    """
    shown, judges = _split(feeds)
    measure, trial = loss or Divergence(model, judges), replace(recipe, swap=False, refit=False)
    report = progress or silent
    tried: list[tuple[float, Table, Plan]] = []
    for share in SHARES:
        blend = blended(table, budget.kind, share)
        chosen = plan(blend, budget)
        known = [lost for lost, _, other in tried if other.densities == chosen.densities]
        if not known:
            known = [measure(prune(model, trial, shown, densities=chosen.densities).model)]
        tried.append((known[0], blend, chosen))
        report("compare plans", len(tried), len(SHARES))
    lost, best, chosen = min(tried, key=lambda found: found[0])
    return _scaled(best, lost / chosen.loss if chosen.loss > 0 and np.isfinite(lost) else 1.0)


def blended(table: Table, kind: str, share: float) -> Table:
    """Losses to the power `share`, times to its rest those of a layer like all others.

    Such a layer loses, at every density, what all layers lose there per unit of `kind`.
    """
    whole = sum(cost(row.options[0], kind) for row in table.layers)
    curve = np.sum([[o.loss for o in row.options] for row in table.layers], axis=0) / whole
    rows = []
    for row in table.layers:
        usual = curve * cost(row.options[0], kind)
        found = np.array([o.loss for o in row.options])
        rows.append(_with_losses(row, found**share * usual ** (1 - share)))
    return replace(table, layers=tuple(rows))


def _split(feeds: Sequence[Feed]) -> tuple[Sequence[Feed], Sequence[Feed]]:
    """(feeds to prune by, feeds to judge by); all for both where they are few."""
    if len(feeds) < _ENOUGH:
        return feeds, feeds
    return [f for i, f in enumerate(feeds) if i % _JUDGES], feeds[::_JUDGES]


def _scaled(table: Table, factor: float) -> Table:
    rows = [_with_losses(x, np.array([o.loss for o in x.options]) * factor) for x in table.layers]
    return replace(table, layers=tuple(rows))


def _with_losses(row: LayerOptions, losses: Array) -> LayerOptions:
    options = [replace(o, loss=float(lost)) for o, lost in zip(row.options, losses)]
    return replace(row, options=tuple(options))
