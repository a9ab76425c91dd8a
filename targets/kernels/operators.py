"""The table of element-wise ONNX operators: how each is emitted, and what it means in NumPy.

Adding an operator is one line of `OPERATORS`. Emitters take and return expressions of one width;
NumPy functions take arrays or numbers. Semantics are those that ONNX Runtime 1.2x was seen to
have (NaN kept by Relu, Clip, Max, Min; Round half to even; HardSwish(-inf) = NaN).
"""

import math as scalar_math
from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
from sparsegraph.targets import emit as tir
from sparsegraph.targets.emit import Expr, T
from sparsegraph.targets.kernels import math
from sparsegraph.targets.kernels.math import above, below, cast, hold, like, select, type_of

MOST_FACTORS = 16  # of a power that is multiplied out


class Operator(NamedTuple):
    """One operator: `emit` on expressions beside its meaning `numpy` on arrays."""

    emit: Callable[..., Expr]
    numpy: Callable[..., Any]


# ---------------------------------------------------------------- types and constants


def _is_float(x: Expr) -> bool:
    return type_of(x)[0].startswith("float")


def _is_bool(x: Expr) -> bool:
    return type_of(x)[0] == "bool"


def _is_unsigned(x: Expr) -> bool:
    return type_of(x)[0].startswith("uint")


def _is_least(x: Expr) -> bool:
    """True for the least number of its type: nothing is below it."""
    dtype, number = type_of(x)[0], _number(x)
    return number == (-float("inf") if _is_float(x) else np.iinfo(dtype).min)


def _is_most(x: Expr) -> bool:
    """True for the largest number of its type."""
    dtype, number = type_of(x)[0], _number(x)
    return number == (float("inf") if _is_float(x) else np.iinfo(dtype).max)


def _number(x: Expr) -> float | int | None:
    """The value of a constant expression, else None."""
    inner: Any = getattr(x, "value", x)
    if type(inner).__name__ == "BitwiseNot":  # `expression.emit` hides some constants so
        info = np.iinfo(str(inner.ty))
        return info.min + info.max - int(inner.a.value)
    inner = getattr(inner, "value", inner)
    return inner if isinstance(inner, int | float) else None


def _truth(x: Expr) -> Expr:
    """True where x is not 0, also where it is NaN."""
    if _is_bool(x):
        return x
    differs = T.NE(x, like(0, x))
    return T.Or(differs, math.is_nan(x)) if _is_float(x) else differs


def _as_number(x: Expr) -> Expr:
    """bool as int32, other types unchanged: what comparisons and stores work on."""
    if not _is_bool(x):
        return x
    lanes = type_of(x)[1]
    one, zero = (tir.splat(tir.const(v, "int32"), lanes) for v in (1, 0))
    return select(x, one, zero)


def _either(a: Expr, b: Expr) -> Expr:
    """Exclusive or; comparing two truth values directly is not code that LLVM accepts."""
    a, b = _truth(a), _truth(b)
    return T.Or(T.And(a, T.Not(b)), T.And(T.Not(a), b))


def _equal(a: Expr, b: Expr) -> Expr:
    return T.Not(_either(a, b)) if _is_bool(a) or _is_bool(b) else T.EQ(a, b)


def stored(x: Expr) -> Expr:
    """As it is stored: bool as uint8 of 0 and 1."""
    return cast(_as_number(x), "uint8") if _is_bool(x) else x


def _cast(x: Expr, to: str) -> Expr:
    if to == "bool":
        return _truth(x)
    return cast(_as_number(x), to)


# ---------------------------------------------------------------- arithmetic


def larger(a: Expr, b: Expr) -> Expr:
    """max(a, b), NaN if either is."""
    value = select(a < b, b, a)
    if not _is_float(b) or _number(b) is not None:
        return value
    return select(math.is_nan(b), b, value)


