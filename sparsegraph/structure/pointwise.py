"""Element-wise operators with broadcasting, and norms that work per channel or over channels."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from sparsegraph.graph import constant, input_at, int_attribute, is_constant, is_op
from sparsegraph.structure import layer_norm
from sparsegraph.structure.align import align, right
from sparsegraph.structure.cut import Cut
from sparsegraph.structure.known import Known, Knowns, evaluate
from sparsegraph.structure.signs import is_positive
from sparsegraph.structure.ties import Ties, shape_of

_FULL = (ir.DataType.FLOAT, ir.DataType.DOUBLE)


def tie_pointwise(t: Ties, node: ir.Node) -> None:
    """Every operand broadcasts to the output."""
    out = node.outputs[0]
    inputs = {at: right(v, out) for at, v in enumerate(node.inputs) if v is not None}
    align(t, node, inputs, range(len(shape_of(out))))
    for other in node.outputs[1:]:
        if other.name:  # the mask of Dropout
            t.set(other, t.axes(out))


def known_pointwise(k: Knowns, node: ir.Node) -> None:
    """The node on what is known; zero times anything is zero, and zero by what is above it."""
    values = [v for v in node.inputs if v is not None]
    if not any(v in k.found for v in values) and not (
        node.op_type in ("Mul", "And", "Where") and any(is_constant(v) for v in values)
    ):
        return
    known = [None if v is None else _number(k, v) for v in node.inputs]
    if node.op_type == "Where":
        k.set(node.outputs[0], _where(node, known))
    elif node.op_type == "Mul":
        k.set(node.outputs[0], _same_rank(_multiply(*known), node))
    elif node.op_type == "Div" and known[1] is None and is_positive(node.inputs[1]):
        zero = None if known[0] is None else np.where(known[0] == 0, 0.0, np.nan)
        k.set(node.outputs[0], _same_rank(zero, node))
    elif not any(v is not None and one is None for v, one in zip(node.inputs, known, strict=True)):
        k.set(node.outputs[0], _same_rank(_run(node, known), node))


def _number(k: Knowns, value: ir.Value) -> Known | None:
    array = constant(value)
    if array is not None and array.dtype.kind in "iub":
        return array.astype(np.float64)
    return k.of(value)


def _same_rank(known: Known | None, node: ir.Node) -> Known | None:
    if known is None:
        return None
    rank = len(shape_of(node.outputs[0]))
    return known.reshape((1,) * (rank - known.ndim) + known.shape)


def _multiply(a: Known | None, b: Known | None) -> Known | None:
    if a is None or b is None:
        one = a if b is None else b
        return None if one is None else np.where(one == 0, 0.0, np.nan)
    return np.where((a == 0) | (b == 0), 0.0, a * b)


def _where(node: ir.Node, known: Sequence[Known | None]) -> Known | None:
    condition, yes, no = known
    if condition is None:
        return None
    nothing = np.full((1,), np.nan)
    chosen = np.where(
        condition != 0, nothing if yes is None else yes, nothing if no is None else no
    )
    return _same_rank(chosen, node)


def _run(node: ir.Node, known: Sequence[Known | None]) -> Known | None:
    present = [one for one in known if one is not None]
    unknown = np.isnan(np.broadcast_arrays(*present)).any(axis=0)
    arrays = [
        None if v is None or one is None or v.dtype is None
        else np.asarray(np.where(np.isnan(one), 0, one), v.dtype.numpy())
        for v, one in zip(node.inputs, known, strict=True)
    ]  # fmt: skip
    if unknown.all():
        return None
    return np.where(unknown, np.nan, evaluate(node, arrays).astype(np.float64))


def tie_channel_norm(t: Ties, node: ir.Node) -> None:
    """BatchNormalization, InstanceNormalization: one statistic per channel."""
    if any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
        t.freeze_inputs(node, "a norm in training mode")
        return
    rank = len(shape_of(node.outputs[0]))
    params = {at: [1] for at in range(1, len(node.inputs)) if node.inputs[at] is not None}
    align(t, node, {0: range(rank), **params}, range(rank))


def known_batch_norm(k: Knowns, node: ir.Node) -> None:
    """A channel with scale zero holds its shift; a constant one stays constant."""
    data = k.of(node.inputs[0])
    params = [k.of(v) for v in node.inputs[1:5]]
    if any(p is None for p in params):
        return
    rank, n = len(shape_of(node.outputs[0])), shape_of(node.outputs[0])[1]
    scale, shift, mean, variance = (
        p.reshape(1, n, *[1] * (rank - 2)) for p in params if p is not None
    )
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    factor = scale / np.sqrt(variance + epsilon)
    moved = np.full((1,) * rank, np.nan) if data is None else data
    k.set(node.outputs[0], np.where(factor == 0, shift, (moved - mean) * factor + shift))


def tie_feature_norm(t: Ties, node: ir.Node) -> None:
    """LayerNormalization, RMSNormalization: statistics over the last axes."""
    out = node.outputs[0]
    rank = len(shape_of(out))
    first = int_attribute(node, "axis", -1) % rank
    if any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
        t.freeze_inputs(node, "its statistics are read")
        return
    exact = _is_exact(t, node, first)
    if not t.policy.through_norm and not exact:
        for axis in t.input(node, 0)[first:]:
            t.freeze(node, axis, f"{node.op_type} over the features{_obstacle(t, node)}")
        t.set(out, [*t.input(node, 0)[:first], *[None] * (rank - first)])
        return
    inputs = {at: right(v, out) for at, v in enumerate(node.inputs) if v is not None}
    if exact:
        t.sink(node, 0, first, t.input(node, 0)[first])
    align(t, node, inputs, range(rank))


def _obstacle(t: Ties, node: ir.Node) -> str:
    if not t.policy.carry_mean:
        return ""
    return ": its mean is carried over one axis, with constant scales, in float or double only"


def _is_exact(t: Ties, node: ir.Node, first: int) -> bool:
    """True for a norm over one axis with constant scales, in which zeros can be counted.

    A LayerNormalization of half floats computes in float; plain operators in its place would not.
    """
    last = len(shape_of(node.outputs[0])) - 1
    is_full = node.inputs[0] is not None and node.inputs[0].dtype in _FULL
    wanted = t.policy.carry_mean and is_full
    if is_op(node, "RMSNormalization"):
        wanted = t.policy.rescale
    vectors = [v for v in node.inputs[1:] if v is not None]
    size = shape_of(node.inputs[0])[last]
    return (
        wanted and first == last and all(is_constant(v) and shape_of(v) == (size,) for v in vectors)
    )


def cut_feature_norm(cut: Cut, node: ir.Node) -> None:
    """x / sqrt(sum / n + e) is sqrt(n / m) x / sqrt(sum / m + e n / m), for a sum of m squares."""
    data, scale = node.inputs[0], constant(node.inputs[1])
    assert data is not None
    keep = cut.kept(data, -1)
    n, m = len(keep), int(keep.sum())
    if m == n:
        return
    if not is_op(node, "RMSNormalization"):
        if cut.analysis.ties.policy.carry_mean:
            layer_norm.carry_mean(cut, node, n, m)
        return
    assert scale is not None
    moved = (scale.astype(np.float64) * np.sqrt(n / m)).astype(scale.dtype)
    cut.replace(node, 1, moved, f"{n / m}".encode())
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    node.attributes["epsilon"] = ir.AttrFloat32("epsilon", epsilon * n / m)


def known_feature_norm(k: Knowns, node: ir.Node) -> None:
    """A feature with scale zero holds its shift; so does a zero under a mean of squares."""
    scale, shift = k.of(node.inputs[1]), k.of(input_at(node, 2))
    if scale is None or (input_at(node, 2) is not None and shift is None):
        return
    known = np.where(scale == 0, 0.0 if shift is None else shift, np.nan)
    data = k.of(node.inputs[0]) if is_op(node, "RMSNormalization") else None
    if data is not None:
        known = np.where(data == 0, 0.0, known)
    k.set(node.outputs[0], _same_rank(known, node))


def tie_group_norm(t: Ties, node: ir.Node) -> None:
    """GroupNormalization: whole groups only."""
    groups = int_attribute(node, "num_groups", 1)
    data = t.input(node, 0)
    channels = data[1]
    if shape_of(node.inputs[1]) != (shape_of(node.inputs[0])[1],):
        t.freeze_inputs(node, "scales per group")
        return
    if channels is not None:
        t.tie(node, channels.reshape(groups, -1), channels.reshape(groups, -1)[:, :1])
        if groups == 1:
            t.freeze(node, channels, "a norm over all channels")
    t.bind(node, 1, [channels])
    t.bind(node, 2, [channels])
    t.set(node.outputs[0], data)


def cut_group_norm(cut: Cut, node: ir.Node) -> None:
    """Count the groups that are left."""
    groups = int_attribute(node, "num_groups", 1)
    kept = cut.kept(node.inputs[0], 1).reshape(groups, -1)  # type: ignore[arg-type]
    node.attributes["num_groups"] = ir.AttrInt64("num_groups", int(kept.any(axis=1).sum()))


def known_channel_scale(k: Knowns, node: ir.Node) -> None:
    """InstanceNormalization, GroupNormalization: a channel with scale zero holds its shift."""
    scale, shift = k.of(node.inputs[1]), k.of(node.inputs[2])
    rank, n = len(shape_of(node.outputs[0])), shape_of(node.outputs[0])[1]
    if scale is not None and shift is not None and scale.shape == (n,):
        dead = np.where(scale == 0, shift, np.nan)
        k.set(node.outputs[0], dead.reshape(1, n, *[1] * (rank - 2)))


def tie_over_axis(t: Ties, node: ir.Node) -> None:
    """Operators that mix the positions of one axis: that axis must stay."""
    data = list(t.input(node, 0))
    axis = _mixed_axis(t, node) % len(data)
    t.freeze(node, data[axis], f"{node.op_type} mixes the positions of this axis")
    data[axis] = None
    for value in node.outputs:
        if value.name:
            t.set(value, data)


def _mixed_axis(t: Ties, node: ir.Node) -> int:
    if node.op_type == "LRN":
        return 1
    if node.op_type == "CumSum":
        at = constant(node.inputs[1])
        return 0 if at is None else int(at.reshape(()))
    return int_attribute(node, "axis", -1)
