"""Evaluate every subgraph that does not depend on an input, in ONNX Runtime.

    m = Mul(mask, weight); wt = Transpose(m); y = MatMul(x, wt)
        ->  y = MatMul(x, weight)        (weight: the product, transposed, with exact zeros)

Any size, any number of outputs per node. The result takes over the name of the largest initializer
that it replaces and records all of them in `sparsegraph.from`. QuantizeLinear of a weight is
evaluated (its zeros are then at the zero point); DequantizeLinear stays, it is the kernel's job.

Declines when: the result would be more than 4 MiB larger than what it replaces (or all results
together more than 32 MiB), the dtype has no NumPy form, or ONNX Runtime cannot evaluate it.
"""

from collections import deque
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
    constant,
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
GROWN = "sparsegraph.folded_growth_bytes"
_HEAD = 64  # elements that tell a mask from a weight
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
            too_large = self._too_large(wanted, foldable, _grown(graph))
            if not too_large:
                break
            for value, reason in too_large:
                node = value.producer()
                assert node is not None
                held.add(node)
                declined.append(decline(node, reason))
        wanted = [v for v in wanted if fuel.take()]
        n_applied = 0
        grown = _grown(graph)
        for value, array in zip(wanted, _evaluate(model, wanted), strict=True):
            node = value.producer()
            assert node is not None
            added = 0 if array is None else array.nbytes - _leaf_bytes(value, foldable)
            if array is None or added > self.grow_bytes:
                declined.append(decline(node, _refusal(array, added)))
                continue
            grown += max(added, 0)
            _replace(graph, node, value, array, foldable)
            n_applied += 1
        if n_applied:
            graph.metadata_props[GROWN] = str(grown)
            remove_dead(graph)
            _name_after_leaves(graph)
        return Outcome(n_applied, tuple(declined))

    def _too_large(
        self, wanted: Sequence[ir.Value], foldable: set[ir.Node], grown: int
    ) -> list[tuple[ir.Value, str]]:
        growth = {v: (static_bytes(v) or 0) - _leaf_bytes(v, foldable) for v in wanted}
        over = [v for v in wanted if growth[v] > self.grow_bytes]
        total = grown + sum(g for g in growth.values() if g > 0)
        if not over and growth and total > self.grow_total_bytes and max(growth.values()) > 0:
            over = [max(wanted, key=lambda v: growth[v])]
        return [(v, _refusal(None, growth[v])) for v in over]


def _refusal(array: np.ndarray | None, added: int) -> str:
    if array is None and not added:
        return "ONNX Runtime cannot evaluate it"
    return f"folding would add {added / 2**20:.1f} MiB"


def _grown(graph: ir.Graph) -> int:
    """Bytes that earlier runs added, so that the total bound holds over all of them."""
    return int(graph.metadata_props.get(GROWN, "0"))


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
    """Initializers below the value: large before small, weights before masks, near before far."""
    found: dict[ir.Value, None] = {}
    work: deque[ir.Value | None] = deque([value])
    seen: set[ir.Node] = set()
    while work:
        current = work.popleft()
        node = None if current is None else current.producer()
        if current is not None and node is None:
            found[current] = None
        elif node is not None and node in foldable and node not in seen:
            seen.add(node)
            work.extend(node.inputs)
    return sorted(found, key=lambda v: (-(static_bytes(v) or 0), _is_binary(v)))


def _is_binary(value: ir.Value) -> bool:
    """True for a mask of zeros and ones; looks at the first elements only."""
    array = constant(value)
    head = None if array is None else array.reshape(-1)[:_HEAD]
    return head is not None and bool(((head == 0) | (head == 1)).all())


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
