"""Reshape, Flatten, Squeeze, Unsqueeze: axes merge and split by factors.

A split axis C -> (h, d) is removable along one of its parts: heads, or for a channel shuffle the
index within the groups. The other parts are then tied across it.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from sparsegraph.graph import is_op
from sparsegraph.structure.known import LARGEST, Knowns
from sparsegraph.structure.labels import Axis, Labels, thin
from sparsegraph.structure.ties import Ties, shape_of

Group = tuple[tuple[int, ...], tuple[int, ...]]


def groups(old: Sequence[int], new: Sequence[int]) -> Iterator[Group]:
    """Axes of both shapes that hold the same elements, as few as possible; ones are left out."""
    left = [i for i, n in enumerate(old) if n != 1]
    right = [j for j, n in enumerate(new) if n != 1]
    while left or right:
        a, b = [left.pop(0)], [right.pop(0)]
        m, n = old[a[0]], new[b[0]]
        while m != n:
            if m < n:
                a.append(left.pop(0))
                m *= old[a[-1]]
            else:
                b.append(right.pop(0))
                n *= new[b[-1]]
        yield tuple(a), tuple(b)


def tie_reshape(t: Ties, node: ir.Node) -> None:
    """Every group of factors by itself."""
    data, out = t.input(node, 0), node.outputs[0]
    old, new = shape_of(node.inputs[0]), shape_of(out)
    if 0 in (*old, *new):
        t.freeze_inputs(node, "an empty tensor")
        return
    axes: list[Axis] = [None] * len(new)
    for left, right in groups(old, new):
        if len(left) == 1 and len(right) == 1:
            axes[right[0]] = data[left[0]]
        elif len(right) == 1:
            axes[right[0]] = _merge(t, node, [data[i] for i in left], [old[i] for i in left])
        elif len(left) == 1 and data[left[0]] is not None:
            split = _split(t, node, data[left[0]], right)
            for j, axis in zip(right, split, strict=True):
                axes[j] = axis
        else:
            for i in left:
                t.freeze(node, data[i], "a reshape that mixes factors")
    t.set(out, axes)


def _merge(t: Ties, node: ir.Node, axes: Sequence[Axis], sizes: Sequence[int]) -> Axis:
    """Labels of the first axis that has any, repeated over the other factors."""
    live = [number for number, axis in enumerate(axes) if axis is not None]
    if not live:
        return None
    for number in live[1:]:
        t.freeze(node, axes[number], "merged with an axis that is removable itself")
    first = axes[live[0]]
    assert first is not None
    shape = [len(first) if number == live[0] else 1 for number in range(len(sizes))]
    return np.broadcast_to(first.reshape(shape), tuple(sizes)).reshape(-1)


def _split(t: Ties, node: ir.Node, axis: Axis, parts: Sequence[int]) -> list[Axis]:
    assert axis is not None
    sizes = tuple(shape_of(node.outputs[0])[j] for j in parts)
    block = axis.reshape(sizes)
    chosen = _natural_part(block)
    if chosen is None:
        chosen = _part_to_cut(node, parts)
    lines = np.moveaxis(block, chosen, 0).reshape(sizes[chosen], -1)
    t.tie(node, lines, lines[:, :1])
    t.touch(node, "ties", "output", parts[chosen], lines[:, 0])
    return [thin(lines[:, 0].copy()) if i == chosen else None for i in range(len(sizes))]


def _natural_part(block: Labels) -> int | None:
    """The part along which alone the labels differ, as after a merge that is now undone."""
    for number in range(block.ndim):
        lines = np.moveaxis(block, number, 0).reshape(block.shape[number], -1)
        if (lines == lines[:, :1]).all():
            return number
    return None


def _part_to_cut(node: ir.Node, parts: Sequence[int]) -> int:
    """The first part, unless it is shuffled away or picked apart by index afterwards."""
    if _is_shuffle(node, parts):
        return len(parts) - 1
    picked = set(_picked(node.outputs[0]))
    for number, j in enumerate(parts):
        if j not in picked:
            return number
    return 0


def _is_shuffle(node: ir.Node, parts: Sequence[int]) -> bool:
    """C -> (g, c) -> (c, g) -> C: removing an index within the groups keeps the groups."""
    users = list(node.outputs[0].consumers())
    if len(parts) != 2 or len(users) != 1 or not is_op(users[0], "Transpose"):
        return False
    perm = users[0].attributes.get_ints("perm", ())
    swapped = list(range(len(perm)))
    a, b = parts
    swapped[a], swapped[b] = b, a
    after = list(users[0].outputs[0].consumers())
    if tuple(perm) != tuple(swapped) or len(after) != 1 or not is_op(after[0], "Reshape"):
        return False
    return shape_of(after[0].outputs[0]) == shape_of(node.inputs[0])


def _picked(value: ir.Value) -> Iterator[int]:
    """Axes of the value that later operators take single positions of."""
    for user in value.consumers():
        if is_op(user, "Transpose"):
            order = user.attributes.get_ints("perm", ())
            yield from (order[j] for j in _picked(user.outputs[0]) if j < len(order))
        elif is_op(user, "Gather", "Split"):
            yield user.attributes.get_int("axis", 0) % len(shape_of(value))
        elif is_op(user, "Slice"):
            old, new = shape_of(value), shape_of(user.outputs[0])
            yield from (j for j in range(len(old)) if old[j] != new[j])


def known_reshape(k: Knowns, node: ir.Node) -> None:
    """Groups of which anything varies are written out, the others stay one number."""
    known = k.of(node.inputs[0])
    old, new = shape_of(node.inputs[0]), shape_of(node.outputs[0])
    if known is None or 0 in (*old, *new):
        return
    wide, shape = list(known.shape), [1] * len(new)
    for left, right in groups(old, new):
        if any(known.shape[i] > 1 for i in left):
            for i in left:
                wide[i] = old[i]
            for j in right:
                shape[j] = new[j]
    if math.prod(wide) <= LARGEST:
        k.set(node.outputs[0], np.broadcast_to(known, wide).reshape(shape))
