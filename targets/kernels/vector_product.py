"""Products of a constant matrix with single points, such as a classifier's last layer.

    y[image, n] = epilogue(bias[n] + sum_k w[n, k] * x[image, k], operands[n] ...)

With one point a product kernel would fill one lane and read every weight as a broadcast. Here the
lanes are rows: weights are packed in panels of `rows` outputs, so they stream from memory once in
the order in which they are read, and only the activations are broadcast. A matrix with many zeros
is coded as in slots. Behind a Relu, columns of values that are zero need not be read: then a list
of the others is made first. One item is one panel.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from sparsegraph.targets import emit
from sparsegraph.targets.emit import Cell, Expr, bind, const, load, loop, splat, store, when
from sparsegraph.targets.kernels import expression, slots
from sparsegraph.targets.kernels.math import bits
from sparsegraph.targets.target import Target

MOST_IMAGES = 4  # with more, a panel of weights is better shared by a tile of points


@dataclass(frozen=True)
class VectorProduct:
    """Spec of one kernel.

    Arguments: y and x feature-major or flat (image, row), images, rows, then columns and weights of
    `pack` or the arrays of `pack_slots`, scratch of images * (columns + 1) if it `skips`, bias of
    `pack_rows`, a pointer per operand (as the bias).

    Attributes:
        lanes: float32 values in a vector; the block of x and y.
        rows: rows in a panel.
        epilogue: expression over (accumulated value, operand 0, operand 1 ...), or None.
        n_operands: operands with one value per row.
        coded: weights are in slots.
        flat: y is row-major: one value a row, not a vector.
        skips: columns of values that are zero are not read.
    """

    lanes: int
    rows: int
    epilogue: expression.Tree | None = None
    n_operands: int = 0
    coded: bool = False
    flat: bool = False
    skips: bool = False

    @property
    def width(self) -> int:
        """Rows in a vector of sums."""
        return self.rows if self.coded else self.lanes

    @property
    def name(self) -> str:
        tail = "_coded" * self.coded + "_flat" * self.flat + "_skips" * self.skips
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
        with loop(a["begin"], a["end"]) as panel, loop(0, a["images"]) as image:
            number = bind(load(a["order"], panel)) if spec.coded else panel
            row, x = bind(number * spec.rows), bind(image * a["x_image"])
            sums = self.coded(panel, row, x) if spec.coded else self.dense(row, x, image)
            to = bind(image * a["y_image"] + row * a["y_row"])
            for v, value in enumerate(sums):
                self.write(to, row, v, value)

    def list_kept(self) -> None:
        """Per image how many values are not zero, then which."""
        a = self.a
        with loop(0, a["images"]) as image:
            first, n = bind(image * (a["columns"] + 1)), Cell("int32")
            n.set(const(0, "int32"))
            with loop(0, a["columns"]) as k:  # without a branch: none could be foretold
                value = bind(load(a["x"], image * a["x_image"] + k * a["x_row"]))
                store(a["kept"], k, first + 1 + n.get())
                # TVM's "not equal" is false for NaN, which must be read; its bits are not 0
                size = emit.T.bitwise_and(bits(value, "int32"), const(0x7FFFFFFF, "int32"))
                is_kept = emit.T.NE(size, const(0, "int32"))
                n.set(n.get() + emit.select(is_kept, const(1, "int32"), const(0, "int32")))
            store(a["kept"], n.get(), first)

    def dense(self, row: Expr, x: Expr, image: Expr) -> list[Expr]:
        """The vectors of sums of the panel at `row`."""
        a, lanes = self.a, self.spec.lanes
        weights = bind(row * a["columns"])
        vectors = range(self.spec.rows // lanes)
        odd, even = ([Cell("float32", lanes) for _ in vectors] for _ in range(2))
        for v in vectors:
            even[v].set(load(a["bias"], row + v * lanes, lanes))
            odd[v].set(splat(const(0.0), lanes))
        n, column = self.columns(image)
        pairs = bind(emit.divide(n, 2))
        with loop(0, pairs) as pair:  # two sums hide the latency of a product
            self.column(even, weights, x, column(pair * 2))
            self.column(odd, weights, x, column(pair * 2 + 1))
        with when(pairs * 2 < n):
            self.column(even, weights, x, column(pairs * 2))
        return [bind(even[v].get() + odd[v].get()) for v in vectors]

    def columns(self, image: Expr) -> tuple[Expr, Callable[[Expr], Expr]]:
        """How many columns are read, and the i-th of them."""
        a = self.a
        if not self.spec.skips:
            return a["columns"], bind
        first = bind(image * (a["columns"] + 1))
        return bind(load(a["kept"], first)), lambda i: bind(load(a["kept"], first + 1 + i))

    def coded(self, panel: Expr, row: Expr, x: Expr) -> list[Expr]:
        """The same of slots: one vector."""
        a, rows = self.a, self.spec.rows
        total = slots.add_slots(a, panel, a["x"], x, rows, self.target, a["x_row"])
        return [bind(total + load(a["bias"], row, rows))]

    def column(self, cells: list[Cell], weights: Expr, x: Expr, k: Expr) -> None:
        a, spec = self.a, self.spec
        value = load(a["x"], x + k * a["x_row"])
        add_column(cells, a["weights"], weights + k * spec.rows, value, spec.lanes)

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


def add_column(cells: list[Cell], weights: Expr, start: Expr, x: Expr, lanes: int) -> None:
    """One column of a panel, from `start` on, times x in sums of `lanes` rows each."""
    value, at = bind(splat(x, lanes)), bind(start)
    for v, cell in enumerate(cells):
        cell.set(cell.get() + load(weights, at + v * lanes, lanes) * value)


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
    ]
