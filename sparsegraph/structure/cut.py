"""Remove labels from a model: every constant and value loses the positions, shapes follow."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sparsegraph.graph import (
    all_names,
    constant,
    is_constant,
    is_op,
    is_used,
    remove_dead,
    remove_unused_initializers,
)
from sparsegraph.rewrite import FROM, Builder, origin
from sparsegraph.structure.labels import Axis
from sparsegraph.structure.ties import Analysis, shape_of


@dataclass(frozen=True)
class View:
    """A cut constant as a part of a whole one: its name, and which positions of each axis stay."""

    whole: str
    keeps: tuple[NDArray[np.bool_], ...]


@dataclass
class Cut:
    """The removal in progress. `gone[label]`: the label's positions are removed."""

    analysis: Analysis
    gone: NDArray[np.bool_]
    names: set[str]
    came_from: dict[ir.Value, str] = field(default_factory=dict)
    views: dict[ir.Value, View] = field(default_factory=dict)
    _made: dict[tuple[ir.Value, bytes], ir.Value] = field(default_factory=dict)

    def keep(self, axis: Axis, size: int) -> NDArray[np.bool_]:
        """Which positions of an axis stay."""
        return np.ones(size, np.bool_) if axis is None else ~self.gone[axis]

    def kept(self, value: ir.Value, axis: int) -> NDArray[np.bool_]:
        """Which positions of a value's axis stay; the shape is still the old one."""
        return self.keep(self.analysis.ties.axes(value)[axis], shape_of(value)[axis])

    def shape(self, value: ir.Value) -> tuple[int, ...]:
        """The shape that the value will have."""
        return tuple(int(self.kept(value, i).sum()) for i in range(len(shape_of(value))))

    def changes(self, value: ir.Value) -> bool:
        """True when the value loses anything."""
        return self.shape(value) != shape_of(value)

    def replace(self, node: ir.Node, at: int, array: np.ndarray, what: bytes = b"") -> None:
        """Give the node another constant, with the name of the old one when that is free.

        Equal `what` (the content, unless given) of one constant makes one new constant.
        """
        old = node.inputs[at]
        assert old is not None
        key = old, what or repr(array.tolist()).encode()
        if key not in self._made:
            self._made[key] = self._constant(old, array)
        node.replace_input_with(at, self._made[key])

    def supply(self, node: ir.Node, at: int, array: np.ndarray, name: str) -> None:
        """Like `replace`, also for an input that was left out."""
        if at < len(node.inputs) and node.inputs[at] is not None:
            self.replace(node, at, array)
            return
        if at >= len(node.inputs):
            node.resize_inputs(at + 1)
        node.replace_input_with(at, self._constant(ir.Value(name=name), array))

    def scale_output(self, node: ir.Node, factor: float) -> None:
        """Multiply what the node makes, for all who read it."""
        out, graph = node.outputs[0], self.analysis.graph
        assert out.dtype is not None
        build = Builder(graph, self.names, str(node.name or node.op_type))
        number = build.constant(np.array(factor, out.dtype.numpy()), f"{out.name}_count")
        graph.register_initializer(number)
        scaled = build.op("Mul", [out, number], like=out)
        users = [(user, at) for user, at in out.uses() if user is not build.nodes[0]]
        graph.insert_after(node, build.nodes)
        for user, at in users:
            user.replace_input_with(at, scaled)
        if out in self.analysis.ties.values:
            self.analysis.ties.values[scaled] = self.analysis.ties.values[out]
        if out.is_graph_output():
            name = str(out.name)
            out.replace_all_uses_with(scaled, replace_graph_outputs=True)
            build.nodes[0].replace_input_with(0, out)
            out.name, scaled.name = build.unique(f"{name}_unscaled"), name

    def _constant(self, old: ir.Value, array: np.ndarray) -> ir.Value:
        name, n = f"{old.name}_cut", 1
        while name in self.names:
            n += 1
            name = f"{old.name}_cut{n}"
        self.names.add(name)
        value = ir.val(name, const_value=ir.tensor(np.array(array, order="C"), name=name))
        value.metadata_props.update(old.metadata_props)
        value.metadata_props[FROM] = ",".join(origin(old))
        self.came_from[value] = self.came_from.get(old, str(old.name))
        self.analysis.graph.register_initializer(value)
        return value


