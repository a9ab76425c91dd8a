"""Recognise layer normalisation written as mean, difference, variance, quotient.

    m = ReduceMean(x, {-1}); d = Sub(x, m); v = ReduceMean(d * d, {-1})
    q = Div(d, Sqrt(v + eps)); s = Mul(q, gamma); y = Add(s, beta)
        ->  y = LayerNormalization<axis=-1, epsilon=eps>(x, gamma, beta)

The square may be Pow or Mul, the quotient Div or Mul by Reciprocal; scale and bias may be missing.
An Add before it (a residual) stays its own node.

Declines when: the axes are not the last ones (channels of an NCHW map), the means are not over the
same axes, or the opset is below 17.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sparsegraph.graph import (
    constant,
    has_one_use,
    input_at,
    is_op,
    made_by,
    opset_of,
    static_shape,
)
from sparsegraph.norms import (
    mean_and_epsilon,
    quotients,
    reduced_axes,
    squared,
    trailing,
)
from sparsegraph.rewrite import Builder, Decline, RewritePass, decline


@dataclass(frozen=True)
class Core:
    """The quotient: source normalised over its last axes."""

    source: ir.Value
    axis: int
    epsilon: float
    output: ir.Value


@dataclass(frozen=True)
class Step:
    """A LayerNormalization followed by a constant that becomes its scale or bias."""

    norm: ir.Node
    scale: np.ndarray | None
    bias: np.ndarray | None
    constant: ir.Value
    output: ir.Value


@dataclass(frozen=True)
class FuseLayerNorm(RewritePass):
    """LayerNormalization from its definition, then scale and bias one after the other."""

    name: ClassVar[str] = "fuse_layer_norm"

    def match(self, node: ir.Node, graph: ir.Graph) -> Core | Step | Decline | None:
        """The quotient of a norm, or an affine step after one."""
        if is_op(node, "Div", "Mul"):
            core = _match_core(node)
            if core is not None:
                return core
        return _match_step(node) if is_op(node, "Mul", "Add") else None

    def rewrite(self, found: Core | Step, build: Builder) -> Sequence[ir.Value]:
        """One LayerNormalization."""
        if isinstance(found, Core):
            return [_normalised(found, build)]
        return [_with_step(found, build)]


def _match_core(node: ir.Node) -> Core | Decline | None:
    for difference, square in quotients(node):
        centre, variance = made_by(difference, "Sub"), mean_and_epsilon(square)
        if centre is None or variance is None or centre.inputs[0] is None:
            continue
        mean_of_squares, epsilon = variance
        if epsilon is None or not _is_square_of(mean_of_squares.inputs[0], centre):
            continue
        mean = made_by(centre.inputs[1], "ReduceMean")
        source = centre.inputs[0]
        if mean is None or mean.inputs[0] is not source:
            continue
        axes = reduced_axes(mean)
        rank = len(source.shape or ())
        if axes is None or axes != reduced_axes(mean_of_squares):
            return decline(node, "mean and variance are over different axes")
        if axes != tuple(range(rank - len(axes), rank)):
            return decline(node, f"axes {list(axes)} are not the last of {rank}")
        if opset_of(node) < 17:
            return decline(node, f"opset {opset_of(node)} has no LayerNormalization, 17 has")
        return Core(source, axes[0], epsilon, node.outputs[0])
    return None


def _is_square_of(value: ir.Value | None, centre: ir.Node) -> bool:
    """True for d*d or d**2, where d is the same difference (or an equal Sub node)."""
    operands = squared(value)
    return operands is not None and all(_is_same(made_by(v, "Sub"), centre) for v in operands)


def _is_same(node: ir.Node | None, other: ir.Node) -> bool:
    return node is not None and (node is other or list(node.inputs) == list(other.inputs))


def _normalised(found: Core, build: Builder) -> ir.Value:
    shape = static_shape(found.source)
    assert shape is not None
    assert found.source.dtype is not None
    ones = np.ones(shape[found.axis :], found.source.dtype.numpy())
    scale = build.constant(ones, f"{build.hint}_scale")
    attributes = {"axis": found.axis - len(shape), "epsilon": found.epsilon}
    return build.op("LayerNormalization", [found.source, scale], attributes, like=found.output)


def _match_step(node: ir.Node) -> Step | Decline | None:
    for side in (0, 1):
        norm = made_by(node.inputs[side], "LayerNormalization")
        value = node.inputs[1 - side]
        if norm is None or value is None or constant(value) is None:
            continue
        if not has_one_use(norm.outputs[0]):
            return decline(node, "the normalised value has other users")
        scale, bias = constant(norm.inputs[1]), constant(input_at(norm, 2))
        if scale is None or (bias is None and input_at(norm, 2) is not None):
            return decline(node, "scale or bias of the norm is not constant")
        factor = trailing(value, scale.shape, node.outputs[0])
        if factor is None or node.outputs[0].shape != norm.outputs[0].shape:
            return decline(node, "the constant varies along another axis than the normalised")
        if is_op(node, "Mul"):
            scaled = None if bias is None else (bias * factor).astype(bias.dtype)
            return Step(norm, (scale * factor).astype(scale.dtype), scaled, value, node.outputs[0])
        moved = factor if bias is None else (bias + factor).astype(bias.dtype)
        return Step(norm, None, moved, value, node.outputs[0])
    return None


def _with_step(found: Step, build: Builder) -> ir.Value:
    norm = found.norm
    scale, bias = norm.inputs[1], input_at(norm, 2)
    if found.scale is not None:
        source = found.constant if bool(np.all(constant(scale) == 1)) else scale
        scale = build.constant(found.scale, _name(found.constant, build, "scale"), source)
    if found.bias is not None:
        bias = build.constant(found.bias, _name(found.constant, build, "bias"), found.constant)
    attributes = {name: attr.value for name, attr in norm.attributes.items()}
    inputs = [norm.inputs[0], scale] + ([bias] if bias is not None else [])
    return build.op("LayerNormalization", inputs, attributes, like=found.output)


def _name(value: ir.Value, build: Builder, role: str) -> str:
    return f"{value.name}_{role}" if value.name else f"{build.hint}_{role}"
