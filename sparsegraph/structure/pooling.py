"""Pools, reductions, Resize, pixel shuffles: channels pass, map axes must stay."""

import math

import numpy as np
import onnx_ir as ir

from sparsegraph.graph import (
    attribute,
    constant,
    input_at,
    int_attribute,
    integers,
    ints_attribute,
)
from sparsegraph.structure.cut import Cut
from sparsegraph.structure.known import Known, Knowns
from sparsegraph.structure.labels import Axis
from sparsegraph.structure.ties import Ties, shape_of

_SUMS = ("ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare")


def tie_map(t: Ties, node: ir.Node) -> None:
    """Axes whose size the operator keeps pass when they are batch or channels."""
    data = t.input(node, 0)
    if any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
        t.freeze_inputs(node, "its indices are read")
        return
    for axis in data[2:]:
        t.freeze(node, axis, f"{node.op_type} works along the map")
    t.set(node.outputs[0], [*data[:2], *[None] * (len(data) - 2)])


def known_pool(k: Knowns, node: ir.Node) -> None:
    """A constant map stays constant; counted padding breaks all constants but zero."""
    known = _flat_map(k, node)
    if known is None:
        return
    counts = node.op_type == "AveragePool" and int_attribute(node, "count_include_pad", 0)
    if node.op_type in ("GlobalLpPool", "LpPool") or counts:
        known = np.where(known == 0, 0.0, np.nan)
    k.set(node.outputs[0], known)


def _flat_map(k: Knowns, node: ir.Node) -> Known | None:
    known = k.of(node.inputs[0])
    if known is None or any(size > 1 for size in known.shape[2:]):
        return None
    return known


def tie_resize(t: Ties, node: ir.Node) -> None:
    """Channels pass; their size may be written in the `sizes` input."""
    data = t.input(node, 0)
    if shape_of(node.outputs[0])[:2] != shape_of(node.inputs[0])[:2]:
        t.freeze_inputs(node, "a resize of channels")
        return
    if attribute(node, "coordinate_transformation_mode") == "tf_crop_and_resize":
        t.freeze_inputs(node, "a resize that crops")
        return
    for axis in data[2:]:
        t.freeze(node, axis, "Resize works along the map")
    t.set(node.outputs[0], [*data[:2], *[None] * (len(data) - 2)])


def cut_resize(cut: Cut, node: ir.Node) -> None:
    """The channel count among the sizes."""
    if integers(input_at(node, 3)) is None:
        return
    axes = ints_attribute(node, "axes")
    shape = cut.shape(node.outputs[0])
    sizes = shape if axes is None else [shape[a] for a in axes]
    cut.replace(node, 3, np.array(sizes, np.int64))


def known_resize(k: Knowns, node: ir.Node) -> None:
    """Interpolation weights sum to one; only linear and nearest are taken as exact."""
    known = _flat_map(k, node)
    if known is not None:
        if attribute(node, "mode", "nearest") == "cubic":
            known = np.where(known == 0, 0.0, np.nan)
        k.set(node.outputs[0], known)


def tie_reduce(t: Ties, node: ir.Node) -> None:
    """Reduced axes must stay, but a sum only needs them to contribute nothing."""
    data, axes = t.input(node, 0), reduced_axes(node)
    if axes is None:
        t.freeze_inputs(node, "computed axes of a reduction")
        return
    for number in axes:
        if node.op_type in _SUMS or (node.op_type == "ReduceMean" and t.policy.rescale):
            t.sink(node, 0, number, data[number])
        else:
            t.freeze(node, data[number], f"{node.op_type} over this axis")
    keeps = int_attribute(node, "keepdims", 1)
    kept: list[Axis] = []
    for number, axis in enumerate(data):
        if number not in axes:
            kept.append(axis)
        elif keeps:
            kept.append(None)
    t.set(node.outputs[0], kept)


def cut_reduce(cut: Cut, node: ir.Node) -> None:
    """A mean over fewer zeros is larger; the factor makes up for them."""
    axes = reduced_axes(node)
    assert axes is not None
    data = node.inputs[0]
    assert data is not None
    before = math.prod(shape_of(data)[axis] for axis in axes)
    after = math.prod(int(cut.kept(data, axis).sum()) for axis in axes)
    if node.op_type == "ReduceMean" and after < before:
        cut.scale_output(node, after / before)


def reduced_axes(node: ir.Node) -> frozenset[int] | None:
    """The axes that are reduced; None when they are computed."""
    rank = len(shape_of(node.inputs[0]))
    given = ints_attribute(node, "axes")
    if given is None and input_at(node, 1) is not None:
        given = integers(node.inputs[1])
        if given is None:
            return None
    if not given:
        noop = int_attribute(node, "noop_with_empty_axes", 0)
        return frozenset() if noop else frozenset(range(rank))
    return frozenset(axis % rank for axis in given)


def known_reduce(k: Knowns, node: ir.Node) -> None:
    """What is the same all along the reduced axes stays, times their length for a sum."""
    known, axes = k.of(node.inputs[0]), reduced_axes(node)
    if known is None or axes is None or any(known.shape[axis] > 1 for axis in axes):
        return
    if node.op_type == "ReduceSum":
        known = known * math.prod(shape_of(node.inputs[0])[axis] for axis in axes)
    elif node.op_type not in ("ReduceMean", "ReduceMax", "ReduceMin"):
        known = np.where(known == 0, 0.0, np.nan)
    if not int_attribute(node, "keepdims", 1):
        known = known.reshape([n for i, n in enumerate(known.shape) if i not in axes])
    k.set(node.outputs[0], known)


def tie_depth_to_space(t: Ties, node: ir.Node) -> None:
    """The inputs of one output channel go together: far apart for DCR, side by side for CRD."""
    data = t.input(node, 0)[1]
    area = int_attribute(node, "blocksize", 1) ** 2
    made: Axis = None
    if data is not None:
        crd = attribute(node, "mode", "DCR") == "CRD"
        block = data.reshape(-1, area) if crd else data.reshape(area, -1).T
        made = block[:, 0].copy()
        t.tie(node, block, made[:, None])
    t.set(node.outputs[0], [None, made, None, None])


def tie_space_to_depth(t: Ties, node: ir.Node) -> None:
    """Channels repeat once per place in the block."""
    data = t.input(node, 0)[1]
    area = int_attribute(node, "blocksize", 1) ** 2
    t.set(node.outputs[0], [None, None if data is None else np.tile(data, area), None, None])


def known_depth_to_space(k: Knowns, node: ir.Node) -> None:
    """Known where all inputs of an output channel hold the same."""
    data = k.along(node.inputs[0], 1)
    if data is None:
        return
    area = int_attribute(node, "blocksize", 1) ** 2
    crd = attribute(node, "mode", "DCR") == "CRD"
    block = data.reshape(-1, area) if crd else data.reshape(area, -1).T
    same = np.where((block == block[:, :1]).all(axis=1), block[:, 0], np.nan)
    k.set(node.outputs[0], same.reshape(1, -1, 1, 1))


def known_space_to_depth(k: Knowns, node: ir.Node) -> None:
    """Repeats with the labels."""
    data = k.along(node.inputs[0], 1)
    if data is not None:
        area = int_attribute(node, "blocksize", 1) ** 2
        k.set(node.outputs[0], np.tile(data, area).reshape(1, -1, 1, 1))


def known_zero_map(k: Knowns, node: ir.Node) -> None:
    """Zero in, zero out."""
    known = k.of(node.inputs[0])
    if known is not None and constant(node.inputs[0]) is None:
        k.set(node.outputs[0], np.where(known == 0, 0.0, np.nan))
