"""Every operator, at one lane and at a vector, against its NumPy meaning; NaN as ONNX Runtime."""

import numpy as np
import onnx
import onnxruntime
import pytest
from sparsegraph.targets import emit, host
from sparsegraph.targets.kernel import prim_func
from sparsegraph.targets.kernels import expression
from sparsegraph.targets.kernels.operators import OPERATORS

from sparsegraph import targets
from sparsegraph.errors import UnsupportedError
from tests.targets.expression_kernel import Apply

A, B, C = ("arg", 0), ("arg", 1), ("arg", 2)
F, L, T = "float32", "int64", "bool"


def const(value: float) -> tuple:
    return ("const", value)


UNARY = [
    "Identity", "Abs", "Neg", "Sign", "Floor", "Ceil", "Round", "Sqrt", "Reciprocal", "Exp", "Log",
    "Sin", "Cos", "Erf", "Tanh", "Sigmoid", "Gelu", "GeluTanh", "Softplus", "Softsign", "Mish",
    "Swish", "Relu", "HardSwish", "IsNaN", "Not",
]  # fmt: skip
TREES: list[tuple[tuple, tuple[str, ...]]] = [
    *(((op, A), (F,)) for op in UNARY),
    *(((op, A), (L,)) for op in ("Abs", "Neg", "Sign", "Relu", "Not")),
    *(((op, A, B), (F, F)) for op in ("Add", "Sub", "Mul", "Div", "Min", "Max", "Pow", "PRelu")),
    *(((op, A, B), (L, L)) for op in ("Add", "Sub", "Mul", "Div", "Min", "Max")),
    *(((op, A, B, C), (F, F, F)) for op in ("Sum", "Min", "Max")),
    *(
        ((op, A, B), types)
        for op in ("Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual")
        for types in ((F, F), (L, L))
    ),
    *(((op, A, B), (T, T)) for op in ("And", "Or", "Xor", "Equal")),
    *((("Mod", A, B, const(f)), types) for f in (0, 1) for types in ((F, F), (L, L))),
    *((("Pow", A, const(n)), (F,)) for n in (0.0, 1.0, 2.0, 3.0, 7.0, -2.0, 0.5, -0.5, 1.7)),
    (("Pow", A, const(2)), (L,)),
    (("Max", const(0.5), A), (F,)),
    (("Min", A, const(3)), (L,)),
    (("Clip", A, const(-1.0), const(2.0)), (F,)),
    (("Clip", A, const(0.0), const(float("inf"))), (F,)),
    (("Clip", A, B, C), (F, F, F)),
    (("LeakyRelu", A, const(0.01)), (F,)),
    (("HardSigmoid", A, const(0.2), const(0.5)), (F,)),
    (("Elu", A, const(1.5)), (F,)),
    (("Selu", A, const(1.67326), const(1.0507)), (F,)),
    (("Celu", A, const(2.0)), (F,)),
    (("ThresholdedRelu", A, const(1.0)), (F,)),
    (("Swish", A, const(1.702)), (F,)),
    (("Where", A, B, C), (T, F, F)),
    (("Where", ("Less", A, const(0.0)), const(-2.0), A), (F,)),
    (("Where", ("Not", ("And", A, B)), C, const(7)), (T, T, L)),
    *((("Cast", A, ("type", to)), (F,)) for to in ("int32", "int64", "bool", "float64")),
    *((("Cast", A, ("type", to)), (L,)) for to in (F, "int32", "bool")),
    *((("Cast", A, ("type", to)), (T,)) for to in (F, L)),
    (("Cast", ("Xor", A, ("Less", B, const(0.0))), ("type", F)), (T, F)),
    (("Mul", ("Sigmoid", ("Add", A, B)), ("Add", A, B)), (F, F)),
    (("Add", ("FromHalf", A), const(1.0)), ("float16",)),
    (("ToHalf", ("Neg", A)), (F,)),
]
KERNELS = [Apply(tree, lanes, types) for tree, types in TREES for lanes in (1, 8)]


@pytest.fixture(scope="module")
def library() -> host.Library:
    return host.Library(KERNELS, targets.get("native"))


