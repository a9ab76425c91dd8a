"""Prune within one budget: table, plan, prune, and the trade-off around the plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from sparsegraph.budget.plan import LATENCY, Budget, Plan, pareto, plan
from sparsegraph.budget.search import within_drop
from sparsegraph.budget.table import tabulate
from sparsegraph.calibrate import Feed
from sparsegraph.errors import UsageError, message
from sparsegraph.prune import Pruned, prune
from sparsegraph.recipe import Recipe
from sparsegraph.sensitivity import Loss

DROP = "max-drop"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Within:
    """A pruned model, the plan behind it, and plans from dense to the least that is reachable."""

    pruned: Pruned
    plan: Plan
    trade_off: tuple[Plan, ...]

    def table(self) -> tuple[list[str], list[list[object]]]:
        """(columns, rows) of the trade-off; milliseconds and losses are predictions."""
        columns = ["predicted ms", "MB of weights", "G multiply-adds", "density", "predicted loss"]
        rows: list[list[object]] = [
            [p.ms, p.n_bytes / 1e6, p.macs / 1e9, p.density, p.loss]
            for p in sorted([*self.trade_off, self.plan], key=lambda p: -p.ms)
        ]
        return columns, rows


def prune_within(
    model: ir.Model,
    recipe: str | Recipe,
    calibration: Iterable[Feed],
    limits: Mapping[str, str],
    *,
    target: str = "native",
    loss: Loss | None = None,
    progress: Progress | None = None,
) -> Within:
    """Prune so that one limit holds: `{"latency": "5ms"}`, `size`, `flops`, or `max-drop`.

    `recipe` says how; its share of zeros does not count. `latency`, `size` and `flops` hold for the
    predictions of the table, `max-drop` for the loss measured on the first 8 feeds.
    Raises UsageError for anything but one limit, BudgetError when it is out of reach.
    """
    if len(limits) != 1:
        need, fix = "exactly one", "drop the others"
        raise UsageError(message("budget", ", ".join(limits), f"{len(limits)} limits", need, fix))
    feeds, ((kind, text),) = list(calibration), limits.items()
    budget = None if kind == DROP else Budget.parse(kind, text)
    most = _share(text) if budget is None else 0.0
    report = progress or (lambda stage, done, total: None)
    table = tabulate(
        model, recipe, feeds, target=target, loss=loss,
        progress=lambda done, n, _: report("measure layers", done, n),
    )  # fmt: skip
    points = tuple(pareto(table, budget.kind if budget else LATENCY))
    if budget is None:
        found = within_drop(model, recipe, feeds, table, most, loss=loss)
        return Within(found.pruned, found.plan, points)
    chosen = plan(table, budget)
    pruned = prune(
        model, recipe, feeds, densities=chosen.densities,
        progress=lambda done, n, _: report("prune", done, n),
    )  # fmt: skip
    return Within(pruned, chosen, points)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value > 0:
        fix = "write --max-drop 0.01"
        raise UsageError(message("--max-drop", text, "no positive number", "a loss", fix))
    return value
