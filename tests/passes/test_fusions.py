"""fuse_gelu, fuse_layer_norm, fuse_attention."""

import numpy as np
import pytest
from sparsegraph.passes.fuse_attention import FuseAttention
from sparsegraph.passes.fuse_gelu import FuseGelu
from sparsegraph.passes.fuse_layer_norm import FuseLayerNorm

from sparsegraph.graph import static_shape
from sparsegraph.verify import Session
from tests.passes.check import Result, apply, parse, run, weight


def number(value: float) -> np.ndarray:
    return np.array(value, np.float32)


NUMBERS = {
    "half": number(0.5), "one": number(1), "two": number(2), "three": number(3),
    "root": number(2**0.5), "inv": number(0.5**0.5), "c": number(0.044715),
    "k": number((2 / np.pi) ** 0.5), "near": number(0.6),
}  # fmt: skip
ERF = "e = Erf(s)  g = Add(e, one)"
TANH = "t = Tanh(s)  g = Add(one, t)"


def gelu(body: str, opset: int = 23) -> Result:
    text = f"g (float[4,64] x) => (float[4,64] y) {{ {body} }}"
    return run(FuseGelu(), text, opset, **NUMBERS)


@pytest.mark.parametrize(
    "body",
    [
        f"s = Div(x, root)  {ERF}  p = Mul(x, g)  y = Mul(p, half)",
        f"s = Mul(x, inv)  {ERF}  p = Mul(x, half)  y = Mul(p, g)",
        f"s = Mul(inv, x)  {ERF}  p = Mul(half, g)  y = Mul(x, p)",
        f"s = Div(x, root)  {ERF}  p = Mul(g, x)  y = Div(p, two)",
    ],
)
def test_erf_gelu(body: str) -> None:
    result = gelu(body)
    assert result.ops == ["Gelu"]
    assert result.node("Gelu").attributes["approximate"].value == "none"


@pytest.mark.parametrize(
    "argument",
    [
        "a = Pow(x, three)  b = Mul(a, c)  d = Add(x, b)  s = Mul(d, k)",
        "a = Mul(x, x)  b = Mul(a, x)  d = Mul(c, b)  f = Add(d, x)  s = Mul(k, f)",
        "a = Mul(x, x)  b = Mul(a, c)  d = Add(b, one)  f = Mul(x, d)  s = Mul(f, k)",
    ],
)
def test_tanh_gelu(argument: str) -> None:
    result = gelu(f"{argument}  {TANH}  p = Mul(half, x)  y = Mul(p, g)")
    assert result.ops == ["Gelu"]
    assert result.node("Gelu").attributes["approximate"].value == "tanh"


def test_gelu_with_a_shared_operand_and_a_later_scale() -> None:
    result = gelu(f"s = Div(x, root)  {ERF}  p = Mul(x, g)  q = Mul(p, half)  y = Mul(q, near)")
    assert result.ops == ["Gelu", "Mul"]


@pytest.mark.parametrize(
    "body",
    [
        f"s = Div(x, two)  {ERF}  p = Mul(x, g)  y = Mul(p, half)",
        f"s = Div(x, root)  {ERF}  p = Mul(x, g)  y = Mul(p, near)",
    ],
)
def test_other_constants_are_declined(body: str) -> None:
    result = gelu(body)
    assert result.n_applied == 0
    assert "constants are not GELU's" in result.declined[0].reason


def test_another_operand_is_no_gelu() -> None:
    body = f"s = Div(x, root)  {ERF}  z = Relu(x)  p = Mul(z, g)  y = Mul(p, half)"
    assert gelu(body).n_applied == 0


def test_old_opset_is_declined() -> None:
    result = gelu(f"s = Div(x, root)  {ERF}  p = Mul(x, g)  y = Mul(p, half)", opset=17)
    assert "opset 17" in result.declined[0].reason


MEAN = "m = ReduceMean(x, axes)  d = Sub(x, m)"
STD = "v = ReduceMean(q, axes)  w = Add(v, eps)  r = Sqrt(w)"


