"""expand_einsum: every kind of label, weights, attention; what is declined and why."""

import numpy as np
import pytest
from sparsegraph.passes.expand_einsum import ExpandEinsum

from sparsegraph.graph import is_constant
from sparsegraph.pipeline import optimize
from tests.passes.check import parse, run, weight

SIZES = dict(zip("abcdefghijklmnopqrstuvwxyz", [2, 3, 4, 5, 2, 3] * 5, strict=False))


def shape(labels: str) -> str:
    return ",".join(str(SIZES[c]) for c in labels)


def einsum(equation: str, *, constant: int | None = None) -> list[str]:
    operands, _, result = equation.partition("->")
    terms = operands.split(",")
    names = ["x", "z"]
    inputs = [
        f"float[{shape(t)}] {n}" for i, (t, n) in enumerate(zip(terms, names)) if i != constant
    ]
    text = f"""g ({", ".join(inputs)}) => (float[{shape(result)}] y) {{
        y = Einsum<equation="{equation}">(x, z) }}"""
    arrays = {}
    if constant is not None:
        arrays[names[constant]] = weight(*(SIZES[c] for c in terms[constant]))
    result_of_pass = run(ExpandEinsum(), text, **arrays)
    assert result_of_pass.n_applied == 1
    return result_of_pass.ops


@pytest.mark.parametrize(
    "equation",
    [
        "bqhd,bkhd->bhqk", "bhqk,bkhd->bqhd", "bct,bcs->bts", "bts,bcs->bct", "ij,jk->ik",
        "ij,jk->ki", "ij,kj->", "ijk,kjl->il", "bnd,dhk->bnhk", "bnhk,hkd->bnd", "bi,bij->bj",
        "bij,bj->bi", "ij,j->i", "j,ij->i", "bij,jk->bk", "abij,abjk->abik", "aij,bjk->abik",
        "abcd,bde->ace", "i,ij->j",
    ],
)  # fmt: skip
@pytest.mark.parametrize("constant", [None, 0, 1])
def test_products_of_matrices(equation: str, constant: int | None) -> None:
    ops = einsum(equation, constant=constant)
    assert "Einsum" not in ops
    if equation != "ij,kj->":
        assert ops.count("MatMul") == 1


@pytest.mark.parametrize(
    ("shape", "equation", "out", "ops"),
    [
        ("1,2,3,2,2,4", "nhwpqc->nchpwq", "1,4,2,2,3,2", ["Transpose"]),
        ("2,3,4", "abc->b", "3", ["ReduceSum"]),
        ("2,3,4", "abc->ca", "4,2", ["ReduceSum", "Transpose"]),
        ("2,3,4", "...ab->...ba", "2,4,3", ["Transpose"]),
        ("3,4", "ba", "4,3", ["Transpose"]),
        ("3,4", "ab", "3,4", ["Identity"]),
    ],
)
def test_one_operand(shape: str, equation: str, out: str, ops: list[str]) -> None:
    text = (
        f"""g (float[{shape}] x) => (float[{out}] y) {{ y = Einsum<equation="{equation}">(x) }}"""
    )
    assert run(ExpandEinsum(), text).ops == ops


@pytest.mark.parametrize(
    ("operands", "equation", "out"),
    [
        ("float[2,3,4] x, float[4,5] z", "...ij,jk->...ik", "2,3,5"),
        ("float[2,3,4] x, float[2,3,5] z", "...ij,...ik->...jk", "2,4,5"),
        ("float[6,2,3,4] x, float[6,2,5,4] z", "...pd,...qd->p...q", "3,6,2,5"),
        ("float[3,6,2,4] x, float[4,5] z", "a...d,dk", "6,2,3,5"),
        ("float[3,4] x, float[4,5] z", "...d,dk->...k", "3,5"),
        ("float[3,4] x, float[4,5] z", "...ij,...jk->...ik", "3,5"),
        ("float[6,5,3] x, float[2,6,5] z", "...a,b...->...", "6,5"),
    ],
)
def test_an_ellipsis_is_spelled_out(operands: str, equation: str, out: str) -> None:
    text = f"""g ({operands}) => (float[{out}] y) {{ y = Einsum<equation="{equation}">(x, z) }}"""
    result = run(ExpandEinsum(), text)
    assert result.n_applied == 1
    assert "Einsum" not in result.ops


@pytest.mark.parametrize(
    ("equation", "ops"),
    [
        ("bi,bj->bij", ["Reshape", "Reshape", "Mul"]),
        ("bi,bi->b", ["Mul", "ReduceSum"]),
        ("ij,ij->ij", ["Mul"]),
        ("ij,ji->ij", ["Transpose", "Mul"]),
        ("ij,ij->", ["Mul", "ReduceSum"]),
        ("i,j->ji", ["Reshape", "Reshape", "Mul", "Transpose"]),
    ],
)
def test_products_without_a_matrix(equation: str, ops: list[str]) -> None:
    assert sorted(einsum(equation)) == sorted(ops)


def test_a_constant_is_the_weight_of_a_layer() -> None:
    text = """g (float[2,5,6] x) => (float[2,5,3,4] y) {
        y = Einsum<equation="hkd,bnd->bnhk">(w, x) }"""
    model = optimize(parse(text, w=weight(3, 4, 6))).model
    product, _ = list(model.graph)
    assert [n.op_type for n in model.graph] == ["MatMul", "Reshape"]
    assert is_constant(product.inputs[1])


def test_attention_in_einsums_becomes_one_node() -> None:
    text = """g (float[2,5,3,8] q, float[2,7,3,8] k, float[2,7,3,8] v) => (float[2,5,3,8] y) {
        s = Einsum<equation="bqhd,bkhd->bhqk">(q, k)  t = Mul(s, c)  p = Softmax<axis=-1>(t)
        y = Einsum<equation="bhqk,bkhd->bqhd">(p, v) }"""
    model = optimize(parse(text, c=np.array(0.35, np.float32))).model
    ops = [n.op_type for n in model.graph]
    assert "Attention" in ops
    assert "MatMul" not in ops


@pytest.mark.parametrize(
    ("inputs", "equation", "reason"),
    [
        ("float[3,3] x, float[3,4] z", "ii,ij->j", "a repeated label"),
        ("float[2,3,4] x, float[1,4,5] z", "...ij,...jk->...ik", "label a has sizes 2 and 1"),
        ("float[2,1] x, float[3,4] z", "ij,jk->ik", "label j has sizes 1 and 3"),
        ("int32[2,3] x, int32[3,4] z", "ij,jk->ik", "no floats"),
    ],
)
def test_what_is_declined(inputs: str, equation: str, reason: str) -> None:
    out = {"ii,ij->j": "float[4]", "...ij,...jk->...ik": "float[2,3,5]"}.get(equation, "float[2,4]")
    text = f"""g ({inputs}) => ({out.replace("float", inputs.partition("[")[0])} y) {{
        y = Einsum<equation="{equation}">(x, z) }}"""
    result = run(ExpandEinsum(), text)
    assert result.n_applied == 0
    assert reason in result.declined[0].reason


def test_three_operands_are_declined() -> None:
    text = """g (float[2,3] x) => (float[2,3] y) {
        y = Einsum<equation="ij,ij,ij->ij">(x, x, x) }"""
    assert "3 operands" in run(ExpandEinsum(), text).declined[0].reason


def test_the_implicit_result_is_in_alphabetical_order() -> None:
    text = """g (float[4,3] x, float[4,2] z) => (float[2,3] y) {
        y = Einsum<equation="jk,ji">(x, z) }"""
    assert run(ExpandEinsum(), text).n_applied == 1
