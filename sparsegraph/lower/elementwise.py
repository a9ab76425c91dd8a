"""Element-wise nodes, alone or as regions, and the operands that regions read."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from sparsegraph.graph import constant, static_shape
from sparsegraph.lower import regions
from sparsegraph.lower.builder import (
    DTYPES,
    Builder,
    Declined,
    Stored,
    dtype_of,
    shape_of,
    split_points,
)
from sparsegraph.program import Arg
from sparsegraph.targets.kernels import expression
from sparsegraph.targets.kernels.elementwise import FeatureMap, row_map
from sparsegraph.targets.kernels.expression import Tree
from sparsegraph.targets.layout import FeatureMajor, point_block


def feature_kind(b: Builder, value: ir.Value, result: ir.Value, layout: FeatureMajor) -> str | None:
    """How a feature-major kernel reads an operand of a node whose result has `layout`'s points.

    `same`: one value per feature and point. `feature`: one per feature. None: it cannot.
    """
    if value.dtype != ir.DataType.FLOAT or not b.is_ready(value):
        return None
    shape, own = static_shape(result), static_shape(value)
    if shape is None or own is None:
        return None
    padded = (1,) * (len(shape) - len(own)) + own
    if len(own) > len(shape):
        return None
    axis = layout.axis
    others = all(d == 1 for i, d in enumerate(padded) if i != axis)
    if others and padded[axis] == shape[axis]:
        is_vector = constant(value) is not None or layout.images == 1
        return "feature" if is_vector else None
    if own == shape:
        stored = b.layout_of(value)
        if stored is None or stored.axis != axis:
            return "same" if _can_convert(own, layout) else None
        return "same" if stored.same_points(_with_block(b, layout)) else None
    return None


def _can_convert(shape: tuple[int, ...], layout: FeatureMajor) -> bool:
    """True if a row-major value becomes feature-major with the images and points of `layout`."""
    if split_points(shape, layout.axis, together=True) != (layout.images, layout.points):
        return False
    before = int(np.prod(shape[: layout.axis], dtype=np.int64))
    return bool(before == layout.images) or layout.axis == len(shape) - 1


def _with_block(b: Builder, layout: FeatureMajor) -> FeatureMajor:
    return replace(layout, block=point_block(layout.points, b.target))


def operand(b: Builder, value: ir.Value, kind: str, to: Stored) -> tuple[Arg, ...]:
    """Arguments of one operand of a feature-major kernel."""
    if kind == "same":
        stored = b.feature(value, to.fm.axis)
        if not stored.fm.same_points(to.fm):
            raise Declined(f"'{value.name}' is tiled in another way")
        return stored.strides()
    array = constant(value)
    if array is not None:
        vector = np.ascontiguousarray(np.broadcast_to(array.ravel(), (to.fm.features,)))
        return (b.weight(f"{value.name}.vector", vector),)
    return (b.row(value).address,)


def lower_elementwise(b: Builder, node: ir.Node) -> None:
    """One element-wise kernel for the region that starts at `node`."""
    result = node.outputs[0]
    shape = shape_of(result)
    start = _feature_start(b, node, shape)
    if start is not None and _lower_feature(b, node, start):
        return
    _lower_row(b, node)


def _feature_start(b: Builder, node: ir.Node, shape: tuple[int, ...]) -> ir.Value | None:
    """An operand of full shape that is already feature-major, or None."""
    for value in node.inputs:
        if value is not None and static_shape(value) == shape and b.layout_of(value) is not None:
            return value
    return None


def _lower_feature(b: Builder, node: ir.Node, start: ir.Value) -> bool:
    layout = b.layout_of(start)
    assert layout is not None
    result = node.outputs[0]

    def classify(value: ir.Value) -> str | None:
        return feature_kind(b, value, result, layout)

    float_inputs = (v is None or v.dtype == ir.DataType.FLOAT for v in node.inputs)
    others = (v for v in node.inputs if v is not None and v is not start)
    if not all(float_inputs) or result.dtype != ir.DataType.FLOAT:
        return False
    if not all(regions.scalar_of(v) is not None or classify(v) for v in others):
        return False
    region = regions.grow(start, classify, node)
    x = b.feature(start, layout.axis)
    to = b.new_feature(region.result, layout)
    kinds = tuple({"same": "full"}.get(k, k) for k in region.kinds)
    kernel = FeatureMap(region.tree, ("full", *kinds), ("float32",) * (1 + len(kinds)))
    args: list[Arg] = [*to.strides(), *x.strides()]
    for value, kind in zip(region.operands, region.kinds):
        args += operand(b, value, kind, to)
    fm = to.fm
    args += [fm.tiles, fm.features, fm.block]
    tiled = ("y", *(f"x{i}" for i, kind in enumerate(kernel.kinds) if kind == "full"))
    b.step(
        kernel, args, fm.images * fm.tiles, region.nodes, tiled=tiled, detail="element-wise",
    )  # fmt: skip
    return True


def _lower_row(b: Builder, node: ir.Node) -> None:
    """Row-major, with broadcasting, any type."""
    if (reason := regions.refusal(node)) is not None:
        raise Declined(reason)
    starts = [v for v in node.inputs if v is not None and regions.scalar_of(v) is None]
    if not starts:
        raise Declined("every operand is a constant")
    start, shape = starts[0], shape_of(node.outputs[0])

    def classify(value: ir.Value) -> str | None:
        own = static_shape(value)
        if own is None or not b.is_ready(value) or value.dtype not in DTYPES:
            return None
        return "row" if _broadcasts(own, shape) else None

    if not all(classify(v) or regions.scalar_of(v) is not None for v in node.inputs if v):
        raise Declined("an operand is not at hand")
    region = regions.grow(start, classify, node, any_type=True)
    values = [start, *region.operands]
    types = [dtype_of(v) for v in values]
    if expression.dtype(region.tree, types) != dtype_of(region.result):
        raise Declined(f"{expression.dtype(region.tree, types)} for {dtype_of(region.result)}")
    operands = [b.row(v) for v in values]
    to = b.new_row(region.result)
    call = row_map(region.tree, to.shape, [o.shape for o in operands], types)
    args: list[Arg] = [to.address, *(o.address for o in operands), *call.scalars]
    b.step(call.kernel, args, call.items, region.nodes, detail="element-wise, row-major")


def _broadcasts(own: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    padded = (1,) * (len(shape) - len(own)) + own
    return len(own) <= len(shape) and all(o in (1, s) for o, s in zip(padded, shape))


def emit_row_tree(
    b: Builder, name: str, tree: Tree, operands: list[Stored], shape: tuple[int, ...], dtype: str
) -> Stored:
    """A row-major temporary with the value of `tree`."""
    n_bytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    to = Stored(b.temporary(name, n_bytes), shape, dtype)
    call = row_map(tree, shape, [o.shape for o in operands], [o.dtype for o in operands])
    args: list[Arg] = [to.address, *(o.address for o in operands), *call.scalars]
    b.step(call.kernel, args, call.items, detail="element-wise, row-major")
    return to
