"""Pooling over maps: windows (`Pool`) and whole maps (`GlobalPool`).

    y[c, oy, ox] = fold over (ky, kx) of x[c, oy*sy - top + ky*dy, ox*sx - left + kx*dx]

Windows are separable: the rows of a window are folded first, vector by vector, into one padded row;
its columns are folded next, at every position, and of these every stride-th is kept. In between the
next row is folded: loads that span two vectors wait until both are in the cache (3x3 windows of
stride 2 over 112x112, AVX-512 on Zen 5: 15 to 20 % less time).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sparsegraph.targets import emit
from sparsegraph.targets.emit import (
    Cell,
    Expr,
    bind,
    const,
    divide,
    load,
    loop,
    splat,
    store,
    when,
)
from sparsegraph.targets.kernels import plane
from sparsegraph.targets.target import Target

UNROLL = 8  # taps that are written out; more run in a loop
GROUP = 4  # features of one item of `GlobalPool`


def fold(kind: str, a: Expr, b: Expr) -> Expr:
    """One step of a reduction `max`, `min`, `average` or `sum`."""
    if kind == "max":
        return emit.maximum(a, b)
    return emit.minimum(a, b) if kind == "min" else a + b


def neutral(kind: str) -> float:
    """What padding counts as."""
    return {"max": -np.inf, "min": np.inf}.get(kind, 0.0)


@dataclass(frozen=True)
class Pool:
    """Pooling windows, planar in, feature-major out. Items are images * features.

    Arguments beyond the operands: `row_step` elements between the input rows of a window, `left`
    and `right` padded columns, `row_size` elements of the padded row (`row_elements`), `rows`
    [height_out, 2] the first input row's offset and the number of rows inside the map (at least 1).
    Averages take 1 / counted rows [height_out] and 1 / counted columns [width_out + lanes].

    Attributes:
        kind: `max` or `average`.
        kernel: rows and columns of the window.
        stride: columns between windows.
        dilation: columns between the taps of a window.
        lanes: float32 values in a vector.
    """

    kind: str
    kernel: tuple[int, int]
    stride: int
    dilation: int
    lanes: int

    @property
    def name(self) -> str:
        h, w = self.kernel
        return f"{self.kind}_pool_f32_k{h}x{w}_s{self.stride}_d{self.dilation}_l{self.lanes}"

    @property
    def params(self) -> emit.Signature:
        sizes = "features width height_out width_out tiles block row_step left right row_size"
        text = plane.PARAMS + " ".join(f"{s}:int32" for s in sizes.split()) + " rows:int32* "
        if self.kind == "average":
            text += "row_share:float32* column_share:float32* "
        return emit.signature(text + "scratch:float32*")

    def row_elements(self, width: int, width_out: int, left: int) -> int:
        """Elements of the padded row in scratch, spare vectors included."""
        read = -(-width_out // self.lanes) * self.lanes * self.stride
        read += (self.kernel[1] - 1) * self.dilation
        return -(-(max(read, left + width) + 4 * self.lanes) // 16) * 16

    def scratch_bytes(self, row_size: int, width_out: int, block: int) -> int:
        """Three padded rows and the window on the result."""
        return 4 * (3 * row_size + plane.window_elements(width_out, block))

    def body(self, target: Target) -> Any:
        return lambda **args: _Windows(self, args).run()


class _Windows:
    """Loops of one pooling kernel: plane, output row, vector."""

    def __init__(self, spec: Pool, args: dict[str, Expr]) -> None:
        self.spec, self.a = spec, args

    def run(self) -> None:
        a, lanes = self.a, self.spec.lanes
        self.start = bind(splat(const(neutral(self.spec.kind)), lanes))
        window = bind(3 * a["row_size"])
        for padded in (const(0, "int32"), a["row_size"]):
            with loop(0, divide(a["left"] + (lanes - 1), lanes)) as v:
                store(a["scratch"], self.start, padded + v * lanes, lanes)
        with loop(a["begin"], a["end"]) as item:
            result = plane.Plane(a, item, window, lanes)
            with loop(0, a["height_out"] + 1) as n:
                with when(n < a["height_out"]):
                    first = bind(result.source + load(a["rows"], 2 * n))
                    self.fold_rows(first, bind(load(a["rows"], 2 * n + 1)), self.padded(n))
                with when(n > 0):
                    row = bind(n - 1)
                    self.fold_columns(result.row(row), row, self.padded(row))
                    result.end_row(row)
            result.end()

    def padded(self, row: Expr) -> Expr:
        """Where the padded row of an output row lies: two take turns."""
        return bind(emit.modulo(row, 2) * self.a["row_size"])

    def fold_rows(self, first: Expr, count: Expr, padded: Expr) -> None:
        """Fold `count` input rows from `first` into the padded row."""
        a, lanes = self.a, self.spec.lanes

        def row(n: Expr | int) -> None:
            with loop(0, divide(a["width"] + (lanes - 1), lanes)) as v:
                at = bind(first + v * lanes)
                value = self.taps(n, lambda t: load(a["x"], at + t * a["row_step"], lanes))
                store(a["scratch"], value, padded + a["left"] + v * lanes, lanes)

        with emit.choose(count == self.spec.kernel[0]) as (then, otherwise):
            with then:
                row(self.spec.kernel[0])
            with otherwise:
                row(count)
        with loop(0, divide(a["right"] + (lanes - 1), lanes)) as v:
            at = padded + a["left"] + a["width"] + v * lanes
            store(a["scratch"], self.start, at, lanes)

    def fold_columns(self, to: Expr, row: Expr, padded: Expr) -> None:
        """Fold the padded row's windows into the result row at `to`."""
        a, lanes, stride = self.a, self.spec.lanes, self.spec.stride
        if stride > 2 and lanes > 1:
            every = bind(2 * a["row_size"])
            with loop(0, divide((a["width_out"] - 1) * stride + lanes, lanes)) as v:
                store(a["scratch"], self.window(padded + v * lanes), every + v * lanes, lanes)
            padded = every
        with loop(0, divide(a["width_out"] + (lanes - 1), lanes)) as v:
            value = self.strided(bind(padded + v * (lanes * stride)))
            if self.spec.kind == "average":
                share = splat(load(a["row_share"], row), lanes)
                value = value * share * load(a["column_share"], v * lanes, lanes)
            store(a["scratch"], value, to + v * lanes, lanes)

    def strided(self, at: Expr) -> Expr:
        """Every stride-th window from `at`."""
        lanes, stride = self.spec.lanes, self.spec.stride
        if stride == 1 or lanes == 1:
            return self.window(at)
        if stride == 2:
            pair = [self.window(at), self.window(at + lanes)]
            return bind(emit.shuffle(pair, range(0, 2 * lanes, 2)))
        points = [bind(load(self.a["scratch"], at + i * stride)) for i in range(lanes)]
        return emit.shuffle(points, range(lanes))

    def window(self, at: Expr) -> Expr:
        """The windows that begin at `lanes` consecutive columns of a padded row."""
        spec, scratch = self.spec, self.a["scratch"]
        n, step = spec.kernel[1], spec.dilation
        return self.taps(n, lambda t: load(scratch, at + t * step, spec.lanes))

    def taps(self, n: Expr | int, tap: Callable[[Expr | int], Expr]) -> Expr:
        """tap(0) folded with tap(1) ... tap(n-1), bound."""
        kind = self.spec.kind
        if isinstance(n, int) and n <= UNROLL:
            value = tap(0)
            for t in range(1, n):
                value = fold(kind, value, tap(t))
            return bind(value)
        cell = Cell("float32", self.spec.lanes)
        cell.set(tap(0))
        with loop(1, n) as t:
            cell.set(fold(kind, cell.get(), tap(t)))
        return bind(cell.get())


