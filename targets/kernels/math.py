"""Elementary functions on float32 scalars and vectors from +, *, /, compare, select and bit shifts.

LLVM turns `exp`, `tanh` or `erf` of a vector into one libm call per lane (12 to 20 times slower),
so each is a polynomial or a quotient of two. The coefficients are our own minimax fits
(Lawson-weighted least squares over Chebyshev points); each bound below is the measured one and
is asserted by tests/targets/test_math.py. Every function takes any number of lanes, keeps NaN,
and is exact at infinities, zeros and denormals. Two rules keep TVM from folding what must
stay: never compare a value with itself (use `is_nan`), and `hold` x + c before subtracting c.
"""

import math
from collections.abc import Sequence

import numpy as np
from sparsegraph.targets import emit
from sparsegraph.targets.emit import Expr, T

LN2_HIGH, LN2_LOW = 0.693145751953125, 1.428606765330187e-06  # 16 bits + the rest
LOG2_E = 1.4426950408889634
MAGIC = 12582912.0  # 1.5 * 2^23: adding it puts a rounded integer into the low bits
MAGIC_BITS = 0x4B400000
HALF_PI, HALF_PI_LOW = 1.5707963267948966, 6.123233995736766e-17

# name: coefficients, lowest power first                              largest relative error
EXP = (0.499992311000824, 0.16667115688323975, 0.041890330612659454, 0.008312501013278961)  # 1.1e-7
EXP2 = (1.0, *(c * math.log(2) ** i for i, c in enumerate((1.0, *EXP), 1)))
EXP2_NEAR = (1.0, 0.69314717, 0.24026408, 0.05551192)  # 2e-8, |x| <= 1/16
LOG = (
    0.3333333134651184,
    -0.2500081956386566,
    0.20001226663589478,
    -0.16623356938362122,
    0.14201758801937103,
    -0.13160182535648346,
    0.12761574983596802,
    -0.07634492963552475,
)  # 6e-9
ERF_P = (
    1.1283791065216064,
    0.1904076635837555,
    0.05274888500571251,
    0.00376566918566823,
    0.0002848840958904475,
    2.0500806385825854e-06,
)
ERF_Q = (
    1.0,
    0.5020771622657776,
    0.11410961300134659,
    0.01496932189911604,
    0.0011625485494732857,
    3.809171903412789e-05,
)  # 6e-8 with the clamp at 1
TANH_P = (
    1.0,
    0.13379716873168945,
    0.003494034055620432,
    2.0583474906743504e-05,
    1.3319064073868958e-08,
)
TANH_Q = (
    1.0,
    0.4671303331851959,
    0.025871071964502335,
    0.00032830919371917844,
    7.762016025480989e-07,
)  # 3e-8 with the clamp at 1
SIN = (-0.16666655242443085, 0.008332155644893646, -0.0001951463200384751)  # 4e-9, |x| <= pi/4
COS = (0.04166664555668831, -0.0013887309469282627, 2.443241282890085e-05)  # 2e-10, |x| <= pi/4
GELU_STEP = 5.3 / 6.5 / 2  # of x/2
GELU_PIECES = (  # by power of the distance from the middle of a piece; the last piece is 0
    (1.0, 0.41485286, 0.10293875, 0.014438762,
     0.0011081462, 4.5655805e-05, 9.984343e-07, 0.0),
    (-0.65058166, -0.46658283, -0.17211649, -0.032656111,
     -0.0031868254, -0.00015997961, -4.1330459e-06, 0.0),
    (-2.427049e-05, 0.15505275, 0.1144518, 0.032580007,
     0.0042338329, 0.0002644317, 8.1068056e-06, 0.0),
    (0.072278142, 0.017278597, -0.031623434, -0.018038528,
     -0.0034049596, -0.00027641284, -1.0405854e-05, 0.0),
    (-0.0006269773, -0.019470213, -0.0023866526, 0.0052478001,
     0.0018344767, 0.00021614091, 1.0931009e-05, 0.0),
    (-0.0063708834, 0.0010435162, 0.0036055162, -0.00030035124,
     -0.00060774753, -0.00011023891, -7.2629737e-06, 0.0),
)  # fmt: skip  # 4e-7 / |x| for 2 (1 - Phi(|x|))
ATANH = tuple(2.0 / (2 * i + 1) for i in range(6))  # log((1+s)/(1-s)) = 2 (s + s^3/3 + ...)
_EIGHTH = np.arange(8, dtype=np.int32)
EIGHTHS = (  # bits of 2^(j/8) less those that j brings along
    (np.exp2(_EIGHTH / 8).astype(np.float32).view(np.int32) - (_EIGHTH << 20)).view(np.float32)
)
EXP_DOUBLE = (1.0, 1.0, 1 / 2, 1 / 6, 1 / 24, 1 / 120, 1 / 720, 1 / 5040)  # 5e-9, |x| <= ln(2)/2


