"""Opt-in: set weights whose magnitude is at most a threshold to exactly zero.

    w = {0.7, 1e-7, -0.2}        ->  w = {0.7, 0, -0.2}            (threshold 1e-6)

Constant float weights of MatMul, Gemm, Conv and ConvTranspose, scales of batch norms, and constant
factors of what is computed: masks and gates that have converged. The measured change of the outputs
is the record's `max_rel_error`; it is reported, not bounded.

Declines when: a layer would lose every weight.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sparsegraph.errors import UsageError, message
from sparsegraph.graph import constant, input_at, is_op
from sparsegraph.linear import LINEAR_OPS
from sparsegraph.rewrite import Decline, Fuel, Outcome, decline

SNAPPED = "sparsegraph.snapped"


@dataclass(frozen=True)
class SnapNearZeros:
    """Near-zeros to zeros. `threshold` is absolute, in the unit of the weights."""

    threshold: float = 1e-6
    name: ClassVar[str] = "snap_near_zeros"
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.threshold < float("inf"):
            found, need = self.threshold, "a number of at least 0"
            raise UsageError(message("option", "threshold", found, need, "give a small number"))

    def run(self, model: ir.Model, fuel: Fuel) -> Outcome:
        """One application per changed weight; the count of new zeros goes into its metadata."""
        declined: list[Decline] = []
        n_applied = 0
        for node in model.graph:
            value = _factor(node)
            weight = constant(value)
            if value is None or weight is None or weight.dtype.kind != "f":
                continue
            small = (np.abs(weight) <= self.threshold) & (weight != 0)
            if not small.any():
                continue
            if is_op(node, *LINEAR_OPS) and np.count_nonzero(weight) == np.count_nonzero(small):
                declined.append(decline(node, f"all its weights are below {self.threshold:g}"))
                continue
            if fuel.take():
                snapped = np.where(small, np.zeros((), weight.dtype), weight)
                value.const_value = ir.tensor(snapped, name=value.name)
                value.metadata_props[SNAPPED] = str(np.count_nonzero(small))
                n_applied += 1
        return Outcome(n_applied, tuple(declined))


def _factor(node: ir.Node) -> ir.Value | None:
    """The constant that the node multiplies with."""
    if is_op(node, *LINEAR_OPS, "BatchNormalization"):
        return input_at(node, 1)
    if not is_op(node, "Mul"):
        return None
    fixed = [v for v in node.inputs if constant(v) is not None]
    return fixed[0] if len(fixed) == 1 else None
