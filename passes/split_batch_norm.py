"""Write a BatchNormalization that could not be folded as a multiply and an add.

    y = BatchNormalization(x, gamma, beta, mean, var)        ->  a = Mul(x, s); y = Add(a, t)

Declines when: a parameter is not constant, it runs in training mode, or the rank is unknown.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from sparsegraph.passes.fold_batch_norm import scale_and_shift

from sparsegraph.graph import is_op, static_shape
from sparsegraph.rewrite import Builder, Decline, RewritePass, decline


@dataclass(frozen=True)
class Found:
    """The operand, and the two factors shaped to broadcast over it."""

    source: ir.Value
    scale: np.ndarray
    shift: np.ndarray
    output: ir.Value


@dataclass(frozen=True)
class SplitBatchNorm(RewritePass):
    """BatchNormalization as element-wise arithmetic, for the kernels' epilogues and prologues."""

    name: ClassVar[str] = "split_batch_norm"

    def match(self, node: ir.Node, graph: ir.Graph) -> Found | Decline | None:
        """The factors as constants of the operand's dtype."""
        if not is_op(node, "BatchNormalization"):
            return None
        factors = scale_and_shift(node)
        if isinstance(factors, str):
            return decline(node, factors)
        source = node.inputs[0]
        shape = static_shape(source)
        if source is None or shape is None or source.dtype is None or len(shape) < 2:
            return decline(node, "the shape of its input is unknown")
        dtype = source.dtype.numpy()
        scale, shift = (f.reshape(-1, *[1] * (len(shape) - 2)).astype(dtype) for f in factors)
        return Found(source, scale, shift, node.outputs[0])

    def rewrite(self, found: Found, build: Builder) -> Sequence[ir.Value]:
        """Mul, then Add."""
        scale = build.constant(found.scale, f"{build.hint}_scale")
        shift = build.constant(found.shift, f"{build.hint}_shift")
        product = build.op("Mul", [found.source, scale], like=found.output)
        return [build.op("Add", [product, shift], like=found.output)]
