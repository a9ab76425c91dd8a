"""Every element-wise operator that is lowered, with its attributes, against ONNX Runtime."""

import numpy as np
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, parser

from sparsegraph.compile import compile
from sparsegraph.lower.regions import BINARY, ELEMENTWISE, UNARY

F, INT, L, B = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL
SHAPE = (3, 37)
HEAD = '<ir_version: 9, opset_import: ["" : 17]>'
LOGICAL, COMPARING = {"And", "Or", "Xor"}, {"Equal", "Greater", "GreaterOrEqual", "Less"}
COMPARING |= {"LessOrEqual", "IsNaN"}
ATTRIBUTES = {
    "Gelu": [{}, {"approximate": "tanh"}],
    "Clip": [{}],
    "LeakyRelu": [{}, {"alpha": 0.3}],
    "HardSigmoid": [{}, {"alpha": 0.1, "beta": 0.4}],
    "Elu": [{}, {"alpha": 0.7}],
    "Selu": [{}, {"alpha": 1.2, "gamma": 0.9}],
    "Celu": [{}, {"alpha": 0.7}],
    "ThresholdedRelu": [{}, {"alpha": 0.2}],
    "Cast": [{"to": t} for t in (F, INT, L, B)],
    "Swish": [{}],
    "Mod": [{"fmod": 1}],
}
CASES = [(op, a, F) for op in sorted(ELEMENTWISE) for a in ATTRIBUTES.get(op, [{}])]
CASES += [("Mod", {"fmod": f}, t) for f in (0, 1) for t in (INT, L)]
CASES += [(op, {}, t) for op in ("Add", "Sub", "Mul", "Div", "Equal", "Less") for t in (INT, L)]


def model(op: str, attributes: dict[str, object], dtype: int) -> ModelProto:
    given = B if op in LOGICAL | {"Not"} else dtype
    n = 1 if op in UNARY | ATTRIBUTES.keys() - BINARY else 2
    types = [given] * n if op != "Where" else [B, dtype, dtype]
    result = B if op in LOGICAL | COMPARING | {"Not"} else attributes.get("to", dtype)
    names = [f"x{i}" for i in range(len(types))]
    values = [helper.make_tensor_value_info(i, t, SHAPE) for i, t in zip(names, types)]
    out = helper.make_tensor_value_info("y", result, SHAPE)
    node = helper.make_node(op, names, ["y"], **attributes)
    opset = 24 if op == "Swish" else 20
    graph = helper.make_graph([node], "g", values, [out])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def feeds(proto: ModelProto, op: str) -> dict[str, np.ndarray]:
    rng, found = np.random.default_rng(0), {}
    for value in proto.graph.input:
        x = rng.uniform(0.1 if op in ("Log", "Sqrt", "Pow", "Reciprocal") else -4, 4, SHAPE)
        dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        if dtype.kind == "i":
            x = np.where(rng.random(SHAPE) < 0.5, -1, 1) * rng.integers(1, 99, SHAPE)
        found[value.name] = (x > 0 if dtype.kind == "b" else x).astype(dtype)
    return found


@pytest.mark.parametrize(("op", "attributes", "dtype"), CASES)
def test_operators(op: str, attributes: dict[str, object], dtype: int) -> None:
    proto = model(op, attributes, dtype)
    values = feeds(proto, op)
    compiled = compile(proto, keep_native=True, fallback=False, check=False)
    (y,) = compiled.run(None, values)
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    (expected,) = session.run(None, values)
    if y.dtype.kind == "f":
        np.testing.assert_allclose(y, expected, rtol=2e-6, atol=2e-6)
    else:
        np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("fmod", [0, 1])
