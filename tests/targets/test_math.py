"""Elementary functions over the whole float32 range against float64, by the bound each states."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from sparsegraph.targets import emit, host
from sparsegraph.targets.kernels import expression, math

from sparsegraph import targets
from tests.targets.expression_kernel import Apply

A, B = ("arg", 0), ("arg", 1)
LANES = (1, 4, 8, 16)
# function: relative bound, absolute bound (an error may meet either)
BOUNDS = {
    "Exp": (3e-7, 1.5e-45),
    "Log": (3e-7, 0),
    "Tanh": (5e-7, 1e-45),
    "Erf": (5e-7, 1.5e-45),
    "Sigmoid": (5e-7, 5e-39),
    "Gelu": (3e-7, 1e-6),
    "GeluTanh": (3e-7, 1e-6),
    "Softplus": (3e-7, 2e-7),
    "Mish": (1e-6, 2e-43),
    "Swish": (6e-7, 5e-37),
}


@dataclass(frozen=True)
class PowerOfTwo:
    """y[i] = 2^x[i] for x <= 0."""

    lanes: int

    @property
    def name(self) -> str:
        return f"exp2_negative_{self.lanes}"

    @property
    def params(self) -> emit.Signature:
        return emit.signature("y:float32* x:float32*")

    def body(self, target: targets.Target) -> Any:
        def emit_body(y: emit.Expr, x: emit.Expr, begin: emit.Expr, end: emit.Expr) -> None:
            with emit.loop(begin, end) as item:
                at = emit.bind(item * self.lanes)
                value = math.exp2_negative(emit.load(x, at, self.lanes))
                emit.store(y, value, at, self.lanes)

        return emit_body


KERNELS = [
    *(PowerOfTwo(lanes) for lanes in LANES),
    *(Apply((op, A), lanes, ("float32",)) for op in BOUNDS for lanes in LANES),
    *(Apply((op, A), lanes, ("float32",)) for op in ("Sin", "Cos") for lanes in (1, 8)),
    *(Apply(("Pow", A, B), lanes, ("float32", "float32")) for lanes in (1, 8)),
    *(Apply(("FromHalf", A), lanes, ("float16",)) for lanes in (1, 8)),
    *(Apply(("ToHalf", A), lanes, ("float32",)) for lanes in (1, 8)),
]
EDGES = [
    0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 1e-40, 1.17549435e-38, 1, -1, 88.72, 88.73,
    89, -87.3, -87.5, -103.9, -104.1, -120, 200, -200, 3.9, 3.93, 9.0, 9.05, 20, 3e38, -3e38,
]  # fmt: skip


@pytest.fixture(scope="module")
def library() -> host.Library:
    return host.Library(KERNELS, targets.get("native"))


def sample() -> np.ndarray:
    """Edges, every magnitude of float32, and dense values near zero (32768 in all)."""
    rng = np.random.default_rng(11)
    words = rng.integers(0, 1 << 32, 16384, dtype=np.uint64).astype(np.uint32).view(np.float32)
    near = np.concatenate([rng.uniform(-12, 12, 8192), rng.uniform(-110, 95, 8192)])
    x = np.concatenate([words, near.astype(np.float32)])
    x[: len(EDGES)] = EDGES
    return host.aligned(x)


def apply(library: host.Library, kernel: Apply | PowerOfTwo, *inputs: np.ndarray) -> np.ndarray:
    y = host.empty(inputs[0].size)
    library.call(kernel, y, *inputs, end=y.size // kernel.lanes)
    return y


def assert_within(
    found: np.ndarray, expected: np.ndarray, relative: float, absolute: float, x: np.ndarray
) -> None:
    """Equal where float32 overflows or is undefined, close elsewhere."""
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = np.asarray(expected, np.float32)
        special = ~np.isfinite(rounded)
        np.testing.assert_array_equal(found[special], rounded[special])
        error = np.abs(found[~special].astype(np.float64) - expected[~special])
    bound = np.maximum(relative * np.abs(expected[~special]), absolute)
    worst = np.argmax(error - bound)
    assert (error <= bound).all(), (x[~special][worst], found[~special][worst], error[worst])


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("op", list(BOUNDS))
def test_whole_range(op: str, lanes: int, library: host.Library) -> None:
    x = sample()
    relative, absolute = BOUNDS[op]
    expected = expression.evaluate((op, A), [x.astype(np.float64)])
    if op in ("Gelu", "Swish", "Mish", "GeluTanh"):  # -inf * 0, as ONNX Runtime
        expected[x == -np.inf] = np.nan
        if op == "GeluTanh":
            expected = np.where(np.abs(x) > 1e12, np.maximum(x, 0), expected)
            expected[x == -np.inf] = np.nan
    found = apply(library, Apply((op, A), lanes, ("float32",)), x)
    assert_within(found, expected, relative, absolute, x)


@pytest.mark.parametrize("lanes", [1, 8])
def test_halves(lanes: int, library: host.Library) -> None:
    """Every float16, what lies between them and next to that, and all magnitudes, bit by bit."""
    halves = host.aligned(np.arange(1 << 16, dtype=np.uint16).view(np.float16))
    singles = halves.astype(np.float32)
    found = host.empty(halves.size)
    library.call(
        Apply(("FromHalf", A), lanes, ("float16",)), found, halves, end=halves.size // lanes
    )
    is_nan = np.isnan(singles)
    np.testing.assert_array_equal(found.view("u4")[~is_nan], singles.view("u4")[~is_nan])
    assert np.isnan(found[is_nan]).all()
    with np.errstate(invalid="ignore"):
        between = (singles[1:].astype(np.float64) + singles[:-1]).astype(np.float32) / 2
    near = [np.nextafter(between, np.float32(end)) for end in (np.inf, -np.inf)]
    edges = np.float32([65504, 65519.996, 65520, 65536, 1e38, -65520])
    x = np.concatenate([singles, between, *near, edges, sample()])
    x = host.aligned(x[: x.size // lanes * lanes])
    with np.errstate(over="ignore"):
        wanted = x.astype(np.float16)
    given = host.empty(x.size, np.float16)
    library.call(Apply(("ToHalf", A), lanes, ("float32",)), given, x, end=x.size // lanes)
    is_nan = np.isnan(wanted)
    np.testing.assert_array_equal(given.view("u2")[~is_nan], wanted.view("u2")[~is_nan])
    assert np.isnan(given[is_nan]).all()


@pytest.mark.parametrize("lanes", LANES)
def test_negative_powers_of_two(lanes: int, library: host.Library) -> None:
    x = host.aligned(-np.abs(sample()))
    found = apply(library, PowerOfTwo(lanes), x)
    assert_within(found, np.exp2(x.astype(np.float64)), 3e-7, 2.0**-126, x)
    assert (found[x <= -127] == 0).all()


@pytest.mark.parametrize("lanes", [1, 8])
@pytest.mark.parametrize("op", ["Sin", "Cos"])
def test_angles(op: str, lanes: int, library: host.Library) -> None:
    rng = np.random.default_rng(2)
    x = np.concatenate([rng.uniform(-10, 10, 4096), rng.uniform(-1e6, 1e6, 4096)])
    x = host.aligned(x.astype(np.float32))
    kernel = Apply((op, A), lanes, ("float32",))
    expected = expression.evaluate((op, A), [x.astype(np.float64)])
    assert_within(apply(library, kernel, x), expected, 0, 2e-7, x)
    huge = host.aligned(np.array([np.inf, -np.inf, np.nan, 1e38] * 4, np.float32))
    found = apply(library, kernel, huge).reshape(4, 4)
    assert np.isnan(found[:, :3]).all()
    assert (np.abs(found[:, 3]) <= 1).all()


@pytest.mark.parametrize("lanes", [1, 8])
def test_power(lanes: int, library: host.Library) -> None:
    rng = np.random.default_rng(4)
    x, y = (rng.standard_normal(8192).astype(np.float32) * 4 for _ in range(2))
    y[:4096] = np.round(y[:4096] * 5)
    specials = [0.0, -0.0, 1.0, -2.0, np.inf, -np.inf, np.nan, 1e-40, 0.5, 3.0]
    pairs = np.array([(a, b) for a in specials for b in specials], np.float32)
    x[: len(pairs)], y[: len(pairs)] = pairs.T
    x, y = host.aligned(x), host.aligned(y)
    expected = expression.evaluate(("Pow", A, B), [x.astype(np.float64), y.astype(np.float64)])
    kernel = Apply(("Pow", A, B), lanes, ("float32", "float32"))
    assert_within(apply(library, kernel, x, y), expected, 2e-7, 1e-44, x)
