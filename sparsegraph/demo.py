"""The default job: a real sentence encoder, pruned, compiled for this machine, proven and timed.

Every figure is measured by the run that prints it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from sparsegraph import demo_model, explain
from sparsegraph.bench import Bench, bench
from sparsegraph.demo_model import Quality
from sparsegraph.inspect import Inspection, inspect
from sparsegraph.progress import Progress, silent

RECIPE = "admm:0.6"  # the method that costs the demo's ranking least at this many zeros
N_CALIBRATION = 96


@dataclass(frozen=True)
class DemoResult:
    """What one run of the demo measured.

    `dense` and `pruned` are the quality of the dense model in ONNX Runtime and of the artefact;
    `seconds` is by stage; `weight_bytes` is of the artefact, `dense_weight_bytes` of the model.
    """

    recipe: str
    n_pairs: int
    density: float
    dense: Quality
    pruned: Quality
    timed: Bench
    manifest: Mapping[str, Any]
    inspection: Inspection
    weight_bytes: int
    dense_weight_bytes: int
    path: str
    seconds: Mapping[str, float]

    @property
    def standard_error(self) -> float:
        """Of the share of right answers, from the number of queries."""
        share = self.dense.recall_at_1
        return math.sqrt(share * (1 - share) / self.n_pairs)

    def table(self) -> tuple[list[str], list[list[object]]]:
        """(columns, rows): before, after, change."""
        a, b, timed = self.dense, self.pruned, self.timed
        size = self.dense_weight_bytes / self.weight_bytes
        rows: list[list[object]] = [
            ["median ms per sentence", timed.dense_ms, timed.ours_ms, f"{timed.ratio:.2f}x faster"],
            ["weights, MB", self.dense_weight_bytes / 1e6, self.weight_bytes / 1e6,
             f"{size:.2f}x smaller"],
            ["zeros in linear layers", "0 %", f"{1 - self.density:.1%}", self.recipe],
            ["right answer first", f"{a.recall_at_1:.1%}", f"{b.recall_at_1:.1%}",
             f"{b.recall_at_1 - a.recall_at_1:+.1%}"],
            ["mean reciprocal rank", f"{a.mrr:.3f}", f"{b.mrr:.3f}", f"{b.mrr - a.mrr:+.3f}"],
            ["rank correlation with dense", "1", f"{b.rho:.3f}", ""],
        ]  # fmt: skip
        columns = ["", "ONNX Runtime, dense", "sparsegraph, sparse", "change"]
        return columns, rows

    def summary(self) -> str:
        """The lines under the table."""
        stages = ", ".join(f"{name} {s:.0f} s" for name, s in self.seconds.items())
        return "\n".join(
            [
                f"Quality: {self.n_pairs} queries against {self.n_pairs} documents from this "
                "Python's own docstrings, none of them used for pruning; the standard error of "
                f"one share is {self.standard_error:.1%}.",
                f"Proof: {explain.proof(self.manifest)}.",
                f"Time: {stages}.",
                f"artefact: {self.path}",
            ]
        )

    def to_json(self) -> dict[str, Any]:
        """Everything above as plain data."""
        kept = {k: v for k, v in vars(self).items() if k not in ("manifest", "inspection", "timed")}
        return {
            **kept,
            "dense": asdict(self.dense),
            "pruned": asdict(self.pruned),
            "bench": self.timed.to_json(),
            "verification": self.manifest["verification"],
            "fallback_nodes": [node for node, _ in explain.fallbacks(self.manifest)],
        }

    def html(self) -> str:
        """The report."""
        from sparsegraph import report

        title = "MiniLM-L6 sentence encoder, pruned and compiled"
        page = report.artefact_page(self.manifest, title, self.inspection, self.timed)
        page.lead = self.summary()
        change = self.pruned.recall_at_1 - self.dense.recall_at_1
        page.tiles.insert(1, (f"{self.pruned.recall_at_1:.1%}", f"right first ({change:+.1%})"))
        columns, rows = self.table()
        page.tables.insert(0, report.Table("Before and after", columns, rows))
        return report.render(page)


def run(
    *,
    recipe: str = RECIPE,
    threads: int = 1,
    pairs: int = 200,
    calibration: int = N_CALIBRATION,
    output: str | Path = "minilm.sg",
    progress: Progress | None = None,
) -> DemoResult:
    """Run the whole job.

    Raises:
        CaptureError: the model's package is not installed; the message has the command.
        UsageError: a malformed recipe, or an output that cannot be written.
        VerifyError: the artefact's outputs differ from ONNX Runtime's.
    """
    from sparsegraph.compile import compile as build
    from sparsegraph.prune import prune

    report = progress or silent
    watch = _Watch()
    job = demo_model.load(n_pairs=pairs, n_calibration=calibration)
    watch.lap("load")
    report("dense quality", 0, 1)
    dense = job.dense()
    watch.lap("dense quality")
    pruned = prune(
        job.model, recipe, job.calibration, progress=lambda i, n, _: report("prune", i, n)
    )
    watch.lap("prune")
    compiled = build(pruned.model, threads=threads, output=output, progress=report)
    watch.lap("compile and prove")
    session = compiled.session
    assert session is not None
    sparse = job.evaluate(
        lambda feed: np.asarray(session.run(None, feed)[0]),
        lambda done, total: report("sparse quality", done, total),
    )
    watch.lap("sparse quality")
    timed = bench(session, pruned.model, job.queries[0], threads=threads, progress=report)
    watch.lap("benchmark")
    return DemoResult(
        recipe=recipe,
        n_pairs=pairs,
        density=pruned.density,
        dense=dense,
        pruned=sparse,
        timed=timed,
        manifest=session.manifest,
        inspection=inspect(pruned.model),
        weight_bytes=compiled.weight_bytes,
        dense_weight_bytes=_weight_bytes(job.model),
        path=str(compiled.path),
        seconds=watch.seconds,
    )


class _Watch:
    """Seconds between laps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now


def _weight_bytes(model: ir.Model) -> int:
    tensors = [value.const_value for value in model.graph.initializers.values()]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
