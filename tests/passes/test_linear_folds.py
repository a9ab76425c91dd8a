"""fold_batch_norm, split_batch_norm, fold_conv_bias, fold_scale, snap_near_zeros."""

import numpy as np
import pytest
from sparsegraph.passes.fold_batch_norm import FoldBatchNorm
from sparsegraph.passes.fold_conv_bias import FoldConvBias
from sparsegraph.passes.fold_scale import FoldScale
from sparsegraph.passes.snap_near_zeros import SNAPPED, SnapNearZeros
from sparsegraph.passes.split_batch_norm import SplitBatchNorm

from sparsegraph.errors import UsageError
from tests.passes.check import apply, parse, rng, run, weight


def norm(channels: int) -> dict[str, np.ndarray]:
    draw = rng()
    return {
        "gamma": draw.standard_normal(channels).astype(np.float32),
        "beta": draw.standard_normal(channels).astype(np.float32),
        "mean": draw.standard_normal(channels).astype(np.float32),
        "var": draw.uniform(0.5, 2, channels).astype(np.float32),
    }


BN = "BatchNormalization(c, gamma, beta, mean, var)"
X, Y = "float[1,4,6,6] x", "float[1,8,4,4] y"
LINEAR = {
    "conv": ("float[1,4,6,6] x", "float[1,8,4,4] y", "Conv(x, w)", (8, 4, 3, 3)),
    "conv bias": ("float[1,4,6,6] x", "float[1,8,4,4] y", "Conv(x, w, b)", (8, 4, 3, 3)),
    "grouped": ("float[1,4,6,6] x", "float[1,8,4,4] y", "Conv<group=2>(x, w)", (8, 2, 3, 3)),
    "padded": ("float[1,4,6,6] x", "float[1,8,6,6] y", "Conv<pads=[1,1,1,1]>(x,w,b)", (8, 4, 3, 3)),
    "transposed": ("float[1,4,6,6] x", "float[1,8,8,8] y", "ConvTranspose(x, w)", (4, 8, 3, 3)),
    "transposed grouped": (
        "float[1,4,6,6] x", "float[1,8,8,8] y", "ConvTranspose<group=2>(x, w, b)", (4, 4, 3, 3),
    ),
    "gemm": ("float[5,4] x", "float[5,8] y", "Gemm(x, w, b)", (4, 8)),
    "gemm transposed": (
        "float[5,4] x", "float[5,8] y", "Gemm<transB=1, alpha=0.5, beta=2.0>(x, w, b)", (8, 4),
    ),
    "matmul": ("float[5,4] x", "float[5,8] y", "MatMul(x, w)", (4, 8)),
}  # fmt: skip


@pytest.mark.parametrize("kind", LINEAR)
def test_batch_norm_folds(kind: str) -> None:
    source, output, op, shape = LINEAR[kind]
    w = weight(*shape)
    w[np.abs(w) < 0.7] = 0
    text = f"g ({source}) => ({output}) {{ c = {op}  y = {BN} }}"
    result = run(FoldBatchNorm(), text, w=w, b=weight(8), **norm(8))
    op_type = op.split("<")[0].split("(")[0]
    assert result.ops == ([op_type, "Add"] if op_type == "MatMul" else [op_type])
    folded = result.node(op_type).inputs[1]
    assert folded is not None
    assert folded.const_value is not None
    np.testing.assert_array_equal(folded.const_value.numpy() == 0, w == 0)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"g ({X}) => ({Y}, float[1,8,4,4] c) {{ c = Conv(x, w)  y = {BN} }}", "other users"),
        (f"g ({X}, float[8,4,3,3] v) => ({Y}) {{ c = Conv(x, v)  y = {BN} }}",
         "weight is not constant"),
        (f"g ({X}) => ({Y}, float[1,8,4,4] z) {{ c = Conv(x, w)  y = {BN}  z = Conv(x, w) }}",
         "shared"),
        ("g (float[1,4,6,6] x, float[8] s) => (float[1,8,4,4] y) { c = Conv(x, w)  "
         "y = BatchNormalization(c, s, beta, mean, var) }", "not constant"),
        ("g (float[2,3,4] x) => (float[2,3,5] y) { c = MatMul(x, m)  "
         "y = BatchNormalization(c, g3, b3, m3, v3) }", "channels of the linear op"),
    ],
)  # fmt: skip
def test_batch_norm_declines(text: str, reason: str) -> None:
    small = {k[0] + "3": v[:3] for k, v in norm(8).items()}
    result = run(FoldBatchNorm(), text, w=weight(8, 4, 3, 3), m=weight(4, 5), **norm(8), **small)
    assert result.n_applied == 0
    assert reason in result.declined[0].reason


