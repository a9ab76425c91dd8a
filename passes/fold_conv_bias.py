"""Fold a constant per-channel Add, Sub, Mul or Div after a convolution into its constants.

    c = Conv(x, w); y = Add(c, b)        ->  y = Conv(x, w, b)         (b: float[C,1,1] or scalar)
    c = Conv(x, w, b); y = Mul(c, s)     ->  y = Conv(x, w * s, b * s)

Also ConvTranspose. Exporters write the bias this way (Paddle: 75 of 83 convolutions).

Declines when: the constant varies along another axis than the channels, the weight or bias is not
constant, a scaled weight is shared, or the convolution's output has another user.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sparsegraph.graph import constant, is_op, made_by, static_shape
from sparsegraph.linear import Affine, absorb, channels, obstacle, per_channel
from sparsegraph.rewrite import Builder, Decline, RewritePass, decline


@dataclass(frozen=True)
class FoldConvBias(RewritePass):
    """Per-channel arithmetic into Conv and ConvTranspose."""

    name: ClassVar[str] = "fold_conv_bias"

    def match(self, node: ir.Node, graph: ir.Graph) -> Affine | Decline | None:
        """The convolution and the arithmetic as scale and shift."""
        return match_affine(node, ("Conv", "ConvTranspose"))

    def rewrite(self, found: Affine, build: Builder) -> Sequence[ir.Value]:
        """The convolution with new constants."""
        return [absorb(found, build)]


def match_affine(node: ir.Node, ops: Sequence[str]) -> Affine | Decline | None:
    """`linear op constant` with one of these linear ops, as an affine step."""
    if not is_op(node, "Add", "Sub", "Mul", "Div"):
        return None
    for side in (0, 1) if is_op(node, "Add", "Mul") else (0,):
        linear, other = made_by(node.inputs[side], *ops), node.inputs[1 - side]
        if linear is None or constant(other) is None:
            continue
        place = channels(linear)
        if place is None or static_shape(linear.outputs[0]) != static_shape(node.outputs[0]):
            return decline(node, "the constant changes the shape of its operand")
        factor = per_channel(other, node.outputs[0], place[0])
        if factor is None:
            return decline(node, "the constant varies along another axis than the channels")
        affine = _affine(node, linear, factor)
        reason = obstacle(linear, affine)
        return decline(node, reason) if reason else affine
    return None


def _affine(node: ir.Node, linear: ir.Node, factor: np.ndarray) -> Affine:
    one, zero, out = np.ones_like(factor), np.zeros_like(factor), node.outputs[0]
    if is_op(node, "Add", "Sub"):
        return Affine(linear, one, factor if is_op(node, "Add") else -factor, out)
    with np.errstate(divide="ignore"):
        return Affine(linear, factor if is_op(node, "Mul") else 1.0 / factor, zero, out)
