"""Spell out norms and activations that ONNX Runtime's own tools write, before anything else.

    y, , , s = com.microsoft.SkipSimplifiedLayerNormalization<epsilon=e>(x, skip, gamma)
        ->  s = Add(x, skip)
            v = ReduceMean<axes=[-1]>(Mul(s, s));  y = Mul(Div(s, Sqrt(Add(v, e))), gamma)

So are SimplifiedLayerNormalization (the same without skip, in ONNX's own domain, where no checker
knows it), SkipLayerNormalization, Gelu, BiasGelu and FastGelu. `capture` does this to what it
loads: later passes read plain ONNX, and shapes are known behind it. Norms compute in float32, as
ONNX Runtime does inside.

Declines when: a mean or an inverse deviation is read, the norm is not over the last axis, an
activation is of half precision, or of an unknown type in a model with halves, or there is no Erf.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from sparsegraph.graph import attribute, input_at, int_attribute, is_used
from sparsegraph.rewrite import Builder, Decline, RewritePass, decline

_FLOAT = ir.DataType.FLOAT
_AXES_ARE_INPUT, _HAS_ERF = 18, 9
_SKIP_EPSILON, _EPSILON = 1e-12, 1e-5  # where a node names none


@dataclass(frozen=True)
class ExpandContrib(RewritePass):
    """Plain operators in place of ONNX Runtime's fused ones."""

    name: ClassVar[str] = "expand_contrib"

    def match(self, node: ir.Node, graph: ir.Graph) -> ir.Node | Decline | None:
        """A node that has a rule."""
        is_simple = node.op_type == "SimplifiedLayerNormalization"
        if node.op_type not in _RULES or not (is_simple or node.domain == "com.microsoft"):
            return None
        if any(is_used(value) for value in node.outputs[1:3]):
            return decline(node, "a mean or an inverse deviation is read")
        if int_attribute(node, "axis", -1) != -1:
            return decline(node, f"the norm starts at axis {int_attribute(node, 'axis', -1)}")
        if "Gelu" in node.op_type:
            if _opset(graph) < _HAS_ERF:
                return decline(node, f"opset {_opset(graph)} has no Erf, {_HAS_ERF} has")
            if _may_be_half(node, graph):
                return decline(node, "it may compute in half precision")
        return node

    def rewrite(self, found: ir.Node, build: Builder) -> Sequence[ir.Value]:
        """The outputs, one that nobody reads standing for any."""
        return _RULES[found.op_type](_Parts(found, build))


def _may_be_half(node: ir.Node, graph: ir.Graph) -> bool:
    known = [v.dtype for v in node.inputs if v is not None and v.dtype is not None]
    everything = (v.dtype for v in (*graph.initializers.values(), *graph.inputs))
    return any(kind in _HALVES for kind in known or everything)


class _Parts:
    """Makes the operators that one node becomes."""

    def __init__(self, node: ir.Node, build: Builder) -> None:
        self.node, self.build = node, build

    def op(self, kind: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        return self.build.op(kind, inputs, attributes)

    def number(self, value: float) -> ir.Value:
        return self.build.constant(np.array(value, np.float32), f"{self.build.hint}_number")

    def sum(self, *values: ir.Value | None) -> ir.Value:
        """Of those that are there."""
        first, *rest = [value for value in values if value is not None]
        for value in rest:
            first = self.op("Add", first, value)
        return first

    def mean(self, x: ir.Value) -> ir.Value:
        if _opset(self.build.graph) < _AXES_ARE_INPUT:
            return self.op("ReduceMean", x, axes=[-1])
        axes = self.build.constant(np.array([-1], np.int64), f"{self.build.hint}_axes")
        return self.op("ReduceMean", x, axes)

    def quotient(self, x: ir.Value, least: float) -> ir.Value:
        """x over the root of the mean of its squares."""
        epsilon = attribute(self.node, "epsilon", least)
        assert isinstance(epsilon, float)
        variance = self.op("Add", self.mean(self.op("Mul", x, x)), self.number(epsilon))
        return self.op("Div", x, self.op("Sqrt", variance))

    def in_float32(
        self, x: ir.Value, gamma: ir.Value | None, norm: Callable[[ir.Value], ir.Value],
        beta: ir.Value | None = None,
    ) -> ir.Value:  # fmt: skip
        """The norm of x, scaled and shifted, in the type of the scale."""
        assert gamma is not None
        kind = gamma.dtype
        if kind == _FLOAT or kind is None:
            return self.sum(self.op("Mul", norm(x), gamma), beta)
        wide, scale, shift = (v and self.op("Cast", v, to=int(_FLOAT)) for v in (x, gamma, beta))
        assert wide is not None
        return self.op("Cast", self.sum(self.op("Mul", norm(wide), scale), shift), to=int(kind))

    def simple(self, x: ir.Value, gamma: ir.Value | None, least: float) -> ir.Value:
        return self.in_float32(x, gamma, lambda wide: self.quotient(wide, least))

    def centred(self, x: ir.Value, gamma: ir.Value | None, beta: ir.Value | None) -> ir.Value:
        def norm(wide: ir.Value) -> ir.Value:
            return self.quotient(self.op("Sub", wide, self.mean(wide)), _SKIP_EPSILON)

        return self.in_float32(x, gamma, norm, beta)

    def gelu(self, x: ir.Value) -> ir.Value:
        inner = self.op("Div", x, self.number(np.sqrt(2)))
        return self.gated(x, self.op("Erf", inner))

    def fast_gelu(self, x: ir.Value) -> ir.Value:
        cube = self.op("Mul", self.op("Mul", x, x), x)
        inner = self.op("Add", x, self.op("Mul", cube, self.number(0.044715)))
        return self.gated(
            x, self.op("Tanh", self.op("Mul", inner, self.number(np.sqrt(2 / np.pi))))
        )

    def gated(self, x: ir.Value, gate: ir.Value) -> ir.Value:
        half = self.op("Mul", x, self.number(0.5))
        return self.op("Mul", half, self.op("Add", gate, self.number(1)))


def _simplified(parts: _Parts) -> list[ir.Value]:
    x = parts.sum(input_at(parts.node, 0))
    return [parts.simple(x, input_at(parts.node, 1), _EPSILON)]


def _skip_simplified(parts: _Parts) -> list[ir.Value]:
    x, skip, gamma, bias = (input_at(parts.node, at) for at in range(4))
    whole = parts.sum(x, skip, bias)
    y = parts.simple(whole, gamma, _SKIP_EPSILON)
    return [y, y, y, whole]


def _skip_norm(parts: _Parts) -> list[ir.Value]:
    x, skip, gamma, beta, bias = (input_at(parts.node, at) for at in range(5))
    whole = parts.sum(x, skip, bias)
    y = parts.centred(whole, gamma, beta)
    return [y, y, y, whole]


def _gelu(parts: _Parts) -> list[ir.Value]:
    return [parts.gelu(parts.sum(*parts.node.inputs))]


def _fast_gelu(parts: _Parts) -> list[ir.Value]:
    return [parts.fast_gelu(parts.sum(*parts.node.inputs))]


_RULES: Mapping[str, Callable[[_Parts], list[ir.Value]]] = {
    "SimplifiedLayerNormalization": _simplified,
    "SkipSimplifiedLayerNormalization": _skip_simplified,
    "SkipLayerNormalization": _skip_norm,
    "Gelu": _gelu,
    "BiasGelu": _gelu,
    "FastGelu": _fast_gelu,
}
_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def _opset(graph: ir.Graph) -> int:
    return graph.opset_imports.get("", graph.opset_imports.get("ai.onnx", 0))
