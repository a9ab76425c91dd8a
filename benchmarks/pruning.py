"""What pruning costs in quality, on real weights and real text.

    python -m benchmarks.pruning minilm --recipe dense floor magnitude:0.7 admm:0.7 --json out.json
    python -m benchmarks.pruning ocr=FILE.onnx --recipe dense magnitude:0.5 --json out.json
    python -m benchmarks.pruning minilm --recipe admm:0.7@flops=0.3x     densities by the budget
    python -m benchmarks.pruning minilm --recipe taylor:0.7@torch        gradients of a module
    python -m benchmarks.pruning minilm-288 --recipe admm:2:4            more calibration text
    python -m benchmarks.pruning debian-288 --recipe admm:2:4            this machine's packages
    python -m benchmarks.pruning held-288 --recipe admm:2:4              texts to choose recipes by
    python -m benchmarks.pruning own-1200 --recipe admm:0.7              calibrated on their kind
    python -m benchmarks.pruning minilm-288+debian-288 --recipe admm:2:4  pruned once, scored twice
    python -m benchmarks.pruning table --json out.json

Results are merged into the file by task and recipe. The published file is
`results/pruning.json`.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from benchmarks import results
from benchmarks.quality_tasks import Feed, Score, Task, minilm_retrieval, recognition
from benchmarks.texts import Pair, descriptions, held_out
from sparsegraph.recipe import Recipe, select

DENSE, FLOOR, TORCH = "dense", "floor", "torch"
_N_PAIRS = 300
FILE = Path(__file__).parent / "results" / "pruning.json"


@dataclass(frozen=True)
class Row:
    """One recipe on one task. `density` is of the layers it selects, `peak_bytes` of the process.

    Only rows of the same task and `data` compare. `commit` and `data` are empty in rows from before
    they were recorded. `note`: what else there is to know, for instance what `prune_s` waited for.
    """

    task: str
    recipe: str
    density: float
    share: float
    two_errors: float
    n: int
    rho: float | None
    prune_s: float
    peak_bytes: int
    data: str = ""
    commit: str = ""
    note: str = ""


def main(arguments: list[str] | None = None) -> int:
    """Measure or print; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pruning")
    names = (
        "minilm[-TEXTS], debian, held, own, NAME=FILE.onnx, some of the same TEXTS with +, or table"
    )
    parser.add_argument("task", help=names)
    parser.add_argument("--recipe", nargs="*", default=[])
    parser.add_argument("--json", type=Path, default=FILE)
    options = parser.parse_args(arguments)
    if options.task == "table":
        print(table(read(options.json)))
        return 0
    tasks = together(options.task)
    rows: list[Row] = []
    for recipe in options.recipe:
        found = measure_all(tasks, recipe)
        print("\n".join(map(line, found)), flush=True)
        rows += found
        save(options.json, rows, arguments)
    return 0


def load(text: str) -> Task:
    """The task of the command line. `minilm-288`: first sentences too, of as many texts.

    `debian` scores descriptions of installed packages, which differ between machines; `held` the
    352 texts of `minilm`'s kind that it does not score, to choose among recipes. `own` scores as
    `minilm` does, calibrated on those 352 and on others: who prunes has texts of the same kind.
    """
    name, equals, path = text.partition("=")
    if equals:
        return recognition(Path(path), name)
    name, _, n = name.partition("-")
    pairs: list[Pair] | None = None
    if name in ("debian", "held"):
        pairs = descriptions() if name == "debian" else held_out(_N_PAIRS)
    n_pairs = len(pairs) if pairs is not None and name == "held" else _N_PAIRS
    n_calibration, with_short = (int(n), True) if n else (96, False)
    own = held_out(_N_PAIRS) if name == "own" else ()
    task = minilm_retrieval(n_pairs, n_calibration, with_short=with_short, pairs=pairs, own=own)
    return replace(task, name=text)


def together(text: str) -> list[Task]:
    """Tasks joined by `+`; ValueError unless they calibrate one model on the same texts."""
    tasks = [load(name) for name in ([text] if "=" in text else text.split("+"))]
    if not all(_alike(task.calibration, tasks[0].calibration) for task in tasks[1:]):
        raise ValueError(f"'{text}': calibrated on different feeds; need the same number of texts")
    return tasks


def _alike(a: Sequence[Feed], b: Sequence[Feed]) -> bool:
    pairs = [(x[name], y[name]) for x, y in zip(a, b) for name in x]
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in pairs)


