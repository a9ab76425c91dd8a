"""The HTML report: one self-contained file with tables and inline pictures, no script, no link."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsegraph import explain, machine, picture

if TYPE_CHECKING:
    from sparsegraph.bench import Bench, LayerTime
    from sparsegraph.budget.within import Within
    from sparsegraph.inspect import Inspection, LayerRow
    from sparsegraph.prune import Pruned

_TEMPLATE = "report.html"


@dataclass
class Table:
    """A titled table; None prints as a dash. `note` stands below it."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    note: str = ""


@dataclass
class Page:
    """What one report holds, top to bottom.

    Attributes:
        title: the headline; `lead` is the sentence under it.
        tiles: (value, meaning) of the few figures that matter most.
        charts: (title, SVG).
        pictures: (layer, SVG, caption).
    """

    title: str
    lead: str
    tiles: list[tuple[str, str]] = field(default_factory=list)
    charts: list[tuple[str, str]] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    pictures: list[tuple[str, str, str]] = field(default_factory=list)


def render(page: Page) -> str:
    """The page as HTML, with machine, versions and command at the end."""
    from jinja2 import Environment, FileSystemLoader

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["cell"] = _cell
    environment.tests["numeric"] = lambda value: isinstance(value, int | float)
    facts = machine.facts()
    tools = ", ".join(f"{name} {version}" for name, version in dict(facts.pop("tools")).items())  # type: ignore[call-overload]
    return environment.get_template(_TEMPLATE).render(
        page=page, machine=facts, tools=tools, command=command()
    )


def command() -> str:
    """The command that is running, without the folders of this machine."""
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])


def of_inspection(found: Inspection, title: str) -> str:
    """The report of `inspect`."""
    page = Page(title, found.summary())
    share = found.n_zero / max(found.n_weights, 1)
    page.tiles = [
        (f"{share:.0%}", "of the weights are zero"),
        (f"{found.n_faster} of {len(found.layers)}", "layers get faster"),
        (f"{found.speedup:.2f}×", f"all layers, estimated on {found.target}"),
    ]
    if found.what_if_speedup is not None:
        page.tiles.append((f"{found.what_if_speedup:.2f}×", f"with {found.imposed:.0%} zeros"))
    page.tables = [_inspected(found)]
    if found.masks:
        rows = [[m.node, m.value, m.kind, m.detail] for m in found.masks]
        page.tables.append(Table("Masks and gates", ["node", "value", "kind", "detail"], rows))
    page.pictures = pictures(found.layers)
    return render(page)


def of_pruning(pruned: Pruned, recipe: str, title: str, within: Within | None = None) -> str:
    """The report of `prune`: what every layer lost, and the trade-off around a budget."""
    page = Page(title, f"Pruned with {recipe}")
    page.tiles = [(f"{1 - pruned.density:.0%}", "of the pruned layers' weights are zero")]
    columns, rows = pruned_layers(pruned, within)
    if within is not None:
        page.tiles.append((f"{within.plan.ms:.3g} ms", within.summary()))
        chosen = within.plan
        for name, at in (("milliseconds", "ms"), ("density", "density")):
            points = [(getattr(p, at), p.loss) for p in within.trade_off]
            labels = (name, "predicted loss")
            svg = picture.curve(points, (getattr(chosen, at), chosen.loss), labels)
            page.charts.append((f"Loss against {name}", svg))
        page.tables.append(Table("Trade-off", *within.table()))
    page.tables.append(Table("Layers", columns, rows))
    return render(page)


def pruned_layers(
    pruned: Pruned, within: Within | None = None
) -> tuple[list[str], list[list[object]]]:
    """(columns, rows) of all layers; with their milliseconds where there was a budget."""
    columns = ["layer", "weight", "zeros", "method", "output error", "note"]
    rows: list[list[object]] = [
        [r.node, _shape(r.shape), str(r.pattern), r.method, r.output_error, r.note]
        for r in pruned.table
    ]
    rows += [[name, None, "", "left alone", None, why] for name, why in pruned.skipped]
    if within is not None:
        ms = within.layer_ms()
        columns, rows = [*columns, "ms"], [[*row, ms.get(str(row[0]))] for row in rows]
    return columns, rows


def of_artefact(
    manifest: Mapping[str, Any],
    title: str,
    found: Inspection | None = None,
    timed: Bench | None = None,
) -> str:
    """The report of `compile` and `bench`: what was decided, what it cost, how it was proven."""
    return render(artefact_page(manifest, title, found, timed))


def artefact_page(
    manifest: Mapping[str, Any],
    title: str,
    found: Inspection | None = None,
    timed: Bench | None = None,
) -> Page:
    """The parts of `of_artefact`, for a caller that adds its own."""
    page = Page(title, explain.summary(manifest))
    page.tiles = [
        (f"{explain.weight_bytes(manifest) / 1e6:.1f} MB", "weights in the artefact"),
        (str(len(explain.fallbacks(manifest))), "nodes in ONNX Runtime"),
        *_proof_tile(manifest),
    ]
    if timed is not None:
        page.tiles.insert(0, (f"{timed.ratio:.2f}×", "ONNX Runtime dense / sparsegraph"))
        bars = [("ONNX Runtime dense", timed.dense_ms), ("sparsegraph", timed.ours_ms)]
        page.charts.append((f"One run, median ms, {timed.threads} thread(s)", picture.bars(bars)))
    page.tables = [_layers(manifest, found, timed)]
    if timed is not None:
        page.charts.append(("Layers, ms", _layer_chart(manifest, timed)))
        page.tables.append(_kernels(timed))
    page.tables += [_fallbacks(manifest), _passes(manifest), _proof(manifest), _target(manifest)]
    if found is not None:
        page.pictures = pictures(found.layers)
    return page


