"""expand_sequences: what splits, positions and joins become; what is declined and why."""

import numpy as np
import onnx_ir as ir
import pytest
from sparsegraph.passes.expand_sequences import ExpandSequences

from sparsegraph.pipeline import optimize
from sparsegraph.rewrite import Fuel
from tests.passes.check import parse, run, weight


def text(out: str, attributes: str, *, with_sizes: bool) -> str:
    """A model that takes one part of x [2, 8, 3], by `sizes` if there are some."""
    given = ", sizes" if with_sizes else ""
    return f"""g (float[2,8,3] x) => (float[{out}] y) {{
        s = SplitToSequence<{attributes}>(x{given})
        y = SequenceAt(s, at) }}"""


def taken(position: int, out: str, attributes: str = "axis=1", opset: int = 23, **arrays) -> list:
    """Operators behind the pass."""
    model = text(out, attributes, with_sizes="sizes" in arrays)
    return run(ExpandSequences(), model, opset, at=np.array(position), **arrays).ops


def refused(position: int, **arrays: np.ndarray) -> str:
    """Why a model that cannot run is left as it is."""
    fits = {name: np.full_like(a, 8 // max(a.size, 1)) for name, a in arrays.items()}
    model = parse(text("2,n,3", "axis=1", with_sizes=True), at=np.array(position), **fits)
    for name, array in arrays.items():
        model.graph.initializers[name].const_value = ir.tensor(array, name=name)
    outcome = ExpandSequences().run(model, Fuel())
    assert outcome.n_applied == 0
    (found,) = outcome.declined
    return found.reason


@pytest.mark.parametrize("opset", [11, 12, 13, 18, 23])
@pytest.mark.parametrize(
    ("sizes", "extents"), [(3, (3, 3, 2)), (8, (8,)), (9, (8,)), ([1, 5, 2], (1, 5, 2))]
)
@pytest.mark.parametrize("axis", [1, -2])
def test_parts(opset: int, sizes: int | list[int], extents: tuple[int, ...], axis: int) -> None:
    for i, extent in enumerate(extents):
        for position in (i, i - len(extents)):
            found = taken(position, f"2,{extent},3", f"axis={axis}", opset, sizes=np.array(sizes))
            assert found == ["Split"]


def test_single_elements() -> None:
    assert taken(2, "2,1,3") == ["Split"]
    assert taken(2, "2,3", "axis=1, keepdims=0") == ["Split", "Reshape"]
    assert taken(1, "2,3,3", "axis=1, keepdims=0", sizes=np.array([2, 3, 3])) == ["Split"]
    assert taken(-1, "8,3", "keepdims=0") == ["Split", "Reshape"]


@pytest.mark.parametrize("sizes", [0, -1, [4, 5], [4, 3], [8, 0], [9, -1]])
def test_parts_that_do_not_fit(sizes: int | list[int]) -> None:
    assert refused(0, sizes=np.array(sizes)) == "the parts of its sequence are not known"


@pytest.mark.parametrize("position", [3, -4])
def test_positions_that_are_not_there(position: int) -> None:
    assert refused(position, sizes=np.array(3)) == f"position {position} of 3"


def test_axes_that_onnx_keeps_and_onnx_runtime_drops() -> None:
    model = parse(
        text("2,n,3", "axis=1, keepdims=0", with_sizes=True), at=np.array(0), sizes=np.array(1)
    )
    (found,) = ExpandSequences().run(model, Fuel()).declined
    assert found.reason == "its parts are to lose their axis, and ONNX says not"


def test_what_is_computed() -> None:
    model = """g (float[2,8,3] x, int64 i) => (float[2,n,3] y) {
        s = SplitToSequence<axis=1>(x, sizes)
        y = SequenceAt(s, i) }"""
    done = run(ExpandSequences(), model, sizes=np.array(4))
    assert [d.reason for d in done.declined] == ["its position is computed"]
    model = """g (float[2,8,3] x, int64 n) => (float[2,m,3] y) {
        s = SplitToSequence<axis=1>(x, n)
        y = SequenceAt(s, at) }"""
    done = run(ExpandSequences(), model, at=np.array(0))
    assert [d.reason for d in done.declined] == ["the parts of its sequence are not known"]


def test_sequences_that_change() -> None:
    model = """g (float[2,3] x, float[2,3] z) => (float[2,3] y) {
        s = SequenceConstruct(x)
        t = SequenceInsert(s, z)
        y = SequenceAt(t, at) }"""
    done = run(ExpandSequences(), model, at=np.array(0))
    assert [d.reason for d in done.declined] == ["its sequence is neither split nor constructed"]


def test_constructed() -> None:
    model = """g (float[2,3] x, float[4] z) => (float[4] y) {
        s = SequenceConstruct(x, z)
        y = SequenceAt(s, at) }"""
    assert run(ExpandSequences(), model, at=np.array(-1)).ops == ["Identity"]


@pytest.mark.parametrize(
    ("attributes", "out", "ops"),
    [
        ("axis=1", "2,6", ["Concat"]),
        ("axis=-2", "4,3", ["Concat"]),
        ("axis=0, new_axis=1", "2,2,3", ["Reshape", "Reshape", "Concat"]),
        ("axis=-1, new_axis=1", "2,3,2", ["Reshape", "Reshape", "Concat"]),
        ("axis=1, new_axis=1", "2,2,3", ["Reshape", "Reshape", "Concat"]),
    ],
)
def test_joined(attributes: str, out: str, ops: list[str]) -> None:
    model = f"""g (float[2,3] x, float[2,3] z) => (float[{out}] y) {{
        s = SequenceConstruct(x, z)
        y = ConcatFromSequence<{attributes}>(s) }}"""
    assert run(ExpandSequences(), model).ops == ops


def test_split_and_joined_again() -> None:
    model = """g (float[2,8] x) => (float[2,8] y) {
        s = SplitToSequence<axis=1>(x, sizes)
        y = ConcatFromSequence<axis=1>(s) }"""
    assert run(ExpandSequences(), model, sizes=np.array(3)).ops == ["Split", "Concat"]


def test_one_split_is_left() -> None:
    """Of a gated layer, exported by PyTorch."""
    model = """g (float[4,6] x) => (float[4,5] y) {
        h = MatMul(x, w)
        s = SplitToSequence<axis=-1>(h, sizes)
        a = SequenceAt(s, zero)
        b = SequenceAt(s, one)
        c = Sigmoid(b)
        y = Mul(a, c) }"""
    arrays = {"w": weight(6, 10), "sizes": np.array(5), "zero": np.array(0), "one": np.array(1)}
    done = optimize(parse(model, **arrays))
    assert sorted(n.op_type for n in done.model.graph) == ["MatMul", "Mul", "Sigmoid", "Split"]
