"""One artefact for several shapes: each gives the outputs of ONNX Runtime; weights are shared."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparsegraph import options, verify
from sparsegraph.capture import load
from sparsegraph.compile import Compiled, compile
from sparsegraph.errors import UsageError

WIDTH = 40


def model() -> onnx.ModelProto:
    """Linear, a softmax over the rows, linear; any number of rows. `top` runs in ONNX Runtime."""
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((WIDTH, 2 * WIDTH)) * (rng.random((WIDTH, 2 * WIDTH)) < 0.2)) / 3
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="linear"),
        helper.make_node("Softmax", ["h"], ["y"], axis=-2, name="softmax"),
        helper.make_node("TopK", ["y", "k"], ["top", "at"], axis=-1, name="top"),
    ]
    batch, rows = "batch", "rows"
    graph = helper.make_graph(
        nodes, "rows",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (batch, rows, WIDTH))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (batch, rows, 2 * WIDTH)),
         helper.make_tensor_value_info("top", TensorProto.FLOAT, (batch, rows, 3))],
        [numpy_helper.from_array(weight.astype(np.float32), "w"),
         numpy_helper.from_array(np.array([3]), "k")],
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    made.ir_version = 9
    return made


SHAPES = [{"batch": 1, "rows": 8}, {"batch": 1, "rows": 50}, {"batch": 3, "rows": 8}]


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    return compile(model(), shapes=SHAPES, keep_native=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_variant_equals_onnxruntime(compiled: Compiled, shape: dict[str, int]) -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((shape["batch"], shape["rows"], WIDTH)).astype(np.float32)
    expected = verify.Session(load(model(), shape)).run({"x": x})
    found = dict(zip(expected, compiled.run(list(expected), {"x": x})))
    for name, array in expected.items():
        assert found[name].shape == array.shape
        np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-6)
    assert compiled.session is not None
    assert len(compiled.session.profile({"x": x})) > 1


def test_interface_leaves_open_what_differs(compiled: Compiled) -> None:
    assert compiled.session is not None
    assert [i.shape for i in compiled.session.get_inputs()] == [[None, None, WIDTH]]
    assert [o.shape for o in compiled.session.get_outputs()][1] == [None, None, 3]


def test_another_shape_is_refused_and_the_known_ones_are_named(compiled: Compiled) -> None:
    with pytest.raises(UsageError, match=r"\(2, 8, 40\).*\(1, 8, 40\).*\(1, 50, 40\)"):
        compiled.run(None, {"x": np.zeros((2, 8, WIDTH), np.float32)})


def test_every_variant_is_verified(compiled: Compiled) -> None:
    alone = compile(model(), shapes=SHAPES[0], keep_native=True)
    assert compiled.manifest.verification["feeds"] == 3 * alone.manifest.verification["feeds"]


def test_equal_weights_are_stored_once(tmp_path: Path) -> None:
    twice = [{"batch": 1, "rows": 32}, {"batch": 2, "rows": 32}]
    one = compile(model(), shapes=twice[0], keep_native=True, check=False)
    both = compile(model(), shapes=twice, keep_native=True, check=False)
    assert both.weight_bytes == one.weight_bytes


def test_command_line_takes_lists_of_extents() -> None:
    found = options.variants(["x=1,2"], ["batch=1", "rows=8,16"])
    assert found == [{"x": (1, 2), "batch": 1, "rows": 8}, {"x": (1, 2), "batch": 1, "rows": 16}]
    assert options.variants([], []) == [{}]
