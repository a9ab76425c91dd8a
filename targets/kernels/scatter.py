"""Scatters: elements or rows of x go to places in y that indices tell, one after the other.

Indices are as those of `movement.GatherRows`. Of several values for one place each is joined with
what is there, or replaces it: the last one stays.
"""

from dataclasses import dataclass
from typing import Any

from sparsegraph.targets import emit
from sparsegraph.targets.emit import Expr
from sparsegraph.targets.kernels.movement import axes_of_place, place, wrapped
from sparsegraph.targets.kernels.vectors import each_vector
from sparsegraph.targets.target import Target

REDUCTIONS = ("none", "add", "mul", "max", "min")


@dataclass(frozen=True)
class ScatterRows:
    """y[tuple m of indices, :] joined with x[m, :]: ScatterND.

    Arguments: y, x, indices, inner, count (tuples), then per depth the extent and stride of the
    indexed axis. Items: 1, since tuples may be equal.

    Attributes:
        dtype, index: element types of the data and of the indices (int32 or int64).
        depth: indices per tuple.
        reduction: how a value is joined, one of `REDUCTIONS`.
    """

    dtype: str
    index: str = "int64"
    depth: int = 1
    reduction: str = "none"

    @property
    def name(self) -> str:
        return f"scatter_rows_{self.reduction}_{self.dtype}_{self.index}_d{self.depth}"

    @property
    def params(self) -> emit.Signature:
        pointers = f"y:{self.dtype}* x:{self.dtype}* indices:{self.index}*"
        return emit.signature(f"{pointers} inner:int32 count:int32 {axes_of_place(self.depth)}")

    def body(self, target: Target) -> Any:
        def emit_body(
            y: Expr, x: Expr, indices: Expr, inner: Expr, count: Expr, begin: Expr, end: Expr,
            **a: Expr,
        ) -> None:  # fmt: skip
            with emit.loop(begin, end), emit.loop(0, count) as m:
                to = emit.bind(place(a, indices, m * self.depth, self.depth))
                at = emit.bind(m * inner)

                def write(i: Expr, lanes: int) -> None:
                    _join(self.reduction, y, to + i, emit.load(x, at + i, lanes), lanes)

                each_vector(inner, target.lanes, write)

        return emit_body


@dataclass(frozen=True)
class ScatterElements:
    """y[o, index[o, j, i], i] joined with x[o, j, i] for y [outer, n, y_inner].

    Arguments: y, x, indices, n, y_inner (at least inner), count (j per outer), inner. Items: outer.

    Attributes:
        dtype, index, reduction: as of `ScatterRows`.
    """

    dtype: str
    index: str = "int64"
    reduction: str = "none"

    @property
    def name(self) -> str:
        return f"scatter_elements_{self.reduction}_{self.dtype}_{self.index}"

    @property
    def params(self) -> emit.Signature:
        sizes = "n:int32 y_inner:int32 count:int32 inner:int32"
        return emit.signature(f"y:{self.dtype}* x:{self.dtype}* indices:{self.index}* {sizes}")

    def body(self, target: Target) -> Any:
        def emit_body(
            y: Expr, x: Expr, indices: Expr, n: Expr, y_inner: Expr, count: Expr, inner: Expr,
            begin: Expr, end: Expr,
        ) -> None:  # fmt: skip
            with (
                emit.loop(begin, end) as outer,
                emit.loop(0, count) as j,
                emit.loop(0, inner) as i,
            ):
                at = emit.bind((outer * count + j) * inner + i)
                row = emit.bind(outer * n + wrapped(emit.load(indices, at), n))
                _join(self.reduction, y, row * y_inner + i, emit.load(x, at))

        return emit_body


def _join(reduction: str, y: Expr, at: Expr, value: Expr, lanes: int = 1) -> None:
    """As ONNX Runtime does it: a NaN that arrives is neither larger nor smaller."""
    if reduction != "none":
        value, old = emit.bind(value), emit.bind(emit.load(y, at, lanes))
        value = {
            "add": lambda: old + value,
            "mul": lambda: old * value,
            "max": lambda: emit.select(old < value, value, old),
            "min": lambda: emit.select(value < old, value, old),
        }[reduction]()
    emit.store(y, value, at, lanes)


_ALL = ((k, r) for k in (1, 2) for r in REDUCTIONS)
KERNELS: tuple[ScatterRows | ScatterElements, ...] = (
    *(ScatterRows("float32", depth=k, reduction=r) for k, r in _ALL),
    *(ScatterElements("float32", reduction=r) for r in REDUCTIONS),
)
