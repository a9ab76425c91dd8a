"""Learnt masks on heads, neurons, layers and the residual stream; what looks like one stays."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from sparsegraph.passes.remove_dead_channels import RemoveDeadChannels

from benchmarks.zoo import decoder
from sparsegraph.capture import load
from sparsegraph.pipeline import Optimized, optimize, snapping
from sparsegraph.shrink import Shrunk, n_parameters, shrink
from sparsegraph.structure.ties import Policy, analyse
from sparsegraph.verify import Session, compare, feeds_for
from tests.passes.check import Result, parse, run, weight
from tests.structure.learnt import HIDDEN, SIZE, WIDTH, encoder, residual

STEP = RemoveDeadChannels()
BOUND = 1e-5
ATTENTION = 4 * WIDTH * WIDTH + 4 * WIDTH


def optimized(proto: onnx.ModelProto, **options: object) -> tuple[Optimized, float]:
    """The optimised model and its distance from what came in, on a normal feed."""
    model = load(proto)
    done = optimize(model, **options)  # type: ignore[arg-type]
    feed = feeds_for(model, 2)[1]
    return done, compare(Session(done.model).run(feed), Session(model).run(feed))


def shape(done: Optimized | Shrunk, name: str) -> tuple[int, ...]:
    """Of the weight of this name, whatever was folded into it."""
    (value,) = [v for k, v in done.model.graph.initializers.items() if k.startswith(name)]
    return tuple(value.shape.numpy()) if value.shape is not None else ()


def n_lost(where: str) -> int:
    """Parameters that the mask takes away, beside itself."""
    plain = n_parameters(optimize(load(encoder("none"))).model)
    done, error = optimized(encoder(where))
    assert error <= BOUND
    return plain - n_parameters(done.model)


@pytest.mark.parametrize("where", ["head weights", "head outputs", "head features"])
def test_masked_heads_go(where: str) -> None:
    per_head = 4 * SIZE * WIDTH + 3 * SIZE
    assert n_lost(where) == 2 * per_head


def test_attention_is_recognised_once_its_mask_is_gone() -> None:
    done, _ = optimized(encoder("head weights"))
    assert [n.op_type for n in done.model.graph].count("Attention") == 1
    assert not any(n.op_type == "Softmax" for n in done.model.graph)


def test_masked_neurons_go() -> None:
    assert n_lost("neurons") == 20 * (2 * WIDTH + 1)


@pytest.mark.parametrize(
    "where", ["layer", "layer mixed out", "layer below a threshold", "layer chosen"]
)
def test_masked_layers_go(where: str) -> None:
    assert n_lost(where) >= ATTENTION
    done, _ = optimized(encoder(where))
    assert not any(n.op_type in ("Attention", "Softmax", "Where") for n in done.model.graph)


def test_a_layer_that_replaces_its_input_keeps_no_sum() -> None:
    done, error = optimized(encoder("layer mixed in"))
    assert error <= BOUND
    assert [n.op_type for n in done.model.graph].count("Attention") == 1


@pytest.mark.parametrize(
    "where", ["soft gate", "computed gate", "part of a head", "converged gate"]
)
def test_near_misses_stay(where: str) -> None:
    assert n_lost(where) <= 1


def test_a_converged_gate_goes_on_request() -> None:
    model = load(encoder("converged gate"))
    done = optimize(model, passes=snapping(1e-5))
    plain = n_parameters(optimize(load(encoder("none"))).model)
    assert plain - n_parameters(done.model) >= ATTENTION
    (record,) = [r for r in done.records if r.name == "snap_near_zeros"]
    assert record.n_applied >= 1
    assert record.max_rel_error is not None
    assert 0 < record.max_rel_error < 1e-3


@pytest.mark.parametrize("norm", ["none", "rms", "square", "RMS"])
def test_one_mask_on_the_residual_stream(norm: str) -> None:
    done, error = optimized(residual(norm))
    assert error <= BOUND
    assert shape(done, "embed.weight") == (6, WIDTH - 3)
    assert shape(done, "up0.weight") == (WIDTH - 3, HIDDEN)
    assert shape(done, "down1.weight") == (HIDDEN, WIDTH - 3)


def test_a_layer_norm_holds_the_residual_stream() -> None:
    done, error = optimized(residual("layer"))
    assert error <= BOUND
    assert shape(done, "embed.weight") == (6, WIDTH)
    (record,) = [r for r in done.records if r.name == STEP.name]
    assert any("LayerNormalization over the features" in d.reason for d in record.declined)


def test_the_stream_of_a_decoder_with_tied_heads() -> None:
    """Zero features in the embedding and in all that writes to the stream: the width shrinks."""
    proto = decoder.decoder(16, width=64, heads=4, kv_heads=2, vocabulary=200, tied=True)
    dead = [3, 17, 40]
    for tensor in proto.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor).copy()
        if tensor.name == "embedding" or tensor.name.endswith((".o.weight", ".down.weight")):
            array[:, dead] = 0
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    done, error = optimized(proto)
    assert error <= BOUND
    assert shape(done, "layers.1.q.weight") == (61, 64)
    assert shape(done, "embedding") == (200, 61)


RMS = """g (float[1,4,8] x) => (float[1,4,5] y) {
    h = MatMul(x, w)  n = RMSNormalization<axis=-1, epsilon=0.01>(h, scale)  y = MatMul(n, v) }"""


def rms(dead: list[int]) -> Result:
    w = weight(8, 6)
    w[:, dead] = 0
    return run(STEP, RMS, w=w, scale=weight(6), v=weight(6, 5))


def test_a_mean_of_squares_gets_a_factor_for_its_zeros() -> None:
    result = rms([1, 4])
    node = result.node("RMSNormalization")
    assert result.weight("w").shape == (8, 4)
    assert np.allclose(result.weight("scale"), np.delete(weight(6), [1, 4]) * np.sqrt(6 / 4))
    assert node.attributes.get_float("epsilon") == pytest.approx(0.01 * 6 / 4)


def test_a_mean_reads_what_is_not_zero() -> None:
    text = """g (float[1,4,8] x) => (float[1,4,1] m, float[1,4,5] y) {
        h = MatMul(x, w)  s = Sigmoid(h)  m = ReduceMean(s, one)  y = MatMul(s, v) }"""
    w = weight(8, 6)
    w[:, [1, 4]] = 0
    result = run(STEP, text, w=w, one=np.array([2]), v=weight(6, 5))
    assert result.n_applied == 0
    assert "ReduceMean_2: ReduceMean has no bias" in "; ".join(d.reason for d in result.declined)


def test_a_mean_that_is_an_output_keeps_its_name() -> None:
    text = """g (float[1,4,8] x) => (float[1,4,1] m) { h = MatMul(x, w)  m = ReduceMean(h, one) }"""
    w = weight(8, 6)
    w[:, [1, 4]] = 0
    result = run(STEP, text, w=w, one=np.array([2]))
    assert result.ops == ["MatMul", "ReduceMean", "Mul"]
    assert result.weight("w").shape == (8, 4)


@pytest.mark.parametrize(
    ("divisor", "goes"),
    [
        ("d = Sqrt(q)", False),
        ("a = Add(q, eps)  d = Sqrt(a)", True),
        ("a = Add(p, eps)  d = Sqrt(a)", False),
        ("n = ReduceL2(h, last)  d = Max(n, eps)", True),
        ("n = ReduceL2(h, last)  d = Clip(n, eps)", True),
        ("n = ReduceL2(h, last)  d = Identity(n)", False),
        ("e = Exp(p)  d = Add(e, eps)", True),
    ],
)
def test_zero_by_a_divisor_that_may_be_zero(divisor: str, goes: bool) -> None:
    text = f"""g (float[1,4,8] x) => (float[1,4,5] y) {{
        h = MatMul(x, w)  s = Mul(h, h)  q = ReduceMean(s, last)  p = ReduceMean(x, last)
        {divisor}  n2 = Div(h, d)  y = MatMul(n2, v) }}"""
    w = weight(8, 6)
    w[:, [1, 4]] = 0
    given = {"w": w, "last": np.array([2]), "v": weight(6, 5), "eps": np.array(1e-3, np.float32)}
    used = {name: array for name, array in given.items() if name != "eps" or "eps" in divisor}
    assert (run(STEP, text, **used).n_applied > 0) == goes


def test_features_of_a_mean_of_squares_are_cut_on_request() -> None:
    model = load(decoder.decoder(16, width=64, heads=4, kv_heads=2, vocabulary=200))
    strict, loose = shrink(model, 0.5), shrink(model, 0.5, through_norm=True)
    assert len(loose.groups) == len(strict.groups) + 1
    assert loose.error is not None, "a mean of squares has a masked model"
    assert loose.error <= BOUND
    width = loose.model.graph.initializers["layers.0.q.weight"].shape
    assert ir.Shape((32, 32)) == width


LAYER = """g (float[1,4,8] x) => (float[1,4,5] y) {{
    h = MatMul(x, w)  n = LayerNormalization<axis=-1, epsilon=0.01>(h, scale{bias})
    y = MatMul(n, v) }}"""


@pytest.mark.parametrize("opset", [17, 23])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_norm_counts_its_zeros_when_allowed(opset: int, bias: bool) -> None:
    """Against numpy on the masked stream, in float64."""
    vectors = {"scale": weight(6), "shift": weight(6) + 1} if bias else {"scale": weight(6)}
    text = LAYER.format(bias=", shift" if bias else "")
    model = parse(text, opset, w=weight(8, 6), v=weight(6, 5), **vectors)
    (group,) = shrink(model, 1.0, carry_mean=True).groups
    done = shrink(model, {group.name: [0, 2, 3, 5]}, carry_mean=True)
    assert done.error is not None
    assert done.error <= 2e-6
    w = model.graph.initializers["w"].const_value.numpy().astype(np.float64)  # type: ignore[union-attr]
    w[:, [1, 4]] = 0
    feed = feeds_for(model, 2)[1]
    h = feed["x"] @ w
    h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 0.01)
    h = (h * vectors["scale"] + vectors.get("shift", 0))[..., [0, 2, 3, 5]]
    (got,) = Session(done.model).run(feed).values()
    want = h @ weight(6, 5)[[0, 2, 3, 5]]
    assert np.abs(got - want).max() <= 2e-6 * np.abs(want).max()
    assert shape(done, "w") == (8, 4)


def test_a_layer_norm_that_loses_nothing_stays() -> None:
    model = parse(LAYER.format(bias=""), w=weight(8, 6), v=weight(6, 5), scale=weight(6))
    done = shrink(model, 1.0, carry_mean=True)
    assert [n.op_type for n in done.model.graph] == ["MatMul", "LayerNormalization", "MatMul"]


@pytest.mark.parametrize(
    ("norm", "arrays"),
    [
        ("LayerNormalization<axis=1>(h, grid)", {"grid": weight(4, 6)}),
        ("LayerNormalization<axis=-1>(h, one)", {"one": weight(1)}),
    ],
)
def test_layer_norms_that_cannot_carry_a_mean(norm: str, arrays: dict[str, np.ndarray]) -> None:
    text = f"""g (float[1,4,8] x) => (float[1,4,5] y) {{
        h = MatMul(x, w)  n = {norm}  y = MatMul(n, v) }}"""
    model = parse(text, w=weight(8, 6), v=weight(6, 5), **arrays)
    assert not shrink(model, 0.5, carry_mean=True).groups
    frozen = analyse(model, Policy(rescale=True, carry_mean=True)).ties.freezes
    reasons = "; ".join(f"{one.node}: {one.reason}" for one in frozen)
    assert "LayerNormalization_1: LayerNormalization over the features: its mean is" in reasons


def test_a_layer_norm_of_half_floats_carries_no_mean() -> None:
    text = """g (float16[1,4,8] x) => (float16[1,4,5] y) {
        h = MatMul(x, w)  n = LayerNormalization<axis=-1>(h, s)  y = MatMul(n, v) }"""
    shapes = {"w": (8, 6), "v": (6, 5), "s": (6,)}
    model = parse(text, **{k: weight(*shape).astype(np.float16) for k, shape in shapes.items()})
    frozen = analyse(model, Policy(rescale=True, carry_mean=True)).ties.freezes
    assert any("in float or double only" in one.reason for one in frozen)


def test_the_stream_of_an_encoder_is_cut_exactly() -> None:
    model = load(encoder("none"))
    done = shrink(model, 0.5, carry_mean=True)
    assert len(done.groups) == len(shrink(model, 0.5, through_norm=True).groups)
    assert done.error is not None
    assert done.error <= BOUND
