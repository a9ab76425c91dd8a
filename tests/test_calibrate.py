import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparsegraph.calibrate import Moments, Products, Rows, Stream, kept_rows, statistics
from sparsegraph.errors import UsageError


def chain() -> ir.Model:
    """x -> a -> (b, skip) -> y, so that a value stays alive across a cut."""
    weights = {f"w{i}": np.random.default_rng(i).normal(size=(4, 4)) for i in range(3)}
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["a"], "first"),
        helper.make_node("Relu", ["a"], ["b"], "relu"),
        helper.make_node("MatMul", ["b", "w1"], ["c"], "second"),
        helper.make_node("Add", ["c", "a"], ["d"], "skip"),
        helper.make_node("MatMul", ["d", "w2"], ["y"], "third"),
    ]
    shape = [2, 4]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(w.astype(np.float32), k) for k, w in weights.items()],
    )
    return ir.from_proto(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    )


def feeds(n: int = 5) -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(3)
    return [{"x": generator.normal(size=(2, 4)).astype(np.float32)} for _ in range(n)]


def test_statistics_are_the_moments_of_the_rows() -> None:
    model = chain()
    found = statistics(model, feeds(), {"x": Rows(), "b": Rows()})
    x = np.concatenate([f["x"] for f in feeds()]).astype(np.float64)
    np.testing.assert_allclose(found["x"].second[0], x.T @ x, rtol=1e-5)
    np.testing.assert_allclose(found["x"].mean[0], x.mean(axis=0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found["x"].norm[0], np.sqrt((x**2).mean(axis=0)), rtol=1e-5)
    w = model.graph.initializers["w0"].const_value.numpy()
    b = np.maximum(x @ w, 0)
    np.testing.assert_allclose(found["b"].second[0], b.T @ b, rtol=1e-4)
    assert found["b"].n == 10


def test_tapping_leaves_the_model_as_it_was() -> None:
    model = chain()
    statistics(model, feeds(1), {"b": Rows()})
    assert [v.name for v in model.graph.outputs] == ["y"]


def test_unknown_tap_is_named() -> None:
    with pytest.raises(UsageError, match="tap 'nowhere'"):
        statistics(chain(), feeds(1), {"nowhere": Rows()})


def test_progress_counts_feeds() -> None:
    seen = []
    statistics(chain(), feeds(3), {"b": Rows()}, progress=lambda *done: seen.append(done))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_padding_rows_are_left_out() -> None:
    x = np.arange(12, dtype=np.float32).reshape(1, 3, 4)
    keep = kept_rows({"attention_mask": np.array([[1, 0, 1]])}, "attention_mask")
    assert Rows().of(x, keep)[:, 0].tolist() == [x[0, 0].tolist(), x[0, 2].tolist()]
    assert kept_rows({"x": x}, "attention_mask") is None
    assert Rows().of(x[0], keep).shape == (3, 1, 4), "a mask of another shape must not apply"


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"strides": [2, 1], "pads": [1, 0, 2, 1]},
        {"dilations": [2, 2], "pads": [2, 2, 2, 2]},
        {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
        {"auto_pad": "SAME_LOWER"},
        {"auto_pad": "VALID"},
    ],
)
def test_patches_times_weight_is_the_convolution(attributes: dict, group: int) -> None:
    from sparsegraph.layers import weighted

    generator = np.random.default_rng(5)
    w = generator.normal(size=(6, 4 // group, 3, 2)).astype(np.float32)
    x = generator.normal(size=(2, 4, 9, 8)).astype(np.float32)
    node = helper.make_node("Conv", ["x", "w"], ["y"], "conv", group=group, **attributes)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(w, "w")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    (layer,) = weighted(ir.from_proto(proto))
    rows = layer.rows().of(x)
    found = np.einsum("ngk,gok->ngo", rows, layer.product()).reshape(len(rows), 6)

    import onnxruntime as ort

    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    want = np.moveaxis(session.run(None, {"x": x})[0], 1, -1).reshape(-1, 6)
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)


def test_wide_inputs_keep_norms_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsegraph.calibrate.LARGEST_MOMENT_BYTES", 100)
    moments = Moments()
    moments.add(np.ones((3, 1, 4), np.float32))
    assert moments.second is None
    assert moments.norm.tolist() == [[1.0] * 4]


def test_products_pair_rows() -> None:
    generator = np.random.default_rng(2)
    left, right = (generator.normal(size=(7, 2, k)).astype(np.float32) for k in (3, 5))
    pairs = Products()
    pairs.add(left[:4], right[:4])
    pairs.add(left[4:], right[4:])
    np.testing.assert_allclose(pairs.product, np.einsum("nga,ngb->gab", left, right), rtol=1e-4)
    np.testing.assert_allclose(pairs.total, left.sum(axis=0), rtol=1e-4, atol=1e-6)


def test_stream_gives_what_a_whole_run_gives() -> None:
    model = chain()
    values = {v.name: v for node in model.graph for v in node.outputs}
    stream = Stream(model, feeds())
    taps = statistics(model, feeds(), {"d": Rows()})
    for name in ("a", "b", "d"):
        stream.advance(values[name])
    d = np.concatenate([stream.value(i, values["d"]) for i in range(5)]).astype(np.float64)
    np.testing.assert_allclose(d.T @ d, taps["d"].second[0], rtol=1e-4)


def test_stream_sees_weights_changed_behind_it() -> None:
    model = chain()
    values = {v.name: v for node in model.graph for v in node.outputs}
    stream = Stream(model, feeds(1))
    stream.advance(values["b"])
    zeros = np.zeros((4, 4), np.float32)
    model.graph.initializers["w1"].const_value = ir.tensor(zeros, name="w1")
    a = stream.value(0, values["a"])
    stream.advance(values["d"])
    np.testing.assert_array_equal(stream.value(0, values["d"]), a)
