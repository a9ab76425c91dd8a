"""What can go without changing an output: dead producers, dead consumers, dead branches.

A unit goes when every sum that reads it ignores it (zero slices of the weight), sees zeros, or sees
constants whose contribution moves into the consumer's bias, or into the weights of another constant
or a map of biases (`carry`).
"""

from collections import Counter
from collections.abc import Container, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sparsegraph.graph import (
    all_names,
    float_attribute,
    is_constant,
    static_shape,
)
from sparsegraph.layers import weighted
from sparsegraph.rewrite import Builder, Decline
from sparsegraph.structure import carry, cut
from sparsegraph.structure.known import Knowns, propagate
from sparsegraph.structure.labels import FROZEN
from sparsegraph.structure.rule import Shelf
from sparsegraph.structure.ties import Analysis, Policy, Sink, analyse

Mask = NDArray[np.bool_]
_ZERO, _CONSTANT, _UNREAD = "always zero", "constant, moved into the next bias", "read by nothing"
_CARRIED = "constant, moved into the weights of another constant"
_ONE = "one stands for all of them, since a map of biases is larger than their weights"
_MAPPED = "constant, moved into a map of biases"


@dataclass(frozen=True)
class Removal:
    """`n` units, first made by `node`, that went for one reason."""

    node: str
    n: int
    reason: str


@dataclass(frozen=True)
class Reading:
    """A sink with what it makes of each position.

    `ignored`: contributes nothing. `moved`: contributes a constant that `gain` turns into a bias.
    `blocked` says why a constant cannot be moved. `shelf`: the weight, as input and axis, in which
    a constant that stays can stand for others.
    """

    sink: Sink
    ignored: Mask
    known: NDArray[np.float64]
    gain: NDArray[np.float64] | None
    blocked: str
    shelf: Shelf | None

    @property
    def moved(self) -> Mask:
        return ~self.ignored & ~np.isnan(self.known) & (self.gain is not None)

    @property
    def carried(self) -> Mask:
        """Constants that another constant can stand for."""
        return (
            ~self.ignored & ~np.isnan(self.known) & (self.gain is None and self.shelf is not None)
        )

    @property
    def holds(self) -> Mask:
        """Positions that must stay because of this sink."""
        return ~(self.ignored | self.moved | self.carried)


@dataclass
class Search:
    """One look at a model: the dependency analysis, the constants, and every sink read."""

    analysis: Analysis
    knowns: Knowns
    readings: list[Reading]

    @cached_property
    def removable(self) -> Mask:
        """By root: free, no sink holds it, and it need not stand for other constants."""
        n = self.analysis.ties.forest.n
        found = np.zeros(n, np.bool_)
        found[self.analysis.roots] = True
        found[FROZEN] = False
        for reading in self.readings:
            found[self.analysis.roots[reading.sink.labels[reading.holds]]] = False
        return carry.without_carriers(self, found)


def search(model: ir.Model, policy: Policy) -> Search:
    """Analyse the model and read every sink."""
    analysis = analyse(model, policy)
    knowns = propagate(model.graph)
    return Search(analysis, knowns, [_read(sink, knowns) for sink in analysis.ties.sinks])


def _read(sink: Sink, knowns: Knowns) -> Reading:
    from sparsegraph.structure.table import TABLE

    rule = TABLE[sink.node.op_type]
    n = len(sink.labels)
    known = np.full(n, np.nan)
    value = sink.node.inputs[sink.at]
    if not is_constant(value):
        found = knowns.along(value, sink.axis)
        known = known if found is None else found
    elif rule.known is not None:  # a recurrence: the units themselves
        found = knowns.along(next(v for v in sink.node.outputs if v.name), -1)
        known = known if found is None else found
    silent = rule.silent(sink.node, sink.at) if rule.silent else None
    ignored = (known == 0) | (False if silent is None else silent)
    gain: NDArray[np.float64] | str = f"{sink.node.op_type} has no bias"
    if rule.fold is not None and (~ignored & ~np.isnan(known)).any():
        gain = rule.fold(sink.node, sink.at)
    shelf = rule.shelf(sink.node, sink.at) if rule.shelf else None
    blocked = gain if isinstance(gain, str) else ""
    return Reading(sink, ignored, known, None if isinstance(gain, str) else gain, blocked, shelf)


def remove(model: ir.Model, found: Search, chosen: Mask) -> list[Removal]:
    """Take the chosen roots out of the model that was searched; constants move into biases."""
    gone = cut.fill_empty(found.analysis, chosen & found.removable)
    if not gone.any():
        return []
    maps = carry.maps(found, gone)
    removals = list(_reasons(found, gone, maps))
    n_carried = carry.move(model.graph, found, gone)
    for node, change in maps.items():
        _add_behind(model.graph, node, change)
    if _move_constants(model, found, gone) or n_carried or maps:
        again = analyse(model, found.analysis.ties.policy)
        assert np.array_equal(again.roots, found.analysis.roots), "a bias changed the labels"
        cut.apply(again, gone)
    else:
        cut.apply(found.analysis, gone)
    return removals


