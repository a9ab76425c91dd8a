"""Resize of maps along their two spatial axes: nearest and linear, by tables made beforehand.

    nearest: y[c, oy, ox] = x[c, iy(oy), ix(ox)]
    linear:  the same with two neighbours per axis and the weight of the second

Source rows are expanded to the new width, for `linear` once; its output rows are blends of two.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from sparsegraph.targets import emit
from sparsegraph.targets.emit import Expr, bind, const, divide, load, loop, splat, store, when
from sparsegraph.targets.kernels import plane
from sparsegraph.targets.target import Target


@dataclass(frozen=True)
class Resize:
    """Planar in, feature-major out. Items are images * features.

    Nearest takes `rows` [height_out]: the offset of the source row. Linear takes `rows`
    [height_out, 4] as `blend_rows` makes it, `row_weight` [height_out], and `row_size`: elements of
    an expanded row in scratch. With `columns` = `table` there are `columns`
    [width_out + lanes] (nearest) or [2, width_out + lanes] and `column_weight` (linear).

    Attributes:
        mode: `nearest` or `linear`.
        columns: `same`, `double` (ox // 2, or centres of half pixels) or `table`.
        lanes: float32 values in a vector.
    """

    mode: str
    columns: str
    lanes: int

    @property
    def name(self) -> str:
        return f"resize_f32_{self.mode}_{self.columns}_l{self.lanes}"

    @property
    def params(self) -> emit.Signature:
        sizes = "features width height_out width_out tiles block"
        text = plane.PARAMS + " ".join(f"{s}:int32" for s in sizes.split()) + " rows:int32* "
        if self.mode == "linear":
            text += "row_weight:float32* row_size:int32 "
        if self.columns == "table":
            text += "columns:int32* "
            text += "column_weight:float32* " if self.mode == "linear" else ""
        return emit.signature(text + "scratch:float32*")

    def row_elements(self, width_out: int) -> int:
        """Elements of an expanded row in scratch, overshoot included; 0 where none is kept."""
        return -(-width_out // 16) * 16 + plane.OVERSHOOT if self.mode == "linear" else 0

    def scratch_bytes(self, width_out: int, block: int) -> int:
        """Two expanded rows and the window on the result."""
        return 4 * (2 * self.row_elements(width_out) + plane.window_elements(width_out, block))

    def body(self, target: Target) -> Any:
        emitter = {"nearest": _Nearest, "linear": _Linear}[self.mode]
        return lambda **args: emitter(self, args).run()


class _Nearest:
    """Loops of one kernel: plane, output row, vector."""

    def __init__(self, spec: Resize, args: dict[str, Expr]) -> None:
        self.spec, self.a, self.lanes = spec, args, spec.lanes

    def run(self) -> None:
        a = self.a
        window = bind(2 * a["row_size"]) if "row_size" in a else const(0, "int32")
        with loop(a["begin"], a["end"]) as item:
            result = plane.Plane(a, item, window, self.lanes)
            with loop(0, a["height_out"]) as row:
                self.row(result.source, result.row(row), row)
                result.end_row(row)
            result.end()

    def vectors(self, extent: Expr) -> Any:
        return loop(0, divide(extent + (self.lanes - 1), self.lanes))

    def keep(self, value: Expr, at: Expr) -> None:
        store(self.a["scratch"], value, at, self.lanes)

    def row(self, source: Expr, to: Expr, row: Expr) -> None:
        """Write one output row of the plane at `source` to scratch."""
        self.expand(bind(source + load(self.a["rows"], row)), to)

    def expand(self, first: Expr, to: Expr) -> None:
        """Write the source row at `first`, at its new width, to scratch."""
        a, lanes = self.a, self.lanes
        if self.spec.columns == "table":
            with self.vectors(a["width_out"]) as v:
                self.keep(self.pick(first, v * lanes), to + v * lanes)
            return
        with self.vectors(a["width"]) as v:
            value = bind(load(a["x"], first + v * lanes, lanes))
            if self.spec.columns == "same":
                self.keep(value, to + v * lanes)
            else:
                self.pairs(value, value, to + 2 * v * lanes)

    def pairs(self, even: Expr, odd: Expr, to: Expr) -> None:
        """Store even[0], odd[0], even[1], ..."""
        for half in (0, 1):
            first = half * self.lanes
            order = [i // 2 + i % 2 * self.lanes for i in range(first, first + self.lanes)]
            self.keep(emit.shuffle([even, odd], order), to + half * self.lanes)

    def pick(self, first: Expr, column: Expr) -> Expr:
        """The source values of `lanes` output columns."""
        a = self.a
        index = [bind(load(a["columns"], column + i)) for i in range(self.lanes)]
        values = [bind(load(a["x"], first + i)) for i in index]
        return bind(emit.shuffle(values, range(self.lanes)))


class _Linear(_Nearest):
    def row(self, source: Expr, to: Expr, row: Expr) -> None:
        a, lanes = self.a, self.lanes
        places = []
        for k in (0, 2):
            first = bind(load(a["rows"], 4 * row + k))
            place = bind(load(a["rows"], 4 * row + k + 1) * a["row_size"])
            with when(first >= 0):
                self.expand(bind(source + first), place)
            places.append(place)
        weight = bind(splat(load(a["row_weight"], row), lanes))
        with self.vectors(a["width_out"]) as v:
            values = [bind(load(a["scratch"], p + v * lanes, lanes)) for p in places]
            self.keep(values[0] + weight * (values[1] - values[0]), to + v * lanes)

    def expand(self, first: Expr, to: Expr) -> None:
        a, lanes = self.a, self.lanes
        if self.spec.columns != "double":
            super().expand(first, to)
            return
        edge = bind(load(a["x"], first, lanes))
        self.blend(edge, emit.shuffle([edge], [0, *range(lanes - 1)]), first, to)
        with loop(1, divide(a["width"] + (lanes - 1), lanes)) as v:
            at = bind(first + v * lanes)
            value = bind(load(a["x"], at, lanes))
            self.blend(value, load(a["x"], at - 1, lanes), at, to + 2 * v * lanes)
        last = load(a["x"], first + a["width"] - 1)
        store(a["scratch"], last, to + a["width_out"] - 1)

    def blend(self, value: Expr, before: Expr, at: Expr, to: Expr) -> None:
        """Two output vectors around one of the source: 3/4 of it, 1/4 of a neighbour."""
        lanes = self.lanes
        near = bind(value * splat(const(0.75), lanes))
        quarter = splat(const(0.25), lanes)
        after = load(self.a["x"], at + 1, lanes)
        self.pairs(bind(near + before * quarter), bind(near + after * quarter), to)

    def pick(self, first: Expr, column: Expr) -> Expr:
        a, lanes = self.a, self.lanes
        low = super().pick(first, column)
        high = super().pick(first, column + a["width_out"] + lanes)
        weight = load(a["column_weight"], column, lanes)
        return bind(low + weight * (high - low))


def neighbours(position: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Left and right neighbour of positions clamped into [0, size), and the right one's weight."""
    inside = np.clip(position, 0, size - 1)
    low = np.floor(inside).astype(np.int64)
    return low, np.minimum(low + 1, size - 1), (inside - low).astype(np.float32)


def blend_rows(low: np.ndarray, high: np.ndarray, width: int) -> np.ndarray:
    """Per output row (offset, place, offset, place) of its two source rows, int32.

    Two expanded rows are kept, at the places row % 2; the offset of one that is there already is
    -1.
    """
    kept = [-1, -1]
    table = []
    for pair in zip(low.tolist(), high.tolist()):
        for row in pair:
            table += [-1 if kept[row % 2] == row else row * width, row % 2]
            kept[row % 2] = row
    return np.asarray(table, np.int32)


def reference(mode: str, x: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The meaning in float64: x [features, height, width] at positions along both axes.

    Positions are integers inside the map for `nearest`, any numbers (clamped) for `linear`.
    """
    if mode == "nearest":
        return np.asarray(x[:, rows][:, :, columns], np.float64)
    y = x.astype(np.float64)
    for axis, position in ((1, rows), (2, columns)):
        low, high, weight = neighbours(position, y.shape[axis])
        shape = (1, -1, 1) if axis == 1 else (1, 1, -1)
        a, b = np.take(y, low, axis), np.take(y, high, axis)
        y = a + weight.reshape(shape) * (b - a)
    return y


def kernels(lanes: int) -> list[Resize]:
    """Every variant for vectors of `lanes` values."""
    columns = ("same", "double", "table")
    return [Resize(mode, c, lanes) for mode in ("nearest", "linear") for c in columns]
