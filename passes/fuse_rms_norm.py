"""Recognise a norm by the root of the mean of squares, as exporters write it out.

    v = ReduceMean(x * x, {-1}); q = Mul(x, Reciprocal(Sqrt(v + eps))); y = Mul(q, gamma)
        ->  y = RMSNormalization<axis=-1, epsilon=eps>(x, gamma)

The square may be Pow or Mul, the quotient Div, or Mul by Reciprocal, by 1 / root or by Pow(-0.5).
The scale may be multiplied to x, to the inverse root or to the quotient, or be missing.

Declines when: the axes are not the last ones, epsilon is not one constant number, the scale varies
along another axis, values are not float32, or the opset is below 23.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sparsegraph.graph import constant, has_one_use, is_op, made_by, opset_of, static_shape
from sparsegraph.norms import (
    inverse_root_of,
    mean_and_epsilon,
    quotients,
    reduced_axes,
    squared,
    trailing,
)
from sparsegraph.rewrite import Builder, Decline, RewritePass, decline

Quotient = tuple[ir.Value | None, ir.Value | None, ir.Value | None]
"""Numerator, square of the denominator, constant factor."""


@dataclass(frozen=True)
class Core:
    """The quotient: source over its root mean square, times a factor if there is one."""

    source: ir.Value
    axis: int
    epsilon: float
    gain: ir.Value | None
    output: ir.Value


@dataclass(frozen=True)
class Step:
    """A RMSNormalization followed by a constant that becomes its scale."""

    norm: ir.Node
    scale: np.ndarray
    constant: ir.Value
    output: ir.Value


@dataclass(frozen=True)
class FuseRmsNorm(RewritePass):
    """RMSNormalization from its definition, then the scale behind it."""

    name: ClassVar[str] = "fuse_rms_norm"

    def match(self, node: ir.Node, graph: ir.Graph) -> Core | Step | Decline | None:
        """The quotient of a norm, or a scale after one."""
        if not is_op(node, "Div", "Mul"):
            return None
        for numerator, square, gain in _quotients(node):
            found = _match_core(node, numerator, square, gain)
            if found is not None:
                return found
        return _match_step(node) if is_op(node, "Mul") else None

    def rewrite(self, found: Core | Step, build: Builder) -> Sequence[ir.Value]:
        """One RMSNormalization."""
        if isinstance(found, Step):
            scale = build.constant(found.scale, f"{found.constant.name}_scale", found.constant)
            attributes = {name: attr.value for name, attr in found.norm.attributes.items()}
            inputs = [found.norm.inputs[0], scale]
            return [build.op("RMSNormalization", inputs, attributes, like=found.output)]
        shape = static_shape(found.source)
        assert shape is not None
        gain = np.ones(shape[found.axis :], np.float32)
        if found.gain is not None:
            factor = trailing(found.gain, gain.shape, found.output)
            assert factor is not None
            gain = gain * factor
        scale = build.constant(gain, f"{build.hint}_scale", *filter(None, [found.gain]))
        attributes = {"axis": found.axis - len(shape), "epsilon": found.epsilon}
        return [build.op("RMSNormalization", [found.source, scale], attributes, like=found.output)]


def _quotients(node: ir.Node) -> Iterator[Quotient]:
    """All ways to read the node as a quotient, with a constant factor inside or without."""
    for numerator, square in quotients(node):
        yield numerator, square, None
        yield from ((x, square, gain) for x, gain in _factors(numerator))
    if is_op(node, "Mul"):
        for at in (0, 1):
            for inverse, gain in _factors(node.inputs[at]):
                yield node.inputs[1 - at], inverse_root_of(inverse), gain


def _factors(value: ir.Value | None) -> Iterator[tuple[ir.Value, ir.Value]]:
    """A product with a constant as (other, constant)."""
    node = made_by(value, "Mul")
    if node is not None:
        for at in (0, 1):
            other, gain = node.inputs[1 - at], node.inputs[at]
            if gain is not None and other is not None and constant(gain) is not None:
                yield other, gain


def _match_core(
    node: ir.Node, source: ir.Value | None, square: ir.Value | None, gain: ir.Value | None
) -> Core | Decline | None:
    found = mean_and_epsilon(square)
    if found is None or source is None:
        return None
    mean, epsilon = found
    operands = squared(mean.inputs[0])
    if operands is None or any(v is not source for v in operands):
        return None
    shape, axes = static_shape(source), reduced_axes(mean)
    if epsilon is None:
        return decline(node, "epsilon is not one constant number")
    if shape is None or axes is None:
        return decline(node, "the axes of the mean are unknown or dropped")
    if axes != tuple(range(len(shape) - len(axes), len(shape))):
        return decline(node, f"axes {list(axes)} are not the last of {len(shape)}")
    if source.dtype != ir.DataType.FLOAT:
        return decline(node, f"values are {source.dtype}, not float32")
    if opset_of(node) < 23:
        return decline(node, f"opset {opset_of(node)} has no RMSNormalization, 23 has")
    output = node.outputs[0]
    fits = gain is None or trailing(gain, shape[axes[0] :], output) is not None
    if not fits or static_shape(output) != shape:
        return decline(node, "the scale varies along another axis than the normalised")
    return Core(source, axes[0], epsilon, gain, output)


def _match_step(node: ir.Node) -> Step | Decline | None:
    for side in (0, 1):
        norm, value = made_by(node.inputs[side], "RMSNormalization"), node.inputs[1 - side]
        if norm is None or value is None or constant(value) is None:
            continue
        if not has_one_use(norm.outputs[0]):
            return decline(node, "the normalised value has other users")
        scale = constant(norm.inputs[1])
        if scale is None:
            return decline(node, "the scale of the norm is not constant")
        factor = trailing(value, scale.shape, node.outputs[0])
        if factor is None or node.outputs[0].shape != norm.outputs[0].shape:
            return decline(node, "the scale varies along another axis than the normalised")
        return Step(norm, (scale * factor).astype(scale.dtype), value, node.outputs[0])
    return None
