"""What lowering does not know, of newer opsets or types, is never ignored: the node is not ours."""

from pathlib import Path

import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from sparsegraph.compile import compile
from sparsegraph.errors import UnsupportedError
from sparsegraph.lower.partition import _all_known
from sparsegraph.lower.table import HANDLERS

SHAPE = (1, 2, 8, 4)


def attention(**attributes: int) -> onnx.ModelProto:
    """Opset 25 brought windows of neighbouring keys."""
    given = [helper.make_tensor_value_info(n, TensorProto.FLOAT, SHAPE) for n in "qkv"]
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, SHAPE)
    node = helper.make_node("Attention", list("qkv"), ["y"], "look", **attributes)
    graph = helper.make_graph([node], "g", given, [out])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 25)], ir_version=10)


def test_a_window_of_attention_is_no_attention_of_all_keys(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"look.*left_window_size of Attention came after"):
        compile(attention(left_window_size=2), "c11", output=tmp_path / "m.sg", check=False)
    compile(attention(is_causal=1), "c11", output=tmp_path / "m.sg", check=False)


def test_what_onnx_runtime_cannot_load_either_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no such\nattribute")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    model, path = attention(left_window_size=2), tmp_path / "m.sg"
    with pytest.raises(UnsupportedError, match=r"left_window_size.*Fix: ") as caught:
        compile(model, output=path, check=False, keep_native=True)
    assert "found no such attribute, need" in str(caught.value)


def test_every_handler_is_of_an_operator_that_onnx_has() -> None:
    assert all(_all_known()[op_type][1] > 0 for op_type in HANDLERS)


def test_reductions_of_truth_values_are_left_to_onnx_runtime() -> None:
    given = helper.make_tensor_value_info("x", TensorProto.BOOL, (4, 2))
    out = helper.make_tensor_value_info("y", TensorProto.BOOL, (4, 1))
    axes = helper.make_node("Constant", [], ["axes"], value_ints=[1])
    node = helper.make_node("ReduceMax", ["x", "axes"], ["y"])
    graph = helper.make_graph([axes, node], "g", [given], [out])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    (segment,) = compile(model, keep_native=True, check=False).manifest.segments
    assert "Max of truth values" in segment.reason