def rows_of_windows(
    size: int, out: int, kernel: int, stride: int, dilation: int, before: int
) -> tuple[np.ndarray, np.ndarray]:
    """First position inside [0, size) and number of such positions, for every window of an axis."""
    at = np.arange(out)[:, None] * stride - before + np.arange(kernel) * dilation
    inside = (at >= 0) & (at < size)
    first = np.take_along_axis(at, inside.argmax(1)[:, None], 1)[:, 0]
    return first, inside.sum(1)


def share_of_windows(
    size: int, out: int, kernel: int, stride: int, dilation: int, pads: Sequence[int], counts: bool
) -> np.ndarray:  # fmt: skip
    """1 / positions that an average divides by along one axis; `counts`: padding counts too."""
    at = np.arange(out)[:, None] * stride - pads[0] + np.arange(kernel) * dilation
    low, high = (-pads[0], size + pads[1]) if counts else (0, size)
    counted = ((at >= low) & (at < high)).sum(1)
    return np.asarray(1.0 / np.maximum(counted, 1), np.float32)


def reference(
    kind: str, x: np.ndarray, kernel: Sequence[int], stride: Sequence[int],
    dilation: Sequence[int], pads: Sequence[int], out: Sequence[int], counts: bool = False,
) -> np.ndarray:  # fmt: skip
    """The meaning: x [features, height, width], pads (top, left, bottom, right), float64."""
    y = np.zeros((len(x), *out))
    _, height, width = x.shape
    for oy in range(out[0]):
        for ox in range(out[1]):
            rows = oy * stride[0] - pads[0] + np.arange(kernel[0]) * dilation[0]
            columns = ox * stride[1] - pads[1] + np.arange(kernel[1]) * dilation[1]
            inner = x[:, rows[(rows >= 0) & (rows < height)]].astype(np.float64)
            inner = inner[:, :, columns[(columns >= 0) & (columns < width)]]
            if kind == "max":
                y[:, oy, ox] = inner.max((1, 2))
                continue
            counted = inner[0].size
            if counts:
                counted = np.sum((rows >= -pads[0]) & (rows < height + pads[2]))
                counted *= np.sum((columns >= -pads[1]) & (columns < width + pads[3]))
            y[:, oy, ox] = inner.sum((1, 2)) / counted
    return y


