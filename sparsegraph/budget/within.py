"""Prune within one budget: table, plan, prune, and the trade-off around the plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count

import onnx_ir as ir

from sparsegraph import half, targets
from sparsegraph.budget.measured import (
    FEW_RUNS,
    N_TIMED,
    Settled,
    Timer,
    Timing,
    settle,
    timed,
    timer,
)
from sparsegraph.budget.plan import LATENCY, Budget, Plan, pareto, plan
from sparsegraph.budget.search import N_ATTEMPTS, Found, within_drop
from sparsegraph.budget.table import Table, tabulate
from sparsegraph.budget.trust import trusted
from sparsegraph.calibrate import Feed
from sparsegraph.errors import BudgetError, UsageError, message
from sparsegraph.feeds import checked
from sparsegraph.progress import Progress, silent
from sparsegraph.prune import Pruned, prune
from sparsegraph.recipe import MASKS, Recipe
from sparsegraph.sensitivity import Loss

DROP = "max-drop"


@dataclass(frozen=True)
class Within:
    """A pruned model, the plan behind it, and plans from dense to the least that is reachable.

    `options` is the table that they were chosen from; `settled` tells what was measured on this
    machine for a latency budget or an allowed drop, else None.
    """

    pruned: Pruned
    plan: Plan
    trade_off: tuple[Plan, ...]
    options: Table
    settled: Settled | None = None

    def layer_ms(self) -> dict[str, float]:
        """Milliseconds of every layer at its density, by name: in place where they were timed."""
        wanted = self.plan.densities
        return {
            row.layer: option.ms
            for row in self.options.layers
            for option in row.options
            if option.density == wanted[row.layer]
        }

    def summary(self) -> str:
        """What the chosen plan costs; its time alone where that was measured."""
        if self.settled is None:
            spent = f"{self.plan.n_bytes / 1e6:.3g} MB, {self.plan.macs / 1e9:.3g} G multiply-adds"
            return f"{spent}, {self.plan.ms:.3g} ms predicted"
        share = self.settled.ms / self.settled.dense_ms
        runs = f"{self.settled.n_runs} compiled trials"
        return f"{self.settled.ms:.3g} ms measured, {share:.2f}x of ONNX Runtime, {runs}"

    def table(self) -> tuple[list[str], list[list[object]]]:
        """(columns, rows) of the trade-off; milliseconds and losses are predictions."""
        columns = ["predicted ms", "MB of weights", "G multiply-adds", "density", "predicted loss"]
        rows: list[list[object]] = [
            [p.ms, p.n_bytes / 1e6, p.macs / 1e9, p.density, p.loss]
            for p in sorted([*self.trade_off, self.plan], key=lambda p: p.loss)
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
    time: Timer | None = None,
    progress: Progress | None = None,
) -> Within:
    """Prune so that one limit holds: `{"latency": "5ms"}`, `size`, `flops`, or `max-drop`.

    `recipe` says how; its share of zeros does not count, and `wanda` alone will do. How far losses
    of single layers can be trusted is tried on whole models: see `sparsegraph.budget.trust`.
    `latency` holds for a compiled model that was timed here (by `time`, if given) where the target
    runs on this machine; on others, where it has to be a share, and for `size` and `flops`, the
    predictions of the table count.
    `max-drop` holds for the loss measured on the first 8 feeds; what is fastest within it is judged
    by times in place.
    Raises UsageError for anything but one limit, BudgetError when it is out of reach.
    """
    wide = half.widened(model, verify=False).model
    if wide is not model:
        done = prune_within(
            wide, recipe, calibration, limits, target=target, loss=loss, time=time,
            progress=progress,
        )  # fmt: skip
        narrow = half.narrowed(done.pruned.model, model)
        return replace(done, pruned=replace(done.pruned, model=narrow))
    if len(limits) != 1:
        need, fix = "exactly one", "drop the others"
        raise UsageError(message("budget", ", ".join(limits), f"{len(limits)} limits", need, fix))
    recipe = _recipe(recipe)
    feeds, ((kind, text),) = checked(model, calibration), limits.items()
    budget = None if kind == DROP else Budget.parse(kind, text)
    most = _share(text) if budget is None else 0.0
    own = targets.get(target)
    is_timed = targets.runs_here(own)
    if budget is not None and budget.kind == LATENCY and not (is_timed or budget.is_share):
        need, fix = "a share of the dense time, as this machine cannot time it", "write 0.5x"
        raise UsageError(message("--latency", text, f"a time on {target}", need, fix))
    report = progress or silent
    table = tabulate(
        model, recipe, feeds, target=target, loss=loss,
        progress=lambda done, n, _: report("measure layers", done, n),
    )  # fmt: skip
    clock = (time or timer(own, feeds[0])) if is_timed else None

    def on_run(n: int) -> Callable[[int, Timing], None]:
        return lambda done, _: report("compile and time", done, max(done, n))

    if budget is None:
        if clock is not None:
            table = timed(model, recipe, table, clock, on_run=on_run(N_TIMED))
        attempts = count(1)
        best = within_drop(
            model, recipe, feeds, table, most, loss=loss,
            on_attempt=lambda *_: report("prune and compare", next(attempts), N_ATTEMPTS),
        )  # fmt: skip
        settled = None if clock is None else _timed_once(best, table, clock)
        chosen = best.plan if settled is None else settled.plan
        return Within(best.pruned, chosen, tuple(pareto(table)), table, settled)
    settled = None
    with suppress(*([BudgetError] if budget.kind == LATENCY and clock is not None else [])):
        # what the cost model holds for out of reach, timings may not
        table = trusted(model, recipe, feeds, table, budget, loss=loss, progress=progress)
    if budget.kind == LATENCY and clock is not None:
        settled = settle(model, recipe, table, budget, clock, on_run=on_run(FEW_RUNS))
        table = settled.table
    chosen = settled.plan if settled else plan(table, budget)
    pruned = prune(
        model, recipe, feeds, densities=chosen.densities,
        progress=lambda done, n, _: report("prune", done, n),
    )  # fmt: skip
    return Within(pruned, chosen, tuple(pareto(table, budget.kind)), table, settled)


def _timed_once(found: Found, table: Table, clock: Timer) -> Settled:
    """What was found, with the time that it really takes, after two timings of the table."""
    timing = clock(found.pruned.model)
    return Settled(replace(found.plan, ms=timing.ms), table, timing.ms, timing.dense_ms, 3)


def _recipe(recipe: str | Recipe) -> Recipe:
    """The recipe; a share that does not count is put where one is missing."""
    if isinstance(recipe, Recipe):
        return recipe
    head, comma, options = recipe.partition(",")
    has_share = ":" in head or head.strip() == MASKS
    return Recipe.parse(recipe if has_share else f"{head.strip()}:0.5{comma}{options}")


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value > 0:
        fix = "write --max-drop 0.01"
        raise UsageError(message("--max-drop", text, "no positive number", "a loss", fix))
    return value
