"""Move a per-channel multiply and add into the constants of the linear op before it."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from sparsegraph.graph import (
    attribute,
    constant,
    float_attribute,
    has_one_use,
    input_at,
    int_attribute,
    is_op,
    static_shape,
)
from sparsegraph.rewrite import Builder

LINEAR_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True)
class Affine:
    """y = linear(x) * scale + shift, both float64 of shape [channels]."""

    linear: ir.Node
    scale: np.ndarray
    shift: np.ndarray
    output: ir.Value


def channels(node: ir.Node) -> tuple[int, int] | None:
    """Axis and size of the output channels of a linear op, or None when unknown."""
    shape = static_shape(node.outputs[0])
    if shape is None or not is_op(node, *LINEAR_OPS):
        return None
    axis = 1 if is_op(node, "Conv", "ConvTranspose") else len(shape) - 1
    return (axis, shape[axis]) if axis < len(shape) and len(shape) > 1 else None


def per_channel(value: ir.Value | None, output: ir.Value, axis: int) -> np.ndarray | None:
    """A constant as float64 [channels] if it varies along `axis` of the output only, else None."""
    array = constant(value)
    shape = static_shape(output)
    if array is None or shape is None or array.ndim > len(shape) or array.dtype.kind != "f":
        return None
    full = (1,) * (len(shape) - array.ndim) + array.shape
    if any(size != 1 for i, size in enumerate(full) if i != axis):
        return None
    if full[axis] not in (1, shape[axis]):
        return None
    return np.broadcast_to(array.reshape(-1).astype(np.float64), (shape[axis],))


def obstacle(node: ir.Node, affine: Affine) -> str:
    """Why the affine step cannot move into this node; empty when it can."""
    weight, bias = input_at(node, 1), input_at(node, 2)
    if constant(weight) is None:
        return "the weight is not constant"
    if bias is not None and constant(bias) is None:
        return "the bias is not constant"
    if not has_one_use(node.outputs[0]):
        return "its input has other users"
    shifts = bool(np.any(affine.shift))
    scales = bool(np.any(affine.scale != 1.0))
    assert weight is not None
    if scales and len(weight.consumers()) > 1:
        return "the weight is shared with another node"
    if shifts and is_op(node, "MatMul"):
        return "a MatMul has no bias to hold the shift"
    if not (np.isfinite(affine.scale).all() and np.isfinite(affine.shift).all()):
        return "the constant is not finite"
    return ""


def absorb(affine: Affine, build: Builder) -> ir.Value:
    """The linear op with its constants changed; exact zeros of the weight stay zeros."""
    node = affine.linear
    inputs = list(node.inputs)
    attributes = {name: attr.value for name, attr in node.attributes.items()}
    if np.any(affine.scale != 1.0):
        inputs[1] = _scaled_weight(node, affine.scale, build)
    if np.any(affine.shift) or (input_at(node, 2) is not None and np.any(affine.scale != 1.0)):
        inputs = [*inputs[:2], _shifted_bias(node, affine, build)]
        if is_op(node, "Gemm"):
            attributes["beta"] = 1.0
    return build.op(node.op_type, inputs, attributes, like=affine.output)


def _scaled_weight(node: ir.Node, scale: np.ndarray, build: Builder) -> ir.Value:
    value = node.inputs[1]
    weight = constant(value)
    assert weight is not None
    assert value is not None
    if is_op(node, "Conv"):
        factor = scale.reshape(-1, *[1] * (weight.ndim - 1))
    elif is_op(node, "ConvTranspose"):
        groups = int_attribute(node, "group", 1)
        rows = weight.shape[0] // groups
        factor = np.repeat(scale.reshape(groups, -1), rows, axis=0)
        factor = factor.reshape(*factor.shape, *[1] * (weight.ndim - 2))
    elif is_op(node, "Gemm") and int_attribute(node, "transB", 0):
        factor = scale[:, None]
    else:
        factor = scale
    scaled = (weight.astype(np.float64) * factor).astype(weight.dtype)
    return build.constant(scaled, f"{value.name}_scaled", value)


def _shifted_bias(node: ir.Node, affine: Affine, build: Builder) -> ir.Value:
    value, weight = input_at(node, 2), constant(node.inputs[1])
    assert weight is not None
    bias = constant(value)
    old = np.zeros(1) if bias is None else bias.astype(np.float64)
    if is_op(node, "Gemm"):
        old = old * float_attribute(node, "beta", 1.0)
    name = f"{build.hint}_bias" if value is None else f"{value.name}_shifted"
    new = (old * affine.scale + affine.shift).astype(weight.dtype)
    return build.constant(new, name, value)


def auto_pad(node: ir.Node) -> str:
    """The auto_pad attribute of a convolution or pool as text."""
    return str(attribute(node, "auto_pad", "NOTSET"))
