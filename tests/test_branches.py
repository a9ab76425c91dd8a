"""Low-rank branches: merged, kept or removed."""

import numpy as np
import onnx_ir as ir
import pytest

from sparsegraph import targets
from sparsegraph.branches import KEPT, MERGED, REMOVED, settle
from sparsegraph.demo_model import onnx_runner
from sparsegraph.lower import partition
from sparsegraph.pipeline import optimize
from sparsegraph.program import Program
from tests.test_permute import filled

SEED = 2
TEXT = """<ir_version: 9, opset_import: ["" : 18]>
net (float[3, 16] x, float[16, 24] w, float[16, 2] a, float[2, 24] b) => (float[3, 24] y)
<float s = {0.5}>
{
  p = MatMul(x, w)
  d = MatMul(x, a)
  u = MatMul(d, b)
  m = Mul(u, s)
  q = Add(p, m)
  y = Relu(q)
}"""


def network(density: float, *, is_zero: bool = False, text: str = TEXT) -> ir.Model:
    generator = np.random.default_rng(SEED)

    def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
        array = generator.normal(size=shape)
        if name == "w":
            array = array * (generator.random(shape) < density)
        return array * 0 if name == "b" and is_zero else array

    return filled(text, weight)


def run(model: ir.Model) -> np.ndarray:
    x = np.random.default_rng(1).normal(size=(3, 16)).astype(np.float32)
    return onnx_runner(model, threads=1)({"x": x})


@pytest.mark.parametrize(
    ("density", "is_zero", "fate", "n_nodes"),
    [(1.0, False, MERGED, 2), (0.3, False, KEPT, 6), (0.3, True, REMOVED, 2)],
)
def test_a_branch_goes_the_cheaper_way(
    density: float, is_zero: bool, fate: str, n_nodes: int
) -> None:
    model = network(density, is_zero=is_zero)
    found, (row,) = settle(model)
    assert (row.weight, row.rank, row.fate) == ("w", 2, fate)
    assert len(list(found.graph)) == n_nodes
    np.testing.assert_allclose(run(found), run(model), rtol=1e-4, atol=1e-5)
    array = found.graph.initializers["w"].const_value.numpy()
    assert (array != 0).mean() == pytest.approx(density, abs=0.06)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("d = MatMul(x, a)", "z = Neg(x) d = MatMul(z, a)"),
        ("y = Relu(q)", "y = Add(q, u)"),
        ("y = Relu(q)", "y = Add(q, p)"),
        ("y = Relu(q)", "z = MatMul(x, w) y = Add(q, z)"),
        ("m = Mul(u, s)", "m = Mul(u, p)"),
    ],
)
def test_near_misses_stay(old: str, new: str) -> None:
    model = network(1.0, text=TEXT.replace(old, new))
    found, rows = settle(model)
    assert rows == ()
    assert len(list(found.graph)) == len(list(model.graph))


GEMM = """<ir_version: 9, opset_import: ["" : 18]>
net (float[3, 16] x, float[24, 16] w, float[24] c, float[2, 16] a, float[24, 2] b
) => (float[3, 24] y)
{
  p = Gemm<transB = 1, alpha = 2.0>(x, w, c)
  d = Gemm<transB = 1, alpha = 3.0>(x, a)
  u = Gemm<transB = 1, alpha = 0.5>(d, b)
  y = Add(u, p)
}"""
BIASED = TEXT.replace("float[2, 24] b)", "float[2, 24] b, float[24] c)").replace(
    "q = Add(p, m)", "r = Add(c, p) q = Add(r, m)"
)
CONV = """<ir_version: 9, opset_import: ["" : 18]>
net (float[1, 8, 6, 6] x, float[16, 8, 3, 3] w, float[2, 8, 3, 3] a, float[16, 2, 1, 1] b
) => (float[1, 16, 3, 3] y)
<float s = {0.5}>
{
  p = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(x, w)
  d = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(x, a)
  u = Conv(d, b)
  m = Div(u, s)
  y = Add(p, m)
}"""
SHAPES = {"conv": (1, 8, 6, 6)}


@pytest.mark.parametrize("kind", ["gemm", "biased", "conv"])
def test_every_kind_of_layer_is_merged_with_its_factors(kind: str) -> None:
    model = network(1.0, text={"gemm": GEMM, "biased": BIASED, "conv": CONV}[kind])
    found, (row,) = settle(model)
    assert (row.fate, row.rank) == (MERGED, 2)
    assert [v.name for v in found.graph.outputs] == ["y"]
    assert "a" not in found.graph.initializers
    x = np.random.default_rng(1).normal(size=SHAPES.get(kind, (3, 16))).astype(np.float32)
    have, want = (onnx_runner(one, threads=1)({"x": x}) for one in (found, model))
    np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-4)


