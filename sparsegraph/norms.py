"""How exporters write normalisation out: a quotient by the root of a mean of squares.

Shared by the passes that recognise LayerNormalization and RMSNormalization.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sparsegraph.graph import (
    constant,
    input_at,
    int_attribute,
    integers,
    ints_attribute,
    is_op,
    made_by,
    scalar,
)


def quotients(node: ir.Node) -> list[tuple[ir.Value | None, ir.Value | None]]:
    """Pairs (numerator, square of the denominator) that a Div or Mul may be the quotient of."""
    first, second = node.inputs[0], node.inputs[1]
    if is_op(node, "Div"):
        return [(first, root_of(second))]
    return [(first, inverse_root_of(second)), (second, inverse_root_of(first))]


def root_of(value: ir.Value | None) -> ir.Value | None:
    """What the value is the square root of."""
    node = made_by(value, "Sqrt", "Pow")
    if node is None or (is_op(node, "Pow") and scalar(node.inputs[1]) != 0.5):
        return None
    return node.inputs[0]


def inverse_root_of(value: ir.Value | None) -> ir.Value | None:
    """What the value is one over the square root of."""
    node = made_by(value, "Reciprocal", "Div", "Pow")
    if node is None:
        return None
    if is_op(node, "Pow"):
        return node.inputs[0] if scalar(node.inputs[1]) == -0.5 else None
    if is_op(node, "Div") and scalar(node.inputs[0]) != 1.0:
        return None
    return root_of(node.inputs[-1])


def mean_and_epsilon(value: ir.Value | None) -> tuple[ir.Node, float | None] | None:
    """The ReduceMean and what is added to it, None for no constant number."""
    add = made_by(value, "Add")
    if add is None:
        return None
    for side in (0, 1):
        mean = made_by(add.inputs[side], "ReduceMean")
        if mean is not None:
            return mean, scalar(add.inputs[1 - side])
    return None


def squared(value: ir.Value | None) -> tuple[ir.Value | None, ...] | None:
    """The operands of a square, v * v or v ** 2: both of them, or the one."""
    node = made_by(value, "Mul", "Pow")
    if node is None:
        return None
    if is_op(node, "Pow"):
        return (node.inputs[0],) if scalar(node.inputs[1]) == 2.0 else None
    return tuple(node.inputs)


def reduced_axes(mean: ir.Node) -> tuple[int, ...] | None:
    """Reduced axes counted from the front; None when unknown or the axes are dropped."""
    rank = len(mean.inputs[0].shape or ()) if mean.inputs[0] is not None else 0
    operand = input_at(mean, 1)
    axes = integers(operand) if operand is not None else ints_attribute(mean, "axes")
    if axes is None or not int_attribute(mean, "keepdims", 1) or not rank:
        return None
    return tuple(sorted(a % rank for a in axes))


def trailing(value: ir.Value, shape: tuple[int, ...], output: ir.Value) -> np.ndarray | None:
    """A constant broadcast to the shape of a norm's scale, or None when it does not fit."""
    array = constant(value)
    assert array is not None
    if array.ndim > len(output.shape or ()) or any(s != 1 for s in array.shape[: -len(shape)]):
        return None
    last = array.reshape(array.shape[-len(shape) :]) if array.ndim else array
    return np.array(np.broadcast_to(last, shape))
