"""Compute in float32 what a model computes in half precision.

    float16 x; y = MatMul(x, W16)      ->  y = Cast<to=float16>(MatMul(Cast<to=float>(x), W32))

So does ONNX Runtime where it has no kernel for halves, which on CPUs is nearly everywhere: nothing
is rounded, or overflows, between one node and the next. float32 holds every float16 and bfloat16:
weights keep their values and their zeros. Types of values, constants and attributes change, also in
branches and bodies of loops; inputs and outputs keep theirs behind a Cast, unless `borders` is
false. What is cast to half precision and back at once was meant to be rounded, and stays.

Declines when: a node reads bits (BitCast), or a sequence or map holds halves.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sparsegraph.graph import all_names, all_values, is_op, subgraphs
from sparsegraph.rewrite import Builder, Fuel, Outcome, decline

_TYPES = ("to", "dtype", "output_dtype", "output_datatype", "softmax_precision", "stash_type")


@dataclass(frozen=True)
class WidenHalf:
    """float32 in place of `kind`, FLOAT16 or BFLOAT16."""

    kind: ir.DataType = ir.DataType.FLOAT16
    borders: bool = True
    name: ClassVar[str] = "widen_half"
    exact: ClassVar[bool] = False

    def run(self, model: ir.Model, fuel: Fuel) -> Outcome:
        """One application for the whole model, or none."""
        graph = model.graph
        found = halves(graph, self.kind, borders=self.borders)
        if not found:
            return Outcome(0)
        for node in graph.all_nodes():
            if node.op_type == "BitCast":
                return Outcome(0, (decline(node, "it reads the bits of numbers"),))
        for value in found:
            if not isinstance(value.type, ir.TensorType):
                return Outcome(0, (decline(_near(value), f"'{value.name}' is no tensor"),))
        if not fuel.take():
            return Outcome(0)
        inputs = [v for v in graph.inputs if v in found and v.const_value is None]
        outputs = [v for v in graph.outputs if v in found and not v.is_graph_input()]
        for value in found:
            self._widen(value)
        for node in graph.all_nodes():
            if not any(v.dtype == self.kind for v in node.outputs):
                self._widen_attributes(node)
        if self.borders:
            self._cast_borders(graph, inputs, outputs)
        return Outcome(1)

    def _widen(self, value: ir.Value) -> None:
        value.type = ir.TensorType(ir.DataType.FLOAT)
        if value.const_value is not None:
            value.const_value = _wide(value.const_value)

    def _widen_attributes(self, node: ir.Node) -> None:
        for name, attr in list(node.attributes.items()):
            if attr.type == ir.AttributeType.TENSOR and attr.as_tensor().dtype == self.kind:
                node.attributes[name] = ir.AttrTensor(name, _wide(attr.as_tensor()))
            elif name in _TYPES and attr.type == ir.AttributeType.INT and attr.value == self.kind:
                node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))

    def _cast_borders(
        self, graph: ir.Graph, inputs: list[ir.Value], outputs: list[ir.Value]
    ) -> None:
        names = all_names(graph)
        for value in outputs:
            build = Builder(graph, names, str(value.name))
            name = str(value.name)
            value.name = build.unique(f"{name}_wide")
            last = self._cast(build, value, self.kind)
            last.name = name
            graph.outputs[list(graph.outputs).index(value)] = last
            graph.extend(build.nodes)
        for value in inputs:
            build = Builder(graph, names, str(value.name))
            wide = self._cast(build, value, ir.DataType.FLOAT)
            for user, position in list(value.uses()):
                if user is not wide.producer():
                    user.replace_input_with(position, wide)
            for inner in _subgraphs(graph):
                for at, result in enumerate(inner.outputs):
                    if result is value:
                        inner.outputs[at] = wide
            value.type = ir.TensorType(self.kind)
            graph.insert_before(graph[0], build.nodes)

    def _cast(self, build: Builder, value: ir.Value, to: ir.DataType) -> ir.Value:
        result = build.op("Cast", [value], {"to": int(to)}, like=value)
        result.type = ir.TensorType(to)
        return result


def halves(graph: ir.Graph, kind: ir.DataType, *, borders: bool = True) -> list[ir.Value]:
    """Values of type `kind` that float32 can take the place of; inputs and outputs if `borders`
    is false or if more than casts have to do with them."""
    return [v for v in _values(graph) if v.dtype == kind and not _is_only_cast(v, borders)]


def _is_only_cast(value: ir.Value, borders: bool) -> bool:
    """True between Casts from and to other types, the caller in place of one."""
    if value.const_value is not None:
        return False
    if not borders and (value.is_graph_input() or value.is_graph_output()):
        return False
    source = value.producer()
    casts = [*value.consumers()] if source is None else [source, *value.consumers()]
    if not all(is_op(node, "Cast") for node in casts):
        return False
    others = [node.inputs[0] if node is source else node.outputs[0] for node in casts]
    return all(v is not None and v.dtype not in (None, value.dtype) for v in others)


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    """Every value of the graph and its subgraphs."""
    yield from all_values(graph)
    for inner in _subgraphs(graph):
        yield from all_values(inner)


def _subgraphs(graph: ir.Graph) -> Iterator[ir.Graph]:
    """Branches and bodies at any depth."""
    for node in graph.all_nodes():
        yield from subgraphs(node)


def _wide(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.tensor(np.asarray(tensor.numpy(), np.float32), name=tensor.name)


def _near(value: ir.Value) -> ir.Node:
    """A node to name: the one that makes the value, or reads it."""
    producer = value.producer()
    return producer if producer is not None else value.consumers()[0]