# ---------------------------------------------------------------- types of expressions


def type_of(x: Expr) -> tuple[str, int]:
    """Element type and number of lanes: `float32x8` -> ("float32", 8)."""
    dtype, _, lanes = str(x.ty).partition("x")
    return dtype, int(lanes or 1)


def like(value: float | int, x: Expr) -> Expr:
    """The constant `value` in the type and width of `x`."""
    dtype, lanes = type_of(x)
    number = float(value) if dtype.startswith("float") else int(value)
    return emit.splat(emit.const(number, dtype), lanes)


def cast(x: Expr, dtype: str) -> Expr:
    """Numeric conversion, same lanes."""
    lanes = type_of(x)[1]
    return T.cast(x, dtype if lanes == 1 else f"{dtype}x{lanes}")


def bits(x: Expr, dtype: str) -> Expr:
    """The same bits read as another type of equal size."""
    lanes = type_of(x)[1]
    return T.reinterpret(dtype if lanes == 1 else f"{dtype}x{lanes}", x)


def hold(x: Expr) -> Expr:
    """Compute x once and refer to it; truth values must stay inline.

    A register cell rather than `emit.bind`: TVM's analysers expand chains of bound values, so
    that one GELU took 4 s to compile instead of 0.05 s.
    """
    dtype, lanes = type_of(x)
    cell = emit.Cell(dtype, lanes)
    cell.set(x)
    return cell.get()


def select(condition: Expr, a: Expr, b: Expr) -> Expr:
    """a where the condition holds, else b; both are computed."""
    return T.Select(condition, a, b)


def is_nan(x: Expr) -> Expr:
    """True where x is NaN (`x != x` is folded to false by the simplifier)."""
    return T.isnan(x)


def above(x: Expr, bound: Expr) -> Expr:
    """max(x, bound) that keeps NaN of x (one instruction)."""
    x = hold(x)
    return hold(select(x < bound, bound, x))


def below(x: Expr, bound: Expr) -> Expr:
    """min(x, bound) that keeps NaN of x (one instruction)."""
    x = hold(x)
    return hold(select(x > bound, bound, x))


def from_half(half: Expr) -> Expr:
    """float32 of the bits of float16 (uint16), exactly; nothing on the way is a denormal."""
    half = hold(cast(half, "int32"))
    magnitude = hold(half & like(0x7FFF, half))
    shifted = hold(_shift_left(magnitude, 13))
    normal = bits(shifted + like((127 - 15) << 23, half), "float32")
    special = bits(shifted + like((255 - 31) << 23, half), "float32")
    small = cast(magnitude, "float32")
    value = select(magnitude < like(0x7C00, half), normal, special)
    value = select(magnitude < like(0x0400, half), small * like(2.0**-24, small), value)
    value = hold(value)
    return select(magnitude < half, like(-1.0, value) * value, value)


def to_half(x: Expr) -> Expr:
    """Bits of float16 (uint16), rounded to the nearest, ties to even; above 65504 soon inf."""
    code = hold(bits(x, "int32"))
    size = hold(T.abs(x))
    tiny = bits(size + like(0.5, x), "int32") - like(0x3F000000, code)  # 0.5 has steps of 2^-24
    capped = hold(bits(below(size, like(65536.0, x)), "int32"))
    odd = _shift_right(capped, 13) & like(1, code)
    rounded = _shift_right(capped + odd + like(0xFFF, code), 13)
    value = hold(select(size < like(2.0**-14, x), tiny, rounded - like((127 - 15) << 10, code)))
    value = select(is_nan(x), like(0x7E00, code), value)
    return cast(value + select(code < like(0, code), like(0x8000, code), like(0, code)), "uint16")


