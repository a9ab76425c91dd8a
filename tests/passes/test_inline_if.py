"""inline_if: the branch that runs, its names, its constants; what is left alone and why."""

import numpy as np
import onnx_ir as ir
import pytest
from sparsegraph.passes.inline_if import InlineIf
from sparsegraph.passes.remove_dead_channels import RemoveDeadChannels

from sparsegraph.capture import load
from sparsegraph.pipeline import optimize
from sparsegraph.rewrite import Fuel
from sparsegraph.verify import Session, compare, feeds_for
from tests.passes.check import apply, parse, run, weight

STEP = InlineIf()
YES, NO = np.array(True), np.array([False])
SWITCH = """g (float[1,3,6,6] x) => (float[1,4,6,6] y) {
    c = Conv(x, w)
    s = If (on) <
        then_branch = t () => (float[1,6,6,6] a) { h = Relu(c)  a = Mul(h, k) },
        else_branch = e () => (float[1,6,6,6] b) { h = Sigmoid(c)  b = Neg(h) }
    >
    y = Conv(s, v) }"""
ARRAYS = {"w": weight(6, 3, 1, 1), "v": weight(4, 6, 1, 1), "k": weight(6, 1, 1)}


@pytest.mark.parametrize(("on", "ops"), [(YES, ["Relu", "Mul"]), (NO, ["Sigmoid", "Neg"])])
def test_the_branch_that_runs_stays(on: np.ndarray, ops: list[str]) -> None:
    result = run(STEP, SWITCH, on=on, **ARRAYS)
    assert result.ops == ["Conv", *ops, "Conv"]
    assert result.n_applied == 1
    names = [v.name for n in result.model.graph for v in n.outputs]
    assert names == ["c", "h", "s", "y"]
    assert "on" not in result.model.graph.initializers


def test_a_computed_condition_stays_with_a_reason() -> None:
    text = SWITCH.replace("s = If", "m = ReduceSum<keepdims=0>(x)  on = Less(m, half)  s = If")
    result = run(STEP, text, half=np.array(0.5, np.float32), **ARRAYS)
    assert result.n_applied == 0
    assert [(d.node, d.reason) for d in result.declined] == [
        ("If_3", "If: its condition is computed")
    ]
    model = parse(text, half=np.array(0.5, np.float32), **{**ARRAYS, "w": ARRAYS["w"] * 0})
    dead = optimize(model)
    (record,) = [r for r in dead.records if r.name == RemoveDeadChannels.name]
    assert any("If_3: If: control flow reads it" in d.reason for d in record.declined)


@pytest.mark.parametrize("on", [True, False])
def test_a_switch_inside_one_that_stays_has_a_reason(on: bool) -> None:
    """Decided or not: the branch around it is not the graph that passes work on."""
    text = """g (float[2] x, bool c) => (float[2] y) { y = If (c) <
        then_branch = t () => (float[2] a) {
            a = If (on) < then_branch = t2 () => (float[2] b) { b = Relu(x) },
                          else_branch = e2 () => (float[2] d) { d = Neg(x) } > },
        else_branch = e () => (float[2] f) { f = Abs(x) } > }"""
    result = run(STEP, text, on=np.array(on))
    assert result.n_applied == 0
    assert [d.reason for d in result.declined] == [
        "If: its condition is computed", "If: inside If 'If_0', which stays"
    ]  # fmt: skip


def test_loops_stay_with_a_reason() -> None:
    text = """g (float[1,3,6,6] x) => (float[1,3,6,6] y) {
        y = Loop(three, yes, x) <body = b (int64 i, bool on, float[1,3,6,6] z) =>
            (bool again, float[1,3,6,6] z2) { again = Identity(on)  z2 = Relu(z) }> }"""
    result = run(STEP, text, three=np.array(3), yes=YES)
    assert [d.reason for d in result.declined] == ["Loop: its body runs a number of times"]


