import json

import numpy as np
import pytest
from sparsegraph.passes.classify_masks import MASK, ClassifyMasks, classify

from tests.passes.check import apply, parse, run, weight

ZERO = np.array(0, np.float32)
HALF = (np.arange(8) % 2).astype(np.float32)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("y = Mul(x, half)", "constant"),
        ("c = Cast<to=1>(keep)  y = Mul(x, c)", "boolean"),
        ("y = Where(keep, x, zero)", "boolean"),
        ("r = Relu(g)  y = Mul(r, x)", "value"),
        ("r = Clip(g, zero)  y = Mul(x, r)", "value"),
        ("r = HardSigmoid(g)  y = Mul(x, r)", "value"),
        ("a = Abs(x)  c = Greater(a, t)  f = Cast<to=1>(c)  y = Mul(x, f)", "value"),
        ("r = Sigmoid(g)  y = Mul(x, r)", "soft"),
        ("r = Softmax(g)  y = Mul(x, r)", "soft"),
    ],
)
def test_kinds(body: str, kind: str) -> None:
    text = f"g (float[4,8] x, float[4,8] g, bool[4,8] keep) => (float[4,8] y) {{ {body} }}"
    model = parse(text, half=HALF, zero=ZERO, t=np.array(0.3, np.float32))
    result = apply(ClassifyMasks(), model)
    (note,) = [
        json.loads(n.metadata_props[MASK]) for n in result.model.graph if MASK in n.metadata_props
    ]
    assert note["kind"] == kind


@pytest.mark.parametrize("body", ["y = Mul(x, scale)", "y = Mul(x, g)", "y = Where(keep, x, g)"])
def test_scales_and_products_are_no_masks(body: str) -> None:
    text = f"g (float[4,8] x, float[4,8] g, bool[4,8] keep) => (float[4,8] y) {{ {body} }}"
    assert classify(parse(text, scale=weight(8))) == ([], [])


def test_float_mask_input_is_declined() -> None:
    text = "g (float[4,8] x, float[4,8] token_mask) => (float[4,8] y) { y = Mul(x, token_mask) }"
    result = run(ClassifyMasks(), text)
    assert "declare it a mask" in result.declined[0].reason


@pytest.mark.parametrize(
    ("row", "detail"),
    [
        ([0.0, 0.0, -1e9, -1e9], "50.0% blocked"),
        ([-1e9] * 4, "loses all keys"),
        ([0.5, 0.1, 0.0, -2.0], "no entry blocks"),
    ],
)
def test_constant_attention_masks(row: list[float], detail: str) -> None:
    text = """g (float[1,2,4,8] q, float[1,2,4,8] k, float[1,2,4,8] v) => (float[1,2,4,8] y) {
        y = Attention(q, k, v, mask) }"""
    records, _ = classify(parse(text, mask=np.array([row] * 4, np.float32)))
    assert detail in records[0].detail
