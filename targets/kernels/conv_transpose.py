"""Transposed convolution: a product with a row per phase of the result, then this shuffle.

    y[o, h*rows + ky, w*columns + kx] = x[(o, ky, kx), h, w]      (phase ky, kx)

The same kernel is DepthToSpace; the strides of x say in which order it holds (o, ky, kx).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from sparsegraph.targets import emit
from sparsegraph.targets.emit import Expr, bind, const, divide, load, loop, store
from sparsegraph.targets.kernels import plane
from sparsegraph.targets.target import Target


@dataclass(frozen=True)
class PixelShuffle:
    """Planar in, feature-major out. Items are images * features (of y).

    Arguments beyond the operands: `width` of x, `rows` per row of x, and the strides of o
    (`x_row`), ky (`x_ky`) and kx (`x_kx`) in x.

    Attributes:
        columns: result columns per column of x; at most `OVERSHOOT` / lanes.
        lanes: float32 values in a vector.
    """

    columns: int
    lanes: int

    @property
    def name(self) -> str:
        return f"pixel_shuffle_f32_{self.columns}_l{self.lanes}"

    @property
    def params(self) -> emit.Signature:
        sizes = "x_ky x_kx features width rows height_out width_out tiles block"
        text = " ".join(f"{s}:int32" for s in sizes.split())
        return emit.signature(plane.PARAMS + text + " scratch:float32*")

    def scratch_bytes(self, width_out: int, block: int) -> int:
        """The window on the result."""
        return 4 * plane.window_elements(width_out, block)

    def body(self, target: Target) -> Any:
        assert self.columns * self.lanes <= plane.OVERSHOOT, self.name
        return self._emit

    def _emit(self, **a: Expr) -> None:
        lanes, n = self.lanes, self.columns
        vectors = bind(divide(a["width"] + (lanes - 1), lanes))
        with loop(a["begin"], a["end"]) as item:
            result = plane.Plane(a, item, const(0, "int32"), lanes)
            with loop(0, a["height_out"]) as row:
                y, ky = bind(divide(row, a["rows"])), bind(emit.modulo(row, a["rows"]))
                first = bind(result.source + ky * a["x_ky"] + y * a["width"])
                to = result.row(row)
                with loop(0, vectors) as v:
                    at = [first + kx * a["x_kx"] + v * lanes for kx in range(n)]
                    values = [bind(load(a["x"], i, lanes)) for i in at]
                    for part in range(n):
                        index = range(part * lanes, (part + 1) * lanes)
                        order = [i % n * lanes + i // n for i in index]
                        value = emit.shuffle(values, order) if n > 1 else values[0]
                        store(a["scratch"], value, to + (v * n + part) * lanes, lanes)
                result.end_row(row)
            result.end()


def reference(x: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The meaning: x [features * rows * columns, height, width] in the order (o, ky, kx)."""
    _, height, width = x.shape
    y = x.reshape(-1, rows, columns, height, width).transpose(0, 3, 1, 4, 2)
    return y.reshape(-1, height * rows, width * columns)


def kernels(lanes: int) -> list[PixelShuffle]:
    """Representative variants for vectors of `lanes` values."""
    return [PixelShuffle(columns, lanes) for columns in (1, 2, 3, 4)]
