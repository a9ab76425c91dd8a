"""Concat, Split, Slice, Gather, Pad, Transpose, Expand, Tile: labels move with the data."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sparsegraph.graph import (
    attribute,
    constant,
    input_at,
    int_attribute,
    integers,
    ints_attribute,
    is_constant,
    scalar,
)
from sparsegraph.structure.align import align, right
from sparsegraph.structure.cut import Cut
from sparsegraph.structure.known import Knowns
from sparsegraph.structure.labels import Axis, joined
from sparsegraph.structure.ties import Ties, part, shape_of

Ints = NDArray[np.int64]


def tie_transpose(t: Ties, node: ir.Node) -> None:
    """Axes change places."""
    data = t.input(node, 0)
    t.set(node.outputs[0], [data[i] for i in _order(node)])


def known_transpose(k: Knowns, node: ir.Node) -> None:
    """So does what is known."""
    known = k.of(node.inputs[0])
    k.set(node.outputs[0], None if known is None else known.transpose(_order(node)))


def _order(node: ir.Node) -> Sequence[int]:
    rank = len(shape_of(node.inputs[0]))
    return ints_attribute(node, "perm") or tuple(reversed(range(rank)))


def tie_concat(t: Ties, node: ir.Node) -> None:
    """Labels one behind the other along the axis, tied along the others."""
    out = node.outputs[0]
    rank = len(shape_of(out))
    along = int_attribute(node, "axis", 0) % rank
    sizes = [shape_of(v)[along] for v in node.inputs]
    pieces: list[Axis] = [
        t.fresh(node, at, along, size) if is_constant(v) else t.axes(v)[along]  # type: ignore[arg-type]
        for at, (v, size) in enumerate(zip(node.inputs, sizes, strict=True))
    ]
    axes: list[Axis] = []
    for axis in range(rank):
        if axis == along:
            axes.append(joined(pieces, sizes))
            continue
        moving = [t.axes(v)[axis] for v in node.inputs if v is not None and not is_constant(v)]
        for other in moving[1:]:
            t.tie(node, moving[0], other)
        axes.append(None if any(one is None for one in moving) else moving[0])
    for at, value in enumerate(node.inputs):
        if is_constant(value):
            t.bind(node, at, [pieces[at] if i == along else axes[i] for i in range(rank)])
    t.set(out, axes)


def known_concat(k: Knowns, node: ir.Node) -> None:
    """What is known of each piece."""
    known = [k.of(v) for v in node.inputs]
    if all(one is None for one in known):
        return
    shape = shape_of(node.outputs[0])
    along = int_attribute(node, "axis", 0) % len(shape)
    pieces = [np.full([1] * len(shape), np.nan) if one is None else one for one in known]
    other = np.broadcast_shapes(*[(*p.shape[:along], 1, *p.shape[along + 1 :]) for p in pieces])
    wide = []
    for piece, value in zip(pieces, node.inputs, strict=True):
        size = shape_of(value)[along]
        wide.append(np.broadcast_to(piece, (*other[:along], size, *other[along + 1 :])))
    k.set(node.outputs[0], np.concatenate(wide, axis=along))


def tie_split(t: Ties, node: ir.Node) -> None:
    """Each output takes its stretch of the labels."""
    data = t.input(node, 0)
    along = int_attribute(node, "axis", 0) % len(data)
    start = 0
    for value in node.outputs:
        size = shape_of(value)[along]
        piece = part(data[along], slice(start, start + size))
        t.set(value, [piece if i == along else axis for i, axis in enumerate(data)])
        start += size


def cut_split(cut: Cut, node: ir.Node) -> None:
    """The sizes that are left."""
    along = int_attribute(node, "axis", 0) % len(shape_of(node.outputs[0]))
    sizes = np.array([cut.shape(v)[along] for v in node.outputs], np.int64)
    node.attributes.pop("num_outputs", None)
    cut.supply(node, 1, sizes, f"{node.name}_sizes")


def known_split(k: Knowns, node: ir.Node) -> None:
    """Stretches of what is known."""
    known = k.of(node.inputs[0])
    if known is None:
        return
    along = int_attribute(node, "axis", 0) % known.ndim
    start = 0
    for value in node.outputs:
        size = shape_of(value)[along]
        whole = known.shape[along] == 1
        index = [slice(None)] * known.ndim
        index[along] = slice(None) if whole else slice(start, start + size)
        k.set(value, known[tuple(index)])
        start += size


def tie_slice(t: Ties, node: ir.Node) -> None:
    """Axes keep the labels of the positions that they keep."""
    data, taken = t.input(node, 0), taken_by_slice(node)
    if taken is None:
        t.freeze_inputs(node, "a slice with computed bounds")
        return
    axes = list(data)
    for axis, positions in taken.items():
        if axes[axis] is not None and _stretch(positions) is None:
            t.freeze(node, axes[axis], "a slice with steps")
        axes[axis] = None if _stretch(positions) is None else part(axes[axis], positions)
    t.set(node.outputs[0], axes)


def taken_by_slice(node: ir.Node) -> dict[int, Ints] | None:
    """Positions taken on each sliced axis; None when they are computed."""
    shape = shape_of(node.inputs[0])
    starts, ends = integers(node.inputs[1]), integers(node.inputs[2])
    if starts is None or ends is None:
        return None
    axes = integers(input_at(node, 3)) if input_at(node, 3) else tuple(range(len(starts)))
    steps = integers(input_at(node, 4)) if input_at(node, 4) else (1,) * len(starts)
    if axes is None or steps is None:
        return None
    taken = {}
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = shape[axis % len(shape)]
        stop = None if step < 0 and end < -size else end
        taken[axis % len(shape)] = np.arange(size)[slice(start, stop, step)]
    return taken


def _stretch(positions: Ints) -> tuple[int, int] | None:
    """Start and end of positions without gaps; None for others."""
    if positions.size == 0 or (np.diff(positions) != 1).any():
        return None
    return int(positions[0]), int(positions[-1]) + 1


def cut_slice(cut: Cut, node: ir.Node) -> None:
    """Bounds counted in what is left."""
    taken = taken_by_slice(node)
    data = node.inputs[0]
    assert taken is not None
    assert data is not None
    bounds = []
    for axis, positions in taken.items():
        keep = cut.kept(data, axis)
        stretch = _stretch(positions)
        if stretch is None or keep.all():
            return_bounds = _as_given(node, axis, len(keep))
        else:
            return_bounds = int(keep[: stretch[0]].sum()), int(keep[: stretch[1]].sum())
        bounds.append(return_bounds)
    cut.replace(node, 1, np.array([b[0] for b in bounds], np.int64))
    cut.replace(node, 2, np.array([b[1] for b in bounds], np.int64))
    if input_at(node, 3) is not None:
        cut.replace(node, 3, np.array(list(taken), np.int64))


def _as_given(node: ir.Node, axis: int, size: int) -> tuple[int, int]:
    rank = len(shape_of(node.inputs[0]))
    given = integers(input_at(node, 3)) if input_at(node, 3) else tuple(range(rank))
    starts, ends = integers(node.inputs[1]), integers(node.inputs[2])
    assert given is not None
    assert starts is not None
    assert ends is not None
    at = [a % rank for a in given].index(axis)
    return starts[at], ends[at]


def known_slice(k: Knowns, node: ir.Node) -> None:
    """What is known of the positions taken."""
    known, taken = k.of(node.inputs[0]), taken_by_slice(node)
    if known is None or taken is None:
        return
    for axis, positions in taken.items():
        if known.shape[axis] > 1:
            known = np.take(known, positions, axis)
    k.set(node.outputs[0], known)


def tie_gather(t: Ties, node: ir.Node) -> None:
    """Rows of a table, or a fixed choice of positions."""
    data, table = t.input(node, 0), node.inputs[0]
    assert table is not None
    along = int_attribute(node, "axis", 0) % len(data)
    rank = t.rank(node.inputs[1])  # type: ignore[arg-type]
    inner = t.input(node, 1)
    for axis in inner:
        t.freeze(node, axis, "indices")
    if is_constant(table):
        data = tuple(
            None if i == along else t.fresh(node, 0, i, n) for i, n in enumerate(shape_of(table))
        )
        t.bind(node, 0, data)
    indices = integers(node.inputs[1])
    chosen: list[Axis] = [None] * rank
    axis = data[along]
    if axis is not None and indices is not None and rank == 1 and len(set(indices)) > 1:
        chosen = [part(axis, np.array(indices) % len(axis))]
        t.bind(node, 1, chosen)
    elif axis is not None:
        held = axis if indices is None else axis[np.array(indices) % len(axis)]
        t.freeze(node, held, "chosen by index")
    t.set(node.outputs[0], [*data[:along], *chosen, *data[along + 1 :]])


def cut_gather(cut: Cut, node: ir.Node) -> None:
    """Indices count what is left."""
    data = node.inputs[0]
    indices = constant(node.inputs[1])
    assert data is not None
    if is_constant(data) or indices is None:
        return
    keep = cut.kept(data, int_attribute(node, "axis", 0) % len(shape_of(data)))
    if keep.all():
        return
    moved = (np.cumsum(keep) - 1)[indices % len(keep)].astype(indices.dtype)
    cut.replace(node, 1, moved)


def known_gather(k: Knowns, node: ir.Node) -> None:
    """A column that is the same in every row is known in every result."""
    known, indices = k.of(node.inputs[0]), constant(node.inputs[1])
    if known is None:
        array = constant(node.inputs[0])
        if array is None or array.dtype.kind != "f":
            return
        known = array  # a large table: only its columns matter
    along = int_attribute(node, "axis", 0) % known.ndim
    rank = len(shape_of(node.inputs[1]))
    if indices is not None and known.shape[along] > 1:
        k.set(node.outputs[0], np.take(known, indices, along).astype(np.float64))
        return
    first = np.take(known, [0], along)
    same = np.where((known == first).all(axis=along, keepdims=True), first, np.nan)
    shape = (*same.shape[:along], *[1] * rank, *same.shape[along + 1 :])
    k.set(node.outputs[0], same.reshape(shape).astype(np.float64))


def tie_pad(t: Ties, node: ir.Node) -> None:
    """An axis that is padded with a constant gains positions of its own."""
    data = t.input(node, 0)
    pads = _pads(node)
    plain = attribute(node, "mode", "constant") == "constant"
    if pads is None:
        t.freeze_inputs(node, "computed padding")
        return
    axes: list[Axis] = []
    for number, axis in enumerate(data):
        before, after = (int(p) for p in pads[:, number])
        if before == after == 0:
            axes.append(axis)
            continue
        if not plain or before < 0 or after < 0 or not is_constant(node.inputs[1]):
            t.freeze(node, axis, "padding of another kind")
            axes.append(None)
            continue
        if axis is None:
            axes.append(None)
            continue
        pieces = [t.forest.fresh(before), axis, t.forest.fresh(after)]
        axes.append(joined(pieces, [before, len(axis), after]))
    t.set(node.outputs[0], axes)


def _pads(node: ir.Node) -> Ints | None:
    """[begin or end, axis], or None when computed."""
    given = integers(node.inputs[1])
    rank = len(shape_of(node.inputs[0]))
    if given is None:
        return None
    axes = range(rank) if input_at(node, 3) is None else integers(node.inputs[3])
    if axes is None:
        return None
    pads = np.zeros((2, rank), np.int64)
    pads[:, [a % rank for a in axes]] = np.array(given).reshape(2, -1)
    return pads


def cut_pad(cut: Cut, node: ir.Node) -> None:
    """Padding that is left."""
    pads = _pads(node)
    assert pads is not None
    pads = pads.copy()
    for axis in range(pads.shape[1]):
        before, after = (int(p) for p in pads[:, axis])
        keep = cut.kept(node.outputs[0], axis)
        if before > 0 or after > 0:
            pads[:, axis] = keep[:before].sum(), keep[len(keep) - after :].sum()
    cut.replace(node, 1, pads.reshape(-1))
    if input_at(node, 3) is not None:
        cut.replace(node, 3, np.arange(pads.shape[1]))


def known_pad(k: Knowns, node: ir.Node) -> None:
    """Padding with the known number keeps it known; a padded channel axis gains known ones."""
    known, pads = k.of(node.inputs[0]), _pads(node)
    value = input_at(node, 2)
    fill = 0.0 if value is None else scalar(value)
    plain = attribute(node, "mode", "constant") == "constant"
    if pads is None or fill is None or not plain or (pads < 0).any():
        return
    rank = pads.shape[1]
    padded = [axis for axis in range(rank) if pads[:, axis].any()]
    known = np.full([1] * rank, np.nan) if known is None else known
    shape = shape_of(node.inputs[0])
    if len(padded) == 1 and padded[0] == 1:
        width = [(0, 0)] * rank
        width[1] = (int(pads[0, 1]), int(pads[1, 1]))
        wide = np.broadcast_to(known, (known.shape[0], shape[1], *known.shape[2:]))
        k.set(node.outputs[0], np.pad(wide, width, constant_values=fill))
    elif all(known.shape[axis] == 1 for axis in padded):
        k.set(node.outputs[0], np.where(known == fill, known, np.nan))


def tie_expand(t: Ties, node: ir.Node) -> None:
    """Repeated axes must stay, the others pass."""
    out, data = node.outputs[0], node.inputs[0]
    assert data is not None
    align(t, node, {0: right(data, out)}, range(len(shape_of(out))))


def cut_expand(cut: Cut, node: ir.Node) -> None:
    """The target shape is the new one."""
    cut.replace(node, 1, np.array(cut.shape(node.outputs[0]), np.int64))


def cut_reshape(cut: Cut, node: ir.Node) -> None:
    """The target shape is the new one, in plain numbers."""
    cut.replace(node, 1, np.array(cut.shape(node.outputs[0]), np.int64))
    node.attributes.pop("allowzero", None)


def known_expand(k: Knowns, node: ir.Node) -> None:
    """Broadcasting loses nothing."""
    known = k.of(node.inputs[0])
    if known is not None:
        rank = len(shape_of(node.outputs[0]))
        k.set(node.outputs[0], known.reshape((1,) * (rank - known.ndim) + known.shape))


def tie_tile(t: Ties, node: ir.Node) -> None:
    """Labels repeat with the data."""
    repeats = integers(node.inputs[1])
    if repeats is None:
        t.freeze_inputs(node, "computed repeats")
        return
    data = t.input(node, 0)
    axes = [None if a is None else np.tile(a, n) for a, n in zip(data, repeats, strict=True)]
    t.set(node.outputs[0], axes)


def known_tile(k: Knowns, node: ir.Node) -> None:
    """What is known repeats too."""
    known, repeats = k.of(node.inputs[0]), integers(node.inputs[1])
    if known is not None and repeats is not None:
        times = [1 if size == 1 else n for size, n in zip(known.shape, repeats, strict=True)]
        k.set(node.outputs[0], np.tile(known, times))


def known_same(k: Knowns, node: ir.Node) -> None:
    """The output repeats positions of the input."""
    known = k.of(node.inputs[0])
    if known is not None:
        k.set(node.outputs[0], known)
