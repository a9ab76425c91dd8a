"""A layer norm over features some of which are zero and gone, with the mean of all of them.

The masked stream has n features, m of which stay. With s their sum, u = s / n is the mean and

    n var = sum over all of (x - u)^2 = sum over what stays of (x - u)^2 + (n - m) u^2

so (x - u) / sqrt(var + e) follows from what stays. A layer norm over m features has another mean,
and no scale or epsilon makes up for that; so plain operators take its place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from sparsegraph.graph import input_at
from sparsegraph.rewrite import Builder

if TYPE_CHECKING:
    from sparsegraph.structure.cut import Cut


def carry_mean(cut: Cut, node: ir.Node, n: int, m: int) -> None:
    """Plain operators instead of a LayerNormalization over the last axis, `m` of `n` features."""
    graph, out = cut.analysis.graph, node.outputs[0]
    data = node.inputs[0]
    assert data is not None
    assert out.dtype is not None
    build = Builder(graph, cut.names, str(node.name or node.op_type))
    dtype, shape = out.dtype.numpy(), cut.shape(data)
    line = (*shape[:-1], 1)

    def number(value: float, what: str) -> ir.Value:
        return build.constant(np.array(value, dtype), f"{out.name}_{what}")

    def op(kind: str, *inputs: ir.Value) -> ir.Value:
        wide = any(v in (data, apart) for v in inputs)
        return build.op(kind, inputs, like=out, shape=shape if wide else line)

    apart: ir.Value | None = None
    mean = op("Mul", _mean(build, data, out, line), number(m / n, "share"))
    apart = op("Sub", data, mean)
    around = op("Mul", _mean(build, op("Mul", apart, apart), out, line), number(m / n, "share"))
    zeros = op("Mul", op("Mul", mean, mean), number((n - m) / n, "zeros"))
    epsilon = number(node.attributes.get_float("epsilon", 1e-5), "epsilon")
    apart = op("Div", apart, op("Sqrt", op("Add", op("Add", around, zeros), epsilon)))
    last = apart
    for at, kind in ((1, "Mul"), (2, "Add")):
        vector = input_at(node, at)
        if vector is not None:
            last = build.op(kind, [last, vector], like=out)
            cut.analysis.ties.values[last] = cut.analysis.ties.values[out]
            cut.analysis.ties.constants[build.nodes[-1], 1] = cut.analysis.ties.constants[node, at]
    for value in build.constants:
        graph.register_initializer(value)
    graph.insert_after(node, build.nodes)
    out.replace_all_uses_with(last)


def _mean(build: Builder, value: ir.Value, out: ir.Value, line: tuple[int, ...]) -> ir.Value:
    """Over the last axis, which stays as an axis of size one; as the opset wants it."""
    if build.graph.opset_imports.get("", 18) < 18:
        return build.op("ReduceMean", [value], {"axes": [-1]}, like=out, shape=line)
    axes = build.constant(np.array([-1]), f"{out.name}_axis")
    return build.op("ReduceMean", [value, axes], like=out, shape=line)
