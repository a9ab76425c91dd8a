"""Channel orders that suit N:M, folded into the layers around."""

import itertools
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from sparsegraph import verify
from sparsegraph.demo_model import onnx_runner
from sparsegraph.errors import UsageError
from sparsegraph.permute import _kept, permute, search
from sparsegraph.prune import prune
from tests.passes.check import parse
from tests.test_budget import encoder
from tests.test_prune import change, feeds

SEED = 3
CONV = """<ir_version: 9, opset_import: ["" : 18]>
net (float[1, 8, 6, 6] x, float[16, 8, 3, 3] a, float[16] b, float[16] g, float[16] h,
     float[16] mean, float[16] var, float[16, 1, 3, 3] d, float[4, 16, 3, 3] c
) => (float[1, 4, 6, 6] y)
<int64[1] lo = {0}, int64[1] hi = {8}, int64[1] ax = {1}>
{
  s = Conv<pads = [1, 1, 1, 1]>(x, a, b)
  t = BatchNormalization(s, g, h, mean, var)
  u = Relu(t)
  v = Conv<group = 16, pads = [1, 1, 1, 1]>(u, d)
  y = Conv<pads = [1, 1, 1, 1]>(v, c)
}"""


def filled(text: str, weight: Callable[[str, tuple[int, ...]], np.ndarray]) -> ir.Model:
    """A model in which every input but the first is a constant."""
    model = ir.from_onnx_text(text)
    for value in list(model.graph.inputs)[1:]:
        model.graph.inputs.remove(value)
        array = weight(str(value.name), value.shape.numpy()).astype(np.float32)
        value.const_value = ir.tensor(array, name=value.name)
        model.graph.register_initializer(value)
    return ir.passes.common.ShapeInferencePass()(model).model


def network(text: str = CONV) -> ir.Model:
    """Random weights whose sizes differ from channel to channel."""
    generator = np.random.default_rng(SEED)

    def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
        array = generator.normal(size=shape)
        array = array * generator.lognormal(size=[shape[0], *[1] * (len(shape) - 1)])
        return np.abs(array) + 0.5 if name == "var" else array

    return filled(text, weight)


def feed() -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(1).normal(size=(1, 8, 6, 6)).astype(np.float32)}


def test_the_search_finds_the_best_order_of_two_groups() -> None:
    scores = np.square(np.random.default_rng(SEED).normal(size=(6, 8)))
    best = max(
        _kept(scores[:, [*first, *(i for i in range(8) if i not in first)]], 2, 4)
        for first in itertools.combinations(range(8), 4)
    )
    found = _kept(scores[:, search(scores, 2, 4)], 2, 4)
    assert _kept(scores, 2, 4) < found <= best + 1e-9
    assert found > 0.97 * best


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 2), (3, 8)])
def test_more_is_kept_and_nothing_else_changes(n: int, m: int) -> None:
    model = network()
    found = permute(model, n, m, [feed()])
    (row,) = found.table
    assert row.n_channels == 16
    assert row.after > row.before
    assert 1 - row.after < 0.95 * (1 - row.before)
    want, have = (onnx_runner(x, threads=1)(feed()) for x in (model, found.model))
    np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
    for name in ("a", "b", "g", "h", "mean", "var", "d", "c"):
        before, after = (
            x.graph.initializers[name].const_value.numpy() for x in (model, found.model)
        )
        assert (before != after).any(), name
        np.testing.assert_allclose(np.sort(before.ravel()), np.sort(after.ravel()))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("u = Relu(t)", "u = Softmax<axis = 1>(t)"),
        ("u = Relu(t)", "e = Relu(t) w = Slice(e, lo, hi, ax) u = Concat<axis = 1>(w, w)"),
        ("c)\n}", "c)\n z = Identity(u)\n}"),
        ("group = 16, ", "group = 4, "),
    ],
)
def test_channels_whose_order_matters_stay(old: str, new: str) -> None:
    text = CONV.replace(old, new)
    if "z =" in new:
        text = text.replace("6] y)", "6] y, float[1, 16, 6, 6] z)")
    if "group = 4" in new:
        text = text.replace("[16, 1, 3, 3] d", "[16, 4, 3, 3] d")
    model = network(text)
    found = permute(model, 2, 4)
    makers = [x.graph.initializers["a"].const_value.numpy() for x in (model, found.model)]
    np.testing.assert_array_equal(*makers)
    want, have = (onnx_runner(x, threads=1)(feed()) for x in (model, found.model))
    np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def test_a_constant_that_something_else_reads_stays() -> None:
    """The shift of the norm is an output's too: another order would show there."""
    text = CONV.replace("c)\n}", "c)\n z = Neg(h)\n}").replace("6] y)", "6] y, float[16] z)")
    model = network(text)
    found = permute(model, 2, 4)
    assert found.table == ()
    runs = (onnx_runner(x, threads=1)(feed()) for x in (model, found.model))
    np.testing.assert_array_equal(*runs)


