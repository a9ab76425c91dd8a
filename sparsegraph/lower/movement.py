"""Nodes that only move elements: slices, concatenation, padding, gathers, repetition.

Slices and concatenation along the features of a feature-major value are views; everything else is
a copy of row-major memory (targets/kernels/movement.py).
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from sparsegraph.graph import attribute, constant, int_attribute, integers, ints_attribute
from sparsegraph.lower.builder import Builder, Declined, Stored, dtype_of, shape_of
from sparsegraph.lower.embedding import lower_embedding
from sparsegraph.program import Arg, Ref
from sparsegraph.targets.kernels import movement
from sparsegraph.targets.kernels.movement import Call, GatherElements, GatherRows
from sparsegraph.targets.layout import FeatureMajor


def emit_call(b: Builder, call: Call, to: Ref, source: Ref, nodes: Sequence[ir.Node] = ()) -> None:
    """Append one movement call from `source` to `to`."""
    tables: list[Arg] = [b.weight("offsets", t) for t in call.tables]
    args: list[Arg] = [Ref(to.buffer, to.offset + call.y_offset)]
    args.append(Ref(source.buffer, source.offset + call.x_offset))
    b.step(call.kernel, [*args, *tables, *call.scalars], call.items, nodes, detail="copy")


def copy_flat(b: Builder, source: Stored, to: Stored) -> None:
    """Copy row-major memory as it is."""
    call = movement.move(source.dtype, [movement.Axis(source.size, 1, 1)])
    emit_call(b, call, to.address, source.address)


def copy_permuted(b: Builder, x: Stored, perm: Sequence[int], to: Stored) -> None:
    """Transpose row-major memory."""
    emit_call(b, movement.transpose(x.dtype, x.shape, perm), to.address, x.address)


def lower_slice(b: Builder, node: ir.Node) -> None:
    """Slice with constant bounds, any steps."""
    x, result = node.inputs[0], node.outputs[0]
    assert x is not None
    shape, out = shape_of(x), shape_of(result)
    starts, steps = _slice_bounds(node, shape)

    def make() -> None:
        layout = b.layout_of(x)
        if layout is not None and _only_features(shape, out, layout, steps):
            stored = b.feature(x, layout.axis)
            view = stored.fm.slice(starts[layout.axis], out[layout.axis])
            b.keep(result, replace(stored, shape=out, layout=view))
            return
        zero = [0] * len(out)
        call = movement.region(dtype_of(x), out, zero, shape, starts, out, steps)
        row = b.row(x)
        emit_call(b, call, b.new_row(result).address, row.address)

    b.done.add(node)
    b.defer(result, make)


def _only_features(
    shape: Sequence[int], out: Sequence[int], layout: FeatureMajor, steps: Sequence[int]
) -> bool:
    others = (a == o for i, (a, o) in enumerate(zip(shape, out)) if i != layout.axis)
    return all(others) and steps[layout.axis] == 1


def _slice_bounds(node: ir.Node, shape: Sequence[int]) -> tuple[list[int], list[int]]:
    """First element and step per axis."""
    given = [integers(v) if v is not None else None for v in node.inputs[1:]]
    given += [None] * (4 - len(given))
    starts = given[0] or ints_attribute(node, "starts")
    axes = given[2] or ints_attribute(node, "axes")
    if starts is None or any(v is not None and constant(v) is None for v in node.inputs[1:]):
        raise Declined("bounds that are not constant")
    axes = axes or tuple(range(len(starts)))
    steps = given[3] or (1,) * len(starts)
    first, step = [0] * len(shape), [1] * len(shape)
    for a, s, k in zip(axes, starts, steps):
        axis, n = a % len(shape), shape[a % len(shape)]
        s = s + n if s < 0 else s
        first[axis] = min(max(s, 0), n - (k < 0))
        step[axis] = k
    return first, step


def lower_split(b: Builder, node: ir.Node) -> None:
    """Split: each output is a slice."""
    x = node.inputs[0]
    assert x is not None
    shape = shape_of(x)
    axis = int_attribute(node, "axis", 0) % len(shape)
    start = 0
    for output in node.outputs:
        _part(b, x, output, axis, start)
        start += shape_of(output)[axis]
    b.done.add(node)


def _part(b: Builder, x: ir.Value, output: ir.Value, axis: int, start: int) -> None:
    shape, out = shape_of(x), shape_of(output)

    def make() -> None:
        layout = b.layout_of(x)
        if layout is not None and layout.axis == axis:
            stored = b.feature(x, axis)
            view = stored.fm.slice(start, out[axis])
            b.keep(output, replace(stored, shape=out, layout=view))
            return
        first = [start if i == axis else 0 for i in range(len(shape))]
        call = movement.region(dtype_of(x), out, [0] * len(out), shape, first, out)
        row = b.row(x)
        emit_call(b, call, b.new_row(output).address, row.address)

    b.defer(output, make)


def lower_concat(b: Builder, node: ir.Node) -> None:
    """Concat: along features each input is (or was already) written into its slice."""
    result, values = node.outputs[0], [v for v in node.inputs if v is not None]
    shape = shape_of(result)
    axis = int_attribute(node, "axis", 0) % len(shape)
    layouts = [b.layout_of(v) for v in values]
    like = next((m for m in layouts if m is not None and m.axis == axis), None)
    if like is not None and dtype_of(result) == "float32" and len(shape) >= 2:
        _concat_features(b, node, values, like)
        return
    rows = [b.row(v) for v in values]
    to = b.new_row(result)
    for call, row in zip(movement.concat(to.dtype, [r.shape for r in rows], axis), rows):
        emit_call(b, call, to.address, row.address, [node])


def _concat_features(
    b: Builder, node: ir.Node, values: Sequence[ir.Value], like: FeatureMajor
) -> None:
    to = b.new_feature(node.outputs[0], like)
    start = 0
    for value in values:
        stored = b.feature(value, like.axis)
        view = to.fm.slice(start, stored.fm.features)
        start += stored.fm.features
        place = Stored(to.ref, stored.shape, "float32", view)
        if (stored.ref, stored.layout) == (place.ref, place.layout):
            continue
        if not stored.fm.same_points(view):
            raise Declined(f"'{value.name}' is tiled in another way")
        b.copy_feature(stored, place)
    b.done.add(node)


def lower_gather(b: Builder, node: ir.Node) -> None:
    """Gather along one axis, by constant or run-time indices."""
    x, index, result = node.inputs[0], node.inputs[1], node.outputs[0]
    assert x is not None
    assert index is not None
    shape = shape_of(x)
    axis = int_attribute(node, "axis", 0) % len(shape)
    outer, n = int(np.prod(shape[:axis], dtype=np.int64)), shape[axis]
    inner = int(np.prod(shape[axis + 1 :], dtype=np.int64))
    numbers = constant(index)
    if numbers is not None and constant(x) is None:
        b.done.add(node)

        def make() -> None:
            tables = [None, [int(i) for i in numbers.ravel()], None]
            call = movement.take(dtype_of(x), (outer, n, inner), tables)
            row = b.row(x)
            emit_call(b, call, b.new_row(result).address, row.address)

        b.defer(result, make)
        return
    table, indices = constant(x), b.row(index)
    if table is not None and axis == 0 and lower_embedding(b, node, table, indices):
        return
    row = b.row(x)
    to = b.new_row(result)
    kernel = GatherRows(row.dtype, indices.dtype)
    args: list[Arg] = [
        to.address,
        row.address,
        indices.address,
        inner,
        indices.size,
        n * inner,
        0,
        n,
        inner,
    ]
    b.step(kernel, args, outer * indices.size, [node], detail=f"{indices.size} rows")


def lower_gather_elements(b: Builder, node: ir.Node) -> None:
    """GatherElements where only the gathered axis differs in extent."""
    x, index = node.inputs[0], node.inputs[1]
    assert x is not None
    assert index is not None
    row, indices = b.row(x), b.row(index)
    axis = int_attribute(node, "axis", 0) % len(row.shape)
    if any(a != c for i, (a, c) in enumerate(zip(row.shape, indices.shape)) if i != axis):
        raise Declined("indices with other extents than the data")
    outer = int(np.prod(row.shape[:axis], dtype=np.int64))
    inner = int(np.prod(row.shape[axis + 1 :], dtype=np.int64))
    count = indices.shape[axis]
    to = b.new_row(node.outputs[0])
    args: list[Arg] = [to.address, row.address, indices.address, row.shape[axis], count, inner]
    kernel = GatherElements(row.dtype, indices.dtype)
    b.step(kernel, args, outer * count, [node], detail="gather elements")


def lower_pad(b: Builder, node: ir.Node) -> None:
    """Pad with constant widths: constant, edge, reflect, wrap."""
    x, result = node.inputs[0], node.outputs[0]
    assert x is not None
    shape = shape_of(x)
    rank = len(shape)
    pads = _pads(node, rank)
    mode = str(attribute(node, "mode", "constant"))
    row = b.row(x)
    if mode != "constant":
        if any(p < 0 for p in pads):
            raise Declined("negative padding")
        tables = [
            movement.pad_table(n, pads[i], pads[i + rank], mode)
            if pads[i] + pads[i + rank]
            else None
            for i, n in enumerate(shape)
        ]
        call = movement.take(row.dtype, shape, tables)
        emit_call(b, call, b.new_row(result).address, row.address, [node])
        return
    value = node.inputs[2] if len(node.inputs) > 2 else None
    number = constant(value) if value is not None else np.array(attribute(node, "value", 0.0))
    if number is None:
        raise Declined("a padding value that is not constant")
    one = b.weight("padding", number.reshape(1).astype(row.dtype))
    fill, inside = movement.pad_constant(row.dtype, shape, pads)
    to = b.new_row(result)
    emit_call(b, fill, to.address, one)
    emit_call(b, inside, to.address, row.address, [node])


def _pads(node: ir.Node, rank: int) -> list[int]:
    """Begins, then ends, for every axis."""
    given = ints_attribute(node, "pads")
    if given is None:
        given = integers(node.inputs[1])
    if given is None:
        raise Declined("padding that is not constant")
    axes = integers(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] else None
    if axes is None:
        return list(given)
    pads = [0] * 2 * rank
    for i, axis in enumerate(axes):
        pads[axis % rank], pads[axis % rank + rank] = given[i], given[i + len(axes)]
    return pads


def lower_expand(b: Builder, node: ir.Node) -> None:
    """Expand; deferred, since attention looks through it."""
    x, result = node.inputs[0], node.outputs[0]
    assert x is not None

    def make() -> None:
        row = b.row(x)
        call = movement.expand(row.dtype, row.shape, shape_of(result))
        emit_call(b, call, b.new_row(result).address, row.address)

    b.done.add(node)
    b.defer(result, make)


def lower_tile(b: Builder, node: ir.Node) -> None:
    """Tile with constant repeats."""
    x = node.inputs[0]
    assert x is not None
    repeats = integers(node.inputs[1])
    if repeats is None:
        raise Declined("repeats that are not constant")
    row = b.row(x)
    call = movement.tile(row.dtype, row.shape, repeats)
    emit_call(b, call, b.new_row(node.outputs[0]).address, row.address, [node])


def lower_depth_space(b: Builder, node: ir.Node) -> None:
    """DepthToSpace (DCR, CRD) and SpaceToDepth."""
    x = node.inputs[0]
    assert x is not None
    row, block = b.row(x), int_attribute(node, "blocksize", 1)
    if node.op_type == "SpaceToDepth":
        call = movement.space_to_depth(row.dtype, row.shape, block)
    else:
        mode = str(attribute(node, "mode", "DCR"))
        call = movement.depth_to_space(row.dtype, row.shape, block, mode)
    emit_call(b, call, b.new_row(node.outputs[0]).address, row.address, [node])
