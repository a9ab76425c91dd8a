"""Whole branches whose every number is known: constants in their place, or nothing for zeros."""

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sparsegraph.graph import (
    all_names,
    is_constant,
    is_op,
    remove_dead,
    remove_unused_initializers,
    static_shape,
)
from sparsegraph.rewrite import Builder, take_over
from sparsegraph.structure.dead import Removal
from sparsegraph.structure.known import Knowns


def bypass(model: ir.Model, knowns: Knowns) -> list[Removal]:
    """Put constants in the place of branches whose every number is known; drop what adds zero."""
    graph = model.graph
    names = all_names(graph)
    done: list[Removal] = []
    for node in list(graph):
        if not is_op(node, "Add", "Sub", "Mul", "Div", "Sum", "Max", "Min", "Where"):
            continue
        for at, value in enumerate(node.inputs):
            known = None if is_constant(value) else knowns.of(value)
            if value is None or known is None or np.isnan(known).any():
                continue
            if not _keeps_shape(node, at, known) or value.dtype is None:
                continue
            build = Builder(graph, names, str(value.name))
            if not _drop_zero(graph, node, at, known, build):
                array = known.astype(value.dtype.numpy())
                fixed = build.constant(array, f"{value.name}_known")
                graph.register_initializer(fixed)
                node.replace_input_with(at, fixed)
            made = value.producer()
            name = "graph" if made is None else str(made.name or made.op_type)
            done.append(Removal(name, 1, "a branch that holds a constant"))
            break
    if done:
        remove_dead(graph)
        remove_unused_initializers(graph)
    return done


def _drop_zero(
    graph: ir.Graph, node: ir.Node, at: int, known: NDArray[np.float64], build: Builder
) -> bool:
    """Replace x + 0 and x - 0 by x; False where it is neither."""
    other = node.inputs[1 - at] if len(node.inputs) == 2 else None
    adds = is_op(node, "Add") or (is_op(node, "Sub") and at == 1)
    if not adds or known.any() or other is None:
        return False
    if static_shape(other) != static_shape(node.outputs[0]) or is_constant(other):
        return False
    take_over(graph, node, node.outputs[0], other, set(), build)
    return True


def _keeps_shape(node: ir.Node, at: int, known: NDArray[np.float64]) -> bool:
    others = [static_shape(v) for i, v in enumerate(node.inputs) if i != at and v is not None]
    if any(shape is None for shape in others):
        return False
    shapes = [shape for shape in others if shape is not None]
    return np.broadcast_shapes(known.shape, *shapes) == static_shape(node.outputs[0])
