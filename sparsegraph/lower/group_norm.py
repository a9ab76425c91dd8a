"""InstanceNormalization and GroupNormalization of values [images, channels, ...]."""

import math

import numpy as np
import onnx_ir as ir

from sparsegraph.graph import constant, float_attribute, int_attribute
from sparsegraph.lower.builder import Builder, Declined, Stored, shape_of
from sparsegraph.program import Arg
from sparsegraph.targets.kernels.group_norm import GroupNorm
from sparsegraph.targets.layout import FeatureMajor

_ROW_VECTORS = 8  # of a row-major map that count as one tile


def lower_group_norm(b: Builder, node: ir.Node) -> None:
    """One kernel, where the value lies: feature-major after a convolution, else row-major.

    Raises:
        Declined: scale or bias are not constant.
    """
    x, result = node.inputs[0], node.outputs[0]
    assert x is not None
    images, channels, *space = shape_of(x)
    groups = int_attribute(node, "num_groups", channels)
    vectors = [_vector(v) for v in node.inputs[1:3]]
    refs = [b.weight(f"{node.name}.{i}", v) for i, v in enumerate(vectors)]
    points, layout = math.prod(space), b.layout_of(x)
    if layout is not None and layout.axis == 1 and layout.images == images:
        stored = b.feature(x, 1)
        to = b.new_feature(result, stored.fm)
    else:
        fm = _rows(images, channels, points, b.target.lanes)
        stored = _as(b.row(x), fm)
        to = _as(b.new_row(result), fm)
    fm = stored.fm
    kernel = GroupNorm(fm.block // b.target.lanes, b.target.lanes)
    epsilon = float_attribute(node, "epsilon", 1e-5)
    sizes: list[Arg] = [epsilon, points, fm.tiles, groups, channels // groups]
    detail = f"{groups} groups of {channels // groups} features"
    b.step(kernel, [*to.strides(), *stored.strides(), *refs, *sizes], images * groups, [node],
           detail=detail)  # fmt: skip


def _rows(images: int, channels: int, points: int, lanes: int) -> FeatureMajor:
    """Row-major maps in the words of a feature-major layout."""
    block = lanes * min(_ROW_VECTORS, max(1, points // lanes))
    return FeatureMajor(images, channels, points, block, channels * points, block, points, 1)


def _as(row: Stored, fm: FeatureMajor) -> Stored:
    return Stored(row.ref, row.shape, row.dtype, fm)


def _vector(value: ir.Value | None) -> np.ndarray:
    array = None if value is None else constant(value)
    if array is None:
        raise Declined("scale or bias is not a constant vector")
    return np.ascontiguousarray(array.ravel(), np.float32)
