"""Input channels of one consumer: what it ignores and others need, a Gather leaves out.

    y = Conv(x, w)  with zero slices w[:, 1]   ->   g = Gather<axis=1>(x, {0, 2}); y = Conv(g, w')

Copying costs time as well, so an edge is changed only where it was measured to be faster, by itself
and in the whole model.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sparsegraph.graph import (
    all_names,
    constant,
    has_one_use,
    int_attribute,
    is_constant,
    is_op,
    remove_unused_initializers,
    static_shape,
)
from sparsegraph.rewrite import Builder, Decline, decline
from sparsegraph.structure.multiples import latencies

Keep = NDArray[np.bool_]
Faster = Callable[[ir.Model, ir.Model], bool]
_GAIN = 0.97
"""An edge is worth its node when it takes 3 % off: less is noise."""


@dataclass(frozen=True)
class Edge:
    """A consumer that sums over `axis` of its first input, with `weight_axis` of its weight."""

    node: ir.Node
    axis: int
    weight_axis: int

    @property
    def weight(self) -> np.ndarray:
        """The consumer's weight."""
        array = constant(self.node.inputs[1])
        assert array is not None
        return array

    @property
    def reads(self) -> Keep:
        """Which input channels meet anything but zeros."""
        rows = np.moveaxis(self.weight, self.weight_axis, 0)
        return np.asarray(rows.reshape(len(rows), -1).any(axis=1))


@dataclass(frozen=True)
class Gathered:
    """What was done: input channels before and after, by consumer; and why others were left."""

    rows: tuple[tuple[str, int, int], ...]
    declined: tuple[Decline, ...]

    def __str__(self) -> str:
        """One line: how many, and why not the others."""
        reasons = Counter(one.reason for one in self.declined)
        left = "".join(f"; {n} left whole: {reason}" for reason, n in reasons.items())
        return f"{len(self.rows)} operators read only some of their inputs, by Gather{left}"


def edges(graph: ir.Graph) -> list[Edge]:
    """All consumers with a constant weight whose input channels can be chosen one by one."""
    return [edge for node in graph if (edge := _edge(node)) is not None]


def _edge(node: ir.Node) -> Edge | None:
    if not is_op(node, "Conv", "ConvTranspose", "MatMul", "Gemm"):
        return None
    data, weight = node.inputs[:2]
    shape, sizes = static_shape(data), static_shape(weight)
    if is_constant(data) or constant(weight) is None or shape is None or sizes is None:
        return None
    if is_op(node, "Conv", "ConvTranspose"):
        return Edge(node, 1, int(is_op(node, "Conv"))) if _group(node) == 1 else None
    if len(sizes) != 2 or len(shape) < 2 or int_attribute(node, "transA", 0):
        return None
    return Edge(node, len(shape) - 1, int_attribute(node, "transB", 0))


def _group(node: ir.Node) -> int:
    return int_attribute(node, "group", 1)


def zero_inputs(graph: ir.Graph, share: float) -> int:
    """Zero the input channels with the smallest norms of every consumer; returns how many."""
    n_zeroed = 0
    for edge in edges(graph):
        rows = np.moveaxis(edge.weight.astype(np.float64), edge.weight_axis, 0)
        norms = np.sqrt((rows.reshape(len(rows), -1) ** 2).sum(axis=1))
        n_gone = len(norms) - max(1, round(share * len(norms)))
        gone = np.argsort(norms, kind="stable")[:n_gone]
        if n_gone:
            array = np.moveaxis(edge.weight.copy(), edge.weight_axis, 0)
            array[gone] = 0
            _give(graph, edge.node, np.moveaxis(array, 0, edge.weight_axis), "_chosen")
            n_zeroed += n_gone
    return n_zeroed


