"""ScatterND at computed places, and ScatterElements: a copy of the data, then the updates.

Messages along the edges of a graph arrive this way: `index_add`, `scatter_add`, `scatter_reduce`.
"""

import math

import onnx_ir as ir

from sparsegraph.graph import attribute, int_attribute, made_by
from sparsegraph.lower.builder import Builder, Declined, Stored, dtype_of, shape_of
from sparsegraph.lower.movement import copy_flat
from sparsegraph.program import Arg
from sparsegraph.targets.kernels import movement
from sparsegraph.targets.kernels.scatter import REDUCTIONS, ScatterElements, ScatterRows


def lower_scatter(b: Builder, node: ir.Node) -> None:
    """ScatterND: the updates in their order."""
    reduction, _, index, values = _operands(b, node)
    to, indices = _copied(b, node), b.row(index)
    depth = indices.shape[-1]
    _step_rows(b, node, reduction, to, indices, values, depth)


def lower_scatter_elements(b: Builder, node: ir.Node) -> None:
    """ScatterElements whose indices lack parts of at most two axes: the first, and one behind."""
    reduction, shape, index, values = _operands(b, node)
    axis, given = int_attribute(node, "axis", 0) % len(shape), shape_of(index)
    if given[1:axis] != shape[1:axis] or given[axis + 2 :] != shape[axis + 2 :]:
        raise Declined(f"indices {given} of data {shape}")
    rows = _row_indices(index, axis)
    if rows is not None and axis == 0 and given[1:] == shape[1:]:
        to, indices = _copied(b, node), b.row(rows)
        _step_rows(b, node, reduction, to, indices, values, 1)
        return
    to, indices = _copied(b, node), b.row(index)
    outer, inner = math.prod(given[:axis]), math.prod(given[axis + 1 :])
    kernel = ScatterElements(to.dtype, indices.dtype, reduction)
    args: list[Arg] = [to.address, values.address, indices.address]
    args += [shape[axis], math.prod(shape[axis + 1 :]), given[axis], inner]
    b.step(kernel, args, outer, [node], detail=f"{indices.size} updates")


def _operands(b: Builder, node: ir.Node) -> tuple[str, tuple[int, ...], ir.Value, Stored]:
    """The reduction, shape of the data, indices, and updates."""
    x, index, updates = node.inputs
    assert x is not None
    assert index is not None
    assert updates is not None
    reduction = str(attribute(node, "reduction", "none"))
    if reduction not in REDUCTIONS or (reduction != "none" and dtype_of(x) == "bool"):
        raise Declined(f"reduction '{reduction}' of {dtype_of(x)}")
    return reduction, shape_of(x), index, b.row(updates)


def _copied(b: Builder, node: ir.Node) -> Stored:
    """The result, so far a copy of the data."""
    x = node.inputs[0]
    assert x is not None
    row, to = b.row(x), b.new_row(node.outputs[0])
    copy_flat(b, row, to)
    return to


def _step_rows(
    b: Builder, node: ir.Node, reduction: str, to: Stored, indices: Stored, values: Stored,
    depth: int,
) -> None:  # fmt: skip
    shape = to.shape
    count, inner = indices.size // depth, math.prod(shape[depth:])
    kernel = ScatterRows(to.dtype, indices.dtype, depth, reduction)
    args: list[Arg] = [to.address, values.address, indices.address, inner, count]
    args += [n for axis in zip(shape, movement.strides(shape)[:depth]) for n in axis]
    b.step(kernel, args, 1, [node], detail=f"{count} updates")


def _row_indices(index: ir.Value, axis: int) -> ir.Value | None:
    """What was repeated over all axes behind `axis`, if the indices are that."""
    expand = made_by(index, "Expand")
    source = None if expand is None else expand.inputs[0]
    if source is None or len(shape_of(source)) != len(shape_of(index)):
        return None
    given, whole = shape_of(source), shape_of(index)
    is_repeated = given[: axis + 1] == whole[: axis + 1] and math.prod(given[axis + 1 :]) == 1
    return source if is_repeated else None
