"""Normalisation over the features of a feature-major value: LayerNorm, RMSNorm, softmax.

    s = x (+ residual);  y = (s - mean(s)) / sqrt(var(s) + epsilon) * scale (+ bias)

Lanes run over points, so sums over features are plain vector additions. Every pass reads the panel
of one tile from the level 1 or 2 cache; the mean is subtracted before squaring. Items are
images * tiles.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sparsegraph.targets import emit
from sparsegraph.targets.emit import Cell, Expr, bind, const, load, loop, splat, store
from sparsegraph.targets.kernels import expression, math
from sparsegraph.targets.layout import passes
from sparsegraph.targets.target import Target

_BLOCK = 256  # features per partial sum
_SIDE = "{0}:float32* {0}_image:int32 {0}_tile:int32 {0}_row:int32 "


@dataclass(frozen=True)
class Norm:
    """Spec of one LayerNorm or RMSNorm kernel.

    Attributes:
        kind: `layer` (mean subtracted) or `rms`.
        vectors: vectors of points in one tile.
        lanes: float32 values in a vector.
        bias: a bias per feature is added.
        residual: a second value is added first.
        keep_sum: the sum of x and the residual is stored too.
    """

    kind: str
    vectors: int
    lanes: int
    bias: bool = True
    residual: bool = False
    keep_sum: bool = False

    def __post_init__(self) -> None:
        assert self.kind in ("layer", "rms"), self.kind
        assert self.residual or not self.keep_sum

    @property
    def name(self) -> str:
        options = "_bias" * self.bias + "_residual" * self.residual + "_sum" * self.keep_sum
        return f"{self.kind}_norm_f32_v{self.vectors}_l{self.lanes}{options}"

    @property
    def params(self) -> emit.Signature:
        text = _SIDE.format("y") + _SIDE.format("x")
        text += _SIDE.format("r") * self.residual + _SIDE.format("s") * self.keep_sum
        text += "scale:float32* " + "bias:float32* " * self.bias
        return emit.signature(text + "epsilon:float32 tiles:int32 features:int32")

    def body(self, target: Target) -> Any:
        return lambda **args: _NormEmitter(self, target, args).run()


class _Panel:
    """The loops that Norm and Softmax share: items, passes over the tile, rows of features."""

    def __init__(self, lanes: int, splits: Sequence[int], args: dict[str, Expr]) -> None:
        self.a, self.lanes, self.splits = args, lanes, splits

    def run(self) -> None:
        a = self.a
        with loop(a["begin"], a["end"]) as item:
            image, tile = bind(emit.divide(item, a["tiles"])), bind(emit.modulo(item, a["tiles"]))
            panels = [n[:-6] for n in a if n.endswith("_image")]
            base = {p: bind(image * a[f"{p}_image"] + tile * a[f"{p}_tile"]) for p in panels}
            first = 0
            for width in self.splits:
                self.columns({p: bind(at + first * self.lanes) for p, at in base.items()}, width)
                first += width

    def columns(self, base: dict[str, Expr], width: int) -> None:
        """Normalise `width` vectors of points from `base`."""
        raise NotImplementedError

    def rows(self, body: Callable[[Expr], None]) -> None:
        with loop(0, self.a["features"]) as c:
            body(c)

    def vectors(self, panel: str, base: dict[str, Expr], c: Expr | int, width: int) -> list[Expr]:
        """The vectors of feature c."""
        at = bind(base[panel] + c * self.a[f"{panel}_row"])
        lanes = self.lanes
        return [bind(load(self.a[panel], at + v * lanes, lanes)) for v in range(width)]

    def write(self, panel: str, base: dict[str, Expr], c: Expr, values: Sequence[Expr]) -> None:
        at = bind(base[panel] + c * self.a[f"{panel}_row"])
        for v, value in enumerate(values):
            store(self.a[panel], value, at + v * self.lanes, self.lanes)

    def cells(self, starts: Sequence[Expr]) -> list[Cell]:
        cells = [Cell("float32", self.lanes) for _ in starts]
        for cell, start in zip(cells, starts):
            cell.set(start)
        return cells

    def zeros(self, width: int) -> list[Cell]:
        return self.cells([splat(const(0.0), self.lanes)] * width)

    def accumulate(self, width: int, add: Callable[[Expr, Sequence[Cell]], None]) -> list[Cell]:
        """Sums over the features; `add(c, sums)` adds feature c.

        Partial sums of _BLOCK features are added up: over the 18,710 classes of a text recogniser
        one running sum loses the small terms (3e-4 off).
        """
        totals, parts = self.zeros(width), self.zeros(width)
        features = self.a["features"]
        with loop(0, emit.divide(features + (_BLOCK - 1), _BLOCK)) as block:
            for part in parts:
                part.set(splat(const(0.0), self.lanes))
            first = bind(block * _BLOCK)
            with loop(first, emit.minimum(first + _BLOCK, features)) as c:
                add(c, parts)
            for total, part in zip(totals, parts):
                total.set(total.get() + part.get())
        return totals


class _NormEmitter(_Panel):
    def __init__(self, spec: Norm, target: Target, args: dict[str, Expr]) -> None:
        super().__init__(spec.lanes, passes(spec.vectors, target.n_registers // 4), args)
        self.spec = spec

    def columns(self, base: dict[str, Expr], width: int) -> None:
        spec, lanes = self.spec, self.lanes
        source = self.summed()
        share = bind(splat(const(1.0) / math.cast(self.a["features"], "float32"), lanes))
        mean = None
        if spec.kind == "layer":
            mean = self.means(base, width, share)
        elif spec.residual:
            self.rows(lambda c: self.write(source, base, c, self.sums(base, c, width)))

        def square(c: Expr, squares: Sequence[Cell]) -> None:
            for v, value in enumerate(self.vectors(source, base, c, width)):
                centred = value if mean is None else bind(value - mean[v])
                squares[v].set(squares[v].get() + centred * centred)

        squares = self.accumulate(width, square)
        one, epsilon = splat(const(1.0), lanes), splat(self.a["epsilon"], lanes)
        root = ("Sqrt", ("arg", 0))
        variances = [bind(s.get() * share + epsilon) for s in squares]
        factor = [bind(one / expression.emit(root, [v], lanes)) for v in variances]

        def scale(c: Expr) -> None:
            weight = bind(splat(load(self.a["scale"], c), lanes))
            bias = bind(splat(load(self.a["bias"], c), lanes)) if spec.bias else None
            out = []
            for v, value in enumerate(self.vectors(source, base, c, width)):
                centred = value if mean is None else value - mean[v]
                scaled = centred * factor[v] * weight
                out.append(scaled if bias is None else scaled + bias)
            self.write("y", base, c, out)

        self.rows(scale)

    def summed(self) -> str:
        """The panel that holds x + residual after the first pass; y serves if s is not kept."""
        if not self.spec.residual:
            return "x"
        return "s" if self.spec.keep_sum else "y"

    def sums(self, base: dict[str, Expr], c: Expr | int, width: int) -> list[Expr]:
        """x + residual of feature c."""
        values = self.vectors("x", base, c, width)
        if not self.spec.residual:
            return values
        rest = self.vectors("r", base, c, width)
        return [bind(x + r) for x, r in zip(values, rest)]

    def means(self, base: dict[str, Expr], width: int, share: Expr) -> list[Expr]:
        """First pass: add and store the residual; means over the features.

        What is averaged are the distances to feature 0. Where all features are equal the mean is
        exact: its rounding would be divided by the square root of epsilon.
        """
        origin = self.sums(base, 0, width)

        def add(c: Expr, totals: Sequence[Cell]) -> None:
            values = self.sums(base, c, width)
            if self.spec.residual:
                self.write(self.summed(), base, c, values)
            for total, value, start in zip(totals, values, origin):
                total.set(total.get() + bind(value - start))

        totals = self.accumulate(width, add)
        return [bind(start + t.get() * share) for start, t in zip(origin, totals)]


@dataclass(frozen=True)
class Softmax:
    """Spec of softmax over features, or of its logarithm.

    Attributes:
        log: LogSoftmax.
        vectors: vectors of points in one tile.
        lanes: float32 values in a vector.
    """

    log: bool
    vectors: int
    lanes: int

    @property
    def name(self) -> str:
        return f"{'log_' * self.log}softmax_f32_v{self.vectors}_l{self.lanes}"

    @property
    def params(self) -> emit.Signature:
        return emit.signature(_SIDE.format("y") + _SIDE.format("x") + "tiles:int32 features:int32")

    def body(self, target: Target) -> Any:
        return lambda **args: _SoftmaxEmitter(self, target, args).run()


class _SoftmaxEmitter(_Panel):
    def __init__(self, spec: Softmax, target: Target, args: dict[str, Expr]) -> None:
        super().__init__(spec.lanes, passes(spec.vectors, max(1, target.n_registers // 16)), args)
        self.spec = spec

    def columns(self, base: dict[str, Expr], width: int) -> None:
        peaks = self.peaks(base, width)

        def power(c: Expr, sums: Sequence[Cell]) -> None:
            values = self.vectors("x", base, c, width)
            powers = [bind(math.exp(bind(x - peak))) for x, peak in zip(values, peaks)]
            for total, p in zip(sums, powers):
                total.set(total.get() + p)
            if not self.spec.log:
                self.write("y", base, c, powers)

        sums = self.accumulate(width, power)
        if self.spec.log:
            logs = [bind(math.log(bind(s.get()))) for s in sums]
            self.rows(lambda c: self.finish(base, c, width, lambda x, v: x - peaks[v] - logs[v]))
            return
        share = [bind(splat(const(1.0), self.lanes) / s.get()) for s in sums]
        self.rows(lambda c: self.finish(base, c, width, lambda x, v: x * share[v]))

    def peaks(self, base: dict[str, Expr], width: int) -> list[Expr]:
        zero = const(0, "int32")
        peaks = self.cells(self.vectors("x", base, zero, width))

        def largest(c: Expr) -> None:
            for peak, value in zip(peaks, self.vectors("x", base, c, width)):
                peak.set(emit.maximum(peak.get(), value))

        self.rows(largest)
        return [bind(peak.get()) for peak in peaks]

    def finish(
        self, base: dict[str, Expr], c: Expr, width: int, last: Callable[[Expr, int], Expr]
    ) -> None:
        source = "x" if self.spec.log else "y"
        values = self.vectors(source, base, c, width)
        self.write("y", base, c, [last(x, v) for v, x in enumerate(values)])


def reference_norm(
    kind: str, x: np.ndarray, scale: np.ndarray, bias: np.ndarray | None, epsilon: float
) -> np.ndarray:
    """Float64 meaning for x [images, features, points] (the residual is added by the caller)."""
    x = x.astype(np.float64)
    if kind == "layer":
        x = x - x.mean(1, keepdims=True)
    y = x / np.sqrt((x * x).mean(1, keepdims=True) + epsilon) * scale[:, None]
    return np.asarray(y if bias is None else y + bias[:, None])


def reference_softmax(x: np.ndarray, *, log: bool) -> np.ndarray:
    """Float64 meaning for x [images, features, points]."""
    x = x.astype(np.float64)
    x = x - x.max(1, keepdims=True)
    total = np.exp(x).sum(1, keepdims=True)
    return np.asarray(x - np.log(total) if log else np.exp(x) / total)


def kernels(lanes: int) -> list[Norm | Softmax]:
    """Representative variants for vectors of `lanes` values."""
    norms = [
        Norm("layer", 6, lanes),
        Norm("layer", 1, lanes, bias=False),
        Norm("layer", 5, lanes, residual=True),
        Norm("layer", 6, lanes, residual=True, keep_sum=True),
        Norm("rms", 8, lanes, bias=False),
        Norm("rms", 3, lanes, bias=False, residual=True, keep_sum=True),
        Norm("rms", 2, lanes, residual=True),
    ]
    return [*norms, Softmax(False, 6, lanes), Softmax(False, 1, lanes), Softmax(True, 4, lanes)]
