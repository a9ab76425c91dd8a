"""Pointwise products inside the depthwise convolution that reads them, against ONNX Runtime."""

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from sparsegraph import verify
from sparsegraph.compile import Compiled, compile, load

K, ROWS = 6, 20
# name: (density, attributes of the depthwise convolution, what else happens)
CASES = {
    "fused": (0.2, {"pads": [1] * 4}, ""),
    "fused_strided": (0.2, {"pads": [0, 0, 1, 1], "strides": [2, 2]}, ""),
    "fused_empty": (0.0, {"pads": [1] * 4}, ""),
    "fused_wide": (1.0, {"pads": [2] * 4, "dilations": [2, 2]}, ""),
    "fused_bias": (0.2, {"pads": [1] * 4}, "bias"),
    "own_two_readers": (0.2, {"pads": [1] * 4}, "reader"),
    "own_output": (0.2, {"pads": [1] * 4}, "output"),
    "own_stride": (0.2, {"pads": [1] * 4, "strides": [1, 3]}, ""),
    "own_multiplier": (0.2, {"pads": [1] * 4}, "multiplier"),
}


def model(size: tuple[int, int] = (19, 26)) -> ModelProto:
    """Every case as a branch from one input: Conv 1x1, Clip, Conv 3x3 depthwise."""
    rng = np.random.default_rng(0)
    nodes, constants, outputs = [], [], []

    def constant(name: str, array: np.ndarray) -> str:
        constants.append(numpy_helper.from_array(array.astype("f4"), name))
        return name

    low, high = constant("low", np.float32(0)), constant("high", np.float32(6))
    for name, (density, attributes, what) in CASES.items():
        weight = rng.standard_normal((ROWS, K, 1, 1))
        weight[rng.random(weight.shape) >= density] = 0
        inputs = ["x", constant(f"{name}.w", weight), constant(f"{name}.b", rng.random(ROWS))]
        nodes.append(helper.make_node("Conv", inputs, [f"{name}.e"], name=f"{name}.expand"))
        wide = f"{name}.e"
        if what == "bias":
            vector = constant(f"{name}.v", rng.random((ROWS, 1, 1)))
            nodes.append(helper.make_node("Add", [wide, vector], [f"{name}.a"]))
            wide = f"{name}.a"
        nodes.append(helper.make_node("Clip", [wide, low, high], [f"{name}.c"]))
        n = 2 * ROWS if what == "multiplier" else ROWS
        depthwise = constant(f"{name}.d", rng.standard_normal((n, 1, 3, 3)))
        read = [f"{name}.c", depthwise]
        nodes.append(helper.make_node("Conv", read, [name], group=ROWS, **attributes))
        outputs.append(name)
        if what == "reader":
            nodes.append(helper.make_node("Neg", [f"{name}.c"], [f"{name}.n"]))
            outputs.append(f"{name}.n")
        if what == "output":
            outputs.append(f"{name}.c")
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, (2, K, *size))
    infos = [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in outputs]
    graph = helper.make_graph(nodes, "g", [x], infos, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    return compile(model(), check=False, fallback=False)


def test_equals_onnx_runtime(compiled: Compiled) -> None:
    feeds = {"x": np.random.default_rng(1).standard_normal((2, K, 19, 26)).astype("f4")}
    expected = verify.run_onnx(load(model()), feeds)
    names = [o.name for o in compiled.session.get_outputs()]
    got = dict(zip(names, compiled.run(None, feeds)))
    assert got.keys() == expected.keys()
    assert verify.compare(got, expected) <= 1e-5


def test_what_is_fused(compiled: Compiled) -> None:
    formats = {layer["node"]: layer["format"] for layer in compiled.manifest.layers}
    for name, (density, _, what) in CASES.items():
        if what == "bias" or density == 1:  # a pass gives the node another name; "dense" either way
            continue
        assert (formats[f"{name}.expand"] == "csr") == name.startswith("fused"), name
