"""Reshape, Transpose and their like: views where nothing has to move, copies elsewhere.

All are deferred: attention and products look through them, so many are never computed.
"""

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from sparsegraph.graph import ints_attribute
from sparsegraph.lower.builder import Builder, shape_of
from sparsegraph.targets.layout import FeatureMajor


def lower_reshape(b: Builder, node: ir.Node) -> None:
    """Reshape, Flatten, Squeeze, Unsqueeze, Identity: the row-major order stays."""
    x, result = node.inputs[0], node.outputs[0]
    assert x is not None
    b.done.add(node)

    def make() -> None:
        shape = shape_of(result)
        layout = b.layout_of(x)
        if layout is not None:
            axis = reshaped_axis(shape_of(x), layout, shape)
            if axis is not None:
                stored = b.feature(x, layout.axis)
                b.keep(result, replace(stored, shape=shape, layout=replace(stored.fm, axis=axis)))
                return
        b.keep(result, replace(b.row(x), shape=shape))

    b.defer(result, make)


def lower_transpose(b: Builder, node: ir.Node) -> None:
    """Transpose: a feature-major value whose points keep their order is a view."""
    x, result = node.inputs[0], node.outputs[0]
    assert x is not None
    b.done.add(node)
    rank = len(shape_of(x))
    perm = ints_attribute(node, "perm") or tuple(reversed(range(rank)))

    def make() -> None:
        layout = b.layout_of(x)
        if layout is not None and keeps_points(shape_of(x), layout, perm):
            stored = b.feature(x, layout.axis)
            view = replace(stored.fm, axis=perm.index(layout.axis))
            b.keep(result, replace(stored, shape=shape_of(result), layout=view))
            return
        shape = shape_of(x)
        moving = [p for p in perm if shape[p] != 1]
        if moving == sorted(moving):  # only axes of extent 1 move
            b.keep(result, replace(b.row(x), shape=shape_of(result)))
            return
        b.copy_permuted(b.row(x), perm, b.new_row(result))

    b.defer(result, make)


def reshaped_axis(old: tuple[int, ...], layout: FeatureMajor, new: tuple[int, ...]) -> int | None:
    """Where the features are after a reshape, or None if they are merged or split."""
    before = int(np.prod(old[: layout.axis], dtype=np.int64))
    for axis, extent in enumerate(new):
        if extent != layout.features:
            continue
        if int(np.prod(new[:axis], dtype=np.int64)) == before:
            return axis
    return None


def keeps_points(shape: tuple[int, ...], layout: FeatureMajor, perm: tuple[int, ...]) -> bool:
    """True if all axes but the feature axis keep their order (extent 1 aside)."""
    rest = [p for p in perm if p != layout.axis and shape[p] != 1]
    return rest == sorted(rest)
