"""Reductions, arg-reductions and softmax."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from sparsegraph.graph import constant, int_attribute, integers, ints_attribute
from sparsegraph.lower.builder import Builder, Declined, Stored, shape_of
from sparsegraph.program import Arg
from sparsegraph.targets.kernels import norm
from sparsegraph.targets.kernels.reduce import Reduction, Softmax, collapse_axes, items


def lower_reduce(b: Builder, node: ir.Node) -> None:
    """ReduceSum, ReduceMean, ... over any axes, row-major; one kernel per run of neighbours."""
    x = node.inputs[0]
    assert x is not None
    shape = shape_of(x)
    axes = _axes(node, len(shape))
    if not axes:
        raise Declined("a reduction over no axis")
    op = node.op_type.removeprefix("Reduce")
    runs = _neighbours(shape, axes)
    if len(runs) > 1 and op not in ("Sum", "Mean", "Max", "Min", "Prod", "L1"):
        raise Declined(f"{node.op_type} over axes {axes} that are not neighbours")
    stored = b.row(x)
    for i, run in enumerate(reversed(runs)):  # inner axes first
        is_final = i == len(runs) - 1
        stored = _reduce_once(b, node, op, stored, run, is_final=is_final)


def lower_arg(b: Builder, node: ir.Node) -> None:
    """ArgMax and ArgMin."""
    x = node.inputs[0]
    assert x is not None
    axis = int_attribute(node, "axis", 0) % len(shape_of(x))
    _reduce_once(b, node, node.op_type, b.row(x), [axis], is_final=True)


def _reduce_once(
    b: Builder, node: ir.Node, op: str, x: Stored, axes: Sequence[int], *, is_final: bool
) -> Stored:
    if x.dtype == "bool":
        raise Declined(f"{op} of truth values")
    collapsed = collapse_axes(x.shape, axes)
    assert collapsed is not None
    outer, n, inner = collapsed
    is_last = bool(int_attribute(node, "select_last_index", 0))
    kernel = Reduction(op, x.dtype, inner == 1, is_last)
    kept = tuple(1 if i in axes else d for i, d in enumerate(x.shape))
    if is_final:
        to = b.new_row(node.outputs[0])
    else:
        n_bytes = outer * inner * np.dtype(x.dtype).itemsize
        to = Stored(b.temporary(f"{node.name}.partial", n_bytes), kept, x.dtype)
    args: list[Arg] = [to.address, x.address, n, inner]
    b.step(kernel, args, items(outer, inner, b.target), [node] if is_final else (), detail=op)
    return replace(to, shape=kept)


def lower_softmax(b: Builder, node: ir.Node) -> None:
    """Softmax and LogSoftmax over one axis (opset 13 and later)."""
    x, result = node.inputs[0], node.outputs[0]
    assert x is not None
    shape = shape_of(x)
    axis = int_attribute(node, "axis", -1) % len(shape)
    is_log = node.op_type == "LogSoftmax"
    layout = b.layout_of(x)
    if layout is not None and layout.axis == axis:
        stored, lanes = b.feature(x, axis), b.target.lanes
        kernel = norm.Softmax(is_log, layout.block // lanes, lanes)
        to = b.new_feature(result, layout)
        args = [*to.strides(), *stored.strides(), layout.tiles, layout.features]
        count = layout.images * layout.tiles
        b.step(kernel, args, count, [node], tiled=("y", "x"), detail="softmax")
        return
    collapsed = collapse_axes(shape, [axis])
    assert collapsed is not None
    outer, n, inner = collapsed
    row, made = b.row(x), b.new_row(result)
    args = [made.address, row.address, n, inner]
    count = items(outer, inner, b.target)
    b.step(Softmax(is_log, inner == 1), args, count, [node], detail="softmax, row-major")


def _axes(node: ir.Node, rank: int) -> list[int]:
    """Reduced axes: attribute (older opsets) or constant input; all of them by default."""
    axes = ints_attribute(node, "axes")
    given = node.inputs[1] if len(node.inputs) > 1 else None
    if given is not None:
        if constant(given) is None:
            raise Declined("axes that are not constant")
        axes = integers(given)
    if not axes:
        return [] if int_attribute(node, "noop_with_empty_axes", 0) else list(range(rank))
    return sorted(a % rank for a in axes)


def _neighbours(shape: Sequence[int], axes: Sequence[int]) -> list[list[int]]:
    """Runs of axes with nothing (or only extents of 1) between them."""
    runs: list[list[int]] = []
    for axis in axes:
        if runs and collapse_axes(shape, [*runs[-1], axis]) is not None:
            runs[-1].append(axis)
        else:
            runs.append([axis])
    return runs
