"""Chains of steps: which are legal, and that they change nothing but the order."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from sparsegraph.targets import emit
from sparsegraph.targets.target import Target

from sparsegraph import chain, targets, verify
from sparsegraph.capture import load
from sparsegraph.compile import compile
from sparsegraph.program import Program, Ref, Step
from tests.passes.check import parse

TARGET = targets.get("x86-64-v3")
TILES, TILE = 8, 1 << 15
PARAMS = emit.signature(
    "y:float32* y_image:int32 y_tile:int32 x:float32* x_image:int32 x_tile:int32 "
    "w:float32* tiles:int32"
)
BIG = 4 * TILES * TILE  # 1 MiB: does not stay in the level 2 cache


@dataclass(frozen=True)
class Move:
    """A kernel that is never compiled."""

    name: str = "move"
    params: emit.Signature = PARAMS

    def body(self, target: Target) -> Any:
        raise AssertionError("not compiled")


def step(y: str, x: str, weight: str = "light", *, tiled: tuple[str, ...] = ("y", "x")) -> Step:
    strides = (TILES * TILE, TILE)
    args = (Ref(y), *strides, Ref(x), *strides, Ref(weight), TILES)
    return Step(Move(), args, TILES, tiled=tiled)


def program(*steps: Step) -> Program:
    weights = {"light": np.zeros(8, np.float32), "heavy": np.zeros(1 << 16, np.float32)}
    return Program((), (), list(steps), weights, dict.fromkeys("abcde", BIG + 1024))


def lengths(*steps: Step) -> list[int]:
    made = program(*steps)
    chain.form_chains(made, TARGET)
    return made.chains


def test_tiled_steps_form_one_chain() -> None:
    assert lengths(step("b", "a"), step("c", "b"), step("d", "c")) == [3]


def test_a_whole_access_ends_a_chain() -> None:
    gathering = step("c", "b", tiled=("y",))
    assert lengths(step("b", "a"), gathering, step("d", "c")) == [1, 2]
    late = step("d", "a", tiled=("y",))  # reads all of what the second step overwrites
    assert lengths(step("b", "a"), step("a", "b"), late) == [2, 1]


def test_other_strides_or_items_end_a_chain() -> None:
    args = list(step("c", "b").args)
    args[5] = TILE // 2
    assert lengths(step("b", "a"), replace(step("c", "b"), args=tuple(args))) == [1, 1]
    assert lengths(step("b", "a"), replace(step("c", "b"), items=2 * TILES)) == [1, 1]


def test_heavy_weights_end_a_chain_unless_alone() -> None:
    assert lengths(step("b", "a", "heavy"), step("c", "b", "heavy")) == [1, 1]
    assert lengths(step("b", "a"), step("c", "b", "heavy"), step("d", "c")) == [3]


def test_small_values_stay_as_they_are() -> None:
    made = program(step("b", "a"), step("c", "b"))
    made.temporaries["b"] = TARGET.l2_bytes // 4
    chain.form_chains(made, TARGET)
    assert made.chains == [1, 1]
    assert not made.panels


def test_a_value_of_one_chain_shrinks_to_a_panel() -> None:
    made = program(step("b", "a"), step("c", "b"), step("d", "c"), step("e", "c", tiled=("y",)))
    chain.form_chains(made, TARGET)
    assert made.chains == [3, 1]
    assert made.panels.keys() == {"a", "b", "d"}, "c is read behind the chain"
    assert made.panels["b"] == 4 * TILE + 1024
    assert made.steps[1].args[:6] == (Ref("c"), TILES * TILE, TILE, Ref("b"), 0, 0)


def test_tokens_do_not_shrink() -> None:
    """Their tiles are as far apart as their points, which no argument sets to 0."""
    params = emit.signature(
        "y:float32* y_image:int32 y_point:int32 x:float32* x_image:int32 x_tile:int32 "
        "tiles:int32 block:int32"
    )
    strides = (TILES * TILE, TILE)
    args = (Ref("b"), TILES * TILE, TILE // 64, Ref("a"), *strides, TILES, 64)
    made = program(Step(Move(params=params), args, TILES, tiled=("y", "x")), step("c", "b"))
    chain.form_chains(made, TARGET)
    assert made.chains == [2]
    assert made.panels.keys() == {"a", "c"}
    assert made.steps[0].args == (Ref("b"), TILES * TILE, TILE // 64, Ref("a"), 0, 0, TILES, 64)


def mlp(points: int, *, batch: int = 1) -> onnx.ModelProto:
    """x -> linear, relu, linear + x, layer norm, over [batch, points, 64]."""
    rng = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        values = rng.standard_normal(shape) * (rng.random(shape) < 0.3) / 8
        return numpy_helper.from_array(values.astype(np.float32), name)

    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "w1"], ["p"]),
        helper.make_node("Add", ["p", "x"], ["s"]),
        helper.make_node("LayerNormalization", ["s", "g", "b"], ["y"]),
    ]
    shape = (batch, points, 64)
    graph = helper.make_graph(
        nodes, "mlp",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [weight("w0", 64, 256), weight("w1", 256, 64), weight("g", 64), weight("b", 64)],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    return model


@pytest.mark.parametrize(("points", "batch"), [(1003, 1), (517, 3)])
@pytest.mark.parametrize("threads", [1, 2])
def test_chained_model_equals_onnxruntime(points: int, batch: int, threads: int) -> None:
    model = mlp(points, batch=batch)
    small = replace(targets.get("native"), name="small cache", l2_bytes=256 << 10)
    compiled = compile(model, small, keep_native=True, threads=threads, check=False)
    session = compiled.session
    assert session is not None
    feed = {"x": np.random.default_rng(1).standard_normal((batch, points, 64)).astype(np.float32)}
    [expected] = verify.Session(load(model)).run(feed).values()
    for _ in range(2):  # panels keep nothing between runs
        [got] = session.run(None, feed)
        assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()
    assert sum(t.seconds for t in session.profile(feed)) > 0
    segment = compiled.manifest.segments[0]
    assert segment.scratch_bytes > 4 * 256 * 32, "the hidden layer is a panel"


@pytest.mark.parametrize(("points", "rows", "batch"), [(197, 700, 1), (33, 333, 2), (9, 300, 1)])
def test_wide_output_is_computed_in_parts(points: int, rows: int, batch: int) -> None:
    rng = np.random.default_rng(2)
    weight = (rng.standard_normal((40, rows)) * (rng.random((40, rows)) < 0.2)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="wide"),
        helper.make_node("Add", ["h", "b"], ["s"]),
        helper.make_node("Relu", ["s"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes, "wide",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (batch, points, 40))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (batch, points, rows))],
        [numpy_helper.from_array(weight, "w"),
         numpy_helper.from_array(rng.standard_normal(rows).astype(np.float32), "b")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    small = replace(targets.get("native"), name="small cache", l2_bytes=8 << 10)
    compiled = compile(model, small, keep_native=True, check=False)
    x = rng.standard_normal((batch, points, 40)).astype(np.float32)
    [expected] = verify.Session(load(model)).run({"x": x}).values()
    [got] = compiled.run(None, {"x": x})
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()
    [layer] = compiled.manifest.layers
    assert layer["weight"] == [rows, 40]
    assert layer["density"] == pytest.approx(np.count_nonzero(weight) / weight.size)
    products = [s for s in compiled.manifest.segments[0].steps if "mm" in s.kernel]
    assert len(products) > 1, "the output of one tile would not fit the cache"


def test_attention_of_one_head_behind_a_large_product() -> None:
    """MaxViT's first stage: queries, keys and values go to rows and back, tile by tile."""
    rng, shape, split = np.random.default_rng(0), (64, 8, 8, 32), (64, 1, 64, 32)
    weight = (rng.standard_normal((32, 96)) / 32 * (rng.random((32, 96)) < 0.1)).astype(np.float32)
    model = parse(
        """g (float[64,8,8,32] x) => (float[64,8,8,32] y) {
            m = MatMul(x, w)  t = Reshape(m, split)  q, k, v = Split<axis=3, num_outputs=3>(t)
            a = Attention(q, k, v, mask)  y = Reshape(a, whole) }""",
        w=weight, split=np.array([*split[:3], 96]), whole=np.array(shape),
        mask=rng.standard_normal((1, 1, 64, 64)).astype(np.float32),
    )  # fmt: skip
    made = compile(ir.to_proto(model), keep_native=True)
    assert made.manifest.verification["max_rel_error"] < 1e-5
