"""The one rule behind element-wise operators, products and norms: axes that share a letter.

As in Einstein notation: every axis of every input has a letter, the output lists the letters that
it keeps, and the rest is summed. Axes of one letter lose the same positions.
"""

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from sparsegraph.graph import is_constant
from sparsegraph.structure.labels import Axis
from sparsegraph.structure.ties import Ties, shape_of

Letters = Sequence[object]


def align(ties: Ties, node: ir.Node, inputs: Mapping[int, Letters], out: Letters) -> None:
    """Tie the axes of the inputs by letter and give the first output its axes.

    Axes of size one broadcast and take no part. A letter that only constants have gets new labels.
    """
    axes: dict[object, Axis] = {}
    for letter in dict.fromkeys(one for letters in inputs.values() for one in letters):
        spots = [
            (at, axis)
            for at, letters in inputs.items()
            for axis, one in enumerate(letters)
            if one == letter and shape_of(node.inputs[at])[axis] > 1
        ]
        axes[letter] = _merge(ties, node, spots)
        if letter not in out:
            for at, axis in spots:
                if not _is_constant(node, at):
                    ties.sink(node, at, axis, axes[letter])
    for at, letters in inputs.items():
        if _is_constant(node, at):
            sizes = shape_of(node.inputs[at])
            found = [axes[one] if n > 1 else None for one, n in zip(letters, sizes, strict=True)]
            ties.bind(node, at, found)
    ties.set(node.outputs[0], [axes.get(letter) for letter in out])


def right(value: ir.Value, out: ir.Value) -> list[int]:
    """Letters of an operand that broadcasts to `out`: the number of the output's axis."""
    rank = len(shape_of(out))
    return list(range(rank - len(shape_of(value)), rank))


def _merge(ties: Ties, node: ir.Node, spots: Sequence[tuple[int, int]]) -> Axis:
    """One axis for all spots; frozen as soon as one of them is."""
    if not spots:
        return None
    moving = [(at, axis) for at, axis in spots if not _is_constant(node, at)]
    if not moving:
        at, number = spots[0]
        return ties.fresh(node, at, number, shape_of(node.inputs[at])[number])
    found = [ties.input(node, at)[axis] for at, axis in moving]
    frozen = any(axis is None for axis in found)
    for axis in found[1:]:
        ties.tie(node, found[0], axis)
    if len(found) > 1 and found[0] is not None:
        at, number = moving[0]
        ties.touch(node, "ties", f"input {at}", number, found[0])
    return None if frozen else found[0]


def _is_constant(node: ir.Node, at: int) -> bool:
    return is_constant(node.inputs[at])
