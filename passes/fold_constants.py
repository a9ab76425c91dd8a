"""Evaluate every subgraph that does not depend on an input, in ONNX Runtime.

    m = Mul(mask, weight); wt = Transpose(m); y = MatMul(x, wt)
        ->  y = MatMul(x, weight)        (weight: the product, transposed, with exact zeros)

Any size, any number of outputs per node. The result takes over the name of the largest initializer
that it replaces and records all of them in `sparsegraph.from`. QuantizeLinear of a weight is
evaluated (its zeros are then at the zero point); DequantizeLinear stays, it is the kernel's job.

Declines when: the result would be more than 4 MiB larger than what it replaces (or all results
together more than 32 MiB), the dtype has no NumPy form, or ONNX Runtime cannot evaluate it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sparsegraph.errors import SparsegraphError
from sparsegraph.graph import (
    FLOAT_DTYPES,
    NUMPY_DTYPES,
    all_names,
    has_subgraph,
    is_constant,
    is_op,
    is_random,
    is_used,
    made_by,
    remove_dead,
    remove_unused_initializers,
    static_bytes,
    static_size,
)
from sparsegraph.rewrite import FROM, Builder, Decline, Fuel, Outcome, decline, take_over
from sparsegraph.verify import Session

_KEPT = ("DequantizeLinear", "DynamicQuantizeLinear")
_SMALL = 8  # elements: no shape or axis list is longer
_LARGEST_INTERMEDIATE = 4 << 30


@dataclass(frozen=True)
class FoldConstants:
    """Constant folding with bounds on growth, in bytes per value and over the model."""

    grow_bytes: int = 4 << 20
    grow_total_bytes: int = 32 << 20
    name: ClassVar[str] = "fold_constants"
    exact: ClassVar[bool] = True

    def run(self, model: ir.Model, fuel: Fuel) -> Outcome:
        """Fold all frontier values: constant ones that something run-time reads."""
        graph = model.graph
        declined: list[Decline] = []
        held: set[ir.Node] = set()
        while True:
            foldable = _foldable(graph, held)
            wanted = _frontier(graph, foldable)
            too_large = self._too_large(wanted, foldable)
            if not too_large:
                break
            for value, reason in too_large:
                node = value.producer()
                assert node is not None
                held.add(node)
                declined.append(decline(node, reason))
        wanted = [v for v in wanted if fuel.take()]
        n_applied = 0
        for value, array in zip(wanted, _evaluate(model, wanted), strict=True):
            reason = self._refusal(value, array, foldable)
            node = value.producer()
            assert node is not None
            if reason or array is None:
                declined.append(decline(node, reason))
                continue
            _replace(graph, node, value, array, foldable)
            n_applied += 1
        if n_applied:
            remove_dead(graph)
            _name_after_leaves(graph)
        return Outcome(n_applied, tuple(declined))

    def _too_large(
        self, wanted: Sequence[ir.Value], foldable: set[ir.Node]
    ) -> list[tuple[ir.Value, str]]:
        growth = {v: (static_bytes(v) or 0) - _leaf_bytes(v, foldable) for v in wanted}
        over = [v for v in wanted if growth[v] > self.grow_bytes]
        if not over and sum(g for g in growth.values() if g > 0) > self.grow_total_bytes:
            over = [max(wanted, key=lambda v: growth[v])]
        return [(v, f"folding would add {growth[v] / 2**20:.1f} MiB") for v in over]

    def _refusal(self, value: ir.Value, array: np.ndarray | None, foldable: set[ir.Node]) -> str:
        if array is None:
            return "ONNX Runtime cannot evaluate it"
        if array.nbytes - _leaf_bytes(value, foldable) > self.grow_bytes:
            return f"folding would add {array.nbytes / 2**20:.1f} MiB"
        return ""


def _foldable(graph: ir.Graph, held: set[ir.Node]) -> set[ir.Node]:
    """Nodes that depend on initializers only."""
    known: set[ir.Value] = {v for v in graph.initializers.values() if is_constant(v)}
    nodes: set[ir.Node] = set()
    for node in graph:
        if node in held or not _may_fold(node):
            continue
        if all(v is None or v in known for v in node.inputs):
            nodes.add(node)
            known.update(node.outputs)
    return nodes


def _may_fold(node: ir.Node) -> bool:
    if is_op(node, *_KEPT) or is_random(node) or has_subgraph(node):
        return False
    if is_op(node, "Identity") and node.outputs[0].is_graph_output():
        return False  # an initializer cannot itself be a graph output here
    for value in node.outputs:
        if not isinstance(value.type, ir.TensorType | None):
            return False
        if value.dtype is not None and value.dtype not in NUMPY_DTYPES:
            return False
        if (static_bytes(value) or 0) > _LARGEST_INTERMEDIATE:
            return False
    return True


def _frontier(graph: ir.Graph, foldable: set[ir.Node]) -> list[ir.Value]:
    return [
        value
        for node in graph
        if node in foldable
        for value in node.outputs
        if value.is_graph_output() or any(user not in foldable for user in value.consumers())
    ]


def _leaves(value: ir.Value, foldable: set[ir.Node]) -> list[ir.Value]:
    """Initializers that the value is computed from, largest first."""
    found: dict[ir.Value, None] = {}
    work: list[ir.Value | None] = [value]
    seen: set[ir.Node] = set()
    while work:
        current = work.pop()
        node = None if current is None else current.producer()
        if current is not None and node is None:
            found[current] = None
        elif node is not None and node in foldable and node not in seen:
            seen.add(node)
            work.extend(node.inputs)
    return sorted(found, key=lambda v: -(static_bytes(v) or 0))


def _sources(leaves: list[ir.Value]) -> list[ir.Value]:
    """The leaves worth naming: weights and masks, not axes, shapes and other small numbers."""
    weights = [v for v in leaves if (static_size(v) or 0) > _SMALL or _is_float_array(v)]
    return weights or leaves[:1]


def _is_float_array(value: ir.Value) -> bool:
    return value.dtype in FLOAT_DTYPES and (static_size(value) or 0) > 1


def _leaf_bytes(value: ir.Value, foldable: set[ir.Node]) -> int:
    """Bytes that go away when the value is folded."""
    leaves = _leaves(value, foldable)
    gone = (v for v in leaves if all(user in foldable for user in v.consumers()))
    return sum(static_bytes(v) or 0 for v in gone)


def _evaluate(model: ir.Model, wanted: list[ir.Value]) -> list[np.ndarray | None]:
    """Arrays of the wanted values; one by one when evaluating them together fails."""
    if not wanted:
        return []
    try:
        return _run(model, wanted)
    except SparsegraphError:
        if len(wanted) == 1:
            return [None]
    return [array for value in wanted for array in _evaluate(model, [value])]


def _run(model: ir.Model, wanted: list[ir.Value]) -> list[np.ndarray | None]:
    part = ir.convenience.extract(model.graph, inputs=[], outputs=wanted)
    results = Session(ir.Model(part, ir_version=model.ir_version)).run({})
    arrays = [results[str(v.name)] for v in wanted]
    return [a if a.dtype.kind in "fiub" else None for a in arrays]


def _replace(
    graph: ir.Graph, node: ir.Node, value: ir.Value, array: np.ndarray, foldable: set[ir.Node]
) -> None:
    build = Builder(graph, all_names(graph), str(value.name))
    sources = _sources(_leaves(value, foldable))
    folded = build.constant(array, f"{value.name}_folded", *sources)
    folded.metadata_props.update(
        {k: v for k, v in value.metadata_props.items() if k not in folded.metadata_props}
    )
    graph.register_initializer(folded)
    take_over(graph, node, value, folded, set(), build)


def _name_after_leaves(graph: ir.Graph) -> None:
    """Give each folded initializer the name of the first source that is no longer there."""
    remove_unused_initializers(graph)
    taken = all_names(graph)
    for value in list(graph.initializers.values()):
        if not str(value.name).endswith("_folded") or not is_used(value):
            continue
        for name in _names(value.metadata_props.get(FROM, "")):
            if name not in taken:
                taken.add(name)
                _rename(graph, value, name)
                break


def _names(text: str) -> Iterable[str]:
    return text.split(",") if text else ()


def _rename(graph: ir.Graph, value: ir.Value, name: str) -> None:
    assert made_by(value) is None
    del graph.initializers[str(value.name)]
    value.name = name
    if value.const_value is not None:
        value.const_value.name = name
    graph.register_initializer(value)
