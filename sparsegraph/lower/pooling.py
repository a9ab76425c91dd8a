"""Pooling: windows over maps, whole maps, and reductions over all points of a value."""

import math

import numpy as np
import onnx_ir as ir

from sparsegraph.graph import attribute, input_at, int_attribute, integers, ints_attribute
from sparsegraph.lower.builder import Builder, Declined, Stored, shape_of
from sparsegraph.lower.reduce import lower_reduce
from sparsegraph.lower.windows import ONE, Window, window_of
from sparsegraph.program import Arg, Scratch
from sparsegraph.targets.kernels.pool import GlobalPool, Pool, rows_of_windows, share_of_windows
from sparsegraph.targets.layout import FeatureMajor


def lower_pool(b: Builder, node: ir.Node) -> None:
    """MaxPool and AveragePool over one or two spatial axes."""
    x, result = node.inputs[0], node.outputs[0]
    assert x is not None
    if any(v.name and (v.consumers() or v.is_graph_output()) for v in node.outputs[1:]):
        raise Declined("the indices of the maxima are an output")
    window = window_of(node, shape_of(x), (0, 0, *(ints_attribute(node, "kernel_shape") or ())))
    if window.depth != ONE:
        raise Declined("windows over three axes")
    out = _windows(node, window)
    shape = shape_of(result)
    if shape[2:] != out[-len(shape[2:]) :]:
        raise Declined(f"{out} windows do not make a map of {shape[2:]}")
    kind = "max" if node.op_type == "MaxPool" else "average"
    if kind == "average" and _covers(window) and out == (1, 1):
        _step_global(b, node, b.maps(x), "sum", 1.0 / (window.size[0] * window.size[1]))
        return
    stored = b.maps(x, is_planar=True)
    if not stored.fm.is_planar:
        raise Declined("a constant map")
    _step_windows(b, node, stored, window, out, kind)


def _windows(node: ir.Node, window: Window) -> tuple[int, int]:
    """Rows and columns of the result."""
    if not int_attribute(node, "ceil_mode", 0):
        return window.out
    if attribute(node, "auto_pad", "NOTSET") != "NOTSET":
        raise Declined("ceil_mode with auto_pad")
    out = []
    for i in (0, 1):
        before, after = window.pads[i], window.pads[i + 2]
        reach = window.dilation[i] * (window.kernel[i] - 1) + 1
        size, stride = window.size[i], window.stride[i]
        n = -(-(size + before + after - reach) // stride) + 1
        out.append(n - ((n - 1) * stride >= size + before))  # a window begins inside the map
    return out[0], out[1]


def _covers(window: Window) -> bool:
    """True if one window is the whole map."""
    return window.kernel == window.size and not any(window.pads) and window.dilation == (1, 1)


def _step_windows(
    b: Builder, node: ir.Node, x: Stored, window: Window, out: tuple[int, int], kind: str
) -> None:
    lanes = b.target.lanes if window.stride[1] == 1 else b.target.shuffle_lanes
    result = node.outputs[0]
    (height, width), (top, left, bottom, right) = window.size, window.pads
    steps = [(window.kernel[i], window.stride[i], window.dilation[i]) for i in (0, 1)]
    first, count = rows_of_windows(height, out[0], *steps[0], top)
    _, columns = rows_of_windows(width, out[1], *steps[1], left)
    if not count.all() or not columns.all():
        raise Declined("a window lies in the padding")
    spec = Pool(kind, window.kernel, window.stride[1], window.dilation[1], lanes)
    like = FeatureMajor(x.fm.images, 0, out[0] * out[1], 0, 0, 0, 0, 1)
    to = b.new_feature(result, like)
    row_size = spec.row_elements(width, out[1], left)
    last = (out[1] - 1) * window.stride[1] + (window.kernel[1] - 1) * window.dilation[1] + 1
    rows = np.stack([first * width, count], axis=1).astype(np.int32)
    args: list[Arg] = [*to.strides(), x.address, x.fm.image, x.fm.row, x.fm.features, width, *out]
    args += [to.fm.tiles, to.fm.block, window.dilation[0] * width, left]
    args += [max(0, last - left - width), row_size, b.weight(f"{node.name}.rows", rows)]
    if kind == "average":
        counts = bool(int_attribute(node, "count_include_pad", 0))
        shares = share_of_windows(height, out[0], *steps[0], (top, bottom), counts)
        args.append(b.weight(f"{node.name}.row_share", shares))
        shares = share_of_windows(width, out[1], *steps[1], (left, right), counts)
        spare = np.zeros(lanes, np.float32)
        args.append(b.weight(f"{node.name}.column_share", np.append(shares, spare)))
    args.append(Scratch(spec.scratch_bytes(row_size, out[1], to.fm.block)))
    detail = f"{window.kernel[0]}x{window.kernel[1]}, {out[0]}x{out[1]} windows"
    b.step(spec, args, x.fm.images * x.fm.features, [node], detail=detail)


def lower_global_pool(b: Builder, node: ir.Node) -> None:
    """GlobalAveragePool and GlobalMaxPool."""
    x = node.inputs[0]
    assert x is not None
    stored = b.maps(x)
    if node.op_type == "GlobalMaxPool":
        _step_global(b, node, stored, "max", 1.0)
    else:
        _step_global(b, node, stored, "sum", 1.0 / stored.fm.points)


def lower_spatial_reduce(b: Builder, node: ir.Node) -> None:
    """ReduceMean, ReduceSum, ReduceMax, ReduceMin: over all points of a value that lies
    feature-major in one kernel; others row-major."""
    x = node.inputs[0]
    assert x is not None
    layout = b.layout_of(x)
    if layout is None or not _reduces_points(node, shape_of(x), layout):
        lower_reduce(b, node)
        return
    op = node.op_type.removeprefix("Reduce")
    kind = {"Mean": "sum", "Sum": "sum", "Max": "max", "Min": "min"}[op]
    scale = 1.0 / layout.points if op == "Mean" else 1.0
    _step_global(b, node, b.feature(x, layout.axis), kind, scale)


def _reduces_points(node: ir.Node, shape: tuple[int, ...], layout: FeatureMajor) -> bool:
    """True if the reduced axes are the points, and images then features remain, in this order."""
    axes = ints_attribute(node, "axes")
    if axes is None and input_at(node, 1) is not None:
        axes = integers(input_at(node, 1))
    if not axes:
        return False
    reduced = {a % len(shape) for a in axes}
    images = [i for i in range(len(shape)) if i not in reduced and i != layout.axis]
    if layout.axis in reduced or max(images, default=-1) > min(*reduced, layout.axis):
        return False
    return bool(math.prod(shape[i] for i in images) == layout.images)


def _step_global(b: Builder, node: ir.Node, x: Stored, kind: str, scale: float) -> None:
    fm = x.fm
    spec = GlobalPool(kind, b.target.lanes)
    to = b.new_row(node.outputs[0])
    args: list[Arg] = [to.address, *x.strides(), fm.tiles, fm.features, fm.points, fm.block, scale]
    b.step(spec, args, spec.items(fm.images, fm.features), [node], detail=f"{fm.points} points")
