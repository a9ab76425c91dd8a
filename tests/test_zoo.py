"""The zoo's models: published sizes, finite outputs of order one, deterministic weights."""

import numpy as np
import onnx
import onnxruntime
import pytest

from benchmarks import zoo

PUBLISHED = {
    # name: (parameters, multiply-accumulates in millions)
    "gemm": (768 * 3072 + 3072, 384 * 768 * 3072 / 1e6),
    "conv": (256 * 256 * 9 + 256, 14 * 14 * 256 * 256 * 9 / 1e6),
    "resnet18": (11_689_512, 1814),
    "resnet50": (25_557_032, 4089),
    "mobilenet_v1": (4_231_976, 569),
    "mobilenet_v2": (3_504_872, 301),
    "efficientnet_lite0": (4_652_008, 385),
    "yolov8n": (3_151_904, 4350),
    # BERT's pooler (147,840 of the published 22,713,216) is not part of a sentence encoder
    "minilm": (22_713_216 - 147_840, 1434),
    "deit_tiny": (5_717_416, 1254),
    "deit_small": (22_050_664, 4599),
    "digits_cnn": (38_330, 0.3375),
}


@pytest.fixture(scope="module", params=zoo.names())
def model(request: pytest.FixtureRequest) -> tuple[str, onnx.ModelProto]:
    return request.param, zoo.build(request.param)


def run(proto: onnx.ModelProto, feeds: zoo.Feeds) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, feeds)


def test_every_model_has_published_figures() -> None:
    assert set(PUBLISHED) == set(zoo.names())


def test_parameters_equal_the_published_count(model: tuple[str, onnx.ModelProto]) -> None:
    name, proto = model
    assert zoo.parameters(proto) == PUBLISHED[name][0]


def test_macs_equal_the_published_count(model: tuple[str, onnx.ModelProto]) -> None:
    name, proto = model
    assert zoo.macs(proto) / 1e6 == pytest.approx(PUBLISHED[name][1], rel=0.01)


def test_outputs_are_finite_and_of_order_one(model: tuple[str, onnx.ModelProto]) -> None:
    name, proto = model
    outputs = run(proto, zoo.feeds(proto))
    assert [o.name for o in proto.graph.output]
    for output in outputs:
        values = output[:, 4:] if name == "yolov8n" else output  # boxes are in pixels
        assert np.isfinite(output).all()
        assert 0.05 < values.std() < 10, (name, values.std())


def test_same_seed_gives_the_same_bytes_and_another_seed_does_not() -> None:
    first = zoo.build("digits_cnn", seed=3).SerializeToString()
    assert zoo.build("digits_cnn", seed=3).SerializeToString() == first
    assert zoo.build("digits_cnn", seed=4).SerializeToString() != first


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "efficientnet_lite0", "yolov8n"])
def test_image_models_take_other_sizes_and_batches(name: str) -> None:
    proto = zoo.build(name, size=64, batch=2)
    (output,) = run(proto, zoo.feeds(proto))
    assert output.shape[0] == 2
    assert np.isfinite(output).all()


def test_deit_runs_in_batches() -> None:
    proto = zoo.build("deit_tiny", size=64, batch=2)
    (output,) = run(proto, zoo.feeds(proto))
    assert output.shape == (2, 1000)
    assert not np.allclose(output[0], output[1])


def test_minilm_mask_hides_padding() -> None:
    proto = zoo.build("minilm", sequence=16, layers=2)
    feed = zoo.feeds(proto)
    feed["attention_mask"][:, 8:] = 0
    changed = dict(feed, input_ids=feed["input_ids"].copy())
    changed["input_ids"][:, 8:] = 7
    (a,), (b,) = run(proto, feed), run(proto, changed)
    np.testing.assert_allclose(a[:, :8], b[:, :8], atol=1e-5)
    assert not np.allclose(a[:, 8:], b[:, 8:])


def test_minilm_without_token_types_has_two_inputs() -> None:
    proto = zoo.build("minilm", sequence=8, layers=1, token_types=False)
    assert [i.name for i in proto.graph.input] == ["input_ids", "attention_mask"]


def test_batch_normalisation_stays_where_exports_have_it() -> None:
    ops = [n.op_type for n in zoo.build("resnet50").graph.node]
    assert ops.count("Conv") == 53
    assert ops.count("BatchNormalization") == 53


def test_weight_names_are_those_of_checkpoints() -> None:
    resnet = {t.name for t in zoo.build("resnet50").graph.initializer}
    assert "layer1.0.conv2.weight" in resnet
    bert = {t.name for t in zoo.build("minilm").graph.initializer}
    assert "encoder.layer.5.attention.self.query.weight" in bert


def test_unknown_model_is_named_with_the_known_ones() -> None:
    with pytest.raises(KeyError, match=r"no model 'resnet51'.*resnet50"):
        zoo.build("resnet51")
