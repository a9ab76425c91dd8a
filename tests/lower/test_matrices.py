"""MatMul of activations runs in kernels of ours, for every batch that is whole or single."""

import numpy as np
import pytest

from sparsegraph.compile import compile
from tests.passes.check import parse, weight


@pytest.mark.parametrize(
    ("left", "right", "out"),
    [
        ((5, 7), (7, 9), (5, 9)),
        ((3, 5, 7), (3, 7, 40), (3, 5, 40)),
        ((2, 3, 5, 7), (2, 3, 7, 4), (2, 3, 5, 4)),
        ((2, 3, 5, 7), (7, 4), (2, 3, 5, 4)),
        ((5, 7), (2, 3, 7, 4), (2, 3, 5, 4)),
        ((1, 3, 5, 7), (3, 7, 4), (1, 3, 5, 4)),
    ],
)
@pytest.mark.parametrize("threads", [1, 3])
def test_batches(
    left: tuple[int, ...], right: tuple[int, ...], out: tuple[int, ...], threads: int
) -> None:
    a, b, y = (",".join(map(str, shape)) for shape in (left, right, out))
    model = parse(f"g (float[{a}] a, float[{b}] b) => (float[{y}] y) {{ y = MatMul(a, b) }}")
    compiled = compile(model, keep_native=True, fallback=False, threads=threads)
    assert compiled.manifest.verification["max_rel_error"] <= 1e-6


def test_rows_are_parted_for_threads() -> None:
    model = parse("g (float[100,7] a, float[7,4] b) => (float[100,4] y) { y = MatMul(a, b) }")
    compiled = compile(model, keep_native=True, fallback=False, threads=3)
    (segment,) = compiled.manifest.segments
    assert [step.items for step in segment.steps] == [3]
    assert compiled.manifest.verification["max_rel_error"] <= 1e-6


def test_scores_between_layers_keep_the_model_in_one_segment() -> None:
    """Linear attention: two products of activations between layers, one side turned."""
    text = """g (float[2,20,16] x) => (float[2,20,16] y) {
        q = MatMul(x, wq)  e = Elu(q)  k = MatMul(x, wk)  v = MatMul(x, wv)
        t = Transpose<perm=[0,2,1]>(k)  s = MatMul(t, v)  r = MatMul(e, s)  y = MatMul(r, wo) }"""
    model = parse(text, **{name: weight(16, 16) for name in ("wq", "wk", "wv", "wo")})
    compiled = compile(model, keep_native=True, fallback=False)
    assert compiled.fallback_nodes == []


def test_a_constant_with_batches_and_one_on_the_left() -> None:
    text = """g (float[3,5,7] x) => (float[3,5,6] y, float[3,2,7] z) {
        y = MatMul(x, w)  z = MatMul(v, x) }"""
    compiled = compile(parse(text, w=weight(3, 7, 6), v=weight(2, 5)), keep_native=True)
    assert compiled.fallback_nodes == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("(float[2,1,5,7] a, float[3,7,4] b) => (float[2,3,5,4] y)", "broadcast in part"),
        ("(float[5,7] a, float[7] b) => (float[5] y)", "a product of vectors"),
        ("(int32[5,7] a, int32[7,4] b) => (int32[5,4] y)", "other types"),
        ("(float[1,50000] a, float[50000,24] b) => (float[1,24] y)", "50000 terms"),
    ],
)
def test_what_is_declined(text: str, reason: str) -> None:
    compiled = compile(parse(f"g {text} {{ y = MatMul(a, b) }}"), keep_native=True, check=False)
    (segment,) = compiled.manifest.segments
    assert reason in segment.reason


def test_large_values_and_zeros_times_infinity() -> None:
    model = parse("g (float[2,4,3] a, float[2,3,9] b) => (float[2,4,9] y) { y = MatMul(a, b) }")
    compiled = compile(model, keep_native=True, fallback=False)
    a, b = weight(2, 4, 3), weight(2, 3, 9) * np.float32(1e30)
    a[0, 1, 2], b[0, 2, 3] = 0, np.inf
    (got,) = compiled.run(None, {"a": a, "b": b})
    with np.errstate(invalid="ignore"):
        want = a @ b
    assert np.isnan(got[0, 1, 3])
    np.testing.assert_allclose(got, want, rtol=1e-4)
