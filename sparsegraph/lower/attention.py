"""ONNX Attention (opset 23) without a key/value cache.

Heads are slices of features, so the usual Reshape and Transpose around attention are looked
through: q, k, v are read where the linear layers wrote them, and the result is written where the
next one reads it.
"""

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from sparsegraph.graph import attribute, constant, float_attribute, ints_attribute, is_op
from sparsegraph.lower.builder import Builder, Declined, Stored, dtype_of, shape_of
from sparsegraph.lower.elementwise import emit_row_tree
from sparsegraph.program import Arg, Ref, Scratch
from sparsegraph.targets.kernels.attention import Attention, shape_for
from sparsegraph.targets.layout import FeatureMajor

_SPLIT = (0, 2, 1, 3)  # [batch, points, heads, depth] <-> [batch, heads, points, depth]


@dataclass(frozen=True)
class Heads:
    """Queries, keys or values with a stride between heads.

    Attributes:
        stored: feature-major memory; `stored.fm.points` points.
        images, heads, depth: logical extents.
        image, head: strides in elements.
    """

    stored: Stored
    images: int
    heads: int
    depth: int
    image: int
    head: int

    def args(self) -> tuple[Arg, ...]:
        fm = self.stored.fm
        return (self.stored.address, self.image, self.head, fm.tile, fm.row)


def lower_attention(b: Builder, node: ir.Node) -> None:
    """One kernel call for all heads."""
    if len(node.outputs) > 1 or any(v is not None for v in node.inputs[4:]):
        raise Declined("attention with a cache or extra outputs")
    if attribute(node, "softcap", 0.0) or attribute(node, "qk_matmul_output_mode", 0):
        raise Declined("attention with softcap")
    q, k, v = (_heads(b, node, i, "q_num_heads" if i == 0 else "kv_num_heads") for i in range(3))
    queries, keys = q.stored.fm, k.stored.fm
    if q.heads % k.heads or k.heads != v.heads:
        raise Declined(f"{q.heads} query heads over {k.heads} key heads")
    scale = float_attribute(node, "scale", 0.0) or 1.0 / np.sqrt(q.depth)
    kind, mask_args = _mask(b, node, q, queries.points, keys.points)
    vectors = queries.block // b.target.lanes
    kernel = Attention(vectors, b.target.lanes, *shape_for(vectors, b.target), keys.block, kind)
    y, last = _result(b, node, q, v)
    items = q.images * q.heads * queries.tiles
    args = [
        *y.args(), *q.args(), *k.args(), *v.args(), Scratch(kernel.scratch_bytes(q.depth)),
        float(scale), q.heads, q.heads // k.heads, queries.tiles, keys.points, q.depth, v.depth,
        *mask_args,
    ]  # fmt: skip
    flops = 2 * q.images * q.heads * queries.points * keys.points * (q.depth + v.depth)
    b.step(kernel, args, items, [node, *last], flops=flops, dense_flops=flops, detail="attention")


