"""Recognise group normalisation written as instance normalisation of reshaped maps.

    r = Reshape(x, [n, g, -1]); i = InstanceNormalization(r, s, t); b = Reshape(i, shape of x)
    m = Mul(b, gamma); y = Add(m, beta)
        ->  y = GroupNormalization<num_groups=g>(x, s * gamma, t * gamma + beta)

Scale and bias of either norm are constants, one per group or channel. This is how torch exports
nn.GroupNorm.

Declines when: groups are not whole channels of one image, scale or bias are not constant or not
per channel, or the opset is below 21 (scales per group).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sparsegraph.graph import constant, has_one_use, is_op, made_by, opset_of, static_shape
from sparsegraph.rewrite import Builder, Decline, RewritePass, decline


@dataclass(frozen=True)
class Core:
    """The source and its groups, with scale and bias per channel."""

    source: ir.Value
    n_groups: int
    epsilon: float
    scale: np.ndarray
    bias: np.ndarray
    norm: ir.Node
    output: ir.Value


@dataclass(frozen=True)
class Step:
    """A GroupNormalization followed by a constant that joins its scale and bias."""

    norm: ir.Node
    scale: np.ndarray
    bias: np.ndarray
    constant: ir.Value
    output: ir.Value


@dataclass(frozen=True)
class FuseGroupNorm(RewritePass):
    """GroupNormalization from its definition, then scale and bias one after the other."""

    name: ClassVar[str] = "fuse_group_norm"

    def match(self, node: ir.Node, graph: ir.Graph) -> Core | Step | Decline | None:
        """The second Reshape, or an affine step after a norm."""
        if is_op(node, "Reshape"):
            return _match_core(node)
        return _match_step(node) if is_op(node, "Mul", "Add") else None

    def rewrite(self, found: Core | Step, build: Builder) -> Sequence[ir.Value]:
        """One GroupNormalization."""
        if isinstance(found, Core):
            sources: list[ir.Value | None] = list(found.norm.inputs[1:])
            data: ir.Value | None = found.source
            attributes = {"num_groups": found.n_groups, "epsilon": found.epsilon}
        else:
            sources, data = [found.constant], found.norm.inputs[0]
            attributes = {name: attr.value for name, attr in found.norm.attributes.items()}
        scale = build.constant(found.scale, f"{build.hint}_scale", *sources)
        bias = build.constant(found.bias, f"{build.hint}_bias", *sources)
        return [build.op("GroupNormalization", [data, scale, bias], attributes, like=found.output)]


def _match_core(node: ir.Node) -> Core | Decline | None:
    norm = made_by(node.inputs[0], "InstanceNormalization")
    split = made_by(norm.inputs[0], "Reshape") if norm is not None else None
    if norm is None or split is None:
        return None
    source = split.inputs[0]
    shape, grouped = static_shape(source), static_shape(split.outputs[0])
    if source is None or shape is None or grouped is None:
        return None
    if shape != static_shape(node.outputs[0]) or len(shape) < 3:
        return decline(node, "the maps do not get their shape back")
    if shape[0] != grouped[0] or shape[1] % grouped[1]:
        return decline(node, f"{shape} as {grouped} are no groups of whole channels")
    if not has_one_use(norm.outputs[0]):
        return decline(node, "the normalised value has other users")
    scale, bias = constant(norm.inputs[1]), constant(norm.inputs[2])
    if scale is None or bias is None:
        return decline(node, "scale or bias of the norm is not constant")
    if opset_of(node) < 21:
        return decline(node, f"opset {opset_of(node)} has no scale per channel, 21 has")
    size = shape[1] // grouped[1]
    epsilon = norm.attributes.get_float("epsilon", 1e-5)
    vectors = np.repeat(scale, size), np.repeat(bias, size)
    return Core(source, grouped[1], epsilon, *vectors, norm, node.outputs[0])


def _match_step(node: ir.Node) -> Step | Decline | None:
    for side in (0, 1):
        norm, value = made_by(node.inputs[side], "GroupNormalization"), node.inputs[1 - side]
        if norm is None or value is None or constant(value) is None:
            continue
        if not has_one_use(norm.outputs[0]):
            return decline(node, "the normalised value has other users")
        scale, bias = constant(norm.inputs[1]), constant(norm.inputs[2])
        if scale is None or bias is None:
            return decline(node, "scale or bias of the norm is not constant")
        factor = _per_channel(value, node.outputs[0])
        if factor is None or node.outputs[0].shape != norm.outputs[0].shape:
            return decline(node, "the constant is not one per channel")
        is_scale = is_op(node, "Mul")
        moved = (bias * factor if is_scale else bias + factor).astype(bias.dtype)
        scaled = (scale * factor).astype(scale.dtype) if is_scale else scale
        return Step(norm, scaled, moved, value, node.outputs[0])
    return None


def _per_channel(value: ir.Value, output: ir.Value) -> np.ndarray | None:
    """The constant broadcast to [channels], or None when it does not fit."""
    array, shape = constant(value), static_shape(output)
    assert array is not None
    if shape is None or array.ndim > len(shape):
        return None
    sizes = (*[1] * (len(shape) - array.ndim), *array.shape)
    if any(size != 1 for at, size in enumerate(sizes) if at != 1):
        return None
    return np.array(np.broadcast_to(array.ravel(), (shape[1],)))
