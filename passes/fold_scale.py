"""Fold a constant Mul, Div, Add or Sub after a MatMul or Gemm into its constants.

    p = MatMul(x, w); y = Mul(p, s)            ->  y = MatMul(x, w * s)      (s: scalar or [N])
    p = Gemm(x, w, b); y = Add(p, c)           ->  y = Gemm(x, w, b + c)
    p = MatMul(x, w); a = Add(p, b); y = Mul(a, s)  ->  p = MatMul(x, w * s); y = Add(p, b * s)

Declines when: the constant varies along another axis than the last, the weight is shared or not
constant, or the product has another user. An Add after MatMul stays: it is the kernel's bias.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from sparsegraph.passes.fold_conv_bias import match_affine

from sparsegraph.graph import constant, has_one_use, is_op, made_by
from sparsegraph.linear import Affine, absorb, obstacle, per_channel
from sparsegraph.rewrite import Builder, Decline, RewritePass


@dataclass(frozen=True)
class Biased:
    """A scaled product with a bias between them."""

    product: Affine
    bias: ir.Value


@dataclass(frozen=True)
class FoldScale(RewritePass):
    """Constant scales into product weights."""

    name: ClassVar[str] = "fold_scale"

    def match(self, node: ir.Node, graph: ir.Graph) -> Affine | Biased | Decline | None:
        """The product and its scale."""
        product = made_by(node.inputs[0], "MatMul") if is_op(node, "Add", "Sub") else None
        if product is not None or (is_op(node, "Add") and made_by(node.inputs[1], "MatMul")):
            return None
        if is_op(node, "Mul", "Div"):
            biased = _biased(node)
            if biased is not None:
                return biased
        found: Affine | Decline | None = match_affine(node, ("MatMul", "Gemm"))
        return found

    def rewrite(self, found: Affine | Biased, build: Builder) -> Sequence[ir.Value]:
        """The product with new constants, and the scaled bias."""
        if isinstance(found, Affine):
            return [absorb(found, build)]
        array = constant(found.bias)
        assert array is not None
        scaled = (array.astype(np.float64) * found.product.scale).astype(array.dtype)
        bias = build.constant(scaled, f"{found.bias.name}_scaled", found.bias)
        return [build.op("Add", [absorb(found.product, build), bias], like=found.product.output)]


def _biased(node: ir.Node) -> Biased | None:
    for side in (0, 1) if is_op(node, "Mul") else (0,):
        add, other = made_by(node.inputs[side], "Add"), node.inputs[1 - side]
        if add is None or not has_one_use(add.outputs[0]):
            continue
        parts = _product_and_bias(add)
        if parts is None:
            continue
        linear, bias = parts
        axis = len(linear.outputs[0].shape or ()) - 1
        factor = per_channel(other, node.outputs[0], axis)
        if factor is None or per_channel(bias, node.outputs[0], axis) is None:
            continue
        if node.outputs[0].shape != linear.outputs[0].shape:
            continue
        scale = factor if is_op(node, "Mul") else 1.0 / factor
        affine = Affine(linear, scale, np.zeros_like(scale), node.outputs[0])
        if not obstacle(linear, affine):
            return Biased(affine, bias)
    return None


def _product_and_bias(add: ir.Node) -> tuple[ir.Node, ir.Value] | None:
    for side in (0, 1):
        linear, bias = made_by(add.inputs[side], "MatMul"), add.inputs[1 - side]
        if linear is not None and bias is not None and constant(bias) is not None:
            return linear, bias
    return None