def measure(task: Task, recipe: str) -> Row:
    """Prune, score, and say what it took."""
    return measure_all([task], recipe)[0]


def measure_all(tasks: Sequence[Task], recipe: str) -> list[Row]:
    """One row for each of some tasks with one model and calibration: pruned once."""
    if recipe == DENSE:
        return [row(task, recipe, 1.0, task.score(task.model), 0.0) for task in tasks]
    if recipe == FLOOR:
        return [row(task, recipe, 0.0, task.floor(), 0.0) for task in tasks]
    began, plain = time.perf_counter(), recipe.partition("@")[0]
    model = pruned_by(tasks[0], recipe)
    took, kept = time.perf_counter() - began, density(tasks[0], plain, model)
    return [row(task, recipe, kept, task.score(model), took) for task in tasks]


def pruned_by(task: Task, recipe: str) -> ir.Model:
    """The model pruned by a recipe, and what is after its `@`."""
    from sparsegraph.budget.within import prune_within
    from sparsegraph.prune import prune

    plain, _, limit = recipe.partition("@")
    if limit == TORCH:
        found = task.gradients(plain.partition(":")[0]) if task.gradients else None
        return prune(task.model, plain, task.calibration, gradients=found).model
    if limit:
        kind, _, amount = limit.partition("=")
        return prune_within(task.model, plain, task.calibration, {kind: amount}).pruned.model
    return prune(task.model, plain, task.calibration).model


def density(task: Task, recipe: str, model: ir.Model) -> float:
    """Share of non-zeros over all weights that the recipe selects, those left dense included."""
    names = [str(x.value.name) for x in select(task.model, Recipe.parse(recipe))[0]]
    tensors = [model.graph.initializers[name].const_value for name in names]
    arrays = [tensor.numpy() for tensor in tensors if tensor is not None]
    return float(sum(map(np.count_nonzero, arrays)) / sum(a.size for a in arrays))


def row(task: Task, recipe: str, kept: float, score: Score, took: float) -> Row:
    """A score as a row of the file."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    share, rho = score.share, score.rho
    errors, commit = score.two_errors, results.commit()
    return Row(task.name, recipe, kept, share, errors, score.n, rho, took, peak, task.data, commit)


def read(path: Path) -> list[Row]:
    """The rows of a file."""
    return [Row(**fields) for fields in json.loads(path.read_text())["rows"]]


def save(path: Path, rows: Sequence[Row], arguments: Sequence[str]) -> None:
    """Merge rows into a file; those of the same task and recipe are replaced."""
    held = {(r.task, r.recipe): r for r in (read(path) if path.exists() else [])}
    held |= {(r.task, r.recipe): r for r in rows}
    head = asdict(results.begin(["benchmarks.pruning", *arguments]))
    kept = {key: head[key] for key in ("created", "commit", "machine", "versions")}
    text = json.dumps({**kept, "rows": [asdict(r) for r in held.values()]}, indent=1)
    temporary = path.with_suffix(".part")
    temporary.write_text(text + "\n")
    temporary.replace(path)


def table(rows: Sequence[Row]) -> str:
    """One block per task and data: floor and dense first, then by density and score."""
    blocks = []
    for key in dict.fromkeys((r.task, r.data) for r in rows):
        own = [r for r in rows if (r.task, r.data) == key]
        ends = {r.recipe: r.share for r in own}
        own.sort(key=lambda r: (r.recipe not in (DENSE, FLOOR), -r.density, r.share))
        blocks.append("\n".join([HEAD, *(line(r, ends) for r in own)]))
    return "\n\n".join(blocks)


HEAD = (
    "task       recipe                                zeros  right ± 2 SE   of dense   rho  prune s"
)


def line(r: Row, ends: dict[str, float] | None = None) -> str:
    """One row; `of dense` is (score - floor) / (dense - floor)."""
    of_dense = ""
    if ends is not None and DENSE in ends and FLOOR in ends:
        of_dense = f"{(r.share - ends[FLOOR]) / (ends[DENSE] - ends[FLOOR]):.2f}"
    rho = "" if r.rho is None else f"{r.rho:.2f}"
    right = f"{r.share:.3f} ± {r.two_errors:.3f}"
    zeros = f"{1 - r.density:.0%}"
    numbers = f"{zeros:>5}  {right}  {of_dense:>8}  {rho:>4}  {r.prune_s:7.1f}"
    return f"{r.task:10} {r.recipe:37} {numbers}  {r.note}".rstrip()


if __name__ == "__main__":
    sys.exit(main())
