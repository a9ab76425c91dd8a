"""Drop the reshapes around a softmax over the last axis.

    a = Reshape(x, {24,8}); b = Softmax<axis=-1>(a); y = Reshape(b, {2,12,8})
        ->  y = Softmax<axis=-1>(x)                                     (x: float[2,12,8])

Softmax before opset 13 flattened its input; converters write that out.

Declines when: never; a softmax over another axis, or one that a reshape splits, stays as it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sparsegraph.graph import has_one_use, int_attribute, is_op, made_by, static_shape
from sparsegraph.rewrite import Builder, RewritePass


@dataclass(frozen=True)
class Found:
    """The operand of the first reshape, the softmax between, and the result of the second."""

    source: ir.Value
    softmax: ir.Node
    output: ir.Value


@dataclass(frozen=True)
class UnflattenSoftmax(RewritePass):
    """Softmax and LogSoftmax in the shape of their surroundings."""

    name: ClassVar[str] = "unflatten_softmax"

    def match(self, node: ir.Node, graph: ir.Graph) -> Found | None:
        """Reshape of Softmax of Reshape, with the last axis untouched and the same outer shape."""
        if not is_op(node, "Reshape"):
            return None
        softmax = made_by(node.inputs[0], "Softmax", "LogSoftmax")
        before = None if softmax is None else made_by(softmax.inputs[0], "Reshape")
        if softmax is None or before is None or not has_one_use(softmax.outputs[0]):
            return None
        source = before.inputs[0]
        shapes = [static_shape(v) for v in (source, softmax.outputs[0], node.outputs[0])]
        outer, inner, after = shapes
        if source is None or outer is None or inner is None or outer != after:
            return None
        if not inner or not outer or inner[-1] != outer[-1]:
            return None
        if int_attribute(softmax, "axis", -1) % len(inner) != len(inner) - 1:
            return None
        return Found(source, softmax, node.outputs[0])

    def rewrite(self, found: Found, build: Builder) -> Sequence[ir.Value]:
        """The softmax alone."""
        op_type = found.softmax.op_type
        return [build.op(op_type, [found.source], {"axis": -1}, like=found.output)]
