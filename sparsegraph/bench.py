"""A compiled model against ONNX Runtime on the same model, in one process, in alternating blocks.

ONNX Runtime is blind to zeros in weights, so its time for the pruned model is the dense time.
"""

from __future__ import annotations

import json
import re
import statistics
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from sparsegraph.errors import UsageError, message
from sparsegraph.progress import Progress, silent
from sparsegraph.runtime import InferenceSession
from sparsegraph.timing import interleave, pinned

Array = np.ndarray[Any, Any]
Feed = Mapping[str, Array]

_PROFILED_RUNS = 7


@dataclass(frozen=True)
class LayerTime:
    """A kernel's calls for some nodes. `dense_ms` is ONNX Runtime's time for these, None if it has
    none under their names (it fuses too)."""

    nodes: tuple[str, ...]
    kernel: str
    detail: str
    ours_ms: float
    dense_ms: float | None


@dataclass(frozen=True)
class Bench:
    """Medians over interleaved blocks.

    `max_rel_error`: max|a-b| / max|b| of our outputs against ONNX Runtime's on the same feed.
    `slowest_ratio` and `fastest_ratio` are over the rounds; far apart means a busy machine.
    """

    dense_ms: float
    ours_ms: float
    slowest_ratio: float
    fastest_ratio: float
    max_rel_error: float
    threads: int
    n_calls: int
    layers: tuple[LayerTime, ...]

    @property
    def ratio(self) -> float:
        """How many times faster than ONNX Runtime."""
        return self.dense_ms / self.ours_ms

    def to_json(self) -> dict[str, Any]:
        """Everything above as plain data."""
        return {**asdict(self), "ratio": self.ratio}

    def __str__(self) -> str:
        spread = f"{self.slowest_ratio:.2f} to {self.fastest_ratio:.2f} over the rounds"
        return (
            f"ONNX Runtime {self.dense_ms:.2f} ms, sparsegraph {self.ours_ms:.2f} ms: "
            f"{self.ratio:.2f} times as fast ({spread}), "
            f"outputs within {self.max_rel_error:.1e}, {self.threads} threads"
        )


def bench(
    session: InferenceSession,
    model: ir.Model,
    feed: Feed | None = None,
    *,
    threads: int = 1,
    rounds: int = 7,
    block_ms: float = 100.0,
    progress: Progress | None = None,
) -> Bench:
    """Time both on one feed, pinned to `threads` cores.

    Args:
        session: the compiled model; its own number of threads should be `threads`.
        model: what it was compiled from.
        feed: inputs by name; a random one that fits the model by default.

    Raises:
        UsageError: the feed does not fit.
    """
    from sparsegraph import verify

    report = progress or silent
    feed = verify.feeds_for(model, n=2)[1] if feed is None else feed
    names = [o.name for o in session.get_outputs()]
    with pinned(threads):
        dense = verify.Session(model, optimize=True, threads=threads)
        calls = {"dense": lambda: dense.run(feed, names), "ours": lambda: session.run(None, feed)}
        error = verify.compare(dict(zip(names, session.run(None, feed))), dense.run(feed, names))
        blocks = interleave(calls, rounds, block_ms, lambda i: report("benchmark", i, rounds))
        layers = _layer_times(session, model, feed, threads)
    ratios = [
        statistics.median(a) / statistics.median(b) for a, b in zip(blocks["dense"], blocks["ours"])
    ]
    medians = {name: statistics.median(chain(*parts)) for name, parts in blocks.items()}
    return Bench(
        dense_ms=medians["dense"],
        ours_ms=medians["ours"],
        slowest_ratio=min(ratios),
        fastest_ratio=max(ratios),
        max_rel_error=error,
        threads=threads,
        n_calls=sum(map(len, blocks["ours"])),
        layers=tuple(layers),
    )


