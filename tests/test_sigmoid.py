"""Sigmoids written out: models that agree are told from models that do not, at any probability."""

import numpy as np
import onnx_ir as ir
import pytest

from sparsegraph.compile import compile
from sparsegraph.pipeline import optimize
from sparsegraph.sigmoid import disagreement, written_out
from sparsegraph.verify import Session, compare, feeds_for
from tests.passes.check import parse, weight

NET = """g (float[4,16] x) => (float[4,8] y) {
    p = MatMul(x, w)  s = Mul(p, scale)  b = Add(s, bias)  y = Sigmoid(b) }"""
LIMIT = 1e-5


def net(bias: float = -15.0, text: str = NET, change: float = 0.0) -> ir.Model:
    """Probabilities around 1e-6."""
    scale = np.linspace(0.1, 0.3, 8, dtype=np.float32)
    w = weight(16, 8)
    w[0] += change
    return parse(text, w=w, scale=scale, bias=np.full(8, bias, np.float32))


def folded(model: ir.Model) -> ir.Model:
    """The same function with its scale inside the weights: other last bits."""
    return optimize(model, verify=False).model


def test_equal_models_agree_only_when_sigmoids_are_written_out() -> None:
    model, feed = net(), feeds_for(net(), 2)[1]
    error = compare(Session(folded(model)).run(feed), Session(model).run(feed))
    assert error > 1e-4, "ONNX Runtime's Sigmoid has become precise: this file can go"
    assert disagreement(feed, LIMIT, folded(model), model, error) <= LIMIT
    assert disagreement(feed, LIMIT, Session(written_out(folded(model))).run, model, error) <= LIMIT


def test_other_models_stay_apart() -> None:
    model, feed = net(), feeds_for(net(), 2)[1]
    other = folded(net(change=1e-3))
    error = compare(Session(other).run(feed), Session(model).run(feed))
    assert disagreement(feed, LIMIT, other, model, error) > 2 * LIMIT


def test_nothing_is_computed_again_below_the_limit_or_without_sigmoids() -> None:
    def never(feed: object) -> dict[str, np.ndarray]:
        raise AssertionError("was run")

    plain = net(text=NET.replace("Sigmoid", "Relu"))
    assert disagreement({}, LIMIT, never, net(), LIMIT) == LIMIT
    assert disagreement({}, LIMIT, never, plain, 1.0) == 1.0
    half = "g (float16[4] x) => (float16[4] y) { y = Sigmoid(x) }"
    assert disagreement({}, LIMIT, never, parse(half), 1.0) == 1.0


@pytest.mark.parametrize("bias", [-200.0, -15.0, 0.0, 15.0, 200.0])
def test_written_out_is_the_same_function(bias: float) -> None:
    model = net(bias)
    kept = [node.op_type for node in model.graph]
    for feed in feeds_for(model):
        want = Session(model).run(feed)["y"]
        got = Session(written_out(model)).run(feed)["y"]
        assert np.abs(got - want).max() <= 2e-7
    assert [node.op_type for node in model.graph] == kept


def test_sigmoids_inside_and_at_two_outputs() -> None:
    text = """g (float[4] x) => (float[4] y, float[4] z) {
        y = Sigmoid(x)  m = Mul(x, y)  n = Neg(m)  z = Sigmoid(n) }"""
    model = parse(text)
    wide = written_out(model)
    assert not [node for node in wide.graph if node.op_type == "Sigmoid"]
    feed = feeds_for(model, 2)[1]
    assert compare(Session(wide).run(feed), Session(model).run(feed)) <= 1e-6


def test_a_detector_that_sees_nothing_is_compiled() -> None:
    """1e-7 of rounding in the reference's Sigmoid had counted as a wrong pass or a wrong kernel."""
    w = weight(256, 256) * (np.random.default_rng(0).random((256, 256)) < 0.05)
    model = parse(
        NET.replace("4,16", "128,256").replace("4,8", "128,256").replace("l(x", "l(r")
        .replace("p =", "r = Cos(x)  p ="),  # not zero for zeros
        w=w, scale=np.full(256, 0.3, np.float32), bias=np.full(256, -20.0, np.float32),
    )  # fmt: skip
    assert max(record.max_rel_error or 0 for record in optimize(model).records) <= LIMIT
    compiled = compile(ir.to_proto(model))
    assert not compiled.fallback_nodes
    feed = feeds_for(model, 2)[1]
    want = Session(written_out(model)).run(feed)["y"]
    got = compiled.run(None, feed)[0]
    assert compare(got, want) <= LIMIT
    assert compare(got, Session(model).run(feed)["y"]) > 1e-4
