"""expand_rare: triangles, gathers, scatters and infinities, with what is declined and why."""

import numpy as np
import onnx_ir as ir
import pytest
from sparsegraph.passes.expand_rare import ExpandRare

import sparsegraph as sg
from sparsegraph.rewrite import Fuel
from tests.passes.check import Result, parse, run


@pytest.mark.parametrize("kind", ["float", "double", "int64", "bool", "float16"])
@pytest.mark.parametrize("upper", [0, 1])
@pytest.mark.parametrize("k", [None, 0, 1, -2, 9, -9])
@pytest.mark.parametrize("shape", ["4,4", "2,3,5", "5,3"])
def test_triangles(kind: str, upper: int, k: int | None, shape: str) -> None:
    given = "" if k is None else ", k"
    text = f"""g ({kind}[{shape}] x) => ({kind}[{shape}] y) {{
        y = Trilu<upper={upper}>(x{given}) }}"""
    arrays = {} if k is None else {"k": np.array(k)}
    assert run(ExpandRare(), text, **arrays).ops == ["And" if kind == "bool" else "Where"]


def test_triangles_that_stay() -> None:
    text = "g (float[4,4] x, int64 k) => (float[4,4] y) { y = Trilu(x, k) }"
    assert reasons(run(ExpandRare(), text)) == ["its diagonal is computed"]
    text = "g (int16[4,4] x) => (int16[4,4] y) { y = Trilu(x) }"
    (found,) = ExpandRare().run(parse(text), Fuel()).declined
    assert found.reason == "ONNX Runtime has no Where of INT16"
    model = parse("g (float[5000,5000] x) => (float[5000,5000] y) { y = Trilu(x) }")
    (found,) = ExpandRare().run(model, Fuel()).declined
    assert found.reason == "a mask of 5000 x 5000 is too large"


@pytest.mark.parametrize(
    ("indices", "out", "ops"),
    [
        ([[0], [4], [-1], [-5]], "4,3,2", ["Gather"]),
        ([[[0], [1]]], "1,2,3,2", ["Gather"]),
        ([[0, 2], [4, -3], [-1, 0]], "3,2", ["Reshape", "Gather"]),
        ([[[0, 2, 1]], [[4, 0, -2]]], "2,1", ["Reshape", "Gather"]),
        ([3], "3,2", ["Gather"]),
        ([3, 1, 0], "", ["Reshape", "Gather"]),
    ],
)
@pytest.mark.parametrize("kind", ["float", "int64"])
def test_gathers(indices: list, out: str, ops: list[str], kind: str) -> None:
    result = f"{kind}[{out}]" if out else kind
    text = f"g ({kind}[5,3,2] x) => ({result} y) {{ y = GatherND(x, at) }}"
    assert run(ExpandRare(), text, at=np.array(indices)).ops == ops


@pytest.mark.parametrize(
    ("places", "out"), [("4,1", "4,3,2"), ("2,4,2", "2,4,2"), ("4,3", "4"), ("3", ""), ("1", "3,2")]
)
def test_computed_indices(places: str, out: str) -> None:
    """Negative ones count from the end, along every axis."""
    result = f"float[{out}]" if out else "float"
    text = f"g (float[5,3,2] x, int64[{places}] at) => ({result} y) {{ y = GatherND(x, at) }}"
    model = parse(text)
    made = sg.compile(model, keep_native=True)
    assert made.fallback_nodes == []
    x = np.arange(30, dtype=np.float32).reshape(5, 3, 2)
    n = [int(size) for size in places.split(",")]
    for seed in range(4):
        drawn = np.random.default_rng(seed).random(n)
        extents = np.array(x.shape[: n[-1]])
        at = np.floor(drawn * 2 * extents).astype(np.int64) - extents
        np.testing.assert_array_equal(made(x, at), x[tuple(np.moveaxis(at, -1, 0))])


def test_gathers_that_stay() -> None:
    text = "g (float[5,3] x, int64[4,1] at) => (float[4,3] y) { y = GatherND(x, at) }"
    done = run(ExpandRare(), text, opset=12)
    assert reasons(done) == ["its indices are computed, before opset 13"]
    text = "g (float[2,3] x) => (float[2] y) { y = GatherND<batch_dims=1>(x, at) }"
    done = run(ExpandRare(), text, at=np.array([[0], [2]]))
    assert reasons(done) == ["batches have indices of their own"]