def test_a_recipe_permutes_first() -> None:
    model = encoder()
    plain, moved = (prune(model, f"wanda:2:4{x}", feeds()).model for x in ("", ",permute=yes"))
    assert change(model, moved) < change(model, plain)
    weight = moved.graph.initializers["mlp.down.weight"].const_value.numpy()
    assert ((weight != 0).reshape(24, 4, 48).sum(axis=1) <= 2).all()


def test_a_share_of_zeros_is_not_permuted_for() -> None:
    with pytest.raises(UsageError, match="N:M along inputs"):
        prune(encoder(), "wanda:0.5,permute=yes", feeds())


def same_outputs(model: ir.Model, found: ir.Model, given: dict[str, np.ndarray]) -> None:
    want, have = (onnx_runner(x, threads=1)(given) for x in (model, found))
    np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        # one channel of 16 is an output's
        ("c)\n}", "c)\n z = Slice(u, zero, one, ax)\n}"),
        # the reader sees the halves the other way round
        ("u = Relu(t)", "e = Relu(t) l = Slice(e, lo, hi, ax) r = Slice(e, hi, end, ax) "
         "u = Concat<axis = 1>(r, l)"),
    ],
)  # fmt: skip
def test_an_order_that_shows_elsewhere_stays(old: str, new: str) -> None:
    more = "int64[1] zero = {0}, int64[1] one = {1}, int64[1] end = {16}, "
    text = CONV.replace(old, new).replace("<int64[1] lo", f"<{more}int64[1] lo")
    if "z =" in new:
        text = text.replace("6] y)", "6] y, float[1, 1, 6, 6] z)")
    model = network(text)
    found = permute(model, 2, 4)
    assert found.table == ()
    same_outputs(model, found.model, feed())


def test_a_number_of_channels_that_m_does_not_divide_stays() -> None:
    text = CONV.replace("16", "18").replace("6] y)", "6] y)")
    assert permute(network(text), 2, 4).table == ()
    assert len(permute(network(text), 1, 3).table) == 1


def test_nothing_is_moved_for_nothing() -> None:
    """Equal weights: no order keeps more."""
    model = filled(CONV, lambda _, shape: np.ones(shape))
    assert permute(model, 2, 4).table == ()


def test_each_reader_counts_once() -> None:
    (row,) = permute(encoder(), 2, 4).table
    assert (row.layers, row.n_channels) == (("down",), 96)


def test_a_residual_moves_both_axes_of_what_is_inside() -> None:
    text = CONV.replace("float[16] b,", "float[16] b, float[16, 16, 1, 1] r,").replace(
        "u = Relu(t)", "k = Relu(t) o = Conv(k, r) u = Add(k, o)"
    )
    model = network(text)
    found = permute(model, 2, 4)
    (row,) = found.table
    assert len(row.layers) == 2
    before, after = (x.graph.initializers["r"].const_value.numpy() for x in (model, found.model))
    assert (before.sum(axis=0) != after.sum(axis=0)).any()
    assert (before.sum(axis=1) != after.sum(axis=1)).any()
    same_outputs(model, found.model, feed())


def test_quantised_weights_stay() -> None:
    """Whatever reads them beside a weight in floating point."""
    text = """g (float[2, 8] x) => (float[2, 4] y) {
        h = MatMul(x, a)  r = Relu(h)  d = DequantizeLinear(q, s)  y = MatMul(r, d) }"""
    generator = np.random.default_rng(SEED)
    q = generator.integers(-127, 127, (16, 4)).astype(np.int8)
    a = generator.normal(size=(8, 16)).astype(np.float32)
    model = parse(text, a=a, q=q, s=np.float32(0.1))
    assert permute(model, 2, 4).table == ()
    plain = text.replace("d = DequantizeLinear(q, s)  ", "").replace("(r, d)", "(r, q)")
    assert len(permute(parse(plain, a=a, q=q.astype(np.float32)), 2, 4).table) == 1


def test_a_channel_that_an_output_shows_holds_the_others() -> None:
    """Even where nothing else has to stay: all other axes are inside or summed up."""
    end = "w = Conv(v, c) y = ReduceSum<keepdims = 0>(w) z = Slice(u, zero, one, ax)\n}"
    text = CONV.replace("y = Conv<pads = [1, 1, 1, 1]>(v, c)\n}", end)
    text = text.replace("float[1, 4, 6, 6] y)", "float y, float[1, 1, 6, 6] z)")
    text = text.replace("<int64[1] lo", "<int64[1] zero = {0}, int64[1] one = {1}, int64[1] lo")
    model = network(text)
    found = permute(model, 2, 4)
    assert found.table == ()
    want, have = (verify.run_onnx(x, feed())["z"] for x in (model, found.model))
    np.testing.assert_array_equal(want, have)
