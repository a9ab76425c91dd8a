"""MatMul, Gemm and Conv with constant weights."""

import math
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from sparsegraph import formats
from sparsegraph.graph import attribute, constant, float_attribute, int_attribute
from sparsegraph.lower import direct, expand, panels, problem, regions, single_point, winograd
from sparsegraph.lower.builder import (
    Builder,
    Declined,
    Stored,
    name_of,
    shape_of,
    split_points,
)
from sparsegraph.lower.elementwise import feature_kind, operand
from sparsegraph.lower.gather import tables
from sparsegraph.lower.matrices import lower_matrices
from sparsegraph.lower.movement import emit_call
from sparsegraph.lower.windows import ONE, Phased, Window, gather_of, phased, window_of
from sparsegraph.program import Arg, Ref, Scratch
from sparsegraph.targets.kernels import movement
from sparsegraph.targets.kernels.phases import PHASES, Phases
from sparsegraph.targets.kernels.product import BYTES, UNIT, Product, computed_points, joined
from sparsegraph.targets.kernels.slots import MOST_COLUMNS
from sparsegraph.targets.kernels.vector_product import MOST_IMAGES
from sparsegraph.targets.layout import FeatureMajor, blocked, flat
from sparsegraph.targets.target import Target

_FAR = 2.5  # level 1 caches; a panel above it is asked for ahead (a gain of 5 %, below a loss)
_VALUE_BYTES = 4
_PART = 48  # rows; groups of 2, 3 and 4 rows and whole cache lines of the result fit


def lower_matmul(b: Builder, node: ir.Node) -> None:
    """Activations times a constant matrix on either side, or two activations."""
    left, right = node.inputs[0], node.inputs[1]
    assert left is not None
    assert right is not None
    for weight, x in ((constant(right), left), (constant(left), right)):
        if weight is None or weight.ndim != 2 or len(shape_of(x)) < 2:
            continue
        if x is left:
            lower_linear(b, node, x, np.ascontiguousarray(weight.T), None)
        else:
            rank = len(shape_of(x))
            _lower_across(b, node, x, rank - 2, np.ascontiguousarray(weight), None, rank - 2)
        return
    lower_matrices(b, node)


def lower_gemm(b: Builder, node: ir.Node) -> None:
    """alpha * A * B + beta * C with one of A and B constant, and C."""
    sides = node.inputs[:2]
    at = 1 if constant(sides[1]) is not None else 0
    x, weight = sides[1 - at], constant(sides[at])
    if x is None or weight is None:
        raise Declined("neither A nor B is constant")
    flags = [bool(attribute(node, flag, 0)) for flag in ("transA", "transB")]
    if flags[at] != bool(at):  # to [rows of the result, columns]
        weight = weight.T
    bias = None
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        bias = constant(node.inputs[2])
        wanted = (1, len(weight)) if at else (len(weight), 1)
        if bias is None or np.broadcast_shapes(bias.shape, wanted) != wanted:
            raise Declined("Gemm's C is not a constant per feature")
        bias = np.broadcast_to(bias, wanted).ravel() * float_attribute(node, "beta", 1.0)
    weight = np.ascontiguousarray(float_attribute(node, "alpha", 1.0) * weight, np.float32)
    if at and not flags[0]:
        lower_linear(b, node, x, weight, bias)
    else:
        _lower_across(b, node, x, int(flags[1 - at] != bool(at)), weight, bias, at)


def lower_linear(
    b: Builder,
    node: ir.Node,
    x: ir.Value,
    weight: np.ndarray,
    bias: np.ndarray | None,
) -> None:
    """weight [N, K] times the last axis of x."""
    shape = shape_of(x)
    if len(shape) < 2:
        raise Declined("activations of rank 1")
    images, points = split_points(shape, len(shape) - 1, together=True)
    axis = len(shape_of(node.outputs[0])) - 1
    is_single = images == 1 and single_point.suits(weight, points, b.target)
    if is_single and _lower_single(b, node, x, len(shape) - 1, points, weight, bias, axis):
        return
    stored = b.feature(x, len(shape) - 1)
    layout = _result_layout(stored.fm, axis)
    emit_product(b, [node], stored, weight, bias, node.outputs[0], layout, None)


