"""Say of every activation and attention mask what it is; annotate the node, change nothing.

    r = Relu(g); y = Mul(r, x)        ->  the same; Mul is annotated {"kind": "value", ...}

Kinds: `constant` (an initializer with exact zeros), `boolean` (a bool decides at run time), `value`
(zeros depend on values: Relu, Clip from 0, HardSigmoid, scatter into zeros), `soft` (Sigmoid,
Softmax, and other gates that are never zero: no mask, never skipped). For attention masks, `leaks`
tells whether a blocked key keeps a weight above zero or a row may lose all its keys.

Declines when: a float operand is a graph input: its range is unknown and must be declared.
"""

import json
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sparsegraph.graph import constant, input_at, is_constant, is_op, made_by, scalar
from sparsegraph.rewrite import Decline, Fuel, Outcome, decline

MASK = "sparsegraph.mask"
_MOVES = ("Cast", "Reshape", "Unsqueeze", "Squeeze", "Expand", "Transpose", "Slice", "Identity",
          "Tile", "Flatten", "Concat", "Split", "Gather")  # fmt: skip
_VALUE = ("Relu", "HardSigmoid", "ThresholdedRelu", "Shrink", "MaxPool")
_SOFT = ("Sigmoid", "Softmax", "Tanh", "Softplus", "LayerNormalization", "Gelu", "HardSwish",
         "Erf", "Exp", "Swish")  # fmt: skip
_BLOCKED = -1e4  # an additive entry at or below blocks: exp(-1e4) is 0 in fp32


@dataclass(frozen=True)
class MaskRecord:
    """One mask: which node, which operand, its kind, and what it was computed by."""

    node: str
    value: str
    kind: str
    detail: str


@dataclass(frozen=True)
class ClassifyMasks:
    """Annotation for the report and for kernels that skip rows."""

    name: ClassVar[str] = "classify_masks"
    exact: ClassVar[bool] = True

    def run(self, model: ir.Model, fuel: Fuel) -> Outcome:
        """Count newly annotated nodes; a second run finds the annotations in place."""
        records, declined = classify(model)
        by_name = {str(n.name or n.outputs[0].name): n for n in model.graph}
        n_applied = 0
        for record in records:
            text = json.dumps(asdict(record), sort_keys=True)
            properties = by_name[record.node].metadata_props
            if properties.get(MASK) != text:
                properties[MASK] = text
                n_applied += 1
        return Outcome(n_applied, tuple(declined))


def classify(model: ir.Model) -> tuple[list[MaskRecord], list[Decline]]:
    """Masks of Mul, Where and Attention nodes in graph order, and operands of unknown range."""
    records: list[MaskRecord] = []
    declined: list[Decline] = []
    for node in model.graph:
        if is_op(node, "Mul"):
            found = _of_mul(node)
        elif is_op(node, "Where"):
            found = _of_where(node)
        elif is_op(node, "Attention"):
            found = _of_attention(node)
        else:
            continue
        if isinstance(found, Decline):
            declined.append(found)
        elif found is not None:
            records.append(found)
    return records, declined


def _of_mul(node: ir.Node) -> MaskRecord | Decline | None:
    unknown = None
    soft = None
    for value in node.inputs:
        if value is None or scalar(value) is not None:
            continue
        kind, detail = kind_of(value)
        if kind in ("constant", "boolean", "value"):
            return _record(node, value, kind, detail)
        if kind == "soft":
            soft = _record(node, value, kind, detail)
        if kind == "input" and "mask" in str(value.name).lower():
            unknown = decline(node, f"the range of input {detail} is unknown: declare it a mask")
    return unknown or soft


def _of_where(node: ir.Node) -> MaskRecord | None:
    condition = node.inputs[0]
    sides = [value for value in node.inputs[1:] if scalar(value) == 0.0 or _is_all_zero(value)]
    if condition is None or len(sides) != 1:
        return None
    if is_constant(condition):
        return _record(node, condition, "constant", "Where")
    compared = made_by(condition, "Greater", "Less", "GreaterOrEqual", "LessOrEqual")
    if compared is not None:
        return _record(node, condition, "value", compared.op_type)
    return _record(node, condition, "boolean", "Where")


def _of_attention(node: ir.Node) -> MaskRecord | None:
    value = input_at(node, 3)
    if value is None:
        return None
    array = constant(value)
    if array is None:
        kind, detail = kind_of(value)
        return _record(node, value, "boolean" if kind != "soft" else kind, f"additive {detail}")
    blocked = ~array if array.dtype.kind == "b" else array <= _BLOCKED
    if not blocked.any():
        return _record(node, value, "soft", "a bias: no entry blocks")
    detail = f"{blocked.mean():.1%} blocked"
    if blocked.all(axis=-1).any():
        detail += ", leaks: some row loses all keys"
    elif array.dtype.kind == "f" and np.any((array < 0) & ~blocked):
        detail += ", with a bias"
    return _record(node, value, "constant", detail)


def kind_of(value: ir.Value, depth: int = 8) -> tuple[str, str]:
    """Kind of an operand and the op or property that decides it; `input` or `` when open."""
    array = constant(value)
    if array is not None:
        has_zeros = array.size > 1 and bool((array == 0).any())
        share = float((array == 0).mean()) if array.size else 0.0
        return ("constant", f"{share:.1%} zeros") if has_zeros else ("", "")
    node = value.producer()
    if value.dtype == ir.DataType.BOOL:
        return _kind_of_bool(value, node)
    if node is None or depth == 0:
        return "input" if node is None else "", str(value.name)
    if is_op(node, "Sub") and scalar(node.inputs[0]) == 1.0 and node.inputs[1] is not None:
        return kind_of(node.inputs[1], depth - 1)
    if is_op(node, *_MOVES) and node.inputs[0] is not None:
        return kind_of(node.inputs[0], depth - 1)
    if is_op(node, *_VALUE):
        return "value", node.op_type
    if is_op(node, "Clip", "Max"):
        low = scalar(input_at(node, 1))
        return ("value", node.op_type) if low == 0.0 else ("", node.op_type)
    if is_op(node, "ScatterElements", "ScatterND") and _is_all_zero(node.inputs[0]):
        return "value", node.op_type
    if is_op(node, "Where") and any(_is_all_zero(v) for v in node.inputs[1:]):
        return "boolean", "Where"
    if is_op(node, *_SOFT):
        return "soft", node.op_type
    return "", node.op_type


def _kind_of_bool(value: ir.Value, node: ir.Node | None) -> tuple[str, str]:
    if is_op(node, "Greater", "Less", "GreaterOrEqual", "LessOrEqual") and node is not None:
        return "value", node.op_type
    return "boolean", "input" if node is None else node.op_type


def _is_all_zero(value: ir.Value | None) -> bool:
    array = constant(value)
    return array is not None and array.size > 0 and not array.any()


def _record(node: ir.Node, value: ir.Value, kind: str, detail: str) -> MaskRecord:
    return MaskRecord(str(node.name or node.outputs[0].name), str(value.name), kind, detail)
