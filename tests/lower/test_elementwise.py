"""Every element-wise operator that is lowered, with its attributes, against ONNX Runtime."""

import numpy as np
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper

from sparsegraph.compile import compile
from sparsegraph.lower.regions import BINARY, ELEMENTWISE, UNARY

F, INT, L, B = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL
SHAPE = (3, 37)
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
