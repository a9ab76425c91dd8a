"""Constants that cannot become a bias move into the weights of one constant that stays, or a map.

Zero padding cuts a constant channel off at the border, so what it adds to a padded convolution is
no constant per output. Another constant channel is cut off in the same way, and a sum is linear in
its weights: w[0] c0 + w[1] c1 = (w[0] + w[1] c1 / c0) c0 at every point, border included. So all
constant channels but one go, exactly. The last one goes as well where a map of biases per point,
border included, holds no more numbers than the slices of the weight that it replaces.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sparsegraph.graph import all_names, constant, has_one_use, is_op, static_shape
from sparsegraph.rewrite import Builder
from sparsegraph.structure.known import evaluate

if TYPE_CHECKING:
    from sparsegraph.structure.dead import Reading, Search

Mask = NDArray[np.bool_]
_LARGEST_RATIO = 16.0
"""How much larger than the constant that carries it a constant may be: four bits of a weight."""


def without_carriers(found: Search, removable: Mask) -> Mask:
    """The marks without those constants that have to stay for the others, as few as possible."""
    removable = removable.copy()
    while (root := _missing_carrier(found, removable)) is not None:
        removable[root] = False
    return removable


def move(graph: ir.Graph, found: Search, gone: Mask) -> int:
    """Add the weights of constants that go to those that carry them; returns how many sums read."""
    n_moved = 0
    for reading in found.readings:
        going = reading.carried & gone[found.analysis.roots[reading.sink.labels]]
        if going.any():
            carrier = _carrier(found, reading, gone)
            if carrier is not None:
                _move(graph, reading, going, carrier)
            n_moved += carrier is not None
    return n_moved


def maps(found: Search, gone: Mask) -> dict[ir.Node, NDArray[np.float64]]:
    """By node what it makes of the constants that go, where nothing carries them: [1, out, *map].

    ONNX Runtime computes it: the node on these constants and zeros.
    """
    made = {}
    for reading in found.readings:
        going = reading.carried & gone[found.analysis.roots[reading.sink.labels]]
        if going.any() and _carrier(found, reading, gone) is None:
            node = reading.sink.node
            weight, shape = constant(node.inputs[1]), static_shape(node.inputs[0])
            assert weight is not None
            assert shape is not None
            line = np.where(going, reading.known, 0.0).reshape(1, -1, *[1] * (len(shape) - 2))
            data = np.broadcast_to(line, (1, *shape[1:])).astype(weight.dtype)
            made[node] = evaluate(node, [data, weight]).astype(np.float64)
    return made


def map_fits(reading: Reading, going: Mask) -> bool:
    """True when a map of biases holds no more numbers than the slices of the weight that go."""
    node = reading.sink.node
    out, weight = static_shape(node.outputs[0]), static_shape(node.inputs[1])
    if not is_op(node, "Conv", "ConvTranspose") or out is None or weight is None:
        return False
    return int(np.prod(out[2:])) <= int(going.sum()) * int(np.prod(weight[2:]))


def _missing_carrier(found: Search, removable: Mask) -> int | None:
    """The root of the largest constant of a sum all of whose constants would go."""
    for reading in found.readings:
        roots = found.analysis.roots[reading.sink.labels]
        going = reading.carried & removable[roots]
        if not going.any() or map_fits(reading, going):
            continue
        if _carrier(found, reading, removable) is None:
            sizes = np.where(going, np.abs(reading.known), -1.0)
            return int(roots[int(sizes.argmax())])
    return None


def _carrier(found: Search, reading: Reading, gone: Mask) -> int | None:
    """The position of the largest constant that stays, if it is large enough."""
    going = gone[found.analysis.roots[reading.sink.labels]]
    sizes = np.nan_to_num(np.abs(reading.known))
    kept = np.where(going, 0.0, sizes)
    at = int(kept.argmax())
    need = sizes[reading.carried & going].max() / _LARGEST_RATIO
    return at if kept[at] > 0 and kept[at] >= need else None


def _move(graph: ir.Graph, reading: Reading, going: Mask, carrier: int) -> None:
    assert reading.shelf is not None
    node, (at, axis) = reading.sink.node, reading.shelf
    value, array = node.inputs[at], constant(node.inputs[at])
    assert value is not None
    assert array is not None
    rows = np.moveaxis(array.astype(np.float64), axis, 0)
    ratios = reading.known[going] / reading.known[carrier]
    rows[carrier] += np.tensordot(ratios, rows[going], 1)
    moved = np.moveaxis(rows, 0, axis).astype(array.dtype)
    if has_one_use(value):
        value.const_value = ir.tensor(np.array(moved, order="C"), name=value.name)
        return
    build = Builder(graph, all_names(graph), str(node.name or node.op_type))
    fresh = build.constant(moved, f"{value.name}_carrying", value)
    graph.register_initializer(fresh)
    node.replace_input_with(at, fresh)
