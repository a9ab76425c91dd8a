"""Sparse deltas and low-rank branches."""

import numpy as np
import onnx_ir as ir
import pytest

from sparsegraph.delta import KEPT, MERGED, REMOVED, fold, settle_branches
from sparsegraph.demo_model import onnx_runner
from sparsegraph.errors import UsageError
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
    found, (row,) = settle_branches(model)
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
        ("m = Mul(u, s)", "m = Mul(u, p)"),
        ("q = Add(p, m)\n  y = Relu(q)", "y = Add(p, m)"),
    ],
)
def test_near_misses_stay(old: str, new: str) -> None:
    model = network(1.0, text=TEXT.replace(old, new))
    found, rows = settle_branches(model)
    assert rows == ()
    assert len(list(found.graph)) == len(list(model.graph))


def test_deltas_add_up_and_may_cancel() -> None:
    model = network(0.5)
    w = model.graph.initializers["w"].const_value.numpy()
    one, two = np.zeros_like(w), np.zeros_like(w)
    one[0, :4], two[0, 2:6] = 1, -1
    wipe = {"w": -w * (np.arange(24) < 12)}
    found, (row,) = fold(model, [{"w": one}, {"w": two}, wipe])
    after = found.graph.initializers["w"].const_value.numpy()
    np.testing.assert_allclose(after, w + one + two + wipe["w"], atol=1e-6)
    assert (after[1:, :12] == 0).all()
    assert row.density_after == np.count_nonzero(after) / after.size < row.density_before
    assert (model.graph.initializers["w"].const_value.numpy() == w).all()


@pytest.mark.parametrize(
    ("name", "shape", "text"), [("v", (16, 24), "no such weight"), ("w", (24, 16), r"need a flo")]
)
def test_deltas_of_another_model(name: str, shape: tuple[int, int], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        fold(network(1.0), [{name: np.zeros(shape)}])
