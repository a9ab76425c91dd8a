"""Recognise the decomposed forms of GELU.

    e = Erf(x / sqrt(2)); y = x * 0.5 * (1 + e)                                 ->  y = Gelu(x)
    t = Tanh(sqrt(2/pi) * (x + 0.044715 * x^3)); y = x * 0.5 * (1 + t)
                                                        ->  y = Gelu<approximate="tanh">(x)

The factors may come in any order and association, with Div or Mul by the constant, and the cube as
Pow or Mul: the argument is read as a polynomial in x, the rest as a product.

Declines when: the constants are others (a different activation), or the opset is below 20.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isclose, pi, sqrt
from typing import ClassVar

import onnx_ir as ir

from sparsegraph.graph import has_one_use, is_op, made_by, opset_of, scalar, static_shape
from sparsegraph.rewrite import Builder, Decline, RewritePass, decline

Polynomial = dict[int, float]  # exponent of x -> coefficient

_ERF = {1: 1 / sqrt(2)}
_TANH = {1: sqrt(2 / pi), 3: 0.044715 * sqrt(2 / pi)}
_CLOSE = 2e-5  # sqrt(2) is often written with six digits
_DEPTH = 8


@dataclass(frozen=True)
class Found:
    """The operand of the activation and which form it has."""

    source: ir.Value
    approximate: str
    output: ir.Value


@dataclass(frozen=True)
class FuseGelu(RewritePass):
    """Gelu from its definition."""

    name: ClassVar[str] = "fuse_gelu"

    def match(self, node: ir.Node, graph: ir.Graph) -> Found | Decline | None:
        """A product of x, one half, and 1 + erf or 1 + tanh of the right argument."""
        if not is_op(node, "Mul", "Div"):
            return None
        factors, number = _factors(node.outputs[0], True)
        gates = [f for f in factors if _one_plus(f) is not None]
        if len(factors) != 2 or len(gates) != 1:
            return None
        gate = _one_plus(gates[0])
        assert gate is not None
        source = factors[1] if factors[0] is gates[0] else factors[0]
        wanted = _ERF if gate.op_type == "Erf" else _TANH
        argument = gate.inputs[0]
        found = None if argument is None else polynomial(argument, source)
        if found is None:
            return None
        if static_shape(source) != static_shape(node.outputs[0]):
            return None
        if not _equal(found, wanted) or not isclose(number, 0.5, rel_tol=_CLOSE):
            if _is_scaled_later(node):
                return None
            return decline(node, f"the constants are not GELU's: {number:g}, {found}")
        if opset_of(node) < 20:
            return decline(node, f"opset {opset_of(node)} has no Gelu, 20 has")
        return Found(source, "none" if gate.op_type == "Erf" else "tanh", node.outputs[0])

    def rewrite(self, found: Found, build: Builder) -> Sequence[ir.Value]:
        """One Gelu."""
        attributes = {"approximate": found.approximate}
        return [build.op("Gelu", [found.source], attributes, like=found.output)]


def polynomial(value: ir.Value, x: ir.Value, depth: int = _DEPTH) -> Polynomial | None:
    """The value as a polynomial in x with constant coefficients, or None."""
    if value is x:
        return {1: 1.0}
    number = scalar(value)
    if number is not None:
        return {0: number}
    node = made_by(value, "Add", "Sub", "Mul", "Div", "Pow")
    if node is None or depth == 0 or node.inputs[0] is None or node.inputs[1] is None:
        return None
    a = polynomial(node.inputs[0], x, depth - 1)
    b = polynomial(node.inputs[1], x, depth - 1)
    return None if a is None or b is None else _combine(node.op_type, a, b)


def _combine(op_type: str, a: Polynomial, b: Polynomial) -> Polynomial | None:
    if op_type in ("Add", "Sub"):
        sign = 1.0 if op_type == "Add" else -1.0
        return {k: a.get(k, 0.0) + sign * b.get(k, 0.0) for k in a.keys() | b.keys()}
    if op_type == "Mul":
        product: Polynomial = {}
        for i, u in a.items():
            for j, v in b.items():
                product[i + j] = product.get(i + j, 0.0) + u * v
        return product
    if b.keys() != {0}:
        return None
    if op_type == "Div":
        return {k: v / b[0] for k, v in a.items()} if b[0] else None
    if b[0] not in (1.0, 2.0, 3.0):
        return None
    result: Polynomial | None = a
    for _ in range(int(b[0]) - 1):
        result = None if result is None else _combine("Mul", result, a)
    return result


def _factors(value: ir.Value, is_root: bool = False) -> tuple[list[ir.Value], float]:
    """Non-constant factors of a product, and the product of the constant ones."""
    node = made_by(value, "Mul", "Div")
    if node is None or not (is_root or has_one_use(value)):
        return [value], 1.0
    left, right = node.inputs
    if left is None or right is None:
        return [value], 1.0
    by = scalar(right)
    if is_op(node, "Div"):
        if not by:
            return [value], 1.0
        factors, number = _factors(left)
        return factors, number / by
    if by is not None:
        factors, number = _factors(left)
        return factors, number * by
    first = scalar(left)
    if first is not None:
        factors, number = _factors(right)
        return factors, number * first
    (f, m), (g, n) = _factors(left), _factors(right)
    return [*f, *g], m * n


def _one_plus(value: ir.Value) -> ir.Node | None:
    """The Erf or Tanh node e of a value 1 + e."""
    add = made_by(value, "Add")
    if add is None:
        return None
    for side in (0, 1):
        if scalar(add.inputs[1 - side]) == 1.0:
            return made_by(add.inputs[side], "Erf", "Tanh")
    return None


def _is_scaled_later(node: ir.Node) -> bool:
    """True when the only user multiplies again: the whole product is seen there."""
    users = node.outputs[0].consumers()
    return has_one_use(node.outputs[0]) and is_op(users[0], "Mul", "Div")


def _equal(a: Polynomial, b: Polynomial) -> bool:
    keys = {k for k in a.keys() | b.keys() if a.get(k, 0.0) or b.get(k, 0.0)}
    return all(isclose(a.get(k, 0.0), b.get(k, 0.0), rel_tol=_CLOSE) for k in keys)
