"""`sparsegraph delta`: deltas, low-rank branches, averages, and several tasks in one artefact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsegraph import options, output
from sparsegraph.command import (
    Check,
    Commands,
    Dim,
    Json,
    Model,
    Shape,
    Skip,
    TargetName,
    Threads,
    Tune,
    Tuning,
)
from sparsegraph.console import Screen
from sparsegraph.errors import UsageError, message

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    help="Add, average and switch between sets of weights of one architecture.",
)

To = Annotated[Path, typer.Option("--output", "-o", help="The ONNX file to write.")]
_FORMS = "an .onnx of the same architecture, or .npz or .safetensors of deltas or boolean masks"


@app.command()
def diff(
    base: Annotated[Path, typer.Argument(help="The base model.", show_default=False)],
    tuned: Annotated[Path, typer.Argument(help="The same with other weights.", show_default=False)],
    to: Annotated[Path, typer.Option("--output", "-o", help="The .npz of deltas to write.")],
    shape: Shape = None,
    dim: Dim = None,
    json: Json = None,
) -> None:
    """Write what a fine-tuned model adds to its base, sparse where little changes."""
    from sparsegraph import delta
    from sparsegraph.capture import load

    screen = _screen(json, to)
    shapes = options.shapes(shape or (), dim or ())
    found = delta.difference(load(base, shapes), load(tuned, shapes))
    delta.write(to, found)
    rows = [[n, "x".join(map(str, d.shape)), delta.density(d)] for n, d in found.items()]
    columns = ["weight", "shape", "share that changes"]
    footer = f"{len(rows)} weights change; wrote {to}, {to.stat().st_size / 1e6:.2f} MB"
    screen.table(f"{tuned.name} against {base.name}", columns, rows, footer)
    screen.json([dict(zip(columns, row)) for row in rows])


@app.command()
def fold(
    model: Model,
    delta: Annotated[
        list[Path], typer.Option("--delta", help="A file of deltas or masks; several add up.")
    ],
    to: To,
    shape: Shape = None,
    dim: Dim = None,
    json: Json = None,
) -> None:
    """Add deltas to the weights of a model, and apply masks."""
    from sparsegraph import delta as algebra
    from sparsegraph.capture import load

    screen = _screen(json, to)
    captured = load(model, options.shapes(shape or (), dim or ()))
    folded, found = algebra.fold(captured, [algebra.read(path) for path in delta])
    output.write_model(to, folded)
    rows = [[r.weight, r.density_before, r.density_after] for r in found]
    columns = ["weight", "non-zeros before", "after"]
    screen.table(f"Deltas on {model.name}", columns, rows, f"wrote {to}")
    screen.json([dict(zip(columns, row)) for row in rows])


@app.command()
def average(
    models: Annotated[list[Path], typer.Argument(help="At least two.", show_default=False)],
    to: To,
    share: Annotated[
        list[float] | None, typer.Option(help="Of each model in turn; equal by default.")
    ] = None,
    shape: Shape = None,
    dim: Dim = None,
    json: Json = None,
) -> None:
    """Average models that were pruned with one mask; other masks would fill up, and are refused."""
    from sparsegraph import delta
    from sparsegraph.capture import load

    screen = _screen(json, to)
    shapes = options.shapes(shape or (), dim or ())
    mean, found = delta.average([load(path, shapes) for path in models], share)
    output.write_model(to, mean)
    rows = [[r.weight, r.density] for r in found]
    columns = ["weight", "non-zeros"]
    screen.table(f"Average of {len(models)} models", columns, rows, f"wrote {to}")
    screen.json([dict(zip(columns, row)) for row in rows])


@app.command()
def branches(
    model: Model,
    to: To,
    few: Annotated[
        float,
        typer.Option(
            min=0, max=1,
            help="Merge if at most this share of the weight loses its zeros; 1 merges all.",
        ),
    ] = 0.03,
    shape: Shape = None,
    dim: Dim = None,
    json: Json = None,
) -> None:  # fmt: skip
    """Merge, keep or remove the low-rank (LoRA) branches beside products."""
    from dataclasses import asdict

    from sparsegraph.branches import settle
    from sparsegraph.capture import load
    from sparsegraph.layers import unfolded
    from sparsegraph.recipe import OPTIMISE

    screen = _screen(json, to)
    captured = load(model, options.shapes(shape or (), dim or ()))
    settled, found = settle(captured, few=few)
    output.write_model(to, settled)
    rows = [
        [r.weight, r.rank, r.fate, r.density_before, r.density_merged, r.n_apart, r.n_merged]
        for r in found
    ]
    columns = [
        "weight", "rank", "branch", "non-zeros", "if merged", "multiplied apart", "merged"
    ]  # fmt: skip
    footer = f"{len(rows)} low-rank branches; wrote {to}"
    screen.table(f"Branches of {model.name}", columns, rows, footer)
    if hidden := unfolded(captured):
        screen.say(f"{len(hidden)} products compute their weights; {OPTIMISE}")
    screen.json([asdict(r) for r in found])


@app.command()
def tasks(
    model: Model,
    task: Annotated[list[str], typer.Option(help=f"NAME=FILE, once per task: {_FORMS}.")],
    to: Annotated[
        Path | None, typer.Option("--output", "-o", help="The artefact; model.sg by default.")
    ] = None,
    target: TargetName = "native",
    threads: Threads = 1,
    shape: Shape = None,
    dim: Dim = None,
    skip: Skip = None,
    check: Check = True,
    tune: Tune = False,
    tuning: Tuning = None,
    json: Json = None,
) -> None:
    """Compile a base model and its tasks to one artefact; `run --task NAME` chooses.

    The weights lie there once; a task adds what it changes in them.
    """
    from sparsegraph.tasks import compile_tasks

    screen = _screen(json)
    path = to or Path(model.with_suffix(".sg").name)
    output.check_folder(path)
    files = _files(task)
    shapes = options.variants(shape or (), dim or ())
    with screen.progress() as report:
        compiled = compile_tasks(
            model, files, target, shapes=shapes, threads=threads, output=path, check=check,
            skip=skip or (), tune=tune, tuning=tuning, progress=report,
        )  # fmt: skip
    if compiled.tuned is not None:
        screen.say(f"tuning: {compiled.tuned}")
    manifest = compiled.manifest
    shared, errors = compiled.weight_bytes, manifest.verification.get("tasks", {})
    rows = []
    for row in manifest.tasks:
        n_bytes = manifest.members[row.member].n_bytes
        error = errors.get(row.name, {}).get("max_rel_error")
        rows.append([row.name, row.n_changed, n_bytes / 1e6, n_bytes / shared, error])
    columns = ["task", "words that change", "MB", "of the weights", "error"]
    footer = f"weights that all share: {shared / 1e6:.2f} MB; wrote {path}"
    screen.table(f"Tasks over {model.name}", columns, rows, footer)
    screen.json(manifest.model_dump(mode="json", by_alias=True))


def _files(given: list[str]) -> dict[str, Path]:
    """`NAME=FILE` texts by name. Raises UsageError for another form, a name twice or no file."""
    found: dict[str, Path] = {}
    for text in given:
        name, _, file = text.partition("=")
        if not name or not file or name in found:
            fix = "write --task french=french.npz, each name once"
            raise UsageError(message("--task", text, f"'{text}'", "NAME=FILE", fix))
        if not Path(file).is_file():
            need = _FORMS
            raise UsageError(message("--task", text, "no such file", need, "check the path"))
        found[name] = Path(file)
    return found


def _screen(json: str | None, *files: Path) -> Screen:
    """The screen, once every file that the command will write is known to be writable."""
    for file in files:
        output.check_writable(file)
    return Screen(json)
