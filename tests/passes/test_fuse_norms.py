"""fuse_rms_norm, fuse_group_norm."""

import numpy as np
import pytest
from sparsegraph.passes.fuse_group_norm import FuseGroupNorm
from sparsegraph.passes.fuse_rms_norm import FuseRmsNorm

from tests.passes.check import Result, run, weight

GAMMA = weight(16) + 2
NUMBERS = {
    "one": np.array(1, np.float32), "two": np.array(2, np.float32),
    "half": np.array(0.5, np.float32), "minus": np.array(-0.5, np.float32),
    "eps": np.array(1e-3, np.float32), "gamma": GAMMA, "last": np.array([-1]),
}  # fmt: skip
MEAN = "q = Mul(x, x)  m = ReduceMean(q, last)  e = Add(m, eps)"


def rms(body: str, opset: int = 23, inputs: str = "", **arrays: np.ndarray) -> Result:
    text = f"g (float[2,5,16] x{inputs}) => (float[2,5,16] y) {{ {body} }}"
    return run(FuseRmsNorm(), text, opset, **{**NUMBERS, **arrays})


@pytest.mark.parametrize("square", ["q = Pow(x, two)", "q = Mul(x, x)"])
@pytest.mark.parametrize("total", ["e = Add(m, eps)", "e = Add(eps, m)"])
@pytest.mark.parametrize(
    "quotient",
    [
        "r = Sqrt(e)  i = Reciprocal(r)  n = Mul(x, i)  y = Mul(gamma, n)",  # torch.rsqrt
        "r = Sqrt(e)  i = Reciprocal(r)  n = Mul(i, x)  y = Mul(n, gamma)",
        "r = Sqrt(e)  n = Div(x, r)  y = Mul(n, gamma)",
        "r = Pow(e, half)  i = Div(one, r)  n = Mul(x, i)  y = Mul(n, gamma)",
        "i = Pow(e, minus)  n = Mul(x, i)  y = Mul(n, gamma)",
        "r = Sqrt(e)  i = Reciprocal(r)  s = Mul(i, gamma)  y = Mul(x, s)",
        "r = Sqrt(e)  s = Mul(gamma, x)  y = Div(s, r)",
        "r = Sqrt(e)  i = Reciprocal(r)  s = Mul(x, gamma)  y = Mul(i, s)",
    ],
)
def test_every_way_to_write_it(square: str, total: str, quotient: str) -> None:
    result = rms(f"{square}  m = ReduceMean(q, last)  {total}  {quotient}")
    assert result.ops == ["RMSNormalization"]
    node = result.node("RMSNormalization")
    assert node.attributes["epsilon"].as_float() == pytest.approx(1e-3)
    assert node.attributes["axis"].as_int() == -1
    scale = node.inputs[1]
    assert scale is not None
    assert np.array_equal(scale.const_value.numpy(), GAMMA)


def test_without_a_scale_and_with_a_bias_behind() -> None:
    result = rms(f"{MEAN}  r = Sqrt(e)  n = Div(x, r)  y = Add(n, gamma)")
    assert result.ops == ["RMSNormalization", "Add"]


def test_two_scales_and_two_axes() -> None:
    body = f"{MEAN}  r = Sqrt(e)  n = Div(x, r)  s = Mul(n, gamma)  y = Mul(grid, s)"
    result = rms(body, last=np.array([-2, -1]), grid=weight(5, 16))
    assert result.ops == ["RMSNormalization"]
    assert result.node("RMSNormalization").attributes["axis"].as_int() == -2


def test_a_scale_from_outside_stays_a_product() -> None:
    body = f"{MEAN}  r = Sqrt(e)  n = Div(x, r)  y = Mul(n, given)"
    assert rms(body, inputs=", float[16] given").ops == ["RMSNormalization", "Mul"]


@pytest.mark.parametrize(
    ("body", "arrays", "reason"),
    [
        (f"{MEAN}  r = Sqrt(e)  y = Div(x, r)", {"last": np.array([1])}, "not the last of 3"),
        (f"{MEAN}  r = Sqrt(e)  y = Div(x, r)", {"eps": weight(5, 1) ** 2}, "epsilon is not"),
        (f"{MEAN}  r = Sqrt(e)  s = Mul(x, rows)  y = Div(s, r)", {"rows": weight(5, 1)},
         "another axis"),
        ("q = Mul(x, x)  m = ReduceMean<keepdims=0>(q, last)  e = Add(m, eps)  r = Sqrt(e)  "
         "u = Unsqueeze(r, last)  y = Div(x, u)", {}, None),
        (f"{MEAN}  r = Sqrt(e)  z = Relu(x)  y = Div(z, r)", {}, None),
        ("q = Mul(x, z)  z = Relu(x)  m = ReduceMean(q, last)  e = Add(m, eps)  r = Sqrt(e)  "
         "y = Div(x, r)".replace("q = Mul(x, z)  z = Relu(x)", "z = Relu(x)  q = Mul(x, z)"),
         {}, None),
        (f"{MEAN}  r = Pow(e, two)  y = Div(x, r)", {}, None),
        (f"{MEAN}  i = Pow(e, half)  y = Mul(x, i)", {}, None),
        (f"{MEAN}  r = Sqrt(e)  i = Div(two, r)  y = Mul(x, i)", {}, None),
    ],
)  # fmt: skip
def test_near_misses(body: str, arrays: dict[str, np.ndarray], reason: str | None) -> None:
    result = rms(body, **arrays)
    assert result.n_applied == 0
    assert [reason in one.reason for one in result.declined] == ([True] if reason else [])


