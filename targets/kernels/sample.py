"""GridSample: values of maps at points between their pixels, that are computed.

Positions are as ONNX's operator GridSample defines them: -1 and 1 are the outer borders of the
first and the last pixel, or with `is_aligned` their centres.
"""

from dataclasses import dataclass
from typing import Any

from sparsegraph.targets import emit
from sparsegraph.targets.emit import Expr, T, bind, const, load, select
from sparsegraph.targets.kernels.vectors import each_vector
from sparsegraph.targets.target import Target

MODES = ("linear", "nearest")
PADDINGS = ("zeros", "border", "reflection")

_Corner = tuple[Expr, Expr]  # index of a row or column of pixels, and its weight


@dataclass(frozen=True)
class GridSample:
    """y[m, point, :] = sum over the pixels around the point of their weight * x[m, pixel, :].

    Arguments: y [images, rows, columns, channels], x [images, height, width, channels], grid
    [images, rows, columns, 2] (column of the map, row), rows, columns, height, width, channels.
    Items: images * rows.

    Attributes:
        mode: `linear` (four pixels) or `nearest` (one; halves go to the even one).
        padding: what lies outside: `zeros`, the pixel at the `border`, or the map again, mirrored
            (`reflection`).
        is_aligned: see above; then `reflection` needs more than one pixel along each axis.
        is_planar: channels of x and y follow the images.
    """

    mode: str
    padding: str
    is_aligned: bool
    is_planar: bool = False

    @property
    def name(self) -> str:
        name = f"grid_sample_{self.mode}_{self.padding}"
        return name + "_aligned" * self.is_aligned + "_planar" * self.is_planar

    @property
    def params(self) -> emit.Signature:
        sizes = "rows:int32 columns:int32 height:int32 width:int32 channels:int32"
        return emit.signature(f"y:float32* x:float32* grid:float32* {sizes}")

    def body(self, target: Target) -> Any:
        def emit_body(begin: Expr, end: Expr, **a: Expr) -> None:
            with emit.loop(begin, end) as item:
                image = bind(emit.divide(item, a["rows"]))
                with emit.loop(0, a["columns"]) as column:
                    self._point(a, image, bind(item * a["columns"] + column), target.lanes)

        return emit_body

    def _point(self, a: dict[str, Expr], image: Expr, point: Expr, lanes: int) -> None:
        """One point, counted over all images."""
        y, x, channels = a["y"], a["x"], a["channels"]
        columns = self._corners(load(a["grid"], point * 2), a["width"])
        rows = self._corners(load(a["grid"], point * 2 + 1), a["height"])
        pixels = [
            (bind(row * a["width"] + column), bind(by_row * by_column))
            for row, by_row in rows
            for column, by_column in columns
        ]

        def write(to: Expr, first: Expr, lanes: int = 1) -> None:
            terms = [load(x, first + at, lanes) * emit.splat(w, lanes) for at, w in pixels]
            emit.store(y, sum(terms[1:], terms[0]), to, lanes)

        size, n_points = bind(a["height"] * a["width"]), bind(a["rows"] * a["columns"])
        if self.is_planar:
            to = bind(image * (channels - 1) * n_points + point)
            with emit.loop(0, channels) as c:
                write(to + c * n_points, bind((image * channels + c) * size))
            return
        pixels = [(bind((image * size + at) * channels), w) for at, w in pixels]
        to = bind(point * channels)
        each_vector(channels, lanes, lambda i, width: write(to + i, i, width))

    def _corners(self, position: Expr, n: Expr) -> list[_Corner]:
        """The pixels of one axis that a point lies between, with weights."""
        size = T.cast(n, "float32")
        if self.is_aligned:
            at = bind((position + 1.0) / const(2.0) * (size - 1.0))
        else:
            at = bind(((position + 1.0) * size - 1.0) / const(2.0))
        if self.mode == "nearest":
            at = bind(T.nearbyint(at))
        if self.padding == "reflection":
            at = bind(self._reflected(at, size))
        low, high = (-2.0, 1.0) if self.padding == "zeros" else (0.0, -1.0)
        at = bind(emit.minimum(emit.maximum(at, const(low)), size + high))  # NaN is the lowest
        if self.mode == "nearest":
            return [self._corner(emit.as_int(at), const(1.0), n)]
        below = bind(T.floor(at))
        share, index = bind(at - below), bind(emit.as_int(below))
        return [self._corner(index, 1.0 - share, n), self._corner(index + 1, share, n)]

    def _reflected(self, at: Expr, size: Expr) -> Expr:
        """Mirrored at both ends, as often as it takes."""
        first = const(0.0 if self.is_aligned else -0.5)
        span = bind(size - 1.0 if self.is_aligned else size)
        distance = bind(T.fabs(at - first))
        turns = bind(T.floor(distance / span))
        rest = bind(distance - turns * span)
        is_odd = turns - T.floor(turns * const(0.5)) * 2.0 > const(0.5)
        return first + select(is_odd, span - rest, rest)

    def _corner(self, index: Expr, weight: Expr, n: Expr) -> _Corner:
        index = bind(index)
        inside = bind(emit.maximum(emit.minimum(index, n - 1), const(0, "int32")))
        if self.padding == "zeros":
            weight = select(inside == index, weight, const(0.0))
        return inside, bind(weight)


KERNELS = tuple(GridSample(m, p, a, a) for m in MODES for p in PADDINGS for a in (False, True))
