"""Reductions of row-major values along one axis: sums, extremes, arg-extremes, softmax, norms.

Every value is seen as [outer, n, inner] and reduced over n (`collapse_axes`). With inner == 1
(`rows`) vectors run along n in four accumulators, joined at the end; otherwise (`columns`)
vectors run along inner. Either way partial results of 128 steps are added up, so that rounding
errors grow with n/128 and not with n. Items: outer for rows, and
outer * ceil(inner / (8 lanes)) for columns; `items` counts them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sparsegraph.targets import emit
from sparsegraph.targets.emit import Expr, T
from sparsegraph.targets.kernels import math
from sparsegraph.targets.kernels.math import cast, hold, like, select, type_of
from sparsegraph.targets.kernels.operators import larger, smaller
from sparsegraph.targets.kernels.vectors import each_vector
from sparsegraph.targets.target import Target

GROUP = 8  # vectors of one item of a column reduction: four cache lines with 8 lanes
BLOCK = 128  # steps along the axis per partial result
EXP_WAYS = 2  # more exponentials at a time than 2 leave the 16 registers of AVX2
Fold = Callable[[Expr, Expr], Expr]
Load = Callable[[Expr, int], Expr]  # (position along the axis, lanes) -> value

FOLDS: dict[str, Fold] = {
    "sum": lambda a, b: a + b,
    "prod": lambda a, b: a * b,
    "max": larger,
    "min": smaller,
}
# reduction: (fold, what is done to an element, what is done to the result)
REDUCTIONS: dict[str, tuple[str, str, str]] = {
    "Sum": ("sum", "", ""),
    "Mean": ("sum", "", "mean"),
    "Max": ("max", "", ""),
    "Min": ("min", "", ""),
    "Prod": ("prod", "", ""),
    "L1": ("sum", "abs", ""),
    "L2": ("sum", "square", "sqrt"),
    "SumSquare": ("sum", "square", ""),
    "LogSum": ("sum", "", "log"),
    "LogSumExp": ("sum", "", ""),
}


def reference(op: str, x: np.ndarray) -> np.ndarray:
    """NumPy's meaning over axis 1 of [outer, n, inner], float64 for floats."""
    x = x.astype(np.float64) if x.dtype.kind == "f" else x
    peak = x.max(1, keepdims=True)
    shifted = x - peak
    with np.errstate(divide="ignore", invalid="ignore"):
        meanings: dict[str, Callable[[], Any]] = {
            "Sum": lambda: x.sum(1), "Mean": lambda: x.mean(1), "Max": lambda: x.max(1),
            "Min": lambda: x.min(1), "Prod": lambda: x.prod(1), "L1": lambda: np.abs(x).sum(1),
            "L2": lambda: np.sqrt((x * x).sum(1)), "SumSquare": lambda: (x * x).sum(1),
            "LogSum": lambda: np.log(x.sum(1)), "ArgMax": lambda: x.argmax(1),
            "LogSumExp": lambda: np.log(np.exp(shifted).sum(1)) + peak[:, 0],
            "ArgMin": lambda: x.argmin(1),
            "Softmax": lambda: np.exp(shifted) / np.exp(shifted).sum(1, keepdims=True),
            "LogSoftmax": lambda: shifted - np.log(np.exp(shifted).sum(1, keepdims=True)),
        }  # fmt: skip
        return np.asarray(meanings[op]())


def collapse_axes(shape: Sequence[int], axes: Sequence[int]) -> tuple[int, int, int] | None:
    """(outer, n, inner) of a reduction over neighbouring `axes`; None if others lie between."""
    marked = sorted(a % len(shape) for a in axes)
    between = range(marked[0], marked[-1] + 1)
    if any(a not in marked and shape[a] != 1 for a in between):
        return None
    sizes = (shape[: marked[0]], shape[marked[0] : marked[-1] + 1], shape[marked[-1] + 1 :])
    outer, n, inner = (int(np.prod(s, dtype=np.int64)) for s in sizes)
    return outer, n, inner


