"""Drop the reshapes around the addition of a constant.

    a = Reshape(x, {2,4,3,49,49}); b = Add(a, mask); y = Reshape(b, {8,3,49,49})
        ->  y = Add(x, mask_reshaped)                                   (x: float[8,3,49,49])

Shifted windows add their mask this way, between the scores and the softmax.

Declines when: the constant, spelled out in the shape of x as far as it varies, would be larger than
4 MiB and larger than it is. A sum that others read too stays as it is, without a reason.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sparsegraph.graph import constant, has_one_use, is_op, made_by, static_bytes, static_shape
from sparsegraph.rewrite import Builder, Decline, RewritePass, decline

GROW_BYTES = 4 << 20
_LARGEST = 256 << 20  # bytes of x: the constant is spelled out in full before it is cut down


@dataclass(frozen=True)
class Found:
    """The operand of the first reshape, the constant for its shape, and where it came from."""

    source: ir.Value
    added: np.ndarray
    origin: ir.Value
    output: ir.Value


@dataclass(frozen=True)
class UnflattenAdd(RewritePass):
    """A constant added in the shape of its surroundings."""

    name: ClassVar[str] = "unflatten_add"

    def match(self, node: ir.Node, graph: ir.Graph) -> Found | Decline | None:
        """Reshape of Add of Reshape and a constant, back to the first shape."""
        if not is_op(node, "Reshape"):
            return None
        add = made_by(node.inputs[0], "Add")
        if add is None or not has_one_use(add.outputs[0]):
            return None
        middle, shape = static_shape(add.outputs[0]), static_shape(node.outputs[0])
        for side in (0, 1):
            before, addend = made_by(add.inputs[side], "Reshape"), add.inputs[1 - side]
            array = constant(addend)
            if before is None or before.inputs[0] is None or addend is None or array is None:
                continue
            if middle is None or shape is None or static_shape(before.inputs[0]) != shape:
                return None
            if (static_bytes(before.inputs[0]) or 0) > _LARGEST:
                return decline(node, f"the sum has more than {_LARGEST >> 20} MiB")
            added = _as_far_as_it_varies(np.broadcast_to(array, middle).reshape(shape))
            if added.nbytes > max(GROW_BYTES, array.nbytes):
                return decline(node, f"the constant would take {added.nbytes / 2**20:.1f} MiB")
            return Found(before.inputs[0], added, addend, node.outputs[0])
        return None

    def rewrite(self, found: Found, build: Builder) -> Sequence[ir.Value]:
        """The addition alone."""
        added = build.constant(found.added, f"{found.origin.name}_reshaped", found.origin)
        return [build.op("Add", [found.source, added], like=found.output)]


def _as_far_as_it_varies(full: np.ndarray) -> np.ndarray:
    """The array with axes of size one where all slices are the same."""
    for axis in range(full.ndim):
        first = full[(slice(None),) * axis + (slice(0, 1),)]
        if np.array_equal(np.broadcast_to(first, full.shape), full, equal_nan=True):
            full = first
    return np.ascontiguousarray(full)