def gather(model: ir.Model, faster: Faster | None = None) -> Gathered:
    """Insert Gathers where they pay; the model stays as it is where they do not."""
    judge = faster or _is_faster
    rows, declined, chosen = [], [], []
    for number, edge in enumerate(edges(model.graph)):
        reads = edge.reads
        if reads.all() or not reads.any():
            continue
        if judge(_alone(edge, None), _alone(edge, reads)):
            chosen.append(number)
            rows.append((str(edge.node.name), len(reads), int(reads.sum())))
        else:
            declined.append(decline(edge.node, "copying its inputs costs more than it saves"))
    trial = model.clone()
    _insert(trial.graph, [edges(trial.graph)[number] for number in chosen])
    if chosen and judge(model, trial):
        _insert(model.graph, [edges(model.graph)[number] for number in chosen])
        return Gathered(tuple(rows), tuple(declined))
    why = "faster by itself, but not in the whole model"
    declined += [decline(edges(model.graph)[number].node, why) for number in chosen]
    return Gathered((), tuple(declined))


def _is_faster(before: ir.Model, after: ir.Model) -> bool:
    old, new = latencies([before, after], rounds=5, round_s=0.02)
    return new <= _GAIN * old


def _insert(graph: ir.Graph, chosen: Sequence[Edge]) -> None:
    """One Gather per input and choice; consumers lose the slices that they ignore."""
    names = all_names(graph)
    made: dict[tuple[ir.Value, bytes], ir.Value] = {}
    for edge in chosen:
        data, reads = edge.node.inputs[0], edge.reads
        assert data is not None
        key = data, np.packbits(reads).tobytes()
        if key not in made:
            build = Builder(graph, names, str(edge.node.name))
            indices = build.constant(np.flatnonzero(reads), f"{data.name}_live")
            graph.register_initializer(indices)
            shape = list(static_shape(data) or ())
            shape[edge.axis] = int(reads.sum())
            made[key] = build.op(
                "Gather", [data, indices], {"axis": edge.axis}, like=data, shape=shape
            )
            graph.insert_before(edge.node, build.nodes)
        small = np.compress(reads, edge.weight, edge.weight_axis)
        edge.node.replace_input_with(0, made[key])
        _give(graph, edge.node, small, "_live")
    remove_unused_initializers(graph)


def _give(graph: ir.Graph, node: ir.Node, array: np.ndarray, suffix: str) -> None:
    """Another weight under the name of the old one, or beside it where that is shared."""
    value = node.inputs[1]
    assert value is not None
    if has_one_use(value):
        value.const_value = ir.tensor(np.array(array, order="C"), name=value.name)
        value.shape = ir.Shape(array.shape)
        return
    fresh = Builder(graph, all_names(graph), "").constant(array, f"{value.name}{suffix}", value)
    graph.register_initializer(fresh)
    node.replace_input_with(1, fresh)


def _alone(edge: Edge, reads: Keep | None) -> ir.Model:
    """The consumer as a model of its own, with or without a Gather before it."""
    node = edge.node
    data = node.inputs[0]
    assert data is not None
    x = ir.Value(name="x", type=data.type, shape=data.shape)
    held = [None if v is None else constant(v) for v in node.inputs]
    inputs = [x, *(_held(at, array) for at, array in enumerate(held) if at)]
    copy = ir.Node("", node.op_type, inputs, node.attributes.values(), num_outputs=1, name="alone")
    copy.outputs[0].name, copy.outputs[0].type = "y", node.outputs[0].type
    owner = node.graph
    assert isinstance(owner, ir.Graph)
    weights = [v for v in inputs[1:] if v is not None]
    graph = ir.Graph(
        [x], copy.outputs, nodes=[copy], initializers=weights, opset_imports=owner.opset_imports
    )
    model = ir.Model(graph, ir_version=10)
    if reads is not None:
        _insert(graph, [Edge(copy, edge.axis, edge.weight_axis)])
    return model


def _held(at: int, array: np.ndarray | None) -> ir.Value | None:
    if array is None:
        return None
    name = f"held_{at}"
    return ir.val(name, const_value=ir.tensor(np.array(array, order="C"), name=name))
