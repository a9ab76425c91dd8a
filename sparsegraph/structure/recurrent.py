"""LSTM, GRU, RNN: hidden units, over all gates, both directions and the recurrence."""

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sparsegraph.graph import constant, input_at, int_attribute, is_constant
from sparsegraph.structure.cut import Cut
from sparsegraph.structure.known import Knowns
from sparsegraph.structure.labels import Axis
from sparsegraph.structure.rule import Shelf
from sparsegraph.structure.ties import Ties, shape_of

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
_CELL = {"LSTM": 3, "GRU": 2}  # the gate that brings in what is new
_PEEPHOLES = 7


def tie_recurrent(t: Ties, node: ir.Node) -> None:
    """A unit is one row of every gate, one column of the recurrence, one place of every state."""
    data = t.input(node, 0)
    if not all(is_constant(node.inputs[at]) for at in (1, 2)) or int_attribute(node, "layout", 0):
        t.freeze_inputs(node, "computed weights, or batch first")
        return
    if input_at(node, _PEEPHOLES) is not None:
        t.freeze_inputs(node, "peepholes")
        return
    for axis in data[:2]:
        t.freeze(node, axis, "time and batch")
    gates = GATES[node.op_type]
    size = shape_of(node.inputs[2])[2]
    unit = t.fresh(node, 1, 1, size)
    rows = None if unit is None else np.tile(unit, gates)
    t.sink(node, 0, 2, data[2])
    t.sink(node, 2, 2, unit)
    t.bind(node, 1, [None, rows, data[2]])
    t.bind(node, 2, [None, rows, unit])
    t.bind(node, 3, [None, None if unit is None else np.tile(unit, 2 * gates)])
    for at in (5, 6):
        t.bind(node, at, [None, None, unit])
    _set_outputs(t, node, unit)


def _set_outputs(t: Ties, node: ir.Node, unit: Axis) -> None:
    for value in node.outputs:
        if value.name:
            t.set(value, [*[None] * (len(shape_of(value)) - 1), unit])


def cut_recurrent(cut: Cut, node: ir.Node) -> None:
    """Units that are left."""
    made = next(v for v in node.outputs if v.name)
    left = cut.shape(made)[-1]
    node.attributes["hidden_size"] = ir.AttrInt64("hidden_size", left)


def known_recurrent(k: Knowns, node: ir.Node) -> None:
    """A unit that starts at zero and never gets anything new stays zero."""
    cell = _CELL.get(node.op_type)
    if cell is None or node.attributes.get("activations") is not None:
        return
    zero = _never_new(node, cell)
    if zero is None:
        return
    for at in (5, 6):
        state = k.along(input_at(node, at), 2)
        if input_at(node, at) is not None:
            zero &= False if state is None else state == 0
    for value in node.outputs:
        if value.name:
            rank = len(shape_of(value))
            k.set(value, np.where(zero, 0.0, np.nan).reshape((1,) * (rank - 1) + (-1,)))


def _never_new(node: ir.Node, cell: int) -> NDArray[np.bool_] | None:
    """Units whose rows of the cell gate are zero in every direction."""
    weight, again = constant(node.inputs[1]), constant(node.inputs[2])
    if weight is None or again is None:
        return None
    size, gates = again.shape[2], GATES[node.op_type]
    rows = slice(cell * size, (cell + 1) * size)
    zero = ~(weight[:, rows].any(axis=(0, 2)) | again[:, rows].any(axis=(0, 2)))
    bias = constant(input_at(node, 3))
    if input_at(node, 3) is not None:
        if bias is None:
            return None
        both = bias.reshape(-1, 2, gates, size)[:, :, cell]
        zero &= ~both.any(axis=(0, 1))
    return np.asarray(zero)


def silent_recurrent(node: ir.Node, at: int) -> NDArray[np.bool_] | None:
    """Inputs with zero columns; units that no other unit reads."""
    if at == 0:
        weight = constant(node.inputs[1])
        return None if weight is None else np.asarray(~weight.any(axis=(0, 1)))
    again = constant(node.inputs[2])
    if again is None:
        return None
    size, gates = again.shape[2], int(GATES[node.op_type])
    block = again.reshape(again.shape[0], gates, size, size) != 0
    block[:, :, np.arange(size), np.arange(size)] = False
    return np.asarray(~block.any(axis=(0, 1, 2)))


def shelf_recurrent(node: ir.Node, at: int) -> Shelf | None:
    """The columns of the input weight."""
    return (1, 2) if at == 0 else None
