"""Take q, k or v out of a packed projection by a slice of features.

    a = Reshape(x, {B,T,S,H,d}); b = Transpose<perm=[2,0,3,1,4]>(a); y = Gather<axis=0>(b, i)
        ->  a = Slice(x, i*H*d, (i+1)*H*d, axis 2); b = Reshape(a, {B,T,H,d})
            y = Transpose<perm=[0,2,1,3]>(b)                                  (x: float[B,T,S*H*d])

The same for Squeeze of Slice and Squeeze of Split in place of Gather. A slice of features is a
view for the kernels; the five-dimensional transpose is a copy.

Declines when: the index is not a constant.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from sparsegraph.passes.merge_transposes import permutation

from sparsegraph.graph import (
    int_attribute,
    integers,
    is_constant,
    is_op,
    made_by,
    static_shape,
)
from sparsegraph.rewrite import Builder, Decline, RewritePass, decline

_PERM = (2, 0, 3, 1, 4)


@dataclass(frozen=True)
class Found:
    """The packed value, the part that is wanted, and its logical extents."""

    source: ir.Value
    index: int
    heads: int
    depth: int
    output: ir.Value


@dataclass(frozen=True)
class SlicePackedHeads(RewritePass):
    """Packed projections, as vision transformers write them."""

    name: ClassVar[str] = "slice_packed_heads"

    def match(self, node: ir.Node, graph: ir.Graph) -> Found | Decline | None:
        """The selecting node on top of Transpose of Reshape."""
        selected = _selected(node)
        if selected is None:
            return None
        packed, index = selected
        transpose = made_by(packed, "Transpose")
        reshape = None if transpose is None else made_by(transpose.inputs[0], "Reshape")
        if transpose is None or reshape is None or permutation(transpose) != _PERM:
            return None
        source, split = reshape.inputs[0], static_shape(reshape.outputs[0])
        whole = static_shape(source)
        if source is None or whole is None or split is None or len(whole) != 3:
            return None
        if split[:2] != whole[:2] or split[2] * split[3] * split[4] != whole[2]:
            return None
        if static_shape(node.outputs[0]) != (split[0], split[3], split[1], split[4]):
            return None
        if index is None:
            return decline(node, "the index is not a constant")
        return Found(source, index % split[2], split[3], split[4], node.outputs[0])

    def rewrite(self, found: Found, build: Builder) -> Sequence[ir.Value]:
        """Slice, Reshape, Transpose."""
        batch, points, _ = static_shape(found.source) or (0, 0, 0)
        width = found.heads * found.depth
        first = found.index * width
        bounds = [
            build.constant(np.array([n], np.int64), f"{build.hint}_{name}")
            for name, n in (("start", first), ("end", first + width), ("axis", 2))
        ]
        like = found.output
        part = build.op("Slice", [found.source, *bounds], like=like, shape=(batch, points, width))
        shape = (batch, points, found.heads, found.depth)
        to = build.constant(np.array(shape, np.int64), f"{build.hint}_shape")
        heads = build.op("Reshape", [part, to], like=like, shape=shape)
        return [build.op("Transpose", [heads], {"perm": (0, 2, 1, 3)}, like=like)]


def _selected(node: ir.Node) -> tuple[ir.Value, int | None] | None:
    """The value and the entry of its first axis that a node takes, axis removed."""
    if is_op(node, "Gather") and int_attribute(node, "axis", 0) == 0:
        source, index = node.inputs
        if source is None or index is None or static_shape(index) not in ((), (1,)):
            return None
        numbers = integers(index) if is_constant(index) else None
        return source, numbers[0] if numbers else None
    if not is_op(node, "Squeeze"):
        return None
    split = made_by(node.inputs[0], "Split")
    if split is not None and int_attribute(split, "axis", 0) == 0 and split.inputs[0] is not None:
        sizes = [static_shape(v) for v in split.outputs]
        if any(s is None or s[0] != 1 for s in sizes):
            return None
        return split.inputs[0], [v is node.inputs[0] for v in split.outputs].index(True)
    cut = made_by(node.inputs[0], "Slice")
    if cut is None or cut.inputs[0] is None or len(cut.inputs) < 4:
        return None
    start, axes = integers(cut.inputs[1]), integers(cut.inputs[3])
    shape = static_shape(cut.outputs[0])
    if axes != (0,) or start is None or shape is None or shape[0] != 1:
        return None
    return cut.inputs[0], start[0]
