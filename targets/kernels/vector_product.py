"""Products of a constant matrix with single points, such as a classifier's last layer.

    y[image, n] = epilogue(bias[n] + sum_k w[n, k] * x[image, k], operands[n] ...)

With one point a product kernel would fill one lane and read every weight as a broadcast. Here the
lanes are rows: weights are packed in panels of `rows` outputs, so they stream from memory once in
the order in which they are read, for all images, and only the activations are broadcast. A matrix
with many zeros is coded as in slots. Behind a Relu, columns of values that are zero need not be
read: a list of the others is made first. One item is one panel.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sparsegraph.targets import emit
from sparsegraph.targets.emit import Cell, Expr, bind, const, load, loop, splat, store, when
from sparsegraph.targets.kernels import expression, slots
from sparsegraph.targets.kernels.math import bits
from sparsegraph.targets.target import Target

MOST_IMAGES = 8  # with more, a panel of weights is better shared by a tile of points
_SUMS = 8  # that a machine adds to in turn before the first is ready


@dataclass(frozen=True)
class VectorProduct:
    """Spec of one kernel.

    Arguments: y and x feature-major or flat (image, row), images, rows, then columns and weights of
    `pack` or the arrays of `pack_slots`, scratch of columns + 1 if it `skips`, bias of
    `pack_rows`, a pointer per operand (as the bias).

    Attributes:
        lanes: float32 values in a vector; the block of x and y.
        rows: rows in a panel.
        epilogue: expression over (accumulated value, operand 0, operand 1 ...), or None.
        n_operands: operands with one value per row.
        coded: weights are in slots.
        flat: y is row-major: one value a row, not a vector.
        skips: columns of values that are zero in all images are not read.
        images: that share a load of weights; 1 if coded, where it makes no difference.
    """

    lanes: int
    rows: int
    epilogue: expression.Tree | None = None
    n_operands: int = 0
    coded: bool = False
    flat: bool = False
    skips: bool = False
    images: int = 1

    @property
    def width(self) -> int:
        """Rows in a vector of sums."""
        return self.rows if self.coded else self.lanes

    @property
    def name(self) -> str:
        tail = "_coded" * self.coded + "_flat" * self.flat + "_skips" * self.skips
        tail += f"_i{self.images}" if self.images > 1 else ""
        tail += "" if self.epilogue is None else f"_{expression.label(self.epilogue)}"
        return f"gemv_f32_r{self.rows}_l{self.lanes}{tail}_o{self.n_operands}"

    @property
    def params(self) -> emit.Signature:
        text = (
            "y:float32* y_image:int32 y_row:int32 x:float32* x_image:int32 x_row:int32 "
            "images:int32 rows:int32 "
        )
        text += slots.PARAMS if self.coded else "columns:int32 weights:float32* "
        text += "kept:int32* " * self.skips
        text += "bias:float32* "
        return emit.signature(text + " ".join(f"o{i}:float32*" for i in range(self.n_operands)))

    def body(self, target: Target) -> Any:
        return lambda **args: _Emitter(self, args, target).run()


class _Emitter:
    def __init__(self, spec: VectorProduct, args: dict[str, Expr], target: Target) -> None:
        self.spec, self.a, self.target = spec, args, target

    def run(self) -> None:
        a, spec = self.a, self.spec
        if spec.skips:
            self.list_kept()
        with loop(a["begin"], a["end"]) as panel:
            if not spec.coded:
                row = bind(panel * spec.rows)
                for image, sums in enumerate(self.dense(row)):
                    self.put(image, row, sums)
                return
            row = bind(load(a["order"], panel) * spec.rows)
            with loop(0, a["images"]) as image:
                self.put(image, row, self.coded(panel, row, bind(image * a["x_image"])))

    def put(self, image: Expr | int, row: Expr, sums: list[Expr]) -> None:
        to = bind(image * self.a["y_image"] + row * self.a["y_row"])
        for v, value in enumerate(sums):
            self.write(to, row, v, value)

    def list_kept(self) -> None:
        """How many columns have a value that is not zero, then which."""
        a, n = self.a, Cell("int32")
        n.set(const(0, "int32"))
        with loop(0, a["columns"]) as k:  # without a branch: none could be foretold
            store(a["kept"], k, n.get() + 1)
            found = const(0, "int32")
            for image in range(self.spec.images):
                value = load(a["x"], image * a["x_image"] + k * a["x_row"])
                found = emit.T.bitwise_or(found, bits(value, "int32"))
            # TVM's "not equal" is false for NaN, which must be read; its bits are not 0
            size = emit.T.bitwise_and(found, const(0x7FFFFFFF, "int32"))
            is_kept = emit.T.NE(size, const(0, "int32"))
            n.set(n.get() + emit.select(is_kept, const(1, "int32"), const(0, "int32")))
        store(a["kept"], n.get(), const(0, "int32"))

    def dense(self, row: Expr) -> list[list[Expr]]:
        """The vectors of sums of the panel at `row`, for every image."""
        a, lanes = self.a, self.spec.lanes
        weights = bind(row * a["columns"])
        vectors, images = range(self.spec.rows // lanes), range(self.spec.images)
        n_turns = 2 if len(vectors) * len(images) < _SUMS else 1  # they hide a product's latency
        turns = [
            [[Cell("float32", lanes) for _ in vectors] for _ in images] for _ in range(n_turns)
        ]
        for i, sums in enumerate(turns):
            for of_image in sums:
                for v, cell in enumerate(of_image):
                    zeros = splat(const(0.0), lanes)
                    cell.set(zeros if i else load(a["bias"], row + v * lanes, lanes))
        n, column = self.columns()
        rounds = bind(emit.divide(n, n_turns))
        with loop(0, rounds) as step:
            for i, sums in enumerate(turns):
                self.column(sums, weights, column(step * n_turns + i))
        if n_turns > 1:
            with when(rounds * n_turns < n):
                self.column(turns[0], weights, column(rounds * n_turns))
        return [[add_all(cells) for cells in zip(*of_image)] for of_image in zip(*turns)]

    def columns(self) -> tuple[Expr, Callable[[Expr], Expr]]:
        """How many columns are read, and the i-th of them."""
        a = self.a
        if not self.spec.skips:
            return a["columns"], bind
        n = bind(load(a["kept"], const(0, "int32")))
        return n, lambda i: bind(load(a["kept"], i + 1))

    def coded(self, panel: Expr, row: Expr, x: Expr) -> list[Expr]:
        """The same of slots: one vector."""
        a, rows = self.a, self.spec.rows
        total = slots.add_slots(a, panel, a["x"], x, rows, self.target, a["x_row"])
        return [bind(total + load(a["bias"], row, rows))]

    def column(self, sums: list[list[Cell]], weights: Expr, k: Expr) -> None:
        a, spec = self.a, self.spec
        places = (image * a["x_image"] + k * a["x_row"] for image in range(spec.images))
        values = [load(a["x"], place) for place in places]
        add_column(sums, a["weights"], weights + k * spec.rows, values, spec.lanes)

    def write(self, to: Expr, row: Expr, v: int, value: Expr) -> None:
        """Each lane is a row of y, whose first element is the point; padding gets the same."""
        a, spec = self.a, self.spec
        lanes, width, first = spec.lanes, spec.width, v * spec.width
        if spec.epilogue is not None:
            names = [f"o{i}" for i in range(spec.n_operands)]
            operands = [bind(load(a[n], row + first, width)) for n in names]
            value = bind(expression.emit(spec.epilogue, [value, *operands], width))
        if spec.flat:
            is_whole = row + (first + width) <= a["rows"]
            with emit.choose(is_whole) as (then, otherwise):
                with then:
                    store(a["y"], value, to + first, width)
                with otherwise:
                    self.each(row + first, value, lambda i, x: store(a["y"], x, to + (first + i)))
            return

        def spread(i: int, x: Expr) -> None:
            store(a["y"], splat(x, lanes), to + (first + i) * a["y_row"], lanes)

        self.each(row + first, value, spread)

    def each(self, row: Expr, value: Expr, put: Callable[[int, Expr], None]) -> None:
        """put(i, lane) for all lanes of a vector of sums that are rows of the matrix."""
        for i in range(self.spec.width):
            with when(row + i < self.a["rows"]):
                put(i, emit.shuffle([value], [i]) if self.spec.width > 1 else value)


def add_all(cells: Sequence[Cell]) -> Expr:
    first, *more = (cell.get() for cell in cells)
    return bind(sum(more, first))


def add_column(
    sums: Sequence[Sequence[Cell]], weights: Expr, start: Expr, values: Sequence[Expr], lanes: int
) -> None:
    """One column of a panel, from `start` on, times each value, in sums of `lanes` rows each."""
    at = bind(start)
    loaded = [load(weights, at + v * lanes, lanes) for v in range(len(sums[0]))]
    if len(sums) > 1:  # one alone takes it from memory, without a register
        loaded = [bind(one) for one in loaded]
    for cells, x in zip(sums, values):
        value = bind(splat(x, lanes))
        for cell, weight in zip(cells, loaded):
            cell.set(cell.get() + weight * value)


def pack(weight: np.ndarray, rows: int) -> np.ndarray:
    """[n, columns] -> panels [n / rows, columns, rows], padded with zeros."""
    return np.ascontiguousarray(slots.panels_of(weight, rows).transpose(0, 2, 1))


def pack_rows(values: np.ndarray, n: int, rows: int) -> np.ndarray:
    """One value per row (or one for all), padded to whole panels."""
    full = np.zeros(-(-n // rows) * rows, np.float32)
    full[:n] = values.ravel()
    return full


def reference(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Float64 meaning without epilogue: x [images, columns] -> [images, n]."""
    return np.asarray(x.astype(np.float64) @ weight.T.astype(np.float64) + bias)


def kernels(lanes: int) -> list[VectorProduct]:
    """Representative variants for vectors of `lanes` values."""
    scaled = ("Relu", ("Mul", ("arg", 0), ("arg", 1)))
    few = min(4, lanes)
    return [
        VectorProduct(lanes, 4 * lanes),
        VectorProduct(lanes, 4 * lanes, scaled, 1),
        VectorProduct(lanes, few, coded=True),
        VectorProduct(lanes, 1, scaled, 1, coded=True),
        VectorProduct(lanes, 4 * lanes, scaled, 1, flat=True),
        VectorProduct(lanes, few, coded=True, flat=True),
        VectorProduct(lanes, 4 * lanes, skips=True),
        VectorProduct(lanes, 4 * lanes, scaled, 1, flat=True, skips=True),
        VectorProduct(lanes, 4 * lanes, images=3),
        VectorProduct(lanes, 2 * lanes, scaled, 1, flat=True, images=7),
        VectorProduct(lanes, 3 * lanes, flat=True, skips=True, images=5),
    ]
