"""Cut the graph into native segments and segments for ONNX Runtime, and lower the native ones.

Lowering a node may decline. Then the node goes to ONNX Runtime, the graph is cut anew, and the
segments are lowered again, until nothing declines.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from sparsegraph import quantised
from sparsegraph.chain import form_chains
from sparsegraph.errors import UnsupportedError, message
from sparsegraph.graph import captured, constant, has_subgraph, static_shape
from sparsegraph.layers import weighted
from sparsegraph.lower.builder import DTYPES, Builder, Declined, name_of
from sparsegraph.lower.choose import CONVERSION, Decide
from sparsegraph.lower.table import HANDLERS
from sparsegraph.lower.tiling import tiled_for
from sparsegraph.program import Fallback, Plan, Program, Tensor
from sparsegraph.targets.kernels.attention import Attention
from sparsegraph.targets.target import Target

# What a multiply-add of attention takes, norms and activations around it included, in multiply-adds
# of ONNX Runtime's products: DeiT-S spends 18 ms there besides its products, and 8.5 ms here
# (AVX-512). MiniLM with 384 tokens is then estimated at 1.22 of its speed; measured: 1.25.
_THEIR_ATTENTION, _OUR_ATTENTION = 2.7, 1.3
_NEWEST = 24  # opset whose operators the handlers know whole


@dataclass(frozen=True)
class Segment:
    """Consecutive nodes that run in one place."""

    nodes: tuple[ir.Node, ...]
    is_native: bool


def plan(
    model: ir.Model,
    target: Target,
    *,
    threads: int = 1,
    allow_fallback: bool = True,
    decide: Decide | None = None,
    refused: Mapping[str, str] = MappingProxyType({}),
) -> Plan:
    """Lower a whole model.

    Args:
        model: static shapes, constants as initializers (what `pipeline.optimize` returns).
        threads: the number of threads that the plan should be able to keep busy.
        allow_fallback: whether nodes that no kernel covers may run in ONNX Runtime.
        decide: how products are computed; by the cost model if None.
        refused: names of kernels that the code generator fails at -> what it says.

    Raises:
        UnsupportedError: if such nodes exist and no fallback is allowed; lists them.
    """
    graph, target = model.graph, tiled_for(weighted(model), target)
    reasons = {n: r for n in graph if (r := _refusal(n)) is not None} | quantised.left(model)
    while True:
        n_converted = 0
        segments = cut(graph, reasons)
        lowered: list[Program | Fallback] = []
        layers: list[dict[str, Any]] = []
        found: dict[ir.Node, str] = {}
        for segment in segments:
            inputs, outputs = borders(graph, segment)
            if not segment.is_native:
                why = "; ".join(sorted({_why(n, reasons[n]) for n in segment.nodes}))
                lowered.append(_fallback(model, segment, inputs, outputs, why))
                continue
            program = Program(tuple(map(tensor, inputs)), tuple(map(tensor, outputs)))
            builder = Builder(program, target, chunks=threads, decide=decide)
            found |= _lower(builder, segment.nodes, outputs)
            form_chains(program, target)
            found |= _without_code(program, segment.nodes, refused)
            lowered.append(program)
            layers += builder.layers
            n_converted += builder.n_converted
        if not found:
            break
        reasons |= found
    if reasons and not allow_fallback:
        names = ", ".join(f"{n.name} ({n.op_type}: {r})" for n, r in reasons.items())
        fix = "choose a host target, or remove these nodes"
        raise UnsupportedError(message("target", str(target), names, "a kernel for each", fix))
    inputs = [v for v in graph.inputs if not _is_default(v)]
    return Plan(
        tuple(map(tensor, inputs)), tuple(map(tensor, graph.outputs)), lowered, layers,
        _estimate(layers, n_converted, _attention_macs(lowered)),
    )  # fmt: skip


def _why(node: ir.Node, reason: str) -> str:
    """A line of a segment's reason: one for all that is quantised, else one per operator."""
    return reason if reason == quantised.REASON else f"{node.op_type}: {reason}"


def _estimate(layers: Sequence[dict[str, Any]], n_converted: int, attention: int) -> float:
    """Speed of products and attention relative to ONNX Runtime's dense ones; 1 without products.

    Everything is counted in multiply-adds of its products. `attention` has a price of its own on
    both sides, which includes the norms and activations that come with it.
    """
    macs = sum(layer["macs"] for layer in layers)
    if not macs:
        return 1.0
    theirs = macs + _THEIR_ATTENTION * attention
    ours = sum(layer["macs"] * layer["estimate"] for layer in layers)
    return float(theirs / (ours + _OUR_ATTENTION * attention + CONVERSION * n_converted))


