"""Attention (opset 23): heads are removable, with all query heads of a key and value head."""

import numpy as np
import onnx_ir as ir

from sparsegraph.graph import input_at, int_attribute, is_used
from sparsegraph.structure.cut import Cut
from sparsegraph.structure.known import Known, Knowns
from sparsegraph.structure.labels import Axis
from sparsegraph.structure.ties import Ties, shape_of


def _is_flat(node: ir.Node) -> bool:
    """True for [batch, tokens, heads * features] operands."""
    return len(shape_of(node.inputs[0])) == 3


def heads(node: ir.Node) -> tuple[int, int]:
    """Query heads, key and value heads."""
    if _is_flat(node):
        return int_attribute(node, "q_num_heads", 1), int_attribute(node, "kv_num_heads", 1)
    return shape_of(node.inputs[0])[1], shape_of(node.inputs[1])[1]


def tie_attention(t: Ties, node: ir.Node) -> None:
    """One label per key and value head; features within a head stay, but for those of the value."""
    if any(input_at(node, at) is not None for at in (4, 5)) or any(
        is_used(v) for v in node.outputs[1:]
    ):
        t.freeze_inputs(node, "attention with a cache")
        return
    n_query, n_kv = heads(node)
    if n_kv < 2:
        t.freeze_inputs(node, "attention with one head")
        return
    units = _units(t, node, n_kv)
    made = None if units is None else np.repeat(units, n_query // n_kv)
    _tie_mask(t, node, made)
    if not _is_flat(node):
        value = t.input(node, 2)
        features = value[3] if units is None or value[3] is None else None
        if value[3] is not None and features is None:
            t.freeze(node, value[3], "features within a head")
        t.set(node.outputs[0], [None, made, None, features])
        return
    width = shape_of(node.outputs[0])[2] // n_query
    t.set(node.outputs[0], [None, None, None if made is None else np.repeat(made, width)])


def _tie_mask(t: Ties, node: ir.Node, made: Axis) -> None:
    """A mask or bias per head loses the heads; its other axes stay."""
    mask = input_at(node, 3)
    if mask is None:
        return
    rank = len(shape_of(mask))
    per_head = rank > 2 and shape_of(mask)[-3] > 1
    t.bind(node, 3, [made if per_head and i == rank - 3 else None for i in range(rank)])


def _units(t: Ties, node: ir.Node, n_kv: int) -> Axis:
    """The labels of the key and value heads, tied over queries, keys and values."""
    flat = _is_flat(node)
    found = [t.input(node, at) for at in range(3)]
    columns = [axes[2] if flat else axes[1] for axes in found]
    for axes in found:
        for axis in axes[:2] if flat else (axes[0], axes[2]):
            t.freeze(node, axis, "batch and tokens")
    if not flat:
        for axes in found[:2]:
            t.freeze(node, axes[3], "features that are summed in the scores")
    if any(column is None for column in columns):
        for column in columns:
            t.freeze(node, column, "heads of an operand that must stay")
        return None
    live = [column for column in columns if column is not None]
    units = live[1].reshape(n_kv, -1)[:, 0].copy()
    for column in live:
        t.tie(node, column.reshape(n_kv, -1), units[:, None])
    t.touch(node, "ties", "heads", 2 if flat else 1, units)
    return units


def cut_attention(cut: Cut, node: ir.Node) -> None:
    """Heads that are left."""
    if not _is_flat(node):
        return
    for name, count, at in zip(("q_num_heads", "kv_num_heads"), heads(node), (0, 1), strict=True):
        keep = cut.kept(node.inputs[at], 2).reshape(count, -1)  # type: ignore[arg-type]
        node.attributes[name] = ir.AttrInt64(name, int(keep.any(axis=1).sum()))


def known_attention(k: Knowns, node: ir.Node) -> None:
    """Weights times zero values are zero."""
    known = k.of(node.inputs[2])
    n_query, n_kv = heads(node)
    if known is None or known.shape[1 if _is_flat(node) else 2] > 1:
        return
    zero: Known = np.where(known == 0, 0.0, np.nan)
    repeats = n_query // n_kv
    if not _is_flat(node):
        k.set(node.outputs[0], np.repeat(zero, repeats if zero.shape[1] > 1 else 1, axis=1))
        return
    if zero.shape[2] > 1:
        wide = zero.reshape(*zero.shape[:2], n_kv, -1)
        zero = np.repeat(wide, repeats, axis=2).reshape(*zero.shape[:2], -1)
    k.set(node.outputs[0], zero)
