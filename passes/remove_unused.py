"""Remove nodes, initializers, functions and opset imports that no output depends on.

    y = Relu(x); dead = Exp(x)        ->  y = Relu(x)

Declines when: never.
"""

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes import common

from sparsegraph.graph import remove_dead, remove_unused_initializers
from sparsegraph.rewrite import Fuel, Outcome


@dataclass(frozen=True)
class RemoveUnused:
    """Dead code removal over the main graph."""

    name: ClassVar[str] = "remove_unused"
    exact: ClassVar[bool] = True

    def run(self, model: ir.Model, fuel: Fuel) -> Outcome:
        """Count removed nodes and initializers. Removal costs no fuel: it cannot change outputs."""
        removed = len(remove_dead(model.graph))
        removed += len(remove_unused_initializers(model.graph))
        common.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
        common.RemoveUnusedOpsetsPass()(model)
        return Outcome(removed)
