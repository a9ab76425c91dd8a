"""Constant propagation per position: which channels hold a constant whatever the input is.

What is known of a value is a float64 array that broadcasts to it: axes of size one where it is the
same all along, NaN where nothing is known. Unknown numbers are taken to be finite, as everywhere in
this compiler: zero times unknown is zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sparsegraph.graph import (
    FLOAT_DTYPES,
    constant,
    has_subgraph,
    is_constant,
    is_op,
    is_random,
    static_shape,
)
from sparsegraph.verify import Session

Known = NDArray[np.float64]
LARGEST = 1 << 20  # elements of one known array


@dataclass
class Knowns:
    """What is known of every value so far."""

    found: dict[ir.Value, Known] = field(default_factory=dict)

    def of(self, value: ir.Value | None) -> Known | None:
        """What is known of a value or constant; None for nothing at all."""
        if value is None:
            return None
        if not is_constant(value):
            return self.found.get(value)
        array = constant(value)
        if array is None or array.dtype.kind != "f" or array.size > LARGEST:
            return None
        return array.astype(np.float64)

    def set(self, value: ir.Value, known: Known | None) -> None:
        """Remember; infinities count as unknown."""
        if known is None or known.size > LARGEST:
            return
        known = np.where(np.isfinite(known), known, np.nan)
        shape = static_shape(value)
        if shape is None or value.dtype not in FLOAT_DTYPES or np.isnan(known).all():
            return
        assert len(shape) == known.ndim, f"{value.name}: {shape} known as {known.shape}"
        self.found[value] = known

    def along(self, value: ir.Value | None, axis: int) -> Known | None:
        """One number per position of an axis, NaN where it varies over the other axes."""
        known, shape = self.of(value), static_shape(value)
        if known is None or shape is None:
            return None
        rows = np.moveaxis(known, axis, 0).reshape(known.shape[axis], -1)
        same = (rows == rows[:, :1]).all(axis=1)
        return np.broadcast_to(np.where(same, rows[:, 0], np.nan), (shape[axis],))


def propagate(graph: ir.Graph) -> Knowns:
    """Constants of every value in the main graph; nothing is said of values without elements."""
    from sparsegraph.structure.table import TABLE

    knowns = Knowns()
    for node in graph:
        rule = TABLE.get(node.op_type) if is_op(node, node.op_type) else None
        if rule is None or rule.known is None or has_subgraph(node) or is_random(node):
            continue
        shapes = [static_shape(v) for v in (*node.inputs, *node.outputs) if v is not None]
        if all(shape is not None and 0 not in shape for shape in shapes):
            rule.known(knowns, node)
    return knowns


def evaluate(node: ir.Node, arrays: Sequence[np.ndarray | None]) -> np.ndarray:
    """The node's first output on other inputs, computed by ONNX Runtime."""
    inputs = [
        None
        if array is None
        else ir.Value(
            name=f"input_{number}",
            shape=ir.Shape(array.shape),
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        )
        for number, array in enumerate(arrays)
    ]
    copy = ir.Node("", node.op_type, inputs, node.attributes.values(), num_outputs=1)
    copy.outputs[0].name = "output"
    copy.outputs[0].type = node.outputs[0].type
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    given = [v for v in inputs if v is not None]
    single = ir.Graph(given, copy.outputs, nodes=[copy], opset_imports=graph.opset_imports)
    feed = {f"input_{n}": a for n, a in enumerate(arrays) if a is not None}
    return Session(ir.Model(single, ir_version=10)).run(feed)["output"]
