"""remove_identity, merge_reshapes, merge_transposes, unflatten_softmax, dedupe, remove_unused."""

import numpy as np
import pytest
from sparsegraph.passes.dedupe import Dedupe
from sparsegraph.passes.merge_reshapes import MergeReshapes
from sparsegraph.passes.merge_transposes import MergeTransposes
from sparsegraph.passes.remove_identity import RemoveIdentity
from sparsegraph.passes.remove_unused import RemoveUnused
from sparsegraph.passes.unflatten_softmax import UnflattenSoftmax

from sparsegraph.rewrite import FROM
from tests.passes.check import run, weight

ONE, ZERO = np.array(1, np.float32), np.array(0, np.float32)


@pytest.mark.parametrize(
    "body",
    [
        "a = Identity(x)", "a = Cast<to=1>(x)", "a = Dropout(x)", "a, unused = Dropout(x)",
        "a = Mul(x, one)",
        "a = Mul(one, x)", "a = Div(x, one)", "a = Add(zero, x)", "a = Sub(x, zero)",
        "a = Pow(x, one)", "a = Reshape(x, same)", "a = Expand(x, same)", "a = Sum(x)",
        "a = Transpose<perm=[0,1]>(x)", "a = Concat<axis=0>(x)", "a = Clip(x)",
        "none = Slice(x, behind, behind, rows)  a = Concat<axis=0>(none, x)",
        "a = Pad(x, pads)", "a = Slice(x, start, end)", "a = Split<axis=0, num_outputs=1>(x)",
    ],
)  # fmt: skip
def test_no_ops_go(body: str) -> None:
    text = f"g (float[2,3] x) => (float[2,3] y) {{ {body}  y = Relu(a) }}"
    result = run(
        RemoveIdentity(), text, one=ONE, zero=ZERO, same=np.array([2, 3]), pads=np.zeros(4, int),
        start=np.array([0, 0]), end=np.array([9, 9]), behind=np.array([9]), rows=np.array([0]),
    )  # fmt: skip
    assert result.ops == ["Relu"]


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
@pytest.mark.parametrize(
    ("window", "out", "stays"),
    [
        ("kernel_shape=[1,1]", "4,5", False),
        ("kernel_shape=[1,1],strides=[1,1]", "4,5", False),
        ("kernel_shape=[1,1],strides=[2,2]", "2,3", True),
        ("kernel_shape=[3,3],pads=[1,1,1,1]", "4,5", True),
    ],
)
def test_pools_of_single_points_go(op: str, window: str, out: str, stays: bool) -> None:
    text = f"g (float[1,3,4,5] x) => (float[1,3,{out}] y) {{ a = {op}<{window}>(x)  y = Relu(a) }}"
    assert (op in run(RemoveIdentity(), text).ops) == stays


@pytest.mark.parametrize(
    "body",
    [
        "a = Add(x, tiny)", "a = Sub(zero, x)", "a = Div(one, x)", "a = Pow(one, x)",
        "a = Slice(x, last, before, axes, back)", "a = Clip(x, zero)", "a = Mul(x, near)",
        "a = Transpose<perm=[1,0]>(x)",
    ],
)  # fmt: skip
def test_near_misses_stay(body: str) -> None:
    text = f"g (float[3,3] x) => (float[3,3] y) {{ {body}  y = Relu(a) }}"
    result = run(
        RemoveIdentity(), text, one=ONE, zero=ZERO, tiny=np.array(1e-12, np.float32),
        near=np.array(1.0000001, np.float32), last=np.array([-1]), before=np.array([-9]),
        axes=np.array([0]), back=np.array([-1]),
    )  # fmt: skip
    assert result.n_applied == 0


@pytest.mark.parametrize(
    ("condition", "ops"),
    [([True, True, True], ["Relu", "Neg"]), ([False] * 3, ["Neg"]), ([True, False, True], None)],
)
def test_a_condition_that_is_the_same_everywhere(condition: list[bool], ops: list[str]) -> None:
    text = "g (float[2,3] x) => (float[2,3] y) { a = Relu(x)  b = Where(c, a, x)  y = Neg(b) }"
    result = run(RemoveIdentity(), text, c=np.array(condition))
    assert result.n_applied == (ops is not None)
    assert set(result.ops) >= set(ops or ["Where"])


