"""Dense products whose lanes are rows of the weight: no lane is spent on points that are not there.

    y[n, p] = epilogue(bias[n] + sum_k w[n, k] * x[k, p], operands[n, p] ...)

`Product` has lanes over points: the 49 points of a map of 7x7 take 64 lanes of AVX-512. Here some
rows times some points, as many as there are registers for (`most_points`), stay in registers
over all columns: points are shared out evenly, and there are no partial sums. A column costs two
loads of weights and a broadcast for each point. At the end squares of lanes x lanes are turned in
registers: y is feature-major like x.

On Zen 5 (AVX-512) 49x1024x1024 takes .40 ms instead of .51, 196x512x512 .40 instead of .42; with
AVX2 .84 instead of .91 and .81 instead of .82.

Items are images * tiles * parts; a part is a share of the panels.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from sparsegraph.targets import emit
from sparsegraph.targets.emit import Cell, Expr, bind, const, load, loop, splat, store, when
from sparsegraph.targets.kernels import expression
from sparsegraph.targets.kernels.convert import transpose
from sparsegraph.targets.kernels.vector_product import pack, pack_rows
from sparsegraph.targets.target import Target

VECTORS = 2  # of rows in a panel
_OTHERS = VECTORS + 1  # registers: a column of the panel and a value of x


@dataclass(frozen=True)
class PanelProduct:
    """Spec of one kernel.

    Attributes:
        lanes: float32 values in a vector.
        block: points of a tile in memory.
        points: points of every tile of an image, or of all but the last and of the last one.
        most: points that are computed together.
        epilogue: expression over (accumulated value, operand 0, operand 1 ...), or None.
        operands: per operand `same` (feature-major like y) or `feature` (one value per row).
    """

    lanes: int
    block: int
    points: tuple[int, ...]
    most: int
    epilogue: expression.Tree | None = None
    operands: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        """Rows in a panel."""
        return VECTORS * self.lanes

    @property
    def name(self) -> str:
        tail = "" if self.epilogue is None else f"_{expression.label(self.epilogue)}"
        kinds = "".join(k[0] for k in self.operands)
        points = "_".join(map(str, self.points))
        shape = f"l{self.lanes}_b{self.block}_p{points}_by{self.most}"
        return f"gemm_f32_panels_{shape}{tail}{'_' + kinds if kinds else ''}"

    @property
    def params(self) -> emit.Signature:
        text = (
            "y:float32* y_image:int32 y_tile:int32 y_row:int32 "
            "x:float32* x_image:int32 x_tile:int32 x_row:int32 images:int32 tiles:int32 "
            "rows:int32 columns:int32 panels:int32 parts:int32 bias:float32* weights:float32* "
        )
        for i, kind in enumerate(self.operands):
            text += f"o{i}:float32* "
            if kind == "same":
                text += f"o{i}_image:int32 o{i}_tile:int32 o{i}_row:int32 "
        return emit.signature(text)

    def streams(self, weight: np.ndarray, bias: np.ndarray) -> list[tuple[str, np.ndarray]]:
        """Name and array of the arguments `bias` and `weights`; weight [rows, columns]."""
        padded = pack_rows(bias, len(weight), self.rows)
        return [("bias", padded), ("panels", pack(weight, self.rows))]

    def body(self, target: Target) -> Any:
        return lambda **args: _Emitter(self, args, target).run()


class Turn(NamedTuple):
    """Points that are computed together, `times` times in a row.

    Of each time `stored` points are written: as many, or whole vectors.
    """

    first: int
    points: int
    times: int
    stored: int


def turns(points: int, most: int, block: int, lanes: int) -> Iterator[Turn]:
    """As few turns as `most` allows, evenly shared, the larger ones first.

    All write whole vectors, of which the next one writes the rest again; not so the last one if
    that would reach over the tile.
    """
    n = -(-points // most)
    first = 0
    for size, count in ((points // n + 1, points % n), (points // n, n - points % n)):
        whole = sum(first + i * size + lanes <= block for i in range(count))
        if whole:
            yield Turn(first, size, whole, lanes)
        for i in range(whole, count):
            yield Turn(first + i * size, size, 1, size)
        first += count * size


def most_points(target: Target) -> int:
    """Points whose sums fit the registers, beside a column of the panel and a value of x."""
    return min(target.lanes, (target.n_registers - _OTHERS) // VECTORS)


class _Emitter:
    def __init__(self, spec: PanelProduct, args: dict[str, Expr], target: Target) -> None:
        self.spec, self.a, self.lanes = spec, args, spec.lanes
        self.prefetches = target.output in ("library", "bare")

    def run(self) -> None:
        a = self.a
        per_part = bind(a["images"] * a["tiles"])
        with loop(a["begin"], a["end"]) as item:
            part = bind(emit.divide(item, per_part))
            point = bind(item - part * per_part)
            self.image = bind(emit.divide(point, a["tiles"]))
            self.tile = bind(point - self.image * a["tiles"])
            first, end = (bind(emit.divide(p * a["panels"], a["parts"])) for p in (part, part + 1))
            whole, *last = self.spec.points
            if last:
                with emit.choose(self.tile < a["tiles"] - 1) as (then, otherwise):
                    with then:
                        self.tile_of(first, end, whole)
                    with otherwise:
                        self.tile_of(first, end, *last)
            else:
                self.tile_of(first, end, whole)

    def place(self, name: str) -> Expr:
        """Where this tile of a feature-major value begins."""
        a = self.a
        return bind(self.image * a[f"{name}_image"] + self.tile * a[f"{name}_tile"])

    def tile_of(self, first: Expr, end: Expr, points: int) -> None:
        """All panels of a tile, so that what they read of x stays in the cache."""
        spec = self.spec
        x, y = self.place("x"), self.place("y")
        *more, last = turns(points, spec.most, spec.block, self.lanes)
        with loop(first, end) as panel:
            row = bind(panel * spec.rows)
            for turn in (*more, last):
                with loop(0, turn.times) as i:
                    point = bind(turn.first + i * turn.points)
                    sums = self.sums(bind(x + point), row, turn.points, asks=turn is last)
                    self.put(sums, bind(y + point), row, point, turn.stored)

    def sums(self, x: Expr, row: Expr, points: int, *, asks: bool) -> list[list[Cell]]:
        """By point and vector the sums of the panel at `row`; `asks` for the next panel's weights.

        They lie in the level 3 cache: in a dense MobileNetV1 on Zen 5 panels of 512 and 1024 rows
        take 4 to 18 % less time.
        """
        a, lanes = self.a, self.lanes
        acc = [[Cell("float32", lanes) for _ in range(VECTORS)] for _ in range(points)]
        for cells in acc:
            for v, cell in enumerate(cells):
                cell.set(load(a["bias"], row + v * lanes, lanes))
        weights = bind(row * a["columns"])
        with loop(0, a["columns"]) as k:
            at = bind(weights + k * self.spec.rows)
            column = [bind(load(a["weights"], at + v * lanes, lanes)) for v in range(VECTORS)]
            if asks and self.prefetches:
                for v in range(VECTORS):
                    ahead = at + (self.spec.rows * a["columns"] + v * lanes)
                    emit.prefetch(a["weights"], ahead, is_written=False)
            place = bind(x + k * a["x_row"])
            for p, cells in enumerate(acc):
                value = bind(splat(load(a["x"], place + p), lanes))
                for cell, weight in zip(cells, column):
                    cell.set(cell.get() + weight * value)
        return acc

    def put(
        self, sums: Sequence[Sequence[Cell]], y: Expr, row: Expr, point: Expr, stored: int
    ) -> None:
        """Turn the sums and store `stored` points of every row, behind its own points zeros."""
        a, lanes = self.a, self.lanes
        left = bind(a["rows"] - row)
        for v in range(VECTORS):
            zeros = [splat(const(0.0), lanes)] * (lanes - len(sums))
            square = transpose([bind(cells[v].get()) for cells in sums] + zeros, lanes)
            for r, value in enumerate(square):
                with when(left > v * lanes + r):
                    place = bind(y + (row + (v * lanes + r)) * a["y_row"])
                    for i, n in _spans(stored):
                        part = value if n == lanes else emit.shuffle([value], range(i, i + n))
                        store(a["y"], part, place + i, n)
        if self.spec.epilogue is not None:
            self.finish(self.spec.epilogue, y, row, point, left, stored)

    def finish(
        self, tree: expression.Tree, y: Expr, row: Expr, point: Expr, left: Expr, stored: int
    ) -> None:
        """The epilogue, over what was just stored."""
        a = self.a
        with loop(0, emit.minimum(left, const(self.spec.rows, "int32"))) as r:
            place = bind(y + (row + r) * a["y_row"])
            operands = [
                self.operand(i, bind(row + r), point) for i in range(len(self.spec.operands))
            ]
            for i, n in _spans(stored):
                values = [bind(load(a["y"], place + i, n)), *(o(i, n) for o in operands)]
                store(a["y"], expression.emit(tree, values, n), place + i, n)

    def operand(self, i: int, row: Expr, point: Expr) -> Callable[[int, int], Expr]:
        """From point of the turn and lanes to the vector of operand i."""
        a, name = self.a, f"o{i}"
        if self.spec.operands[i] == "feature":
            value = bind(load(a[name], row))
            return lambda _, n: bind(splat(value, n))
        base = bind(self.place(name) + row * a[f"{name}_row"] + point)
        return lambda first, n: bind(load(a[name], base + first, n))


def _spans(n: int) -> Iterator[tuple[int, int]]:
    """(first lane, lanes) of the powers of two that make up n."""
    first = 0
    while first < n:
        size = 1 << ((n - first).bit_length() - 1)
        yield first, size
        first += size


def kernels(lanes: int) -> list[PanelProduct]:
    """Representative variants for vectors of `lanes` values."""
    most = min(lanes, 14)
    relu = ("Relu", ("arg", 0))
    residual = ("Relu", ("Add", ("Mul", ("arg", 0), ("arg", 2)), ("arg", 1)))
    block = 3 * lanes
    return [
        PanelProduct(lanes, block, (2 * lanes + 1,), most),
        PanelProduct(lanes, block, (block, lanes - 1), most, relu),
        PanelProduct(lanes, block, (block, 5), most, residual, ("same", "feature")),
        PanelProduct(lanes, block, (1,), most, ("Gelu", ("arg", 0))),
    ]
