"""CumSum and TopK in graphs, with what reads them."""

import numpy as np
import onnx_ir as ir
import pytest

from sparsegraph import verify
from sparsegraph.capture import load
from sparsegraph.compile import compile
from tests.passes.check import parse


def found_and_wanted(text: str, **weights: np.ndarray) -> None:
    """Native on every output, and equal to ONNX Runtime on all feeds."""
    model = parse(text, **weights)
    made = compile(ir.to_proto(model), keep_native=True)
    assert made.fallback_nodes == []
    names = [o.name for o in made.session.get_outputs()]
    for feed in verify.feeds_for(model, 4):
        wanted = verify.Session(model).run(feed)
        for name, found in zip(names, made.session.run(None, feed)):
            assert found.dtype == wanted[name].dtype
            np.testing.assert_allclose(found, wanted[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("options", ["", "<exclusive=1>", "<reverse=1>", "<exclusive=1,reverse=1>"])
@pytest.mark.parametrize("dtype", ["float", "int32", "int64"])
def test_running_sums(axis: int, options: str, dtype: str) -> None:
    text = f"g ({dtype}[4,9,5] x) => ({dtype}[4,9,5] y) {{ y = CumSum{options}(x, axis) }}"
    found_and_wanted(text, axis=np.array(axis))


def test_positions_of_tokens() -> None:
    """RoBERTa counts the tokens that are no padding."""
    table = np.random.default_rng(0).random((16, 8), np.float32)
    found_and_wanted(
        """g (int64[2,12] ids) => (float[2,12,8] y) {
            e = Equal(ids, pad)  k = Not(e)  m = Cast<to=6>(k)  c = CumSum(m, axis)
            p = Mul(c, m)  w = Cast<to=7>(p)  i = Add(w, pad)  y = Gather(table, i) }""",
        pad=np.array(1), axis=np.array(1), table=table,
    )  # fmt: skip


@pytest.mark.parametrize(("axis", "k"), [(0, 2), (1, 7), (-1, 1), (-1, 5)])
@pytest.mark.parametrize("largest", [0, 1])
def test_the_best(axis: int, k: int, largest: int) -> None:
    shape = [4, 7, 5]
    shape[axis] = k
    size = ",".join(map(str, shape))
    found_and_wanted(
        f"""g (float[4,7,5] x) => (float[{size}] y, int64[{size}] i) {{
            y, i = TopK<axis={axis},largest={largest}>(x, k) }}""", k=np.array([k]),
    )  # fmt: skip


@pytest.mark.parametrize("largest", [0, 1])
def test_the_best_are_numbers(largest: int) -> None:
    """NaN is worse than all of them, wherever it stands."""
    text = f"""g (float[3,4] x) => (float[3,2] y, int64[3,2] i) {{
        y, i = TopK<largest={largest}>(x, k) }}"""
    made = compile(ir.to_proto(parse(text, k=np.array([2]))), keep_native=True)
    x = np.float32([[np.nan, 3, 1, 2], [3, np.nan, np.nan, 1], [np.nan, np.nan, np.nan, 5]])
    values, places = made.session.run(None, {"x": x})
    wanted = [[3, 2], [3, 1], [5, np.nan]] if largest else [[1, 2], [1, 3], [5, np.nan]]
    np.testing.assert_array_equal(values, np.float32(wanted))
    np.testing.assert_array_equal(np.take_along_axis(x, places, 1), values)
    assert (places[:, 0] != places[:, 1]).all()


@pytest.mark.parametrize("last", ["Softmax(y)", "Cast<to=1>(i)"])
def test_experts_of_tokens(last: str) -> None:
    """A router reads the shares of the best, or their places alone."""
    found_and_wanted(
        f"""g (float[16,32] x) => (float[16,2] z) {{
            s = MatMul(x, w)  y, i = TopK(s, k)  z = {last} }}""",
        w=np.random.default_rng(0).standard_normal((32, 8)).astype(np.float32), k=np.array([2]),
    )  # fmt: skip


def test_any_order_is_the_sorted_one() -> None:
    """A router that gates groups of experts: TopK of any order, then a scatter of ones."""
    model = parse(
        """g (float[4,7] x) => (float[4,2] y, float[4,7] kept) {
        y, i = TopK<sorted=0>(x, k)  kept = ScatterElements<axis=1>(zeros, i, ones) }""",
        k=np.array([2]), zeros=np.zeros((4, 7), np.float32), ones=np.ones((4, 2), np.float32),
    )  # fmt: skip
    assert "sorted" not in load(model).graph.node(0).attributes
    made = compile(ir.to_proto(model), keep_native=True)
    assert made.fallback_nodes == []
    x = np.random.default_rng(0).standard_normal((4, 7)).astype(np.float32)
    values, kept = made.run(None, {"x": x})
    np.testing.assert_array_equal(values, -np.sort(-x, 1)[:, :2])
    np.testing.assert_array_equal(kept, x >= values[:, 1:])
