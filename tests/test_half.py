"""Models of half precision compute in float32: float16 behind casts, bfloat16 altogether."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper, parser
from sparsegraph.passes.widen_half import WidenHalf
from sparsegraph.targets.kernels.operators import np_gelu

from benchmarks import bundles
from sparsegraph import capture, delta, half, pipeline, targets, verify
from sparsegraph.budget.within import prune_within
from sparsegraph.compile import compile, load
from sparsegraph.errors import CaptureError, UnsupportedError, VerifyError
from sparsegraph.inspect import inspect
from sparsegraph.prune import prune
from sparsegraph.rewrite import Fuel
from sparsegraph.runtime import InferenceSession
from sparsegraph.tasks import compile_tasks
from tests.passes.check import parse
from tests.targets import cross

HALVES = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
MLP = """g (float16[64,128] x) => (float16[64,32] y) {
    a = MatMul(x, v)  b = Gelu(a)  c = Add(b, e)  y = MatMul(c, w) }"""
BRANCHES = """<ir_version: 10, opset_import: ["" : 23]>
g (bool which, float16[4] x) => (float16[4] y) {
    a = Mul(x, x)
    y = If(which) <
        then_branch = t () => (float16[4] p) { p = Add(x, a) },
        else_branch = f () => (float16[4] q) <float16[4] k = {1,2,3,4}> { q = Mul(a, k) }
    >
}"""


def weights(seed: int = 0, density: float = 0.1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    made = {}
    for name, shape in {"v": (128, 256), "w": (256, 32)}.items():
        full = rng.standard_normal(shape) / np.sqrt(shape[0] * density)
        made[name] = np.where(rng.random(shape) < density, full, 0).astype(np.float16)
    return {**made, "e": rng.standard_normal(256).astype(np.float16)}


def mlp(seed: int = 0) -> ir.Model:
    return parse(MLP, **weights(seed))


def types(values: list[ir.Value]) -> list[ir.DataType | None]:
    return [v.dtype for v in values]


def test_float16_is_native_and_keeps_its_borders() -> None:
    model = mlp()
    compiled = compile(model)
    assert compiled.fallback_nodes == []
    assert [r["format"] for r in compiled.manifest.layers] != ["dense"] * 2
    feed = verify.feeds_for(model)[1]
    (found,) = compiled.run(None, feed)
    assert found.dtype == np.float16
    in_double = {k: v.astype(np.float64) for k, v in weights().items()}
    a = feed["x"].astype(np.float64) @ in_double["v"]
    exact = (np_gelu(a) + in_double["e"]) @ in_double["w"]
    scale = np.abs(exact).max()
    assert np.abs(found - exact).max() <= 2.0**-11 * scale * 1.01  # the last rounding alone
    passed = {r["name"]: r for r in compiled.manifest.passes}
    assert passed["widen_half"]["n_applied"] == 1
    assert passed["widen_half"]["max_rel_error"] < 2e-3


@pytest.mark.parametrize("target", ["native", "x86-64-v2", "c11", "armv7", "wasm", "riscv64"])
def test_every_half_goes_through(target: str, tmp_path: Path) -> None:
    machine = targets.get(target)
    cross.require_for(machine)
    n = HALVES.size
    model = parse(f"g (float16[{n}] x) => (float16[{n}] y) {{ y = Neg(x) }}")
    compiled = compile(model, machine, output=tmp_path / "m.sg", fallback=False, check=False)
    command = bundles.command(machine, compiled.path)
    (found,) = bundles.read(compiled, bundles.run(compiled, {"x": HALVES}, *command))
    is_nan = np.isnan(HALVES)
    np.testing.assert_array_equal(found[~is_nan].view("u2"), (-HALVES[~is_nan]).view("u2"))
    assert np.isnan(found[is_nan]).all()


@pytest.mark.parametrize("to", [1, 6, 7, 9])
def test_other_types_become_halves_and_back(to: int) -> None:
    """By rounding to the nearest, halfway to even, as ONNX Runtime."""
    kind = {1: "float", 6: "int32", 7: "int64", 9: "bool"}[to]
    x = np.array([0, 1, 2, 2049, 2051, 4095, 65503, 65504, 65519, 65520, 1 << 20], np.int64)
    x = np.concatenate([x, -x])
    given = {1: x / 8, 9: x > 1}.get(to, x).astype(onnx.helper.tensor_dtype_to_np_dtype(to))
    halves = np.array([0, -0.0, 0.4, -1.6, 2049, 65504, -7, 2**-24], np.float16)
    model = parse(f"""g ({kind}[22] x, float16[8] h) => (float16[22] y, {kind}[8] z) {{
        y = Cast<to=10>(x)  z = Cast<to={to}>(h) }}""")
    feed = {"x": given, "h": halves}
    compiled = compile(model, keep_native=True, fallback=False, check=False)
    wanted = verify.Session(model).run(feed)
    for value, found in zip(wanted.values(), compiled.run(None, feed), strict=True):
        np.testing.assert_array_equal(found, value)


def test_bfloat16_is_float32_also_at_the_borders() -> None:
    text = """g (bfloat16[8,16] x) => (bfloat16[8,4] y, bool[8,4] z) {
        a = MatMul(x, w)  y = Add(a, e)  n = Cast<to=16>(t)  z = Less(y, n) }"""
    rng = np.random.default_rng(0)
    proto = onnx.ModelProto()
    proto.CopyFrom(parser.parse_model(f'<ir_version: 10, opset_import: ["" : 22]>\n{text}'))
    made = {"w": (16, 4), "e": (4,)}
    exact = {}
    for name, shape in made.items():
        array = rng.standard_normal(shape).astype(np.float32)
        bits = (array.view(np.uint32) >> 16).astype(np.uint16)
        exact[name] = (bits.astype(np.uint32) << 16).view(np.float32)
        tensor = onnx.TensorProto(name=name, data_type=onnx.TensorProto.BFLOAT16, dims=shape)
        tensor.raw_data = bits.tobytes()
        proto.graph.initializer.append(tensor)
    proto.graph.initializer.append(numpy_helper.from_array(np.float32([0.5]), "t"))
    model = load(proto)
    assert types([*model.graph.inputs, *model.graph.outputs]) == [
        ir.DataType.FLOAT, ir.DataType.FLOAT, ir.DataType.BOOL
    ]  # fmt: skip
    compiled = compile(model, keep_native=True, fallback=False)
    x = rng.standard_normal((8, 16)).astype(np.float32)
    found, less = compiled.run(None, {"x": x})
    np.testing.assert_allclose(found, x @ exact["w"] + exact["e"], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(less, found < 0.5)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_modules_of_half_precision(kind: str) -> None:
    torch = pytest.importorskip("torch", reason="needs torch")
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.SiLU(), torch.nn.Flatten(),
        torch.nn.Linear(8 * 36, 5), torch.nn.Softmax(-1),
    ).eval()  # fmt: skip
    dtype = getattr(torch, kind)
    x = torch.randn(2, 3, 8, 8).to(dtype)
    compiled = compile(net.to(dtype), example_inputs=(x,), keep_native=True, fallback=False)
    with torch.no_grad():
        wanted = net.float()(x.float()).numpy()
    given = x.numpy() if kind == "float16" else x.float().numpy()
    found = compiled(given)
    assert found.dtype == given.dtype
    np.testing.assert_allclose(found, wanted, rtol=1e-3 if kind == "float16" else 1e-5, atol=1e-5)


@pytest.mark.parametrize("which", [True, False])
def test_branches_and_values_that_they_capture(which: bool) -> None:
    model = load(parser.parse_model(BRANCHES))
    wide = half.widened(model)
    assert verify.is_wide(wide.model)
    feed = {"which": np.array(which), "x": np.array([0.5, -3, 100, 7], np.float16)}
    wanted = verify.Session(model).run(feed)
    found = verify.Session(wide.model).run(feed)
    assert found["y"].dtype == np.float16
    np.testing.assert_allclose(found["y"], wanted["y"], rtol=1e-3)


def test_rounding_and_overflow_between_nodes_as_onnxruntime() -> None:
    """It computes in float32 too, and rounds only what is cast there and back."""
    text = """g (float16[8] x, float[8] f) => (float16[8] y, float[8] z, float[8] w) {
        a = Mul(x, x)  y = Sqrt(a)
        h = Cast<to=10>(f)  b = Cast<to=1>(h)  z = Sub(b, k)
        g = Cast<to=10>(f)  i = Neg(g)  c = Cast<to=1>(i)  w = Add(c, k) }"""
    model = parse(text, k=np.array([1024], np.float32))
    x = np.array([300, 1e3, 6e4, -6e4, 1, 0, 2, 3], np.float16)
    f = np.linspace(1024, 1030, 8, dtype=np.float32)
    wanted = verify.Session(model).run({"x": x, "f": f})
    found = compile(model, keep_native=True, fallback=False).run(None, {"x": x, "f": f})
    for value, own in zip(wanted.values(), found, strict=True):
        np.testing.assert_allclose(own, value, rtol=1e-6)
    assert np.isfinite(found[0]).all()
    np.testing.assert_array_equal(found[1], np.rint(f) - 1024)
    assert (found[2] != np.rint(found[2])).any()


def test_how_far_outputs_move() -> None:
    def model(factor: float, op: str = "Mul") -> ir.Model:
        text = f"g (float[8] x) => (float[8] y, int32[8] z) {{ y = {op}(x, k)  z = Cast<to=6>(y) }}"
        return parse(text, k=np.array([factor], np.float32))

    reason, error = half._move(model(1.01), model(1.0))
    assert (reason, error) == ("in float32 outputs are others, allowed is 2e-02", None)
    reason, error = half._move(model(1.0), model(1.0))
    assert (reason, error) == ("", 0.0)
    halves = "g (float[8] x) => (float[8] y) { y = Mul(x, k) }"
    one, other = (parse(halves, k=np.array([k], np.float32)) for k in (1.0, 1.05))
    assert half._move(one, other)[0] == "in float32 outputs move by 5e-02, allowed is 2e-02"
    text = "g (float[8] x) => (float[8] y) { y = Add(x, e) }"
    inf = parse(text, e=np.array([np.inf] + [0] * 7, np.float32))
    assert half._move(one, inf) == ("", 0.0)
    assert "others" in half._move(inf, one)[0]


def test_a_model_that_moves_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half, "_move", lambda *_: ("outputs move by 1", None))
    model = mlp()
    wide = half.widened(model)
    assert wide.model is model
    compiled = compile(model)
    assert len(compiled.fallback_nodes) == 4
    assert compiled.manifest.segments[0].reason == "half precision stays: outputs move by 1"
    with pytest.raises(UnsupportedError, match="FLOAT16"):
        compile(model, fallback=False)


def test_bits_of_halves_are_not_widened() -> None:
    cast = ir.node("BitCast", [ir.val("x", ir.DataType.FLOAT16, [4])], {"to": 4})
    cast.outputs[0].name, cast.outputs[0].dtype = "y", ir.DataType.UINT16
    graph = ir.Graph(cast.inputs, cast.outputs, nodes=[cast], opset_imports={"": 26}, name="g")
    model = ir.Model(graph, ir_version=12)
    outcome = WidenHalf().run(model, Fuel())
    assert outcome.n_applied == 0
    assert "bits" in outcome.declined[0].reason
    assert types(list(graph.inputs)) == [ir.DataType.FLOAT16]
    graph.inputs[0].dtype = ir.DataType.BFLOAT16
    with pytest.raises(CaptureError, match="bfloat16, and it reads the bits"):
        capture.load(model)


def test_onnxruntimes_own_operators_of_halves() -> None:
    opsets = 'opset_import: ["" : 22, "com.microsoft" : 1]'
    text = "g (float16[3,8] x) => (float16[3,8] y) { y = com.microsoft.FastGelu(x) }"
    model = load(parser.parse_model(f"<ir_version: 10, {opsets}> {text}"))
    assert compile(model, keep_native=True).fallback_nodes == []


def test_an_input_that_is_an_output_and_constants_of_types() -> None:
    text = """g (float16[3] x, float[3] f) => (float16[3] y, float16[3] z, float[3] w) {
        y = Identity(x)  s = Shape(x)  k = ConstantOfShape<value = float16[1] {16384}>(s)
        z = Mul(x, k)  c = CastLike(f, x)  d = Add(c, z)  w = Cast<to=1>(d) }"""
    model = load(parser.parse_model(f'<ir_version: 10, opset_import: ["" : 22]>\n{text}'))
    wide = half.widened(model).model
    assert verify.is_wide(wide)
    x, f = np.array([1, -2, 0.1], np.float16), np.array([0.1, 0.2, 0.3], np.float32)
    found = verify.Session(wide).run({"x": x, "f": f})
    np.testing.assert_array_equal(found["y"], x)
    np.testing.assert_array_equal(found["z"], x * np.float16(2))
    np.testing.assert_allclose(found["w"], f + 2 * x.astype(np.float32), rtol=1e-6)


def test_a_wrong_kernel_is_seen_behind_the_last_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """2e-2 is what float16 may move a model; in float32 it is an error."""
    wide, run = half.widened(mlp()).model, InferenceSession.run

    def off(self: InferenceSession, *given: Any) -> list[np.ndarray]:
        return [(y * 1.004).astype(y.dtype) for y in run(self, *given)]

    monkeypatch.setattr(InferenceSession, "run", off)
    with pytest.raises(VerifyError, match="artefact"):
        compile(wide, skip=[p.name for p in pipeline.PASSES])


def test_inspect_sees_the_layers() -> None:
    rows = inspect(mlp()).layers
    assert [round(row.density, 1) for row in rows] == [0.1, 0.1]
    assert all("fp32" not in row.reason for row in rows)


def test_optimize_leaves_halves_as_they_are() -> None:
    assert types(list(pipeline.optimize(mlp()).model.graph.inputs)) == [ir.DataType.FLOAT16]
    weights = pipeline.optimize(mlp()).model.graph.initializers.values()
    assert {v.dtype for v in weights} == {ir.DataType.FLOAT16}


CONV = """g (float16[2,3,8,8] x) => (float16[2,4,8,8] y) {
    a = Conv<pads=[1,1,1,1]>(x, v)  b = Relu(a)  y = Conv<pads=[1,1,1,1]>(b, w) }"""


@pytest.mark.parametrize("recipe", ["magnitude:0.7", "admm:0.7", "fisher:0.7", "2:4"])
def test_pruned_halves_stay_halves(recipe: str) -> None:
    recipe = "wanda:2:4,permute=yes" if recipe == "2:4" else recipe
    rng = np.random.default_rng(0)
    shapes = {"v": (8, 3, 3, 3), "w": (4, 8, 3, 3)}
    model = parse(CONV, **{k: rng.standard_normal(s).astype("e") for k, s in shapes.items()})
    feeds = [{"x": rng.standard_normal((2, 3, 8, 8)).astype(np.float16)} for _ in range(4)]
    done = prune(model, recipe, feeds)
    assert done.density == pytest.approx(0.5 if "2:4" in recipe else 0.3, abs=0.02)
    found = done.model.graph.initializers
    assert {v.dtype for v in found.values()} == {ir.DataType.FLOAT16}
    (row,) = done.table  # the first layer is left alone
    weight = found[row.weight].const_value.numpy()
    assert np.count_nonzero(weight) / weight.size == pytest.approx(done.density, abs=1e-3)
    assert len(found) == 3  # with a corrected bias
    (y,) = verify.Session(done.model).run(feeds[0]).values()
    assert y.dtype == np.float16
    wide = half.widened(done.model).model
    assert half.widened(wide).model is wide
    assert done.model.graph.inputs[0].dtype == ir.DataType.FLOAT16
    if not recipe.startswith("magnitude"):
        plain = verify.Session(prune(model, "magnitude:0.7").model).run(feeds[0])["y"]
        dense = verify.Session(model).run(feeds[0])["y"].astype(np.float64)
        assert np.square(y - dense).sum() < np.square(plain - dense).sum()


def test_a_budget_of_half_precision() -> None:
    feeds = [{"x": np.random.default_rng(i).standard_normal((64, 128)).astype("e")} for i in (0, 1)]
    found = prune_within(mlp(), "wanda", feeds, {"flops": "0.05x"})
    assert 0.04 < found.pruned.density <= 0.05
    weights = found.pruned.model.graph.initializers.values()
    assert {v.dtype for v in weights} == {ir.DataType.FLOAT16}


def test_constants_without_a_place_in_the_half_model() -> None:
    model, wide = mlp(), half.widened(mlp()).model
    wide.graph[1].name = "another"
    fresh = ir.val("fresh", const_value=ir.tensor(np.float32([1]), name="fresh"))
    wide.graph.register_initializer(fresh)
    wide.graph[1].replace_input_with(1, fresh)
    assert half.narrowed(wide, model) is wide


def test_tasks_of_half_precision() -> None:
    base, other = mlp(), mlp()
    tuned = other.graph.initializers["w"]
    tuned.const_value = ir.tensor(tuned.const_value.numpy() * np.float16(2), name="w")
    made = delta.difference(base, other)
    compiled = compile_tasks(base, {"twice": made})
    feed = verify.feeds_for(base)[1]
    for task, model in ((None, base), ("twice", other)):
        (found,) = InferenceSession(compiled.path, task=task).run(None, feed)
        (wanted,) = verify.Session(model).run(feed).values()
        np.testing.assert_allclose(found, wanted, atol=2e-2 * np.abs(wanted).max())
