"""Statistics of layer inputs, gathered by running a model on real feeds in ONNX Runtime.

Two ways in. `statistics` taps any values of a model in one pass per feed. `Stream` walks a model
segment by segment with every feed in flight, so that weights behind the current position can be
changed before the next layer is measured.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from sparsegraph.errors import UsageError, message
from sparsegraph.shelf import Shelf

Array = np.ndarray[Any, Any]
Feed = Mapping[str, Array]
Progress = Callable[[int, int], None]

LARGEST_MOMENT_BYTES = 1 << 28  # above it, only norms and means are kept (5,792 columns at fp64)
LARGEST_STATE_BYTES = 1 << 29  # of values in flight; what is beyond lies in mapped files
_PROTO_BYTES = 1 << 30  # above it, weights travel to ONNX Runtime through a temporary file


@dataclass(frozen=True)
class Rows:
    """How one value becomes rows of layer inputs, [n, groups, columns].

    kernel None: the axis `feature_axis` holds the columns and every other axis counts rows.
    With a kernel: NCHW patches as a convolution reads them, columns = in / group * kernel.
    """

    feature_axis: int = -1
    kernel: tuple[int, ...] | None = None
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    auto_pad: str = "NOTSET"
    group: int = 1

    def of(self, x: Array, keep: Array | None = None) -> Array:
        """Rows of `x` as fp32 [n, groups, columns]; `keep` is a boolean mask of leading axes."""
        if self.kernel is not None:
            return self._patches(x)
        moved = np.moveaxis(x, self.feature_axis, -1)
        if keep is not None and moved.shape[: keep.ndim] == keep.shape:
            moved = moved[keep]
        rows = moved.reshape(-1, self.group, moved.shape[-1] // self.group)
        return np.asarray(rows, dtype=np.float32)

    def _patches(self, x: Array) -> Array:
        assert self.kernel is not None
        rank = len(self.kernel)
        reach = tuple(d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilations))
        padded = np.pad(x, [(0, 0), (0, 0), *self._padding(x.shape[2:], reach)])
        axes = tuple(range(2, 2 + rank))
        view = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=axes)
        steps = tuple(slice(None, None, s) for s in self.strides)
        taps = tuple(slice(None, None, d) for d in self.dilations)
        points = np.moveaxis(view[(slice(None), slice(None), *steps, *taps)], 1, 1 + rank)
        columns = x.shape[1] * math.prod(self.kernel) // self.group
        return np.asarray(points.reshape(-1, self.group, columns), dtype=np.float32)

    def _padding(self, sizes: tuple[int, ...], reach: tuple[int, ...]) -> list[tuple[int, int]]:
        """(before, after) per spatial axis, as ONNX defines pads and auto_pad."""
        if self.auto_pad in ("NOTSET", "VALID"):
            pads = self.pads if self.auto_pad == "NOTSET" else (0,) * (2 * len(sizes))
            return list(zip(pads[: len(sizes)], pads[len(sizes) :]))
        totals = [
            max((-(-size // step) - 1) * step + width - size, 0)
            for size, step, width in zip(sizes, self.strides, reach)
        ]
        less = [total // 2 for total in totals]
        more = [total - half for total, half in zip(totals, less)]
        return list(zip(less, more) if self.auto_pad == "SAME_UPPER" else zip(more, less))


@dataclass
class Moments:
    """Running sums over rows of one layer's input, fp64, per group.

    total [groups, columns], square [groups, columns] and second = X^T X [groups, columns, columns],
    None when it would exceed LARGEST_MOMENT_BYTES.
    """

    n: int = 0
    total: Array = field(default_factory=lambda: np.zeros(0))
    square: Array = field(default_factory=lambda: np.zeros(0))
    second: Array | None = None

    def add(self, rows: Array) -> None:
        """Add fp32 rows [n, groups, columns]; products are fp32, their sum over calls fp64."""
        if self.n == 0:
            groups, columns = rows.shape[1:]
            self.total, self.square = np.zeros((2, groups, columns))
            if 8 * groups * columns**2 <= LARGEST_MOMENT_BYTES:
                self.second = np.zeros((groups, columns, columns))
        self.n += rows.shape[0]
        self.total += rows.sum(axis=0, dtype=np.float64)
        self.square += np.einsum("ngk,ngk->gk", rows, rows, dtype=np.float64)
        if self.second is not None:
            for group, second in enumerate(self.second):
                second += _gram(rows[:, group])

    @property
    def is_finite(self) -> bool:
        """Whether no row had a NaN or an infinity, and no sum overflowed."""
        sums = (self.total, self.square, *(() if self.second is None else (self.second,)))
        return all(bool(np.isfinite(array).all()) for array in sums)

    @property
    def mean(self) -> Array:
        """Mean of every column, [groups, columns]."""
        return self.total / max(self.n, 1)

    @property
    def norm(self) -> Array:
        """Root mean square of every column, [groups, columns]."""
        return np.sqrt(self.square / max(self.n, 1))


def _gram(rows: Array) -> Array:
    """X^T X of fp32 rows; NumPy takes the symmetric route when both factors are one array."""
    return rows.T @ rows


@dataclass
class Products:
    """Running sums of paired rows, fp64: left [groups, a] and left^T right [groups, a, b].

    `left` are rows of another value (the same input before pruning, or a residual's change),
    `right` the rows that a layer reads now.
    """

    n: int = 0
    total: Array | float = 0.0
    product: Array | float = 0.0

    def add(self, left: Array, right: Array) -> None:
        """Add fp32 rows [n, groups, a] and [n, groups, b] of the same n."""
        self.n += left.shape[0]
        self.total = self.total + left.sum(axis=0, dtype=np.float64)
        self.product = self.product + left.transpose(1, 2, 0) @ right.swapaxes(0, 1)


@contextmanager
def session_of(model: ir.Model, threads: int = 0) -> Iterator[Any]:
    """An ONNX Runtime session; weights beyond the protobuf limit go through a temporary file."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    n_bytes = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value)
    with tempfile.TemporaryDirectory(prefix="sparsegraph-") as folder:
        if n_bytes > _PROTO_BYTES:
            path = Path(folder) / "model.onnx"
            ir.save(model, path, external_data="model.data")
            source: str | bytes = str(path)
        else:
            source = ir.to_proto(model).SerializeToString()
        yield ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


@contextmanager
def _tapped(model: ir.Model, names: Sequence[str]) -> Iterator[ir.Model]:
    """The model with more outputs, restored on leaving; no weight is copied."""
    outputs = model.graph.outputs
    n, have = len(outputs), {v.name for v in outputs}
    by_name = {v.name: v for node in model.graph for v in node.outputs}
    try:
        outputs.extend(by_name[name] for name in names if name not in have and name in by_name)
        yield model
    finally:
        del outputs[n:]


def statistics(
    model: ir.Model,
    feeds: Iterable[Feed],
    taps: Mapping[str, Rows],
    *,
    mask: str = "attention_mask",
    progress: Progress | None = None,
) -> dict[str, Moments]:
    """Moments of the named values over all feeds, streamed: one feed is in memory at a time.

    `mask` names a graph input whose zeros mark rows (padding) to leave out where shapes agree.
    Memory: the taps of one feed, plus 8 * groups * columns^2 bytes per tap.
    Raises UsageError for a tap that is neither a node output nor a graph input, or without feeds.
    """
    known = {v.name for node in model.graph for v in node.outputs}
    inputs = {v.name for v in model.graph.inputs}
    for name in taps:
        if name not in known | inputs:
            fix = "name a node output or a graph input of this model"
            raise UsageError(message("tap", name, "no such value", "a value of the graph", fix))
    moments = {name: Moments() for name in taps}
    fetched = [name for name in taps if name in known]
    feeds = list(feeds)
    with _tapped(model, fetched), session_of(model) as session:
        for done, feed in enumerate(feeds, 1):
            values = dict(zip(fetched, session.run(fetched, dict(feed)))) | dict(feed)
            for name, rows in taps.items():
                moments[name].add(rows.of(values[name], kept_rows(feed, mask)))
            if progress is not None:
                progress(done, len(feeds))
    return moments


def kept_rows(feed: Feed, mask: str) -> Array | None:
    """The boolean mask input of a feed, or None when the feed has none."""
    return np.asarray(feed[mask]) != 0 if mask in feed else None


class Stream:
    """All feeds travelling through a model together, stopped between two nodes.

    Memory: the feeds, and of the values that are alive at the current position at most
    LARGEST_STATE_BYTES; the rest is mapped from temporary files.
    """

    def __init__(self, model: ir.Model, feeds: Iterable[Feed]) -> None:
        self._graph, self._version = model.graph, model.ir_version
        self._nodes = list(model.graph)
        self._last_use = self._find_last_uses()
        self._position = 0
        self._states = Shelf(feeds, LARGEST_STATE_BYTES)

    def __len__(self) -> int:
        return len(self._states)

    def position(self, value: ir.Value) -> int:
        """How many nodes must have run before `value` exists."""
        producer = value.producer()
        return 0 if producer is None else self._nodes.index(producer) + 1

    def advance(self, value: ir.Value) -> None:
        """Run every node up to and including the producer of `value`."""
        stop = self.position(value)
        if stop <= self._position:
            return
        model, names = self._segment(stop)
        with session_of(model) as session:
            inputs = [v.name for v in model.graph.inputs]
            for feed in range(len(self._states)):
                state = self._states[feed]
                found = session.run(names, {str(name): state[str(name)] for name in inputs})
                for name in [n for n in state if self._last_use.get(n, 0) <= stop]:
                    if not self._is_input(name):
                        self._states.drop(feed, name)
                for name, array in zip(names, found):
                    self._states.put(feed, name, array)
        self._position = stop

    def value(self, feed: int, value: ir.Value) -> Array:
        """`value` for one feed; it must have been reached and still be needed."""
        return self._states[feed][str(value.name)]

    def _is_input(self, name: str) -> bool:
        return any(v.name == name for v in self._graph.inputs)

    def _find_last_uses(self) -> dict[str, int]:
        last: dict[str, int] = {}
        for i, node in enumerate(self._nodes, 1):
            for name in _names_read(node):
                last[name] = i
        return last

    def _segment(self, stop: int) -> tuple[ir.Model, list[str]]:
        """The nodes up to `stop` as a model, and the names of its outputs: what is alive there."""
        nodes = self._nodes[self._position : stop]
        made = [v for node in nodes for v in node.outputs if v.name]
        alive = [v for v in made if self._last_use.get(str(v.name), 0) > stop]
        alive += [v for v in nodes[-1].outputs if v.name and v not in alive]
        inside = {v.name for v in made}
        constants = self._graph.initializers
        read = {name for node in nodes for name in _names_read(node)}
        inputs = sorted(read - inside - set(constants))
        graph = ir.convenience.extract(self._graph, inputs=inputs, outputs=alive)
        for given in graph.inputs:
            sample = self._states[0][str(given.name)]
            given.dtype = ir.DataType.from_numpy(sample.dtype)
            states = (self._states[feed] for feed in range(len(self._states)))
            if len({state[str(given.name)].shape for state in states}) == 1:
                given.shape = ir.Shape(sample.shape)
            else:
                given.shape = ir.Shape([None] * sample.ndim)
        return ir.Model(graph, ir_version=self._version), [str(v.name) for v in alive]


def _names_read(node: ir.Node) -> set[str]:
    """Names that a node reads, in its subgraphs too."""
    read = {str(v.name) for v in node.inputs if v is not None}
    for attribute in node.attributes.values():
        graphs = attribute.as_graphs() if attribute.type == ir.AttributeType.GRAPHS else []
        if attribute.type == ir.AttributeType.GRAPH:
            graphs = [attribute.as_graph()]
        for graph in graphs:
            read |= {name for inner in graph for name in _names_read(inner)}
    return read
