"""Pools, resizes and transposed convolutions run natively and agree with ONNX Runtime."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from sparsegraph.compile import compile

POOLS: list[tuple[str, tuple[int, ...], dict[str, Any]]] = [
    ("MaxPool", (1, 3, 30, 30), {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1] * 4}),
    ("MaxPool", (2, 5, 9, 13), {"kernel_shape": [2, 3], "strides": [3, 1]}),
    ("MaxPool", (1, 4, 20, 20), {"kernel_shape": [5, 5], "pads": [2] * 4}),
    ("MaxPool", (1, 2, 17, 15), {"kernel_shape": [3, 2], "dilations": [2, 3], "pads": [1] * 4}),
    ("MaxPool", (1, 2, 15, 15), {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}),
    ("MaxPool", (1, 2, 14, 15), {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1,
                                 "pads": [1] * 4}),
    ("MaxPool", (1, 2, 11, 12), {"kernel_shape": [3, 3], "strides": [2, 2],
                                 "auto_pad": "SAME_UPPER"}),
    ("MaxPool", (1, 2, 11, 12), {"kernel_shape": [2, 2], "auto_pad": "SAME_LOWER"}),
    ("MaxPool", (1, 2, 11, 12), {"kernel_shape": [2, 2], "auto_pad": "VALID"}),
    ("MaxPool", (2, 3, 50), {"kernel_shape": [3], "strides": [2]}),
    ("AveragePool", (1, 3, 14, 14), {"kernel_shape": [2, 2], "strides": [2, 2]}),
    ("AveragePool", (1, 3, 13, 9), {"kernel_shape": [3, 3], "pads": [1, 0, 1, 1]}),
    ("AveragePool", (1, 3, 13, 9), {"kernel_shape": [3, 3], "pads": [1] * 4,
                                    "count_include_pad": 1}),
    ("AveragePool", (1, 3, 12, 15), {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1] * 4,
                                     "ceil_mode": 1}),
    ("AveragePool", (1, 3, 12, 15), {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1] * 4,
                                     "ceil_mode": 1, "count_include_pad": 1}),
    ("AveragePool", (1, 3, 12, 15), {"kernel_shape": [12, 15]}),
    ("AveragePool", (1, 2, 11, 12), {"kernel_shape": [3, 3], "strides": [2, 2],
                                     "auto_pad": "SAME_LOWER"}),
    ("AveragePool", (2, 3, 50), {"kernel_shape": [4], "strides": [4]}),
    ("GlobalAveragePool", (2, 7, 9, 11), {}),
    ("GlobalMaxPool", (1, 5, 7, 7), {}),
    ("GlobalAveragePool", (1, 5, 77), {}),
]  # fmt: skip


def model(
    nodes: Sequence[Any], shape: Sequence[int], constants: dict[str, np.ndarray], opset: int = 19
) -> ModelProto:
    """A model from `x` to `y`."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    weights = [numpy_helper.from_array(a, name) for name, a in constants.items()]
    graph = helper.make_graph(list(nodes), "test", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def check(
    nodes: Sequence[Any], shape: Sequence[int], constants: dict[str, np.ndarray],
    opset: int = 19, native: bool = True, limit: float = 1e-6,
) -> None:  # fmt: skip
    """Compile, run, compare with ONNX Runtime; `native`: nothing may fall back."""
    proto = model(nodes, shape, constants, opset)
    compiled = compile(proto, check=False)
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    (expected,), (got,) = session.run(None, {"x": x}), compiled.run(None, {"x": x})
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= limit * np.abs(expected).max()
    assert (compiled.fallback_nodes == []) == native


@pytest.mark.parametrize(("op", "shape", "attributes"), POOLS)
def test_pools(op: str, shape: tuple[int, ...], attributes: dict[str, Any]) -> None:
    check([helper.make_node(op, ["x"], ["y"], **attributes)], shape, {})


def test_indices_go_to_onnx_runtime() -> None:
    pool = helper.make_node("MaxPool", ["x"], ["p", "i"], kernel_shape=[2, 2])
    cast = helper.make_node("Cast", ["i"], ["y"], to=TensorProto.FLOAT)
    check([pool, cast], (1, 2, 6, 6), {}, native=False)


def test_window_in_the_padding_goes_to_onnx_runtime() -> None:
    node = helper.make_node("AveragePool", ["x"], ["y"], kernel_shape=[1, 1], pads=[0, 0, 0, 0])
    check([node], (1, 2, 6, 6), {})
    three = helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[2, 2, 2])
    check([three], (1, 2, 4, 4, 4), {}, native=False)


@pytest.mark.parametrize("op", ["ReduceMean", "ReduceMax", "ReduceSum", "ReduceMin"])
@pytest.mark.parametrize("keepdims", [0, 1])
def test_reductions_of_maps(op: str, keepdims: int) -> None:
    weight = np.random.default_rng(1).standard_normal((6, 3, 3, 3)).astype(np.float32)
    conv = helper.make_node("Conv", ["x", "w"], ["c"], pads=[1] * 4)
    if op == "ReduceSum":
        reduce = helper.make_node(op, ["c", "axes"], ["y"], keepdims=keepdims)
        constants = {"w": weight, "axes": np.array([2, 3])}
    else:
        reduce = helper.make_node(op, ["c"], ["y"], axes=[-2, -1], keepdims=keepdims)
        constants = {"w": weight}
    check([conv, reduce], (2, 3, 9, 7), constants, opset=13)


def test_pool_between_convolutions_and_concat() -> None:
    """The block of SPPF: pools of pools, concatenated as slices of one value."""
    random = np.random.default_rng(2)
    weights = {
        "w": random.standard_normal((8, 4, 1, 1)).astype(np.float32),
        "v": random.standard_normal((6, 24, 1, 1)).astype(np.float32),
    }
    pool = {"kernel_shape": [5, 5], "pads": [2] * 4}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"]),
        helper.make_node("MaxPool", ["a"], ["b"], **pool),
        helper.make_node("MaxPool", ["b"], ["c"], **pool),
        helper.make_node("Concat", ["a", "b", "c"], ["d"], axis=1),
        helper.make_node("Conv", ["d", "v"], ["y"]),
    ]
    check(nodes, (1, 4, 20, 20), weights, limit=1e-5)