def test_a_chosen_operand_that_broadcasts_is_declined() -> None:
    text = "g (float[1,3] x, float[2,3] z) => (float[2,3] y) { y = Where(c, x, z) }"
    result = run(RemoveIdentity(), text, c=np.array(True))
    assert "larger shape" in result.declined[0].reason


def test_a_broadcasting_one_is_declined() -> None:
    text = "g (float[1,3] x) => (float[2,3] y) { y = Mul(x, o) }"
    result = run(RemoveIdentity(), text, o=np.ones((2, 1), np.float32))
    assert "larger shape" in result.declined[0].reason


@pytest.mark.parametrize("body", ["y = Identity(x)", "y = Cast<to=1>(x)", "y = Identity(w)"])
def test_interface_names_survive(body: str) -> None:
    result = run(RemoveIdentity(), f"g (float[2] x) => (float[2] y) {{ {body} }}", w=weight(2))
    assert result.ops == ["Identity"]


def test_two_outputs_of_one_value() -> None:
    text = "g (float[2] x) => (float[2] y, float[2] z) { y = Relu(x)  z = Identity(y) }"
    assert run(RemoveIdentity(), text).ops == ["Relu", "Identity"]


def test_output_name_moves_to_the_producer() -> None:
    text = "g (float[2] x) => (float[2] y) { a = Relu(x)  b = Neg(a)  y = Identity(a) }"
    result = run(RemoveIdentity(), text)
    assert result.ops == ["Relu", "Neg"]


def test_no_op_read_by_a_subgraph() -> None:
    text = """g (float[2] x, bool c) => (float[2] y) { a = Identity(x)
        y = If(c) <then_branch = t () => (float[2] p) { p = Neg(a) },
                   else_branch = e () => (float[2] q) { q = Abs(a) }> }"""
    assert run(RemoveIdentity(), text).ops == ["If"]


def test_reshapes_merge() -> None:
    text = """g (float[2,3,4] x) => (float[4,6] y) {
        a = Unsqueeze(x, z)  b = Flatten<axis=2>(a)  c = Squeeze(b, n)  y = Reshape(c, s) }"""
    arrays = {"z": np.array([0]), "n": np.array([], int), "s": np.array([4, -1])}
    result = run(MergeReshapes(), text, **arrays)
    assert result.ops == ["Reshape"]


def test_reshape_back_disappears() -> None:
    text = """g (float[2,6] x) => (float[2,6] y) {
        a = Reshape(x, s)  b = Reshape(a, t)  y = Relu(b) }"""
    result = run(MergeReshapes(), text, s=np.array([3, 4]), t=np.array([2, 6]))
    assert result.ops == ["Relu"]


def test_shared_reshape_stays_for_its_other_user() -> None:
    text = """g (float[2,6] x) => (float[12] y, float[3,4] z) {
        a = Reshape(x, s)  z = Relu(a)  y = Reshape(a, t) }"""
    result = run(MergeReshapes(), text, s=np.array([3, 4]), t=np.array([12]))
    assert result.counts == {"Reshape": 2, "Relu": 1}


def test_data_dependent_reshape_is_declined() -> None:
    text = "g (float[5] x) => (int64[n] y) { n = NonZero(x)  y = Reshape(n, s) }"
    result = run(MergeReshapes(), text, s=np.array([-1]))
    assert "depends on the data" in result.declined[0].reason


def test_transpose_pairs() -> None:
    text = """g (float[2,3,4] x) => (float[2,3,4] y, float[4,2,3] z) {
        a = Transpose<perm=[0,2,1]>(x)  b = Transpose<perm=[0,2,1]>(a)  y = Relu(b)
        c = Transpose<perm=[1,0,2]>(a)  z = Abs(c) }"""
    result = run(MergeTransposes(), text)
    assert result.counts == {"Transpose": 1, "Relu": 1, "Abs": 1}