@dataclass(frozen=True)
class GlobalPool:
    """Fold all points of each feature: feature-major in, row-major [images, features] out.

    y = scale * fold of the valid points. Items are images * ceil(features / GROUP).

    Attributes:
        kind: `sum`, `max` or `min`.
        lanes: float32 values in a vector.
    """

    kind: str
    lanes: int

    @property
    def name(self) -> str:
        return f"global_{self.kind}_f32_l{self.lanes}"

    @property
    def params(self) -> emit.Signature:
        return emit.signature(
            "y:float32* x:float32* x_image:int32 x_tile:int32 x_row:int32 "
            "tiles:int32 features:int32 points:int32 block:int32 scale:float32"
        )

    def items(self, images: int, features: int) -> int:
        return images * -(-features // GROUP)

    def body(self, target: Target) -> Any:
        return self._emit

    def _emit(self, y: Expr, x: Expr, **a: Expr) -> None:
        lanes = self.lanes
        groups = bind(divide(a["features"] + (GROUP - 1), GROUP))
        with loop(a["begin"], a["end"]) as item:
            image, group = bind(divide(item, groups)), bind(emit.modulo(item, groups))
            last = a["features"] - 1
            features = [bind(emit.minimum(group * GROUP + i, last)) for i in range(GROUP)]
            start = [bind(image * a["x_image"] + c * a["x_row"]) for c in features]
            acc = [Cell("float32", lanes) for _ in features]
            for cell in acc:
                cell.set(splat(const(neutral(self.kind)), lanes))
            with loop(0, a["tiles"]) as tile:
                first = bind(tile * a["x_tile"])
                valid = bind(emit.minimum(a["block"], a["points"] - tile * a["block"]))
                vectors = bind(divide(valid, lanes))
                with loop(0, vectors) as v:
                    for cell, at in zip(acc, start):
                        value = load(x, at + first + v * lanes, lanes)
                        cell.set(fold(self.kind, cell.get(), value))
                rest = bind(valid - vectors * lanes)
                with emit.when(rest > 0):
                    self._tail(x, acc, [at + first + vectors * lanes for at in start], rest)
            for cell, c in zip(acc, features):
                total = self._across(bind(cell.get()))
                store(y, total * a["scale"], image * a["features"] + c)

    def _tail(self, x: Expr, acc: Sequence[Cell], at: Sequence[Expr], rest: Expr) -> None:
        """A partial vector: lanes from `rest` on are padding."""
        lanes = self.lanes
        index = emit.shuffle([const(i, "int32") for i in range(lanes)], range(lanes))
        for cell, begin in zip(acc, at):
            value = bind(load(x, begin, lanes))
            pad = splat(const(neutral(self.kind)), lanes)
            value = emit.select(index < splat(rest, lanes), value, pad)
            cell.set(fold(self.kind, cell.get(), value))

    def _across(self, vector: Expr) -> Expr:
        """Fold the lanes of one vector."""
        width = self.lanes
        while width > 1:
            width //= 2
            low, high = range(width), range(width, 2 * width)
            halves = [bind(emit.shuffle([vector], lanes)) for lanes in (low, high)]
            vector = bind(fold(self.kind, *halves))
        return vector


def kernels(lanes: int) -> list[Pool | GlobalPool]:
    """Representative variants for vectors of `lanes` values."""
    windows = [((3, 3), 2, 1), ((3, 3), 1, 1), ((2, 2), 2, 1), ((5, 5), 1, 1), ((3, 2), 3, 1),
               ((1, 9), 1, 1), ((9, 3), 4, 1), ((2, 3), 2, 3)]  # fmt: skip
    pools = [Pool(kind, *window, lanes) for kind in ("max", "average") for window in windows]
    return [*pools, *(GlobalPool(kind, lanes) for kind in ("sum", "max", "min"))]
