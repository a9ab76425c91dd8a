"""Values of several images whose points lie as those of one."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from sparsegraph import verify
from sparsegraph.capture import capture
from sparsegraph.compile import Compiled, compile, load

RNG = np.random.default_rng(5)
C = 12


def model(nodes: list[onnx.NodeProto], shape: tuple[int, ...], **constants: np.ndarray) -> Compiled:
    """Compile without its own check, so that a wrong result reaches the test; compare."""
    graph = helper.make_graph(
        nodes, "points", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )  # fmt: skip
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    compiled = compile(proto, check=False, fallback=False)
    feeds = {"x": RNG.standard_normal(shape).astype(np.float32)}
    (y,) = compiled.run(None, feeds)
    assert verify.compare({"y": y}, verify.run_onnx(load(proto), feeds)) <= 1e-5
    return compiled


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


READERS = {
    "pointwise": helper.make_node("Conv", ["b", "k1"], ["y"]),
    "convolution": helper.make_node("Conv", ["b", "k3"], ["y"], pads=[1, 1, 1, 1]),
    "depthwise": helper.make_node("Conv", ["b", "d3"], ["y"], pads=[1, 1, 1, 1], group=C),
    "transposed": helper.make_node("ConvTranspose", ["b", "k2"], ["y"], strides=[2, 2]),
    "depth to space": helper.make_node("DepthToSpace", ["b"], ["y"], blocksize=2),
    "resize": helper.make_node("Resize", ["b", "", "scales"], ["y"]),
    "pool": helper.make_node("MaxPool", ["b"], ["y"], kernel_shape=[1, 1]),
    "global pool": helper.make_node("GlobalAveragePool", ["b"], ["y"]),
    "norm": helper.make_node("InstanceNormalization", ["b", "one", "one"], ["y"], epsilon=1.0),
}


@pytest.mark.parametrize("images", [1, 17])
@pytest.mark.parametrize("reader", READERS)
def test_rows_of_a_product_become_maps_of_one_pixel(reader: str, images: int) -> None:
    """The product has `images` points of one image, the reader one point of `images` images."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Reshape", ["a", "sizes"], ["b"]),
        READERS[reader],
    ]
    constants = {
        "w": normal(C, C), "k1": normal(8, C, 1, 1), "k3": normal(8, C, 3, 3),
        "d3": normal(C, 1, 3, 3), "k2": normal(C, 8, 2, 2), "one": np.ones(C, np.float32),
        "scales": np.array([1, 1, 2, 2], np.float32), "sizes": np.array([images, C, 1, 1]),
    }  # fmt: skip
    used = {name for node in nodes for name in node.input}
    model(nodes, (images, C), **{k: v for k, v in constants.items() if k in used})


@pytest.mark.parametrize("size", [1, 3])
def test_few_tokens_of_many_images_become_a_line(size: int) -> None:
    """[5, 4, C] has 20 points in the product, [5, C, 4] 5 images in the convolution."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Add", ["a", "x"], ["s"]),
        helper.make_node("Transpose", ["s"], ["b"], perm=[0, 2, 1]),
        helper.make_node("Conv", ["b", "k"], ["y"], pads=[size // 2, size // 2]),
    ]
    compiled = model(nodes, (5, 4, C), w=normal(C, C), k=normal(8, C, size))
    (segment,) = compiled.session.manifest["segments"]
    assert any("20 points" in step["detail"] for step in segment["steps"])


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(("batch", "tokens"), [(2, 20), (6, 5), (3, 1), (17, 16)])
def test_encoders_in_both_orders(batch: int, tokens: int, batch_first: bool) -> None:
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=batch_first)
    module = torch.nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    x = torch.randn(batch, tokens, 16) if batch_first else torch.randn(tokens, batch, 16)
    compiled = compile(capture(module, (x,)), check=False, fallback=False)
    with torch.no_grad():
        expected = module(x).numpy()
    (y,) = compiled.run(None, {compiled.session.get_inputs()[0].name: x.numpy()})
    assert verify.compare({"y": y}, {"y": expected}) <= 1e-5