def smaller(a: Expr, b: Expr) -> Expr:
    """min(a, b), NaN if either is."""
    value = select(a > b, b, a)
    if not _is_float(b) or _number(b) is not None:
        return value
    return select(math.is_nan(b), b, value)


def _fold(step: Callable[[Expr, Expr], Expr]) -> Callable[..., Expr]:
    """n-ary from binary; constants come last so that they need no test for NaN."""

    def emit(*xs: Expr) -> Expr:
        ordered = sorted(xs, key=lambda x: _number(x) is not None)
        return reduce(lambda a, b: hold(step(a, b)), ordered)

    return emit


def _clip(x: Expr, low: Expr, high: Expr) -> Expr:
    if not _is_least(low):
        x = hold(above(x, low))
    return x if _is_most(high) else below(x, high)


def _divisor(b: Expr) -> Expr:
    """An integer divisor that no machine stops at: 1 in place of 0 and of -1 (-2^31 / -1)."""
    if _number(b) not in (None, 0, -1):
        return b
    one = like(1, b)
    b = select(T.EQ(b, like(0, b)), one, b)
    return hold(b if _is_unsigned(b) else select(T.EQ(b, like(-1, b)), one, b))


def _divide(a: Expr, b: Expr) -> Expr:
    """Quotient; of integers truncated, and 0 if b is 0, where ONNX Runtime ends with an error."""
    if _is_float(a):
        number = _number(b)
        if number is None or number != 0:
            return a / b
        return a * like(np.copysign(np.inf, number), a)  # TVM divides by no constant 0
    by, zero = _divisor(b), like(0, a)
    quotient = T.truncdiv(a, by)
    if by is b:
        return quotient
    if not _is_unsigned(b):
        quotient = select(T.EQ(b, like(-1, b)), zero - a, quotient)
    return select(T.EQ(b, zero), zero, quotient)


def _mod(a: Expr, b: Expr, truncated: Expr) -> Expr:
    """Remainder with the sign of b, or of a if `truncated` (ONNX's fmod) is not 0.

    Of integers 0 if b is 0, where ONNX Runtime ends with an error. Of floats exact up to quotients
    of 2^29: they have 24 bits, products in float64 53. Without a whole quotient a remains, also of
    an infinite b.
    """
    if _is_float(a):
        wide, by = hold(cast(a, "float64")), hold(cast(b, "float64"))
        whole = hold(T.trunc(wide / by))
        rest = cast(hold(wide - by * whole), "float32")
        remainder = select(T.EQ(whole, like(0.0, whole)), a, rest)
    else:
        remainder = T.truncmod(a, _divisor(b))
    if _number(truncated) or _is_unsigned(a):
        return remainder
    remainder = hold(remainder)
    zero = like(0, remainder)
    wrong = T.And(T.NE(remainder, zero), _either(remainder < zero, b < zero))
    return select(wrong, remainder + b, remainder)


def _sign(x: Expr) -> Expr:
    unit = select(x > like(0, x), like(1, x), like(0, x))
    if _is_unsigned(x):
        return unit
    unit = select(x < like(0, x), like(-1, x), unit)
    return select(math.is_nan(x), x, unit) if _is_float(x) else unit


def _power(x: Expr, y: Expr) -> Expr:
    """Whole exponents up to `MOST_FACTORS` by multiplication, +-0.5 by root, others in float64.

    Of integers only whole constant exponents from 0 on (`lower.regions.refusal`).
    """
    n = _number(y)
    if n == 0.5:
        return T.sqrt(x)
    if n == -0.5:
        return like(1.0, x) / T.sqrt(x)
    if n is not None and abs(n) <= MOST_FACTORS and float(n).is_integer():
        value = _whole_power(x, abs(int(n)))
        return value if n >= 0 else like(1, x) / value
    return math.power(x, cast(y, "float32"))


