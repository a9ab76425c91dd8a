"""Pools, resizes and transposed convolutions run natively and agree with ONNX Runtime.

All cases of one opset are compiled as one model with an input and an output per case.
"""

from collections.abc import Mapping
from itertools import product
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from sparsegraph.compile import Compiled, compile

Arrays = dict[str, np.ndarray]


class Case(NamedTuple):
    """Nodes from `x` to `y` and the constants that they read."""

    nodes: list[NodeProto]
    shape: tuple[int, ...]
    constants: Mapping[str, np.ndarray] = MappingProxyType({})
    opset: int = 19
    is_native: bool = True


def pool(op: str, shape: tuple[int, ...], **attributes: Any) -> Case:
    return Case([helper.make_node(op, ["x"], ["y"], **attributes)], shape)


ONES = [1, 1, 1, 1]
POOLS = [
    pool("MaxPool", (1, 3, 30, 30), kernel_shape=[3, 3], strides=[2, 2], pads=ONES),
    pool("MaxPool", (2, 5, 9, 13), kernel_shape=[2, 3], strides=[3, 1]),
    pool("MaxPool", (2, 5, 9, 23), kernel_shape=[2, 3], strides=[1, 3]),
    pool("MaxPool", (1, 4, 20, 20), kernel_shape=[5, 5], pads=[2] * 4),
    pool("MaxPool", (1, 2, 17, 15), kernel_shape=[3, 2], dilations=[2, 3], pads=ONES),
    pool("MaxPool", (1, 2, 15, 15), kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    pool("MaxPool", (1, 2, 14, 15), kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1, pads=ONES),
    pool("MaxPool", (1, 2, 11, 12), kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER"),
    pool("MaxPool", (1, 2, 11, 12), kernel_shape=[2, 2], auto_pad="SAME_LOWER"),
    pool("MaxPool", (1, 2, 11, 12), kernel_shape=[2, 2], auto_pad="VALID"),
    pool("MaxPool", (2, 3, 50), kernel_shape=[3], strides=[2]),
    pool("AveragePool", (1, 3, 14, 14), kernel_shape=[2, 2], strides=[2, 2]),
    pool("AveragePool", (1, 3, 13, 9), kernel_shape=[3, 3], pads=[1, 0, 1, 1]),
    pool("AveragePool", (1, 3, 13, 9), kernel_shape=[3, 3], pads=ONES, count_include_pad=1),
    *(
        pool("AveragePool", (1, 3, 12, 15), kernel_shape=[3, 3], strides=[2, 2], pads=ONES,
             ceil_mode=1, count_include_pad=counts)
        for counts in (0, 1)
    ),
    pool("AveragePool", (1, 3, 12, 15), kernel_shape=[12, 15]),
    pool("AveragePool", (1, 2, 11, 12), kernel_shape=[3, 3], strides=[2, 2],
         auto_pad="SAME_LOWER"),
    pool("AveragePool", (2, 3, 50), kernel_shape=[4], strides=[4]),
    pool("GlobalAveragePool", (2, 7, 9, 11)),
    pool("GlobalMaxPool", (1, 5, 7, 7)),
    pool("GlobalAveragePool", (1, 5, 77)),
    pool("MaxPool", (1, 2, 4, 4, 4), kernel_shape=[2, 2, 2]),
]  # fmt: skip


def indices() -> Case:
    """A MaxPool whose second output is read."""
    first = helper.make_node("MaxPool", ["x"], ["p", "i"], kernel_shape=[2, 2])
    cast = helper.make_node("Cast", ["i"], ["y"], to=TensorProto.FLOAT)
    return Case([first, cast], (1, 2, 6, 6), is_native=False)


def resize(
    shape: tuple[int, ...], scales: list[float] | None = None, sizes: list[int] | None = None,
    opset: int = 19, **attributes: Any,
) -> Case:  # fmt: skip
    constants: Arrays = {}
    if scales is not None:
        constants["scales"] = np.array(scales, np.float32)
    else:
        constants["sizes"] = np.array(sizes, np.int64)
    inputs = ["x", "", *constants] if scales is not None else ["x", "", "", *constants]
    if opset == 11:  # the region of interest may not be left out
        constants, inputs = {"roi": np.zeros(0, np.float32), **constants}, ["x", "roi", "scales"]
    elif opset < 11:
        inputs = ["x", "scales"]
    op = "Upsample" if opset < 10 else "Resize"
    return Case([helper.make_node(op, inputs, ["y"], **attributes)], shape, constants, opset)


COORDINATES = ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel",
               "half_pixel_symmetric")  # fmt: skip
ROUNDINGS = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
MAP = (2, 3, 7, 10)
RESIZES = [
    *(
        resize(MAP, sizes=[2, 3, *out], mode="nearest", coordinate_transformation_mode=c,
               nearest_mode=r)._replace(is_native=c != "half_pixel_symmetric")
        for c, r, out in product(COORDINATES, ROUNDINGS, ([14, 20], [11, 27], [4, 3]))
    ),
    *(
        resize(MAP, sizes=[2, 3, *out], mode="linear", coordinate_transformation_mode=c)
        for c, out in product(COORDINATES, ([14, 20], [11, 27], [4, 3], [7, 20], [14, 1]))
    ),
    resize((1, 2, 20, 20), scales=[1, 1, 2, 2], mode="nearest",
           coordinate_transformation_mode="asymmetric", nearest_mode="floor"),
    resize((1, 2, 20, 20), scales=[1, 1, 1.7, 0.6], mode="linear"),
    resize((1, 2, 20, 20), scales=[1, 1, 1.25, 2.4], mode="nearest"),
    resize((1, 2, 9, 8), scales=[2, 3], axes=[2, 3], mode="linear"),
    resize((1, 2, 9, 8), scales=[1, 1, 2, 2], opset=11, mode="nearest",
           coordinate_transformation_mode="tf_half_pixel_for_nn"),
    resize((1, 2, 9, 8), scales=[1, 1, 2, 3], opset=10, mode="nearest"),
    resize((1, 2, 9, 8), scales=[1, 1, 2, 3], opset=10, mode="linear"),
    resize((1, 2, 9, 8), scales=[1, 1, 2, 2], opset=9, mode="nearest"),
    resize((1, 2, 9, 8), scales=[1, 1, 2, 2], opset=9, mode="linear"),
    resize((1, 2, 9, 8), scales=[1, 1, 2, 2], mode="cubic"),
    resize((1, 2, 9, 8), scales=[1, 1, 0.5, 0.5], mode="linear", antialias=1),
    resize((1, 2, 9, 8), scales=[1, 2, 2, 2], mode="nearest")._replace(is_native=False),
    resize((1, 2, 9), scales=[1, 1, 2], mode="nearest")._replace(is_native=False),
]  # fmt: skip


def transposed(
    kernel: tuple[int, int], *, bias: bool = True, native: bool = True, **attributes: Any
) -> Case:
    weight = np.random.default_rng(1).standard_normal((6, 5, *kernel)).astype(np.float32)
    constants = {"w": weight}
    if bias:
        constants["b"] = np.arange(5, dtype=np.float32)
    node = helper.make_node("ConvTranspose", ["x", *constants], ["y"], **attributes)
    return Case([node], (2, 6, 7, 11), constants, is_native=native)


TRANSPOSED = [
    transposed((2, 2), strides=[2, 2]),
    transposed((2, 2), bias=False, strides=[2, 2]),
    transposed((3, 4), strides=[3, 4]),
    transposed((1, 1)),
    transposed((3, 3), strides=[2, 2]),
    transposed((2, 2), strides=[2, 2], pads=ONES),
    transposed((2, 2), strides=[2, 2], output_padding=[1, 1]),
    transposed((4, 4), strides=[2, 2], pads=ONES),
    transposed((3, 3), strides=[2, 2], pads=ONES, output_padding=[1, 1]),
    transposed((3, 5), strides=[1, 2], pads=[1, 2, 0, 1]),
    transposed((5, 2), strides=[3, 3], pads=[3, 0, 4, 1]),
    transposed((2, 3), strides=[4, 5], output_padding=[3, 1]),
    transposed((3, 3), strides=[2, 3], dilations=[2, 3], pads=[1, 0, 2, 3]),
    transposed((3, 2), dilations=[3, 2]),
    transposed((3, 3), native=False, strides=[2, 2], output_shape=[14, 22]),
    transposed((3, 3), native=False, strides=[2, 2], auto_pad="SAME_UPPER"),
    transposed((3, 9), strides=[2, 9]),
    transposed((1, 40), strides=[1, 40]),
    transposed((1, 65), native=False, strides=[1, 65]),
    Case(
        [helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[2], pads=[1, 1])],
        (2, 3, 13), {"w": np.random.default_rng(4).standard_normal((3, 4, 4)).astype(np.float32)},
    ),
]  # fmt: skip


