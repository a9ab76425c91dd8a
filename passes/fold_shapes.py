"""Replace Shape and Size of a value with a known shape by the number.

    n = Shape(x)        ->  n = {1, 128, 384}     (x: float[1,128,384])

Declines when: the shape depends on the data (behind NonZero and its like).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sparsegraph.graph import int_attribute, is_op, static_shape
from sparsegraph.rewrite import Builder, Decline, RewritePass, decline


@dataclass(frozen=True)
class FoldShapes(RewritePass):
    """Shape arithmetic starts here; `fold_constants` then evaluates what follows."""

    name: ClassVar[str] = "fold_shapes"

    def match(self, node: ir.Node, graph: ir.Graph) -> np.ndarray | Decline | None:
        """The value of the node."""
        if not is_op(node, "Shape", "Size"):
            return None
        shape = static_shape(node.inputs[0])
        if shape is None:
            return decline(node, "the shape of its input depends on the data")
        if node.op_type == "Size":
            return np.array(int(np.prod(shape, dtype=np.int64)), np.int64)
        start = int_attribute(node, "start", 0)
        end = int_attribute(node, "end", len(shape))
        return np.array(shape[start:end], np.int64)

    def rewrite(self, found: np.ndarray, build: Builder) -> Sequence[ir.Value]:
        """One small initializer."""
        return [build.constant(found, f"{build.hint}_value")]