OTHER_AXIS = """<ir_version: 9, opset_import: ["" : 18]>
net (float[1, 2, 16] x, float[16, 2] w, float[16, 2] a, float[2, 2, 1] b) => (float[1, 2, 2] y)
{
  p = MatMul(x, w)
  d = MatMul(x, a)
  u = Conv(d, b)
  y = Add(p, u)
}"""
STRIDED = "Conv<pads = [1, 1, 1, 1], strides = [2, 2]>"
FAR = "Conv<pads = [2, 2, 2, 2], strides = [2, 2], dilations = [2, 2]>"


@pytest.mark.parametrize(
    ("text", "old", "new"),
    [
        (GEMM, "a, float", "a, float[2] e, float"),
        (CONV, f"d = {STRIDED}", f"d = {FAR}"),
        (CONV, f"d = {STRIDED}(x, a)\n  u = Conv", f"d = Conv(x, a)\n  u = {STRIDED}"),
        (CONV, "Div(u, s)", "Div(s, u)"),
        (CONV, "u = Conv(d, b)", "u = Conv<strides = [3, 3]>(d, b)"),
        (CONV, "u = Conv(d, b)", f"u = {STRIDED}(d, b)"),
        (BIASED, "y = Relu(q)", "y = Add(q, r)"),
        (OTHER_AXIS, "", ""),
    ],
)
def test_branches_that_compute_something_else_stay(text: str, old: str, new: str) -> None:
    assert old in text
    text = text.replace(old, new).replace("(x, a)\n  u = Gemm", "(x, a, e)\n  u = Gemm")
    assert settle(network(1.0, text=text))[1] == ()


def test_zeros_in_a_pattern_are_never_filled() -> None:
    """Rank 12 apart multiplies more than a merged dense weight would; 2:4 stays all the same."""
    model = network(1.0, text=TEXT.replace("16, 2]", "16, 12]").replace("[2, 24]", "[12, 24]"))
    value = model.graph.initializers["w"]
    array = value.const_value.numpy() * (np.arange(16) % 4 < 2)[:, None]
    value.const_value = ir.tensor(array, name="w")
    found, (row,) = settle(model)
    assert (row.fate, row.n_apart > row.n_merged) == (KEPT, True)
    np.testing.assert_array_equal(found.graph.initializers["w"].const_value.numpy(), array)
    assert (row.density_before, row.density_merged) == (0.5, 1.0)
    merged, (row,) = settle(model, few=1)
    assert row.fate == MERGED
    np.testing.assert_allclose(run(merged), run(model), rtol=1e-4, atol=1e-4)


def test_a_branch_inside_the_mask_is_merged() -> None:
    """What the low rank adds only where weights are: no zero is lost."""
    model = network(1.0)
    keep = np.arange(24) < 12
    for name in ("w", "b"):
        value = model.graph.initializers[name]
        value.const_value = ir.tensor(value.const_value.numpy() * keep, name=name)
    found, (row,) = settle(model)
    assert (row.fate, row.density_merged) == (MERGED, 0.5)
    np.testing.assert_allclose(run(found), run(model), rtol=1e-4, atol=1e-5)


def test_the_sum_of_a_kept_branch_is_computed_by_a_product() -> None:
    """Three products and the layout changes at the borders: no call for scale, sum or ReLU."""
    wide = BIASED.replace("[3,", "[32,").replace("16", "64").replace("24", "96")
    found, _ = settle(network(0.2, text=wide))
    plan = partition.plan(optimize(found).model, targets.get("x86-64-v3"))
    (program,) = plan.segments
    assert isinstance(program, Program)
    steps = [step.kernel.name.split("_")[0] for step in program.steps]
    assert sorted(steps) == ["gemm", "gemm", "spmm", "transpose", "transpose"]
    (last,) = (step for step in program.steps if "Relu" in step.nodes)
    assert "Add" in last.nodes
    assert "MatMul" in " ".join(last.nodes)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("m = Mul(u, s)", "zero = Sub(s, s)  m = Div(u, zero)"),
        ("p = MatMul(x, w)", "p = Gemm<alpha=0.0>(x, w)"),
    ],
)
def test_a_factor_of_zero_is_not_divided_by(old: str, new: str) -> None:
    model = optimize(network(1.0, text=TEXT.replace(old, new)), verify=False).model
    assert settle(model)[1] == ()