def test_remainders_of_large_and_special_numbers(fmod: int) -> None:
    proto = model("Mod", {"fmod": fmod}, F)
    rng = np.random.default_rng(0)
    a = rng.uniform(-1e6, 1e6, SHAPE).astype("f4")
    b = rng.uniform(0.01, 3, SHAPE).astype("f4") * rng.choice([-1, 1], SHAPE).astype("f4")
    a[0, :6] = [1, -1, np.inf, np.nan, 0, 5]
    b[0, :6] = [np.inf, np.inf, 2, 2, 3, 0]
    compiled = compile(proto, keep_native=True, fallback=False, check=False)
    with np.errstate(invalid="ignore"):
        expected = (np.fmod if fmod else np.mod)(a, b)
    np.testing.assert_array_equal(compiled.run(None, {"x0": a, "x1": b})[0], expected)


INTEGERS = {"int8": np.int8, "uint8": np.uint8, "int32": np.int32, "int64": np.int64}


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("op", ["Div", "Mod"])
def test_no_integer_divisor_stops_the_process(op: str, dtype: str) -> None:
    """Where ONNX Runtime ends with an error, or the process: 0 by 0, and -2^31 by -1 wraps."""
    least, most = np.iinfo(INTEGERS[dtype]).min, np.iinfo(INTEGERS[dtype]).max
    cases = [(7, 0, 0, 0), (0, 0, 0, 0), (7, 2, 3, 1), (most, 1, most, 0), (most, most, 1, 0)]
    if least:
        cases += [(least, -1, least, 0), (least, most, -1, most - 1), (7, -1, -7, 0)]
    a, b, quotient, remainder = np.array(cases, INTEGERS[dtype]).T.copy()
    n = len(cases)
    text = f"{HEAD} g ({dtype}[{n}] a, {dtype}[{n}] b) => ({dtype}[{n}] y) {{ y = {op} (a, b) }}"
    compiled = compile(parser.parse_model(text), keep_native=True, fallback=False, check=False)
    found = compiled.run(None, {"a": a, "b": b})[0]
    np.testing.assert_array_equal(found, quotient if op == "Div" else remainder)


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("op", ["Div", "Mod"])
def test_constant_divisors(op: str, dtype: str) -> None:
    """0 and -1 have no code of their own in LLVM: 0 is undefined, and so is -2^31 by -1."""
    info = np.iinfo(INTEGERS[dtype])
    x = np.array([info.min, info.min + 1, 0, 1, info.max], INTEGERS[dtype])
    divisors = [0, 1, 3] + [-1, -3] * (info.min < 0)
    nodes = "".join(f"y{i} = {op} (x, b{i}) " for i in range(len(divisors)))
    constants = ", ".join(f"{dtype} b{i} = {{{b}}}" for i, b in enumerate(divisors))
    outputs = ", ".join(f"{dtype}[5] y{i}" for i in range(len(divisors)))
    text = f"{HEAD} g ({dtype}[5] x) => ({outputs}) <{constants}> {{ {nodes} }}"
    compiled = compile(parser.parse_model(text), keep_native=True, fallback=False, check=False)
    for by, found in zip(divisors, compiled.run(None, {"x": x}), strict=True):
        signs = np.sign(x) * np.sign(by)
        quotients = [abs(a) // abs(by or 1) * s for a, s in zip(map(int, x), map(int, signs))]
        expected = quotients if op == "Div" else [int(a) % (by or 1) for a in x]
        wrapped = (np.array(expected, object) - info.min) % (info.max - info.min + 1) + info.min
        np.testing.assert_array_equal(found, wrapped.astype(x.dtype))


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("op", ["Greater", "Less", "Equal", "Max", "Min", "Mul", "Sub"])
def test_extreme_constants(op: str, dtype: str) -> None:
    """TVM aborts where the bounds of an expression leave its type."""
    info = np.iinfo(INTEGERS[dtype])
    x = np.array([info.min, info.min + 1, 0, 1, info.max - 1, info.max], INTEGERS[dtype])
    constants = [info.min, info.min + 1, 0, info.max - 1, info.max]
    result = "bool" if op in COMPARING else dtype
    nodes = "".join(f"y{i} = {op} (x, c{i}) z{i} = {op} (c{i}, x) " for i in range(5))
    weights = ", ".join(f"{dtype} c{i} = {{{c}}}" for i, c in enumerate(constants))
    outputs = ", ".join(f"{result}[6] y{i}, {result}[6] z{i}" for i in range(5))
    proto = parser.parse_model(f"{HEAD} g ({dtype}[6] x) => ({outputs}) <{weights}> {{ {nodes} }}")
    compiled = compile(proto, keep_native=True, fallback=False, check=False)
    by_op = {"Max": np.maximum, "Min": np.minimum, "Mul": np.multiply, "Sub": np.subtract}
    step = by_op.get(op) or getattr(np, op.lower())
    found = compiled.run(None, {"x": x})
    for i, c in enumerate(np.array(constants, INTEGERS[dtype])):
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(found[2 * i], step(x, c))
            np.testing.assert_array_equal(found[2 * i + 1], step(c, x))


SPECIAL = np.array([-5, -1, 0, 1, 2, 7, np.inf, -np.inf, np.nan, -0.0, 0.5, -2.5], np.float32)
POWERS = {  # declaration of x, and of the constant e -> whether it is native
    ("int32", "int32 e = {3}"): True,
    ("int32", "float e = {2.0}"): True,
    ("int64", "int64 e = {0}"): True,
    ("int64", "int64 e = {17}"): False,
    ("int32", "int32 e = {-1}"): False,
    ("int32", "float e = {0.5}"): False,
    ("int32", "float e = {2.5}"): False,
    ("float", "float e = {inf}"): True,
    ("float", "float e = {-2.0}"): True,
    ("float", "int64 e = {3}"): True,
}


@pytest.mark.parametrize(("dtype", "exponent"), POWERS)
def test_powers(dtype: str, exponent: str) -> None:
    proto = parser.parse_model(
        f"{HEAD} g ({dtype}[12] x) => ({dtype}[12] y) <{exponent}> {{ y = Pow (x, e) }}"
    )
    x = SPECIAL if dtype == "float" else np.arange(-5, 7).astype(INTEGERS[dtype])
    compiled = compile(proto, keep_native=True, check=False)
    (segment,) = compiled.manifest.segments
    assert (segment.kind == "native") == POWERS[dtype, exponent]
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    np.testing.assert_allclose(
        compiled.run(None, {"x": x})[0], session.run(None, {"x": x})[0], rtol=2e-6
    )


def test_integers_as_powers_of_a_constant_are_left() -> None:
    text = "g (int32[3] x) => (float[3] y) <float b = {2.5}> { y = Pow (b, x) }"
    compiled = compile(parser.parse_model(f"{HEAD} {text}"), keep_native=True, check=False)
    assert [s.kind for s in compiled.manifest.segments] == ["onnxruntime"]


def test_what_stands_before_such_a_power_is_native() -> None:
    text = """g (int32[3] x) => (float[3] y) <float b = {2.5}, int32 k = {1}> {
        a = Add (x, k)  y = Pow (b, a) }"""
    compiled = compile(parser.parse_model(f"{HEAD} {text}"), keep_native=True, check=False)
    assert [s.kind for s in compiled.manifest.segments] == ["native", "onnxruntime"]


@pytest.mark.parametrize("divisor", ["0.0", "-0.0"])
def test_division_by_a_constant_zero(divisor: str) -> None:
    text = f"g (float[12] x) => (float[12] y) <float b = {{{divisor}}}> {{ y = Div (x, b) }}"
    proto = parser.parse_model(f"{HEAD} {text}")
    compiled = compile(proto, keep_native=True, fallback=False, check=False)
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    expected = session.run(None, {"x": SPECIAL})[0]
    np.testing.assert_array_equal(compiled.run(None, {"x": SPECIAL})[0], expected)


def test_not_a_number_is_true() -> None:
    text = "g (float[12] x) => (bool[12] y) { y = Cast <to=9> (x) }"
    compiled = compile(
        parser.parse_model(f"{HEAD} {text}"), keep_native=True, fallback=False, check=False
    )
    found = compiled.run(None, {"x": SPECIAL})[0]
    np.testing.assert_array_equal(found, SPECIAL != 0)
