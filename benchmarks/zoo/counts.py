"""Parameters and multiply-accumulates of an ONNX model with static shapes."""

import math
from collections.abc import Mapping

import onnx
from onnx import TensorProto

N_STATISTICS = 2
"""BatchNormalization's last inputs are running statistics, which are no parameters."""


def parameters(model: onnx.ModelProto) -> int:
    """Trainable numbers: all float initializers but running statistics."""
    statistics = {
        name
        for node in model.graph.node
        if node.op_type == "BatchNormalization"
        for name in node.input[-N_STATISTICS:]
    }
    return sum(
        math.prod(tensor.dims)
        for tensor in model.graph.initializer
        if tensor.data_type == TensorProto.FLOAT and tensor.name not in statistics
    )


def macs(model: onnx.ModelProto) -> int:
    """Multiply-accumulates of Conv, ConvTranspose, Gemm, MatMul, LSTM and GRU nodes.

    Raises ValueError when shape inference leaves an operand of such a node open.
    """
    shapes = value_shapes(model)
    try:
        return sum(node_macs(node, shapes) for node in model.graph.node)
    except KeyError as error:
        raise ValueError(
            f"cannot count '{model.graph.name}': found no static shape of value {error}"
        ) from None


def node_macs(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Multiply-accumulates of one node; 0 for ops that are no product."""
    if node.op_type == "Conv":
        return math.prod(shapes[node.output[0]]) * math.prod(shapes[node.input[1]][1:])
    if node.op_type == "ConvTranspose":
        return math.prod(shapes[node.input[0]]) * math.prod(shapes[node.input[1]][1:])
    if node.op_type == "MatMul":
        return math.prod(shapes[node.output[0]]) * shapes[node.input[0]][-1]
    if node.op_type == "Gemm":
        trans_a = any(a.name == "transA" and a.i for a in node.attribute)
        depth = shapes[node.input[0]][0 if trans_a else 1]
        return math.prod(shapes[node.output[0]]) * depth
    if node.op_type in ("LSTM", "GRU"):
        points = math.prod(shapes[node.input[0]][:2])
        return points * sum(math.prod(shapes[name]) for name in node.input[1:3])
    return 0


def value_shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Static shape of every value that shape inference knows, initializers included."""
    graph = model.graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        dims = tensor.shape.dim
        if tensor.HasField("shape") and all(d.HasField("dim_value") for d in dims):
            shapes[value.name] = tuple(d.dim_value for d in dims)
    return shapes
