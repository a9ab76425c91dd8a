"""Plain values in place of sequences, as PyTorch's exporter writes chunk, split and stack.

    s = SplitToSequence(x, 3); y = SequenceAt(s, 1)         ->  _, y, _ = Split(x, [3, 3, 2])
    s = SequenceConstruct(a, b); y = SequenceAt(s, -1)      ->  y = b
    s = SequenceConstruct(a, b); y = ConcatFromSequence(s)  ->  y = Concat(a, b)

Each element becomes a Split of its own; `dedupe` merges them.

Declines when: a position or the parts are computed, a shape is unknown or has no elements, there is
no such position, the sequence comes from another operator, or keepdims=0 stands beside a size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sparsegraph.graph import (
    constant,
    input_at,
    int_attribute,
    integers,
    is_op,
    made_by,
    scalar,
    static_shape,
)
from sparsegraph.rewrite import Builder, Decline, RewritePass, decline

_SIZES_ARE_INPUT = 13


@dataclass(frozen=True)
class Found:
    """A node that reads a sequence, what makes that, and the elements to take."""

    node: ir.Node
    maker: ir.Node
    elements: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class ExpandSequences(RewritePass):
    """Elements of sequences that are known when the graph is read."""

    name: ClassVar[str] = "expand_sequences"

    def match(self, node: ir.Node, graph: ir.Graph) -> Found | Decline | None:
        """A node that takes one element, or joins all."""
        if not is_op(node, "SequenceAt", "ConcatFromSequence"):
            return None
        maker = made_by(node.inputs[0], "SplitToSequence", "SequenceConstruct")
        if maker is None:
            return decline(node, "its sequence is neither split nor constructed")
        sizes = _sizes(maker)
        if sizes is None:
            return decline(node, "the parts of its sequence are not known")
        if _is_ambiguous(maker):
            return decline(node, "its parts are to lose their axis, and ONNX says not")
        if is_op(node, "ConcatFromSequence"):
            return Found(node, maker, tuple(range(len(sizes))), sizes)
        position = scalar(node.inputs[1])
        if position is None:
            return decline(node, "its position is computed")
        if not -len(sizes) <= position < len(sizes):
            return decline(node, f"position {position:.0f} of {len(sizes)}")
        return Found(node, maker, (int(position) % len(sizes),), sizes)

    def rewrite(self, found: Found, build: Builder) -> Sequence[ir.Value]:
        """The element, or all of them joined."""
        values = _elements(found, build)
        node = found.node
        if is_op(node, "SequenceAt"):
            return values
        axis = int_attribute(node, "axis", 0)
        if int_attribute(node, "new_axis", 0):
            values = [_reshaped(v, _inserted(v, axis), build) for v in values]
        return [build.op("Concat", values, {"axis": axis})]


def _sizes(maker: ir.Node) -> tuple[int, ...] | None:
    """Extents of the elements along the axis; of constructed sequences their number counts."""
    shapes = [static_shape(value) for value in maker.inputs]
    if is_op(maker, "SequenceConstruct"):
        return None if any(s is None or 0 in s for s in shapes) else (0,) * len(shapes)
    shape = shapes[0]
    if not shape or 0 in shape:
        return None
    extent = shape[int_attribute(maker, "axis", 0)]
    split = input_at(maker, 1)
    if split is None:
        return (1,) * extent
    parts, array = integers(split), constant(split)
    if parts is None or array is None:
        return None
    if array.ndim:
        return parts if sum(parts) == extent and min(parts) > 0 else None
    (part,) = parts
    if part <= 0:
        return None
    whole, rest = divmod(extent, part)
    return (part,) * whole + ((rest,) if rest else ())


def _is_ambiguous(maker: ir.Node) -> bool:
    """True where ONNX Runtime heeds keepdims=0, which ONNX ignores beside `split`."""
    split = input_at(maker, 1) if is_op(maker, "SplitToSequence") else None
    return (
        split is not None and static_shape(split) == () and not int_attribute(maker, "keepdims", 1)
    )


def _elements(found: Found, build: Builder) -> list[ir.Value]:
    maker = found.maker
    if is_op(maker, "SequenceConstruct"):
        values = [maker.inputs[i] for i in found.elements]
        return [v for v in values if v is not None]
    x = maker.inputs[0]
    shape = static_shape(x)
    assert x is not None
    assert shape is not None
    axis = int_attribute(maker, "axis", 0) % len(shape)
    outputs = _split(x, axis, found.sizes, build)
    is_kept = int_attribute(maker, "keepdims", 1) or input_at(maker, 1) is not None
    parts = [outputs[i] for i in found.elements]
    if is_kept:
        return parts
    return [_reshaped(v, (*shape[:axis], *shape[axis + 1 :]), build) for v in parts]


def _split(x: ir.Value, axis: int, sizes: tuple[int, ...], build: Builder) -> Sequence[ir.Value]:
    attributes: dict[str, int | list[int]] = {"axis": axis}
    inputs: list[ir.Value] = [x]
    if build.graph.opset_imports.get("", 0) < _SIZES_ARE_INPUT:
        attributes["split"] = list(sizes)
    else:
        inputs.append(build.constant(np.array(sizes, np.int64), f"{build.hint}_parts"))
    node = ir.node("Split", inputs, attributes=attributes, num_outputs=len(sizes))
    node.name = build.unique(f"{build.hint}/Split")
    shape = static_shape(x)
    assert shape is not None
    for value, size in zip(node.outputs, sizes, strict=True):
        value.name = build.unique(f"{build.hint}_part")
        value.type = x.type
        value.shape = ir.Shape((*shape[:axis], size, *shape[axis + 1 :]))
    build.nodes.append(node)
    return node.outputs


def _inserted(value: ir.Value, axis: int) -> tuple[int, ...]:
    shape = static_shape(value)
    assert shape is not None
    at = axis % (len(shape) + 1)
    return (*shape[:at], 1, *shape[at:])


def _reshaped(value: ir.Value, shape: tuple[int, ...], build: Builder) -> ir.Value:
    size = build.constant(np.array(shape, np.int64), f"{build.hint}_shape")
    return build.op("Reshape", [value, size], like=value, shape=shape)
