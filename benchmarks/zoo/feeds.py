"""Deterministic inputs for any model of the zoo or of a package."""

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

Feeds = dict[str, NDArray[np.generic]]


def feeds(model: onnx.ModelProto, *, seed: int = 0) -> Feeds:
    """One feed: floats are standard normal, indices stay inside the table that they read.

    An integer input that indexes no table is a mask and gets ones (no padding: the slowest case).
    """
    rng = np.random.default_rng(seed)
    bounds = _index_bounds(model)
    initializers = {tensor.name for tensor in model.graph.initializer}
    return {
        value.name: _draw(rng, value, bounds.get(value.name))
        for value in model.graph.input
        if value.name not in initializers
    }


def _draw(
    rng: np.random.Generator, value: onnx.ValueInfoProto, bound: int | None
) -> NDArray[np.generic]:
    tensor = value.type.tensor_type
    shape = [d.dim_value for d in tensor.shape.dim]
    if tensor.elem_type == TensorProto.FLOAT:
        return rng.standard_normal(shape, dtype=np.float32)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    if bound is None:
        return np.ones(shape, dtype)
    return rng.integers(0, bound, shape).astype(dtype)


def _index_bounds(model: onnx.ModelProto) -> dict[str, int]:
    rows = {tensor.name: tensor.dims[0] for tensor in model.graph.initializer if tensor.dims}
    return {
        node.input[1]: rows[node.input[0]]
        for node in model.graph.node
        if node.op_type == "Gather" and node.input[0] in rows
    }
