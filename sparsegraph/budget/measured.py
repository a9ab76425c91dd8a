"""Latency budgets that hold on this machine: compile a plan, time it, correct the table, repeat.

The cost model prices a product alone, in warm caches; in a model, epilogues, caches and what lies
between the layers count too. Trials are pruned by magnitude: a kernel's time depends on how many
zeros there are, hardly on which.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from sparsegraph.budget.plan import LATENCY, Budget, Plan, dense, described, least, plan, total
from sparsegraph.budget.table import LayerOptions, Table
from sparsegraph.errors import BudgetError
from sparsegraph.prune import prune
from sparsegraph.recipe import Recipe
from sparsegraph.targets.target import Target

Array = np.ndarray[Any, Any]
Feed = Mapping[str, Array]

FEW_RUNS, MOST_RUNS = 5, 9  # of `settle`
_NEAR = 0.1  # below the limit; more than `FEW_RUNS` are made until one is as near
N_TIMED = 2  # of `timed`
_CLOSE = 0.02  # below the limit; nearer than that is the noise of a timing
_AIM = 0.99  # of the limit
_ROUNDS = 7


@dataclass(frozen=True)
class Timing:
    """A compiled model on this machine: milliseconds of a run, of ONNX Runtime's run of the same
    model, and of every kernel call with the names of the nodes that it computes."""

    ms: float
    dense_ms: float
    steps: tuple[tuple[tuple[str, ...], float], ...]


Timer = Callable[[ir.Model], Timing]


@dataclass(frozen=True)
class Settled:
    """The plan, the corrected table, the plan's measured milliseconds and ONNX Runtime's."""

    plan: Plan
    table: Table
    ms: float
    dense_ms: float
    n_runs: int


def timer(target: Target, feed: Feed) -> Timer:
    """Compiles a model for this machine and times one run on one thread."""

    def time(model: ir.Model) -> Timing:
        from sparsegraph.bench import bench
        from sparsegraph.compile import compile

        session = compile(model, target, check=False).session
        assert session is not None
        found = bench(session, model, feed, rounds=_ROUNDS)
        steps = tuple((row.nodes, row.ours_ms) for row in found.layers)
        return Timing(found.ours_ms, found.dense_ms, steps)

    return time


def settle(
    model: ir.Model,
    recipe: Recipe,
    table: Table,
    budget: Budget,
    time: Timer,
    *,
    on_run: Callable[[int, Timing], None] | None = None,
) -> Settled:
    """A plan that was measured to lie within a latency budget; at most 2 % below it is the aim.

    The first timing corrects the table; from then on, what is asked of it is moved by what came of
    it. A share is of ONNX Runtime's measured time. At most `FEW_RUNS` models are compiled,
    `MOST_RUNS` where none of them comes near the limit; the slowest of those within it is taken, or
    the fastest of all if none is.
    Raises BudgetError naming the least that is reachable, once one run has been measured.
    """
    seen, corrected, goal = Seen(table), table, 0.0
    chosen, dense_ms = _first(table, budget), 0.0
    runs: list[tuple[Plan, float]] = []
    points: list[tuple[float, float]] = []  # what was asked of `corrected`, what it took
    limit = math.inf
    while len(runs) < (FEW_RUNS if _is_near(runs, limit) else MOST_RUNS):
        timing = time(prune(model, _by_magnitude(recipe), densities=chosen.densities).model)
        if not runs:
            dense_ms = timing.dense_ms
            limit = budget.limit * dense_ms if budget.is_share else budget.limit
        elif budget.is_share:  # the machine may be faster or slower by now
            timing = replace(timing, ms=timing.ms * dense_ms / timing.dense_ms)
        seen.add(chosen, timing)
        if not runs:
            corrected, goal = seen.table(), timing.ms
            plan(corrected, Budget(LATENCY, limit))  # or raise
        runs.append((chosen, timing.ms))
        points.append((goal, timing.ms))
        if on_run is not None:
            on_run(len(runs), timing)
        if (1 - _CLOSE) * limit <= timing.ms <= limit:
            break
        goal = max(_next_goal(points, _AIM * limit), least(corrected).ms)
        chosen = plan(corrected, Budget(LATENCY, goal))
        if _is_known(chosen, runs):  # the model cannot tell these plans apart; the timings may
            corrected, points = seen.table(), [(ms, ms) for _, ms in runs]
            goal = max(_AIM * limit, least(corrected).ms)
            chosen = plan(corrected, Budget(LATENCY, goal))
            if _is_known(chosen, runs):
                break
    within = [run for run in runs if run[1] <= limit]
    best, ms = max(within, key=lambda run: run[1]) if within else min(runs, key=lambda run: run[1])
    return Settled(replace(best, ms=ms), seen.table(), ms, dense_ms, len(runs))


def timed(
    model: ir.Model,
    recipe: Recipe,
    table: Table,
    time: Timer,
    *,
    on_run: Callable[[int, Timing], None] | None = None,
) -> Table:
    """The table with milliseconds in place: its sparsest plan and one half way were timed."""
    seen, fastest = Seen(table), least(table)
    full = total(table, LATENCY, dense(table))
    half = plan(table, Budget(LATENCY, (fastest.ms + full) / 2))
    for done, chosen in enumerate((half, fastest), 1):
        timing = time(prune(model, _by_magnitude(recipe), densities=chosen.densities).model)
        seen.add(chosen, timing)
        if on_run is not None:
            on_run(done, timing)
    return seen.table()


def _is_near(runs: Sequence[tuple[Plan, float]], limit: float) -> bool:
    return any((1 - _NEAR) * limit <= ms <= limit for _, ms in runs)


def _is_known(chosen: Plan, runs: Sequence[tuple[Plan, float]]) -> bool:
    return any(chosen.densities == earlier.densities for earlier, _ in runs)


def _next_goal(points: Sequence[tuple[float, float]], wanted: float) -> float:
    """What to ask for to get `wanted`: between the nearest (asked, taken) on both sides."""
    below = max((p for p in points if p[1] <= wanted), key=lambda p: p[1], default=None)
    above = min((p for p in points if p[1] > wanted), key=lambda p: p[1], default=None)
    if below is None or above is None:
        asked, taken = below or above or (wanted, wanted)
        return asked * wanted / taken
    share = (wanted - below[1]) / (above[1] - below[1])
    return below[0] + share * (above[0] - below[0])


def _first(table: Table, budget: Budget) -> Plan:
    """The plan of the cost model; where it sees no way, the sparsest."""
    try:
        return plan(table, budget)
    except BudgetError:
        return described(table, [row.options[-1] for row in table.layers])


def _by_magnitude(recipe: Recipe) -> Recipe:
    return replace(recipe, method="magnitude", swap=False, refit=False)


@dataclass
class Seen:
    """A table times what was measured over what it said, interpolated over densities."""

    base: Table
    rest_ms: float = 0.0
    ratios: dict[str, dict[float, float]] = field(default_factory=lambda: defaultdict(dict))

    def add(self, chosen: Plan, timing: Timing) -> None:
        """Take up a timing of a plan; times of kernel calls are scaled to add up to the run."""
        predicted = {x.layer: _ms(x, chosen.densities[x.layer]) for x in self.base.layers}
        spent: dict[str, float] = defaultdict(float)
        scale = timing.ms / sum(ms for _, ms in timing.steps)
        for nodes, ms in timing.steps:
            inside = [name for name in nodes if name in predicted]
            whole = sum(predicted[name] for name in inside)
            for name in inside:
                spent[name] += scale * ms * predicted[name] / whole
        unseen = sum(ms for name, ms in predicted.items() if name not in spent)
        left = timing.ms - sum(spent.values())
        ratio = sum(spent.values()) / sum(predicted[n] for n in spent) if spent else 1.0
        ratio = min(ratio, left / unseen) if unseen else ratio
        for name, ms in predicted.items():
            self.ratios[name][chosen.densities[name]] = spent.get(name, ratio * ms) / ms
        self.rest_ms = max(0.0, left - ratio * unseen)

    def table(self) -> Table:
        """The table with corrected milliseconds."""
        rows = tuple(self._corrected(row) for row in self.base.layers)
        return replace(self.base, layers=rows, rest_ms=self.rest_ms)

    def _corrected(self, row: LayerOptions) -> LayerOptions:
        known = self.ratios[row.layer]
        at = sorted(known)
        densities = [option.density for option in row.options]
        ratios = np.interp(densities, at, [known[density] for density in at])
        options = [replace(o, ms=o.ms * float(r)) for o, r in zip(row.options, ratios)]
        return replace(row, options=tuple(options))


def _ms(row: LayerOptions, density: float) -> float:
    return next(o.ms for o in row.options if o.density == density)
