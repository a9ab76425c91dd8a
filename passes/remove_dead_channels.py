"""Remove channels, heads, hidden units and branches that cannot change an output.

    c = Conv(x, w, b); r = Relu(c); y = Conv(r, v)    with zero filters in w, or zero slices in v
        ->  the same two nodes with fewer channels     (constants move into the second bias, or
                                                       where v is padded into one constant channel,
                                                       or an Add of a map no larger than their
                                                       weights)
    a = Add(x, branch)  with a branch that is always zero     ->  a = Add(x, {0})

Axis positions are tied over the whole graph (`sparsegraph.structure`); a tied set goes when nothing
that sums over it can notice. Repeated until nothing more goes. What went, and why, is written to
the graph's metadata under `sparsegraph.removed`.

Declines when: a dead position is tied to a graph output, an operator without a rule or a norm over
it; when another consumer reads it; or when it is the constant that stands for others under padding.
"""

import json
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sparsegraph.graph import int_attribute, is_op, static_shape
from sparsegraph.rewrite import Decline, Fuel, Outcome
from sparsegraph.structure import bypass, dead
from sparsegraph.structure.ties import Policy

REMOVED = "sparsegraph.removed"
_ROUNDS = 64


@dataclass(frozen=True)
class RemoveDeadChannels:
    """Lossless structured removal."""

    name: ClassVar[str] = "remove_dead_channels"
    exact: ClassVar[bool] = True

    def run(self, model: ir.Model, fuel: Fuel) -> Outcome:
        """One application per removed unit or branch."""
        removals: list[dead.Removal] = []
        declined: list[Decline] = []
        policies = [Policy(rescale=True)]
        if _has_groups(model):
            policies.append(Policy(grouped="within", rescale=True))
        for _ in range(_ROUNDS):
            n_before = len(removals)
            for policy in policies:
                found, done = _round(model, policy, fuel)
                removals += done
            if len(removals) == n_before:
                declined = dead.declines(found)
                break
        _record(model.graph, removals)
        return Outcome(sum(one.n for one in removals), tuple(declined))


def _round(model: ir.Model, policy: Policy, fuel: Fuel) -> tuple[dead.Search, list[dead.Removal]]:
    found = dead.search(model, policy)
    branches = bypass.bypass(model, found.knowns) if fuel.left != 0 else []
    if branches:
        return found, branches
    chosen = found.removable.copy()
    for root in np.flatnonzero(chosen):
        chosen[root] = fuel.take()
    return found, dead.remove(model, found, chosen)


def _has_groups(model: ir.Model) -> bool:
    """True when a convolution has groups of several channels."""
    for node in model.graph:
        shape = static_shape(node.inputs[0]) if is_op(node, "Conv", "ConvTranspose") else None
        if shape is not None and 1 < int_attribute(node, "group", 1) < shape[1]:
            return True
    return False


def _record(graph: ir.Graph, removals: list[dead.Removal]) -> None:
    if not removals:
        return
    counts: Counter[tuple[str, str]] = Counter()
    for one in removals:
        counts[one.node, one.reason] += one.n
    earlier = json.loads(graph.metadata_props.get(REMOVED, "[]"))
    now = [{"node": node, "n": n, "reason": reason} for (node, reason), n in counts.items()]
    graph.metadata_props[REMOVED] = json.dumps(earlier + now)