def sample(dtype: str, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if dtype == T:
        return host.aligned(rng.random(128) < 0.5)
    if dtype == L:
        x = rng.integers(-9, 10, 128)
        return host.aligned(np.where(x == 0, 4, x) if seed else x)
    x = (rng.standard_normal(128) * 3).astype(np.float32)
    x[:8] = [0.5, 1.5, 2.5, -0.5, -1.5, 0.0, 100.0, -100.0]
    return host.aligned(x.astype(dtype))


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_against_numpy(kernel: Apply, library: host.Library) -> None:
    inputs = [sample(d, i) for i, d in enumerate(kernel.dtypes)]
    y = host.empty(128, expression.dtype(kernel.tree, kernel.dtypes))
    library.call(kernel, y, *inputs, end=128 // kernel.lanes)
    wide = [x.astype(np.float64) if x.dtype == np.float32 else x for x in inputs]
    expected = expression.evaluate(kernel.tree, wide)
    if y.dtype.kind != "f":
        np.testing.assert_array_equal(y, expected.astype(y.dtype))
    else:
        np.testing.assert_allclose(y, expected.astype(np.float32), rtol=2e-6, atol=2e-6)


def test_every_operator_is_tested() -> None:
    def operators(tree: tuple) -> set[str]:
        if tree[0] in expression.LEAVES:
            return set()
        return {tree[0]}.union(*(operators(c) for c in tree[1:]))

    assert set(OPERATORS) == set().union(*(operators(tree) for tree, _ in TREES))


ODD = np.array([np.nan, np.inf, -np.inf, 0, -1, 1, 2, -2], np.float32)
RUNTIME = [
    "Relu", "Max", "Min", "Clip", "LeakyRelu", "ThresholdedRelu", "HardSwish", "Sign", "Round",
    "Abs", "Sigmoid", "Tanh", "Erf", "Exp", "Sqrt", "Softplus", "Softsign", "Mish", "Floor",
]  # fmt: skip
ARGS = {
    "Max": (B,), "Min": (B,), "Clip": (const(-1.0), const(2.0)), "LeakyRelu": (const(0.01),),
    "ThresholdedRelu": (const(1.0),),
}  # fmt: skip
ODD_KERNELS = {op: Apply((op, A, *ARGS.get(op, ())), 8, (F, F)) for op in RUNTIME}
WITH_ITSELF = {op: Apply((op, A, A), 8, (F,)) for op in ("Sub", "Div")} | {
    op: Apply(("Where", (op, A, A), const(1.0), A), 8, (F,)) for op in ("Equal", "LessOrEqual")
}


@pytest.fixture(scope="module")
def odd_library() -> host.Library:
    kernels = [*ODD_KERNELS.values(), *WITH_ITSELF.values()]
    return host.Library(kernels, targets.get("native"))


def by_runtime(op: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The same operator in ONNX Runtime."""
    extra = {"low": -1.0, "high": 2.0} if op == "Clip" else {}
    names = ["a", *extra] if op == "Clip" else ["a", "b"][: 1 + (op in ("Max", "Min"))]
    node = onnx.helper.make_node(op, names, ["y"])
    info = [onnx.helper.make_tensor_value_info(n, 1, [len(a)]) for n in ("a", "b")]
    values = [onnx.helper.make_tensor(k, 1, [], [v]) for k, v in extra.items()]
    out = onnx.helper.make_tensor_value_info("y", 1, None)
    graph = onnx.helper.make_graph([node], "g", info, [out], values)
    opset = [onnx.helper.make_opsetid("", 18)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return session.run(None, {"a": a, "b": b})[0]


@pytest.mark.parametrize("op", RUNTIME)
def test_nan_and_infinity_as_onnx_runtime(op: str, odd_library: host.Library) -> None:
    a = host.aligned(np.concatenate([ODD, np.ones(8, np.float32)]))
    b = host.aligned(np.concatenate([np.ones(8, np.float32), ODD]))
    if op == "ThresholdedRelu":  # NaN > alpha is false: 0, as ONNX Runtime's vector code
        a[0] = 0
    y = host.empty(16)
    odd_library.call(ODD_KERNELS[op], y, a, b, end=2)
    np.testing.assert_allclose(y, by_runtime(op, a, b), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("op", WITH_ITSELF)
def test_a_value_with_itself_is_computed(op: str, odd_library: host.Library) -> None:
    """TVM's simplifier knows x - x without asking whether x is finite."""
    a, y = host.aligned(ODD), host.empty(8)
    odd_library.call(WITH_ITSELF[op], y, a, end=1)
    np.testing.assert_array_equal(y, expression.evaluate(WITH_ITSELF[op].tree, [ODD]))


def test_labels_are_short_and_distinct() -> None:
    labels = [expression.label(tree) for tree, _ in TREES]
    assert len(set(labels)) == len({tree for tree, _ in TREES})
    assert all(len(text) <= 32 and text.isidentifier() for text in labels)
    near = [expression.label(("Mul", A, const(v))) for v in (1.0, 1.0000001, -1.0, 1e-7, 1e7)]
    assert len(set(near)) == 5
    assert expression.label(None) == "id"


def test_types_and_arguments() -> None:
    assert expression.dtype(("Where", A, const(1), B), ("bool", L)) == L
    assert expression.dtype(("Mul", const(2.0), A), (F,)) == F
    assert expression.dtype(("Not", ("Less", A, B)), (F, F)) == "bool"
    assert expression.n_args(("Add", A, ("Mul", C, const(1.0)))) == 3
    assert expression.n_args(const(1.0)) == 0


def test_unknown_operator_is_refused() -> None:
    kernel = Apply(("Frobnicate", A), 1, (F,))
    with pytest.raises(UnsupportedError, match="Frobnicate"):
        prim_func(kernel, targets.get("native"))


@pytest.mark.parametrize("name", ["aarch64", "x86-64-v4"])
def test_other_machines_compile(name: str, tmp_path) -> None:
    other = targets.get(name)
    functions = {
        k.name: prim_func(k, other)
        for tree, types in TREES[::3]
        for k in [Apply(tree, other.lanes, types)]
    }
    emit.write_object(functions, other, tmp_path / "k.o")
    assert (tmp_path / "k.o").stat().st_size > 1000


def test_what_is_cheap_enough_to_be_repeated() -> None:
    residual = ("Relu", ("Add", ("Mul", ("arg", 0), ("const", 2.0)), ("arg", 1)))
    assert expression.is_cheap(residual)
    assert not expression.is_cheap(("Relu", ("Gelu", ("arg", 0))))
    assert not expression.is_cheap(("Sigmoid", ("arg", 0)))
