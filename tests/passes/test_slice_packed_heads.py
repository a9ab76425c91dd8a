"""Packed q, k, v: Gather, Squeeze of Slice, Squeeze of Split; near-misses."""

import numpy as np
import pytest
from sparsegraph.passes.slice_packed_heads import SlicePackedHeads

from tests.passes.check import apply, parse

HEAD = """
agraph (float[2,5,24] x{extra}) => (float[2,2,5,4] y)
<int64[5] split = {{2,5,3,2,4}}, int64 i = {{1}}, int64[1] one = {{1}}, int64[1] two = {{2}},
 int64[1] zero = {{0}}, int64[3] parts = {{1,1,1}}>
{{ a = Reshape(x, split) b = Transpose<perm = [{perm}]>(a) {select} }}
"""
SELECTS = {
    "gather": "y = Gather<axis = 0>(b, i)",
    "slice": "c = Slice(b, one, two, zero) y = Squeeze(c, zero)",
    "split": "p, q, r = Split<axis = 0>(b, parts) y = Squeeze(q, zero)",
}


@pytest.mark.parametrize("form", SELECTS)
def test_selection_becomes_a_slice_of_features(form: str) -> None:
    model = parse(HEAD.format(perm="2,0,3,1,4", select=SELECTS[form], extra=""))
    result = apply(SlicePackedHeads(), model, tolerance=0.0)
    assert result.n_applied == 1
    node = (
        result.node("Slice")
        if form != "slice"
        else next(n for n in result.model.graph if n.op_type == "Slice" and n.inputs[0].name == "x")
    )
    starts = node.inputs[1].const_value
    assert starts is not None
    assert np.asarray(starts.numpy()).tolist() == [8]


def test_other_orders_of_axes_are_left_alone() -> None:
    text = HEAD.format(perm="2,0,1,3,4", select=SELECTS["gather"], extra="")
    model = parse(text.replace("float[2,2,5,4] y", "float[2,5,2,4] y"))
    result = apply(SlicePackedHeads(), model)
    assert (result.n_applied, result.declined) == (0, ())


def test_a_run_time_index_is_declined() -> None:
    select = "y = Gather<axis = 0>(b, j)"
    model = parse(HEAD.format(perm="2,0,3,1,4", select=select, extra=", int64 j"))
    result = apply(SlicePackedHeads(), model)
    assert result.n_applied == 0
    assert "not a constant" in result.declined[0].reason
