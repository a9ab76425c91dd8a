"""Products whose constant stands on the left, and every form of Gemm, against ONNX Runtime."""

import itertools

import numpy as np
import onnx_ir as ir
import pytest

from sparsegraph import pipeline, targets, verify
from sparsegraph.compile import compile
from sparsegraph.inspect import inspect
from sparsegraph.lower import partition
from sparsegraph.program import Program
from tests.passes.check import parse

LEADS = ((), (1,), (3,), (9,), (2, 3))


def matrix(rows: int, columns: int, density: float = 0.1) -> np.ndarray:
    rng = np.random.default_rng(rows * columns)
    full = rng.standard_normal((rows, columns)).astype(np.float32)
    return np.where(rng.random((rows, columns)) < density, full, np.float32(0))


def extents(*shape: int) -> str:
    return ",".join(map(str, shape))


def check(model: ir.Model, formats: list[str] | None = None, threads: int = 1) -> None:
    """All of it is native, in these forms, and right."""
    compiled = compile(model, keep_native=True, check=False, threads=threads)
    assert compiled.fallback_nodes == []
    if formats is not None:
        assert [layer["format"] for layer in compiled.manifest.layers] == formats
    for feed in verify.feeds_for(model):
        wanted = verify.Session(model).run(feed)
        found = dict(zip(wanted, compiled.run(None, feed), strict=True))
        assert verify.compare(found, wanted) < 1e-5


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("points", [1, 5, 64, 100])
def test_matrices_on_the_left(lead: tuple[int, ...], points: int) -> None:
    given, made = extents(*lead, 96, points), extents(*lead, 40, points)
    text = f"""g (float[{given}] x) => (float[{made}] y) {{
        a = MatMul(w, x)  b = Add(a, e)  y = Relu(b) }}"""
    check(parse(text, w=matrix(40, 96), e=matrix(40, 1, 1)))


@pytest.mark.parametrize("points", [1, 33])
def test_chains_and_what_they_read(points: int) -> None:
    """Bias per row, residual, a second product from the left and one from the right."""
    text = f"""g (float[4,48,{points}] x, float[4,48,{points}] r) => (float[4,48,6] y) {{
        a = MatMul(w, x)  b = Add(a, e)  c = Gelu(b)  d = Add(c, r)
        f = MatMul(u, d)  g = Sigmoid(f)  y = MatMul(g, v) }}"""
    made = {"w": matrix(48, 48), "e": matrix(48, 1, 1), "u": matrix(48, 48, 0.2)}
    check(parse(text, **made, v=matrix(points, 6, 1)), threads=2)


@pytest.mark.parametrize(
    ("at", "left", "right", "bias"),
    list(itertools.product((0, 1), (0, 1), (0, 1), (None, (1, 1), "feature"))),
)
def test_every_form_of_gemm(at: int, left: int, right: int, bias: object) -> None:
    m, k, n = 24, 56, 24
    shapes = [(k, m) if left else (m, k), (n, k) if right else (k, n)]
    weight, given = matrix(*shapes[at]), shapes[1 - at]
    operands = ["w" if i == at else "x" for i in (0, 1)]
    constants = {"w": weight}
    if bias is not None:
        wanted = (1, n) if at else (m, 1)
        constants["c"] = matrix(*(wanted if bias == "feature" else bias), 1)
        operands.append("c")
    text = f"""g (float[{extents(*given)}] x) => (float[{m},{n}] y) {{
        a = Gemm<transA={left},transB={right},alpha=0.7,beta=1.3>({", ".join(operands)})
        y = Relu(a) }}"""
    check(parse(text, **constants), ["coded"])


@pytest.mark.parametrize("shape", [(24, 1), (24, 24)])
def test_what_gemm_adds_is_no_bias_across_features(shape: tuple[int, int]) -> None:
    """As many rows as columns: a column is not taken for a row."""
    text = "g (float[24,56] x) => (float[24,24] y) { y = Gemm(x, w, c) }"
    model = parse(text, w=matrix(56, 24), c=matrix(*shape, 1))
    compiled = compile(model, keep_native=True)
    (left,) = compiled.fallback_nodes
    assert left == model.graph[0].name


def test_inspect_prices_them() -> None:
    text = "g (float[512,64] x) => (float[256,64] y) { y = MatMul(w, x) }"
    (row,) = inspect(parse(text, w=matrix(256, 512))).layers
    assert row.format == "coded"
    assert row.speedup > 2
    (dense,) = inspect(parse(text, w=matrix(256, 512, 1))).layers
    assert dense.format == "dense"


def test_integers_are_left() -> None:
    text = "g (int32[2,3,8,4] x) => (int32[2,3,5,4] y) { y = MatMul(w, x) }"
    model = parse(text, w=np.ones((5, 8), np.int32))
    compiled = compile(model, keep_native=True)
    assert len(compiled.fallback_nodes) == 1


TURNED = {  # what is read -> kernel calls: into features, products, out of them
    "left": ("g (float[48,96] x) => (float[40,48] y) { t = Transpose(x) y = MatMul(w, t) }", 3),
    "and_back": (
        """g (float[48,96] x) => (float[48,40] y) {
        t = Transpose(x)  z = MatMul(w, t)  y = Transpose(z) }""",
        3,
    ),
    "gemm": (
        "g (float[96,48] x) => (float[48,40] y) { t = Transpose(x) y = Gemm<transB=1>(t, w) }",
        3,
    ),
    "mixer": (
        """g (float[2,96,48] x) => (float[2,40,48] y) {
        t = Transpose<perm=[0,2,1]>(x)  z = MatMul(t, v)  a = Gelu(z)
        y = Transpose<perm=[0,2,1]>(a) }""",
        3,
    ),
}


@pytest.mark.parametrize("case", TURNED)
def test_transposes_before_products_move_nothing(case: str) -> None:
    text, n_steps = TURNED[case]
    made = {"w": matrix(40, 96), "v": matrix(96, 40)}
    model = parse(text, **{k: v for k, v in made.items() if f"{k}," in text or f", {k})" in text})
    check(model, ["coded"])
    optimized = pipeline.optimize(model, verify=False).model
    (program,) = partition.plan(optimized, targets.native()).segments
    assert isinstance(program, Program)
    assert len(program.steps) <= n_steps


def test_a_transpose_that_others_read_too() -> None:
    text = """g (float[2,96,48] x) => (float[2,40,96] y, float[2,48,96] p, float[2,48,40] q) {
        t = Transpose<perm=[0,2,1]>(x)  y = MatMul(w, t)  p = Relu(t)  q = MatMul(t, v) }"""
    check(parse(text, w=matrix(40, 48), v=matrix(96, 40)), ["coded", "coded"])