def prepare(
    path: Path,
    model: Path | None,
    shapes: Mapping[str, int | Sequence[int]],
    *,
    threads: int = 1,
    progress: Progress | None = None,
) -> tuple[InferenceSession, ir.Model]:
    """What `bench` compares: an artefact with the model that it was compiled from.

    Args:
        path: an artefact, or an ONNX file, which is compiled for this machine first.
        model: the artefact's ONNX file; the one of the same name beside it by default.
        shapes: free dimensions of an ONNX file; an artefact knows its own.

    Raises:
        UsageError: no artefact, or no ONNX file whose hash is in its manifest.
    """
    from sparsegraph.compile import compile, load, model_digest

    if path.is_file():
        captured = load(path, shapes=shapes)
        compiled = compile(captured, threads=threads, progress=progress)
        assert compiled.session is not None
        return compiled.session, captured
    session = InferenceSession(path, threads=threads)
    source = model or path.with_suffix(".onnx")
    if not source.is_file():
        found, fix = f"no file '{source}'", "name it with --model"
        raise UsageError(message("artefact", str(path), found, "its ONNX model", fix))
    captured = load(
        source, shapes={i["name"]: tuple(i["shape"]) for i in session.manifest["inputs"]}
    )
    if model_digest(captured) != session.manifest["model_sha256"]:
        need, fix = "the model that was compiled", "name it with --model, or compile again"
        raise UsageError(message("model", str(source), "another model", need, fix))
    return session, captured


def _layer_times(
    session: InferenceSession, model: ir.Model, feed: Feed, threads: int
) -> list[LayerTime]:
    """Median times of every kernel's calls, beside ONNX Runtime's for the nodes of these."""
    runs = [session.profile(feed) for _ in range(_PROFILED_RUNS)]
    dense = dense_node_ms(model, feed, threads)
    rows: dict[tuple[Any, ...], LayerTime] = {}
    for steps in zip(*runs):
        step = steps[0]
        known = [dense[node] for node in step.nodes if node in dense]
        ours = statistics.median(s.seconds for s in steps) * 1e3
        dense_ms = sum(known) if known else None
        key = (step.nodes, step.kernel, step.detail)
        ours += rows[key].ours_ms if key in rows else 0.0  # a strip of the same map
        rows[key] = LayerTime(*key, ours, dense_ms)
    return list(rows.values())


def dense_node_ms(model: ir.Model, feed: Feed, threads: int = 1) -> dict[str, float]:
    """ONNX Runtime's mean time per run by node name, for nodes that it keeps or fuses others into.

    Fused nodes carry the name of one of their parts, or of its output, with an addition.
    """
    import onnxruntime as ort

    from sparsegraph import verify

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.enable_profiling = True
    proto, held = verify._by_reference(model)
    options.add_external_initializers(
        list(held), [ort.OrtValue.ortvalue_from_numpy(array) for array in held.values()]
    )
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder, "run"))
        session = ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
        for _ in range(_PROFILED_RUNS):
            session.run(None, dict(feed))
        events = json.loads(Path(session.end_profiling()).read_text())
    found: Counter[str] = Counter()
    owner = _Owner(model)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            name = owner.of(event["name"].removesuffix("_kernel_time"))
            found[name] += event["dur"] / 1e3 / _PROFILED_RUNS
    return dict(found)


class _Owner:
    """Finds the node of the model behind a name that ONNX Runtime made up."""

    def __init__(self, model: ir.Model) -> None:
        self._names = {str(n.name): str(n.name) for n in model.graph}
        for node in model.graph:
            for value in node.outputs:
                self._names.setdefault(str(value.name), str(node.name))

    def of(self, name: str) -> str:
        """The node whose own or output name is the longest beginning of `name`, else `name`."""
        found = name
        while found not in self._names:
            shorter = re.sub(r"[/_:.-][^/_:.-]*$", "", found)
            if shorter == found:
                return name
            found = shorter
        return self._names[found]
