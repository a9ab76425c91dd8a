"""The command line: one command per verb of the Python API, one table each, JSON beside it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsegraph import cli_delta, options, output
from sparsegraph.command import (
    Artefact,
    Check,
    Commands,
    Devices,
    Dim,
    Html,
    Inputs,
    Json,
    Model,
    Shape,
    Skip,
    TargetName,
    TargetNames,
    Threads,
    Tuning,
)
from sparsegraph.console import Screen
from sparsegraph.errors import UnsupportedError

if TYPE_CHECKING:
    from sparsegraph.runtime import InferenceSession

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Compile sparse neural networks ahead of time. Exit codes: 0 ok, 2 usage, "
    "3 unsupported, 4 verification failed, 5 budget unreachable.",
)
app.add_typer(cli_delta.app, name="delta")


@app.command()
def inspect(
    model: Model,
    shape: Shape = None,
    dim: Dim = None,
    target: TargetName = "native",
    impose: Annotated[
        float | None, typer.Option(help="What-if: this share of zeros in every prunable layer.")
    ] = None,
    tuning: Tuning = None,
    json: Json = None,
    html: Html = None,
) -> None:
    """Tell zeros, patterns and masks per layer; which layers would win, and why others do not.

    Of a compiled model: what its inner loops are made of, and cycles that llvm-mca estimates.
    """
    from sparsegraph.capture import load
    from sparsegraph.inspect import inspect as look

    screen = _screen(json, html)
    if model.is_dir():
        _inspect_artefact(screen, model)
        return
    captured = load(model, options.shapes(shape or (), dim or ()))
    found = look(captured, target, impose=impose, tuning=tuning)
    columns, rows = found.table()
    screen.table(f"Layers of {model.name} on {found.target}", columns, rows)
    if found.masks:
        masks = [[m.node, m.value, m.kind, m.detail] for m in found.masks]
        screen.table("Masks and gates", ["node", "value", "kind", "detail"], masks)
    screen.say(found.summary())
    screen.json(found.to_json())
    if html is not None:
        from sparsegraph import report

        _wrote(screen, html, report.of_inspection(found, model.name))


@app.command()
def prune(
    model: Model,
    recipe: Annotated[
        str, typer.Option(help="As wanda:0.6, sparsegpt:2:4, masks; wanda in a budget.")
    ],
    to: Annotated[Path, typer.Option("--output", "-o", help="The pruned ONNX file.")],
    calibration: Annotated[
        Path | None,
        typer.Option(help=".npz or .safetensors with an array \\[samples, ...] per input."),
    ] = None,
    masks: Annotated[
        Path | None, typer.Option(help="For the recipe masks: .npz, .safetensors or .onnx.")
    ] = None,
    latency: Annotated[
        str | None, typer.Option(help="At most this time: 5ms, or 0.5x of dense; timed if it can.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="At most these weights: 4MB or 0.5x.")] = None,
    flops: Annotated[str | None, typer.Option(help="At most this work: 2G or 0.5x.")] = None,
    max_drop: Annotated[
        str | None, typer.Option(help="At most this change of the outputs: 0.01 of their variance.")
    ] = None,
    target: TargetName = "native",
    html: Annotated[Path | None, typer.Option(help="Also write a report.")] = None,
    shape: Shape = None,
    dim: Dim = None,
    json: Json = None,
) -> None:
    """Set weights to zero without training, guided by a few real inputs."""
    from dataclasses import asdict

    from sparsegraph import graph
    from sparsegraph.budget.within import prune_within
    from sparsegraph.capture import load
    from sparsegraph.masks import read_masks
    from sparsegraph.prune import prune as run
    from sparsegraph.report import of_pruning, pruned_layers

    screen = _screen(json, to, html)
    given = {"latency": latency, "size": size, "flops": flops, "max-drop": max_drop}
    limits = {kind: text for kind, text in given.items() if text is not None}
    captured = load(model, options.shapes(shape or (), dim or ()))
    inputs = {str(v.name): graph.static_shape(v) or () for v in captured.graph.inputs}
    feeds = None if calibration is None else options.read_calibration(calibration, inputs)
    found = None
    with screen.progress() as report:
        if limits:
            found = prune_within(
                captured, recipe, feeds or (), limits, target=target, progress=report
            )
            pruned = found.pruned
        else:
            pruned = run(
                captured,
                recipe,
                feeds,
                masks=None if masks is None else read_masks(masks),
                progress=lambda done, n, _: report("prune", done, n),
            )
    output.write_model(to, pruned.model)
    columns, rows = pruned_layers(pruned, found)
    footer = f"{1 - pruned.density:.1%} of the pruned layers' weights are zero; wrote {to}"
    within = "".join(f" within {kind} {text}" for kind, text in limits.items())
    screen.table(f"Pruned with {recipe}{within}", columns, rows, footer)
    if found is not None:
        screen.table(f"Trade-off; chosen: {found.summary()}", *found.table())
    layers = [dict(zip(columns, row)) for row in rows]
    plan = None if found is None else asdict(found.plan)
    screen.json({"recipe": recipe, "density": pruned.density, "plan": plan, "layers": layers})
    if html is not None:
        _wrote(screen, html, of_pruning(pruned, recipe, model.name, found))


@app.command()
def shrink(
    model: Model,
    to: Annotated[Path, typer.Option("--output", "-o", help="The smaller ONNX file.")],
    keep: Annotated[
        list[str] | None,
        typer.Option(help="A share of every group, or group=share; half of all by default."),
    ] = None,
    by: Annotated[str, typer.Option(help="norm, scale, activation or prefix.")] = "norm",
    calibration: Annotated[
        Path | None, typer.Option(help="An .npz with an array \\[samples, ...] per input.")
    ] = None,
    multiple: Annotated[
        str,
        typer.Option(help="Round channel counts up to multiples of this many, or 'measured'."),
    ] = "1",
    within_groups: Annotated[
        bool, typer.Option(help="Cut the same index in all groups of grouped convolutions.")
    ] = False,
    through_norm: Annotated[
        bool, typer.Option(help="Also cut features under a layer norm; moves its statistics.")
    ] = False,
    carry_mean: Annotated[
        bool,
        typer.Option(help="Cut those too, exactly: plain operators count removed ones as zeros."),
    ] = False,
    inputs: Annotated[
        float | None,
        typer.Option(help="Share of input channels that each operator keeps for itself."),
    ] = None,
    balance: Annotated[
        bool | None,
        typer.Option(
            help="Cut elsewhere at equal operations, if measured to be 5 % faster: at counts that "
            "ONNX Runtime likes, more of residual streams stay. The default for one share of all."
        ),
    ] = None,
    groups: Annotated[bool, typer.Option(help="Print every group line by line.")] = False,
    shape: Shape = None,
    dim: Dim = None,
    json: Json = None,
) -> None:
    """Remove channels, heads and hidden units: a smaller model of the same operators."""
    from dataclasses import asdict

    from sparsegraph import graph
    from sparsegraph.capture import load
    from sparsegraph.shrink import shrink as run

    screen = _screen(json, to)
    captured = load(model, options.shapes(shape or (), dim or ()))
    sizes = {str(v.name): graph.static_shape(v) or () for v in captured.graph.inputs}
    feeds = () if calibration is None else options.read_calibration(calibration, sizes)
    share = options.keep(keep or ())
    done = run(
        captured, share, by, calibration=feeds,
        multiple=options.multiple(multiple),
        grouped="within" if within_groups else "whole", through_norm=through_norm,
        carry_mean=carry_mean, inputs=inputs,
        balance=isinstance(share, float) if balance is None else balance,
    )  # fmt: skip
    output.write_model(to, done.model)
    if groups:
        screen.say("\n\n".join(map(str, done.groups)))
    columns = ["group", "units", "kept", "operators", "picture"]
    rows = [[r.group, r.n_before, r.n_after, r.n_operators, r.picture] for r in done.table]
    screen.table(f"Groups of {model.name}, cut by {by}", columns, rows, done.summary())
    screen.say(f"wrote {to}")
    screen.json({**done.facts(), "groups": [asdict(r) for r in done.table]})


@app.command()
def family(
    model: Model,
    to: Annotated[Path, typer.Option("--output", "-o", help="A folder for the models.")],
    member: Annotated[
        list[str],
        typer.Option(
            help="NAME=SHARE of every group, or NAME=MASK.json, "
            'which holds {"group": share or \\[units that stay]}; once per model.'
        ),
    ],
    by: Annotated[
        str, typer.Option(help="prefix (the first units stay), norm, scale or activation.")
    ] = "prefix",
    calibration: Annotated[
        Path | None, typer.Option(help="An .npz with an array \\[samples, ...] per input.")
    ] = None,
    groups: Annotated[
        bool, typer.Option(help="Print every group, with the names that a mask uses.")
    ] = False,
    shape: Shape = None,
    dim: Dim = None,
    json: Json = None,
) -> None:
    """Write several sub-networks, by width or by mask, over one file of weights."""
    from sparsegraph import graph
    from sparsegraph.capture import load
    from sparsegraph.family import WEIGHTS, read_keeps
    from sparsegraph.family import family as run
    from sparsegraph.shrink import prepare
    from sparsegraph.structure.ties import Policy

    screen = _screen(json)
    keeps = read_keeps(member)
    captured = load(model, options.shapes(shape or (), dim or ()))
    sizes = {str(v.name): graph.static_shape(v) or () for v in captured.graph.inputs}
    feeds = () if calibration is None else options.read_calibration(calibration, sizes)
    if groups:
        screen.say("\n\n".join(map(str, prepare(captured, Policy(), by, feeds).found)))
    members = run(captured, keeps, to, by, calibration=feeds)
    columns = ["model", "parameters", "million multiply-accumulates", "from the masked model"]
    rows = [[m.file.name, m.parameters, m.macs / 1e6, m.error] for m in members]
    size = (to / WEIGHTS).stat().st_size / 1e6
    screen.table(f"Members of {model.name}, ranked by {by}", columns, rows)
    screen.say(f"wrote {to}: {len(members)} models over {WEIGHTS}, {size:.1f} MB")
    facts = [
        {"name": m.name, "file": m.file.name, "parameters": m.parameters, "macs": m.macs,
         "error_against_masked": m.error}
        for m in members
    ]  # fmt: skip
    screen.json({"weights": WEIGHTS, "members": facts})


@app.command()
def optimize(
    model: Model,
    to: Annotated[Path, typer.Option("--output", "-o", help="The smaller ONNX file.")],
    shape: Shape = None,
    dim: Dim = None,
    skip: Skip = None,
    stop_after: Annotated[str | None, typer.Option(help="The last pass to run.")] = None,
    fuel: Annotated[int | None, typer.Option(min=0, help="Rewrites allowed in all.")] = None,
    dump: Annotated[Path | None, typer.Option(help="Keep every stage in this folder.")] = None,
    snap: Annotated[
        float | None,
        typer.Option(help="Set weights up to this magnitude to zero; the change is reported."),
    ] = None,
    check: Check = True,
    json: Json = None,
) -> None:
    """Run the graph passes alone: ONNX in, smaller and faster ONNX out."""
    from dataclasses import asdict

    from sparsegraph import pipeline
    from sparsegraph.capture import load

    screen = _screen(json, to)
    captured = load(model, options.shapes(shape or (), dim or ()))
    records: list[pipeline.PassRecord] = []
    passes = pipeline.PASSES if snap is None else pipeline.snapping(snap)
    with screen.progress() as report:

        def on_pass(record: pipeline.PassRecord) -> None:
            records.append(record)
            report("passes", len(records), len(passes))

        done = pipeline.optimize(
            captured, verify=check, skip=skip or (), stop_after=stop_after, fuel=fuel,
            dump=dump, on_pass=on_pass, passes=passes,
        )  # fmt: skip
    output.write_model(to, done.model)
    screen.table(
        f"Passes on {model.name}",
        ["pass", "applied", "declined", "nodes", "ms", "error", "first reason to decline"],
        [
            [
                r.name,
                r.n_applied,
                len(r.declined),
                f"{r.nodes_before} -> {r.nodes_after}",
                r.ms,
                None if r.max_rel_error is None else f"{r.max_rel_error:.0e}",
                f"{r.declined[0].node}: {r.declined[0].reason}" if r.declined else "",
            ]
            for r in records
            if r.n_applied or r.declined
        ],
        f"{len(captured.graph)} -> {len(done.model.graph)} nodes; wrote {to}",
    )
    screen.json([asdict(r) for r in records])


@app.command(name="compile")
def compile_model(
    model: Model,
    to: Annotated[
        Path | None, typer.Option("--output", "-o", help="The artefact; model.sg by default.")
    ] = None,
    target: TargetNames = None,
    threads: Threads = 1,
    shape: Shape = None,
    dim: Dim = None,
    skip: Skip = None,
    check: Check = True,
    fallback: Annotated[
        bool, typer.Option("--fallback/--no-fallback", help="Let ONNX Runtime run the rest.")
    ] = True,
    keep_native: Annotated[
        bool, typer.Option(help="Never leave the whole model to ONNX Runtime.")
    ] = False,
    small: Annotated[
        bool, typer.Option("--small", help="Weights that take the least memory, not time.")
    ] = False,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune", help="Measure the best ways to compute each layer, here or on --devices."
        ),
    ] = False,
    tuning: Tuning = None,
    devices: Devices = None,
    json: Json = None,
    html: Html = None,
) -> None:
    """Compile a model for a machine and prove it against ONNX Runtime.

    `--dim sequence=32,64,128` makes one artefact that takes each of these shapes.
    `--target A --target B` makes one bundle per target: model.A.sg, model.B.sg.
    `--target A+B` makes one library that picks its code by the CPU: x86-64-v4+x86-64-v3+x86-64-v2.
    """
    from sparsegraph import devices as inventories
    from sparsegraph import explain
    from sparsegraph.compile import compile as run
    from sparsegraph.compile import load
    from sparsegraph.targets import codes

    screen = _screen(json, html)
    paths = options.bundles(to or Path(model.with_suffix(".sg").name), target or ("native",))
    for name, path in paths.items():
        codes(name)
        output.check_folder(path)
    variants = options.variants(shape or (), dim or ())
    measuring = inventories.read(devices) if devices else ()
    manifests = []
    for name, path in paths.items():
        start = time.perf_counter()
        with screen.progress() as report:
            compiled = run(
                model, name, shapes=variants, threads=threads, output=path, check=check,
                fallback=fallback, keep_native=keep_native, small=small, skip=skip or (), tune=tune,
                tuning=tuning, devices=measuring, progress=report,
            )  # fmt: skip
        manifest = compiled.manifest.model_dump(mode="json", by_alias=True)
        manifests.append(manifest)
        screen.table(f"{model.name} for {name}", explain.COLUMNS, explain.layers(manifest))
        screen.say(explain.summary(manifest))
        if compiled.tuned is not None:
            screen.say(f"tuning: {compiled.tuned}")
        screen.say(f"wrote {path} in {time.perf_counter() - start:.1f} s")
    screen.json(manifests[0] if len(manifests) == 1 else manifests)
    if html is not None:
        from sparsegraph import report as page
        from sparsegraph.inspect import inspect as look

        found = look(load(model, shapes=variants[0]), next(iter(paths)), tuning=tuning)
        _wrote(screen, html, page.of_artefact(manifests[0], model.name, found))


@app.command()
def run(
    artefact: Artefact,
    inputs: Inputs = None,
    to: Annotated[Path | None, typer.Option("--output", "-o", help="An .npz of outputs.")] = None,
    task: Annotated[
        str | None, typer.Option(help="Of an artefact by `delta tasks`; the base by default.")
    ] = None,
    threads: Threads = 1,
    json: Json = None,
) -> None:
    """Run a compiled model once."""
    from sparsegraph.runtime import InferenceSession

    screen = _screen(json, to)
    session = InferenceSession(artefact, threads=threads, task=task)
    feed = options.read_feed(inputs) if inputs else _random_feed(session)
    start = time.perf_counter()
    results = session.run(None, feed)
    ms = (time.perf_counter() - start) * 1e3
    names = [o.name for o in session.get_outputs()]
    if to is not None:
        output.write_arrays(to, dict(zip(names, results)))
    columns = ["output", "type", "shape", "min", "mean", "max"]
    rows = [
        [name, str(a.dtype), "x".join(map(str, a.shape)), *_extent(a)]
        for name, a in zip(names, results)
    ]
    screen.table(f"Outputs of {artefact.name}", columns, rows, f"one run: {ms:.2f} ms")
    screen.json({"ms": ms, "outputs": [dict(zip(columns, row)) for row in rows]})


@app.command()
def bench(
    path: Annotated[Path, typer.Argument(help="A compiled model or an ONNX file.")],
    model: Annotated[
        Path | None, typer.Option(help="What the artefact was compiled from; model.onnx beside it.")
    ] = None,
    inputs: Inputs = None,
    threads: Threads = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Blocks of each engine.")] = 7,
    shape: Shape = None,
    dim: Dim = None,
    devices: Devices = None,
    json: Json = None,
    html: Html = None,
) -> None:
    """Time a compiled model against ONNX Runtime dense, in alternating blocks of one process.

    With --devices: the compiled model alone, on every device of the inventory; those with the same
    ssh host take turns.
    """
    from sparsegraph.bench import bench as measure
    from sparsegraph.bench import prepare

    screen = _screen(json, html)
    if devices is not None:
        _bench_devices(screen, path, devices)
        return
    feed = options.read_feed(inputs) if inputs else None
    with screen.progress() as report:
        given = options.shapes(shape or (), dim or ())
        session, captured = prepare(path, model, given, threads=threads, progress=report)
        result = measure(session, captured, feed, threads=threads, rounds=rounds, progress=report)
    rows = [
        [", ".join(r.nodes) or "-", r.kernel, r.detail, r.ours_ms, r.dense_ms]
        for r in sorted(result.layers, key=lambda r: -r.ours_ms)
    ]
    columns = ["nodes", "kernel", "detail", "ms", "ONNX Runtime ms"]
    screen.table(f"Kernels of {path.name}, slowest first", columns, rows)
    screen.say(str(result))
    screen.json(result.to_json())
    if html is not None:
        from sparsegraph import report as page
        from sparsegraph.inspect import inspect as look

        text = page.of_artefact(session.manifest, path.name, look(captured), result)
        _wrote(screen, html, text)


@app.command(name="targets")
def list_targets(json: Json = None) -> None:
    """List the machines that we compile for, and say what this one is."""
    from sparsegraph import machine

    screen = Screen(json)
    rows = machine.targets()
    screen.table(
        "Targets",
        ["name", "lanes", "registers", "L1 KiB", "L2 KiB", "linker", "here", "Debian packages"],
        [
            [
                r.name, r.lanes, r.n_registers, r.l1_bytes >> 10, r.l2_bytes >> 10,
                r.linker or "none installed",
                "native" if r.is_native else "runs" if r.runs_here else r.emulator or "no",
                ", ".join(r.packages),
            ]
            for r in rows
        ],
        machine.describe(),
    )  # fmt: skip
    screen.json({"machine": machine.facts(), "targets": [vars(r) for r in rows]})


@app.command()
def demo(
    recipe: Annotated[str, typer.Option(help="How to prune.")] = "",
    threads: Threads = 1,
    html: Annotated[Path, typer.Option(help="The report.")] = Path("sparsegraph-demo.html"),
    to: Annotated[Path, typer.Option("--output", "-o")] = Path("minilm.sg"),
    pairs: Annotated[int, typer.Option(min=20, help="Query and document pairs to score.")] = 200,
    json: Json = None,
) -> None:
    """Prune, compile, prove and time a real sentence encoder on this machine."""
    from sparsegraph import demo as job

    screen = _screen(json, html)
    output.check_folder(to)
    with screen.progress() as report:
        result = job.run(
            recipe=recipe or job.RECIPE, threads=threads, pairs=pairs, output=to, progress=report
        )
    columns, rows = result.table()
    screen.table("MiniLM-L6 sentence encoder, 128 tokens, real weights", columns, rows)
    screen.say(result.summary())
    screen.json(result.to_json())
    _wrote(screen, html, result.html())


def main() -> None:
    """The `sparsegraph` command."""
    app(prog_name="sparsegraph")


def _inspect_artefact(screen: Screen, path: Path) -> None:
    """Static estimates, labelled as such."""
    from sparsegraph import loading, throughput

    found = throughput.of_manifest(loading.read_manifest(path))
    columns, rows = found.table()
    screen.table(f"Inner loops of {path.name} for {found.target}", columns, rows)
    screen.say(found.summary())
    screen.json(found.to_json())


def _bench_devices(screen: Screen, path: Path, inventory: Path) -> None:
    """One row per device; a failure ends with exit code 3 after the others are written."""
    from sparsegraph import device_bench
    from sparsegraph import devices as inventories

    with screen.progress() as report:
        found = device_bench.bench(path, inventories.read(inventory), report)
    screen.table(f"{path.name} on devices", *found.table())
    screen.json(found.to_json())
    if found.errors:
        raise UnsupportedError("; ".join(found.errors))


def _screen(json: str | None, *files: Path | None) -> Screen:
    """The screen, once every file that the command will write is known to be writable."""
    for file in files:
        if file is not None:
            output.check_writable(file)
    return Screen(json)


def _wrote(screen: Screen, path: Path, text: str) -> None:
    output.write_text(path, text)
    screen.say(f"report: {path}")


def _random_feed(session: InferenceSession) -> options.Feeds:
    """Standard normal floats; integers and booleans are ones, which every table and mask takes."""
    import numpy as np

    rng = np.random.default_rng(0)
    feed: options.Feeds = {}
    for border in session.manifest["inputs"]:
        shape, dtype = border["shape"], np.dtype(border["dtype"])
        is_float = dtype.kind == "f"
        values = rng.standard_normal(shape) if is_float else np.ones(shape)
        feed[border["name"]] = values.astype(dtype)
    return feed


def _extent(array: Any) -> Sequence[object]:
    if array.dtype.kind not in "fiub" or array.size == 0:
        return [None, None, None]
    return [float(array.min()), float(array.mean()), float(array.max())]
