"""What a latency budget buys, measured on this machine against one density for all layers.

    python -m benchmarks.budgets minilm --latency 0.5x
    python -m benchmarks.budgets resnet50 --recipe wanda:0.5 --latency 0.5x
    python -m benchmarks.budgets table

A latency of `0.5x` is half of ONNX Runtime's dense time; `0.5x-own` half of our own dense time. The
uniform model has the density at which it takes as long as the budget's. In the end both, our dense
model and ONNX Runtime take turns in one process on one pinned core. Of these models only MiniLM has
real weights: ResNet-50's are random, so its divergence tells about the budget, not about quality.
Results are merged into `results/budgets.json` by task and limit.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
from sparsegraph.targets import get

from benchmarks import results
from benchmarks.pruning import density
from benchmarks.quality_tasks import Feed, Task, minilm_retrieval, pictures
from benchmarks.timing import Plan, interleave, pinned
from sparsegraph import output
from sparsegraph.budget.measured import Timer, timer
from sparsegraph.budget.within import prune_within
from sparsegraph.compile import compile
from sparsegraph.divergence import Divergence
from sparsegraph.prune import prune
from sparsegraph.recipe import Recipe
from sparsegraph.verify import Session

FILE = Path(__file__).parent / "results" / "budgets.json"
OWN = "-own"
ORT, DENSE, BUDGET, UNIFORM = "onnxruntime", "dense", "budget", "uniform"
_CLOSE = 0.01  # of the time that the uniform model should take
_MOST_RUNS = 6
_PLAN = Plan(rounds=9, block_ms=150.0)
_LOADERS: dict[str, Callable[[], Task]] = {"minilm": minilm_retrieval, "resnet50": pictures}


@dataclass(frozen=True)
class Row:
    """One model: `way` is onnxruntime, dense, budget or uniform.

    `limit_ms` is what the budget allows, `settled_ms` what it measured while it searched, `ms` the
    time in the final comparison. `density` counts all layers that the recipe selects. `rho` and
    `share` are as in `benchmarks.pruning`; `divergence` is of feeds that pruning did not see.
    """

    task: str
    recipe: str
    limit: str
    way: str
    density: float
    ms: float
    limit_ms: float
    settled_ms: float | None
    divergence: float
    rho: float | None
    share: float | None
    data: str
    commit: str


def main(arguments: list[str] | None = None) -> int:
    """Measure or print; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m benchmarks.budgets")
    parser.add_argument("task", choices=[*_LOADERS, "table"])
    parser.add_argument("--recipe", default="admm:0.5")
    parser.add_argument("--latency", nargs="*", default=["0.5x", "0.5x" + OWN])
    parser.add_argument("--json", type=Path, default=FILE)
    options = parser.parse_args(arguments)
    if options.task == "table":
        print(table(read(options.json)))
        return 0
    task = _LOADERS[options.task]()
    for limit in options.latency:
        rows = measure(task, options.recipe, limit)
        print(table(rows), flush=True)
        save(options.json, rows, arguments)
    return 0


def measure(task: Task, recipe: str, limit: str) -> list[Row]:
    """Prune by the budget and uniformly to the same time, then time and score all."""
    clock = timer(get("native"), task.calibration[0])
    share = _share(task, limit, clock)
    within = prune_within(
        task.model, recipe, task.calibration, {"latency": f"{share:.4f}x"}, time=clock
    )
    assert within.settled is not None
    reached = within.settled.ms / within.settled.dense_ms
    found = density(task, recipe, within.pruned.model)
    uniform = uniform_at(task, recipe, reached, clock, found)
    models = {DENSE: task.model, BUDGET: within.pruned.model, UNIFORM: uniform}
    ms = times(models, task.calibration[0])
    settled = {BUDGET: reached * ms[ORT]}
    loss, commit = Divergence(task.model, task.fresh), results.commit()
    rows = []
    for way in (ORT, *models):
        model = models.get(way, task.model)
        score = task.score(model) if way in (BUDGET, UNIFORM) else None
        rows.append(Row(
            task.name, recipe, limit, way, density(task, recipe, model), ms[way],
            share * ms[ORT], settled.get(way), loss(model), score.rho if score else None,
            score.share if score else None, task.data, commit,
        ))  # fmt: skip
    return rows


