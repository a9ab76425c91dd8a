"""Remove nodes whose output is their input.

    a = Identity(x); b = Cast<to=1>(a); c = Mul(b, {1.0}); y = Relu(c)        ->  y = Relu(x)

Identity, inference-mode Dropout, Cast to the same dtype, Reshape / Expand / Slice / Pad / Flatten
to the same shape, Transpose in order, Concat / Sum / Max / Min / Mean of one, Concat of one and
others without elements (a roll by nothing), MaxPool and AveragePool of single points, Split into
one, Clip without bounds, Where with a constant condition that is the same everywhere, and x*1, x/1,
x**1, x+0, x-0 with constants that are exactly 1 or 0: an epsilon is no zero, whatever its size.

Declines when: the constant's or condition's shape, or the dtype, would change the result's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sparsegraph.graph import (
    constant,
    input_at,
    integers,
    ints_attribute,
    is_op,
    is_random,
    is_used,
    opset_of,
    static_shape,
)
from sparsegraph.rewrite import Builder, Decline, RewritePass, decline

_NEUTRAL = {"Mul": 1.0, "Div": 1.0, "Pow": 1.0, "Add": 0.0, "Sub": 0.0}
_SAME_SHAPE_IS_SAME = ("Reshape", "Expand", "Flatten", "Squeeze", "Unsqueeze")
_OF_ONE = ("Sum", "Max", "Min", "Mean")


@dataclass(frozen=True)
class RemoveIdentity(RewritePass):
    """No-op removal."""

    name: ClassVar[str] = "remove_identity"

    def match(self, node: ir.Node, graph: ir.Graph) -> ir.Value | Decline | None:
        """The input that the node passes on."""
        if node.domain not in ("", "ai.onnx") or not node.inputs or node.inputs[0] is None:
            return None
        kept = _passed_on(node)
        if not isinstance(kept, ir.Value):
            return kept
        return None if _names_an_output(node, kept) else kept

    def rewrite(self, found: ir.Value, build: Builder) -> Sequence[ir.Value]:
        """Nothing new."""
        return [found]


def _passed_on(node: ir.Node) -> ir.Value | Decline | None:
    first = node.inputs[0]
    assert first is not None
    if node.op_type in _NEUTRAL:
        return _neutral(node)
    if node.op_type == "Where":
        return _chosen(node)
    if node.op_type == "Concat":
        full = [v for v in node.inputs if v is not None and 0 not in (static_shape(v) or ())]
        kept = full if len(node.inputs) > 1 else [first]
        return kept[0] if len(kept) == 1 else None
    return first if _is_no_op(node, first) else None


def _is_no_op(node: ir.Node, first: ir.Value) -> bool:
    out = node.outputs[0]
    same = static_shape(first) is not None and static_shape(first) == static_shape(out)
    if any(is_used(v) for v in node.outputs[1:]):
        return False
    match node.op_type:
        case "Identity":
            return True
        case "Dropout":
            return not is_random(node) and opset_of(node) >= 7
        case "Cast":
            return first.dtype is not None and first.dtype == out.dtype
        case "Transpose":
            perm = ints_attribute(node, "perm")
            return perm is not None and perm == tuple(range(len(perm)))
        case "Slice":
            steps = integers(input_at(node, 4))
            has_steps = input_at(node, 4) is not None
            return same and (not has_steps or (steps is not None and set(steps) <= {1}))
        case "Pad":
            pads = integers(input_at(node, 1)) or ints_attribute(node, "pads")
            return pads is not None and not any(pads)
        case "MaxPool" | "AveragePool":  # an adaptive pool of maps that have the size already
            window = [*(ints_attribute(node, "kernel_shape") or (0,))]
            return same and {*window, *(ints_attribute(node, "strides") or ())} == {1}
        case "Split":
            return same
        case "Clip":
            limits = [input_at(node, 1), input_at(node, 2)]
            return not any(limits) and not {"min", "max"} & set(node.attributes)
    if node.op_type in _OF_ONE:
        return len(node.inputs) == 1
    return node.op_type in _SAME_SHAPE_IS_SAME and same


def _chosen(node: ir.Node) -> ir.Value | Decline | None:
    """The operand that a condition which is the same everywhere takes."""
    condition = constant(node.inputs[0])
    if condition is None or not condition.size or condition.all() != condition.any():
        return None
    kept = node.inputs[1 if condition.all() else 2]
    if kept is None or constant(kept) is not None:
        return None
    if static_shape(kept) is None or static_shape(kept) != static_shape(node.outputs[0]):
        return decline(node, "what its constant condition takes broadcasts to a larger shape")
    return kept


def _neutral(node: ir.Node) -> ir.Value | Decline | None:
    wanted = _NEUTRAL[node.op_type]
    sides = (0, 1) if node.op_type in ("Mul", "Add") else (1,)
    for side in sides:
        value, other = node.inputs[side], node.inputs[1 - side]
        array = constant(value)
        if array is None or other is None or not array.size or not np.all(array == wanted):
            continue
        if constant(other) is not None:
            return None
        if static_shape(other) is None or static_shape(other) != static_shape(node.outputs[0]):
            return decline(
                node, f"the constant {wanted:g} broadcasts its operand to a larger shape"
            )
        return other
    return None


def _names_an_output(node: ir.Node, kept: ir.Value) -> bool:
    """True for what stands between an input, constant or output and an output's name."""
    if not is_op(node, "Identity") or not node.outputs[0].is_graph_output():
        return False
    return kept.producer() is None or kept.is_graph_output()