def pictures(rows: Sequence[LayerRow]) -> list[tuple[str, str, str]]:
    """(layer, heat map, caption) of every layer with zeros."""
    return [(row.node, picture.heat_map(row.grid), row.pattern) for row in rows if row.n_zero]


def _inspected(found: Inspection) -> Table:
    edges = sorted({f"{row.break_even:.2f}" for row in found.layers})
    note = f"Break-even density on {found.target}: {', '.join(edges)}"
    return Table("Layers", *found.table(), note)


def _layers(manifest: Mapping[str, Any], found: Inspection | None, timed: Bench | None) -> Table:
    patterns = {row.node: row.pattern for row in found.layers} if found else {}
    calls = _calls(manifest, timed)
    rows = []
    for layer in manifest["layers"]:
        call = calls.get(layer["node"])
        dense = call.dense_ms if call else None
        rows.append(
            [
                layer["node"],
                layer["op"],
                _shape(layer["weight"]),
                layer["density"],
                patterns.get(layer["node"]),
                layer["format"],
                call.kernel if call else _kernel(manifest, layer["node"]),
                layer["ms"],
                call.ours_ms if call else None,
                dense,
                explain.why_dense(layer),
            ]
        )
    columns = ["layer", "op", "weight", "density", "pattern", "format", "kernel"]
    columns += ["predicted ms", "measured ms", "dense ms", "why not sparse"]
    note = (
        "Dense is ONNX Runtime's time for the same nodes. Predicted is the product alone, in warm "
        "caches; measured is in the model, with all that is fused into the kernel."
    )
    return Table("Layers", columns, rows, note if timed else "")


def _calls(manifest: Mapping[str, Any], timed: Bench | None) -> dict[str, LayerTime]:
    """The timed calls of each layer of the plan, as the last of them, which names most nodes."""
    wanted = {layer["node"] for layer in manifest["layers"]}
    calls: dict[str, LayerTime] = {}
    for row in timed.layers if timed is not None else ():
        for node in wanted & set(row.nodes):
            before = calls[node].ours_ms if node in calls else 0.0
            calls[node] = replace(row, ours_ms=before + row.ours_ms)
    return calls


def _kernel(manifest: Mapping[str, Any], node: str) -> str | None:
    steps = [step for s in manifest["segments"] if s["kind"] == "native" for step in s["steps"]]
    return next((step["kernel"] for step in steps if node in step["nodes"]), None)


def _layer_chart(manifest: Mapping[str, Any], timed: Bench) -> str:
    calls = _calls(manifest, timed)
    return picture.pairs([(node, call.dense_ms, call.ours_ms) for node, call in calls.items()])


def _kernels(timed: Bench) -> Table:
    rows = [
        [", ".join(row.nodes), row.kernel, row.detail, row.ours_ms, row.dense_ms]
        for row in sorted(timed.layers, key=lambda row: -row.ours_ms)
    ]
    columns = ["nodes", "kernel", "detail", "ms", "dense ms"]
    return Table("Kernel calls, slowest first", columns, rows, str(timed))


def _fallbacks(manifest: Mapping[str, Any]) -> Table:
    rows = explain.left(manifest)
    note = "" if rows else "None: every node has a kernel."
    return Table("Nodes that ONNX Runtime runs", ["node", "reason"], rows, note)


def _passes(manifest: Mapping[str, Any]) -> Table:
    rows = [
        [
            record["name"],
            record["n_applied"],
            f"{record['nodes_before']} → {record['nodes_after']}",
            record["max_rel_error"],
            "; ".join(record["declined"]),
        ]
        for record in manifest["passes"]
        if record["n_applied"] or record["declined"]
    ]
    columns = ["pass", "applied", "nodes", "output change", "declined"]
    return Table("Passes", columns, rows)


def _proof(manifest: Mapping[str, Any]) -> Table:
    rows = [[key, value] for key, value in manifest["verification"].items()]
    return Table("Verification", ["", ""], rows, explain.proof(manifest))


def _proof_tile(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    record = manifest["verification"]
    if not record.get("checked"):
        return []
    return [(f"{record['max_rel_error']:.0e}", "largest relative output error")]


def _target(manifest: Mapping[str, Any]) -> Table:
    target = manifest["target"]
    rows = [
        ["target", target["text"]],
        ["triple", target["triple"]],
        ["features", ", ".join(target["features"])],
        ["model SHA-256", manifest["model_sha256"]],
        *([f"built with {name}", version] for name, version in manifest["tools"].items()),
    ]
    return Table("Artefact", ["", ""], rows)


def _shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
