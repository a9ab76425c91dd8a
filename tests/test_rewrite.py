"""The runner: replacing, naming, provenance, fuel, and its own guards."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from sparsegraph.errors import PassError
from sparsegraph.graph import is_op
from sparsegraph.rewrite import FROM, PASS, Builder, Decline, Fuel, RewritePass, decline
from tests.passes.check import apply, parse, weight


@dataclass(frozen=True)
class SplitAbs(RewritePass):
    """Abs(x) -> Max(x, 0) - Min(x, 0): three nodes and a constant for one node."""

    name: ClassVar[str] = "split_abs"

    def match(self, node: ir.Node, graph: ir.Graph) -> ir.Value | Decline | None:
        if is_op(node, "Sigmoid"):
            return decline(node, "a sigmoid")
        return node.inputs[0] if is_op(node, "Abs") else None

    def rewrite(self, found: ir.Value, build: Builder) -> Sequence[ir.Value]:
        zero = build.constant(np.zeros((), np.float32), "zero")
        low = build.op("Min", [found, zero], like=found)
        high = build.op("Max", [found, zero], like=found)
        return [build.op("Sub", [high, low], like=found)]


@dataclass(frozen=True)
class Endless(RewritePass):
    """Feeds on its own output."""

    name: ClassVar[str] = "endless"

    def match(self, node: ir.Node, graph: ir.Graph) -> ir.Value | None:
        return node.inputs[0] if is_op(node, "Relu") else None

    def rewrite(self, found: ir.Value, build: Builder) -> Sequence[ir.Value]:
        return [build.op("Relu", [build.op("Relu", [found], like=found)], like=found)]


TEXT = """g (float[3] x) => (float[3] y, float[3] z) {
    a = Abs(x)  b = Abs(a)  y = Add(a, b)  z = Abs(y) }"""


def test_replacements_keep_names_and_order() -> None:
    result = apply(SplitAbs(), parse(TEXT))
    assert result.n_applied == 3
    assert result.counts == {"Min": 3, "Max": 3, "Sub": 3, "Add": 1}
    names = [v.name for n in result.model.graph for v in n.outputs]
    assert {"a", "b", "y", "z"} <= set(names)
    assert len(names) == len(set(names))


def test_provenance_is_stamped() -> None:
    model = apply(SplitAbs(), parse(TEXT)).model
    made = [n for n in model.graph if n.op_type == "Min"]
    assert {n.metadata_props[PASS] for n in made} == {"split_abs"}
    assert [n.metadata_props[FROM] for n in made] == ["Abs_0", "Abs_1", "Abs_3"]


def test_names_avoid_those_of_the_model_and_its_subgraphs() -> None:
    text = """g (float[3] x, bool c) => (float[3] y) { a = Abs(x)
        y = If(c) <then_branch = t () => (float[3] p) { a_min = Neg(a)  p = Neg(a_min) },
                   else_branch = e () => (float[3] q) { zero = Neg(a)  q = Neg(zero) }> }"""
    result = apply(SplitAbs(), parse(text))
    names = [v.name for n in result.model.graph for v in n.outputs]
    assert "a_min" not in names
    assert "zero" not in result.model.graph.initializers


def test_declines_carry_node_and_reason() -> None:
    result = apply(SplitAbs(), parse("g (float[3] x) => (float[3] y) { y = Sigmoid(x) }"))
    assert result.declined == (Decline("Sigmoid_0", "a sigmoid"),)


@pytest.mark.parametrize("units", [0, 1, 2, 3, 9])
def test_fuel(units: int) -> None:
    model = parse(TEXT)
    outcome = SplitAbs().run(model, Fuel(units))
    assert outcome.n_applied == min(units, 3)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_a_pass_that_feeds_on_itself_is_stopped() -> None:
    with pytest.raises(PassError, match="endless"):
        Endless().run(parse("g (float[3] x) => (float[3] y) { y = Relu(x) }"), Fuel())


def test_old_weights_leave_with_their_node() -> None:
    model = parse("g (float[3] x) => (float[3] y) { a = Add(w, w)  y = Add(x, a) }", w=weight(3))

    @dataclass(frozen=True)
    class Drop(RewritePass):
        name: ClassVar[str] = "drop"

        def match(self, node: ir.Node, graph: ir.Graph) -> ir.Value | None:
            return node.inputs[0] if node.outputs[0].name == "y" and len(graph) > 1 else None

        def rewrite(self, found: ir.Value, build: Builder) -> Sequence[ir.Value]:
            return [build.op("Neg", [found], like=found)]

    Drop().run(model, Fuel(1))
    assert [n.op_type for n in model.graph] == ["Neg"]
    assert not model.graph.initializers