def _heads(b: Builder, node: ir.Node, index: int, attr: str) -> Heads:
    value = node.inputs[index]
    assert value is not None
    shape = shape_of(value)
    if len(shape) == 3:
        heads = attribute(node, attr)
        if not isinstance(heads, int):
            raise Declined(f"3-d attention without {attr}")
        stored = b.feature(value, 2)
        if stored.fm.images != shape[0]:
            stored = b.to_feature(value, b.row(value), 2)
        return _slices(stored, shape[0], heads, shape[2] // heads)
    source = _before_split(value)
    if source is not None and b.is_ready(source):
        stored = b.feature(source, 2)
        if stored.fm.images == shape[0]:
            return _slices(stored, shape[0], shape[1], shape[3])
    images, heads, points, depth = shape
    flat = replace(b.row(value), shape=(images * heads, points, depth))
    stored = b.to_feature(value, flat, 2)
    return Heads(stored, images, heads, depth, heads * stored.fm.image, stored.fm.image)


def _slices(stored: Stored, images: int, heads: int, depth: int) -> Heads:
    fm = stored.fm
    if fm.images != images:
        raise Declined(f"{fm.images} images stored, {images} needed")
    return Heads(stored, images, heads, depth, fm.image, depth * fm.row)


def _before_split(value: ir.Value) -> ir.Value | None:
    """The [batch, points, features] value that Reshape and Transpose split into heads."""
    transpose = value.producer()
    if transpose is None or not is_op(transpose, "Transpose"):
        return None
    if ints_attribute(transpose, "perm") != _SPLIT or transpose.inputs[0] is None:
        return None
    reshape = transpose.inputs[0].producer()
    if reshape is None or not is_op(reshape, "Reshape") or reshape.inputs[0] is None:
        return None
    source = reshape.inputs[0]
    split, whole = shape_of(transpose.inputs[0]), shape_of(source)
    same = len(whole) == 3 and split[:2] == whole[:2] and split[2] * split[3] == whole[2]
    return source if same else None


def _result(b: Builder, node: ir.Node, q: Heads, v: Heads) -> tuple[Heads, list[ir.Node]]:
    """Room for the result, and the Transpose and Reshape that it makes unnecessary."""
    value, points = node.outputs[0], q.stored.fm.points
    shape = shape_of(value)
    pattern = FeatureMajor(q.images, 0, points, 0, 0, 0, 0, 2)
    if len(shape) == 3:
        return _slices(b.new_feature(value, pattern), q.images, q.heads, v.depth), []
    merged = _after_merge(value)
    if merged is not None:
        transpose, reshape = merged
        stored = b.new_feature(reshape.outputs[0], pattern)
        return _slices(stored, q.images, q.heads, v.depth), [transpose, reshape]
    flat = (q.images * q.heads, points, v.depth)
    stored = b.scratch_feature(value, flat, 2)
    fm = stored.fm

    def make() -> None:
        row = b.to_row(value, stored)
        b.keep(value, replace(row, shape=shape))

    b.defer(value, make)
    return Heads(stored, q.images, q.heads, v.depth, q.heads * fm.image, fm.image), []


def _after_merge(value: ir.Value) -> tuple[ir.Node, ir.Node] | None:
    """The Transpose and Reshape that put the heads side by side again."""
    if value.is_graph_output() or len(value.consumers()) != 1:
        return None
    transpose = value.consumers()[0]
    if not is_op(transpose, "Transpose") or ints_attribute(transpose, "perm") != _SPLIT:
        return None
    middle = transpose.outputs[0]
    if middle.is_graph_output() or len(middle.consumers()) != 1:
        return None
    reshape = middle.consumers()[0]
    if not is_op(reshape, "Reshape"):
        return None
    split, whole = shape_of(middle), shape_of(reshape.outputs[0])
    same = len(whole) == 3 and split[:2] == whole[:2] and split[2] * split[3] == whole[2]
    return (transpose, reshape) if same else None


def _mask(
    b: Builder, node: ir.Node, q: Heads, queries: int, keys: int
) -> tuple[str, tuple[Arg, ...]]:
    """Kind of mask and the arguments of the kernel for it."""
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    causal = bool(attribute(node, "is_causal", 0))
    if mask is None and not causal:
        return "none", ()
    if mask is None or constant(mask) is not None:
        array = np.zeros((1, 1, 1, keys), np.float32)
        if mask is not None:
            given = constant(mask)
            assert given is not None
            array = _additive(given)
        if causal:
            array = array + _additive(np.tril(np.ones((queries, keys), bool)))
        return _constant_mask(b, node, array, q, queries, keys)
    if causal:
        raise Declined("a run-time mask together with is_causal")
    return _runtime_mask(b, mask, q, queries, keys)


def _additive(mask: np.ndarray) -> np.ndarray:
    """A boolean mask (true: attend) as numbers to add to the scores."""
    if mask.dtype != np.bool_:
        return mask.astype(np.float32)
    return np.where(mask, np.float32(0), np.float32(-np.inf))


def _constant_mask(
    b: Builder, node: ir.Node, array: np.ndarray, q: Heads, queries: int, keys: int
) -> tuple[str, tuple[Arg, ...]]:
    array = array.reshape((1,) * (4 - array.ndim) + array.shape)
    if array.shape[1] == array.shape[2] == 1:
        rows = np.ascontiguousarray(array.reshape(-1, keys))
        return "key", (b.weight(f"{node.name}.mask", rows), keys if len(rows) > 1 else 0)
    images, heads = array.shape[:2]
    full = np.broadcast_to(array, (images, heads, queries, keys))
    stored = b.constant_planes(f"{node.name}.mask", full.reshape(-1, queries, keys), 2)
    return "full", _full_args(stored, images, heads)


def _runtime_mask(
    b: Builder, mask: ir.Value, q: Heads, queries: int, keys: int
) -> tuple[str, tuple[Arg, ...]]:
    expand = mask.producer()
    if expand is not None and is_op(expand, "Expand") and expand.inputs[0] is not None:
        heads, rows, numbers = (1, 1, *shape_of(expand.inputs[0]))[-3:]
        if numbers == keys and (rows == queries or heads == rows == 1):
            mask = expand.inputs[0]  # the kernel broadcasts
    shape = (1,) * (4 - len(shape_of(mask))) + shape_of(mask)
    row = b.row(mask)
    if dtype_of(mask) == "bool":
        tree = ("Where", ("arg", 0), ("const", 0.0), ("const", float("-inf")))
        row = emit_row_tree(b, f"{mask.name}.additive", tree, [row], row.shape, "float32")
    if shape[3] != keys:
        raise Declined(f"a mask of shape {shape} for {keys} keys")
    if shape[1] == shape[2] == 1:
        return "key", (Ref(row.ref.buffer, row.ref.offset), keys if shape[0] > 1 else 0)
    if shape[2] != queries:
        raise Declined(f"a mask of shape {shape} for {queries} queries")
    flat = replace(row, shape=(shape[0] * shape[1], queries, keys))
    return "full", _full_args(b.to_feature(mask, flat, 2), shape[0], shape[1])


def _full_args(stored: Stored, images: int, heads: int) -> tuple[Arg, ...]:
    fm = stored.fm
    image = heads * fm.image if images > 1 else 0
    return (stored.address, image, fm.image if heads > 1 else 0, fm.tile, fm.row)