def _reasons(found: Search, gone: Mask, mapped: Container[ir.Node]) -> Iterator[Removal]:
    """Why each root goes, counted by the node that makes it."""
    roots, ties = found.analysis.roots, found.analysis.ties
    why = dict.fromkeys(np.flatnonzero(gone).tolist(), _UNREAD)
    for reading in found.readings:
        at = roots[reading.sink.labels]
        why.update(dict.fromkeys(at[(reading.known == 0) & gone[at]].tolist(), _ZERO))
        why.update(dict.fromkeys(at[reading.moved & gone[at]].tolist(), _CONSTANT))
        how = _MAPPED if reading.sink.node in mapped else _CARRIED
        why.update(dict.fromkeys(at[reading.carried & gone[at]].tolist(), how))
    batches = ties.forest.batch_of(np.array(list(why)))
    makers = [ties.makers.get(int(b)) for b in batches]
    names = [str(m.name or m.op_type) if m else "padding" for m in makers]
    for (name, reason), n in Counter(zip(names, why.values(), strict=True)).items():
        yield Removal(name, n, reason)


def _move_constants(model: ir.Model, found: Search, gone: Mask) -> bool:
    """Add what removed constants contributed to the bias behind each sink."""
    layers = {layer.node: layer for layer in weighted(model)}
    n_moved = 0
    for reading in found.readings:
        going = reading.moved & gone[found.analysis.roots[reading.sink.labels]]
        if not going.any() or reading.gain is None:
            continue
        node = reading.sink.node
        change = reading.known[going] @ reading.gain[going]
        layer = layers.get(node)
        bias = layer.bias() if layer is not None else None
        if bias is None:
            _add_behind(model.graph, node, change * float_attribute(node, "alpha", 1.0))
        elif bias.value is None:
            _give_bias(model.graph, node, change / bias.scale)
        else:
            bias.add(change, f"{node.name}.bias", model.graph)
        n_moved += 1
    return n_moved > 0


def _give_bias(graph: ir.Graph, node: ir.Node, change: NDArray[np.float64]) -> None:
    dtype = node.outputs[0].dtype
    assert dtype is not None
    build = Builder(graph, all_names(graph), str(node.name or node.op_type))
    bias = build.constant(change.astype(dtype.numpy()), f"{build.hint}.bias")
    graph.register_initializer(bias)
    if len(node.inputs) < 3:
        node.resize_inputs(3)
    node.replace_input_with(2, bias)


def _add_behind(graph: ir.Graph, node: ir.Node, change: NDArray[np.float64]) -> None:
    out = node.outputs[0]
    assert out.dtype is not None
    rank = len(static_shape(out) or ())
    shape = (1, -1, *[1] * (rank - 2)) if node.op_type == "Conv" else (-1,)
    shape = change.shape if change.ndim > 1 else shape
    build = Builder(graph, all_names(graph), str(node.name or node.op_type))
    bias = build.constant(change.astype(out.dtype.numpy()).reshape(shape), f"{node.name}.bias")
    graph.register_initializer(bias)
    total = build.op("Add", [out, bias], like=out)
    graph.insert_after(node, build.nodes)
    for user, at in tuple(out.uses()):
        if user is not build.nodes[0]:
            user.replace_input_with(at, total)
    if out.is_graph_output():
        name = str(out.name)
        out.replace_all_uses_with(total, replace_graph_outputs=True)
        build.nodes[0].replace_input_with(0, out)
        out.name, total.name = build.unique(f"{name}_unbiased"), name


def declines(found: Search) -> list[Decline]:
    """Units that look dead and stay, counted per node and reason."""
    roots, ties = found.analysis.roots, found.analysis.ties
    removable = found.removable
    suspects: dict[int, str] = {}
    last: dict[int, str] = {}
    for value, axes in ties.values.items():
        for number, axis in enumerate(axes):
            if axis is not None and value in found.knowns.found:
                known = found.knowns.along(value, number)
                assert known is not None
                for label in axis[~np.isnan(known)].tolist():
                    suspects.setdefault(label, _name(value.producer()))
                    last[int(roots[label])] = _name(value.producer())
    for reading in found.readings:
        for label in reading.sink.labels[reading.ignored].tolist():
            suspects.setdefault(label, _name(reading.sink.node))
    holding = _holding(found)
    counts: Counter[tuple[str, str]] = Counter()
    seen: set[int] = set()
    for label, name in suspects.items():
        root = int(roots[label])
        if label == FROZEN or label in seen or removable[root]:
            continue
        seen.add(label)
        freeze = found.analysis.why_frozen(label)
        reason = f"{freeze.node}: {freeze.reason}" if freeze else holding.get(root, "")
        if not freeze and root in last and reason.endswith("reads them"):
            reason += f"; they are constant up to {last[root]} only"
        counts[name, reason] += 1
    return [Decline(name, f"{n} dead positions stay: {why}") for (name, why), n in counts.items()]


def _holding(found: Search) -> dict[int, str]:
    """For every root that a sink holds, the first such sink and its reason."""
    reasons: dict[int, str] = {}
    for reading in found.readings:
        constant = ~np.isnan(reading.known)
        at = found.analysis.roots[reading.sink.labels]
        name = _name(reading.sink.node)
        for root in at[reading.holds & constant].tolist():
            reasons.setdefault(root, f"{name}: {reading.blocked}")
        for root in at[reading.carried].tolist():
            reasons.setdefault(root, f"{name}: {reading.blocked}; {_ONE}")
        for root in at[reading.holds & ~constant].tolist():
            reasons.setdefault(root, f"{name} reads them")
    return reasons


def _name(node: ir.Node | None) -> str:
    return "graph" if node is None else str(node.name or node.op_type)
