"""unflatten_add, merge_masks: a shifted window's mask becomes one constant below its softmax."""

import numpy as np
import pytest
from sparsegraph.passes.merge_masks import MergeMasks
from sparsegraph.passes.unflatten_add import UnflattenAdd

from sparsegraph.pipeline import optimize
from sparsegraph.rewrite import FROM
from tests.passes.check import parse, run, weight

WINDOWS = """g (float[B,2,5,5] x) => (float[B,2,5,5] y) {
    a = Reshape(x, split)  b = Add(a, mask)  c = Reshape(b, whole)  y = Relu(c) }"""
SCORES = """g (float[2,5,5] x) => (float[2,5,5] y) {
    a = Add(x, table)  b = Add(mask, a)  y = Softmax<axis=-1>(b) }"""


def reshaped(batch: int, mask: np.ndarray) -> dict[str, np.ndarray]:
    images = batch // 3
    return {
        "split": np.array([images, 3, 2, 5, 5]), "whole": np.array([batch, 2, 5, 5]), "mask": mask
    }  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "want"),
    [
        ((1, 3, 1, 5, 5), (3, 1, 5, 5)),
        ((3, 1, 5, 5), (3, 1, 5, 5)),
        ((2, 1, 1), (1, 2, 1, 1)),
        ((), (1, 1, 1, 1)),
    ],
)
def test_a_mask_is_added_in_the_shape_of_the_scores(
    shape: tuple[int, ...], want: tuple[int, ...]
) -> None:
    result = run(UnflattenAdd(), WINDOWS.replace("B", "3"), **reshaped(3, weight(*shape)))
    assert result.ops == ["Add", "Relu"]
    assert result.weight("mask_reshaped").shape == want
    assert result.model.graph.initializers["mask_reshaped"].metadata_props[FROM] == "mask"


def test_a_mask_of_windows_is_repeated_for_every_image() -> None:
    result = run(UnflattenAdd(), WINDOWS.replace("B", "6"), **reshaped(6, weight(1, 3, 1, 5, 5)))
    assert result.weight("mask_reshaped").shape == (6, 1, 5, 5)


@pytest.mark.parametrize(
    "body",
    [
        "a = Reshape(x, split)  b = Add(a, mask)  c = Reshape(b, turned)",
        "a = Reshape(x, split)  b = Add(a, z)  c = Reshape(b, whole)",
        "a = Reshape(x, split)  b = Add(a, mask)  d = Relu(b)  c = Reshape(b, whole)",
        "a = Reshape(x, split)  b = Mul(a, mask)  c = Reshape(b, whole)",
    ],
)
def test_other_sums_between_reshapes_stay(body: str) -> None:
    shape = "6,5,5" if "turned" in body else "3,2,5,5"
    text = f"""g (float[3,2,5,5] x, float[1,3,1,5,5] z) => (float[{shape}] y, float[1,3,2,5,5] e) {{
        {body}  y = Relu(c)  f = Reshape(z, split_z)  g1 = Expand(f, split)
        e = {"Add(g1, d)" if " d = " in body else "Relu(g1)"} }}"""
    result = run(
        UnflattenAdd(), text, **reshaped(3, weight(1, 3, 1, 5, 5)), turned=np.array([6, 5, 5]),
        split_z=np.array([1, 3, 1, 5, 5]),
    )  # fmt: skip
    assert (result.n_applied, result.declined) == (0, ())


def test_a_broadcast_operand_stays() -> None:
    text = """g (float[2,1] x) => (float[2,1] y) {
        a = Reshape(x, row)  b = Add(a, mask)  y = Reshape(b, column) }"""
    arrays = {"row": np.array([1, 2]), "column": np.array([2, 1])}
    assert run(UnflattenAdd(), text, mask=weight(1, 2), **arrays).n_applied == 1
    text = text.replace("float[2,1] y", "float[4,1] y")
    arrays["column"] = np.array([4, 1])
    assert run(UnflattenAdd(), text, mask=weight(2, 2), **arrays).n_applied == 0


def test_a_mask_that_would_grow_stays_with_a_reason() -> None:
    text = """g (float[600,2000] x) => (float[600,2000] y) {
        a = Reshape(x, split)  b = Add(a, mask)  y = Reshape(b, whole) }"""
    arrays = {"split": np.array([300, 2, 2000]), "whole": np.array([600, 2000])}
    result = run(UnflattenAdd(), text, mask=weight(1, 2, 2000), **arrays)
    assert [d.reason for d in result.declined] == ["the constant would take 4.6 MiB"]


def test_masks_of_one_softmax_become_one() -> None:
    mask = np.where(weight(5, 5) > 0, -np.inf, 0).astype(np.float32)
    mask[:, 0] = 0
    result = run(MergeMasks(), SCORES, table=weight(2, 5, 5), mask=mask)
    assert result.ops == ["Add", "Softmax"]
    assert result.model.graph.initializers["table_sum"].metadata_props[FROM] == "table,mask"


def test_masks_that_cancel_stay_with_a_reason() -> None:
    mask = np.full((5, 5), -1e6, np.float32)
    result = run(MergeMasks(), SCORES, table=np.full((2, 1, 1), 1e6, np.float32), mask=mask)
    assert [d.reason for d in result.declined] == [
        "the constants cancel: x is rounded between them"
    ]


@pytest.mark.parametrize(
    "body",
    [
        "a = Add(x, table)  b = Add(a, mask)  y = Relu(b)",
        "a = Add(x, table)  b = Add(a, a)  y = Softmax<axis=-1>(b)",
        "a = Add(x, table)  b = Add(a, mask)  c = Softmax<axis=-1>(b)  y = Mul(c, a)",
        "a = Mul(x, table)  b = Add(a, mask)  y = Softmax<axis=-1>(b)",
    ],
)
def test_other_chains_stay(body: str) -> None:
    text = f"g (float[2,5,5] x) => (float[2,5,5] y) {{ {body} }}"
    result = run(MergeMasks(), text, table=weight(2, 5, 5), mask=weight(5, 5))
    assert (result.n_applied, result.declined) == (0, ())


def test_shifted_windows_become_one_attention() -> None:
    text = """g (float[4,2,9,8] q, float[4,2,8,9] k, float[4,2,9,8] v) => (float[4,2,9,8] y) {
        s = MatMul(q, k)  a = Add(s, table)  w = Reshape(a, split)  m = Add(w, mask)
        c = Reshape(m, whole)  p = Softmax<axis=-1>(c)  y = MatMul(p, v) }"""
    mask = np.where(weight(1, 4, 1, 9, 9) > 1, -100, 0).astype(np.float32)
    model = parse(
        text, table=weight(1, 2, 9, 9), mask=mask, split=np.array([1, 4, 2, 9, 9]),
        whole=np.array([4, 2, 9, 9]),
    )  # fmt: skip
    assert "Attention" in [n.op_type for n in optimize(model).model.graph]