def after_convolution(nodes: list[NodeProto], **constants: np.ndarray) -> Case:
    """Nodes that read the feature-major result `c` of a convolution."""
    weight = np.random.default_rng(2).standard_normal((8, 3, 3, 3)).astype(np.float32)
    conv = helper.make_node("Conv", ["x", "w"], ["c"], pads=ONES)
    return Case([conv, *nodes], (2, 3, 9, 7), {"w": weight, **constants}, opset=13)


POOL5 = {"kernel_shape": [5, 5], "pads": [2] * 4}
FEATURES = [
    *(
        after_convolution([helper.make_node(op, ["c"], ["y"], axes=[-2, -1], keepdims=keep)])
        for op, keep in product(("ReduceMean", "ReduceMax", "ReduceMin"), (0, 1))
    ),
    *(
        after_convolution([helper.make_node("ReduceMean", ["c"], ["y"], axes=axes)])
        for axes in ([1], [0, 2, 3], [2], [1, 2, 3])
    ),
    after_convolution([helper.make_node("ReduceSum", ["c", "axes"], ["y"])], axes=np.array([2, 3])),
    *(
        after_convolution([helper.make_node("DepthToSpace", ["c"], ["y"], blocksize=2, mode=m)])
        for m in ("DCR", "CRD")
    ),
    after_convolution(  # the block of SPPF: pools of pools, slices of one value
        [
            helper.make_node("MaxPool", ["c"], ["d"], **POOL5),
            helper.make_node("MaxPool", ["d"], ["e"], **POOL5),
            helper.make_node("Concat", ["c", "d", "e"], ["f"], axis=1),
            helper.make_node("Conv", ["f", "v"], ["y"]),
        ],
        v=np.random.default_rng(3).standard_normal((6, 24, 1, 1)).astype(np.float32),
    ),
]
CASES = [*POOLS, indices(), *RESIZES, *TRANSPOSED, *FEATURES]


