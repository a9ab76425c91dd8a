import numpy as np
import pytest
from sparsegraph.passes.fold_constants import FoldConstants
from sparsegraph.passes.fold_shapes import FoldShapes

from sparsegraph.rewrite import FROM, Fuel
from tests.passes.check import apply, parse, run, weight


def mask(shape: tuple[int, ...], kept: float = 0.3) -> np.ndarray:
    return (np.random.default_rng(3).random(shape) < kept).astype(np.float32)


def test_masked_weight_becomes_one_initializer_with_exact_zeros() -> None:
    m = mask((64, 32))
    text = "g (float[4,32] x) => (float[4,64] y) { p = Mul(m, w)  y = Gemm<transB=1>(x, p) }"
    result = run(FoldConstants(), text, w=weight(64, 32), m=m)
    assert result.ops == ["Gemm"]
    np.testing.assert_array_equal(result.weight("w") == 0, m == 0)


def test_provenance_names_every_source_and_the_largest_names_the_result() -> None:
    text = """g (float[4,32] x) => (float[4,64] y) {
        c = Cast<to=1>(m)  p = Mul(w, c)  t = Transpose<perm=[1,0]>(p)  y = MatMul(x, t) }"""
    result = run(FoldConstants(), text, w=weight(64, 32), m=mask((64, 32)) > 0)
    value = result.node("MatMul").inputs[1]
    assert value is not None
    assert value.name == "w"
    assert value.metadata_props[FROM] == "w,m"
    assert value.shape == (32, 64)


def test_multi_output_ops_fold() -> None:
    text = """g (float[4,32] x) => (float[4,64] y) {
        a = Abs(s)  v, i = TopK<axis=0>(a, k)  t = Slice(v, b, e)
        c = GreaterOrEqual(a, t)  d = Cast<to=1>(c)  r = Reshape(d, shape)
        p = Mul(w, r)  y = Gemm<transB=1>(x, p) }"""
    result = run(
        FoldConstants(), text, s=weight(64 * 32), w=weight(64, 32),
        k=np.array([200]), b=np.array([199]), e=np.array([200]), shape=np.array([64, 32]),
    )  # fmt: skip
    assert result.ops == ["Gemm"]
    assert np.count_nonzero(result.weight("w")) == 200


def test_epsilon_survives() -> None:
    text = """g (float[2,8] x, float[2,8] m) => (float[2,1] y) {
        p = Mul(x, m)  s = ReduceSum(p, a)  n = ReduceSum(m, a)  d = Add(n, e)  y = Div(s, d) }"""
    for epsilon in (1e-7, 1e-8, 1e-12):
        model = parse(text, a=np.array([1]), e=np.array(epsilon, np.float32))
        assert apply(FoldConstants(), model).counts["Add"] == 1


def test_quantised_weight_keeps_its_dequantise() -> None:
    text = """g (float[4,32] x) => (float[4,16] y) {
        p = Mul(w, m)  q = QuantizeLinear(p, s, z)  d = DequantizeLinear(q, s, z)
        y = MatMul(x, d) }"""
    arrays = {"s": np.array(0.05, np.float32), "z": np.array(128, np.uint8)}
    result = run(FoldConstants(), text, w=weight(32, 16), m=mask((32, 16)), **arrays)
    assert result.ops == ["DequantizeLinear", "MatMul"]
    assert (result.weight("w") == 128).sum() >= (mask((32, 16)) == 0).sum()


def test_growth_is_declined_and_what_lies_below_still_folds() -> None:
    text = """g (float[2048,2048] x) => (float[2048,2048] y) {
        a = Add(c, c)  e = Expand(a, s)  y = Add(x, e) }"""
    arrays = {"c": np.ones((1, 1), np.float32), "s": np.array([2048, 2048])}
    result = run(FoldConstants(), text, **arrays)
    assert result.ops == ["Expand", "Add"]
    assert "would add 16.0 MiB" in result.declined[0].reason


def test_total_growth_is_bounded() -> None:
    arrays = {"c": np.ones((1, 1), np.float32), "s": np.array([512, 512])}
    nodes = "\n".join(f"e{i} = Expand(c, s)  y{i} = Mul(x, e{i})" for i in range(4))
    outputs = ", ".join(f"float[512,512] y{i}" for i in range(4))
    model = parse(f"g (float[512,512] x) => ({outputs}) {{ {nodes} }}", **arrays)
    result = apply(FoldConstants(grow_total_bytes=3 << 20), model)
    assert result.counts["Expand"] == 1
    assert len(result.declined) == 1


def test_constant_graph_output_keeps_its_name() -> None:
    text = "g (float[2] x) => (float[2] y, float[2] c) { c = Add(w, w)  y = Add(x, c) }"
    result = run(FoldConstants(), text, w=weight(2))
    assert result.counts == {"Identity": 1, "Add": 1}


@pytest.mark.parametrize("op", ["RandomNormalLike", "Bernoulli"])
def test_random_ops_stay(op: str) -> None:
    text = f"g (float[2] x) => (float[2] y) {{ r = {op}(w)  z = Mul(r, k)  y = Add(x, z) }}"
    model = parse(text, w=np.full(2, 0.5, np.float32), k=np.ones(2, np.float32))
    assert apply(FoldConstants(), model).n_applied == 0


def test_fuel_bounds_the_number_of_folds() -> None:
    text = "g (float[2] x) => (float[2] y) { a = Neg(w)  b = Abs(v)  c = Add(x, a)  y = Add(c, b) }"
    model = parse(text, w=weight(2), v=weight(2))
    assert FoldConstants().run(model, Fuel(1)).n_applied == 1
    assert [n.op_type for n in model.graph] == ["Abs", "Add", "Add"]


def test_shape_arithmetic_vanishes() -> None:
    text = """g (float[2,6,4] x) => (float[2,24] y) {
        s = Shape<start=0, end=1>(x)  t = Concat<axis=0>(s, m)  y = Reshape(x, t) }"""
    shaped = run(FoldShapes(), text, m=np.array([-1]))
    assert shaped.n_applied == 1
    assert apply(FoldConstants(), shaped.model).ops == ["Reshape"]


def test_cast_like_needs_no_data() -> None:
    text = "g (float[3] x) => (float[3] y) { c = CastLike(w, x)  y = Add(x, c) }"
    result = run(FoldShapes(), text, w=np.array([1, 2, 3]))
    assert result.ops == ["Cast", "Add"]


def test_shape_of_data_dependent_value_is_declined() -> None:
    text = "g (float[5] x) => (int64[2] y) { n = NonZero(x)  y = Shape(n) }"
    result = run(FoldShapes(), text)
    assert result.n_applied == 0
    assert "depends on the data" in result.declined[0].reason
