"""Groups: labels that the same operators make, follow and read, for people to look at.

A unit is one component of tied labels (a channel, a head, a hidden unit); a group is the set of
units that come from the same batches of labels.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from sparsegraph.structure.labels import FROZEN, Labels
from sparsegraph.structure.ties import Analysis, Touch


@dataclass(frozen=True)
class Line:
    """One operator in a group: what it does with the units, on which axis of which tensor."""

    node: str
    op: str
    role: str
    tensor: str
    axis: int
    n_positions: int


@dataclass(frozen=True)
class Group:
    """Units that can be chosen from freely. `roots` has one label per unit."""

    name: str
    roots: Labels
    lines: tuple[Line, ...]

    def __str__(self) -> str:
        head = f"{self.name}: {len(self.roots)} units"
        rows = [
            f"  {one.role:<8} {one.node} ({one.op}) {one.tensor}[axis {one.axis}], "
            f"{one.n_positions} positions"
            for one in self.lines
        ]
        return "\n".join([head, *rows])


def groups(analysis: Analysis) -> list[Group]:
    """All groups with at least two units, in graph order."""
    labels = np.flatnonzero(analysis.roots != FROZEN)
    if not labels.size:
        return []
    roots = analysis.roots[labels]
    batch = _joined_batches(analysis, labels, roots)
    number = batch[analysis.ties.forest.batch_of(labels)]
    group_of_root = np.zeros(analysis.ties.forest.n, np.int64)
    group_of_root[roots] = number
    touched = _touches(analysis, group_of_root)
    found: list[Group] = []
    names: set[str] = set()
    for one in np.unique(number):
        units = np.unique(roots[number == one])
        if len(units) > 1:
            lines = tuple(_lines(analysis, touched.get(int(one), []), group_of_root, int(one)))
            name = _name(analysis, units, lines)
            if name in names:
                name = f"{name}#{len(found)}"
            names.add(name)
            found.append(Group(name, units, lines))
    return found


def _joined_batches(analysis: Analysis, labels: Labels, roots: Labels) -> Labels:
    """The smallest batch that each batch shares a unit with, directly or not."""
    forest = analysis.ties.forest
    mine, first = forest.batch_of(labels), forest.batch_of(roots)
    parent = np.arange(len(forest.starts))
    while True:
        a, b = parent[mine], parent[first]
        if (a == b).all():
            return parent
        np.minimum.at(parent, np.maximum(a, b), np.minimum(a, b))
        while not np.array_equal(parent[parent], parent):
            parent = parent[parent]


def _touches(analysis: Analysis, group_of_root: Labels) -> dict[int, list[Touch]]:
    found: dict[int, list[Touch]] = {}
    for touch in analysis.ties.touches:
        for one in np.unique(group_of_root[analysis.roots[touch.labels]]):
            if one:
                found.setdefault(int(one), []).append(touch)
    return found


def _lines(
    analysis: Analysis, touches: list[Touch], group_of_root: Labels, number: int
) -> Iterator[Line]:
    order = {node: i for i, node in enumerate(analysis.graph)}
    seen: set[tuple[ir.Node, str, int]] = set()
    for touch in sorted(touches, key=lambda one: order[one.node]):
        if (touch.node, touch.what, touch.axis) in seen:
            continue
        seen.add((touch.node, touch.what, touch.axis))
        inside = group_of_root[analysis.roots[touch.labels]] == number
        yield Line(
            _label(touch.node), touch.node.op_type, touch.role, touch.what, touch.axis,
            int(inside.sum()),
        )  # fmt: skip


def _name(analysis: Analysis, units: Labels, lines: tuple[Line, ...]) -> str:
    maker = analysis.ties.makers.get(int(analysis.ties.forest.batch_of(units[:1])[0]))
    return lines[0].node if maker is None and lines else _label(maker)


def _label(node: ir.Node | None) -> str:
    return "" if node is None else str(node.name or node.op_type)