def _lower_across(
    b: Builder, node: ir.Node, x: ir.Value, axis: int, weight: np.ndarray,
    bias: np.ndarray | None, result_axis: int,
) -> None:  # fmt: skip
    """weight [N, K] times `axis` of x, one of the last two; `result_axis` is that of the result.

    Where features come before points, rows are planes as they lie.
    """
    shape = shape_of(x)
    images, points = int(np.prod(shape[:-2])), shape[-1 if axis < len(shape) - 1 else -2]
    if points == 1 and _lower_single(b, node, x, axis, images, weight, bias, result_axis):
        return
    if x.dtype != ir.DataType.FLOAT:
        raise Declined(f"'{x.name}' is {x.dtype}, products take float32")
    result = node.outputs[0]
    if points == 1 and images > 1:  # those of all images, as one
        stored = b.to_feature(x, replace(b.row(x), shape=(images, weight.shape[1])), 1)
        layout = _result_layout(stored.fm, result_axis)
        result, bias, added = _absorb_bias(b, result, bias, len(weight), layout)
        region = regions.grow(result, lambda _: None)
        _product_to_rows(b, [node, *added, *region.nodes], stored, weight, bias, region, layout)
        return
    if len(shape) > 3:
        stored = b.to_feature(x, replace(b.row(x), shape=(images, *shape[-2:])), 1)
    else:
        stored = b.feature(x, axis)
    emit_product(
        b, [node], stored, weight, bias, result, _result_layout(stored.fm, result_axis), None
    )


def _lower_single(
    b: Builder, node: ir.Node, x: ir.Value, axis: int, images: int, weight: np.ndarray,
    bias: np.ndarray | None, result_axis: int,
) -> bool:  # fmt: skip
    """Lower a product of single points, whose activations need no layout of their own, if it can.

    `axis` of x is that of the columns, `result_axis` that of the rows.
    """
    if images > MOST_IMAGES or weight.shape[1] > MOST_COLUMNS:
        return False
    layout = blocked(images, len(weight), 1, result_axis, b.target)
    result, bias, added = _absorb_bias(b, node.outputs[0], bias, len(weight), layout)

    def classify(value: ir.Value) -> str | None:
        kind = feature_kind(b, value, result, layout) if constant(value) is not None else None
        return kind if kind == "feature" else None

    region = regions.grow(result, classify)
    if len(region.operands) > 3:
        return False
    stored = b.single(x, axis, images)
    step_single(b, [node, *added, *region.nodes], stored, weight, bias, region, layout)
    return True


def step_single(
    b: Builder,
    nodes: list[ir.Node],
    x: Stored,
    weight: np.ndarray,
    bias: np.ndarray | None,
    region: regions.Region,
    layout: FeatureMajor,
) -> None:
    """Append a product of single points; row-major where every reader takes that."""
    operands = problem.Operands(weight, x.fm, layout, None)
    case = problem.of(operands, b.target)
    choice = b.decide(case, operands, b.target)
    if layout.images > 1 or all(map(_reads_rows, region.result.consumers())):
        made = b.new_row(region.result)
        to = replace(made, layout=flat(layout.images, len(weight), layout.axis))
    else:
        to = b.new_feature(region.result, layout)
    name = nodes[0].name or name_of(nodes[0].outputs[0])
    full_bias = np.zeros(len(weight), np.float32) if bias is None else bias.astype(np.float32)
    single_point.step_vector_product(b, nodes, name, x, weight, full_bias, to, region, choice)
    b.describe(nodes[0], weight.shape, case.density, choice, weight.size * layout.images)


def _reads_rows(node: ir.Node) -> bool:
    """True for a product that may read single points as they lie."""
    weight = constant(node.inputs[1]) if node.op_type in ("MatMul", "Gemm") else None
    return weight is not None and weight.ndim == 2


def lower_conv(b: Builder, node: ir.Node) -> None:
    """Convolution over one to three axes, any groups; depthwise over maps has its own kernel."""
    from sparsegraph.lower.depthwise import lower_depthwise

    x, weight = node.inputs[0], constant(node.inputs[1])
    assert x is not None
    if weight is None:
        raise Declined("the weight is not constant")
    bias = constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] else None
    if len(node.inputs) > 2 and node.inputs[2] is not None and bias is None:
        raise Declined("the bias is not constant")
    window = window_of(node, shape_of(x), weight.shape)
    weight = weight.reshape(*weight.shape[:2], *window.weight_taps)
    groups = int_attribute(node, "group", 1)
    if groups > 1 and weight.shape[1] == 1:
        if window.depth != ONE:
            raise Declined("depthwise over three axes")
        lower_depthwise(b, node, x, weight, bias, window)
        return
    if groups == 1 and window.is_patches:
        _lower_patches(b, node, x, weight, bias, window)
        return
    stored = b.maps(x)
    result = node.outputs[0]
    points = math.prod(window.extents)
    layout = FeatureMajor(stored.fm.images, 0, points, 0, 0, 0, 0, 1)
    if groups == 1:
        emit_product(b, [node], stored, weight, bias, result, layout, window)
        return
    whole = b.new_feature(result, layout)
    per_in, per_out = weight.shape[1], weight.shape[0] // groups
    for g in range(groups):
        rows = slice(g * per_out, (g + 1) * per_out)
        part = Stored(stored.ref, stored.shape, "float32", stored.fm.slice(g * per_in, per_in))
        to = Stored(whole.ref, whole.shape, "float32", whole.fm.slice(rows.start, per_out))
        one = None if bias is None else bias[rows]
        step_product(b, [node], part, weight[rows], one, to, window, None)


