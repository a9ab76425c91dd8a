"""Recognise scaled dot-product attention and write it as one Attention (opset 23).

    s = MatMul(q * c, kt * c); m = Add(s, mask); p = Softmax(m); y = MatMul(p, v)
        ->  y = Attention<scale=c*c>(q, Transpose(kt), v, mask)         (q, k, v: [B, H, T, d])

Scales may stand on q, on k, or after the product, as Mul or Div by a number. The mask is an Add, or
a Where that puts a constant at blocked places; IsNaN/Where after the softmax (a guard for rows
without any key) is taken in. Three-dimensional operands become [1, B*H, T, d].

A row whose keys are all blocked must keep its meaning. Softmax over a row of one finite value is
uniform, while Attention in ONNX Runtime returns zeros once all entries are at the lowest float, so
finite masks are raised to -1e30: still exp() = 0, still uniform when alone. Where -inf blocks a row
at run time, softmax gives NaN and Attention zeros, so NaN is added where the row's highest mask
entry is -inf, and zero elsewhere. (The guard gives zeros as well.)

Declines when: a row of a constant mask is -inf everywhere, nothing is known of an additive mask,
the softmax is not over keys, the probabilities have another user, the ranks are not 3 or 4, a shape
is unknown, or the opset is below 23.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from sparsegraph.passes.merge_transposes import permutation

from sparsegraph.graph import (
    constant,
    has_one_use,
    int_attribute,
    is_op,
    made_by,
    opset_of,
    scalar,
    static_shape,
)
from sparsegraph.rewrite import Builder, Decline, RewritePass, decline

FLOOR = -1e30  # far below any score, far above the lowest float


@dataclass(frozen=True)
class Mask:
    """An additive mask `value`, or `fill` where the bool `value` is `blocked`.

    Attributes:
        clamp: raise it to FLOOR.
        keeps_nan: it may be -inf in a whole row, whose result must be NaN.
    """

    value: ir.Value
    fill: float | None = None
    blocked: bool = False
    clamp: bool = False
    keeps_nan: bool = False


@dataclass(frozen=True)
class Found:
    """The operands; `kt` is [.., d, keys], `v` is [.., keys, d]."""

    q: ir.Value
    kt: ir.Value
    v: ir.Value
    scale: float
    mask: Mask | None
    output: ir.Value


@dataclass(frozen=True)
class FuseAttention(RewritePass):
    """Attention from products and softmax."""

    name: ClassVar[str] = "fuse_attention"

    def match(self, node: ir.Node, graph: ir.Graph) -> Found | Decline | None:
        """MatMul of a softmax of a masked, scaled MatMul."""
        if not is_op(node, "MatMul"):
            return None
        probabilities, guarded = _unguarded(node.inputs[0])
        softmax = made_by(probabilities, "Softmax")
        if softmax is None or softmax.inputs[0] is None:
            return None
        scores, scale, mask = _scores(softmax.inputs[0])
        product = made_by(scores, "MatMul")
        if product is None or constant(product.inputs[1]) is not None:
            return None
        reason = _obstacle(node, softmax, product, scores)
        if reason:
            return decline(node, reason)
        safe = None if mask is None else _safe(mask, guarded)
        if isinstance(safe, str):
            return decline(node, safe)
        if safe is not None and safe.clamp and scores.dtype == ir.DataType.FLOAT16:
            return decline(node, "float16 has no number between any score and its lowest")
        return _found(node, product, scale, safe)

    def rewrite(self, found: Found, build: Builder) -> Sequence[ir.Value]:
        """Bring operands to four dimensions, then one Attention."""
        q, v = _to_4d(found.q, build), _to_4d(found.v, build)
        k = _keys(found.kt, build)
        inputs, lost = [q, k, v], None
        if found.mask is not None:
            mask = _additive(found, build)
            lost = _lost(mask, build) if found.mask.keeps_nan else None
            inputs.append(build.expanded(mask, (*_shape(mask)[:-2], *_full(found))))
        shape = static_shape(found.output)
        assert shape is not None
        full = shape if len(shape) == 4 else (1, *shape)
        attributes = {"scale": found.scale}
        y = build.op("Attention", inputs, attributes, like=found.output, shape=full)
        if lost is not None:
            y = build.op("Add", [y, lost], like=y, shape=full)
        return [y] if len(shape) == 4 else [_reshape(y, shape, build)]


def _unguarded(value: ir.Value | None) -> tuple[ir.Value | None, bool]:
    """The softmax output behind Where(IsNaN(p), 0, p)."""
    where = made_by(value, "Where")
    if where is None:
        return value, False
    test = made_by(where.inputs[0], "IsNaN")
    p = where.inputs[2]
    if test is None or test.inputs[0] is not p or scalar(where.inputs[1]) != 0.0:
        return value, False
    return p, True


def _scores(value: ir.Value) -> tuple[ir.Value, float, Mask | None]:
    """The product below scale and mask, the scale, and the mask."""
    mask = None
    scale = 1.0
    masked = _masked(value)
    if masked is not None:
        value, mask = masked
    while True:
        value, factor = _unscaled(value)
        if factor is None:
            return value, scale, mask
        scale *= factor


def _masked(value: ir.Value) -> tuple[ir.Value, Mask] | None:
    node = made_by(value, "Add", "Where")
    if node is None:
        return None
    if is_op(node, "Add"):
        for side in (0, 1):
            scores, other = node.inputs[side], node.inputs[1 - side]
            if scores is not None and other is not None and _is_product(scores):
                return scores, Mask(other)
        return None
    condition, yes, no = node.inputs
    if condition is None or yes is None or no is None:
        return None
    for scores, other, blocked in ((no, yes, True), (yes, no, False)):
        fill = scalar(other)
        if fill is not None and _is_product(scores):
            return scores, Mask(condition, fill, blocked)
    return None


def _is_product(value: ir.Value) -> bool:
    while True:
        inner, factor = _unscaled(value)
        if factor is None:
            return made_by(value, "MatMul") is not None
        value = inner


def _unscaled(value: ir.Value) -> tuple[ir.Value, float | None]:
    """The operand and the number of a Mul or Div by a number that nothing else reads."""
    node = made_by(value, "Mul", "Div")
    if node is None:
        return value, None
    for side in (0, 1) if is_op(node, "Mul") else (0,):
        operand, factor = node.inputs[side], scalar(node.inputs[1 - side])
        if operand is None or factor is None or static_shape(operand) != static_shape(value):
            continue
        if is_op(node, "Div"):
            return (operand, 1.0 / factor) if factor else (value, None)
        return operand, factor
    return value, None


def _obstacle(node: ir.Node, softmax: ir.Node, product: ir.Node, scores: ir.Value) -> str:
    shapes = [static_shape(v) for v in (*product.inputs, node.inputs[1], scores)]
    if any(s is None for s in shapes):
        return "a shape is unknown"
    ranks = {len(s) for s in shapes if s is not None}
    if ranks not in ({3}, {4}):
        return f"operands of {sorted(ranks)} dimensions, 3 or 4 are needed"
    rank = ranks.pop()
    q, kt, v = (s for s in shapes[:3] if s is not None)
    if not q[:-2] == kt[:-2] == v[:-2]:
        return "heads are broadcast between the operands"
    if int_attribute(softmax, "axis", -1) % rank != rank - 1:
        return "the softmax is not over the keys"
    value: ir.Value | None = node.inputs[0]
    while value is not None and value is not scores:
        if any(u is not node and not _leads_to(u, node) for u in value.consumers()):
            return "scores or probabilities have another user"
        if value.is_graph_output():
            return "scores or probabilities are an output"
        producer = value.producer()
        assert producer is not None
        value = _inner(producer)
    if not has_one_use(scores):
        return "scores or probabilities have another user"
    if opset_of(node) < 23:
        return f"opset {opset_of(node)} has no Attention, 23 has"
    return ""


def _leads_to(user: ir.Node, node: ir.Node) -> bool:
    """True for the nodes between product and result: mask, scale, softmax, guard."""
    return is_op(user, "IsNaN", "Where", "Softmax", "Add", "Mul", "Div") and all(
        next_user is node or _leads_to(next_user, node) for next_user in user.outputs[0].consumers()
    )


def _inner(node: ir.Node) -> ir.Value | None:
    """The operand through which scores flow."""
    if is_op(node, "Where"):
        test = made_by(node.inputs[0], "IsNaN")
        if test is not None:
            return node.inputs[2]
        return node.inputs[2] if scalar(node.inputs[1]) is not None else node.inputs[1]
    if is_op(node, "Add", "Mul"):
        first = node.inputs[0]
        return first if first is not None and _is_product(first) else node.inputs[1]
    return node.inputs[0]


def _safe(mask: Mask, guarded: bool) -> Mask | str:
    """The mask, clamped where needed, or why fusing would change a fully blocked row."""
    if mask.fill is not None:
        return _safe_fill(mask, mask.fill, guarded)
    array = constant(mask.value)
    if array is not None:
        if array.dtype.kind != "f" or np.isnan(array).any():
            return "the mask is not a number everywhere"
        if np.isneginf(array).any():
            some = bool((array > FLOOR).any(axis=-1).all())
            return mask if some or guarded else "a row of the mask is -inf everywhere"
        return Mask(mask.value, clamp=bool(array.min(initial=0.0) < FLOOR))
    low = lowest(mask.value)
    if low is None:
        return "the additive mask may be -inf in a whole row"
    if low == -np.inf:
        return replace(mask, keeps_nan=not guarded)
    return Mask(mask.value, clamp=low < FLOOR)


def _safe_fill(mask: Mask, fill: float, guarded: bool) -> Mask | str:
    array = constant(mask.value)
    blocks = None if array is None else array == mask.blocked
    if blocks is not None and not blocks.all(axis=-1).any() and fill <= -1e4:
        return mask  # every row keeps a key, so only exp(fill) = 0 matters
    if fill == -np.inf:
        return replace(mask, keeps_nan=not guarded)
    if fill > FLOOR / 1e10:
        return f"blocked places are set to {fill:g}: a fully blocked row is uniform, not shifted"
    return Mask(mask.value, fill, mask.blocked, clamp=fill < FLOOR)


def lowest(value: ir.Value | None, depth: int = 6) -> float | None:
    """A lower bound of a mask's entries from how it is computed; -inf for a mask of 0 and -inf.

    Mul(1 - x, number) counts as bounded by the number: x is 0 or 1 in every mask of that form.
    None when nothing is known.
    """
    array = constant(value)
    if array is not None:
        return float(array.min()) if array.size and array.dtype.kind in "fiub" else None
    node = None if value is None else value.producer()
    if node is None or depth == 0:
        return None
    if is_op(node, "Where"):
        sides = [lowest(v, depth - 1) for v in node.inputs[1:]]
        if None in sides:
            return None
        lows = [s for s in sides if s is not None]
        return min(lows)
    if is_op(node, "Mul"):
        for side in (0, 1):
            number, other = scalar(node.inputs[1 - side]), node.inputs[side]
            if number is not None and _is_zero_or_one(other):
                return min(number, 0.0)
    if is_op(node, "Reshape", "Unsqueeze", "Expand", "Cast", "Squeeze", "Transpose", "Slice"):
        return lowest(node.inputs[0], depth - 1)
    if is_op(node, "Max") and len(node.inputs) == 2:
        known = [b for v in node.inputs if (b := lowest(v, depth - 1)) is not None]
        return max(known) if known else None
    return None


def _is_zero_or_one(value: ir.Value | None) -> bool:
    """True for 1 - x and for a bool or integer cast to a number."""
    sub = made_by(value, "Sub")
    if sub is not None:
        return scalar(sub.inputs[0]) == 1.0
    while (node := made_by(value, "Cast", "Reshape", "Unsqueeze", "Expand")) is not None:
        value = node.inputs[0]
        if value is not None and value.dtype == ir.DataType.BOOL:
            return True
    return False


def _found(node: ir.Node, product: ir.Node, scale: float, mask: Mask | None) -> Found | Decline:
    q, kt, v = product.inputs[0], product.inputs[1], node.inputs[1]
    assert q is not None
    assert kt is not None
    assert v is not None
    q, q_factor = _unscaled(q)
    kt, k_factor = _unscaled(kt)
    scale *= (1.0 if q_factor is None else q_factor) * (1.0 if k_factor is None else k_factor)
    if not scale > 0.0:
        return decline(node, f"the scale {scale:g} is not positive")
    return Found(q, kt, v, scale, mask, node.outputs[0])


def _keys(kt: ir.Value, build: Builder) -> ir.Value:
    """k [B, H, keys, d] from kt [.., d, keys], without a Transpose where kt is one of k."""
    node = made_by(kt, "Transpose")
    shape = static_shape(kt)
    assert shape is not None
    swap = (*range(len(shape) - 2), len(shape) - 1, len(shape) - 2)
    if node is not None and permutation(node) == swap and node.inputs[0] is not None:
        return _to_4d(node.inputs[0], build)
    turned = (*shape[:-2], shape[-1], shape[-2])
    return _to_4d(build.op("Transpose", [kt], {"perm": swap}, like=kt, shape=turned), build)


def _to_4d(value: ir.Value, build: Builder) -> ir.Value:
    shape = static_shape(value)
    assert shape is not None
    return value if len(shape) == 4 else _reshape(value, (1, *shape), build)


def _reshape(value: ir.Value, shape: tuple[int, ...], build: Builder) -> ir.Value:
    target = build.constant(np.array(shape, np.int64), f"{build.hint}_shape")
    return build.op("Reshape", [value, target], like=value, shape=shape)


def _additive(found: Found, build: Builder) -> ir.Value:
    """The mask as float, finite where clamped."""
    mask = found.mask
    assert mask is not None
    assert found.q.dtype is not None
    dtype = found.q.dtype.numpy()
    rank = len(_shape(found.q))
    array = constant(mask.value)
    if array is not None:
        return _constant_mask(mask, array, _full(found), dtype, rank, build)
    value = _unexpanded(mask.value)
    if mask.fill is not None:
        fill = max(mask.fill, FLOOR) if mask.clamp else mask.fill
        numbers = [build.constant(np.array(n, dtype), f"{build.hint}_fill") for n in (fill, 0.0)]
        if not mask.blocked:
            numbers.reverse()
        value = build.op("Where", [value, *numbers], like=found.q, shape=_shape(value))
    elif mask.clamp:
        floor = build.constant(np.array(FLOOR, dtype), f"{build.hint}_floor")
        value = build.op("Max", [value, floor], like=value)
    return value


def _unexpanded(value: ir.Value) -> ir.Value:
    """What was repeated over batch or heads, which Attention does itself."""
    node = made_by(value, "Expand")
    if node is None or node.inputs[0] is None:
        return value
    before, after = static_shape(node.inputs[0]), static_shape(value)
    same_rank = before is not None and after is not None and len(before) == len(after)
    return _unexpanded(node.inputs[0]) if same_rank else value


def _full(found: Found) -> tuple[int, int]:
    """Queries and keys."""
    return _shape(found.q)[-2], _shape(found.kt)[-1]


def _constant_mask(
    mask: Mask,
    array: np.ndarray,
    full: tuple[int, int],
    dtype: np.dtype[np.generic],
    rank: int,
    build: Builder,
) -> ir.Value:
    if mask.fill is not None:
        array = np.where(array == mask.blocked, mask.fill, 0.0)
    array = array.astype(dtype)
    if mask.clamp:
        array = np.maximum(array, np.array(FLOOR, dtype))
    if rank == 3 and array.ndim == 3 and array.shape[0] == 1:
        array = array[0]
    array = np.broadcast_to(array, (*array.shape[:-2], *full))
    while array.ndim > 2 and array.shape[0] == 1:
        array = array[0]
    if array.ndim == 3:
        array = array[None]
    return build.constant(array, f"{mask.value.name}_mask", mask.value)


def _lost(mask: ir.Value, build: Builder) -> ir.Value:
    """NaN for rows without any key, zero for the others."""
    assert mask.dtype is not None
    dtype, shape = mask.dtype.numpy(), (*_shape(mask)[:-1], 1)
    axes = build.constant(np.array([-1], np.int64), f"{build.hint}_axes")
    top = build.op("ReduceMax", [mask, axes], {"keepdims": 1}, like=mask, shape=shape)
    low, nan, zero = (
        build.constant(np.array(n, dtype), f"{build.hint}_number") for n in (-np.inf, np.nan, 0.0)
    )
    is_lost = build.op("Equal", [top, low], shape=shape)
    is_lost.type = ir.TensorType(ir.DataType.BOOL)
    return build.op("Where", [is_lost, nan, zero], like=mask, shape=shape)


def _shape(value: ir.Value) -> tuple[int, ...]:
    shape = static_shape(value)
    assert shape is not None
    return shape
