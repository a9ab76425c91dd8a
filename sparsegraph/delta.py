"""Weights that change by little: sparse deltas folded in, low-rank branches merged or kept.

A LoRA branch y = x W + s (x A) B (Hu et al. 2021, arXiv:2106.09685) is merged into W only where
that leaves less to multiply: a sparse W would fill up. A branch that is all zero goes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from sparsegraph.errors import UsageError, message
from sparsegraph.graph import constant, has_one_use, is_op, remove_dead, remove_unused_initializers

Array = np.ndarray[Any, Any]

MERGED, KEPT, REMOVED = "merged", "kept", "removed"


@dataclass(frozen=True)
class Folded:
    """One weight before and after its deltas; densities are shares of non-zeros."""

    weight: str
    density_before: float
    density_after: float


@dataclass(frozen=True)
class Branch:
    """A low-rank branch: what became of it, and the non-zeros that are multiplied either way."""

    node: str
    weight: str
    rank: int
    fate: str
    n_apart: int
    n_merged: int


def fold(
    model: ir.Model, deltas: Sequence[Mapping[str, Array]]
) -> tuple[ir.Model, tuple[Folded, ...]]:
    """A copy with the sum of all deltas, by weight name in stored shape, added; summed in float64.

    What cancels to zero is an exact zero. Raises UsageError for a delta that fits no weight.
    """
    copy = model.clone()
    total: dict[str, Array] = {}
    for name, delta in ((n, d) for given in deltas for n, d in given.items()):
        value = copy.graph.initializers.get(name)
        array = None if value is None or value.const_value is None else value.const_value.numpy()
        if array is None or array.shape != delta.shape or array.dtype.kind != "f":
            found = "no such weight" if array is None else f"{array.dtype} {list(array.shape)}"
            need, fix = f"a floating-point {list(delta.shape)}", "use deltas of this model"
            raise UsageError(message("delta", name, found, need, fix))
        total[name] = total.get(name, 0.0) + delta.astype(np.float64)
    rows = []
    for name, delta in total.items():
        value = copy.graph.initializers[name]
        assert value.const_value is not None
        array = value.const_value.numpy()
        after = (array.astype(np.float64) + delta).astype(array.dtype)
        value.const_value = ir.tensor(after, name=name)
        rows.append(Folded(name, _density(array), _density(after)))
    return copy, tuple(rows)


def _density(array: Array) -> float:
    return float(np.count_nonzero(array) / array.size)


def settle_branches(model: ir.Model) -> tuple[ir.Model, tuple[Branch, ...]]:
    """A copy in which every low-rank branch beside a product is merged, kept or removed.

    The branch is a MatMul of two weights in a row on the same input, times a constant or not, added
    to the product. Its pieces must have no other readers.
    """
    copy = model.clone()
    rows = []
    for add in [node for node in copy.graph if is_op(node, "Add")]:
        found = _branch(add, 0) or _branch(add, 1)
        if found is not None:
            rows.append(found.settle(add, copy.graph))
    remove_dead(copy.graph)
    remove_unused_initializers(copy.graph)
    return copy, tuple(rows)


@dataclass(frozen=True)
class _Match:
    product: ir.Node
    weight: ir.Value
    low_rank: Array
    n_low_rank: int
    rank: int

    def settle(self, add: ir.Node, graph: ir.Graph) -> Branch:
        assert self.weight.const_value is not None
        array = self.weight.const_value.numpy()
        merged = (array.astype(np.float64) + self.low_rank).astype(array.dtype)
        apart, together = np.count_nonzero(array) + self.n_low_rank, np.count_nonzero(merged)
        fate = MERGED if together <= apart else KEPT
        if not self.low_rank.any():
            fate, together = REMOVED, np.count_nonzero(array)
        if fate != KEPT:
            self.weight.const_value = ir.tensor(merged, name=self.weight.name)
            add.outputs[0].replace_all_uses_with(
                self.product.outputs[0], replace_graph_outputs=False
            )
        name = str(self.weight.name)
        return Branch(str(add.name), name, self.rank, fate, int(apart), int(together))


def _branch(add: ir.Node, at: int) -> _Match | None:
    """The branch at one input of an Add whose other input is the product beside it."""
    if add.outputs[0].is_graph_output():
        return None
    product, tip, scale = _product(add.inputs[1 - at]), add.inputs[at], np.float64(1)
    step = None if tip is None else tip.producer()
    if step is not None and is_op(step, "Mul") and has_one_use(step.outputs[0]):
        numbers = [constant(value) for value in step.inputs]
        side = 0 if numbers[0] is not None else 1
        if numbers[side] is None or numbers[side].size != 1:  # type: ignore[union-attr]
            return None
        scale, tip = np.float64(numbers[side].item()), step.inputs[1 - side]  # type: ignore[union-attr]
    last = _product(tip)
    first = None if last is None else _product(last.inputs[0])
    if product is None or last is None or first is None:
        return None
    weight, down, up = product.inputs[1], constant(first.inputs[1]), constant(last.inputs[1])
    assert weight is not None
    assert down is not None
    assert up is not None
    if first.inputs[0] is not product.inputs[0] or len(weight.uses()) > 1:
        return None
    low_rank = scale * (down.astype(np.float64) @ up.astype(np.float64))
    if low_rank.shape != weight.const_value.numpy().shape:  # type: ignore[union-attr]
        return None
    n_low_rank = np.count_nonzero(down) + np.count_nonzero(up)
    return _Match(product, weight, low_rank, int(n_low_rank), int(down.shape[1]))


def _product(value: ir.Value | None) -> ir.Node | None:
    """The MatMul with a constant matrix that makes a value for one reader."""
    node = None if value is None else value.producer()
    if value is None or node is None or not is_op(node, "MatMul") or not has_one_use(value):
        return None
    right = constant(node.inputs[1])
    return node if right is not None and right.ndim == 2 and right.dtype.kind == "f" else None
