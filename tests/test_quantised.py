"""Quantised models run in ONNX Runtime as users run them; our kernels beside int8 must pay."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    quantize_dynamic,
    quantize_static,
)

from sparsegraph import pipeline, proof, quantised
from sparsegraph.compile import Compiled, compile, load
from sparsegraph.errors import VerifyError
from sparsegraph.verify import Feed, feeds_for
from tests.passes.check import parse, weight

CONV = """g (float[1,3,8,8] x) => (float[1,16] y) {
    a = Conv<pads=[1,1,1,1]>(x, v)  b = Relu(a)  c = MaxPool<kernel_shape=[2,2],strides=[2,2]>(b)
    d = Conv(c, w)  e = Relu(d)  p = GlobalAveragePool(e)  y = Flatten(p) }"""
MATMUL = (
    """g (float[4,32] x) => (float[4,8] y) { a = MatMul(x, v)  b = Gelu(a)  y = MatMul(b, w) }"""
)
HALF = """g (float[32,64] x) => (float[32,64] y) {
    q = QuantizeLinear(x, s, z)  a = DequantizeLinear(q, s, z)  r = Relu(a)
    t = QuantizeLinear(r, s, z)  b = DequantizeLinear(t, s, z)
    c = MatMul(b, w)  d = Relu(c)  y = MatMul(d, v) }"""
"""Int8 up to `b`, then floating point."""


def conv_net() -> ir.Model:
    return parse(CONV, v=weight(8, 3, 3, 3), w=weight(16, 8, 3, 3))


def half() -> ir.Model:
    grid = {"s": np.array(0.05, np.float32), "z": np.array(128, np.uint8)}
    w, v = (np.where(a > 1.5, a, 0) for a in weight(2, 64, 64))
    return parse(HALF, **grid, w=w, v=v)


class Normal(CalibrationDataReader):  # type: ignore[misc]
    """Calibration with the feeds of the proof."""

    def __init__(self, model: ir.Model) -> None:
        self.feeds = iter(feeds_for(model, 4)[1:])

    def get_next(self) -> Feed | None:
        return next(self.feeds, None)


def quantise(model: ir.Model, folder: Path, kind: QuantFormat | None) -> Path:
    """The model in int8, with static ranges in one of two formats or, without one, dynamic."""
    float_file, file = folder / "float.onnx", folder / "int8.onnx"
    onnx.save(ir.to_proto(model), float_file)
    if kind is None:
        quantize_dynamic(float_file, file)
    else:
        quantize_static(float_file, file, Normal(model), quant_format=kind, per_channel=True)
    return file


CASES = {
    "conv-qdq": (conv_net, QuantFormat.QDQ),
    "conv-qlinear": (conv_net, QuantFormat.QOperator),
    "matmul-qdq": (lambda: parse(MATMUL, v=weight(32, 64), w=weight(64, 8)), QuantFormat.QDQ),
    "matmul-dynamic": (lambda: parse(MATMUL, v=weight(32, 64), w=weight(64, 8)), None),
}


@pytest.mark.parametrize("case", CASES)
def test_an_int8_model_is_what_onnx_runtime_makes_of_it_by_default(
    case: str, tmp_path: Path
) -> None:
    make, kind = CASES[case]
    file = quantise(make(), tmp_path, kind)
    compiled = compile(file)
    (segment,) = compiled.manifest.segments
    assert segment.reason == quantised.REASON
    n_nodes = len(onnx.load(file).graph.node)
    assert f"all {n_nodes} nodes" in compiled.report()
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for feed in feeds_for(load(file), 5):
        for got, want in zip(compiled.run(None, feed), session.run(None, feed), strict=True):
            np.testing.assert_array_equal(got, want)


def test_int8_layers_have_no_kernels_even_if_the_model_must_have_some() -> None:
    """Products that ONNX Runtime saturates on AVX2, with passes run before."""
    text = """g (float[1,64] x) => (float[1,8] y) {
        q = QuantizeLinear(x, s, z)  a = DequantizeLinear(q, s, z)
        b = DequantizeLinear(w, t, zero)  p = MatMul(a, b)  n = Neg(p)  m = Neg(n)
        r = QuantizeLinear(m, u, z)  y = DequantizeLinear(r, u, z) }"""
    scales = {name: np.array(n, np.float32) for name, n in (("s", 0.02), ("t", 0.01), ("u", 0.73))}
    w = np.where(weight(64, 8) > 0, 127, 111).astype(np.int8)
    zeros = {"z": np.array(20, np.uint8), "zero": np.array(0, np.int8)}
    model = parse(text, w=w, **scales, **zeros)
    compiled = compile(model, keep_native=True)
    (segment,) = compiled.manifest.segments
    assert segment.reason == quantised.REASON
    assert compiled.manifest.verification["max_rel_error"] == 0


def test_what_stands_between_int8_layers_is_left_with_them() -> None:
    text = """g (float[1,4,8,8] x) => (float[1,4,8,8] y, float[1,4,8,8] f, bool[1,4,8,8] g) {
        q = QuantizeLinear(x, s, z)  a = DequantizeLinear(q, s, z)  between = Relu(a)
        r = QuantizeLinear(between, s, z)  b = DequantizeLinear(r, s, z)
        c = Conv<pads=[1,1,1,1]>(b, w)  y = Sigmoid(c)
        k = DequantizeLinear(v, s, z)  f = Conv<pads=[1,1,1,1]>(b, k)
        g = Greater(x, s) }"""
    s, z = np.array(0.1, np.float32), np.array(0, np.uint8)
    model = parse(text, s=s, z=z, w=weight(4, 4, 3, 3), v=np.zeros((4, 4, 3, 3), np.uint8))
    ours = {v.name for n in model.graph if n not in quantised.left(model) for v in n.outputs}
    assert ours == {"c", "y"}
    assert quantised.left(conv_net()) == {}


def test_islands_join_over_every_path() -> None:
    """One layer in floating point is worth kernels for all that no quantised node parts from it."""
    text = """g (float[8,8] x) => (float[8,8] y, uint8[8,8] q) {
        a = Exp(x)  b = Neg(x)  c = Neg(b)  d = Add(a, c)  y = MatMul(d, w)
        q = QuantizeLinear(c, s, z) }"""
    model = parse(text, w=weight(8, 8), s=np.array(0.1, np.float32), z=np.array(0, np.uint8))
    assert [n.op_type for n in quantised.left(model)] == ["QuantizeLinear"]


def measured(monkeypatch: pytest.MonkeyPatch, ratio: float) -> Compiled:
    """`half` compiled where our kernels were measured at this multiple of default speed."""
    row = SimpleNamespace(dense_ms=ratio, ours_ms=1.0)
    monkeypatch.setattr(proof, "bench", lambda *_, **__: row)
    return compile(half())


def test_own_kernels_beside_int8_must_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = measured(monkeypatch, 1.3)
    kinds = [s.kind for s in compiled.manifest.segments]
    assert kinds == ["onnxruntime", "native"]
    assert compiled.manifest.segments[0].reason == quantised.REASON
    assert compiled.manifest.verification["max_rel_error"] < 1e-5
    slow = measured(monkeypatch, 1.04)
    (segment,) = slow.manifest.segments
    assert segment.reason.endswith("it ran at 1.0 of ONNX Runtime's speed")
    assert slow.manifest.verification["max_rel_error"] == 0


def test_own_kernels_whose_last_bits_become_int8_steps_are_dropped() -> None:
    """A product that is off by 1e-7 rounds to another number of int8 here and there."""
    text = """g (float[256,64] x) => (int16[256,64] y) {
        a = MatMul(x, w)  y = QuantizeLinear(a, s, z) }"""
    w = np.where(weight(64, 64) > 1, weight(64, 64), 0)
    compiled = compile(parse(text, w=w, s=np.array(1e-3, np.float32), z=np.array(0, np.int16)))
    (segment,) = compiled.manifest.segments
    assert segment.reason.endswith("outputs differ: last bits turn into steps of int8")


def test_a_pass_that_int8_amplifies_leaves_the_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> pipeline.Optimized:
        raise VerifyError("off")

    monkeypatch.setattr(pipeline, "optimize", fails)
    (segment,) = compile(half()).manifest.segments
    assert segment.reason == quantised.REASON
    with pytest.raises(VerifyError, match="off"):
        compile(half(), keep_native=True)
    with pytest.raises(VerifyError, match="off"):
        compile(conv_net())


def test_nothing_is_promised_for_int8_on_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        importlib.import_module("sparsegraph.compile"), "runs_here", lambda _: False
    )
    (segment,) = compile(half()).manifest.segments
    assert segment.reason == quantised.REASON
