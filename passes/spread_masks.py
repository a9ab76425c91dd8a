"""Give the masks of Attention a row per query and a number per key.

    Attention(q, k, v, mask[N, 1, 1, S])  ->  Attention(q, k, v, Expand(mask, [N, 1, L, S]))

ONNX lets a mask be broadcast; ONNX Runtime does so over batch and heads alone and refuses to run
the others, among them what torch writes for `src_key_padding_mask`. `capture` does this to what it
loads; the kernels look through the Expand. Nothing changes but what can be run.

Declines when: an output besides the first is read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sparsegraph.graph import input_at, is_op, is_used, static_shape
from sparsegraph.rewrite import Builder, Decline, RewritePass, decline


@dataclass(frozen=True)
class Found:
    """An Attention and the shape that its mask lacks."""

    node: ir.Node
    shape: tuple[int, ...]


@dataclass(frozen=True)
class SpreadMasks(RewritePass):
    """Expand over queries and keys what ONNX Runtime does not broadcast."""

    name: ClassVar[str] = "spread_masks"

    def match(self, node: ir.Node, graph: ir.Graph) -> Found | Decline | None:
        """An Attention whose mask lacks queries or keys."""
        if not is_op(node, "Attention") or input_at(node, 4) is not None:
            return None
        q, k, mask = (static_shape(input_at(node, i)) for i in (0, 1, 3))
        if q is None or k is None or mask is None or len(mask) < 2:
            return None
        full = (q[-2], k[-2])
        if mask[-2:] == full or any(m not in (1, n) for m, n in zip(mask[-2:], full)):
            return None
        if any(is_used(value) for value in node.outputs[1:]):
            return decline(node, "keys, values or scores are read beside the result")
        return Found(node, (*mask[:-2], *full))

    def rewrite(self, found: Found, build: Builder) -> Sequence[ir.Value]:
        """The same Attention of the expanded mask."""
        node, inputs = found.node, list(found.node.inputs)
        assert inputs[3] is not None
        inputs[3] = build.expanded(inputs[3], found.shape)
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        return [build.op("Attention", inputs, attributes, like=node.outputs[0])]