def polynomial(x: Expr, coefficients: Sequence[float]) -> Expr:
    """Horner's rule, lowest power first."""
    result = like(coefficients[-1], x)
    for c in reversed(coefficients[:-1]):
        result = hold(result * x + like(c, x))
    return result


def _shift_left(x: Expr, n: int) -> Expr:
    return T.shift_left(x, like(n, x))


def _shift_right(x: Expr, n: int) -> Expr:
    return T.shift_right(x, like(n, x))


# ---------------------------------------------------------------- exponentials


def exp(x: Expr) -> Expr:
    """e^x, relative error <= 3e-7; inf above 88.73, denormals down to -103.9, then 0."""
    near_one, word = _exp_parts(x, -104.5, 89.0)
    exponent = hold(word - like(MAGIC_BITS, word))
    half = hold(_shift_right(exponent, 1))
    return near_one * _power_of_two(half) * _power_of_two(exponent - half)


def exp_normal(x: Expr) -> Expr:
    """`exp` at two thirds of the cost: 0 below -87.68, inf above 88.37."""
    near_one, word = _exp_parts(x, -88.0, 88.5)
    return near_one * _power_of_two(word)


def exp2_negative(x: Expr) -> Expr:
    """2^x for x <= 0, relative error <= 3e-7 down to -126; below, an absolute error <= 2^-126.

    0 from -127 on.
    """
    x = hold(above(x, like(-127.0, x)))
    if emit.looks_up(type_of(x)[1]):
        return _exp2_by_eighths(x)
    moved = hold(x + like(MAGIC, x))
    r = hold(x - hold(moved - like(MAGIC, moved)))
    return polynomial(r, EXP2) * _power_of_two(bits(moved, "int32"))


def _exp2_by_eighths(x: Expr) -> Expr:
    """2^x of x to the nearest eighth, from a table, times a polynomial of the rest."""
    moved = hold(x + like(MAGIC / 8, x))
    eighths = hold(bits(moved, "int32"))
    r = hold(x - hold(moved - like(MAGIC / 8, moved)))
    parts = bits(emit.look_up(EIGHTHS, eighths), "int32")
    return polynomial(r, EXP2_NEAR) * bits(parts + _shift_left(eighths, 20), "float32")


def _exp_parts(x: Expr, low: float, high: float) -> tuple[Expr, Expr]:
    """e^x / 2^n, in [0.7, 1.42], and n in the low bits of an int32."""
    x = below(above(x, like(low, x)), like(high, x))
    moved = hold(x * like(LOG2_E, x) + like(MAGIC, x))
    n = hold(moved - like(MAGIC, moved))
    r = hold(hold(x - n * like(LN2_HIGH, x)) - n * like(LN2_LOW, x))
    return polynomial(r, (1.0, 1.0, *EXP)), hold(bits(moved, "int32"))


def _power_of_two(n: Expr) -> Expr:
    """2^n for int32 n in [-127, 128] (0 and inf at the ends); only its low 9 bits count."""
    return bits(_shift_left(n, 23) + like(0x3F800000, n), "float32")


def sigmoid(x: Expr) -> Expr:
    """1 / (1 + e^-x), relative error <= 5e-7; 0 below -88.37 (denormal values)."""
    return like(1.0, x) / (exp_normal(like(0.0, x) - x) + like(1.0, x))


def tanh(x: Expr) -> Expr:
    """Relative error <= 5e-7."""
    return _odd_quotient(x, 9.6, TANH_P, TANH_Q)


def erf(x: Expr) -> Expr:
    """Relative error <= 5e-7."""
    return _odd_quotient(x, 4.1, ERF_P, ERF_Q)


def _odd_quotient(x: Expr, limit: float, p: Sequence[float], q: Sequence[float]) -> Expr:
    """x P(x²) / Q(x²), at most 1 in size; at +-limit it exceeds 1 by 6e-7, so it ends at 1."""
    clamped = hold(below(above(x, like(-limit, x)), like(limit, x)))
    square = hold(clamped * clamped)
    value = hold(clamped * polynomial(square, p) / polynomial(square, q))
    return below(above(value, like(-1.0, x)), like(1.0, x))


