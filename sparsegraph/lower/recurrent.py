"""LSTM and GRU: one product for the inputs of all steps and directions, then the recurrence."""

import math
from dataclasses import replace
from typing import TypeGuard

import numpy as np
import onnx_ir as ir

from sparsegraph.graph import attribute, constant, input_at, int_attribute, is_used
from sparsegraph.lower.builder import Builder, Declined, Stored, shape_of
from sparsegraph.lower.products import emit_product
from sparsegraph.program import Arg, Ref, Scratch
from sparsegraph.targets.kernels.recurrent import GATES, Recurrent, pack, pack_coded
from sparsegraph.targets.kernels.slots import n_slots
from sparsegraph.targets.layout import FeatureMajor
from sparsegraph.targets.target import Target

_VECTORS = 8
"""Sums at a time: an addition takes 4 cycles, and there are two a cycle."""
_FEW = 2
"""Sequences that are faster one after the other than as a matrix, whatever the weights: with 256
units and 4 sequences .80 of ONNX Runtime's speed, with 2 1.11, with 128 units and 8 1.33."""
_ROWS = (1, 4, 8, 16)
_GAIN, _ALIKE = 0.9, 1.15
_USUAL = {"LSTM": ("sigmoid", "tanh", "tanh"), "GRU": ("sigmoid", "tanh")}
_REVERSE = {"forward": 1, "reverse": 0, "bidirectional": 1}
"""The first direction that runs backwards."""


def lower_recurrent(b: Builder, node: ir.Node) -> None:
    """Input weights as any product; recurrent weights dense, or coded where that pays.

    Raises:
        Declined: what the kernel does not compute or is slow at, or weights that are not constant.
    """
    _check(node)
    x = node.inputs[0]
    assert x is not None
    steps, images, _ = shape_of(x)
    weight, recurrent = (_weights(node, at) for at in (1, 2))
    directions, _, units = recurrent.shape
    kernel = _kernel(_kind(node), recurrent, b.target)
    streams = _streams(kernel, recurrent)
    n_bytes = sum(array.nbytes for array in streams.values()) // directions
    if images > _FEW and n_bytes > b.target.l2_bytes // 2:
        raise Declined(f"{images} sequences at once, and weights that fill the level 2 cache")
    bias, inner = _biases(node, directions, units)
    name = str(node.name)
    gates = _gates(b, node, x, weight, bias)
    outputs = [*node.outputs, None, None]
    y = b.new_row(outputs[0]) if _is_read(outputs[0]) else None
    shape = (directions, images, units)
    n_bytes = 4 * int(np.prod(shape))
    to = y.address if y else b.temporary(f"{name}.y", steps * n_bytes)
    states: list[Arg] = []
    for at, value in ((5, outputs[1]), (6, outputs[2]))[: 2 if "c" in _names(kernel) else 1]:
        room = b.new_row(value).address if _is_read(value) else b.temporary(f"{name}.s", n_bytes)
        states += [room, _start(b, node, at, shape)]
    if "bias" in _names(kernel):
        states.append(b.weight(f"{name}.inner", inner))
    packed = [b.weight(f"{name}.recurrent_{k}", array) for k, array in streams.items()]
    args: list[Arg] = [
        to, gates.address, *states, *packed, Scratch(kernel.scratch_bytes(units)), steps,
        directions, images, units, kernel.panels(units),
        _REVERSE[str(attribute(node, "direction", "forward"))],
    ]  # fmt: skip
    n_dense, n_kept = recurrent.size, int(np.count_nonzero(recurrent))
    detail = f"{steps} steps of {directions} x {units} units"
    if kernel.coded:
        detail += f", {n_kept / n_dense:.1%} non-zero"
    b.step(
        kernel, args, directions * images, [node], dense_flops=2 * steps * images * n_dense,
        flops=2 * steps * images * (n_kept if kernel.coded else n_dense), detail=detail,
    )  # fmt: skip