def _lower_patches(
    b: Builder,
    node: ir.Node,
    x: ir.Value,
    weight: np.ndarray,
    bias: np.ndarray | None,
    window: Window,
) -> None:
    """Patch embedding: pixels of a patch become features by one transpose, then a product."""
    row = b.row(x)
    images, channels = row.shape[:2]
    (kd, kh, kw), (od, oh, ow) = window.taps, window.extents
    pixels = channels * window.n_taps
    n_bytes = 4 * row.size
    ref = b.temporary(f"{node.name}.patches", n_bytes)
    parts = (images, channels, od, kd, oh, kh, ow, kw)
    call = movement.transpose("float32", parts, (0, 1, 3, 5, 7, 2, 4, 6))
    emit_call(b, call, ref, row.address)
    patches = Stored(ref, (images, pixels, od, oh, ow), "float32")
    stored = b.to_feature(x, patches, 1)
    layout = FeatureMajor(images, 0, od * oh * ow, 0, 0, 0, 0, 1)
    flat = np.ascontiguousarray(weight.reshape(len(weight), pixels))
    emit_product(b, [node], stored, flat, bias, node.outputs[0], layout, None)


def emit_product(
    b: Builder,
    nodes: list[ir.Node],
    x: Stored,
    weight: np.ndarray,
    bias: np.ndarray | None,
    result: ir.Value,
    layout: FeatureMajor,
    window: Window | None,
) -> None:
    """A product and the element-wise region that follows it, as one kernel call."""
    result, bias, added = _absorb_bias(b, result, bias, len(weight), layout)
    nodes = [*nodes, *added]
    region = regions.grow(result, lambda v: feature_kind(b, v, result, layout))
    if len(region.operands) > 3:
        region = regions.Region(("arg", 0), (), (), result, ())
    nodes = [*nodes, *region.nodes]
    is_last = layout.axis == len(shape_of(region.result)) - 1
    if window is None and not region.operands and is_last and b.is_output(region.result):
        _product_to_rows(b, nodes, x, weight, bias, region, layout)
        return

    def make() -> None:
        to = None if is_last else _own_planes(b, region.result, x, window, layout.axis)
        in_planes = direct.wants_planes(b.target, window)
        to = to or b.new_feature(region.result, layout, is_planar=in_planes)
        step_product(b, nodes, x, weight, bias, to, window, region)

    if not expand.wait(b, nodes, x, weight, bias, region, window, make):
        make()


def _own_planes(
    b: Builder, result: ir.Value, x: Stored, window: Window | None, axis: int
) -> Stored | None:
    """The caller's planes for a pointwise product, unless partial sums would wait there for long.

    Planes are often a power of two apart: what does not stay in the cache is slow to read again.
    """
    if window is not None and not window.is_pointwise:
        return None
    panel, n_bytes = 4 * x.fm.features * x.fm.block, 4 * int(np.prod(shape_of(result)))
    if panel > b.target.l1_bytes and n_bytes > b.target.l2_bytes:
        return None
    return b.own_planes(result, axis)