def gelu(x: Expr) -> Expr:
    """x/2 (1 + erf(x/sqrt(2))), absolute error <= 1e-6 for |x| <= 10, relative beyond."""
    half = hold(x * like(0.5, x))
    if emit.looks_up(type_of(x)[1]):
        return _gelu_in_pieces(half)
    return half * erf(x * like(0.7071067811865476, x)) + half


def _gelu_in_pieces(half: Expr) -> Expr:
    """max(x, 0) - |x|/2 T(|x|), T = 2 (1 - Phi), which eight polynomials give piece by piece."""
    size = hold(T.abs(half))
    near = hold(below(size, like(7 * GELU_STEP, half)))
    moved = hold(near * like(1 / GELU_STEP, half) + like(MAGIC, half))
    piece = hold(bits(moved, "int32"))
    r = hold(near * like(1 / GELU_STEP, half) - hold(moved - like(MAGIC, moved)))
    tail = emit.look_up(GELU_PIECES[-1], piece)
    for coefficients in reversed(GELU_PIECES[:-1]):
        tail = hold(hold(tail * r) + emit.look_up(coefficients, piece))
    return hold(half + size) - near * tail


def gelu_tanh(x: Expr) -> Expr:
    """x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x³))) as x sigmoid(2...), absolute error <= 1e-6."""
    inner = x * (x * x * like(2 * 0.7978845608028654 * 0.044715, x) + like(1.5957691216057308, x))
    return x * sigmoid(inner)


# ---------------------------------------------------------------- logarithms


def log(x: Expr) -> Expr:
    """Natural logarithm, relative error <= 3e-7; -inf at 0, NaN below."""
    tiny = x < like(1.1754943508222875e-38, x)
    scaled = hold(select(tiny, x * like(float(1 << 23), x), x))
    word = hold(bits(scaled, "int32"))
    exponent = hold(_shift_right(word - like(0x3F3504F3, word), 23))
    mantissa = hold(bits(word - _shift_left(exponent, 23), "float32"))
    f = hold(mantissa - like(1.0, mantissa))
    e = hold(cast(exponent, "float32") - select(tiny, like(23.0, x), like(0.0, x)))
    low = polynomial(f, LOG) * (f * f) * f + e * like(LN2_LOW, e)
    value = hold(low - f * f * like(0.5, f) + f + e * like(LN2_HIGH, e))
    value = hold(select(x < like(float("inf"), x), value, x))
    value = hold(select(x > like(0.0, x), value, like(-float("inf"), x)))
    return select(T.Or(x < like(0.0, x), is_nan(x)), like(float("nan"), x), value)


def log1p_unit(t: Expr) -> Expr:
    """log(1 + t) for t in [0, 1], relative error <= 4e-6 (absolute 1e-7)."""
    series = t * (like(1.0, t) + t * (like(1 / 3, t) * t - like(0.5, t)))
    return select(t < like(0.01, t), series, log(t + like(1.0, t)))


def softplus(x: Expr) -> Expr:
    """log(1 + e^x) without overflow, absolute error <= 2e-7 (relative beyond 1)."""
    t = hold(exp(like(0.0, x) - T.abs(x)))
    return above(x, like(0.0, x)) + log1p_unit(t)


def mish(x: Expr) -> Expr:
    """x tanh(log(1 + e^x)), relative error <= 1e-6."""
    e = hold(exp(below(x, like(20.0, x))))
    n = hold(e * (e + like(2.0, e)))
    return select(x > like(20.0, x), x, x * (n / (n + like(2.0, n))))