def test_a_varying_scale_behind_the_norm_stays() -> None:
    body = f"{MEAN}  r = Sqrt(e)  n = Div(x, r)  y = Mul(n, rows)"
    result = rms(body, rows=weight(5, 1))
    assert result.ops == ["RMSNormalization", "Mul"]
    assert "another axis" in result.declined[0].reason


def test_a_normalised_value_with_other_users_keeps_its_scale_apart() -> None:
    body = f"{MEAN}  r = Sqrt(e)  n = Div(x, r)  s = Mul(n, gamma)  y = Add(s, n)"
    result = rms(body)
    assert result.ops == ["RMSNormalization", "Mul", "Add"]
    assert "other users" in result.declined[0].reason


def test_old_opsets_and_doubles_are_declined() -> None:
    result = rms(f"{MEAN}  r = Sqrt(e)  y = Div(x, r)", opset=22)
    assert "opset 22" in result.declined[0].reason
    text = f"g (double[2,5,16] x) => (double[2,5,16] y) {{ {MEAN}  r = Sqrt(e)  y = Div(x, r) }}"
    result = run(FuseRmsNorm(), text, **{**NUMBERS, "eps": np.array(1e-3)})
    assert "not float32" in result.declined[0].reason


SPLIT = "r = Reshape(x, apart)  i = InstanceNormalization<epsilon=0.01>(r, s, t)"
VECTORS = {
    "apart": np.array([0, 4, -1]), "back": np.array([2, 8, 3, 5]),
    "s": weight(4) + 2, "t": weight(4)[::-1].copy(),
    "gamma": (weight(8) + 2).reshape(8, 1, 1), "beta": weight(8).reshape(1, 8, 1, 1),
}  # fmt: skip


def grouped(body: str, opset: int = 23, inputs: str = "", **arrays: np.ndarray) -> Result:
    text = f"g (float[2,8,3,5] x{inputs}) => (float[2,8,3,5] y) {{ {body} }}"
    return run(FuseGroupNorm(), text, opset, **{**VECTORS, **arrays})


@pytest.mark.parametrize(
    "tail",
    [
        "y = Reshape(i, back)",
        "b = Reshape(i, back)  m = Mul(b, gamma)  y = Add(m, beta)",
        "b = Reshape(i, back)  m = Add(beta, b)  y = Mul(gamma, m)",
        "b = Reshape(i, back)  y = Mul(b, two)",
    ],
)
def test_group_norm(tail: str) -> None:
    result = grouped(f"{SPLIT}  {tail}", two=np.array(2, np.float32))
    assert result.ops == ["GroupNormalization"]
    node = result.node("GroupNormalization")
    assert node.attributes["num_groups"].as_int() == 4
    assert node.attributes["epsilon"].as_float() == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("body", "arrays", "reason"),
    [
        (f"{SPLIT}  y = Reshape(i, back)",
         {"apart": np.array([4, 4, -1])}, "no groups of whole channels"),
        (f"{SPLIT}  y = Reshape(i, back)",
         {"apart": np.array([2, 3, -1]), "s": weight(3), "t": weight(3)}, "no groups of whole"),
        (f"{SPLIT}  b = Reshape(i, other)  y = Reshape(b, back)",
         {"other": np.array([2, 4, 6, 5])}, "do not get their shape back"),
        (f"{SPLIT}  b = Reshape(i, back)  f = Relu(i)  h = Reshape(f, back)  y = Add(b, h)",
         {}, "other users"),
        (f"{SPLIT}  y = Reshape(i, back)", {"s": None}, "not constant"),
    ],
)  # fmt: skip
def test_group_norm_near_misses(
    body: str, arrays: dict[str, np.ndarray | None], reason: str
) -> None:
    if "s" in arrays and arrays["s"] is None:
        body, arrays = body.replace("(r, s, t)", "(r, given, t)"), {}
        result = grouped(body, inputs=", float[4] given")
    else:
        result = grouped(body, **arrays)  # type: ignore[arg-type]
    assert result.n_applied == 0
    assert reason in result.declined[0].reason


@pytest.mark.parametrize(
    ("tail", "arrays", "reason"),
    [
        ("y = Mul(b, wide)", {"wide": weight(3, 5)}, "not one per channel"),
        ("m = Mul(b, gamma)  y = Add(m, b)", {}, "other users"),
    ],
)
def test_steps_that_stay(tail: str, arrays: dict[str, np.ndarray], reason: str) -> None:
    result = grouped(f"{SPLIT}  b = Reshape(i, back)  {tail}", **arrays)
    assert result.counts["GroupNormalization"] == 1
    assert reason in result.declined[0].reason


def test_old_group_norm_is_declined() -> None:
    assert "opset 20" in grouped(f"{SPLIT}  y = Reshape(i, back)", opset=20).declined[0].reason
