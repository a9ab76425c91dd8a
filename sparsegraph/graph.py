"""Questions that every pass asks a graph, and the in-process upkeep of shapes.

The graph is an `onnx_ir.Graph`; shapes are static after capture. A value whose shape depends on
run-time data (NonZero and what follows) has no shape, and every question about it answers None.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from sparsegraph.errors import PassError, message

RANDOM_OPS = frozenset(
    {
        "Bernoulli",
        "Dropout",
        "Multinomial",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
    }
)
NUMPY_DTYPES = frozenset(
    {
        ir.DataType.BOOL,
        ir.DataType.DOUBLE,
        ir.DataType.FLOAT,
        ir.DataType.FLOAT16,
        ir.DataType.INT8,
        ir.DataType.INT16,
        ir.DataType.INT32,
        ir.DataType.INT64,
        ir.DataType.UINT8,
        ir.DataType.UINT16,
        ir.DataType.UINT32,
        ir.DataType.UINT64,
    }
)
FLOAT_DTYPES = frozenset({ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16})


def opset(model: ir.Model) -> int:
    """The opset version of the standard domain; 0 when the model imports none."""
    imports = model.graph.opset_imports
    return imports.get("", imports.get("ai.onnx", 0))


def is_op(node: ir.Node | None, *op_types: str) -> bool:
    """True for a standard-domain node of one of these types."""
    return node is not None and node.domain in ("", "ai.onnx") and node.op_type in op_types


def made_by(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node of one of these types that produces the value, or None."""
    node = None if value is None else value.producer()
    return node if is_op(node, *op_types) else None


def static_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """Dimensions as integers, or None when any of them is unknown."""
    if value is None or value.shape is None:
        return None
    dims = value.shape.dims
    known = tuple(d for d in dims if isinstance(d, int))
    return known if len(known) == len(dims) else None


def operand(node: ir.Node) -> tuple[ir.Value, tuple[int, ...], tuple[int, ...]]:
    """The first operand of a node, its shape and that of the first result, which are known."""
    x = node.inputs[0]
    shape, out = static_shape(x), static_shape(node.outputs[0])
    assert x is not None
    assert shape is not None
    assert out is not None
    return x, shape, out


def is_constant(value: ir.Value | None) -> bool:
    """True for an initializer that a caller cannot override."""
    return value is not None and value.const_value is not None and not value.is_graph_input()


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The array of a constant (read-only, memory shared with the model), or None."""
    if value is None or not is_constant(value):
        return None
    tensor = value.const_value
    assert tensor is not None
    return np.asarray(tensor.numpy())


def scalar(value: ir.Value | None) -> float | None:
    """The number of a constant with exactly one element, or None."""
    if value is None or not is_constant(value) or static_size(value) != 1:
        return None
    array = constant(value)
    assert array is not None
    return float(array.reshape(())) if array.dtype.kind in "fiub" else None


def integers(value: ir.Value | None) -> tuple[int, ...] | None:
    """The elements of a constant integer tensor, flattened, or None."""
    array = constant(value)
    if array is None or array.dtype.kind not in "iu":
        return None
    return tuple(int(i) for i in array.reshape(-1))


def static_size(value: ir.Value) -> int | None:
    """Number of elements, or None when the shape is unknown."""
    shape = static_shape(value)
    return None if shape is None else math.prod(shape)


def static_bytes(value: ir.Value) -> int | None:
    """Bytes of a value with known shape and dtype, or None."""
    size = static_size(value)
    if size is None or value.dtype is None or value.dtype == ir.DataType.STRING:
        return None
    return int(size * value.dtype.itemsize)


def input_at(node: ir.Node, index: int) -> ir.Value | None:
    """An input by position; None when it is absent or left out."""
    return node.inputs[index] if index < len(node.inputs) else None


def attribute(node: ir.Node, name: str, default: object = None) -> object:
    """An attribute as a plain Python value."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def int_attribute(node: ir.Node, name: str, default: int) -> int:
    """An integer attribute."""
    value = attribute(node, name, default)
    assert isinstance(value, int)
    return value


def float_attribute(node: ir.Node, name: str, default: float) -> float:
    """A float attribute."""
    value = attribute(node, name, default)
    assert isinstance(value, int | float)
    return float(value)


def ints_attribute(node: ir.Node, name: str) -> tuple[int, ...] | None:
    """A list-of-integers attribute, or None when absent."""
    value = attribute(node, name)
    return None if value is None else tuple(int(i) for i in value)  # type: ignore[attr-defined]


def has_one_use(value: ir.Value) -> bool:
    """True when exactly one node reads the value and it is no graph output."""
    return not value.is_graph_output() and len(value.consumers()) == 1


def subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    """The graphs held by a control-flow node."""
    for attr in node.attributes.values():
        if attr.type == ir.AttributeType.GRAPH:
            yield attr.as_graph()
        elif attr.type == ir.AttributeType.GRAPHS:
            yield from attr.as_graphs()


def has_subgraph(node: ir.Node) -> bool:
    """True for If, Loop, Scan and their like."""
    return any(True for _ in subgraphs(node))


def is_random(node: ir.Node) -> bool:
    """True when two runs of the node may differ (inference-mode Dropout does not)."""
    if not is_op(node, *RANDOM_OPS):
        return False
    if node.op_type != "Dropout":
        return True
    training = input_at(node, 2)
    return training is not None and not (is_constant(training) and scalar(training) == 0.0)


def weight_bytes(graph: ir.Graph) -> int:
    """Bytes of all initializers."""
    return sum(v.const_value.nbytes for v in graph.initializers.values() if v.const_value)


def all_values(graph: ir.Graph) -> Iterator[ir.Value]:
    """Inputs, initializers and node outputs of the main graph."""
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def all_names(graph: ir.Graph) -> set[str]:
    """The name of every value and node in the graph and its subgraphs."""
    names = {v.name for v in (*graph.inputs, *graph.initializers.values()) if v.name}
    for node in graph.all_nodes():
        names.update(name for name in (node.name, *(v.name for v in node.outputs)) if name)
        for inner in subgraphs(node):
            names.update(v.name for v in (*inner.inputs, *inner.initializers.values()) if v.name)
    return names


def remove_dead(graph: ir.Graph, candidates: Iterable[ir.Node] | None = None) -> list[ir.Node]:
    """Remove nodes none of whose outputs is used, and what only they kept alive.

    With `candidates`, start there instead of at the whole graph. Returns the removed nodes.
    """
    work = list(reversed(list(graph))) if candidates is None else list(candidates)
    removed: list[ir.Node] = []
    while work:
        node = work.pop(0)
        if node.graph is not graph or any(is_used(v) for v in node.outputs):
            continue
        feeding = [v.producer() for v in (*node.inputs, *captured(node)) if v is not None]
        graph.remove(node, safe=True)
        removed.append(node)
        work.extend(p for p in dict.fromkeys(feeding) if p is not None)
    return removed


def captured(node: ir.Node) -> list[ir.Value]:
    """Outer values that the subgraphs of a node read."""
    found: list[ir.Value] = []
    for inner in subgraphs(node):
        for user in inner.all_nodes():
            found.extend(v for v in user.inputs if v is not None and v.graph is node.graph)
        found.extend(v for v in inner.outputs if v.graph is node.graph)
    return found


def is_used(value: ir.Value) -> bool:
    """True when a node, a subgraph or the caller reads the value."""
    return bool(value.uses()) or value.is_graph_output()


def remove_unused_initializers(graph: ir.Graph) -> list[str]:
    """Drop initializers that nothing reads; returns their names."""
    unused = [
        name
        for name, value in graph.initializers.items()
        if not is_used(value) and not value.is_graph_input()
    ]
    for name in unused:
        del graph.initializers[name]
    return unused


def fill_shapes(model: ir.Model) -> None:
    """Give shape and dtype to values that lack them, when inference can.

    Raises PassError when the inference fails outright: the graph is then not valid.
    """
    if all(v.shape is not None and v.dtype is not None for n in model.graph for v in n.outputs):
        return
    known = {
        v.name: (v.shape, v.type)
        for n in model.graph
        for v in n.outputs
        if v.shape is not None and v.dtype is not None
    }
    try:
        ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
    except Exception as error:
        raise PassError(
            message("shapes", model.graph.name or "graph", error, "a valid graph", "report this")
        ) from error
    for node in model.graph:
        for value in node.outputs:
            if value.name in known:
                value.shape, value.type = known[value.name]


def scales_input(node: ir.Node) -> ir.Value | None:
    """The scales of a Resize or Upsample; an attribute before opset 9."""
    return input_at(node, 1 if node.op_type == "Upsample" or opset_of(node) < 11 else 2)


def scales_of(node: ir.Node, rank: int) -> list[float] | None:
    """The constant scale of every axis of a Resize or Upsample; None where sizes are given."""
    given: Any = attribute(node, "scales") if opset_of(node) < 9 else None
    if given is None:
        given = constant(scales_input(node))
    if given is None or not len(given):
        return None
    axes = ints_attribute(node, "axes") or range(rank)
    by_axis = {axis % rank: float(scale) for axis, scale in zip(axes, given)}
    return [by_axis.get(axis, 1.0) for axis in range(rank)]


def opset_of(node: ir.Node) -> int:
    """The opset version that governs a node in a graph; the newest when unknown."""
    graph = node.graph
    imports = graph.opset_imports if isinstance(graph, ir.Graph) else {}
    return imports.get(node.domain, 99)
