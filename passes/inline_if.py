"""Put the branch that a constant condition chooses in the place of its If.

    y = If(true) <then_branch = {r = Relu(c)}, else_branch = {s = Sigmoid(c)}>    ->    r = Relu(c)

Exported switches (training or not, with a cache or without) are such nodes; what follows then sees
through them. Names of the branch, of values and of nodes, that the graph already has are changed.

Declines when: the condition is computed, or the branch gives one value twice. Loop and Scan are
left as they are, with a reason; so is what stands inside a branch or a body that stays.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sparsegraph.graph import all_names, is_op, scalar, subgraphs
from sparsegraph.rewrite import Builder, Decline, Fuel, Outcome, RewritePass, decline


@dataclass(frozen=True)
class InlineIf(RewritePass):
    """Constant conditions decided."""

    name: ClassVar[str] = "inline_if"

    def run(self, model: ir.Model, fuel: Fuel) -> Outcome:
        """As for all passes, then a line for every switch inside what stays."""
        outcome = super().run(model, fuel)
        return Outcome(outcome.n_applied, (*outcome.declined, *_inside(model.graph)))

    def match(self, node: ir.Node, graph: ir.Graph) -> ir.Node | Decline | None:
        """An If that is decided."""
        if is_op(node, "Loop", "Scan"):
            return decline(node, f"{node.op_type}: its body runs a number of times")
        if not is_op(node, "If"):
            return None
        branch = _branch(node)
        if branch is None:
            return decline(node, "If: its condition is computed")
        if len(set(branch.outputs)) < len(branch.outputs):  # ONNX Runtime 1.31 zeros one
            return decline(node, "If: a branch gives one value twice")
        return node

    def rewrite(self, found: ir.Node, build: Builder) -> Sequence[ir.Value]:
        """The nodes and constants of its branch, moved."""
        branch = _branch(found)
        assert branch is not None
        inside = {name for inner in subgraphs(found) for name in all_names(inner)}
        build.names.difference_update(inside - _names_beside(build.graph, found))
        made, nodes = list(branch.outputs), list(branch)
        for value in list(branch.initializers.values()):
            del branch.initializers[str(value.name)]
            value.name = build.unique(str(value.name))
            build.constants.append(value)
        branch.outputs.clear()
        branch.remove(nodes)
        for value in (v for node in nodes for v in node.outputs if v.name):
            value.name = build.unique(str(value.name))
        nodes_beside = Builder(build.graph, {str(n.name) for n in build.graph}, build.hint)
        for node in (n for n in nodes if n.name):
            node.name = nodes_beside.unique(str(node.name))
        build.nodes += nodes
        return made


def _inside(graph: ir.Graph) -> list[Decline]:
    """Switches and loops in the branches and bodies of others."""
    return [
        decline(node, f"{node.op_type}: inside {outer.op_type} '{outer.name}', which stays")
        for outer in graph.all_nodes()
        for inner in subgraphs(outer)
        for node in inner
        if is_op(node, "If", "Loop", "Scan")
    ]


def _branch(node: ir.Node) -> ir.Graph | None:
    """The branch that always runs."""
    condition = scalar(node.inputs[0])
    if condition is None:
        return None
    return node.attributes["then_branch" if condition else "else_branch"].as_graph()


def _names_beside(graph: ir.Graph, node: ir.Node) -> set[str]:
    """Names in the graph that are not inside this node."""
    values = [*graph.inputs, *graph.initializers.values(), *(v for n in graph for v in n.outputs)]
    inner = (one for other in graph if other is not node for one in subgraphs(other))
    return {str(v.name) for v in values}.union(*map(all_names, inner))
