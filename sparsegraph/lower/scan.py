"""CumSum and TopK."""

import numpy as np
import onnx_ir as ir

from sparsegraph.graph import int_attribute, is_used, scalar
from sparsegraph.lower.builder import Builder, Declined, Stored, dtype_of, shape_of
from sparsegraph.program import Arg
from sparsegraph.targets.kernels.reduce import collapse_axes, items
from sparsegraph.targets.kernels.scan import CumulativeSum, TopK

_TYPES = ("float32", "int32", "int64")


def lower_cumsum(b: Builder, node: ir.Node) -> None:
    """Running sums along a constant axis, row-major."""
    x, axis = node.inputs[0], scalar(node.inputs[1])
    assert x is not None
    if axis is None:
        raise Declined("its axis is computed")
    if dtype_of(x) not in _TYPES:
        raise Declined(f"running sums of {dtype_of(x)}")
    outer, n, inner = _around(x, int(axis))
    stored, to = b.row(x), b.new_row(node.outputs[0])
    is_exclusive, is_reverse = (
        bool(int_attribute(node, name, 0)) for name in ("exclusive", "reverse")
    )
    kernel = CumulativeSum(stored.dtype, is_exclusive, is_reverse, inner == 1)
    args: list[Arg] = [to.address, stored.address, n, inner]
    b.step(kernel, args, items(outer, inner, b.target), [node], detail="running sums")


def lower_top_k(b: Builder, node: ir.Node) -> None:
    """The k best along one axis, sorted, with their places."""
    x, k = node.inputs[0], scalar(node.inputs[1])
    assert x is not None
    if k is None:
        raise Declined("its number is computed")
    if dtype_of(x) not in _TYPES:
        raise Declined(f"an order of {dtype_of(x)}")
    outer, n, inner = _around(x, int_attribute(node, "axis", -1))
    if not 0 < k <= n:
        raise Declined(f"{k:.0f} of {n} values")
    stored = b.row(x)
    made = [_room(b, value, outer * int(k) * inner) for value in node.outputs]
    kernel = TopK(stored.dtype, bool(int_attribute(node, "largest", 1)))
    args: list[Arg] = [*(to.address for to in made), stored.address, n, int(k), inner]
    b.step(kernel, args, outer * inner, [node], detail=f"{k:.0f} of {n}")


def _around(x: ir.Value, axis: int) -> tuple[int, int, int]:
    collapsed = collapse_axes(shape_of(x), [axis])
    assert collapsed is not None
    return collapsed


def _room(b: Builder, value: ir.Value, size: int) -> Stored:
    """Room for an output, which nobody may read."""
    if is_used(value):
        return b.new_row(value)
    n_bytes = size * np.dtype(np.int64).itemsize
    return Stored(b.temporary("unread", n_bytes), (size,), "int64")
