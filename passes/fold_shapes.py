"""Replace what depends only on the shape or dtype of a value, which are known.

    n = Shape(x)              ->  n = {1, 128, 384}           (x: float[1,128,384])
    y = CastLike(c, x)        ->  y = Cast<to=FLOAT>(c)

Shape, Size and CastLike. `fold_constants` then evaluates what follows.

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
class Casting:
    """A CastLike whose target dtype is known."""

    source: ir.Value
    dtype: ir.DataType
    output: ir.Value


@dataclass(frozen=True)
class FoldShapes(RewritePass):
    """Shape and dtype arithmetic starts here."""

    name: ClassVar[str] = "fold_shapes"

    def match(self, node: ir.Node, graph: ir.Graph) -> np.ndarray | Casting | Decline | None:
        """The number that the node yields, or the cast that it is."""
        if is_op(node, "CastLike"):
            source, like = node.inputs
            if source is None or like is None or like.dtype is None:
                return None
            return Casting(source, like.dtype, node.outputs[0])
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

    def rewrite(self, found: np.ndarray | Casting, build: Builder) -> Sequence[ir.Value]:
        """One small initializer, or one Cast."""
        if isinstance(found, Casting):
            to = {"to": int(found.dtype)}
            return [build.op("Cast", [found.source], to, like=found.output)]
        return [build.constant(found, f"{build.hint}_value")]