def _whole_power(x: Expr, n: int) -> Expr:
    """x^n by repeated squaring."""
    if n == 0:
        return like(1, x)
    half = hold(_whole_power(x, n // 2)) if n > 1 else None
    square = x if half is None else half * half
    return square * x if n > 1 and n % 2 else square


def _absolute(x: Expr) -> Expr:
    if _is_unsigned(x):
        return x
    return T.abs(x) if _is_float(x) else select(x < like(0, x), like(0, x) - x, x)


# ---------------------------------------------------------------- activations


def _relu(x: Expr) -> Expr:
    return above(x, like(0, x))


def _hard_sigmoid(x: Expr, alpha: Expr, beta: Expr) -> Expr:
    line = hold(x * alpha + beta)
    return below(hold(above(line, like(0.0, x))), like(1.0, x))


def _hard_swish(x: Expr) -> Expr:
    return x * _hard_sigmoid(x, like(1 / 6, x), like(0.5, x))


def _leaky(x: Expr, slope: Expr) -> Expr:
    if _is_unsigned(x):
        return x
    return select(x < like(0, x), x * slope, x)


def _exponential_below(x: Expr, alpha: Expr) -> Expr:
    """x above 0, alpha (e^x - 1) below."""
    return select(x < like(0.0, x), alpha * (math.exp(x) - like(1.0, x)), x)


def _celu(x: Expr, alpha: Expr) -> Expr:
    return select(x < like(0.0, x), alpha * (math.exp(x / alpha) - like(1.0, x)), x)


def _swish(x: Expr, alpha: Expr | None = None) -> Expr:
    return x * math.sigmoid(x if alpha is None else hold(x * alpha))


# ---------------------------------------------------------------- meaning in NumPy

_erf = np.vectorize(scalar_math.erf, otypes=[np.float64])


def np_erf(x: Any) -> Any:
    """erf in float64, returned in the precision of x."""
    return _erf(x).astype(np.result_type(x)) if np.size(x) else np.asarray(x)


def np_sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def np_softplus(x: Any) -> Any:
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def np_gelu(x: Any) -> Any:
    return x * 0.5 * (1 + np_erf(x * scalar_math.sqrt(0.5)))


def np_gelu_tanh(x: Any) -> Any:
    return 0.5 * x * (1 + np.tanh(scalar_math.sqrt(2 / scalar_math.pi) * (x + 0.044715 * x**3)))


def np_hard_sigmoid(x: Any, alpha: float, beta: float) -> Any:
    return np.clip(alpha * x + beta, 0, 1)


def np_divide(a: Any, b: Any) -> Any:
    if np.result_type(a, b).kind == "f":
        return np.divide(a, b)
    return np.trunc(np.divide(a, b)).astype(np.result_type(a, b))


def np_cast(x: Any, to: str) -> Any:
    return np.asarray(x).astype(to)


def np_fold(step: Any) -> Callable[..., Any]:
    return lambda *xs: reduce(step, xs)


def _np_mod(a: Any, b: Any, truncated: float) -> Any:
    return np.fmod(a, b) if truncated else np.mod(a, b)


OPERATORS: dict[str, Operator] = {
    "Identity": Operator(lambda x: x, lambda x: x),
    "Add": Operator(_fold(lambda a, b: a + b), np_fold(np.add)),
    "Sum": Operator(_fold(lambda a, b: a + b), np_fold(np.add)),
    "Sub": Operator(lambda a, b: a - b, np.subtract),
    "Mul": Operator(_fold(lambda a, b: a * b), np_fold(np.multiply)),
    "Div": Operator(_divide, np_divide),
    "Min": Operator(_fold(smaller), np_fold(np.minimum)),
    "Max": Operator(_fold(larger), np_fold(np.maximum)),
    "Mod": Operator(_mod, _np_mod),
    "Pow": Operator(_power, np.power),
    "Abs": Operator(_absolute, np.abs),
    "Neg": Operator(lambda x: like(-1, x) * x, np.negative),
    "Sign": Operator(_sign, np.sign),
    "Floor": Operator(lambda x: T.floor(x), np.floor),
    "Ceil": Operator(lambda x: T.ceil(x), np.ceil),
    "Round": Operator(lambda x: T.nearbyint(x), np.rint),
    "Sqrt": Operator(lambda x: T.sqrt(x), np.sqrt),
    "Reciprocal": Operator(lambda x: like(1.0, x) / x, lambda x: 1 / x),
    "Exp": Operator(math.exp, np.exp),
    "Log": Operator(math.log, np.log),
    "Sin": Operator(math.sin, np.sin),
    "Cos": Operator(math.cos, np.cos),
    "Erf": Operator(math.erf, np_erf),
    "Tanh": Operator(math.tanh, np.tanh),
    "Sigmoid": Operator(math.sigmoid, np_sigmoid),
    "Gelu": Operator(math.gelu, np_gelu),
    "GeluTanh": Operator(math.gelu_tanh, np_gelu_tanh),
    "Softplus": Operator(math.softplus, np_softplus),
    "Softsign": Operator(lambda x: x / (like(1.0, x) + T.abs(x)), lambda x: x / (1 + np.abs(x))),
    "Mish": Operator(math.mish, lambda x: x * np.tanh(np_softplus(x))),
    "Swish": Operator(_swish, lambda x, alpha=1.0: x * np_sigmoid(alpha * x)),
    "Relu": Operator(_relu, lambda x: np.maximum(x, 0)),
    "Clip": Operator(_clip, lambda x, low, high: np.minimum(np.maximum(x, low), high)),
    "LeakyRelu": Operator(_leaky, lambda x, slope: np.where(x < 0, x * slope, x)),
    "PRelu": Operator(_leaky, lambda x, slope: np.where(x < 0, x * slope, x)),
    "HardSigmoid": Operator(_hard_sigmoid, np_hard_sigmoid),
    "HardSwish": Operator(_hard_swish, lambda x: x * np_hard_sigmoid(x, 1 / 6, 0.5)),
    "Elu": Operator(_exponential_below, lambda x, a: np.where(x < 0, a * np.expm1(x), x)),
    "Selu": Operator(
        lambda x, alpha, gamma: gamma * _exponential_below(x, alpha),
        lambda x, alpha, gamma: gamma * np.where(x < 0, alpha * np.expm1(x), x),
    ),
    "Celu": Operator(_celu, lambda x, a: np.where(x < 0, a * np.expm1(x / a), x)),
    "ThresholdedRelu": Operator(
        lambda x, alpha: select(x > alpha, x, like(0.0, x)),
        lambda x, alpha: np.where(x > alpha, x, 0 * np.nan_to_num(x, posinf=0, neginf=0)),
    ),
    "Where": Operator(
        lambda c, a, b: select(_truth(c), a, b), lambda c, a, b: np.where(np.not_equal(c, 0), a, b)
    ),
    "Equal": Operator(_equal, np.equal),
    "Less": Operator(lambda a, b: a < b, np.less),
    "Greater": Operator(lambda a, b: a > b, np.greater),
    "LessOrEqual": Operator(lambda a, b: a <= b, np.less_equal),
    "GreaterOrEqual": Operator(lambda a, b: a >= b, np.greater_equal),
    "And": Operator(lambda a, b: T.And(_truth(a), _truth(b)), np.logical_and),
    "Or": Operator(lambda a, b: T.Or(_truth(a), _truth(b)), np.logical_or),
    "Xor": Operator(_either, np.logical_xor),
    "Not": Operator(lambda x: T.Not(_truth(x)), np.logical_not),
    "IsNaN": Operator(math.is_nan, np.isnan),
    "Cast": Operator(_cast, np_cast),
    "FromHalf": Operator(math.from_half, lambda x: np.asarray(x, np.float32)),
    "ToHalf": Operator(math.to_half, lambda x: np.asarray(x, np.float16)),
}