def items(outer: int, inner: int, target: Target) -> int:
    """Items of every kernel of this file."""
    return outer if inner == 1 else outer * -(-inner // (GROUP * target.lanes))


# ---------------------------------------------------------------- walking


def _start(fold: str, dtype: str, lanes: int) -> Expr:
    """The neutral element of a fold."""
    if dtype.startswith("float"):
        value = {"sum": 0.0, "prod": 1.0, "max": -float("inf"), "min": float("inf")}[fold]
        return emit.splat(emit.const(value, dtype), lanes)
    info = np.iinfo(dtype)
    whole = {"sum": 0, "prod": 1, "max": int(info.min), "min": int(info.max)}[fold]
    return emit.splat(emit.const(whole, dtype), lanes)


def _cell(fold: str, dtype: str, lanes: int) -> emit.Cell:
    cell = emit.Cell(dtype, lanes)
    cell.set(_start(fold, dtype, lanes))
    return cell


def fold_row(n: Expr, load: Load, fold: str, dtype: str, lanes: int, ways: int = 4) -> Expr:
    """The fold of load(0..n-1), with `ways` vectors of partial results."""
    step, cells = FOLDS[fold], [_cell(fold, dtype, lanes) for _ in range(ways)]
    last, stride = _cell(fold, dtype, 1), ways * lanes
    strides = emit.bind(T.truncdiv(n, emit.const(stride, "int32")))
    with emit.loop(0, T.truncdiv(strides + (BLOCK - 1), emit.const(BLOCK, "int32"))) as block:
        parts = [_cell(fold, dtype, lanes) for _ in cells]
        first = emit.bind(block * BLOCK)
        with emit.loop(0, emit.tirx.Min(emit.const(BLOCK, "int32"), strides - first)) as k:
            for i, part in enumerate(parts):
                part.set(step(part.get(), load((first + k) * stride + i * lanes, lanes)))
        for cell, part in zip(cells, parts):
            cell.set(step(cell.get(), part.get()))
    done = emit.bind(strides * stride)

    def rest(at: Expr, width: int) -> None:
        cell = cells[0] if width == lanes else last
        cell.set(step(cell.get(), load(done + at, width)))

    each_vector(emit.bind(n - done), lanes, rest)
    values = [cell.get() for cell in cells]
    while len(values) > 1:
        half = len(values) // 2
        values = [hold(step(a, b)) for a, b in zip(values[:half], values[half:])]
    return hold(step(_across(values[0], step), last.get()))


def _across(vector: Expr, step: Fold) -> Expr:
    """The fold of the lanes of one vector, by halves."""
    lanes = type_of(vector)[1]
    if lanes == 1:
        return vector
    while lanes > 2:
        lanes //= 2
        low, high = (emit.shuffle([vector], range(s, s + lanes)) for s in (0, lanes))
        vector = hold(step(hold(low), hold(high)))
    low, high = (emit.shuffle([vector], [i]) for i in (0, 1))
    return hold(step(hold(low), hold(high)))


def fold_columns(
    n: Expr, loads: Sequence[Load], fold: str, dtype: str, lanes: int
) -> list[emit.Cell]:
    """Per load the fold over positions 0..n-1, by blocks; results stay in cells."""
    step = FOLDS[fold]
    totals = [_cell(fold, dtype, lanes) for _ in loads]
    with emit.loop(0, T.truncdiv(n + (BLOCK - 1), emit.const(BLOCK, "int32"))) as block:
        parts = [_cell(fold, dtype, lanes) for _ in loads]
        first = emit.bind(block * BLOCK)
        with emit.loop(0, emit.tirx.Min(emit.const(BLOCK, "int32"), n - first)) as k:
            for part, load in zip(parts, loads):
                part.set(step(part.get(), load(first + k, lanes)))
        for total, part in zip(totals, parts):
            total.set(step(total.get(), part.get()))
    return totals


ColumnVisit = Callable[[Expr, Expr, int, int], None]  # (outer, first column, vectors, lanes)


def each_column(begin: Expr, end: Expr, inner: Expr, lanes: int, visit: ColumnVisit) -> None:
    """All columns of items [begin, end): groups of vectors, else vectors, else single columns."""
    width = GROUP * lanes
    groups = emit.bind(T.truncdiv(inner + (width - 1), emit.const(width, "int32")))
    with emit.loop(begin, end) as item:
        outer = emit.bind(T.truncdiv(item, groups))
        first = emit.bind((item - outer * groups) * width)
        count = emit.bind(emit.tirx.Min(emit.const(width, "int32"), inner - first))
        with emit.choose(T.EQ(count, emit.const(width, "int32"))) as (full, part):
            with full:
                visit(outer, first, GROUP, lanes)
            with part:
                each_vector(count, lanes, lambda at, w: visit(outer, emit.bind(first + at), 1, w))


# ---------------------------------------------------------------- kernels


@dataclass(frozen=True)
class Reduction:
    """y[outer, inner] = op over n of x[outer, n, inner]; ArgMax and ArgMin write int64.

    Attributes:
        op: a key of REDUCTIONS (element type kept), or ArgMax, ArgMin.
        dtype: element type of x; roots, logarithms and exponentials need float32.
        is_rows: inner is 1.
        is_last: of equal extremes an arg-reduction takes the last.
    """

    op: str
    dtype: str = "float32"
    is_rows: bool = True
    is_last: bool = False

    @property
    def out_dtype(self) -> str:
        return "int64" if self.op.startswith("Arg") else self.dtype

    @property
    def name(self) -> str:
        form = ("rows" if self.is_rows else "columns") + ("_last" if self.is_last else "")
        return f"reduce_{self.op.lower()}_{self.dtype}_{form}"

    @property
    def params(self) -> emit.Signature:
        return emit.signature(f"y:{self.out_dtype}* x:{self.dtype}* n:int32 inner:int32")

    def body(self, target: Target) -> Any:
        lanes = target.lanes

        def rows(y: Expr, x: Expr, n: Expr, inner: Expr, begin: Expr, end: Expr) -> None:
            def fold(loads: Sequence[Load], kind: str, dtype: str, width: int) -> list[Expr]:
                return [fold_row(n, loads[0], kind, dtype, lanes)]

            with emit.loop(begin, end) as o:
                start = emit.bind(o * n)
                load: Load = lambda k, w: hold(emit.load(x, start + k, w))  # noqa: E731
                emit.store(y, self._value([load], fold, n, 1)[0], o)

        def columns(y: Expr, x: Expr, n: Expr, inner: Expr, begin: Expr, end: Expr) -> None:
            def fold(loads: Sequence[Load], kind: str, dtype: str, width: int) -> list[Expr]:
                return [c.get() for c in fold_columns(n, loads, kind, dtype, width)]

            def visit(o: Expr, column: Expr, vectors: int, width: int) -> None:
                loads = _column_loads(x, emit.bind(o * n * inner + column), inner, vectors, width)
                for i, value in enumerate(self._value(loads, fold, n, width)):
                    emit.store(y, value, o * inner + column + i * width, width)

            each_column(begin, end, inner, lanes, visit)

        return rows if self.is_rows else columns

    def _value(self, loads: Sequence[Load], fold: Any, n: Expr, width: int) -> list[Expr]:
        if self.op.startswith("Arg"):
            return self._positions(loads, fold, n, width)
        if self.op == "LogSumExp":
            return _log_sum_exp(loads, fold, self.dtype, width)
        kind, before, after = REDUCTIONS[self.op]
        mapped = [_mapped(load, before) for load in loads]
        return [_finish(v, after, n) for v in fold(mapped, kind, self.dtype, width)]

    def _positions(self, loads: Sequence[Load], fold: Any, n: Expr, width: int) -> list[Expr]:
        """Where the extreme (or NaN) is: an extreme of positions."""
        best = [hold(v) for v in fold(loads, self.op[3:].lower(), self.dtype, width)]
        missing, kind = (emit.const(-1, "int32"), "max") if self.is_last else (n, "min")

        def position(load: Load, found: Expr) -> Load:
            def at(k: Expr, w: int) -> Expr:
                x = load(k, w)
                peak = found if type_of(found)[1] == w else emit.splat(found, w)
                is_here = T.EQ(x, peak)
                if self.dtype.startswith("float"):
                    is_here = T.Or(is_here, math.is_nan(x))
                return select(is_here, self._index(k, w), emit.splat(missing, w))

            return at

        places = fold([position(x, b) for x, b in zip(loads, best)], kind, "int32", width)
        return [cast(p, "int64") for p in places]

    def _index(self, k: Expr, width: int) -> Expr:
        if width == 1 or not self.is_rows:
            return emit.splat(k, width)
        return emit.tirx.Ramp(k, 1, width)


def _column_loads(x: Expr, start: Expr, inner: Expr, vectors: int, width: int) -> list[Load]:
    def at(i: int) -> Load:
        return lambda k, w: hold(emit.load(x, start + k * inner + i * width, w))

    return [at(i) for i in range(vectors)]


def _mapped(load: Load, before: str) -> Load:
    if before == "abs":
        return lambda k, w: hold(select(load(k, w) < like(0, load(k, w)), -load(k, w), load(k, w)))
    if before == "square":
        return lambda k, w: hold((x := load(k, w)) * x)
    return load


def _finish(value: Expr, after: str, n: Expr) -> Expr:
    if after == "mean":
        dtype, lanes = type_of(value)
        count = emit.splat(T.cast(n, dtype), lanes)
        return value / count if dtype.startswith("float") else T.truncdiv(value, count)
    if after == "sqrt":
        return T.sqrt(value)
    return math.log(value) if after == "log" else value


def _shifted_exp(load: Load, peak: Expr) -> Load:
    """exp(x - peak); peak is one value per row or per column."""

    def at(k: Expr, w: int) -> Expr:
        shift = peak if type_of(peak)[1] == w else emit.splat(peak, w)
        return hold(math.exp_normal(hold(load(k, w) - shift)))

    return at


def _finite(peak: Expr) -> Expr:
    """0 for an infinite maximum, so that inf - inf does not turn the sum into NaN."""
    return hold(select(T.abs(peak) < like(float("inf"), peak), peak, like(0.0, peak)))


def _log_sum_exp(loads: Sequence[Load], fold: Any, dtype: str, width: int) -> list[Expr]:
    peaks = [_finite(hold(v)) for v in fold(loads, "max", dtype, width)]
    sums = fold([_shifted_exp(x, p) for x, p in zip(loads, peaks)], "sum", dtype, width)
    return [math.log(hold(s)) + p for s, p in zip(sums, peaks)]


@dataclass(frozen=True)
class Softmax:
    """y = softmax (or its logarithm) of x[outer, n, inner] over n; a row of -inf gives NaN.

    Attributes:
        is_log: LogSoftmax.
        is_rows: inner is 1.
    """

    is_log: bool = False
    is_rows: bool = True

    @property
    def name(self) -> str:
        return f"{'log_' if self.is_log else ''}softmax_{'rows' if self.is_rows else 'columns'}"

    @property
    def params(self) -> emit.Signature:
        return emit.signature("y:float32* x:float32* n:int32 inner:int32")

    def body(self, target: Target) -> Any:
        lanes = target.lanes

        def rows(y: Expr, x: Expr, n: Expr, inner: Expr, begin: Expr, end: Expr) -> None:
            with emit.loop(begin, end) as o:
                start = emit.bind(o * n)
                load: Load = lambda k, w: hold(emit.load(x, start + k, w))  # noqa: E731
                keep: Any = lambda k, v, w: emit.store(y, v, start + k, w)  # noqa: E731
                peak = fold_row(n, load, "max", "float32", lanes)
                total = fold_row(n, self._kept(load, peak, keep), "sum", "float32", lanes, EXP_WAYS)
                scale = self._scale(total)
                again: Load = lambda k, w: hold(emit.load(y, start + k, w))  # noqa: E731
                each_vector(n, lanes, lambda k, w: keep(k, self._result(again(k, w), scale), w))

        def columns(y: Expr, x: Expr, n: Expr, inner: Expr, begin: Expr, end: Expr) -> None:
            def visit(o: Expr, column: Expr, vectors: int, width: int) -> None:
                start = emit.bind(o * n * inner + column)
                loads = _column_loads(x, start, inner, vectors, width)
                keeps = [_column_store(y, start + i * width, inner) for i in range(vectors)]
                peaks = [c.get() for c in fold_columns(n, loads, "max", "float32", width)]
                kept = [self._kept(*three) for three in zip(loads, peaks, keeps)]
                totals = fold_columns(n, kept, "sum", "float32", width)
                scales = [self._scale(c.get()) for c in totals]
                again = _column_loads(y, start, inner, vectors, width)
                with emit.loop(0, n) as k:
                    for load, keep, scale in zip(again, keeps, scales):
                        keep(k, self._result(load(k, width), scale), width)

            each_column(begin, end, inner, lanes, visit)

        return rows if self.is_rows else columns

    def _kept(self, load: Load, peak: Expr, keep: Any) -> Load:
        """exp(x - peak) for the sum; stores it, or x - peak for a logarithm, into y."""

        def at(k: Expr, w: int) -> Expr:
            shift = peak if type_of(peak)[1] == w else emit.splat(peak, w)
            shifted = hold(load(k, w) - shift)
            power = hold(math.exp_normal(shifted))
            keep(k, shifted if self.is_log else power, w)
            return power

        return at

    def _scale(self, total: Expr) -> Expr:
        return hold(math.log(total) if self.is_log else like(1.0, total) / total)

    def _result(self, kept: Expr, scale: Expr) -> Expr:
        lanes = type_of(kept)[1]
        wide = scale if type_of(scale)[1] == lanes else emit.splat(scale, lanes)
        return kept - wide if self.is_log else kept * wide


def _column_store(y: Expr, start: Expr, inner: Expr) -> Any:
    return lambda k, value, w: emit.store(y, value, start + k * inner, w)


@dataclass(frozen=True)
class RowNorm:
    """LayerNormalization (or RMSNorm) of x[outer, n] over n, scaled, optionally shifted.

    The mean is subtracted before squaring. Items: outer. `y` may be `x`.

    Attributes:
        is_rms: no mean: x / sqrt(mean(x²) + epsilon).
        has_bias: adds bias[n].
    """

    is_rms: bool = False
    has_bias: bool = True

    @property
    def name(self) -> str:
        return f"row_{'rms' if self.is_rms else 'layer'}_norm{'_bias' if self.has_bias else ''}"

    @property
    def params(self) -> emit.Signature:
        bias = " bias:float32*" if self.has_bias else ""
        return emit.signature(f"y:float32* x:float32* scale:float32*{bias} n:int32 epsilon:float32")

    def body(self, target: Target) -> Any:
        lanes = target.lanes

        def emit_body(
            y: Expr, x: Expr, scale: Expr, n: Expr, epsilon: Expr, begin: Expr, end: Expr,
            bias: Expr = None,
        ) -> None:  # fmt: skip
            count = emit.bind(T.cast(n, "float32"))
            with emit.loop(begin, end) as o:
                start = emit.bind(o * n)
                load: Load = lambda k, w: hold(emit.load(x, start + k, w))  # noqa: E731
                mean = emit.const(0.0)
                if not self.is_rms:  # exact where all are equal: epsilon may be all that divides
                    origin = hold(load(emit.const(0, "int32"), 1))
                    near: Load = lambda k, w: hold(load(k, w) - emit.splat(origin, w))  # noqa: E731
                    mean = hold(origin + fold_row(n, near, "sum", "float32", lanes) / count)
                centred: Load = lambda k, w: hold(load(k, w) - emit.splat(mean, w))  # noqa: E731
                square: Load = lambda k, w: hold((v := centred(k, w)) * v)  # noqa: E731
                variance = fold_row(n, square, "sum", "float32", lanes) / count
                factor = hold(emit.const(1.0) / T.sqrt(variance + epsilon))

                def finish(k: Expr, w: int) -> None:
                    gain = hold(emit.load(scale, k, w) * emit.splat(factor, w))
                    value = centred(k, w) * gain
                    if bias is not None:
                        value = value + emit.load(bias, k, w)
                    emit.store(y, value, start + k, w)

                each_vector(n, lanes, finish)

        return emit_body


def row_norm_reference(
    x: np.ndarray, scale: np.ndarray, bias: np.ndarray | float, epsilon: float, is_rms: bool
) -> np.ndarray:
    """NumPy's value in float64 over the last axis of [outer, n]."""
    x = x.astype(np.float64)
    if not is_rms:
        x = x - x.mean(1, keepdims=True)
    return np.asarray(x / np.sqrt((x * x).mean(1, keepdims=True) + epsilon) * scale + bias)


KERNELS: tuple[Reduction | Softmax | RowNorm, ...] = (
    *(Reduction(op, "float32", rows) for op in REDUCTIONS for rows in (True, False)),
    *(Reduction(op, "int64", rows) for op in ("Sum", "Max", "Prod") for rows in (True, False)),
    *(Reduction(op, "float32", r) for op in ("ArgMax", "ArgMin") for r in (True, False)),
    Reduction("ArgMax", "float32", True, True),
    *(Softmax(log, rows) for log in (False, True) for rows in (True, False)),
    *(RowNorm(rms, bias) for rms in (False, True) for bias in (False, True)),
)
