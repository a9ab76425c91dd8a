"""The dependency analysis: which axis positions of a model must be removed together.

Labels are born where a constant makes an axis (the output channels of a weight) and are carried by
the rules of `table` through the graph. What no rule knows is frozen, with the reason.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
import onnx_ir as ir

from sparsegraph.graph import captured, has_subgraph, input_at, is_constant, is_op, static_shape
from sparsegraph.structure.labels import FROZEN, Axes, Axis, Forest, Labels, thin

Use: TypeAlias = tuple[ir.Node, int]
Role = Literal["makes", "follows", "ties", "reads"]


@dataclass(frozen=True)
class Policy:
    """Choices that the analysis leaves to its caller.

    `grouped`: grouped convolutions lose whole groups, or the same index within every group.
    `through_norm`: features may be cut through a normalisation over them; for a layer norm this
    changes its mean and variance, so the result is not the masked model.
    `rescale`: features that are zero may be cut through a mean or a mean of squares over them, with
    a factor for the smaller count: exact.
    `carry_mean`: the same for a layer norm, which becomes plain operators that count the zeros.
    """

    grouped: Literal["whole", "within"] = "whole"
    through_norm: bool = False
    rescale: bool = False
    carry_mean: bool = False


@dataclass(frozen=True)
class Sink:
    """Where labels end: input `at` of `node` is summed over `axis`."""

    node: ir.Node
    at: int
    axis: int
    labels: Labels


@dataclass(frozen=True)
class Freeze:
    """Labels that must stay, and why."""

    node: str
    reason: str
    labels: Labels


@dataclass(frozen=True)
class Touch:
    """A node that a set of labels passes: what it does with them, on which tensor and axis."""

    node: ir.Node
    role: Role
    what: str
    axis: int
    labels: Labels


@dataclass
class Ties:
    """Axes of all values and constants, and what happened to them."""

    policy: Policy = Policy()
    forest: Forest = field(default_factory=Forest)
    values: dict[ir.Value, Axes] = field(default_factory=dict)
    constants: dict[Use, Axes] = field(default_factory=dict)
    sinks: list[Sink] = field(default_factory=list)
    freezes: list[Freeze] = field(default_factory=list)
    touches: list[Touch] = field(default_factory=list)
    makers: dict[int, ir.Node] = field(default_factory=dict)

    def rank(self, value: ir.Value) -> int:
        """Number of dimensions."""
        return len(shape_of(value))

    def axes(self, value: ir.Value) -> Axes:
        """The axes of a value that a node makes; all frozen where nothing is known."""
        return self.values.get(value) or (None,) * self.rank(value)

    def input(self, node: ir.Node, at: int) -> Axes:
        """The axes of an input."""
        value = node.inputs[at]
        assert value is not None
        return self.axes(value)

    def set(self, value: ir.Value, axes: Sequence[Axis]) -> None:
        """Give a value its axes. An axis of size one must stay: no axis may become empty."""
        kept = []
        for axis, size in zip(axes, shape_of(value), strict=True):
            if axis is not None and size == 1:
                self.freeze_labels(axis, str(value.name), "an axis of size one")
                axis = None
            kept.append(axis)
        if any(axis is not None for axis in kept):
            self.values[value] = tuple(kept)

    def bind(self, node: ir.Node, at: int, axes: Sequence[Axis]) -> None:
        """An input must have these axes: recorded for a constant, tied for a value."""
        value = input_at(node, at)
        if value is None:
            return
        if not is_constant(value):
            for mine, theirs in zip(axes, self.axes(value), strict=True):
                self.tie(node, mine, theirs)
            return
        self.constants[node, at] = tuple(axes)
        for number, axis in enumerate(axes):
            if axis is not None:
                self.touch(node, "follows", str(value.name), number, axis)

    def fresh(self, node: ir.Node, at: int, axis: int, n: int) -> Axis:
        """New labels for an axis that the constant input `at` makes."""
        if n < 2:
            return None
        self.makers[len(self.forest.starts)] = node
        labels = self.forest.fresh(n)
        value = node.inputs[at]
        self.touch(node, "makes", str(value.name) if value else "", axis, labels)
        return labels

    def tie(self, node: ir.Node, a: Axis, b: Axis) -> None:
        """The two axes lose the same positions."""
        if a is None and b is None:
            return
        if a is None or b is None:
            other = a if b is None else b
            self.freeze(node, other, "meets an axis that must stay")
            return
        left, right = np.broadcast_arrays(a, b)
        half_open = (left == FROZEN) != (right == FROZEN)
        if half_open.any():
            held = np.maximum(left, right)[half_open]
            self.freeze(node, held, "meets a position that must stay")
        both = (left != FROZEN) & (right != FROZEN)
        self.forest.tie(left[both], right[both])

    def freeze(self, node: ir.Node, axis: Axis, reason: str) -> None:
        """These positions must stay because of this node."""
        if axis is not None:
            self.freeze_labels(axis, str(node.name or node.op_type), reason)

    def freeze_labels(self, axis: Labels, name: str, reason: str) -> None:
        """These positions must stay."""
        self.freezes.append(Freeze(name, reason, axis[axis != FROZEN]))

    def freeze_inputs(self, node: ir.Node, reason: str) -> None:
        """Every position of every input must stay."""
        for value in (*node.inputs, *captured(node)):
            for axis in self.values.get(value, ()) if value is not None else ():
                self.freeze(node, axis, reason)

    def sink(self, node: ir.Node, at: int, axis: int, labels: Axis) -> None:
        """The node sums over this axis: removed positions must contribute nothing."""
        if labels is not None:
            self.sinks.append(Sink(node, at, axis, labels))
            self.touch(node, "reads", f"input {at}", axis, labels)

    def touch(self, node: ir.Node, role: Role, what: str, axis: int, labels: Labels) -> None:
        """Remember the node for the print of a group."""
        self.touches.append(Touch(node, role, what, axis, labels))


TieRule: TypeAlias = Callable[[Ties, ir.Node], None]


@dataclass(frozen=True)
class Analysis:
    """`Ties` after the last node, with every label's root; root 0 must stay."""

    graph: ir.Graph
    ties: Ties
    roots: Labels
    frozen_by: Labels
    """For every root the number of the first freeze that holds it, or -1."""

    def why_frozen(self, label: int) -> Freeze | None:
        """The first reason why this label must stay; None for one that is free."""
        number = int(self.frozen_by[label])
        return None if number < 0 else self.ties.freezes[number]


