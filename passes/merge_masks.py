"""Two constants that scores get before the softmax are added once.

    a = Add(x, table); b = Add(a, mask); y = Softmax(b)    ->  b = Add(x, table + mask); ...

Attention with relative positions in shifted windows reads like this.

Declines when: the constants cancel, so that the sum would no longer round x as the two steps do, or
the sum would be larger than 4 MiB and than both. A first sum that others read stays as it is,
without a reason.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sparsegraph.graph import constant, has_one_use, is_op, made_by, static_shape
from sparsegraph.rewrite import Builder, Decline, RewritePass, decline

GROW_BYTES = 4 << 20
_CANCELS = 64.0  # times larger than the sum: six of 24 bits of x may be lost


@dataclass(frozen=True)
class Found:
    """The operand of the first sum, and both constants."""

    source: ir.Value
    first: ir.Value
    second: ir.Value
    output: ir.Value


@dataclass(frozen=True)
class MergeMasks(RewritePass):
    """One mask for chains of them."""

    name: ClassVar[str] = "merge_masks"

    def match(self, node: ir.Node, graph: ir.Graph) -> Found | Decline | None:
        """Add of a constant to an Add of a constant, below a softmax."""
        outer = _split(node)
        if outer is None or not any(is_op(u, "Softmax") for u in node.outputs[0].consumers()):
            return None
        inner_sum, second = outer
        inner = _split(made_by(inner_sum, "Add"))
        if inner is None or not has_one_use(inner_sum):
            return None
        source, first = inner
        one, two = constant(first), constant(second)
        shape = static_shape(source)
        assert one is not None
        assert two is not None
        if one.dtype.kind != "f" or shape is None:
            return None
        size = np.prod(np.broadcast_shapes(one.shape, two.shape)) * one.itemsize
        if size > max(GROW_BYTES, one.nbytes, two.nbytes):
            return decline(node, f"the sum of the constants would take {size / 2**20:.1f} MiB")
        if _cancel(one, two):
            return decline(node, "the constants cancel: x is rounded between them")
        return Found(source, first, second, node.outputs[0])

    def rewrite(self, found: Found, build: Builder) -> Sequence[ir.Value]:
        """One Add."""
        one, two = constant(found.first), constant(found.second)
        assert one is not None
        assert two is not None
        total = build.constant(one + two, f"{found.first.name}_sum", found.first, found.second)
        return [build.op("Add", [found.source, total], like=found.output)]


def _split(node: ir.Node | None) -> tuple[ir.Value, ir.Value] | None:
    """(operand, constant) of an Add."""
    if node is None or not is_op(node, "Add"):
        return None
    for side in (0, 1):
        value, other = node.inputs[side], node.inputs[1 - side]
        if value is not None and other is not None and constant(other) is not None:
            return None if constant(value) is not None else (value, other)
    return None


def _cancel(one: np.ndarray, two: np.ndarray) -> bool:
    """True where a finite sum is much smaller than the constants in it."""
    with np.errstate(invalid="ignore", over="ignore"):
        total = np.abs(one + two)
        larger = np.maximum(np.abs(one), np.abs(two))
        return bool(np.any((larger > _CANCELS) & (larger > _CANCELS * total)))
