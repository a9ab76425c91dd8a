"""Conv, ConvTranspose, Gemm, MatMul, Einsum: weights make axes and sum over others."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sparsegraph.graph import (
    attribute,
    constant,
    float_attribute,
    input_at,
    int_attribute,
    ints_attribute,
    is_constant,
)
from sparsegraph.structure.align import align, right
from sparsegraph.structure.cut import Cut
from sparsegraph.structure.known import Known, Knowns
from sparsegraph.structure.labels import Axis
from sparsegraph.structure.rule import Shelf
from sparsegraph.structure.ties import Ties, shape_of

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


def tie_conv(t: Ties, node: ir.Node) -> None:
    """Output channels are made by the weight; input channels are summed, per group."""
    group = int_attribute(node, "group", 1)
    data, weight = t.input(node, 0), node.inputs[1]
    for axis in (data[0], *data[2:]):
        t.freeze(node, axis, "a convolution's batch and map axes must stay")
    out_at, in_at = (1, 0) if node.op_type == "ConvTranspose" else (0, 1)
    n_out, n_in = shape_of(node.outputs[0])[1], shape_of(node.inputs[0])[1]
    wanted: list[Axis] = [None] * len(shape_of(weight))
    if group == 1:
        made = _made(t, node, out_at, n_out)
        wanted[out_at], wanted[in_at] = made, data[1]
        t.sink(node, 0, 1, data[1])
    else:
        made, wanted[out_at], wanted[in_at] = _grouped(t, node, group, n_in, n_out)
    t.bind(node, 1, wanted)
    t.bind(node, 2, [made])
    t.set(node.outputs[0], [None, made, *[None] * (len(wanted) - 2)])


def _made(t: Ties, node: ir.Node, axis: int, n: int) -> Axis:
    weight = node.inputs[1]
    assert weight is not None
    return t.fresh(node, 1, axis, n) if is_constant(weight) else t.axes(weight)[axis]


def _grouped(t: Ties, node: ir.Node, group: int, n_in: int, n_out: int) -> tuple[Axis, Axis, Axis]:
    """Labels of the output, of the weight's output axis and of its input axis."""
    data = t.input(node, 0)[1]
    transposed = node.op_type == "ConvTranspose"
    out_at = 1 if transposed else 0
    whole = t.policy.grouped == "whole" or n_in == group
    if not is_constant(node.inputs[1]):
        t.freeze(node, data, "a grouped convolution with a computed weight")
        return None, None, None
    if whole and data is not None:
        unit = t.fresh(node, 1, out_at, group)
        assert unit is not None
        t.tie(node, data.reshape(group, -1), unit[:, None])
        made = np.repeat(unit, n_out // group)
        return (made, None, np.repeat(unit, n_in // group)) if transposed else (made, made, None)
    inner: Axis = None
    if data is not None:
        inner = data.reshape(group, -1)[0]
        t.tie(node, data.reshape(group, -1), inner[None])
        t.sink(node, 0, 1, data)
    unit = t.fresh(node, 1, out_at, n_out // group)
    made_ = None if unit is None else np.tile(unit, group)
    return (made_, unit, data) if transposed else (made_, made_, inner)


def cut_conv(cut: Cut, node: ir.Node) -> None:
    """Whole groups that went are taken off the `group` attribute."""
    group = int_attribute(node, "group", 1)
    if group == 1:
        return
    kept = cut.kept(node.inputs[0], 1).reshape(group, -1)  # type: ignore[arg-type]
    lives = kept.any(axis=1)
    if not lives.all():
        node.attributes["group"] = ir.AttrInt64("group", int(lives.sum()))


def known_conv(k: Knowns, node: ir.Node) -> None:
    """A filter that sees zeros and unpadded constants only makes its bias and their sum."""
    weight = _taps(node)
    if weight is None:
        return
    group, n_out = int_attribute(node, "group", 1), shape_of(node.outputs[0])[1]
    rank = len(shape_of(node.outputs[0]))
    data = k.along(node.inputs[0], 1)
    data = np.full(shape_of(node.inputs[0])[1], np.nan) if data is None else data
    data = data.reshape(group, -1)
    hides = np.isnan(data) if _pads_nothing(node) else data != 0
    unknown = np.einsum("goc,gc->go", weight.any(axis=3), hides) > 0
    total = np.einsum("gock,gc->go", weight, np.nan_to_num(data))
    total = np.where(unknown, np.nan, total).reshape(n_out)
    bias = _bias(k, input_at(node, 2), n_out)
    k.set(node.outputs[0], (total + bias).reshape(1, n_out, *[1] * (rank - 2)))


def _bias(k: Knowns, value: ir.Value | None, n: int) -> Array:
    if value is None:
        return np.zeros(n)
    known = k.of(value)
    return np.full(n, np.nan) if known is None else np.broadcast_to(known, (n,))


def _taps(node: ir.Node) -> Array | None:
    """A convolution's weight as [group, out, in, taps]."""
    array = constant(node.inputs[1])
    if array is None or array.dtype.kind != "f":
        return None
    group = int_attribute(node, "group", 1)
    flat = array.reshape(*array.shape[:2], -1)
    if node.op_type == "ConvTranspose":
        return flat.reshape(group, -1, *flat.shape[1:]).swapaxes(1, 2)
    return flat.reshape(group, -1, *flat.shape[1:])


def _pads_nothing(node: ir.Node) -> bool:
    """True when every output sums the same taps of inside points."""
    if node.op_type != "Conv" or attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return False
    return not any(ints_attribute(node, "pads") or ())


def silent_conv(node: ir.Node, at: int) -> Mask | None:
    """Input channels whose slice of the weight is zero."""
    weight = _taps(node) if at == 0 else None
    return None if weight is None else ~weight.any(axis=(1, 3)).reshape(-1)


def fold_conv(node: ir.Node, at: int) -> Array | str:
    """A constant channel adds the sum of its taps, unless padding breaks it at the border."""
    weight = _taps(node) if at == 0 else None
    if weight is None:
        return "its weight is no constant"
    if not _pads_nothing(node):
        return "it pads the map, so a constant channel is no constant at the border"
    group, n_out, n_in, _ = weight.shape
    gain = np.zeros((group, n_in, group, n_out))
    for number in range(group):
        gain[number, :, number] = weight[number].sum(axis=2).T
    return gain.reshape(group * n_in, group * n_out)


def shelf_conv(node: ir.Node, at: int) -> Shelf | None:
    """The weight's input channels; within groups they stand for several channels each."""
    if at != 0 or not is_constant(node.inputs[1]) or int_attribute(node, "group", 1) > 1:
        return None
    return 1, 0 if node.op_type == "ConvTranspose" else 1


def tie_matmul(t: Ties, node: ir.Node) -> None:
    """[..., M, K] x [..., K, N]; a vector has K only."""
    a, b = (_product_letters(t, node, at) for at in (0, 1))
    out: list[object] = list(range(len(shape_of(node.outputs[0])) - ("M" in a) - ("N" in b)))
    align(t, node, {0: a, 1: b}, [*out, *[one for one in ("M", "N") if one in (*a, *b)]])


def _product_letters(t: Ties, node: ir.Node, at: int) -> list[object]:
    rank = t.rank(node.inputs[at])  # type: ignore[arg-type]
    if rank == 1:
        return ["K"]
    batch = max(t.rank(v) for v in node.inputs[:2] if v is not None) - 2
    letters: list[object] = list(range(batch - (rank - 2), batch))
    return [*letters, *(("M", "K") if at == 0 else ("K", "N"))]


def tie_gemm(t: Ties, node: ir.Node) -> None:
    """alpha A B + beta C with flags."""
    a = ["K", 0] if int_attribute(node, "transA", 0) else [0, "K"]
    b = [1, "K"] if int_attribute(node, "transB", 0) else ["K", 1]
    inputs: dict[int, Sequence[object]] = {0: a, 1: b}
    bias = input_at(node, 2)
    if bias is not None:
        inputs[2] = right(bias, node.outputs[0])
    align(t, node, inputs, [0, 1])


def tie_einsum(t: Ties, node: ir.Node) -> None:
    """Letters as written; an ellipsis freezes."""
    equation = str(attribute(node, "equation", "")).replace(" ", "")
    left, arrow, out = equation.partition("->")
    if not arrow or "." in equation or any(len(set(term)) < len(term) for term in left.split(",")):
        t.freeze_inputs(node, f"an equation that is not read: {equation}")
        return
    align(t, node, {at: list(term) for at, term in enumerate(left.split(","))}, list(out))


def known_matmul(k: Knowns, node: ir.Node) -> None:
    """Sums whose every term is known, or zero times anything."""
    a, b = _operands(k, node.inputs[0], node.inputs[1])
    if a is not None and b is not None:
        k.set(node.outputs[0], _product(a, b))


def known_gemm(k: Knowns, node: ir.Node) -> None:
    """As MatMul, with scales and the third operand."""
    a, b = _operands(k, node.inputs[0], node.inputs[1])
    bias = input_at(node, 2)
    known = k.of(bias)
    if a is None or b is None or (bias is not None and known is None):
        return
    a = a.T if int_attribute(node, "transA", 0) else a
    b = b.T if int_attribute(node, "transB", 0) else b
    total = float_attribute(node, "alpha", 1.0) * _product(a, b)
    if known is not None:
        total = total + float_attribute(node, "beta", 1.0) * known
    k.set(node.outputs[0], total)


def _operands(k: Knowns, *values: ir.Value | None) -> tuple[Known | None, ...]:
    """What is known of both; NaN for one of which nothing is, None when a vector is among them."""
    known = [k.of(v) for v in values]
    shapes = [shape_of(v) for v in values]
    if all(one is None for one in known) or any(len(shape) < 2 for shape in shapes):
        return None, None
    return tuple(
        np.full([1] * (len(shape) - 2) + list(shape[-2:]), np.nan) if one is None else one
        for one, shape in zip(known, shapes, strict=True)
    )


def _product(a: Known, b: Known) -> Known:
    """a @ b where NaN times zero is zero. Axes of size one stand for a repeated number."""
    inner = max(a.shape[-1], b.shape[-2])
    a = np.broadcast_to(a, (*a.shape[:-1], inner))
    b = np.broadcast_to(b, (*b.shape[:-2], inner, b.shape[-1]))
    if np.isnan(a).all():
        a = a[(0,) * (a.ndim - 2)][None, :1].reshape([1] * (a.ndim - 1) + [inner])
    hides = np.isnan(a).astype(np.float32) @ (b != 0).astype(np.float32)
    if np.isnan(b).any():
        hides = hides + (a != 0).astype(np.float32) @ np.isnan(b).astype(np.float32)
    if (hides > 0).all():
        return np.full(hides.shape, np.nan)
    return np.where(hides > 0, np.nan, np.nan_to_num(a) @ np.nan_to_num(b))


def silent_product(node: ir.Node, at: int) -> Mask | None:
    """Summed positions whose row of the other, constant operand is zero."""
    weight = _rows(node, at)
    if weight is None:
        return None
    return np.asarray(~weight.any(axis=tuple(range(1, weight.ndim))))


def fold_product(node: ir.Node, at: int) -> Array | str:
    """A constant feature adds its row of the weight (before the scale alpha of Gemm)."""
    weight = _rows(node, at)
    if weight is None or weight.ndim != 2 or at != 0:
        return "its other operand is no constant matrix"
    return weight.astype(np.float64)


def _rows(node: ir.Node, at: int) -> np.ndarray | None:
    """The constant operand beside input `at`, with the summed axis first."""
    array = constant(node.inputs[1 - at]) if at in (0, 1) else None
    if array is None or array.ndim < 2 or node.op_type == "Einsum":
        return None
    if node.op_type == "Gemm":
        flipped = int_attribute(node, "transB" if at == 0 else "transA", 0)
        return array.T if (at == 0) == bool(flipped) else array
    return np.moveaxis(array, -2 if at == 0 else -1, 0)
