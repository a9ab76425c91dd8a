"""Keep one of equal initializers and one of equal nodes.

    a = Relu(x); b = Relu(x); y = Add(a, b)        ->  a = Relu(x); y = Add(a, a)

Equal initializers have the same dtype, shape and bytes; equal nodes the same op, attributes and
inputs (in any order where the op is commutative).

Declines when: never. Random ops (Bernoulli, training-mode Dropout, ...) and nodes with subgraphs
are no duplicates of anything.
"""

from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass
from hashlib import blake2b
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sparsegraph.graph import (
    all_names,
    constant,
    has_subgraph,
    is_constant,
    is_op,
    is_random,
    remove_dead,
)
from sparsegraph.rewrite import FROM, Builder, Fuel, Outcome, origin, take_over

_COMMUTATIVE = ("Add", "Mul", "And", "Or", "Xor", "Equal", "Max", "Min", "Sum", "Mean")


@dataclass(frozen=True)
class Dedupe:
    """Initializer deduplication, then common subexpressions in topological order."""

    name: ClassVar[str] = "dedupe"
    exact: ClassVar[bool] = True

    def run(self, model: ir.Model, fuel: Fuel) -> Outcome:
        """Merge until no duplicates are left; one sweep suffices since inputs merge first."""
        return Outcome(_merge_initializers(model.graph, fuel) + _merge_nodes(model.graph, fuel))


def _merge_initializers(graph: ir.Graph, fuel: Fuel) -> int:
    groups: dict[Hashable, list[ir.Value]] = defaultdict(list)
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and is_constant(value) and not value.is_graph_output():
            groups[(tensor.dtype, tuple(tensor.shape.dims))].append(value)
    merged = 0
    for group in groups.values():
        kept: dict[bytes, ir.Value] = {}
        for value in group if len(group) > 1 else ():
            first = kept.setdefault(_digest(value), value)
            if first is value or not fuel.take():
                continue
            names = dict.fromkeys((*origin(first), *origin(value)))
            first.metadata_props[FROM] = ",".join(names)
            value.replace_all_uses_with(first)
            del graph.initializers[str(value.name)]
            merged += 1
    return merged


def _digest(value: ir.Value) -> bytes:
    tensor = value.const_value
    assert tensor is not None
    if tensor.dtype == ir.DataType.STRING:
        return _text(tensor)
    array = constant(value)
    assert array is not None
    return blake2b(np.ascontiguousarray(array).view(np.uint8).data, digest_size=20).digest()


def _text(tensor: ir.TensorProtocol) -> bytes:
    return repr(tensor.numpy().tolist()).encode()


def _merge_nodes(graph: ir.Graph, fuel: Fuel) -> int:
    seen: dict[Hashable, ir.Node] = {}
    names = all_names(graph)
    merged = 0
    for node in list(graph):
        if has_subgraph(node) or is_random(node):
            continue
        first = seen.setdefault(_key(node), node)
        if first is node or not _may_merge(first, node) or not fuel.take():
            continue
        build = Builder(graph, names, str(node.outputs[0].name))
        for old, new in zip(node.outputs, first.outputs, strict=True):
            take_over(graph, node, old, new, set(), build)
        remove_dead(graph, [node])
        merged += 1
    return merged


def _key(node: ir.Node) -> Hashable:
    inputs = [0 if v is None else id(v) for v in node.inputs]
    if is_op(node, *_COMMUTATIVE):
        inputs.sort()
    attributes = sorted((a.name, a.type.value, _attribute_key(a)) for a in node.attributes.values())
    return (
        node.domain,
        node.op_type,
        node.overload,
        tuple(inputs),
        tuple(attributes),
        len(node.outputs),
    )


def _attribute_key(attribute: ir.Attr) -> str:
    if attribute.type == ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        data = _text(tensor) if tensor.dtype == ir.DataType.STRING else tensor.tobytes()
        return f"{tensor.dtype}{tensor.shape}{blake2b(data).hexdigest()}"
    return repr(attribute.value)


def _may_merge(first: ir.Node, node: ir.Node) -> bool:
    """False when both feed the interface: two output names need two values."""
    pairs = zip(first.outputs, node.outputs, strict=True)
    return not any(a.is_graph_output() and b.is_graph_output() for a, b in pairs)