def _product_to_rows(
    b: Builder,
    nodes: list[ir.Node],
    x: Stored,
    weight: np.ndarray,
    bias: np.ndarray | None,
    region: regions.Region,
    layout: FeatureMajor,
) -> None:
    """A product that nothing but the caller reads, in parts of which a tile stays in the cache.

    Each part is a product of some rows of the weight and the layout change behind it.
    """
    to, n = b.new_row(region.result), len(weight)
    fm = blocked(layout.images, n, layout.points, layout.axis, b.target)
    most = max(_PART, b.target.l2_bytes // 2 // (4 * fm.row) // _PART * _PART)
    parts = -(-n // most)
    size = -(-n // (parts * _PART)) * _PART
    for first in range(0, n, size):
        rows = slice(first, min(n, first + size))
        part = b.part_of(region.result, layout, rows.stop - first)
        one = None if bias is None else bias[rows]
        step_product(b, nodes, x, weight[rows], one, part, None, region)
        b.to_tokens(part, Ref(to.ref.buffer, to.ref.offset + first), n)


def _absorb_bias(
    b: Builder, result: ir.Value, bias: np.ndarray | None, rows: int, layout: FeatureMajor
) -> tuple[ir.Value, np.ndarray | None, list[ir.Node]]:
    """Fold a following Add of a constant vector into the bias."""
    if result.is_graph_output() or len(result.consumers()) != 1:
        return result, bias, []
    node = result.consumers()[0]
    if node.op_type != "Add" or shape_of(node.outputs[0]) != shape_of(result):
        return result, bias, []
    other = node.inputs[1] if node.inputs[0] is result else node.inputs[0]
    vector = None if other is None else constant(other)
    if other is None or vector is None or feature_kind(b, other, result, layout) != "feature":
        return result, bias, []
    total = vector.ravel() if bias is None else bias + vector.ravel()
    return node.outputs[0], np.broadcast_to(total, (rows,)), [node]


def step_product(
    b: Builder,
    nodes: list[ir.Node],
    x: Stored,
    weight: np.ndarray,
    bias: np.ndarray | None,
    to: Stored,
    window: Window | None,
    region: regions.Region | None,
) -> None:
    """Append one product kernel. `weight` is [rows, columns] or [rows, channels, *taps]."""
    lanes, target = b.target.lanes, b.target
    y = to.fm
    taps = int(np.prod(weight.shape[2:], dtype=np.int64))
    step = None if window is None or window.is_pointwise else gather_of(window, x.fm, target)
    columns = int(np.prod(weight.shape[1:], dtype=np.int64))
    planes, plain = region is None or _in_planes(b, region), single_point.is_plain(region)
    operands = problem.Operands(weight, x.fm, y, window, planes, plain)
    layer = problem.of(operands, target)
    if step is None and y.block != x.fm.block and not layer.single:
        raise Declined(f"tiles of {x.fm.block} points in and {y.block} out")
    density = layer.density
    choice = b.decide(layer, operands, target)
    if choice.patch and window is not None:
        winograd.step_winograd(b, nodes, x, weight, bias, to, window, region, choice)
        b.describe(nodes[0], weight.shape, density, choice, layer.macs)
        return
    name = nodes[0].name or name_of(nodes[0].outputs[0])
    full_bias = np.zeros(len(weight), np.float32) if bias is None else bias.astype(np.float32)
    if choice.weight == "slots" or (choice.weight == "dense" and layer.single):
        matrix = weight.reshape(len(weight), columns)
        single_point.step_vector_product(b, nodes, name, x, matrix, full_bias, to, region, choice)
        b.describe(nodes[0], weight.shape, density, choice, weight.size * y.images)
        return
    if choice.weight == "panels":
        matrix = weight.reshape(len(weight), columns)
        panels.step_panels(b, nodes, x, matrix, full_bias, to, region)
        b.describe(nodes[0], weight.shape, density, choice, layer.macs)
        return
    if choice.weight == "coded" and step is not None and window is not None:
        in_place = direct.kernel_of(b, x, to, weight, window, region)
        if in_place is not None:
            direct.step_direct(b, nodes, in_place, x, weight, full_bias, to, region)
            b.describe(nodes[0], weight.shape, density, choice, layer.macs)
            return
    apart = None if window is None else phased(window, x.fm, target)
    if apart is not None:
        x, window = _phases(b, name, x, apart), apart
    n = sum(choice.split) * lanes // y.block  # tiles that are computed as one
    assert n == 1 or y.is_planar
    y = replace(y, block=n * y.block, tile=n * y.tile)
    tree = None if region is None or not region.nodes else region.tree
    kernel = Product(
        choice.weight, choice.group, choice.split, lanes, step, tree,
        tuple(region.kinds) if region else (), joined=joined(choice.split, target),
        line=target.panel_line, points=computed_points(y.points, y.block, target),
    )  # fmt: skip
    matrix = _columns_by_tile(weight, choice.tile // taps)
    items = y.images * y.tiles
    chunks = b.chunks if items < 4 * b.chunks else 1
    if choice.weight == "dense":
        packed = formats.pack_dense(matrix, choice.group, choice.tile, chunks)
    else:  # a gathered panel ends where its tile ends
        reach = choice.tile // 2 if step is None else 0
        row = x.fm.row if step is None else kernel.panel_row
        unit, distance = _unit_of_index(row, choice.tile + reach, target)
        near = distance > 0
        far = 4 * choice.tile * layer.row_of_pass(choice.split) > _FAR * target.l1_bytes
        narrow = target.narrow_index
        kernel = replace(kernel, near=near, far=far, unit=unit, narrow=narrow)
        packed = formats.pack_coded(
            matrix, choice.group, choice.tile, chunks,
            reach=reach, step=distance if near else 1,
        )  # fmt: skip
    args: list[Arg] = [
        to.address,
        y.image,
        y.tile,
        y.row,
        *x.strides(),
        y.images,
        y.tiles,
        columns,
        choice.tile,
    ]
    args.append(b.weight(f"{name}.bias", full_bias))
    args += [b.weight(f"{name}.{stream}", array) for stream, array in kernel.streams(packed)]
    if step is not None and window is not None:
        args.append(Scratch(kernel.panel_bytes(choice.tile) + 1024))
        args += [kernel.panel_row, taps]
        gathered = tables(window, x.fm, y, kernel.gather_lanes, target)._asdict()
        args += [b.weight(f"{name}.{table}", array) for table, array in gathered.items()]
    if region:
        for value, kind in zip(region.operands, region.kinds):
            args += _of_tiles(n, kind, operand(b, value, kind, to))
    macs = weight.size * y.images * y.points
    tiled: tuple[str, ...] = ("y", "x") if step is None else ("y",)
    tiled += tuple(f"o{i}" for i, kind in enumerate(kernel.operands) if kind == "same")
    b.step(
        kernel, args, items * len(packed.chunks), nodes, flops=int(2 * macs * density),
        dense_flops=2 * macs, tiled=tiled if len(packed.chunks) == 1 else (),
        detail=f"{choice.weight} {density:.1%} non-zero, {y.points} points",
    )  # fmt: skip
    b.describe(nodes[0], weight.shape, density, choice, macs)


def _phases(b: Builder, name: str, x: Stored, window: Phased) -> Stored:
    """The phases of x, four planes a channel."""
    fm, kernel = x.fm, Phases(b.target.shuffle_lanes)
    row = PHASES * window.plane
    layout = replace(fm, points=math.prod(window.out), image=fm.features * row, row=row, offset=0)
    to = replace(x, ref=b.temporary(f"{name}.phases", 4 * layout.size), layout=layout)
    args: list[Arg] = [to.address, layout.image, row, x.address, fm.image, fm.row]
    args += [window.plane, *window.size, fm.features]
    b.step(kernel, args, fm.images * fm.features, detail="even and odd rows and columns apart")
    return to


def _in_planes(b: Builder, region: regions.Region) -> bool:
    """True if all operands of the region that have points lie in planes."""
    same = (b.layout_of(v) for v, kind in zip(region.operands, region.kinds) if kind == "same")
    return all(layout is not None and layout.is_planar for layout in same)


def _unit_of_index(row: int, columns: int, target: Target) -> tuple[int, int]:
    """`Product.unit`, and the distance of two panel rows in it; 0 if indices count columns."""
    n_bytes = _VALUE_BYTES * row
    if target.index_unit == BYTES and columns * n_bytes <= formats.MOST:
        return BYTES, n_bytes
    unit = target.index_unit or UNIT
    distance, odd = divmod(row, unit)
    return unit, 0 if odd or columns * distance > formats.MOST else distance


def _of_tiles(n: int, kind: str, args: tuple[Arg, ...]) -> tuple[Arg, ...]:
    """Arguments of an operand whose tiles are joined, `n` to one."""
    if kind != "same":
        return args
    address, image, tile, row = args
    assert isinstance(tile, int)
    return address, image, n * tile, row


def _columns_by_tile(weight: np.ndarray, channels: int) -> np.ndarray:
    """[rows, channels, ..] -> [rows, columns], taps outermost within each tile of channels."""
    if weight.ndim == 2:
        return weight
    rows = len(weight)
    flat = weight.reshape(rows, weight.shape[1], -1)
    parts = [
        flat[:, first : first + channels].transpose(0, 2, 1).reshape(rows, -1)
        for first in range(0, flat.shape[1], channels)
    ]
    return np.ascontiguousarray(np.concatenate(parts, axis=1))


def _result_layout(x: FeatureMajor, axis: int) -> FeatureMajor:
    """A pattern for the result: the points of x with features on `axis`."""
    return FeatureMajor(x.images, 0, x.points, x.block, 0, 0, 0, axis)
