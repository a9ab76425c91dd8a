"""Which values are above or never below zero whatever the input is, by how they are made."""

import onnx_ir as ir

from sparsegraph.graph import constant, is_op, made_by, scalar

_NEVER_BELOW = ("Abs", "Relu", "Sigmoid", "HardSigmoid", "Softmax", "ReduceSumSquare", "ReduceL2",
                "ReduceL1", "Sqrt", "Exp", "Softplus")  # fmt: skip
_PASSES_SIGN = ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "Identity", "Reshape",
                "Transpose", "Expand", "Unsqueeze", "Squeeze", "Sqrt")  # fmt: skip
_DEPTH = 12


def is_positive(value: ir.Value | None, depth: int = _DEPTH) -> bool:
    """True when every number is above zero: a divisor that cannot be zero."""
    array = constant(value)
    if array is not None:
        return bool((array > 0).all())
    node = None if value is None else value.producer()
    if node is None or depth == 0:
        return False
    below = depth - 1
    if is_op(node, "Add"):
        a, b = node.inputs
        return (is_positive(a, below) and is_never_negative(b, below)) or (
            is_positive(b, below) and is_never_negative(a, below)
        )
    if is_op(node, "Max"):
        return any(is_positive(v, below) for v in node.inputs)
    if is_op(node, "Clip"):
        low = scalar(node.inputs[1]) if len(node.inputs) > 1 else None
        return low is not None and low > 0
    return is_op(node, *_PASSES_SIGN) and is_positive(node.inputs[0], below)


def is_never_negative(value: ir.Value | None, depth: int = _DEPTH) -> bool:
    """True when no number is below zero."""
    array = constant(value)
    if array is not None:
        return bool((array >= 0).all())
    node = None if value is None else value.producer()
    if node is None or depth == 0:
        return False
    if is_op(node, *_NEVER_BELOW) or _is_square(node):
        return True
    if is_op(node, "Add", "Mul", "Max"):
        return all(is_never_negative(v, depth - 1) for v in node.inputs)
    return is_op(node, *_PASSES_SIGN) and is_never_negative(node.inputs[0], depth - 1)


def _is_square(node: ir.Node) -> bool:
    if is_op(node, "Pow"):
        exponent = scalar(node.inputs[1])
        return exponent is not None and exponent > 0 and exponent % 2 == 0
    return made_by(node.outputs[0], "Mul") is not None and node.inputs[0] is node.inputs[1]