def layer_norm(body: str, axes: int = -1, **extra: np.ndarray) -> Result:
    text = f"g (float[2,5,16] x) => (float[2,5,16] y) {{ {body} }}"
    return run(
        FuseLayerNorm(), text, axes=np.array([axes]), eps=number(1e-5), gamma=weight(16),
        beta=weight(16)[::-1].copy(), **{**NUMBERS, **extra},
    )  # fmt: skip


@pytest.mark.parametrize("square", ["q = Pow(d, two)", "q = Mul(d, d)"])
@pytest.mark.parametrize(
    "quotient",
    ["n = Div(d, r)", "i = Reciprocal(r)  n = Mul(d, i)", "i = Div(one, r)  n = Mul(i, d)"],
)
def test_layer_norm_with_scale_and_bias(square: str, quotient: str) -> None:
    body = f"{MEAN}  {square}  {STD}  {quotient}  s = Mul(n, gamma)  y = Add(s, beta)"
    result = layer_norm(body)
    assert result.ops == ["LayerNormalization"]
    assert len(result.node("LayerNormalization").inputs) == 3


def test_layer_norm_without_scale() -> None:
    result = layer_norm(f"{MEAN}  q = Mul(d, d)  {STD}  y = Div(d, r)")
    assert result.ops == ["LayerNormalization"]
    assert (result.weight("y_scale") == 1).all()


def test_norm_over_channels_is_declined() -> None:
    result = layer_norm(f"{MEAN}  q = Mul(d, d)  {STD}  y = Div(d, r)", axes=1)
    assert "not the last" in result.declined[0].reason


def test_different_axes_are_declined() -> None:
    std = STD.replace("(q, axes)", "(q, other)")
    result = layer_norm(f"{MEAN}  q = Mul(d, d)  {std}  y = Div(d, r)", other=np.array([1]))
    assert "different axes" in result.declined[0].reason


def test_square_of_something_else_is_no_norm() -> None:
    assert layer_norm(f"{MEAN}  q = Mul(x, x)  {STD}  y = Div(d, r)").n_applied == 0


def test_affine_step_over_another_axis_is_declined() -> None:
    body = f"{MEAN}  q = Mul(d, d)  {STD}  n = Div(d, r)  y = Mul(n, rows)"
    result = layer_norm(body, rows=weight(5, 1))
    assert result.ops == ["LayerNormalization", "Mul"]
    assert "another axis" in result.declined[0].reason


QKV4 = "float[2,3,5,8] q, float[2,3,7,8] k, float[2,3,7,8] v"
INF = np.float32(-np.inf)
LOWEST = np.finfo(np.float32).min


def attention(body: str, inputs: str = QKV4, out: str = "float[2,3,5,8] y", **arrays) -> Result:  # type: ignore[no-untyped-def]
    numbers = {"scale": number(0.35), "inv": number(2.0), "zero": number(0), "one": number(1)}
    text = f"g ({inputs}) => ({out}) {{ {body} }}"
    return run(FuseAttention(), text, **{**numbers, **arrays})


KT = "kt = Transpose<perm=[0,1,3,2]>(k)"
END = "p = Softmax<axis=-1>(m)  y = MatMul(p, v)"
GUARD = "p = Softmax<axis=-1>(m)  n = IsNaN(p)  o = Where(n, zero, p)  y = MatMul(o, v)"


@pytest.mark.parametrize(
    "body",
    [
        f"{KT}  s = MatMul(q, kt)  m = Mul(s, scale)  {END}",
        f"{KT}  s = MatMul(q, kt)  m = Div(s, inv)  {END}",
        f"{KT}  a = Mul(q, scale)  m = MatMul(a, kt)  {END}",
        f"{KT}  a = Mul(q, scale)  b = Mul(kt, scale)  m = MatMul(a, b)  {END}",
        f"{KT}  m = MatMul(q, kt)  {END}",
        f"{KT}  m = MatMul(q, kt)  {GUARD}",
    ],
)
def test_scales(body: str) -> None:
    result = attention(body)
    assert result.ops == ["Attention"]


