"""Products with one point in each of a few images: dense, in slots, and what has neither."""

import numpy as np
import onnx_ir as ir
import pytest
from sparsegraph.targets.kernels.slots import MOST_COLUMNS, ROWS
from sparsegraph.targets.kernels.vector_product import MOST_IMAGES
from sparsegraph.targets.layout import blocked

from sparsegraph import targets
from sparsegraph.compile import Compiled, compile
from sparsegraph.lower import choose, problem, trial
from sparsegraph.lower.problem import Operands
from sparsegraph.lower.single_point import has_zeros, suits
from tests.passes.check import parse, rng

TARGET = targets.native()
COLUMNS, N = 300, 130


def pruned(kept: float, rows: int, n: int = N, columns: int = COLUMNS) -> np.ndarray:
    """Groups of neighbouring rows have the same zeros; the last group may be smaller."""
    mask = rng().random((-(-n // rows), columns)) < kept
    weight = rng().standard_normal((n, columns)) * np.repeat(mask, rows, axis=0)[:n]
    return (weight / np.sqrt(columns)).astype(np.float32)


def compiled(body: str, shape: str, weight: np.ndarray, given: str = "") -> Compiled:
    model = parse(
        f"g (float[{shape},{COLUMNS}] x{given}) => (float[{shape},{N}] y) {{ {body} }}",
        w=weight.T.copy(), b=rng().standard_normal(N).astype(np.float32),
    )  # fmt: skip
    made = compile(ir.to_proto(model), keep_native=True)
    assert made.manifest.verification["max_rel_error"] <= 1e-5
    return made


def product(made: Compiled) -> str:
    feeds = {i.name: np.zeros(i.shape, np.float32) for i in made.session.get_inputs()}
    kernels = [step.kernel for step in made.session.profile(feeds)]
    (name,) = (k for k in kernels if k.startswith(("gemv", "spmm", "gemm")))
    return name


@pytest.mark.parametrize(
    ("shape", "n"),
    [
        ("1", 1),
        ("1,1", 1),
        ("2", 2),
        ("2,1", 2),
        (f"{MOST_IMAGES}", 8),
        (f"{MOST_IMAGES + 1},1", 9),
    ],
)
@pytest.mark.parametrize(("kept", "rows"), [(0.01, 1), (0.05, 1), (0.1, 8), (0.1, 16), (1.0, 1)])
def test_one_point(shape: str, n: int, kept: float, rows: int) -> None:
    """Several share the loads of a dense weight, or a tile if rows have zeros of their own."""
    weight = pruned(kept, rows)
    made = compiled("z = MatMul(x, w)  s = Add(z, b)  y = Relu(s)", shape, weight)
    name, is_single = product(made), suits(weight, n, TARGET)
    assert name.startswith("gemv") == is_single
    if n == 1 or rows == 1 or n > MOST_IMAGES:  # rows alike are nearly a tie
        assert is_single == (n == 1 or (kept == 1 and n <= MOST_IMAGES))
    assert ("coded" in name) == (kept < 1)


@pytest.mark.parametrize("kept", [0.05, 1.0])
def test_an_operand_with_points_is_added_afterwards(kept: float) -> None:
    body = "z = MatMul(x, w)  s = Add(z, b)  y = Add(s, r)"
    made = compiled(body, "1", pruned(kept, 1), given=f", float[1,{N}] r")
    assert product(made).startswith("gemv")


@pytest.mark.parametrize("batch", [2, 5])
def test_what_reads_several_points(batch: int) -> None:
    """A norm, a softmax, a product of many rows, another of few, and the caller."""
    text = f"""g (float[{batch},{COLUMNS}] x) => (float[{batch},{N}] z, float[{batch},{N}] n,
        float[{batch},{N}] s, float[{batch},77] y, float[1,{batch},{N}] t) {{
        z = MatMul(x, w)  n = LayerNormalization(z, g, b)  s = Softmax(z)  h = Add(n, s)
        y = MatMul(h, v)  a = Relu(z)  t = Reshape(a, size) }}"""
    model = parse(
        text, w=pruned(1.0, 1).T.copy(), v=pruned(0.1, 1, 77, N).T.copy(),
        g=np.linspace(0.5, 2, N, dtype=np.float32), b=rng().standard_normal(N).astype(np.float32),
        size=np.array([1, batch, N]),
    )  # fmt: skip
    made = compile(ir.to_proto(model), keep_native=True)
    assert made.fallback_nodes == []
    assert made.manifest.verification["max_rel_error"] <= 1e-5


@pytest.mark.parametrize("kept", [0.05, 1.0])
def test_a_chain_of_them_changes_no_layout(kept: float) -> None:
    """Rows in, rows out; an odd number of outputs, and a value that the caller reads too."""
    text = (
        f"g (float[1,{COLUMNS}] x) => (float[1,77] y, float[1,{N}] h)"
        "{ z = MatMul(x, w)  s = Add(z, b)  h = Relu(s)  y = MatMul(h, v) }"
    )
    model = parse(
        text, w=pruned(kept, 1).T.copy(), b=rng().standard_normal(N).astype(np.float32),
        v=pruned(kept, 1, 77, N).T.copy(),
    )  # fmt: skip
    made = compile(ir.to_proto(model), keep_native=True)
    assert made.manifest.verification["max_rel_error"] <= 1e-5
    steps = made.session.profile({"x": np.zeros((1, COLUMNS), np.float32)})
    assert [s.kernel.split("_")[0] for s in steps] == ["gemv"] * 2
    assert all("flat" in s.kernel for s in steps)


@pytest.mark.parametrize(("shape", "kept"), [("1", 0.05), ("4", 1.0), ("8,1", 1.0)])
def test_other_readers_get_features_of_one_point_and_rows_of_several(
    shape: str, kept: float
) -> None:
    body = "z = MatMul(x, w)  s = Softmax(z)  y = Add(s, z)"
    name = product(compiled(body, shape, pruned(kept, 1)))
    assert name.startswith("gemv")
    assert ("flat" in name) == (shape != "1")


@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16])
def test_rows_that_share_zeros_are_found(rows: int) -> None:
    machine = targets.get("x86-64-v4")
    x, y = (blocked(1, n, 1, 1, machine) for n in (1024, 1024))
    case = problem.of(Operands(pruned(0.1, rows, 1024, 1024), x, y, None), machine)
    assert case.single
    assert case.shared == (rows if rows in ROWS else 1)
    found = choose.choose(case, machine)
    assert found.weight == "slots"
    assert found.group in ([n for n in ROWS if n >= rows] if rows >= 4 else ROWS)
    tried = choose.candidates(case, machine)
    assert sorted(c.group for c in tried if c.weight == "slots") == list(ROWS)


def test_more_columns_than_a_number_has_bits_for() -> None:
    machine = targets.get("x86-64-v3")
    x, y = (blocked(1, n, 1, 1, machine) for n in (MOST_COLUMNS + 1, 2))
    weight = pruned(0.05, 1, 2, MOST_COLUMNS + 1)
    assert not problem.of(Operands(weight, x, y, None), machine).single


@pytest.mark.parametrize("kept", [0.05, 1.0])
@pytest.mark.parametrize("images", [1, 2])
def test_points_of_maps_as_sequences_of_one(kept: float, images: int) -> None:
    """MobileViT at its last stage: four pixels of one image are four images of one point."""
    n = 4 * images
    model = parse(
        f"""g (float[{images},{COLUMNS},2,2] x) => (float[{n},1,{N}] y) {{
            c = Conv(x, v)  r = Reshape(c, planes)  t = Transpose<perm=[0, 3, 2, 1]>(r)
            s = Reshape(t, rows)  y = MatMul(s, w) }}""",
        v=pruned(kept, 1, COLUMNS)[:, :, None, None], w=pruned(kept, 1).T.copy(),
        planes=np.array([images, COLUMNS, 1, 4]), rows=np.array([n, 1, COLUMNS]),
    )  # fmt: skip
    made = compile(ir.to_proto(model), keep_native=True)
    assert made.manifest.verification["max_rel_error"] <= 1e-5
    assert not made.fallback_nodes


HIDDEN = 2 * TARGET.l2_bytes // (4 * N)  # columns of a weight that leaves the level 2 cache


def behind(activation: str, weight: np.ndarray, batch: int = 1) -> tuple[Compiled, str]:
    """A product of h, compiled; and its kernel."""
    model = parse(
        f"""g (float[{batch},1,{HIDDEN}] x) => (float[{batch},1,{N}] y) {{
            {activation}  y = MatMul(h, w) }}""",
        w=weight, zero=np.array(0, np.float32), one=np.array(1, np.float32),
        two=np.array(2, np.float32), size=np.array([batch, 1, HIDDEN]),
    )  # fmt: skip
    made = compile(ir.to_proto(model), keep_native=True)
    return made, product(made)


@pytest.mark.parametrize(
    "activation",
    [
        "h = Relu(x)", "r = Relu(x)  h = Mul(r, r)", "r = Relu(x)  h = Pow(r, two)",
        "r = Relu(x)  h = Reshape(r, size)", "r = Clip(x, zero)  h = Identity(r)",
        "c = Greater(x, one)  h = Where(c, x, zero)", "h = Max(x, zero)",
        "r = Relu(x)  g = Sigmoid(x)  h = Mul(g, r)",
    ],
)  # fmt: skip
def test_zeros_of_activations_are_skipped(activation: str) -> None:
    weight = rng().standard_normal((HIDDEN, N)).astype(np.float32)
    made, kernel = behind(activation, weight)
    assert "skips" in kernel
    assert made.manifest.verification["max_rel_error"] <= 1e-5


@pytest.mark.parametrize(
    "activation",
    ["h = Gelu(x)", "h = Clip(x, one)", "r = Relu(x)  h = Add(r, x)", "h = Sigmoid(x)"],
)
def test_other_activations_are_read_whole(activation: str) -> None:
    assert "skips" not in behind(activation, np.ones((HIDDEN, N), np.float32))[1]


def test_a_tree_of_factors_is_searched_once() -> None:
    powers = "  ".join(f"p{i + 1} = Mul(p{i}, p{i})" for i in range(64))
    text = f"g (float[2] x) => (float[2] y) {{ p0 = Abs(x)  {powers}  y = Identity(p64) }}"
    assert not has_zeros(parse(text).graph.outputs[0].producer().inputs[0])


@pytest.mark.parametrize("images", [1, 4])
@pytest.mark.parametrize("kept", [0.1, 1.0])
def test_every_way_can_be_measured(images: int, kept: float) -> None:
    """A trial has no graph behind it."""
    weight = pruned(kept, 1)
    x, y = (blocked(images, n, 1, 1, TARGET) for n in (COLUMNS, N))
    operands = Operands(weight, x, y, None)
    for choice in choose.candidates(problem.of(operands, TARGET), TARGET):
        program = trial.lower(operands, choice, TARGET)
        assert [s.kernel.name.split("_")[0] for s in program.steps] == ["gemv"]


def test_small_weights_are_read_whole() -> None:
    made = compiled("h = Relu(x)  y = MatMul(h, w)", "1", pruned(1.0, 1))
    assert "skips" not in product(made)


def test_zero_times_infinity_is_not_skipped() -> None:
    weight = np.ones((HIDDEN, N), np.float32)
    weight[7, 5] = np.inf
    assert "skips" not in behind("h = Relu(x)", weight)[1]


@pytest.mark.parametrize("batch", [1, 3])
def test_any_number_of_zeros(batch: int) -> None:
    """None, all, one value alone, and NaN, which is no zero; each image has its own."""
    weight = rng().standard_normal((HIDDEN, N)).astype(np.float32)
    made, kernel = behind("h = Relu(x)", weight, batch)
    assert "skips" in kernel
    for fill, at in ((1.0, None), (-1.0, None), (-1.0, 3), (-1.0, HIDDEN - 1), (-1.0, 0)):
        x = np.full((batch, 1, HIDDEN), fill, np.float32)
        if at is not None:
            x[-1, 0, at] = 2.5
        (y,) = made.session.run(None, {"x": x})
        want = np.maximum(x, 0).astype(np.float64) @ weight
        assert np.abs(y - want).max() <= 1e-5 * np.abs(want).max()
    x[0, 0, 4] = np.nan
    (y,) = made.session.run(None, {"x": x})
    assert np.isnan(y[0]).all()
    assert np.isfinite(y[1:]).all()
