"""Reshape, Transpose and their like: views where nothing has to move, copies elsewhere.

All are deferred: attention and products look through them, so many are never computed.
"""

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from sparsegraph.graph import attribute, constant, ints_attribute
from sparsegraph.lower.builder import Builder, shape_of, split_points
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
    """Transpose: a feature-major value whose points keep their order is a view.

    So is one that is made feature-major now, for products that read it so.
    """
    x, result = node.inputs[0], node.outputs[0]
    assert x is not None
    b.done.add(node)
    rank = len(shape_of(x))
    perm = ints_attribute(node, "perm") or tuple(reversed(range(rank)))

    def make() -> None:
        layout, shape = b.layout_of(x), shape_of(x)
        axis = None if layout is None else layout.axis
        moving = [p for p in perm if shape[p] != 1]
        if axis is None and moving == sorted(moving):  # only axes of extent 1 move
            b.keep(result, replace(b.row(x), shape=shape_of(result)))
            return
        if axis is None and (wanted := _axis_of_columns(result)) is not None:
            axis = perm[wanted] if _has_planes(shape, perm[wanted]) else None
        if axis is not None and keeps_points(shape, axis, perm):
            stored = b.feature(x, axis)
            view = replace(stored.fm, axis=perm.index(axis))
            b.keep(result, replace(stored, shape=shape_of(result), layout=view))
            return
        b.copy_permuted(b.row(x), perm, b.new_row(result))

    b.defer(result, make)


def _axis_of_columns(value: ir.Value) -> int | None:
    """The axis that products with constant matrices sum over, if only such read the value."""
    if value.is_graph_output() or value.dtype != ir.DataType.FLOAT:
        return None
    rank, axes = len(shape_of(value)), set()
    for node, at in value.uses():
        if node.op_type not in ("MatMul", "Gemm") or at > 1 or rank > 3:
            return None
        other = constant(node.inputs[1 - at])
        if other is None or other.ndim != 2:
            return None
        flag = ("transA", "transB")[at]
        is_turned = node.op_type == "Gemm" and bool(attribute(node, flag, 0))
        axes.add(rank - 1 - int((at == 1) != is_turned))
    return axes.pop() if len(axes) == 1 else None


def _has_planes(shape: tuple[int, ...], axis: int) -> bool:
    """True if row-major memory of `shape` can be read with features on `axis`."""
    images, _ = split_points(shape, axis)
    return axis == len(shape) - 1 or int(np.prod(shape[:axis], dtype=np.int64)) == images


def reshaped_axis(old: tuple[int, ...], layout: FeatureMajor, new: tuple[int, ...]) -> int | None:
    """Where the features are after a reshape, or None if they are merged or split."""
    before = int(np.prod(old[: layout.axis], dtype=np.int64))
    for axis, extent in enumerate(new):
        if extent != layout.features:
            continue
        if int(np.prod(new[:axis], dtype=np.int64)) == before:
            return axis
    return None


def keeps_points(shape: tuple[int, ...], axis: int, perm: tuple[int, ...]) -> bool:
    """True if all axes but `axis`, that of the features, keep their order (extent 1 aside)."""
    rest = [p for p in perm if p != axis and shape[p] != 1]
    return rest == sorted(rest)