def test_transpose_across_grouping_reshape() -> None:
    text = """g (float[2,3,5,4] x) => (float[2,3,4,5] y) {
        a = Reshape(x, s)  b = Transpose<perm=[0,2,1]>(a)  y = Reshape(b, t) }"""
    result = run(MergeTransposes(), text, s=np.array([6, 5, 4]), t=np.array([2, 3, 4, 5]))
    assert result.ops == ["Transpose"]


@pytest.mark.parametrize(("s", "t"), [([6, 5, 4], [3, 2, 4, 5]), ([2, 15, 4], [2, 3, 4, 5])])
def test_other_regroupings_stay(s: list[int], t: list[int]) -> None:
    text = """g (float[2,3,5,4] x) => (float[a,b,c,d] y) {
        a = Reshape(x, s)  b = Transpose<perm=[0,2,1]>(a)  y = Reshape(b, t) }"""
    assert run(MergeTransposes(), text, s=np.array(s), t=np.array(t)).n_applied == 0


def test_flattened_softmax() -> None:
    text = """g (float[2,3,4] x) => (float[2,3,4] y) {
        a = Reshape(x, s)  b = Softmax<axis=-1>(a)  y = Reshape(b, t) }"""
    arrays = {"s": np.array([6, 4]), "t": np.array([2, 3, 4])}
    assert run(UnflattenSoftmax(), text, **arrays).ops == ["Softmax"]
    over_rows = text.replace("axis=-1", "axis=0")
    assert run(UnflattenSoftmax(), over_rows, **arrays).n_applied == 0


def test_equal_nodes_and_initializers_merge() -> None:
    text = """g (float[2] x) => (float[2] y) {
        a = Add(x, w)  b = Add(v, x)  y = Mul(a, b) }"""
    result = run(Dedupe(), text, w=weight(2), v=weight(2))
    assert result.ops == ["Add", "Mul"]
    assert result.model.graph.initializers["w"].metadata_props[FROM] == "w,v"


@pytest.mark.parametrize(
    "body",
    [
        "a = Sub(x, w)  b = Sub(w, x)", "a = Bernoulli(w)  b = Bernoulli(w)",
        "a = Softmax<axis=0>(w2)  b = Softmax<axis=1>(w2)",
        "a = Dropout(x, r, t)  b = Dropout(x, r, t)",
    ],
)  # fmt: skip
def test_unequal_nodes_stay(body: str) -> None:
    tail = "c = Mul(a, z)  d = Mul(b, z)  y = Add(c, d)"
    text = f"g (float[2,2] x) => (float[2,2] y) {{ {body}  {tail} }}"
    result = run(
        Dedupe(), text, w=np.full((2, 2), 0.5, np.float32), w2=weight(2, 2), z=ZERO,
        r=np.array(0.5, np.float32), t=np.array(True),
    )  # fmt: skip
    assert result.n_applied == 0


def test_duplicates_that_are_both_outputs_stay() -> None:
    text = "g (float[2] x) => (float[2] y, float[2] z) { y = Relu(x)  z = Relu(x) }"
    assert run(Dedupe(), text).n_applied == 0


def test_a_duplicate_output_keeps_its_name() -> None:
    text = "g (float[2] x) => (float[2] z) { a = Relu(x)  b = Neg(a)  z = Relu(x) }"
    assert run(Dedupe(), text).ops == ["Relu", "Neg"]


def test_dead_parts_go() -> None:
    text = "g (float[2] x) => (float[2] y) { y = Relu(x)  a = Exp(x)  b = Add(a, w) }"
    result = run(RemoveUnused(), text, w=weight(2))
    assert result.ops == ["Relu"]
    assert not result.model.graph.initializers


def test_texts_in_constants_are_compared_too() -> None:
    text = """g (float[2] x) => (bool[1] y) {
      a = Constant <value = string[1] {"one"}> ()
      b = Constant <value = string[1] {"one"}> ()
      c = Constant <value = string[1] {"two"}> ()
      y1 = Equal(a, c)  y2 = Equal(b, c)  y = Or(y1, y2)
    }"""
    assert run(Dedupe(), text).ops == ["Constant", "Constant", "Equal", "Or"]