def test_keys_that_arrive_transposed() -> None:
    inputs = "float[2,3,5,8] q, float[2,3,8,7] kt, float[2,3,7,8] v"
    result = attention(f"m = MatMul(q, kt)  {END}", inputs)
    assert result.ops == ["Transpose", "Attention"]


def test_three_dimensions() -> None:
    inputs = "float[6,5,8] q, float[6,7,8] k, float[6,7,8] v"
    body = f"kt = Transpose<perm=[0,2,1]>(k)  m = MatMul(q, kt)  {END}"
    result = attention(body, inputs, "float[6,5,8] y")
    assert result.counts == {"Reshape": 4, "Attention": 1}


def padded(fill: float, shape: tuple[int, ...] = (2, 1, 1, 7)) -> np.ndarray:
    mask = np.zeros(shape, np.float32)
    mask[..., 4:] = fill
    return mask


@pytest.mark.parametrize("fill", [-1e4, -1e9, LOWEST, INF])
@pytest.mark.parametrize("shape", [(2, 1, 1, 7), (5, 7), (1, 7), (7,), (3, 5, 7), (1, 3, 1, 7)])
def test_constant_masks(fill: float, shape: tuple[int, ...]) -> None:
    body = f"{KT}  s = MatMul(q, kt)  m = Add(s, mask)  {END}"
    assert attention(body, mask=padded(fill, shape)).ops == ["Attention"]


@pytest.mark.parametrize("fill", [-1e4, -1e9, LOWEST])
def test_fully_masked_rows_stay_uniform(fill: float) -> None:
    mask = padded(fill, (5, 7))
    mask[2] = fill
    body = f"{KT}  s = MatMul(q, kt)  m = Add(s, mask)  {END}"
    assert attention(body, mask=mask).ops == ["Attention"]


def test_row_of_infinities() -> None:
    mask = padded(-np.inf, (5, 7))
    mask[2] = -np.inf
    body = f"{KT}  s = MatMul(q, kt)  m = Add(s, mask)  "
    result = attention(body + END, mask=mask)
    assert "-inf everywhere" in result.declined[0].reason
    assert attention(body + GUARD, mask=mask).ops == ["Attention"]


@pytest.mark.parametrize("fill", [-1e4, LOWEST])
def test_bert_mask(fill: float) -> None:
    inputs = f"{QKV4}, int64[2,7] attention_mask"
    body = f"""{KT}  u = Unsqueeze(attention_mask, axes)  f = Cast<to=1>(u)  i = Sub(one, f)
        b = Mul(i, fill)  s = MatMul(q, kt)  m = Add(s, b)  {END}"""
    result = attention(body, inputs, fill=number(fill), axes=np.array([1, 2]))
    assert result.counts["Attention"] == 1
    assert result.counts["Max"] == int(fill < -1e30)
    feed = {n: weight(2, 3, t, 8) for n, t in (("q", 5), ("k", 7), ("v", 7))}
    feed["attention_mask"] = np.zeros((2, 7), np.int64)
    y = Session(result.model).run(feed)["y"]
    assert np.abs(y).max() > 0.1, "a fully masked row attends to all keys alike, it is not zero"


@pytest.mark.parametrize("fill", [LOWEST, INF])
@pytest.mark.parametrize("guard", [END, GUARD])
def test_where_masks(fill: float, guard: str) -> None:
    inputs = f"{QKV4}, bool[2,1,5,7] keep"
    body = f"{KT}  s = MatMul(q, kt)  m = Where(keep, s, fill)  {guard}"
    result = attention(body, inputs, fill=number(fill))
    assert result.counts["Attention"] == 1
    assert result.counts["ReduceMax"] == int(fill == INF and guard is END)


