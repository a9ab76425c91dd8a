"""Products of a dense constant matrix with single points, such as a classifier's last layer.

    y[image, n] = epilogue(bias[n] + sum_k w[n, k] * x[image, k], operands[n] ...)

With one point a product kernel would fill one lane and read every weight as a broadcast. Here the
lanes are rows: weights are packed in panels of `rows` outputs, so they stream from memory once in
the order in which they are read, and only the activations are broadcast. One item is one panel.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from sparsegraph.targets import emit
from sparsegraph.targets.emit import Cell, Expr, bind, const, load, loop, splat, store, when
from sparsegraph.targets.kernels import expression
from sparsegraph.targets.target import Target

MOST_IMAGES = 4  # with more, a panel of weights is better shared by a tile of points


@dataclass(frozen=True)
class VectorProduct:
    """Spec of one kernel.

    Arguments: y and x feature-major (image, row), images, columns, rows, weights and bias from
    `pack`, then one pointer per operand ([rows], padded like the bias).

    Attributes:
        lanes: float32 values in a vector; the block of x and y.
        vectors: vectors of rows in a panel.
        epilogue: expression over (accumulated value, operand 0, operand 1 ...), or None.
        n_operands: operands with one value per row.
    """

    lanes: int
    vectors: int
    epilogue: expression.Tree | None = None
    n_operands: int = 0

    @property
    def rows(self) -> int:
        """Rows of a panel."""
        return self.lanes * self.vectors

    @property
    def name(self) -> str:
        tail = "" if self.epilogue is None else f"_{expression.label(self.epilogue)}"
        return f"gemv_f32_v{self.vectors}_l{self.lanes}{tail}_o{self.n_operands}"

    @property
    def params(self) -> emit.Signature:
        text = (
            "y:float32* y_image:int32 y_row:int32 x:float32* x_image:int32 x_row:int32 "
            "images:int32 columns:int32 rows:int32 weights:float32* bias:float32* "
        )
        return emit.signature(text + " ".join(f"o{i}:float32*" for i in range(self.n_operands)))

    def body(self, target: Target) -> Any:
        return lambda **args: _Emitter(self, args).run()


class _Emitter:
    def __init__(self, spec: VectorProduct, args: dict[str, Expr]) -> None:
        self.spec, self.a = spec, args

    def run(self) -> None:
        a, spec = self.a, self.spec
        with loop(a["begin"], a["end"]) as panel, loop(0, a["images"]) as image:
            row = bind(panel * spec.rows)
            weights, x = bind(row * a["columns"]), bind(image * a["x_image"])
            odd = [Cell("float32", spec.lanes) for _ in range(spec.vectors)]
            even = [Cell("float32", spec.lanes) for _ in range(spec.vectors)]
            for v in range(spec.vectors):
                even[v].set(load(a["bias"], row + v * spec.lanes, spec.lanes))
                odd[v].set(splat(const(0.0), spec.lanes))
            pairs = bind(emit.divide(a["columns"], 2))
            with loop(0, pairs) as pair:  # two sums hide the latency of a product
                self.column(even, weights, x, bind(pair * 2))
                self.column(odd, weights, x, bind(pair * 2 + 1))
            with when(pairs * 2 < a["columns"]):
                self.column(even, weights, x, pairs * 2)
            to = bind(image * a["y_image"] + row * a["y_row"])
            for v in range(spec.vectors):
                self.write(to, row, v, bind(even[v].get() + odd[v].get()))

    def column(self, cells: list[Cell], weights: Expr, x: Expr, k: Expr) -> None:
        a, spec = self.a, self.spec
        value = load(a["x"], x + k * a["x_row"])
        add_column(cells, a["weights"], weights + k * spec.rows, value, spec.lanes)

    def write(self, to: Expr, row: Expr, v: int, value: Expr) -> None:
        """Each lane is a row of y, whose first element is the point; padding gets the same."""
        a, spec = self.a, self.spec
        lanes, first = spec.lanes, v * spec.lanes
        if spec.epilogue is not None:
            names = [f"o{i}" for i in range(spec.n_operands)]
            operands = [bind(load(a[n], row + first, lanes)) for n in names]
            value = bind(expression.emit(spec.epilogue, [value, *operands], lanes))
        for i in range(lanes):
            with when(row + (first + i) < a["rows"]):
                one = emit.shuffle([value], [i] * lanes) if lanes > 1 else value
                store(a["y"], one, to + (first + i) * a["y_row"], lanes)


def add_column(cells: list[Cell], weights: Expr, start: Expr, x: Expr, lanes: int) -> None:
    """One column of a panel, from `start` on, times x in sums of `lanes` rows each."""
    value, at = bind(splat(x, lanes)), bind(start)
    for v, cell in enumerate(cells):
        cell.set(cell.get() + load(weights, at + v * lanes, lanes) * value)


def panels_of(weight: np.ndarray, rows: int) -> np.ndarray:
    """[n, columns] -> [panels, rows, columns]."""
    full = np.zeros((-(-len(weight) // rows) * rows, weight.shape[1]), np.float32)
    full[: len(weight)] = weight
    return full.reshape(-1, rows, weight.shape[1])


def pack(weight: np.ndarray, rows: int) -> np.ndarray:
    """[n, columns] -> panels [n / rows, columns, rows], padded with zeros."""
    return np.ascontiguousarray(panels_of(weight, rows).transpose(0, 2, 1))


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
    return [VectorProduct(lanes, 4), VectorProduct(lanes, 4, scaled, 1)]