def _share(task: Task, limit: str, clock: Timer) -> float:
    """The limit over ONNX Runtime's dense time."""
    share = float(limit.removesuffix(OWN).removesuffix("x"))
    if not limit.endswith(OWN):
        return share
    dense = clock(task.model)
    return share * dense.ms / dense.dense_ms


def uniform_at(task: Task, recipe: str, share: float, clock: Timer, start: float) -> ir.Model:
    """The model with one density everywhere whose time is `share` of ONNX Runtime's.

    Trials are pruned by magnitude, as those of the budget are: only the number of zeros counts.
    """
    wanted = Recipe.parse(recipe)
    trial = replace(wanted, method="magnitude", swap=False, refit=False)
    points: list[tuple[float, float]] = []
    asked = start
    while len(points) < _MOST_RUNS:
        timing = clock(prune(task.model, _at(trial, asked)).model)
        points.append((asked, timing.ms / timing.dense_ms))
        if abs(points[-1][1] / share - 1) < _CLOSE:
            break
        asked = next_density(points, share)
    best = min(points, key=lambda point: abs(point[1] - share))[0]
    return prune(task.model, _at(wanted, best), task.calibration).model


def next_density(points: Sequence[tuple[float, float]], wanted: float) -> float:
    """Where the line through the two (density, time) nearest to `wanted` reaches it."""
    near = sorted(points, key=lambda point: abs(point[1] - wanted))[:2]
    if len(near) == 1 or near[0][1] == near[1][1]:
        density, taken = near[0]
        return float(np.clip(density * wanted / taken, 0.01, 1.0))
    (a, at_a), (b, at_b) = near
    return float(np.clip(a + (b - a) * (wanted - at_a) / (at_b - at_a), 0.01, 1.0))


def _at(recipe: Recipe, density: float) -> Recipe:
    return replace(recipe, structure=replace(recipe.structure, sparsity=1 - density))


def times(models: Mapping[str, ir.Model], feed: Feed) -> dict[str, float]:
    """Median milliseconds of each model, compiled and proven, and of ONNX Runtime's dense one."""
    sessions = {way: compile(model).session for way, model in models.items()}
    calls: dict[str, Callable[[], object]] = {
        way: partial(s.run, None, feed) for way, s in sessions.items() if s is not None
    }
    with pinned(1):
        dense = Session(models[DENSE], optimize=True, threads=1)
        calls[ORT] = partial(dense.run, feed)
        found = interleave(calls, _PLAN)
    return {way: timing.median_ms for way, timing in found.items()}


def read(path: Path) -> list[Row]:
    """The rows of a file."""
    return [Row(**fields) for fields in json.loads(path.read_text())["rows"]]


def save(path: Path, rows: Sequence[Row], arguments: Sequence[str]) -> None:
    """Merge rows into a file; those of the same task and limit are replaced."""
    held = [r for r in (read(path) if path.exists() else [])
            if (r.task, r.limit) not in {(x.task, x.limit) for x in rows}]  # fmt: skip
    head = asdict(results.begin(["benchmarks.budgets", *arguments]))
    kept = {key: head[key] for key in ("created", "commit", "machine", "versions")}
    text = json.dumps({**kept, "rows": [asdict(r) for r in (*held, *rows)]}, indent=1)
    output.write_text(path, text + "\n")


HEAD = "task      limit     way          zeros       ms  of ORT  of limit  divergence    rho  right"


def table(rows: Sequence[Row]) -> str:
    """One line per row; `of limit` is the time over what the budget allows."""
    reference = {(r.task, r.limit): r.ms for r in rows if r.way == ORT}
    lines = [HEAD]
    for r in rows:
        of_dense = f"{r.ms / reference[r.task, r.limit]:6.3f}"
        rho, right = (f"{x:.3f}" if x is not None else "" for x in (r.rho, r.share))
        lines.append(
            f"{r.task:9} {r.limit:9} {r.way:11} {1 - r.density:6.1%} {r.ms:8.2f}  {of_dense}"
            f"  {r.ms / r.limit_ms:8.3f}  {r.divergence:10.4f}  {rho:>5}  {right:>5}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