@pytest.mark.parametrize("second", ["Identity(on)", "Greater(m, m)"])
def test_names_that_are_taken_change(second: str) -> None:
    """Both switches call their inner value h, which a graph and its subgraphs cannot hold twice."""
    text = f"""g (float[4] x) => (float[4] y, float[4] z) {{
        m = ReduceSum<keepdims=0>(x)  two = {second}
        y = If (on) <then_branch = t () => (float[4] a) {{ h = Relu(x)  a = Neg(h) }},
                     else_branch = e () => (float[4] b) {{ b = Abs(x) }}>
        z = If (two) <then_branch = t2 () => (float[4] a) {{ h = Sigmoid(x)  a = Neg(h) }},
                      else_branch = e2 () => (float[4] b) {{ b = Exp(x) }}> }}"""
    result = run(STEP, text, on=YES)
    names = [v.name for n in result.model.graph.all_nodes() for v in n.outputs]
    assert "Relu" in result.ops
    assert names.count("h") == 1


def test_node_names_that_are_taken_change() -> None:
    """Capture names the nodes of every branch alike; ONNX Runtime wants them apart in one graph."""
    text = """g (float[4] x) => (float[4] y) {
        a = If (on) <then_branch = t () => (float[4] c) { h = Relu(x)  c = Neg(h) },
                     else_branch = e () => (float[4] b) { b = Abs(x) }>
        y = If (on) <then_branch = t2 () => (float[4] c) { h = Sigmoid(a)  c = Neg(h) },
                     else_branch = e2 () => (float[4] b) { b = Exp(x) }> }"""
    model = load(ir.to_proto(parse(text, on=YES)))
    names = [n.name for n in apply(STEP, model).model.graph]
    assert len(set(names)) == len(names) == 4


@pytest.mark.parametrize(
    ("body", "ops"),
    [
        ("a = Relu(x)  d = Identity(a)", ["Relu", "Identity"]),
        ("a = Identity(x)  d = Neg(x)", ["Identity", "Neg"]),
    ],
)
def test_several_outputs(body: str, ops: list[str]) -> None:
    text = f"""g (float[4] x) => (float[4] y, float[4] z) {{
        y, z = If (on) <then_branch = t () => (float[4] a, float[4] d) {{ {body} }},
                        else_branch = e () => (float[4] b, float[4] c)
                            {{ b = Abs(x)  c = Exp(x) }}> }}"""
    assert run(STEP, text, on=YES).ops == ops


def test_one_value_for_two_outputs_stays() -> None:
    text = """g (float[4] x) => (float[4] y, float[4] z) {
        y, z = If (on) <then_branch = t () => (float[4] a, float[4] a) { a = Relu(x) },
                        else_branch = e () => (float[4] b, float[4] c)
                            { b = Abs(x)  c = Exp(x) }> }"""
    outcome = STEP.run(parse(text, on=YES), Fuel())
    assert [d.reason for d in outcome.declined] == ["If: a branch gives one value twice"]


def test_a_switch_inside_a_branch() -> None:
    text = """g (float[4] x) => (float[4] y) {
        y = If (on) <then_branch = t () => (float[4] a) {
                a = If (off) <then_branch = t2 () => (float[4] c) { c = Exp(x) },
                              else_branch = e2 () => (float[4] d) { d = Relu(x) }> },
            else_branch = e () => (float[4] b) { b = Abs(x) }> }"""
    result = run(STEP, text, on=YES, off=NO)
    assert result.ops == ["Relu"]
    assert result.n_applied == 2


def test_channels_die_behind_a_switch() -> None:
    """The condition and the weight in the branch fold first; then nothing hides dead channels."""
    text = SWITCH.replace("s = If", "n = Size(w)  on = Less(n, many)  s = If").replace(
        "h = Relu(c)  a = Mul(h, k)",
        "two = Constant<value = float {2.0}>()  q = Mul(k, two)  a = Conv(c, q)",
    )
    kernel = weight(6, 6, 1, 1)
    kernel[:, [1, 4]] = 0
    model = parse(text, many=np.array(1000), **{**ARRAYS, "k": kernel})
    done = optimize(model)
    assert done.model.graph.initializers["w"].shape == (4, 3, 1, 1)
    feed = feeds_for(model, 2)[1]
    assert compare(Session(done.model).run(feed), Session(model).run(feed)) <= 1e-6