def joined(opset: int) -> ModelProto:
    """Every case of one opset, its names with the case's number in front."""
    nodes, inputs, outputs, weights = [], [], [], []
    for i, case in enumerate(CASES):
        if case.opset != opset:
            continue
        for k, node in enumerate(case.nodes):
            names = [[f"{i}.{n}" if n else "" for n in side] for side in (node.input, node.output)]
            copy = NodeProto()
            copy.CopyFrom(node)
            copy.name = f"{i}.{k}"
            copy.ClearField("input")
            copy.ClearField("output")
            copy.input.extend(names[0])
            copy.output.extend(names[1])
            nodes.append(copy)
        inputs.append(helper.make_tensor_value_info(f"{i}.x", TensorProto.FLOAT, case.shape))
        outputs.append(helper.make_tensor_value_info(f"{i}.y", TensorProto.FLOAT, None))
        weights += [numpy_helper.from_array(a, f"{i}.{n}") for n, a in case.constants.items()]
    graph = helper.make_graph(nodes, "cases", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


class Result(NamedTuple):
    compiled: Compiled
    expected: Arrays
    got: Arrays


@pytest.fixture(scope="module")
def results() -> dict[int, Result]:
    """Compiled model, ONNX Runtime's outputs and ours, by opset."""
    random, found = np.random.default_rng(0), {}
    for opset in sorted({c.opset for c in CASES}):
        proto = joined(opset)
        names = [o.name for o in proto.graph.output]
        feeds = {
            f"{i}.x": random.standard_normal(c.shape).astype(np.float32)
            for i, c in enumerate(CASES)
            if c.opset == opset
        }
        session = onnxruntime.InferenceSession(proto.SerializeToString())
        compiled = compile(proto, check=False, keep_native=True)
        outputs = (session.run(names, feeds), compiled.run(names, feeds))
        found[opset] = Result(compiled, *(dict(zip(names, o)) for o in outputs))
    return found


@pytest.mark.parametrize("number", range(len(CASES)))
def test_case(results: dict[int, Result], number: int) -> None:
    case = CASES[number]
    compiled, expected, got = results[case.opset]
    y, reference = got[f"{number}.y"], expected[f"{number}.y"]
    assert y.shape == reference.shape
    limit = 1e-5 * max(1.0, np.abs(reference).max())  # products and means of at most 1,200 terms
    assert np.abs(y - reference).max() <= limit, case
    fallen = {int(name.split(".")[0]) for name in compiled.fallback_nodes}
    assert (number not in fallen) == case.is_native, case