def _kernel(kind: str, recurrent: np.ndarray, target: Target) -> Recurrent:
    """Dense, or coded where that takes less time, of about equal ways the one of fewest bytes.

    Times are in slots of one row. A dense vector takes (lanes + 5) / 10, a slot of `rows` rows
    1 + rows / 16, beginning a panel 8: 1024x256 with 10 % non-zero takes 11.2 us dense, 9.3 in
    panels of 4 rows, 8.4 of 8, 9.5 of 16; with 5 % 5.7, 5.2, 6.2; with 10 % where 16 rows share
    their zeros 2.1 (AVX-512). Arm and RISC-V were not timed: of the instructions there, a slot
    takes twice those of a dense vector.
    """
    dense = recurrent.size * (target.lanes + 5) / 10 / target.lanes
    costs = {}
    for rows in (n for n in _ROWS if n <= target.lanes):
        panels = sum(-(-len(one) // rows) for one in recurrent)
        slots = sum(n_slots(one, rows) for one in recurrent)
        costs[rows] = slots * (1 + rows / 16) + 8 * panels, slots * (4 * rows + 2)
    least = min(ms for ms, _ in costs.values())
    if least > _GAIN * dense:
        return Recurrent(kind, target.lanes, _VECTORS * target.lanes)
    rows = min(
        (n for n, (ms, _) in costs.items() if ms <= _ALIKE * least), key=lambda n: costs[n][1]
    )
    return Recurrent(kind, target.lanes, rows, coded=True)


def _streams(kernel: Recurrent, recurrent: np.ndarray) -> dict[str, np.ndarray]:
    """What the kernel reads of the recurrent weights, by name."""
    if kernel.coded:
        return pack_coded(recurrent, kernel)._asdict()
    return {"values": pack(recurrent, kernel)}


def _check(node: ir.Node) -> None:
    """Decline what is not the plain recurrence."""
    given = attribute(node, "activations", None)
    names = [str(name).lower() for name in given] if isinstance(given, list | tuple) else None
    usual = _USUAL[node.op_type]
    if names is not None and names != [*usual] * (len(names) // len(usual)):
        raise Declined(f"activations {', '.join(names)}")
    for what in ("clip", "activation_alpha", "activation_beta"):
        if what in node.attributes:
            raise Declined(f"{what} is given")
    for what in ("layout", "input_forget"):
        if int_attribute(node, what, 0):
            raise Declined(f"{what} is {int_attribute(node, what, 0)}")
    if input_at(node, 4) is not None:
        raise Declined("sequences have lengths of their own")
    if node.op_type == "LSTM" and input_at(node, 7) is not None:
        raise Declined("gates look at the cell (peepholes)")


def _kind(node: ir.Node) -> str:
    if node.op_type == "GRU" and not int_attribute(node, "linear_before_reset", 0):
        return "reset"
    return str(node.op_type).lower()


def _weights(node: ir.Node, at: int) -> np.ndarray:
    array = constant(input_at(node, at))
    if array is None or array.dtype != np.float32:
        raise Declined("weights are not constant float32")
    return array


def _biases(node: ir.Node, directions: int, units: int) -> tuple[np.ndarray, np.ndarray]:
    """What is added to all gates [directions * gates * units], and inside the GRU's reset."""
    gates = GATES[node.op_type.lower()]
    value = input_at(node, 3)
    both = np.zeros((directions, 2, gates * units), np.float32)
    if value is not None:
        both = _weights(node, 3).reshape(both.shape)
    inner = both[:, 1, -units:].copy()
    total = both.sum(1)
    if _kind(node) == "gru":
        total[:, -units:] = both[:, 0, -units:]
    return total.ravel(), inner


def _gates(b: Builder, node: ir.Node, x: ir.Value, weight: np.ndarray, bias: np.ndarray) -> Stored:
    """The inputs' part of every gate, row-major [steps * images, directions * gates * units]."""
    points = math.prod(shape_of(x)[:2])
    flat = np.ascontiguousarray(weight.reshape(-1, weight.shape[2]))
    line = _value(f"{node.name}.line", (points, flat.shape[1]))
    b.keep(line, replace(b.row(x), shape=shape_of(line)))
    result = _value(f"{node.name}.gates", (points, len(flat)))
    features = b.feature(line, 1)
    layout = FeatureMajor(1, 0, points, 0, 0, 0, 0, 1)
    emit_product(b, [node], features, flat, bias, result, layout, None)
    return b.row(result)


def _value(name: str, shape: tuple[int, int]) -> ir.Value:
    """A value between the two kernels."""
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))


def _start(b: Builder, node: ir.Node, at: int, shape: tuple[int, ...]) -> Ref:
    value = input_at(node, at)
    if value is None:
        return b.weight(f"{node.name}.zeros", np.zeros(shape, np.float32))
    return b.row(value).address


def _is_read(value: ir.Value | None) -> TypeGuard[ir.Value]:
    return value is not None and is_used(value)


def _names(kernel: Recurrent) -> list[str]:
    return [param.name for param in kernel.params]
