"""Rarer operators in terms of common ones, with the same result to the last bit.

    y = Trilu<upper=0>(x, k)                  ->  y = Where([[1, 0], [1, 1]], x, 0)
    y = GatherND(x, [[0, 2], [1, -1]])        ->  y = Gather(Reshape(x, [h * w, c]), [2, 2 * w - 1])
    y = GatherND(x, i)                        ->  j = Where(Less(i, 0), Add(i, [h, w]), i)
                                                  y = Gather(.., ReduceSum(Mul(j, [w, 1]), [-1]))
    y = ScatterND(x, [[2], [0]], u)           ->  y = Gather(Concat(x, u), [h + 1, 1, h, 3, ..])
    y = IsInf(x)                              ->  y = Equal(Abs(x), inf)

PyTorch writes causal masks with Trilu, index lists (the token of CLIP, the experts of Mixtral) and
linear resizes with GatherND, assignments to slices with ScatterND, and nan_to_num with IsInf.

Declines when: a shape or the diagonal is not known, an index lies outside, batches have indices of
their own, what is scattered is added or goes to computed places (a kernel does that), or IsInf
looks for neither sign or stands in an opset before 11.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sparsegraph.graph import (
    FLOAT_DTYPES,
    attribute,
    constant,
    input_at,
    int_attribute,
    is_op,
    scalar,
    static_shape,
)
from sparsegraph.rewrite import Builder, Decline, RewritePass, Rule, decline

_COMPARES_FLOATS = 11  # opset of Equal
_SUMS_AXES_GIVEN = 13  # opset of ReduceSum
_CHOSEN = FLOAT_DTYPES | {ir.DataType.INT64}  # that both Trilu and Where take in ONNX Runtime
_LARGEST_MASK = 1 << 24  # elements of a triangle


@dataclass(frozen=True)
class ExpandRare(RewritePass):
    """Trilu, GatherND, ScatterND and IsInf in operators that later passes and kernels know."""

    name: ClassVar[str] = "expand_rare"

    def match(self, node: ir.Node, graph: ir.Graph) -> ir.Node | Decline | None:
        """A node that has a rule, and whose constants are known."""
        rule = _RULES.get(node.op_type) if is_op(node, *_RULES) else None
        if rule is None:
            return None
        reason = rule.obstacle(node, graph)
        return node if reason is None else decline(node, reason)

    def rewrite(self, found: ir.Node, build: Builder) -> Sequence[ir.Value]:
        """The same in other operators."""
        return [_RULES[found.op_type].expand(found, build)]


# ---------------------------------------------------------------- triangles


def _open_triangle(node: ir.Node, _: ir.Graph) -> str | None:
    x, diagonal = node.inputs[0], input_at(node, 1)
    shape = static_shape(x)
    if x is None or shape is None:
        return "its shape is not known"
    if x.dtype not in _CHOSEN and x.dtype != ir.DataType.BOOL:
        return f"ONNX Runtime has no Where of {x.dtype}"
    if math.prod(shape[-2:]) > _LARGEST_MASK:
        return f"a mask of {shape[-2]} x {shape[-1]} is too large"
    return "its diagonal is computed" if diagonal is not None and scalar(diagonal) is None else None


def _triangle(node: ir.Node, build: Builder) -> ir.Value:
    x, shape = node.inputs[0], static_shape(node.inputs[0])
    assert x is not None
    assert x.dtype is not None
    assert shape is not None
    rows, columns = shape[-2:]
    diagonal = int(scalar(input_at(node, 1)) or 0)
    if int_attribute(node, "upper", 1):
        kept = ~np.tri(rows, columns, diagonal - 1, bool)
    else:
        kept = np.tri(rows, columns, diagonal, bool)
    mask = build.constant(kept, f"{build.hint}_triangle")
    if x.dtype == ir.DataType.BOOL:
        return build.op("And", [x, mask], like=x)
    zero = build.constant(np.zeros((), x.dtype.numpy()), f"{build.hint}_zero")
    return build.op("Where", [mask, x, zero], like=x)


# ---------------------------------------------------------------- gathers


def _open_gather(node: ir.Node, graph: ir.Graph) -> str | None:
    shape, places = (static_shape(value) for value in node.inputs)
    if shape is None or places is None or 0 in (*shape, *places):
        return "its shape is not known"
    if int_attribute(node, "batch_dims", 0):
        return "batches have indices of their own"
    if constant(node.inputs[1]) is None:
        is_old = graph.opset_imports.get("", 0) < _SUMS_AXES_GIVEN
        return f"its indices are computed, before opset {_SUMS_AXES_GIVEN}" if is_old else None
    return _outside(node.inputs[1], shape)


def _outside(indices: ir.Value | None, shape: Sequence[int]) -> str | None:
    array = constant(indices)
    assert array is not None
    extents = np.array(shape[: array.shape[-1]])
    is_outside = ((array < -extents) | (array >= extents)).any()
    return f"an index lies outside of {shape}" if is_outside else None


def _gather(node: ir.Node, build: Builder) -> ir.Value:
    """One index where there were several: all indexed axes become one."""
    x, indices = node.inputs
    assert x is not None
    assert indices is not None
    shape, (*lead, n) = static_shape(x) or (), static_shape(indices) or ()
    at = _known_places(indices, shape[:n], build)
    if at is None:
        at = _computed_places(indices, shape[:n], build)
    if n > 1:
        joined = (math.prod(shape[:n]), *shape[n:])
        x = build.reshaped(x, joined)
    return build.op("Gather", [x, at], {"axis": 0}, like=x, shape=(*lead, *shape[n:]))


def _sizes(sizes: Sequence[int], build: Builder) -> ir.Value:
    return build.constant(np.array(sizes, np.int64), f"{build.hint}_sizes")


def _known_places(indices: ir.Value, extents: Sequence[int], build: Builder) -> ir.Value | None:
    array = constant(indices)
    if array is None:
        return None
    return build.constant(_flat(array, extents), f"{build.hint}_places", indices)


def _flat(indices: np.ndarray, extents: Sequence[int]) -> np.ndarray:
    """One index for all of the axes, [..] of [.., axes]."""
    places = np.moveaxis(indices % np.array(extents), -1, 0)
    return np.asarray(np.ravel_multi_index(tuple(places), tuple(extents)), np.int64)


def _computed_places(indices: ir.Value, extents: Sequence[int], build: Builder) -> ir.Value:
    lead = (static_shape(indices) or ())[:-1]
    if len(extents) == 1:
        return build.reshaped(indices, lead)
    zero = build.constant(np.zeros((), np.int64), f"{build.hint}_zero")
    below = build.op("Less", [indices, zero], like=indices)
    below.type = ir.TensorType(ir.DataType.BOOL)
    from_end = build.op("Add", [indices, _sizes(extents, build)], like=indices)
    place = build.op("Where", [below, from_end, indices], like=indices)
    strides = [math.prod(extents[i + 1 :]) for i in range(len(extents))]
    scaled = build.op("Mul", [place, _sizes(strides, build)], like=indices)
    last = {"keepdims": 0}
    return build.op("ReduceSum", [scaled, _sizes([-1], build)], last, like=indices, shape=lead)


# ---------------------------------------------------------------- scatters


def _open_scatter(node: ir.Node, _: ir.Graph) -> str | None:
    shapes = [static_shape(value) for value in node.inputs]
    if any(shape is None or 0 in shape for shape in shapes):
        return "its shape is not known"
    if attribute(node, "reduction", "none") != "none":
        return "what is scattered is added"
    if constant(node.inputs[1]) is None:
        return "its indices are computed"
    return _outside(node.inputs[1], shapes[0] or ())


def _scatter(node: ir.Node, build: Builder) -> ir.Value:
    """Every row of the result is one of both operands; of two for one place the last."""
    x, indices, updates = node.inputs
    array = constant(indices)
    assert x is not None
    assert updates is not None
    assert array is not None
    shape, n = static_shape(x) or (), array.shape[-1]
    n_rows, rest = math.prod(shape[:n]), shape[n:]
    at = _flat(array, shape[:n]).ravel()
    rows = np.arange(n_rows)
    rows[at] = n_rows + np.arange(at.size)
    parts = []
    for value, size in ((x, n_rows), (updates, at.size)):
        sizes = (size, *rest)
        parts.append(value if static_shape(value) == sizes else build.reshaped(value, sizes))
    joined = build.op("Concat", parts, {"axis": 0}, like=x, shape=(n_rows + at.size, *rest))
    table = build.constant(rows, f"{build.hint}_rows", indices)
    picked = build.op("Gather", [joined, table], {"axis": 0}, like=x, shape=(n_rows, *rest))
    return build.reshaped(picked, shape)


# ---------------------------------------------------------------- infinities


def _open_infinity(node: ir.Node, graph: ir.Graph) -> str | None:
    if graph.opset_imports.get("", 0) < _COMPARES_FLOATS:
        return f"Equal compares floats from opset {_COMPARES_FLOATS} on"
    x = node.inputs[0]
    if x is None or x.dtype is None:
        return "its type is not known"
    return None if any(_signs(node)) else "it looks for neither sign"


def _infinity(node: ir.Node, build: Builder) -> ir.Value:
    x, (negative, positive) = node.inputs[0], _signs(node)
    assert x is not None
    assert x.dtype is not None
    sought = np.array(np.inf if positive else -np.inf, x.dtype.numpy())
    size = build.op("Abs", [x], like=x) if negative and positive else x
    out = node.outputs[0]
    return build.op("Equal", [size, build.constant(sought, f"{build.hint}_inf")], like=out)


def _signs(node: ir.Node) -> tuple[bool, bool]:
    negative, positive = (int_attribute(node, f"detect_{s}", 1) for s in ("negative", "positive"))
    return bool(negative), bool(positive)


_RULES: Mapping[str, Rule] = {
    "Trilu": Rule(_open_triangle, _triangle),
    "GatherND": Rule(_open_gather, _gather),
    "ScatterND": Rule(_open_scatter, _scatter),
    "IsInf": Rule(_open_infinity, _infinity),
}
