"""Channel removal on every topology, and what it gains.

    python -m benchmarks.structure masked            30 % of every group: cut against masked
    python -m benchmarks.structure dead              trained detector: what is dead in it, and time
    python -m benchmarks.structure half              half of all units, as the command cuts them
    python -m benchmarks.structure even              half of every group, nothing measured
    python -m benchmarks.structure table             print the file

`--only NAME ...` takes some, `--root FOLDER` is where unpacked wheels lie, `--exact N` runs that
many draws of `masked` in float64 too, in place of all. Rows are merged into
the file by command and model; the published file is `results/structure.json`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from benchmarks import engines, real_models, results, timing, zoo
from benchmarks.removal import DRAWS, Masked, cut_against_mask, feeds
from benchmarks.zoo import decoder, light, swin, tagger, unet, yolox
from sparsegraph import pipeline
from sparsegraph.capture import load
from sparsegraph.shrink import n_macs, n_parameters, shrink
from sparsegraph.structure.ties import Policy
from sparsegraph.verify import Session, feeds_for

FILE = Path(__file__).parent / "results" / "structure.json"
DEAD = "ppocr_v6_det"
HALF = ("resnet50", "mobilenet_v2", "minilm")
EVEN = ("mobilenet_v2",)
PLAN = timing.Plan(rounds=7, block_ms=250.0)
Make = Callable[[], onnx.ModelProto]

TOPOLOGIES: Mapping[str, Make] = {
    **{
        name: partial(zoo.build, name)
        for name in (
            "resnet18", "resnet50", "mobilenet_v1", "mobilenet_v2", "efficientnet_lite0",
            "yolov8n", "minilm", "deit_tiny",
        )
    },
    **{name: partial(light.light, name) for name in light.NAMES},
    "yolox_tiny": yolox.yolox,
    "swin_tiny": swin.swin_tiny,
    "unet": unet.unet,
    "decoder_gqa": decoder.decoder,
    "decoder_gqa_tied": partial(decoder.decoder, tied=True),
    "lstm_tagger": tagger.tagger,
}  # fmt: skip

_PLAIN = frozenset(TOPOLOGIES) - frozenset(light.NAMES)


@dataclass(frozen=True)
class Faster:
    """One engine on a model before and after, interleaved in one process."""

    model: str
    engine: str
    n_removed: int
    parameters: int
    parameters_left: int
    macs: int
    macs_left: int
    file_bytes: int
    file_bytes_left: int
    ms: float
    ms_left: float
    error: float
    """Change of the outputs; for a lossy cut: distance from the masked model."""
    multiple: int = 1
    """Channel counts were rounded up to multiples of this, as measured."""
    commit: str = ""

    @property
    def of_macs(self) -> float:
        """Speed-up over the ratio of operations: one is all that can be expected."""
        return (self.ms / self.ms_left) / (self.macs / self.macs_left)


Row = Masked | Faster
_KINDS: Mapping[str, type[Row]] = {
    "masked": Masked, "dead": Faster, "half": Faster, "even": Faster,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Measure or print; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m benchmarks.structure")
    parser.add_argument("what", choices=[*_KINDS, "table"])
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--root", type=Path, help="where unpacked wheels lie")
    parser.add_argument("--exact", type=int, default=DRAWS, metavar="N")
    parser.add_argument("--json", type=Path, default=FILE)
    options = parser.parse_args(arguments)
    if options.what == "table":
        print(table(read(options.json)))
        return 0
    measure = _MEASURES[options.what]
    if options.what == "masked":
        measure = partial(masked, n_exact=options.exact)
    for row in measure(options.only, options.root):
        print(line(row), flush=True)
        save(options.json, options.what, row, arguments)
    return 0


def masked(only: Sequence[str], root: Path | None, n_exact: int = DRAWS) -> Iterator[Masked]:
    """Every topology under every policy that applies to it."""
    makers = dict(TOPOLOGIES)
    for name in real_models.available(root):
        makers[name] = partial(real_models.load, name, root)
    for name, make in makers.items():
        if only and name not in only:
            continue
        model = load(make())
        if name not in _PLAIN:  # shapes computed in the graph, weights behind Reshape
            model = pipeline.optimize(model, verify=False, stop_after="remove_identity").model
        for policy in (Policy(), Policy(grouped="within"))[: 2 if name == "shufflenet" else 1]:
            yield cut_against_mask(name, model, policy, n_exact)


def dead(only: Sequence[str], root: Path | None) -> Iterator[Faster]:
    """The trained detector as it ships against itself without what is dead."""
    model = load(real_models.load(DEAD, root))
    before = pipeline.optimize(model, skip=["remove_dead_channels"])
    after = pipeline.optimize(model)
    (record,) = [r for r in after.records if r.name == "remove_dead_channels"]
    error = max(
        float(np.abs(a[k] - b[k]).max())
        for feed in (*feeds_for(model), *feeds(DEAD, model)[1:])
        for a, b in [(Session(after.model).run(feed), Session(before.model).run(feed))]
        for k in b
    )
    yield from compared(DEAD, before.model, after.model, record.n_applied, error)


def half(only: Sequence[str], root: Path | None) -> Iterator[Faster]:
    """Half of all units of a model, by weight norm, where that is fastest."""
    for name in only or HALF:
        yield from halved(name, balance=True)


def even(only: Sequence[str], root: Path | None) -> Iterator[Faster]:
    """Half of every group."""
    for name in only or EVEN:
        yield from halved(name, balance=False)


def halved(name: str, balance: bool) -> Iterator[Faster]:
    """Before and after, in every engine."""
    done = shrink(load(zoo.build(name)), 0.5, balance=balance)
    if done.searched is not None:
        print(f"{name}: {done.searched}", file=sys.stderr)
    base = pipeline.optimize(load(zoo.build(name))).model
    n = sum(row.n_before - row.n_after for row in done.table)
    title = name if balance else f"{name} evenly"
    for row in compared(title, base, done.model, n, float(done.error or 0.0)):
        yield replace(row, multiple=done.multiple)


def compared(
    name: str, before: ir.Model, after: ir.Model, n_removed: int, error: float
) -> Iterator[Faster]:
    """Both models in every engine, one thread, in turn."""
    sizes = n_parameters(before), n_parameters(after), n_macs(before), n_macs(after)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{which}.onnx" for which in ("before", "after")]
        for file, model in zip(files, (before, after)):
            onnx.save(ir.to_proto(model), file)
        n_bytes = [file.stat().st_size for file in files]
        feed = feeds_for(before, 2)[1]
        for engine in ("ort", "sparsegraph"):
            ready = [engines.prepare(engine, file, feed, 1) for file in files]
            with timing.pinned(1):
                times = timing.interleave(dict(zip("ba", [one.call for one in ready])), PLAN)
            ms = times["b"].median_ms, times["a"].median_ms
            yield Faster(name, engine, n_removed, *sizes, n_bytes[0], n_bytes[1], *ms, error)


def read(path: Path) -> list[Row]:
    """The rows of a file."""
    held = json.loads(path.read_text())["rows"]
    return [_KINDS[kind](**fields) for kind, rows in held.items() for fields in rows]


def save(path: Path, kind: str, row: Row, arguments: Sequence[str]) -> None:
    """Merge a row into the file; one of the same model, policy and engine is replaced.

    Every row names the commit that it was measured at.
    """
    held = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    head = asdict(results.begin(["benchmarks.structure", *arguments]))
    fields = asdict(replace(row, commit=head["commit"]))
    key = [k for k in ("model", "policy", "engine") if k in fields]
    rows = [one for one in held["rows"].get(kind, []) if any(one[k] != fields[k] for k in key)]
    kept = {name: head[name] for name in ("created", "machine", "versions")}
    content = {**kept, "rows": {**held["rows"], kind: [*rows, fields]}}
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)


def table(rows: Sequence[Row]) -> str:
    """All rows, those of one kind under their head."""
    lines: list[str] = []
    for kind, head in ((Masked, MASKED_HEAD), (Faster, FASTER_HEAD)):
        own = [line(row) for row in rows if isinstance(row, kind)]
        lines += [head, *own, ""] if own else []
    return "\n".join(lines).rstrip()


_MEASURES: Mapping[str, Callable[[Sequence[str], Path | None], Iterator[Row]]] = {
    "masked": masked,
    "dead": dead,
    "half": half,
    "even": even,
}

MASKED_HEAD = (
    f"{'cut - masked, all draws':>107}{'float32 - float64':>20}{'cut - masked':>14}\n"
    "model              policy  groups  units  removed  analysis  parameters left    first draw"
    "  float32  float64  in   masked      cut   above 1e-5: in order"
)
FASTER_HEAD = (
    "model                 engine       removed  parameters left     file MB        MACs left"
    "           ms   faster  of MACs    error  of"
)


def line(row: Row) -> str:
    """One row of the table."""
    left = f"{row.parameters_left / row.parameters:.1%}"
    if isinstance(row, Masked):
        cut_rounding = "-" if row.rounding_left is None else f"{row.rounding_left:.0e}"
        return (
            f"{row.model:18} {row.policy:6} {row.n_groups:7} {row.n_units:6} {row.n_removed:8} "
            f"{row.analysis_s:7.2f} s {row.parameters:11,} {left:>6} {row.first:10.0e} "
            f"{row.error:8.0e} {row.exact:8.0e} ({row.n_exact:2}) "
            f"{row.rounding:8.0e} {cut_rounding:>8} {row.n_above:6} of {row.n_draws}: "
            f"{row.ordered:.0e}"
        )
    files = f"{row.file_bytes / 1e6:.1f} -> {row.file_bytes_left / 1e6:.1f}"
    return (
        f"{row.model:21} {row.engine:12} {row.n_removed:7} {row.parameters:12,} {left:>6} "
        f"{files:>13} {row.macs / 1e6:9,.0f} M {row.macs_left / row.macs:6.1%} "
        f"{row.ms:6.1f} -> {row.ms_left:5.1f} {row.ms / row.ms_left:6.2f} {row.of_macs:8.2f} "
        f"{row.error:8.0e} {row.multiple:3}"
    )


if __name__ == "__main__":
    sys.exit(main())
