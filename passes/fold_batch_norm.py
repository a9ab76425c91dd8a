"""Fold an inference-mode BatchNormalization into the linear op before it.

    c = Conv(x, w); y = BatchNormalization(c, gamma, beta, mean, var)      ->  y = Conv(x, w', b')

Conv, ConvTranspose, Gemm, and MatMul with a constant right operand and two-dimensional output.
w' = w * gamma / sqrt(var + epsilon) in double precision; exact zeros of w stay exact.

Declines when: weight, bias or a statistic is not constant, the weight is shared, the linear output
has another user, or the op runs in training mode. `split_batch_norm` handles what is left.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sparsegraph.graph import constant, float_attribute, int_attribute, is_op, is_used, made_by
from sparsegraph.linear import LINEAR_OPS, Affine, absorb, channels, obstacle
from sparsegraph.rewrite import Builder, Decline, RewritePass, decline


@dataclass(frozen=True)
class FoldBatchNorm(RewritePass):
    """BatchNormalization into Conv, ConvTranspose, Gemm and MatMul."""

    name: ClassVar[str] = "fold_batch_norm"

    def match(self, node: ir.Node, graph: ir.Graph) -> Affine | Decline | None:
        """Scale and shift of the norm with the linear op before it."""
        if not is_op(node, "BatchNormalization"):
            return None
        factors = scale_and_shift(node)
        if isinstance(factors, str):
            return decline(node, factors)
        linear = made_by(node.inputs[0], *LINEAR_OPS)
        if linear is None:
            return None
        place = channels(linear)
        if place is None or place[0] != 1:
            return decline(node, "it does not normalise the channels of the linear op")
        affine = Affine(linear, *factors, node.outputs[0])
        if is_op(linear, "MatMul"):
            return _as_gemm(node, affine)
        reason = obstacle(linear, affine)
        return decline(node, reason) if reason else affine

    def rewrite(self, found: Affine, build: Builder) -> Sequence[ir.Value]:
        """The linear op with new constants; a MatMul keeps its shift as an Add."""
        if not is_op(found.linear, "MatMul"):
            return [absorb(found, build)]
        weight = constant(found.linear.inputs[1])
        assert weight is not None
        product = absorb(Affine(found.linear, found.scale, found.shift * 0, found.output), build)
        shift = build.constant(found.shift.astype(weight.dtype), f"{build.hint}_bias")
        return [build.op("Add", [product, shift], like=found.output)]


def scale_and_shift(node: ir.Node) -> tuple[np.ndarray, np.ndarray] | str:
    """What the norm multiplies by and adds, float64 [channels], or the reason why it is unknown."""
    if int_attribute(node, "training_mode", 0) or any(is_used(v) for v in node.outputs[1:]):
        return "it runs in training mode"
    arrays = [constant(v) for v in node.inputs[1:5]]
    if any(a is None for a in arrays):
        return "its parameters are not constant"
    gamma, beta, mean, variance = (np.asarray(a, np.float64) for a in arrays)
    epsilon = float_attribute(node, "epsilon", 1e-5)
    scale = gamma / np.sqrt(variance + epsilon)
    return scale, beta - mean * scale


def _as_gemm(node: ir.Node, affine: Affine) -> Affine | Decline:
    reason = obstacle(
        affine.linear, Affine(affine.linear, affine.scale, affine.shift * 0, affine.output)
    )
    return decline(node, reason) if reason else affine
