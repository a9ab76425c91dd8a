"""Run one pass on ONNX text and check what must hold for every pass."""

import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir

from sparsegraph.graph import fill_shapes
from sparsegraph.pipeline import Judge
from sparsegraph.rewrite import Decline, Fuel, Pass


@dataclass(frozen=True)
class Result:
    """The graph after a pass and what the pass said."""

    model: ir.Model
    n_applied: int
    declined: tuple[Decline, ...]

    @property
    def ops(self) -> list[str]:
        """Op types in graph order."""
        return [n.op_type for n in self.model.graph]

    @property
    def counts(self) -> Counter[str]:
        """Op types counted."""
        return Counter(self.ops)

    def node(self, op_type: str) -> ir.Node:
        """The only node of a type."""
        (node,) = [n for n in self.model.graph if n.op_type == op_type]
        return node

    def weight(self, name: str) -> np.ndarray:
        """The array of an initializer."""
        tensor = self.model.graph.initializers[name].const_value
        assert tensor is not None
        return np.asarray(tensor.numpy())


def parse(text: str, opset: int = 23, **arrays: np.ndarray) -> ir.Model:
    """A model as capture leaves it, from the text of a graph and arrays as initializers."""
    header = f'<ir_version: 10, opset_import: ["": {opset}]>\n'
    proto = onnx.parser.parse_model(header + text)
    for name, array in arrays.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    for number, node in enumerate(proto.graph.node):
        node.name = node.name or f"{node.op_type}_{number}"
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
    return ir.from_proto(inferred)


def apply(step: Pass, model: ir.Model, tolerance: float | None = None) -> Result:
    """Run the pass; outputs, interface, spec and idempotence are checked on the way."""
    before = model.clone()
    after = model.clone()
    outcome = step.run(after, Fuel())
    if outcome.n_applied:
        fill_shapes(after)
    onnx.checker.check_model(ir.to_proto(after), full_check=True)
    assert _interface(after) == _interface(before)
    with tempfile.TemporaryDirectory() as folder:
        error = Judge(before).check(step, before, after, Path(folder))
    if tolerance is not None:
        assert error is not None
        assert error <= tolerance
    again = step.run(after.clone(), Fuel())
    assert again.n_applied == 0, "a second run must change nothing"
    if not outcome.n_applied:
        assert str(ir.to_proto(after)) == str(ir.to_proto(before))
    return Result(after, outcome.n_applied, outcome.declined)


def run(step: Pass, text: str, opset: int = 23, **arrays: np.ndarray) -> Result:
    """`parse`, then `apply`."""
    return apply(step, parse(text, opset, **arrays))


def rng() -> np.random.Generator:
    """The generator of all test weights."""
    return np.random.default_rng(7)


def weight(*shape: int) -> np.ndarray:
    """Normal float32 weights."""
    return rng().standard_normal(shape).astype(np.float32)


def _interface(model: ir.Model) -> list[str | None]:
    return [v.name for v in (*model.graph.inputs, *model.graph.outputs)]
