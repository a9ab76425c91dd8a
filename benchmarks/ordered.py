"""A model in float32 whose products are summed in the order of the channels, one by one.

Zeros then change nothing, wherever they stand in a sum: removing what is zero leaves every bit as
it was. Runtimes sum in blocks, whose borders move when channels go, so that they round differently.
What is left here of the distance between two models is not due to the order of sums.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx.reference.op_run import OpRun

from sparsegraph import double
from sparsegraph.verify import Feed, Outputs

Array = NDArray[np.float32]


def run(model: ir.Model, feed: Feed) -> Outputs:
    """Outputs by name. Raises UnsupportedError where the evaluator lacks an operator."""
    own = {op.__name__: op for op in double.OPERATORS} | {op.__name__: op for op in (Conv, MatMul)}
    return double.evaluate(ir.to_proto(model), feed, list(own.values()))


def product(a: Array, b: Array) -> Array:
    """[..., m, k] times [..., k, n], every element summed over k from the first to the last."""
    total = a[..., :1] * b[..., :1, :]
    for k in range(1, a.shape[-1]):
        total = total + a[..., k, None] * b[..., k, None, :]
    return total


class Conv(double.Conv):
    """One product per kernel tap."""

    @staticmethod
    def product(taps: Array, parts: Array) -> Array:
        """Products of matrices, one term after the other."""
        return product(taps, parts)


class MatMul(OpRun):
    """A product of matrices, or of stacks of them."""

    op_domain = ""

    def _run(self, a: Array, b: Array) -> tuple[Array]:
        return (product(a, b),)
