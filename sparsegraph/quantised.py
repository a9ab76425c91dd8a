"""Quantised parts of a model: ONNX Runtime's own int8 arithmetic computes them, as users run them.

What a quantised model computes depends on who runs it: ONNX Runtime puts int8 products in place of
DequantizeLinear, MatMul, QuantizeLinear, and these saturate on AVX2, where the operators one by one
would not. So ONNX Runtime with its default options is the reference of such a model, and its
quantised nodes are left to it together with what stands between them.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from sparsegraph.layers import weighted

REASON = "quantised, left to ONNX Runtime's int8 arithmetic"
_OPERATORS = frozenset(
    {
        "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ConvInteger",
        "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM",
        "QGemm", "QAttention", "QEmbedLayerNormalization", "MatMulNBits", "MatMulBnb4",
        "GatherBlockQuantized",
    }
)  # fmt: skip


def is_quantised(node: ir.Node) -> bool:
    """True for an operator that makes, reads or multiplies quantised numbers."""
    return node.op_type in _OPERATORS or node.op_type.startswith("QLinear")


def has_quantised(model: ir.Model) -> bool:
    """True when any node of the model is quantised, subgraphs included."""
    return any(map(is_quantised, model.graph.all_nodes()))


def left(model: ir.Model) -> dict[ir.Node, str]:
    """Nodes of a quantised model that ONNX Runtime should run, and why.

    The quantised nodes cut the others into islands. An island with a layer in floating point is
    worth kernels; any other is activations and shapes between quantised layers, which ONNX Runtime
    fuses with them.
    """
    if not has_quantised(model):
        return {}
    islands = _islands(n for n in model.graph if not is_quantised(n))
    layers = {layer.node for layer in weighted(model) if not layer.quantised}
    worth = {islands[node] for node in layers if node in islands}
    return {n: REASON for n in model.graph if is_quantised(n) or islands[n] not in worth}


def _islands(nodes: Iterable[ir.Node]) -> dict[ir.Node, int]:
    """The number of each node's connected part, over values that pass between these nodes."""
    inside = set(nodes)
    found: dict[ir.Node, int] = {}
    for number, first in enumerate(inside):
        waiting = [first]
        while waiting:
            node = waiting.pop()
            if node in found or node not in inside:
                continue
            found[node] = number
            makers = [None if value is None else value.producer() for value in node.inputs]
            waiting += [maker for maker in makers if maker is not None]
            waiting += [user for value in node.outputs for user in value.consumers()]
    return found