@pytest.mark.parametrize("at", [[[5]], [[-6]], [[0, 3]]])
def test_indices_outside(at: list) -> None:
    model = parse("g (float[5,3] x) => (y) { y = GatherND(x, at) }", at=np.array(at))
    (found,) = ExpandRare().run(model, Fuel()).declined
    assert found.reason == "an index lies outside of (5, 3)"


@pytest.mark.parametrize(
    ("attributes", "ops"),
    [
        ("", ["Abs", "Equal"]),
        ("<detect_negative=0>", ["Equal"]),
        ("<detect_positive=0>", ["Equal"]),
        ("<detect_positive=0, detect_negative=0>", ["IsInf"]),
    ],
)
def test_infinities(attributes: str, ops: list[str]) -> None:
    text = f"g (float[6] x) => (bool[6] y) {{ y = IsInf{attributes}(x) }}"
    done = run(ExpandRare(), text)
    assert done.ops == ops
    assert reasons(done) == (["it looks for neither sign"] if ops == ["IsInf"] else [])
    compiled = sg.compile(ir.to_proto(parse(text)), keep_native=True)
    x = np.array([1, np.inf, -np.inf, np.nan, 3e38, -0.0], np.float32)
    signs = {"positive": np.inf, "negative": -np.inf}
    expected = np.isin(x, [v for sign, v in signs.items() if f"{sign}=0" not in attributes])
    np.testing.assert_array_equal(compiled(x), expected)


def test_infinities_in_an_old_opset() -> None:
    text = "g (float[6] x) => (bool[6] y) { y = IsInf(x) }"
    done = run(ExpandRare(), text, opset=10)
    assert reasons(done) == ["Equal compares floats from opset 11 on"]


@pytest.mark.parametrize(
    "text",
    [
        "g (float[2,6,6] x) => (float[2,6,6] y) { t = Trilu<upper=0>(x) y = Relu(t) }",
        "g (float[5,3,2] x) => (float[4,3,2] y) { y = GatherND(x, at) }",
        """g (float[2,4,3] x) => (float[2,6,3] y) {
            a = Transpose<perm=[1,0,2]>(x) b = GatherND(a, more)
            y = Transpose<perm=[1,0,2]>(b) }""",
    ],
)
def test_they_are_native(text: str) -> None:
    arrays = {
        "at": np.array([[0], [4], [-1], [2]]),
        "more": np.array([[0], [0], [1], [2], [3], [3]]),
    }
    model = parse(text, **{name: a for name, a in arrays.items() if name in text})
    assert sg.compile(model, keep_native=True).fallback_nodes == []


def reasons(result: Result) -> list[str]:
    return [d.reason for d in result.declined]


@pytest.mark.parametrize(
    ("indices", "updates", "ops"),
    [
        ([[0], [4], [-2]], "3,3,2", ["Concat", "Gather", "Reshape"]),
        ([[[1], [0]], [[1], [3]]], "2,2,3,2", ["Reshape", "Concat", "Gather", "Reshape"]),
        ([[0, 2], [4, -3], [-1, 0]], "3,2", ["Reshape", "Concat", "Gather", "Reshape"]),
        ([[[0, 2, 1]], [[4, 0, -2]]], "2,1", ["Reshape"] * 2 + ["Concat", "Gather", "Reshape"]),
        ([3], "3,2", ["Reshape", "Concat", "Gather", "Reshape"]),
    ],
)
@pytest.mark.parametrize("kind", ["float", "int64"])
def test_scatters(indices: list, updates: str, ops: list[str], kind: str) -> None:
    """Place 1 of the second case is written twice, and keeps what came last."""
    text = f"""g ({kind}[5,3,2] x, {kind}[{updates}] u) => ({kind}[5,3,2] y) {{
        y = ScatterND(x, at, u) }}"""
    assert run(ExpandRare(), text, at=np.array(indices)).ops == ops


@pytest.mark.parametrize(
    ("given", "attributes", "at", "reason"),
    [
        ("", '<reduction="add">', [[0]], "what is scattered is added"),
        ("", "", [[5]], "an index lies outside of (5, 3, 2)"),
        (", int64[1,1] at", "", None, "its indices are computed"),
    ],
)
def test_scatters_that_stay(given: str, attributes: str, at: list | None, reason: str) -> None:
    text = f"""g (float[5,3,2] x, float[1,3,2] u{given}) => (float[5,3,2] y) {{
        y = ScatterND{attributes}(x, at, u) }}"""
    model = parse(text, **({} if at is None else {"at": np.array(at)}))
    (found,) = ExpandRare().run(model, Fuel()).declined
    assert found.reason == reason