def power(x: Expr, y: Expr) -> Expr:
    """x^y through float64, relative error <= 2e-7; special values as C's `pow`."""
    magnitude = hold(T.abs(x))
    product = hold(cast(y, "float64") * _log_double(magnitude))
    value = hold(cast(_exp_double(product), "float32"))
    whole = T.trunc(y)
    is_odd = T.NE(T.trunc(y * like(0.5, y)) * like(2.0, y), whole)
    is_odd = T.And(is_odd, T.abs(y) < like(16777216.0, y))
    negative = bits(x, "int32") < like(0, bits(x, "int32"))
    signed = hold(select(T.And(negative, is_odd), like(0.0, x) - value, value))
    fraction = T.And(T.NE(whole, y), T.abs(y) < like(float("inf"), y))
    no_real = T.And(T.And(x < like(0.0, x), magnitude < like(float("inf"), x)), fraction)
    value = hold(select(no_real, like(float("nan"), x), select(fraction, value, signed)))
    value = hold(select(T.Or(is_nan(x), is_nan(y)), like(float("nan"), x), value))
    unit = T.And(T.EQ(magnitude, like(1.0, x)), T.EQ(T.abs(y), like(float("inf"), y)))
    unit = T.Or(unit, T.Or(T.EQ(y, like(0.0, y)), T.EQ(x, like(1.0, x))))
    return select(unit, like(1.0, x), value)


def _log_double(x: Expr) -> Expr:
    """Natural logarithm of float32 x >= 0 as float64, relative error 1e-10."""
    tiny = x < like(1.1754943508222875e-38, x)
    word = hold(bits(select(tiny, x * like(float(1 << 23), x), x), "int32"))
    exponent = hold(_shift_right(word - like(0x3F3504F3, word), 23))
    m = hold(cast(bits(word - _shift_left(exponent, 23), "float32"), "float64"))
    s = hold((m - like(1.0, m)) / (m + like(1.0, m)))
    e = cast(cast(exponent, "float32") - select(tiny, like(23.0, x), like(0.0, x)), "float64")
    value = hold(polynomial(s * s, ATANH) * s + e * like(0.6931471805599453, e))
    infinite = like(float("inf"), value)
    value = hold(select(T.EQ(x, like(float("inf"), x)), infinite, value))
    return select(T.EQ(x, like(0.0, x)), like(-float("inf"), value), value)


def _exp_double(x: Expr) -> Expr:
    """e^x in float64, exact enough for float32, clamped to float32's range and beyond it."""
    x = hold(below(above(x, like(-170.0, x)), like(170.0, x)))
    n = hold(T.nearbyint(x * like(LOG2_E, x)))
    r = hold(x - n * like(0.6931471805599453, x))
    half = hold(T.nearbyint(cast(n, "float32") * like(0.5, cast(n, "float32"))))
    word = bits(half + like(MAGIC, half), "int32") - like(MAGIC_BITS, bits(half, "int32"))
    first = cast(_power_of_two(word), "float64")
    rest = cast(n, "float32") - half
    word = bits(rest + like(MAGIC, rest), "int32") - like(MAGIC_BITS, bits(rest, "int32"))
    second = cast(_power_of_two(word), "float64")
    return select(is_nan(x), x, polynomial(r, EXP_DOUBLE) * first * second)


# ---------------------------------------------------------------- angles


def sin(x: Expr) -> Expr:
    """Absolute error <= 2e-7 for |x| <= 1e6 (reduced in float64), in [-1, 1]; NaN at inf."""
    return _angle(x, 0.0)


def cos(x: Expr) -> Expr:
    """Absolute error <= 2e-7 for |x| <= 1e6 (reduced in float64), in [-1, 1]; NaN at inf."""
    return _angle(x, 1.0)


def _angle(x: Expr, quarter_turns: float) -> Expr:
    wide = hold(cast(x, "float64"))
    n = hold(T.nearbyint(wide * like(2 / 3.141592653589793, wide)))
    reduced = wide - n * like(HALF_PI, n) - n * like(HALF_PI_LOW, n)
    r = cast(reduced, "float32")
    r = hold(below(above(r, like(-1.0, r)), like(1.0, r)))
    turn = hold(n + like(quarter_turns, n))
    quadrant = turn - like(4.0, turn) * T.floor(turn * like(0.25, turn))
    q = hold(cast(quadrant, "float32"))
    r2 = hold(r * r)
    sine = hold(polynomial(r2, SIN) * r2 * r + r)
    cosine = hold(polynomial(r2, COS) * (r2 * r2) - r2 * like(0.5, r2) + like(1.0, r2))
    is_odd = T.Or(T.EQ(q, like(1.0, q)), T.EQ(q, like(3.0, q)))
    value = hold(select(is_odd, cosine, sine))
    return select(q > like(1.5, q), like(0.0, value) - value, value)
