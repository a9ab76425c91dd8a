"""Turn every change of shape that moves no data into one Reshape with a constant shape.

    a = Unsqueeze(x, {0}); b = Flatten(a); y = Reshape(b, {2, -1})     ->  y = Reshape(x, {2, 6})

Reshape, Flatten, Squeeze, Unsqueeze, and a Transpose that moves axes of size 1 only.

Declines when: a shape is unknown or has a zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sparsegraph.graph import (
    integers,
    ints_attribute,
    is_op,
    made_by,
    static_shape,
)
from sparsegraph.rewrite import Builder, Decline, RewritePass, decline

_RESHAPES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")


@dataclass(frozen=True)
class Found:
    """What the chain starts from, and the shape it ends with."""

    source: ir.Value
    shape: tuple[int, ...]
    output: ir.Value


@dataclass(frozen=True)
class MergeReshapes(RewritePass):
    """Canonical, merged reshapes."""

    name: ClassVar[str] = "merge_reshapes"

    def match(self, node: ir.Node, graph: ir.Graph) -> Found | Decline | None:
        """A chain of reshapes, or one that is not in canonical form."""
        if not _moves_nothing(node):
            return None
        out = node.outputs[0]
        shape, source = static_shape(out), node.inputs[0]
        if shape is None or static_shape(source) is None:
            return decline(node, "a shape depends on the data")
        if 0 in shape:
            return decline(node, "an axis has size 0")
        assert source is not None
        before = source.producer()
        chained = before is not None and _moves_nothing(before)
        if chained and before is not None and before.inputs[0] is not None:
            source = before.inputs[0]
        canonical = is_op(node, "Reshape") and integers(node.inputs[1]) == shape
        if static_shape(source) is None or (canonical and not chained):
            return None
        return Found(source, shape, out)

    def rewrite(self, found: Found, build: Builder) -> Sequence[ir.Value]:
        """One Reshape, or nothing when the chain ends where it started."""
        if static_shape(found.source) == found.shape:
            return [found.source]
        target = build.constant(np.array(found.shape, np.int64), f"{build.hint}_shape")
        return [build.op("Reshape", [found.source, target], like=found.output)]


def _moves_nothing(node: ir.Node) -> bool:
    if is_op(node, *_RESHAPES):
        return True
    return is_op(node, "Transpose") and _only_ones_move(node)


def _only_ones_move(node: ir.Node) -> bool:
    shape = static_shape(node.inputs[0])
    if shape is None:
        return False
    perm = ints_attribute(node, "perm") or tuple(reversed(range(len(shape))))
    moved = [axis for axis in perm if shape[axis] != 1]
    return moved == sorted(moved) and made_by(node.inputs[0], "Transpose") is None
