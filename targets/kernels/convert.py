"""Layout changes: row-major planes or tokens <-> feature-major, feature-major <-> feature-major.

    planes [images, features, points], tokens [images, points, features], feature-major: layout.py

`Copy` moves runs of points. `Transpose` turns tiles of 4 x lanes in registers. Row-major memory is
never touched outside the value; pad points of feature-major results are written as 0.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from sparsegraph.targets import emit
from sparsegraph.targets.emit import Expr, bind, const, load, loop, splat, store, when
from sparsegraph.targets.layout import FeatureMajor
from sparsegraph.targets.target import Target

_LEAST = 128  # features of a part; fewer make rows of tokens too short for the prefetcher


@dataclass(frozen=True)
class Copy:
    """Copy points between two values with the strides (image, tile, row) of feature-major.

    Row-major planes have tile = block and row = points. Items are images * tiles; to stream whole
    planes of two planar values pass images*features as images, 1 feature, 1 tile, block = plane.

    Attributes:
        exact: the row-major side, which has no padding: `source`, `result` or `neither`.
        lanes: float32 values in a vector; divides `block`.
        vectors: vectors of a whole tile, which are copied without a loop; 0: any number.
    """

    exact: str
    lanes: int
    vectors: int = 0

    @property
    def name(self) -> str:
        size = f"_v{self.vectors}" if self.vectors else ""
        return f"copy_f32_exact_{self.exact}{size}_l{self.lanes}"

    @property
    def params(self) -> emit.Signature:
        return emit.signature(
            "y:float32* y_image:int32 y_tile:int32 y_row:int32 "
            "x:float32* x_image:int32 x_tile:int32 x_row:int32 "
            "tiles:int32 features:int32 points:int32 block:int32"
        )

    def body(self, target: Target) -> Any:
        return self._emit

    def _emit(self, y: Expr, x: Expr, **a: Expr) -> None:
        with loop(a["begin"], a["end"]) as item:
            image, tile = bind(emit.divide(item, a["tiles"])), bind(emit.modulo(item, a["tiles"]))
            to_tile = bind(image * a["y_image"] + tile * a["y_tile"])
            from_tile = bind(image * a["x_image"] + tile * a["x_tile"])
            valid = a["block"]
            if self.exact != "neither":
                valid = bind(emit.minimum(a["block"], a["points"] - tile * a["block"]))

            def rows(copy: Callable[[Expr, Expr], None]) -> None:
                with loop(0, a["features"]) as c:
                    copy(bind(to_tile + c * a["y_row"]), bind(from_tile + c * a["x_row"]))

            any_size = partial(self._row, y, x, valid, a["block"])
            if not self.vectors:
                rows(any_size)
                return
            with emit.choose(valid >= self.vectors * self.lanes) as (then, otherwise):
                with then:
                    rows(partial(self._whole_row, y, x))
                with otherwise:
                    rows(any_size)

    def _whole_row(self, y: Expr, x: Expr, to: Expr, begin: Expr) -> None:
        for v in range(0, self.vectors * self.lanes, self.lanes):
            store(y, load(x, begin + v, self.lanes), to + v, self.lanes)

    def _row(self, y: Expr, x: Expr, valid: Expr, block: Expr, to: Expr, begin: Expr) -> None:
        lanes = self.lanes
        vectors = bind(emit.divide(valid, lanes))
        with loop(0, vectors) as v:
            store(y, load(x, begin + v * lanes, lanes), to + v * lanes, lanes)
        if self.exact != "neither":
            with when(vectors * lanes < valid):
                self._tail(y, x, to, begin, valid, vectors)
        if self.exact == "source":
            zero_after(y, to, valid, block, lanes)

    def _tail(self, y: Expr, x: Expr, to: Expr, begin: Expr, valid: Expr, vectors: Expr) -> None:
        """The points of a partial vector: the last full one again, shifted, if there is one."""
        with emit.choose(vectors > 0) as (then, otherwise):
            with then:
                last = bind(valid - self.lanes)
                store(y, load(x, begin + last, self.lanes), to + last, self.lanes)
            with otherwise, loop(0, valid) as i:
                store(y, load(x, begin + i), to + i)


def zero_after(y: Expr, to: Expr, valid: Expr, block: Expr, lanes: int) -> None:
    """Zero points [valid, block) of a row; block is a multiple of lanes."""
    first = bind(emit.divide(valid + lanes - 1, lanes))
    with loop(valid, first * lanes) as i:
        store(y, const(0.0), to + i)
    with loop(first, emit.divide(block, lanes)) as v:
        store(y, splat(const(0.0), lanes), to + v * lanes, lanes)


def transpose(rows: Sequence[Expr], lanes: int) -> list[Expr]:
    """Columns of a lanes x lanes tile whose rows are vectors: log2(lanes) shuffle stages.

    Within groups of 4 lanes the stages are unpack low and high, then groups are exchanged: every
    shuffle is one instruction of AVX and NEON.
    """
    if lanes == 1:
        return list(rows)
    out = [s for i in range(0, lanes, 4) for s in _squares(rows[i : i + 4], lanes)]
    distance = 4
    while distance < lanes:
        out = _exchange(out, distance, lanes)
        distance *= 2
    return out


def turned(rows: Sequence[Expr], lanes: int) -> list[Expr]:
    """The four columns of `lanes` rows of four values each; of one row its value."""
    rows = [bind(row) for row in rows]
    if lanes == 1:
        return rows
    if lanes > 4:  # rows k, k + 4 ... side by side: with rows from memory no shuffle
        rows = [bind(emit.shuffle(rows[k::4], range(lanes))) for k in range(4)]
    return _squares(rows, lanes)


def _squares(rows: Sequence[Expr], lanes: int) -> list[Expr]:
    """Four vectors with each 4 x 4 square turned: unpack low and high, then pairs."""
    low = [k + i + h for k in range(0, lanes, 4) for i in (0, 1) for h in (0, lanes)]
    a, b, c, d = *_two(rows[0], rows[1], low, 2), *_two(rows[2], rows[3], low, 2)
    low = [k + h + i for k in range(0, lanes, 4) for h in (0, lanes) for i in (0, 1)]
    return [*_two(a, c, low, 2), *_two(b, d, low, 2)]


def _two(a: Expr, b: Expr, low: Sequence[int], step: int) -> tuple[Expr, Expr]:
    """The shuffle `low` of a and b, and the same `step` lanes further."""
    first, second = ([i + d for i in low] for d in (0, step))
    return bind(emit.shuffle([a, b], first)), bind(emit.shuffle([a, b], second))


def _exchange(rows: Sequence[Expr], distance: int, lanes: int) -> list[Expr]:
    """Swap the off-diagonal squares of `distance` lanes between rows i and i + distance."""
    out = list(rows)
    for i in range(lanes):
        if i & distance:
            continue
        low = [j if not j & distance else lanes + j - distance for j in range(lanes)]
        out[i], out[i + distance] = _two(rows[i], rows[i + distance], low, distance)
    return out


@dataclass(frozen=True)
class Transpose:
    """Tokens [points, features] <-> feature-major. Items are images * tiles.

    Attributes:
        to: `feature` (x is tokens) or `tokens` (y is tokens).
        lanes: float32 values in a vector; divides `block`.
    """

    to: str
    lanes: int

    @property
    def name(self) -> str:
        return f"transpose_f32_to_{self.to}_l{self.lanes}"

    @property
    def params(self) -> emit.Signature:
        side = "{0}:float32* {0}_image:int32 {0}_tile:int32 {0}_row:int32 "
        tokens = "{0}:float32* {0}_image:int32 {0}_point:int32 "
        y, x = (side, tokens) if self.to == "feature" else (tokens, side)
        rest = "tiles:int32 features:int32 points:int32 block:int32"
        return emit.signature(y.format("y") + x.format("x") + rest)

    def body(self, target: Target) -> Any:
        return lambda **args: _Turn(self, args, target).run()


class _Turn:
    """Loops of one transposing kernel: item, part of the features, points, features.

    A tile is `lanes` rows of x of which four columns are loaded at a time, so that all but two
    stages of the exchange are loads. Four tokens are written at a time: rows of tokens are often
    4096 bytes times an integer apart and then share one set of 8 lines in the level 1 cache.
    """

    def __init__(self, spec: Transpose, args: dict[str, Expr], target: Target) -> None:
        self.a, self.lanes, self.to_feature = args, spec.lanes, spec.to == "feature"
        self.f, self.t = ("y", "x") if self.to_feature else ("x", "y")
        self.index = "int64" if "64" in target.arch else "int32"
        self.side, self.l1_bytes = min(4, spec.lanes), target.l1_bytes
        self.points, self.features = self.side, self.lanes  # of one tile
        if self.to_feature:
            self.points, self.features = self.lanes, self.side

    def run(self) -> None:
        a, f, t = self.a, self.f, self.t
        with loop(a["begin"], a["end"]) as item:
            image, tile = bind(emit.divide(item, a["tiles"])), bind(emit.modulo(item, a["tiles"]))
            panel = bind(image * a[f"{f}_image"] + tile * a[f"{f}_tile"])
            token = bind(image * a[f"{t}_image"] + tile * a["block"] * a[f"{t}_point"])
            valid = bind(emit.minimum(a["block"], a["points"] - tile * a["block"]))
            with emit.choose(a["features"] >= self.features) as (then, otherwise):
                with then:
                    self.parts(panel, token, valid)
                with otherwise:
                    self.scalars(panel, token, valid)

    def parts(self, panel: Expr, token: Expr, valid: Expr) -> None:
        """Some features of all points after the other: what is read or written stays in L1."""
        a = self.a
        least = const(_LEAST // self.features, "int32")
        size = emit.divide(self.l1_bytes // 8, a["block"] * self.features)
        size = bind(emit.maximum(size, least))
        full = bind(emit.divide(valid, self.points))
        end = a["block"] if self.to_feature else valid
        groups = bind(emit.divide(end + self.points - 1, self.points))
        steps = bind(emit.divide(a["features"] + self.features - 1, self.features))
        with loop(0, emit.divide(steps + size - 1, size)) as part:
            first = bind(part * size)
            last = bind(emit.minimum(first + size, steps))
            with loop(0, full) as g, loop(first, last) as step:
                self.tile(panel, token, g, step, None)
            with loop(full, groups) as g:
                left = bind(emit.maximum(valid - g * self.points, const(0, "int32")))
                with loop(first, last) as step:
                    self.tile(panel, token, g, step, left)

    def tile(self, panel: Expr, token: Expr, group: Expr, step: Expr, left: Expr | None) -> None:
        """Turn one tile of which `left` points are valid; None: all."""
        a, wide = self.a, self.wide
        c = bind(wide(emit.minimum(step * self.features, a["features"] - self.features)))
        point = wide(group * self.points)
        f_row, t_row = wide(a[f"{self.f}_row"]), wide(a[f"{self.t}_point"])
        at = bind(wide(panel) + point + c * f_row)
        features = [bind(at + i * f_row) for i in range(self.features)]
        at = bind(wide(token) + point * t_row + c)
        tokens = [bind(at + i * t_row) for i in range(self.points)]
        if self.to_feature:
            columns = turned([self.row(i, at, left) for i, at in enumerate(tokens)], self.lanes)
            for to, column in zip(features, columns):
                store(a["y"], column, to, self.lanes)
            return
        columns = turned([load(a["x"], i, self.side) for i in features], self.lanes)
        for i, (to, column) in enumerate(zip(tokens, columns)):
            with nullcontext() if left is None else when(left > i):
                store(a["y"], column, to, self.lanes)

    def row(self, i: int, at: Expr, left: Expr | None) -> Expr:
        """`side` features of token i, zeros where it is not valid."""
        if left is None:
            return load(self.a["x"], at, self.side)
        row = emit.Cell("float32", self.side)
        row.set(splat(const(0.0), self.side))
        with when(left > i):
            row.set(load(self.a["x"], at, self.side))
        return row.get()

    def wide(self, x: Expr) -> Expr:
        """`x` as wide as an address."""
        return emit.T.cast(x, self.index)

    def scalars(self, panel: Expr, token: Expr, valid: Expr) -> None:
        """Fewer features than lanes."""
        a = self.a
        with loop(0, a["features"]) as c:
            row = bind(panel + c * a[f"{self.f}_row"])
            with loop(0, valid) as p:
                point = token + p * a[f"{self.t}_point"] + c
                if self.to_feature:
                    store(a["y"], load(a["x"], point), row + p)
                else:
                    store(a["y"], load(a["x"], row + p), point)
            if self.to_feature:
                zero_after(a["y"], row, valid, a["block"], self.lanes)


def pack(planes: np.ndarray, layout: FeatureMajor, fill: float = 0.0) -> np.ndarray:
    """Planes [images, features, points] as flat feature-major memory; padding is `fill`."""
    flat = np.full(layout.offset + layout.size, fill, planes.dtype)
    flat[_indices(layout)] = planes
    return flat


def unpack(flat: np.ndarray, layout: FeatureMajor) -> np.ndarray:
    """The planes [images, features, points] of flat feature-major memory."""
    return np.asarray(flat[_indices(layout)])


def _indices(layout: FeatureMajor) -> np.ndarray:
    image = np.arange(layout.images)[:, None, None] * layout.image
    row = np.arange(layout.features)[None, :, None] * layout.row
    points = np.arange(layout.points)
    place = points // layout.block * layout.tile + points % layout.block
    return np.asarray(layout.offset + image + row + place[None, None, :])


def kernels(lanes: int) -> list[Copy | Transpose]:
    """Every variant for vectors of `lanes` values."""
    copies = [Copy(exact, lanes) for exact in ("source", "result", "neither")]
    return [*copies, Transpose("feature", lanes), Transpose("tokens", lanes)]