def test_left_over_batch_norm_is_split() -> None:
    text = f"g (float[1,8,4,4] x) => (float[1,8,4,4] y) {{ c = Relu(x)  y = {BN} }}"
    assert run(SplitBatchNorm(), text, **norm(8)).ops == ["Relu", "Mul", "Add"]


@pytest.mark.parametrize("op", ["Add(c, k)", "Add(k, c)", "Sub(c, k)", "Mul(c, k)", "Div(c, k)"])
@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1, 1), (), (1,)])
def test_conv_arithmetic_folds(op: str, shape: tuple[int, ...]) -> None:
    text = f"g (float[1,4,6,6] x) => (float[1,8,4,4] y) {{ c = Conv(x, w, b)  y = {op} }}"
    result = run(FoldConvBias(), text, w=weight(8, 4, 3, 3), b=weight(8), k=weight(*shape) + 3)
    assert result.ops == ["Conv"]


@pytest.mark.parametrize(
    ("op", "shape", "reason"),
    [
        ("Add(c, k)", (4,), "another axis"),
        ("Mul(c, k)", (1, 8, 4, 4), "another axis"),
        ("Add(c, k)", (2, 8, 1, 1), "changes the shape"),
        ("Div(c, z)", (8, 1, 1), "not finite"),
    ],
)
def test_conv_arithmetic_declines(op: str, shape: tuple[int, ...], reason: str) -> None:
    text = f"g (float[1,4,6,6] x) => (float[n,8,4,4] y) {{ c = Conv(x, w)  y = {op} }}"
    arrays = {"k": weight(*shape), "z": np.zeros((8, 1, 1), np.float32)}
    result = run(FoldConvBias(), text, w=weight(8, 4, 3, 3), **arrays)
    assert result.n_applied == 0
    assert reason in result.declined[0].reason


def test_divided_by_first_operand_is_no_scale() -> None:
    text = "g (float[1,4,6,6] x) => (float[1,8,4,4] y) { c = Conv(x, w)  y = Div(k, c) }"
    assert run(FoldConvBias(), text, w=weight(8, 4, 3, 3), k=weight(8, 1, 1)).n_applied == 0


def test_matmul_scale_folds_behind_its_bias() -> None:
    text = """g (float[2,3,4] x) => (float[2,3,5] y) {
        p = MatMul(x, w)  a = Add(b, p)  y = Mul(a, s) }"""
    result = run(FoldScale(), text, w=weight(4, 5), b=weight(5), s=np.array(0.25, np.float32))
    assert result.ops == ["MatMul", "Add"]


def test_matmul_scale_per_column() -> None:
    text = "g (float[2,3,4] x) => (float[2,3,5] y) { p = MatMul(x, w)  y = Div(p, s) }"
    result = run(FoldScale(), text, w=weight(4, 5), s=weight(5) + 4)
    assert result.ops == ["MatMul"]


def test_gemm_takes_an_add() -> None:
    text = "g (float[3,4] x) => (float[3,5] y) { p = Gemm<beta=0.5>(x, w, b)  y = Add(p, s) }"
    assert run(FoldScale(), text, w=weight(4, 5), b=weight(5), s=weight(5)).ops == ["Gemm"]


def test_matmul_bias_stays_an_add() -> None:
    text = "g (float[2,3,4] x) => (float[2,3,5] y) { p = MatMul(x, w)  y = Add(p, b) }"
    result = run(FoldScale(), text, w=weight(4, 5), b=weight(5))
    assert result.n_applied == 0
    assert not result.declined


def test_scale_per_row_is_declined() -> None:
    text = "g (float[3,4] x) => (float[3,5] y) { p = MatMul(x, w)  y = Mul(p, s) }"
    result = run(FoldScale(), text, w=weight(4, 5), s=weight(3, 1))
    assert "another axis" in result.declined[0].reason


def test_snapping_reports_the_measured_change() -> None:
    w = weight(16, 8)
    w[0, :4] = 1e-3
    model = parse("g (float[4,16] x) => (float[4,8] y) { y = MatMul(x, w) }", w=w)
    result = apply(SnapNearZeros(1e-2), model)
    assert result.n_applied == 1
    assert np.count_nonzero(result.weight("w") == 0) >= 4
    assert int(result.model.graph.initializers["w"].metadata_props[SNAPPED]) >= 4
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), w)


def test_snapping_never_empties_a_layer() -> None:
    model = parse("g (float[4,16] x) => (float[4,8] y) { y = MatMul(x, w) }", w=weight(16, 8))
    result = apply(SnapNearZeros(1e3), model)
    assert "all its weights" in result.declined[0].reason


def test_negative_threshold_is_refused() -> None:
    with pytest.raises(UsageError, match="at least 0"):
        SnapNearZeros(-1.0)