def _attention_macs(segments: Sequence[Program | Fallback]) -> int:
    steps = (step for part in segments if isinstance(part, Program) for step in part.steps)
    return sum(step.flops // 2 for step in steps if isinstance(step.kernel, Attention))


def whole_model_fallback(model: ir.Model, reason: str, instead_of: Plan | None = None) -> Plan:
    """The plan that leaves everything to ONNX Runtime, with the layers of what it stands for."""
    inputs = [v for v in model.graph.inputs if not _is_default(v)]
    outputs = list(model.graph.outputs)
    segment = Segment(tuple(model.graph), False)
    plan = Plan(
        tuple(map(tensor, inputs)),
        tuple(map(tensor, outputs)),
        [_fallback(model, segment, inputs, outputs, reason)],
    )
    if instead_of is None:
        return plan
    return replace(plan, layers=instead_of.layers, estimate=instead_of.estimate)


def _lower(
    b: Builder,
    nodes: Sequence[ir.Node],
    outputs: Sequence[ir.Value],
) -> dict[ir.Node, str]:
    """Lower `nodes`; returns the nodes that declined, with reasons."""
    found: dict[ir.Node, str] = {}
    for node in nodes:
        if node in b.done:
            continue
        try:
            HANDLERS[node.op_type](b, node)
        except Declined as reason:
            found[node] = str(reason)
            _pretend(b, node)
    if not found:
        try:
            b.finish(outputs)
        except Declined as reason:
            for value in outputs:
                producer = value.producer()
                if producer is not None and producer not in found:
                    found[producer] = str(reason)
    return found


def _without_code(
    program: Program, nodes: Sequence[ir.Node], refused: Mapping[str, str]
) -> dict[ir.Node, str]:
    """Nodes that `program` computes by `refused` kernels; all nodes, if it is a layout change."""
    return {
        node: f"the code generator failed at its kernel ({refused[step.kernel.name]})"
        for step in program.steps
        if step.kernel.name in refused
        for node in nodes
        if not step.nodes or (node.name or node.op_type) in step.nodes
    }


def _pretend(b: Builder, node: ir.Node) -> None:
    """Go on as if the node had been lowered, to find all that decline in one round."""
    for value in node.outputs:
        if static_shape(value) is not None and value.dtype in DTYPES:
            b.new_row(value)


def _refusal(node: ir.Node) -> str | None:
    """Why a node cannot be native, known without lowering it."""
    if node.domain not in ("", "ai.onnx") or node.op_type not in HANDLERS:
        return "no kernel for this operator"
    if has_subgraph(node):
        return "control flow"
    known, n_inputs = _all_known()[node.op_type]
    newer = sorted(node.attributes.keys() - known)
    if newer or len(node.inputs) > n_inputs:
        return f"{', '.join(newer) or 'an input'} of {node.op_type} came after opset {_NEWEST}"
    for value in (*node.inputs, *node.outputs):
        if value is None or not value.name:
            continue
        shape = static_shape(value)
        if shape is None:
            return f"the shape of '{value.name}' depends on run-time data"
        is_half = value.dtype == ir.DataType.FLOAT16
        if value.dtype not in DTYPES or (is_half and node.op_type != "Cast"):
            return f"'{value.name}' has type {value.dtype}"
        if 0 in shape and constant(value) is None:
            return f"'{value.name}' has no elements"
    return None


@cache
def _all_known() -> dict[str, tuple[frozenset[str], int]]:
    """Attributes of each operator in any opset up to `_NEWEST`, and the most inputs."""
    known: dict[str, tuple[frozenset[str], int]] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "" and schema.since_version <= _NEWEST:
            names, n_inputs = known.get(schema.name, (frozenset(), 0))
            known[schema.name] = names | schema.attributes.keys(), max(n_inputs, schema.max_input)
    return known


def cut(graph: ir.Graph, reasons: dict[ir.Node, str]) -> list[Segment]:
    """Segments in execution order; as few switches as a greedy order finds."""
    waiting = list(graph)
    done: set[ir.Node] = set()
    segments: list[Segment] = []
    native = True
    while waiting:
        taken: list[ir.Node] = []
        rest: list[ir.Node] = []
        for node in waiting:
            if (node not in reasons) == native and all(p in done for p in _feeding(node)):
                taken.append(node)
                done.add(node)
            else:
                rest.append(node)
        if taken:
            segments.append(Segment(tuple(taken), native))
        native, waiting = not native, rest
    return segments


def _feeding(node: ir.Node) -> Iterable[ir.Node]:
    for value in (*node.inputs, *captured(node)):
        producer = None if value is None else value.producer()
        if producer is not None:
            yield producer


def borders(graph: ir.Graph, segment: Segment) -> tuple[list[ir.Value], list[ir.Value]]:
    """Values that the segment reads from outside and that others need from it."""
    inside = set(segment.nodes)
    inputs: dict[ir.Value, None] = {}
    outputs: dict[ir.Value, None] = {}
    for node in segment.nodes:
        for value in (*node.inputs, *captured(node)):
            if value is None or constant(value) is not None or not value.name:
                continue
            if value.producer() not in inside:
                inputs[value] = None
        for value in node.outputs:
            if value.is_graph_output() or any(n not in inside for n in value.consumers()):
                outputs[value] = None
    return _in_order(inputs, graph.inputs), _in_order(outputs, graph.outputs)


def _in_order(values: Iterable[ir.Value], model: Sequence[ir.Value]) -> list[ir.Value]:
    """The model's own inputs or outputs first, in its order: what a C caller expects."""
    given = list(values)
    own = [v for v in model if v in given]
    return [*own, *(v for v in given if v not in own)]


def tensor(value: ir.Value) -> Tensor:
    """A border value; -1 stands for an extent that depends on run-time data."""
    dims = value.shape.dims if value.shape is not None else ()
    shape = tuple(d if isinstance(d, int) else -1 for d in dims)
    assert value.dtype is not None
    dtype = DTYPES.get(value.dtype) or np.dtype(value.dtype.numpy()).name
    return Tensor(name_of(value), dtype, shape)


def _is_default(value: ir.Value) -> bool:
    return value.const_value is not None


def _fallback(
    model: ir.Model,
    segment: Segment,
    inputs: Sequence[ir.Value],
    outputs: Sequence[ir.Value],
    reason: str,
) -> Fallback:
    graph = ir.convenience.extract(model.graph, inputs=list(inputs), outputs=list(outputs))
    part = ir.Model(graph, ir_version=min(model.ir_version, 11))
    graph.opset_imports.update(model.graph.opset_imports)
    part.functions.update(model.functions)
    return Fallback(
        tuple(map(tensor, inputs)),
        tuple(map(tensor, outputs)),
        ir.to_proto(part).SerializeToString(deterministic=True),
        tuple(n.name or n.op_type for n in segment.nodes),
        reason,
    )
