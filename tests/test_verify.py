"""Feeds, comparison and the ONNX Runtime session."""

import numpy as np
import onnx_ir as ir
import pytest

from sparsegraph.errors import UnsupportedError, VerifyError
from sparsegraph.verify import (
    TOLERANCE,
    Session,
    compare,
    feeds_for,
    index_bound,
    is_mask_input,
    run_onnx,
    sensitivity,
    tells,
)
from tests.passes.check import parse, weight

BERT = """g (int64[2,6] input_ids, int64[2,6] attention_mask, float[2,6,8] x) => (float[2,6,8] y) {
    e = Gather(table, input_ids)  m = Cast<to=1>(attention_mask)  u = Unsqueeze(m, last)
    a = Add(e, x)  y = Mul(a, u) }"""


def bert() -> ir.Model:
    return parse(BERT, table=weight(11, 8), last=np.array([-1]))


def test_feeds_cover_zeros_normal_and_large() -> None:
    zeros, normal, large = feeds_for(bert())
    assert not zeros["x"].any()
    assert 0.5 < normal["x"].std() < 1.5
    assert large["x"].std() > 10


def test_large_values_that_a_model_cannot_be_judged_by_are_made_smaller() -> None:
    model = parse(
        "g (float[64,40] x) => (float[64,40] y) { angle = Mul(x, w)  y = Sin(angle) }",
        w=np.float32([100]),
    )
    session = Session(model)
    (*_, large), (*same, smaller) = feeds_for(model), feeds_for(model, session=session)
    assert sensitivity(session, large, session.run(large), False, 4) > TOLERANCE
    assert sensitivity(session, smaller, session.run(smaller), False, 4) <= TOLERANCE
    times = large["x"] / smaller["x"]
    assert times == pytest.approx(np.full_like(times, times[0, 0]), rel=1e-5)
    assert round(float(times[0, 0])) in (3, 9, 27, 30)
    assert all(compare(a, b) == 0 for a, b in zip(same, feeds_for(model)))


def test_large_values_stay_where_a_model_can_be_judged_by_them() -> None:
    model = bert()
    given, kept = feeds_for(model), feeds_for(model, session=Session(model))
    assert all(compare(a, b) == 0 for a, b in zip(kept, given))


def test_scales_of_a_resize_are_no_weights_to_nudge() -> None:
    model = parse(
        """g (float[1,2,3,3] x) => (float[1,2,6,6] y) {
        r = Resize<mode="nearest">(x, , scales)  y = Mul(r, w) }""",
        scales=np.float32([1, 1, 2, 2]), w=np.float32(np.ones((2, 1, 1))),
    )  # fmt: skip
    feed = feeds_for(model)[1]
    want = Session(model).run(feed)
    assert tells(model, feed, want, TOLERANCE)
    assert not tells(model, feed, want, 1e-9)


def test_integer_feeds_stay_inside_the_table() -> None:
    model = bert()
    assert index_bound(model.graph.inputs[0]) == 11
    feeds = feeds_for(model, 5)
    assert max(f["input_ids"].max() for f in feeds) == 10
    for feed in feeds:
        assert np.isfinite(run_onnx(model, feed)["y"]).all()


@pytest.mark.parametrize(("n", "bound"), [(1, 9), (2, 5), (3, 4)])
def test_index_bound_of_several_axes(n: int, bound: int) -> None:
    shape = ",".join(["6", *"954"[n:]])
    model = parse(
        f"g (float[9,5,4] x, int64[6,{n}] i) => (float[{shape}] y) {{ y = GatherND(x, i) }}"
    )
    assert index_bound(model.graph.inputs[1]) == bound


def test_masks_are_all_masked_once_and_all_kept_once() -> None:
    model = bert()
    assert [is_mask_input(v) for v in model.graph.inputs] == [False, True, False]
    masks = [f["attention_mask"] for f in feeds_for(model, 6)]
    assert not masks[0].any()
    assert masks[1].all()
    assert any(0 < m.mean() < 1 for m in masks[2:])


def test_mask_is_found_by_use() -> None:
    text = """g (int64[4] flags, float[4] x) => (float[4] y) {
        f = Cast<to=1>(flags)  i = Sub(one, f)  y = Mul(x, i) }"""
    model = parse(text, one=np.array(1, np.float32))
    assert is_mask_input(model.graph.inputs[0])


def test_feeds_repeat() -> None:
    a, b = feeds_for(bert(), seed=3), feeds_for(bert(), seed=3)
    assert all(compare(x, y) == 0 for x, y in zip(a, b))
    assert compare(feeds_for(bert(), seed=4)[1], a[1]) > 0


@pytest.mark.parametrize(
    ("a", "b", "want"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.5], [1.0, 2.0], 0.25),
        ([0.0, 1e-3], [0.0, 0.0], 1e-3),
        ([np.nan, 1.0], [np.nan, 1.0], 0.0),
        ([np.nan, 1.0], [0.0, 1.0], np.inf),
        ([0.0, 1.0], [np.nan, 1.0], np.inf),
        ([np.inf, 1.0], [np.inf, 1.0], 0.0),
        ([-np.inf, 1.0], [np.inf, 1.0], np.inf),
        ([1e30, 1.0], [np.inf, 1.0], np.inf),
        ([], [], 0.0),
    ],
)
def test_compare(a: list[float], b: list[float], want: float) -> None:
    got = compare(np.array(a, np.float32), np.array(b, np.float32))
    assert got == pytest.approx(want, rel=1e-6)


def test_compare_is_strict_about_kind() -> None:
    one = np.ones(2, np.float32)
    assert compare(one, np.ones(3, np.float32)) == np.inf
    assert compare(one, np.ones(2)) == np.inf
    assert compare({"y": one}, {"z": one}) == np.inf
    assert compare(np.array([1, 2]), np.array([1, 3])) == np.inf
    assert compare([one], [one, one]) == np.inf


def test_inner_values_by_name() -> None:
    model = bert()
    out = run_onnx(model, feeds_for(model)[1], ["e", "y"])
    assert set(out) == {"e", "y"}
    assert [v.name for v in model.graph.outputs] == ["y"]


def test_wrong_feed_and_unknown_op_are_typed_errors() -> None:
    model = bert()
    with pytest.raises(VerifyError):
        run_onnx(model, {})
    model.graph.node(0).op_type = "NoSuchOp"
    with pytest.raises(UnsupportedError, match="NoSuchOp"):
        run_onnx(model, feeds_for(model)[0])
    assert model.graph.initializers["table"].const_value is not None
    assert not isinstance(model.graph.initializers["table"].const_value, ir.ExternalTensor)