def analyse(model: ir.Model, policy: Policy = Policy()) -> Analysis:
    """Tie the axes of every value in the main graph. Linear in nodes and channels."""
    from sparsegraph.structure.table import TABLE

    ties = Ties(policy)
    outputs = set(model.graph.outputs)
    for node in model.graph:
        rule = TABLE.get(node.op_type) if is_op(node, node.op_type) else None
        if has_subgraph(node):
            ties.freeze_inputs(node, f"{node.op_type}: control flow reads it")
        elif rule is None:
            ties.freeze_inputs(node, f"no rule for {node.op_type}")
        elif not _has_shapes(node):
            ties.freeze_inputs(node, "a shape depends on run-time data")
        else:
            rule.tie(ties, node)
        for value in outputs.intersection(node.outputs):
            for axis in ties.values.get(value, ()):
                if axis is not None:
                    ties.freeze_labels(axis, str(value.name), "a graph output")
    return _resolved(model.graph, ties)


def _resolved(graph: ir.Graph, ties: Ties) -> Analysis:
    roots = ties.forest.roots()
    frozen_by = np.full(ties.forest.n, -1)
    for number in range(len(ties.freezes) - 1, -1, -1):
        frozen_by[roots[ties.freezes[number].labels]] = number
    frozen_by = frozen_by[roots]
    return Analysis(graph, ties, np.where(frozen_by >= 0, FROZEN, roots), frozen_by)


def shape_of(value: ir.Value | None) -> tuple[int, ...]:
    """The static shape of a value that has one; `analyse` has checked that."""
    shape = static_shape(value)
    assert shape is not None
    return shape


def _has_shapes(node: ir.Node) -> bool:
    values = [v for v in (*node.inputs, *node.outputs) if v is not None and v.name]
    return all(static_shape(v) is not None for v in values)


def part(axis: Axis, index: slice | np.ndarray) -> Axis:
    """Some positions of an axis."""
    return None if axis is None else thin(axis[index])