def apply(analysis: Analysis, gone: NDArray[np.bool_]) -> dict[str, View]:
    """Remove every label whose root is marked, in the analysed graph itself.

    The caller has made sure that no axis becomes empty (`fill_empty`). Returns, by their new names,
    the constants that are parts of what they were.
    """
    from sparsegraph.structure.table import TABLE

    graph = analysis.graph
    cut = Cut(analysis, gone[analysis.roots], all_names(graph))
    for node in list(graph):
        rule = TABLE.get(node.op_type)
        if rule is None or not _moves(cut, node):
            continue
        if rule.cut is not None:
            rule.cut(cut, node)
        for value in node.outputs:
            if value not in analysis.ties.values and not is_used(value):
                value.shape = None  # indices or statistics that nobody reads
    for (node, at), axes in analysis.ties.constants.items():
        _cut_constant(cut, node, at, axes)
    for value in analysis.ties.values:
        value.shape = ir.Shape(cut.shape(value))
    _drop_empty(graph)
    remove_dead(graph)
    remove_unused_initializers(graph)
    _rename(graph, cut)
    return {str(v.name): view for v, view in cut.views.items() if v.name in graph.initializers}


def fill_empty(analysis: Analysis, gone: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The marks without one root of every axis that would become empty.

    A branch that ends in a Concat may become empty as a whole: the Concat loses that input.
    """
    gone = gone.copy()
    while stuck := _stuck(analysis, gone):
        gone[stuck[0]] = False  # one by one: it may be what a Concat needs to keep
    return gone


def _stuck(analysis: Analysis, gone: NDArray[np.bool_]) -> list[int]:
    """A root of every axis that would be empty and must not."""
    ties, roots = analysis.ties, analysis.roots
    first: dict[ir.Value, int] = {}
    for value, axes in ties.values.items():
        empty = [axis for axis in axes if axis is not None and gone[roots[axis]].all()]
        if empty:
            first[value] = int(roots[empty[0]][0])
    may_go: set[ir.Value] = set()
    for node in reversed(list(analysis.graph)) if first else ():
        if len(node.outputs) == 1 and node.outputs[0] in first:
            value = node.outputs[0]
            users = value.consumers()
            if not value.is_graph_output() and all(_lets_go(u, first, may_go) for u in users):
                may_go.add(value)
    stuck = [root for value, root in first.items() if value not in may_go]
    for (node, _), axes in ties.constants.items():
        for axis in axes:
            if axis is not None and gone[roots[axis]].all() and not _goes(node, may_go):
                stuck.append(int(roots[axis][0]))
    return stuck


def _lets_go(user: ir.Node, first: dict[ir.Value, int], may_go: set[ir.Value]) -> bool:
    """True when the user goes itself, or is a Concat with something left."""
    return _goes(user, may_go) or (is_op(user, "Concat") and user.outputs[0] not in first)


def _goes(node: ir.Node, may_go: set[ir.Value]) -> bool:
    return all(value in may_go for value in node.outputs)


def _drop_empty(graph: ir.Graph) -> None:
    """Take empty inputs off every Concat."""
    for node in graph:
        if not is_op(node, "Concat"):
            continue
        axis = node.attributes.get_int("axis", 0)
        kept = [v for v in node.inputs if v is not None and shape_of(v)[axis] > 0]
        if 0 < len(kept) < len(node.inputs):
            for at, value in enumerate(kept):
                node.replace_input_with(at, value)
            node.resize_inputs(len(kept))


def _moves(cut: Cut, node: ir.Node) -> bool:
    ties = cut.analysis.ties
    values = (v for v in (*node.inputs, *node.outputs) if v is not None and v in ties.values)
    return any(cut.changes(v) for v in values)


def _cut_constant(cut: Cut, node: ir.Node, at: int, axes: Sequence[Axis]) -> None:
    value = node.inputs[at] if at < len(node.inputs) else None
    array = constant(value) if value is not None and is_constant(value) else None
    if array is None or node.graph is not cut.analysis.graph:
        return
    keeps = [cut.keep(axis, size) for axis, size in zip(axes, array.shape, strict=True)]
    if all(keep.all() for keep in keeps):
        return
    cut.replace(node, at, array[np.ix_(*keeps)], b"|".join(keep.tobytes() for keep in keeps))
    assert value is not None
    new = node.inputs[at]
    assert new is not None
    cut.views[new] = View(str(value.name), tuple(keeps))


def _rename(graph: ir.Graph, cut: Cut) -> None:
    """Let a constant have the name that it came from when nothing else needs that any more."""
    heirs: dict[str, list[ir.Value]] = {}
    for new, name in cut.came_from.items():
        if new.name in graph.initializers:
            heirs.setdefault(name, []).append(new)
    for name, values in heirs.items():
        if name in graph.initializers or len(values) != 1:
            continue
        (new,) = values
        del graph.initializers[str(new.name)]
        new.name = name
        assert new.const_value is not None
        new.const_value.name = name
        graph.register_initializer(new)
