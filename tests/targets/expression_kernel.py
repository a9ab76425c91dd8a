"""A kernel that applies one expression to plain arrays, for the tests of expressions."""

from dataclasses import dataclass
from typing import Any

from sparsegraph.targets import emit
from sparsegraph.targets.emit import Expr
from sparsegraph.targets.kernels import expression
from sparsegraph.targets.kernels.operators import stored
from sparsegraph.targets.target import Target


@dataclass(frozen=True)
class Apply:
    """y[i] = tree(x0[i], x1[i], ...) with `lanes` elements per item."""

    tree: expression.Tree
    lanes: int
    dtypes: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"apply{self.lanes}_{expression.label(self.tree)}_{'_'.join(self.dtypes)}"

    @property
    def params(self) -> emit.Signature:
        out = expression.dtype(self.tree, self.dtypes)
        inputs = " ".join(f"x{i}:{d}*" for i, d in enumerate(self.dtypes))
        return emit.signature(f"y:{out}* {inputs}")

    def body(self, target: Target) -> Any:
        def emit_body(y: Expr, begin: Expr, end: Expr, **x: Expr) -> None:
            with emit.loop(begin, end) as item:
                at = emit.bind(item * self.lanes)
                operands = [emit.load(x[f"x{i}"], at, self.lanes) for i in range(len(x))]
                value = expression.emit(self.tree, operands, self.lanes)
                emit.store(y, stored(value), at, self.lanes)

        return emit_body