@pytest.mark.parametrize("shape", ["2,1,1,7", "2,3,1,7", "1,1,5,7", "5,7", "3,5,7", "7"])
def test_rows_that_may_lose_all_keys_stay_nan(shape: str) -> None:
    body = f"{KT}  b = Where(pad, fill, zeros)  s = MatMul(q, kt)  m = Add(b, s)  {END}"
    dims = tuple(map(int, shape.split(",")))
    zeros = np.zeros(dims, np.float32)
    inputs = f"{QKV4}, bool[{shape}] pad"
    result = attention(body, inputs, fill=number(INF), zeros=zeros)
    assert result.counts["Attention"] == 1
    feed: dict[str, np.ndarray] = {n: weight(2, 3, t, 8) for n, t in zip("qkv", (5, 7, 7))}
    feed["pad"] = np.zeros(dims, np.bool_)
    feed["pad"].reshape(-1, 7)[0] = True
    y = Session(result.model).run(feed)["y"]
    lost = np.broadcast_to(feed["pad"].all(-1, keepdims=True), y.shape)
    np.testing.assert_array_equal(np.isnan(y), lost)


def test_a_mask_repeated_over_heads_is_not() -> None:
    body = f"""{KT}  b = Where(pad, fill, zeros)  e = Expand(b, all)  s = MatMul(q, kt)
        m = Add(s, e)  {END}"""
    result = attention(
        body, f"{QKV4}, bool[2,1,1,7] pad", fill=number(LOWEST),
        zeros=np.zeros((2, 1, 1, 7), np.float32), all=np.array([2, 3, 1, 7]),
    )  # fmt: skip
    mask = result.node("Attention").inputs[3]
    assert mask is not None
    assert static_shape(mask) == (2, 1, 5, 7)


def test_rows_of_three_dimensions_stay_nan() -> None:
    body = f"""kt = Transpose<perm=[0,2,1]>(k)  s = MatMul(q, kt)  m = Where(pad, fill, s)  {END}"""
    inputs = "float[6,5,8] q, float[6,7,8] k, float[6,7,8] v, bool[6,1,7] pad"
    result = attention(body, inputs, "float[6,5,8] y", fill=number(INF))
    assert result.counts["Attention"] == 1


def test_torch_bool_mask_becomes_additive() -> None:
    inputs = f"{QKV4}, bool[2,1,5,7] keep"
    body = f"{KT}  b = Where(keep, zero, fill)  s = MatMul(q, kt)  m = Add(s, b)  {GUARD}"
    assert attention(body, inputs, fill=number(LOWEST)).counts["Attention"] == 1


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (f"{KT}  s = MatMul(q, kt)  m = Where(keep, s, small)  {END}", "uniform, not shifted"),
        (f"{KT}  s = MatMul(q, kt)  m = Add(s, bias)  {END}", "may be -inf in a whole row"),
        (f"{KT}  m = MatMul(q, kt)  p = Softmax<axis=2>(m)  y = MatMul(p, v)", "not over the keys"),
        (f"{KT}  m = MatMul(q, kt)  {END}  z = Relu(p)", "another user"),
        (f"{KT}  m = MatMul(q, kt)  {END}  z = Relu(m)", "another user"),
        (f"{KT}  s = MatMul(q, kt)  m = Mul(s, minus)  {END}", "not positive"),
    ],
)
def test_attention_declines(body: str, reason: str) -> None:
    inputs = f"{QKV4}, bool[2,1,5,7] keep, float[2,1,5,7] bias"
    out = "float[2,3,5,8] y" + (", float[2,3,5,7] z" if "z =" in body else "")
    result = attention(body, inputs, out, small=number(-100.0), minus=number(-1.0))
    assert result.n_applied == 0
    assert reason in result.declined[0].reason


def test_old_opset_has_no_attention() -> None:
    text = f"g ({QKV4}) => (float[2,3,5,8] y) {{ {KT}  m = MatMul(q, kt)  {END} }}"
    assert "opset 18" in run(FuseAttention(), text, 18).declined[0].reason


def test_weights_are_no_keys() -> None:
    model = parse(
        f"g (float[2,5,8] q, float[2,7,8] v) => (float[2,5,8] y) {{ m = MatMul(q, w)  {END} }}",
        w=weight(8, 7),
    )
    assert apply(FuseAttention(), model).n_applied == 0
