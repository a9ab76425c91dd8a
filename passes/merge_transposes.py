"""Merge Transposes that follow each other, also across a Reshape that only groups axes.

    a = Transpose<perm=[0,2,1]>(x); y = Transpose<perm=[0,2,1]>(a)               ->  y = x
    a = Reshape(x, {24,7,8}); b = Transpose<perm=[0,2,1]>(a); y = Reshape(b, {2,12,8,7})
        ->  y = Transpose<perm=[0,1,3,2]>(x)                                 (x: float[2,12,7,8])

Declines when: never; other chains stay as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sparsegraph.graph import ints_attribute, is_op, made_by, static_shape
from sparsegraph.rewrite import Builder, RewritePass


@dataclass(frozen=True)
class Found:
    """One transpose of `source` that gives `output`."""

    source: ir.Value
    perm: tuple[int, ...]
    output: ir.Value


@dataclass(frozen=True)
class MergeTransposes(RewritePass):
    """Transpose chains."""

    name: ClassVar[str] = "merge_transposes"

    def match(self, node: ir.Node, graph: ir.Graph) -> Found | None:
        """Transpose of Transpose, or Reshape of Transpose of Reshape."""
        if is_op(node, "Transpose"):
            return _chain(node)
        return _sandwich(node) if is_op(node, "Reshape") else None

    def rewrite(self, found: Found, build: Builder) -> Sequence[ir.Value]:
        """One Transpose, or none."""
        if found.perm == tuple(range(len(found.perm))):
            return [found.source]
        return [build.op("Transpose", [found.source], {"perm": found.perm}, like=found.output)]


def permutation(node: ir.Node) -> tuple[int, ...] | None:
    """The axes of a Transpose, with the default filled in."""
    perm = ints_attribute(node, "perm")
    shape = static_shape(node.inputs[0])
    if perm is None and shape is not None:
        return tuple(reversed(range(len(shape))))
    return perm


def _chain(node: ir.Node) -> Found | None:
    inner = made_by(node.inputs[0], "Transpose")
    if inner is None or inner.inputs[0] is None:
        return None
    first, second = permutation(inner), permutation(node)
    if first is None or second is None:
        return None
    return Found(inner.inputs[0], tuple(first[axis] for axis in second), node.outputs[0])


def _sandwich(node: ir.Node) -> Found | None:
    transpose = made_by(node.inputs[0], "Transpose")
    reshape = None if transpose is None else made_by(transpose.inputs[0], "Reshape")
    if transpose is None or reshape is None or reshape.inputs[0] is None:
        return None
    source = static_shape(reshape.inputs[0])
    grouped = static_shape(reshape.outputs[0])
    target = static_shape(node.outputs[0])
    perm = permutation(transpose)
    if source is None or grouped is None or target is None or perm is None:
        return None
    groups = _groups(source, grouped)
    if groups is None:
        return None
    full = tuple(axis for group in perm for axis in groups[group])
    if tuple(source[axis] for axis in full) != target:
        return None
    return Found(reshape.inputs[0], full, node.outputs[0])


def _groups(source: Sequence[int], grouped: Sequence[int]) -> list[list[int]] | None:
    """The axes of `source` that each axis of `grouped` is made of; None when it splits an axis."""
    if 0 in source:
        return None
    groups: list[list[int]] = []
    axis = 0
    for size in grouped:
        members: list[int] = []
        product = 1
        while product < size and axis < len(source):
            product *= source[axis]
            members.append(axis)
            axis += 1
        if product != size:
            return None
        groups.append(members)
    if any(source[left] != 1 for left in range(axis, len(source))) or not groups:
        return None
    groups[-1].extend(range(axis, len(source)))
    return groups
