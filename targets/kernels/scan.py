"""What walks an axis in order: running sums, and the largest or smallest values with their places.

Every value is row-major and seen as [outer, n, inner] with the axis in the middle.

    CumulativeSum   y[i] = x[0] + ... + x[i], one addition after the other as ONNX Runtime adds
    TopK            each x[i] that is better than the worst of the k kept is inserted among them

Of equal values TopK keeps and writes the one with the lower place first (ONNX); NaN is worse than
any number. With n random values k ln(n / k) insertions of k moves each are expected. Items:
outer * inner for TopK, those of `reduce.items` for sums.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sparsegraph.targets import emit
from sparsegraph.targets.emit import Cell, Expr, bind, const, load, loop, splat, store, when
from sparsegraph.targets.kernels.math import is_nan
from sparsegraph.targets.kernels.reduce import each_column
from sparsegraph.targets.target import Target


@dataclass(frozen=True)
class CumulativeSum:
    """y[outer, n, inner] = running sum of x along n.

    Attributes:
        dtype: element type of x and y; integers wrap.
        is_exclusive: y[i] leaves x[i] out.
        is_reverse: from the last to the first.
        is_rows: inner is 1.
    """

    dtype: str = "float32"
    is_exclusive: bool = False
    is_reverse: bool = False
    is_rows: bool = True

    @property
    def name(self) -> str:
        options = "_exclusive" * self.is_exclusive + "_reverse" * self.is_reverse
        return f"cumsum_{self.dtype}_{'rows' if self.is_rows else 'columns'}{options}"

    @property
    def params(self) -> emit.Signature:
        return emit.signature(f"y:{self.dtype}* x:{self.dtype}* n:int32 inner:int32")

    def body(self, target: Target) -> Any:
        def walk(y: Expr, x: Expr, n: Expr, start: Expr, step: Expr, widths: Sequence[int]) -> None:
            sums = [Cell(self.dtype, w) for w in widths]
            for total, w in zip(sums, widths):
                total.set(splat(const(0, self.dtype), w))
            with loop(0, n) as k:
                place = n - 1 - k if self.is_reverse else k
                first = bind(start + place * step)
                for i, (total, w) in enumerate(zip(sums, widths)):
                    at = bind(first + i * w)
                    before = bind(total.get())
                    total.set(before + load(x, at, w))
                    store(y, before if self.is_exclusive else total.get(), at, w)

        def rows(y: Expr, x: Expr, n: Expr, inner: Expr, begin: Expr, end: Expr) -> None:
            with loop(begin, end) as o:
                walk(y, x, n, bind(o * n), const(1, "int32"), [1])

        def columns(y: Expr, x: Expr, n: Expr, inner: Expr, begin: Expr, end: Expr) -> None:
            def visit(o: Expr, column: Expr, vectors: int, width: int) -> None:
                walk(y, x, n, bind(o * n * inner + column), inner, [width] * vectors)

            each_column(begin, end, inner, target.lanes, visit)

        return rows if self.is_rows else columns


@dataclass(frozen=True)
class TopK:
    """values and places [outer, k, inner] of the k best of x [outer, n, inner], best first.

    Attributes:
        dtype: element type of x and of the values; places are int64.
        is_largest: larger is better.
    """

    dtype: str = "float32"
    is_largest: bool = True

    @property
    def name(self) -> str:
        return f"top_{self.dtype}_{'largest' if self.is_largest else 'smallest'}"

    @property
    def params(self) -> emit.Signature:
        return emit.signature(
            f"values:{self.dtype}* places:int64* x:{self.dtype}* n:int32 k:int32 inner:int32"
        )

    def body(self, target: Target) -> Any:
        def emit_body(
            values: Expr, places: Expr, x: Expr, n: Expr, k: Expr, inner: Expr, begin: Expr,
            end: Expr,
        ) -> None:  # fmt: skip
            with loop(begin, end) as item:
                outer = bind(emit.divide(item, inner))
                column = bind(item - outer * inner)
                source = bind(outer * n * inner + column)
                kept = bind(outer * k * inner + column)
                with loop(0, n) as i:
                    x_i = bind(load(x, source + i * inner))
                    last = bind(load(values, kept + (k - 1) * inner))  # written from the k-th on
                    with when(emit.T.Or(i < k, self._is_better(x_i, last))):
                        self._insert(values, places, x_i, i, emit.minimum(i, k - 1), kept, inner)

        return emit_body

    def _insert(
        self, values: Expr, places: Expr, x: Expr, i: Expr, n: Expr, kept: Expr, inner: Expr
    ) -> None:
        """Among n kept ones, which are in order; what is behind moves on by one."""
        to = Cell("int32")
        to.set(n)
        with loop(0, n) as back:
            place = bind(n - 1 - back)
            at = bind(kept + place * inner)
            other = bind(load(values, at))
            with when(self._is_better(x, other)):
                store(values, other, at + inner)
                store(places, load(places, at), at + inner)
                to.set(place)
        at = bind(kept + to.get() * inner)
        store(values, x, at)
        store(places, emit.T.cast(i, "int64"), at)

    def _is_better(self, a: Expr, b: Expr) -> Expr:
        """An order of all values: without NaN as the worst, places could stay unwritten."""
        is_better = a > b if self.is_largest else a < b
        if not self.dtype.startswith("float"):
            return is_better
        return emit.T.Or(is_better, emit.T.And(is_nan(b), emit.T.Not(is_nan(a))))


def running_sums(x: np.ndarray, is_exclusive: bool, is_reverse: bool) -> np.ndarray:
    """NumPy's meaning of CumulativeSum over axis 1, in the type of x."""
    x = x[:, ::-1] if is_reverse else x
    sums = np.cumsum(x, 1, dtype=x.dtype)
    if is_exclusive:
        sums = np.concatenate([np.zeros_like(sums[:, :1]), sums[:, :-1]], 1)
    return sums[:, ::-1] if is_reverse else sums


def best(x: np.ndarray, k: int, is_largest: bool) -> tuple[np.ndarray, np.ndarray]:
    """NumPy's meaning of TopK over axis 1: values and places."""
    order = np.argsort(-x if is_largest else x, 1, kind="stable")[:, :k]
    return np.take_along_axis(x, order, 1), order


KERNELS: tuple[CumulativeSum | TopK, ...] = (
    *(CumulativeSum(d, is_rows=r) for d in ("float32", "int32", "int64") for r in (True, False)),
    *(CumulativeSum("float32", e, not e, r) for e in (True, False) for r in (True, False)),
    CumulativeSum("int64", True, True),
    *(TopK(d, largest) for d in ("float32", "int64") for largest in (True, False)),
)
