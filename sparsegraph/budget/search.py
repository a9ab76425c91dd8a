"""How sparse a model can get before it loses more than allowed: measured, not predicted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from sparsegraph.budget.plan import LATENCY, Budget, Plan, pareto, plan
from sparsegraph.budget.table import Table
from sparsegraph.calibrate import Feed
from sparsegraph.divergence import Divergence
from sparsegraph.errors import BudgetError, message
from sparsegraph.prune import Pruned, prune
from sparsegraph.recipe import Recipe
from sparsegraph.sensitivity import N_PROBES, Loss

N_ATTEMPTS = 5  # halvings of the range between dense and the least reachable time


@dataclass(frozen=True)
class Found:
    """The fastest model within the allowed loss, its plan, and what was measured on the way."""

    pruned: Pruned
    plan: Plan
    loss: float
    tried: tuple[tuple[float, float], ...]
    """(estimated milliseconds, measured loss) of every attempt."""


def within_drop(
    model: ir.Model,
    recipe: str | Recipe,
    calibration: Iterable[Feed],
    table: Table,
    max_drop: float,
    *,
    loss: Loss | None = None,
    on_attempt: Callable[[float, float], None] | None = None,
) -> Found:
    """Bisect the latency budget: prune, measure the loss, go on from there.

    `loss` is as for `sensitivity.scan`: by default the divergence on the first 8 feeds.
    Raises BudgetError with the least loss that was seen when no attempt stays within `max_drop`.
    """
    recipe = Recipe.parse(recipe) if isinstance(recipe, str) else recipe
    feeds = list(calibration)
    measure = loss or Divergence(model, feeds[:N_PROBES])
    ends = pareto(table, n=2)
    high, low = ends[0].ms, ends[-1].ms
    best: Found | None = None
    tried: list[tuple[float, float]] = []
    for _ in range(N_ATTEMPTS):
        found = plan(table, Budget(LATENCY, (high + low) / 2))
        pruned = prune(model, recipe, feeds, densities=found.densities)
        lost = measure(pruned.model)
        tried.append((found.ms, lost))
        if on_attempt is not None:
            on_attempt(*tried[-1])
        if lost <= max_drop:
            high, best = (high + low) / 2, Found(pruned, found, lost, tuple(tried))
        else:
            low = (high + low) / 2
    if best is None:
        ms, least = min(tried, key=lambda pair: pair[1])
        need, fix = f"at least {least:.3g} (at {ms:.3g} ms)", "allow more, or use a better recipe"
        raise BudgetError(message("budget", "max-drop", f"{max_drop:g}", need, fix))
    return Found(best.pruned, best.plan, best.loss, tuple(tried))


def knee(tried: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """The point of a trade-off (cost, loss) that lies farthest below the line between its ends."""
    points = np.array(sorted(tried), dtype=np.float64)
    span = points.max(axis=0) - points.min(axis=0)
    unit = (points - points.min(axis=0)) / np.where(span > 0, span, 1.0)
    first, last = unit[0], unit[-1]
    along = last - first
    below = along[0] * (first[1] - unit[:, 1]) - along[1] * (first[0] - unit[:, 0])
    cost, lost = points[int(below.argmax())]
    return float(cost), float(lost)
