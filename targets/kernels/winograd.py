"""Winograd's minimal filtering for dense convolutions (Winograd 1980; Lavin and Gray 2015).

    y = A^T [ (G g G^T) * (B^T d B) ] A        for each m x m patch of the result

`InputTransform` and `OutputTransform` are the two sides; between them lies one product per place of
the n x n transformed patch, n = m + taps - 1, with patches as points: `Product` with `batch` = n^2.

A convolution of stride 2 is the sum of four of stride 1, one per phase: the even or odd rows and
columns of map and kernel. The phases become channels, four for each, so a 7x7 kernel is one of 4x4.

Vector lanes run over patches. The patches of a map are m pixels apart, so a plane is first split
into the planes of its patch places (place (i, j) of all patches, row by row): whatever a transform
reads for consecutive patches is then consecutive. The result goes the other way.

Points of interpolation: 0, +-1 for m = 2; 0, +-2/3, +-3/2 for m = 4, which rounds a quarter as much
as the usual 0, +-1, +-2 (float32, 64 channels: 9e-7 against 4e-6 of the largest output); for 4 taps
the three pairs that round least of all fractions with denominators up to 8. Points in pairs of
opposite sign share their even and odd halves.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
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
    modulo,
    splat,
    store,
)
from sparsegraph.targets.kernels import expression
from sparsegraph.targets.kernels.plane import OVERSHOOT, Plane, window_elements
from sparsegraph.targets.kernels.window import operand_params
from sparsegraph.targets.layout import LINE, FeatureMajor, blocked
from sparsegraph.targets.target import Target

_PAIRS = {
    3: (Fraction(1),),
    5: (Fraction(2, 3), Fraction(3, 2)),
    6: (Fraction(2, 7), Fraction(6, 7), Fraction(8, 5)),
}
"""Finite points by their number, one of each pair; 0 is one of an odd number. Infinity is last."""


def points(n: int) -> list[Fraction]:
    """The finite points of interpolation of a transformed patch of n values."""
    pairs = _PAIRS[n - 1]
    return [Fraction(0)] * ((n - 1) % 2) + [sign * p for p in pairs for sign in (1, -1)]


@cache
def matrices(m: int, taps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A^T [m, n], G [n, taps], B^T [n, n] in float64, from exact fractions (Cook and Toom)."""
    finite = points(m + taps - 1)
    at, g, bt = [], [], []
    for i in range(m):
        at.append([p**i for p in finite] + [Fraction(int(i == m - 1))])
    for i, p in enumerate(finite):
        others = [q for j, q in enumerate(finite) if j != i]
        scale = Fraction(1)
        for q in others:
            scale *= p - q
        g.append([p**k / scale for k in range(taps)])
        bt.append([*_polynomial(others), Fraction(0)])
    g.append([Fraction(int(k == taps - 1)) for k in range(taps)])
    bt.append(_polynomial(finite))
    a, b, c = (np.array([[float(v) for v in row] for row in rows]) for rows in (at, g, bt))
    return a, b, c


def _polynomial(roots: Sequence[Fraction]) -> list[Fraction]:
    """Coefficients of prod (x - root), lowest first."""
    out = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *out]
        out = [s - root * c for s, c in zip(shifted, [*out, Fraction(0)])]
    return out


def transform_weights(weight: np.ndarray, m: int, taps: int = 3, stride: int = 1) -> np.ndarray:
    """[rows, channels, kh, kw] -> [n^2, rows, channels * stride^2], computed in float64."""
    g = matrices(m, taps)[1]
    phases = by_phase(weight, taps, stride).astype(np.float64)
    places = np.einsum("ik,ockl,jl->ijoc", g, phases, g, optimize=True)
    return np.asarray(places.reshape(-1, *phases.shape[:2]), np.float32)


def by_phase(weight: np.ndarray, taps: int, stride: int) -> np.ndarray:
    """[rows, channels, kh, kw] -> [rows, channels * stride^2, taps, taps], zeros behind the kernel.

    The taps of phase (i, j) are those at rows i, i + stride ... and columns j, j + stride ...
    """
    rows, channels, *kernel = weight.shape
    room = [(0, taps * stride - k) for k in kernel]
    padded = np.pad(weight, [(0, 0), (0, 0), *room])
    split = padded.reshape(rows, channels, taps, stride, taps, stride)
    return split.transpose(0, 1, 3, 5, 2, 4).reshape(rows, -1, taps, taps)


def patches(out: tuple[int, int], m: int) -> tuple[int, int]:
    """Rows and columns of patches that cover a map."""
    return -(-out[0] // m), -(-out[1] // m)


def places(images: int, features: int, n_patches: int, n: int, target: Target) -> FeatureMajor:
    """Layout between the transforms: image*n^2 + place, patches as points.

    An odd number of cache lines lies between places: a transform touches all of them in turn, and
    powers of two would fall into the same cache sets.
    """
    layout = blocked(images * n**2, features, n_patches, 1, target)
    return dataclasses.replace(layout, image=(-(-layout.image // LINE) | 1) * LINE)


@dataclass(frozen=True)
class InputTransform:
    """y[image*n^2 + place, channel*stride^2 + phase, patch] = (B^T d B)[place].

    Items are images * channels. x lies in planes. Patches past the last one, up to whole tiles, get
    finite or undefined values.
    """

    m: int
    lanes: int
    taps: int = 3
    stride: int = 1

    @property
    def n(self) -> int:
        """Extent of a transformed patch."""
        return self.m + self.taps - 1

    @property
    def step(self) -> int:
        """Pixels of x between patches."""
        return self.m * self.stride

    @property
    def extent(self) -> int:
        """Extent of the pixels that a patch reads."""
        return self.n * self.stride

    @property
    def name(self) -> str:
        kind = "" if self.taps == 3 else f"t{self.taps}"
        kind += "" if self.stride == 1 else f"s{self.stride}"
        return f"winograd_input_f32_m{self.m}{kind}_l{self.lanes}"

    @property
    def params(self) -> emit.Signature:
        return emit.signature(
            "y:float32* y_image:int32 y_tile:int32 y_row:int32 "
            "x:float32* x_image:int32 x_row:int32 scratch:float32* "
            "channels:int32 height:int32 width:int32 top:int32 left:int32 "
            "patch_rows:int32 patch_columns:int32 tiles:int32 block:int32 plane:int32 line:int32"
        )

    def plane(self, grid: tuple[int, int], padded: int) -> int:
        """Elements of one plane of places; `padded`: patches with those of the last tile."""
        rows, columns = grid
        used = max(rows * columns, padded) + (self.extent - 1) // self.step * columns
        return -(-(used + 2 * self.lanes) // 16) * 16

    def line(self, columns: int, width: int) -> int:
        """Elements of the padded source row."""
        used = max((columns + 2 * self.lanes) * self.step, width + self.step + 2 * self.lanes)
        return -(-used // 16) * 16

    def scratch_bytes(self, grid: tuple[int, int], padded: int, width: int) -> int:
        overlap = self.extent - self.step
        lines = self.line(grid[1], width) + overlap * (grid[1] + 2 * self.lanes) + 32
        places = self.extent * self.step * self.plane(grid, padded)
        return 4 * (self.n * self.n * self.lanes + places + lines)

    def body(self, target: Target) -> Any:
        return lambda **args: _Input(self, args).run()


class _Input:
    """Scratch: n^2 vectors, planes [extent columns][step rows] of places, a source row, phases."""

    def __init__(self, spec: InputTransform, a: dict[str, Expr]) -> None:
        self.spec, self.a, self.lanes, self.n = spec, a, spec.lanes, spec.n
        self.step, self.overlap = spec.step, spec.extent - spec.step

    def run(self) -> None:
        a, lanes, stride = self.a, self.lanes, self.spec.stride
        self.planes = self.n * self.n * lanes
        self.row = bind(self.planes + self.spec.extent * self.step * a["plane"])
        self.phases = bind(self.row + a["line"])
        self.phase = bind(a["patch_columns"] + 2 * lanes)
        self.vectors = bind(divide(a["patch_columns"] + (lanes - 1), lanes))
        with loop(0, divide(a["line"], lanes)) as v:
            self._put(splat(const(0.0), lanes), self.row + v * lanes)
        with loop(a["begin"], a["end"]) as item:
            image, channel = bind(divide(item, a["channels"])), bind(modulo(item, a["channels"]))
            source = bind(image * a["x_image"] + channel * a["x_row"])
            with loop(0, a["patch_rows"] * self.step + self.overlap) as y:
                self._split_row(source, y)
            to = image * (self.n * self.n) * a["y_image"] + channel * stride**2 * a["y_row"]
            to = bind(to)
            with loop(0, a["tiles"]) as tile, loop(0, divide(a["block"], lanes)) as v:
                at = bind(tile * a["block"] + v * lanes)
                place = bind(to + tile * a["y_tile"] + v * lanes)
                for phase in range(stride**2):
                    self._transform(at, bind(place + phase * a["y_row"]), *divmod(phase, stride))

    def _put(self, value: Expr, at: Expr) -> None:
        store(self.a["scratch"], value, at, self.lanes)

    def _get(self, at: Expr) -> Expr:
        return load(self.a["scratch"], at, self.lanes)

    def _place(self, row: Expr) -> Expr:
        """Where row `row` of the padded map begins in the planes of its places, in column 0."""
        a, step = self.a, self.step
        return modulo(row, step) * a["plane"] + divide(row, step) * a["patch_columns"]

    def _split_row(self, source: Expr, y: Expr) -> None:
        """Row y of the padded map into the planes; a last vector spills into the next row."""
        a, step, lanes = self.a, self.step, self.lanes
        at = bind(y - a["top"])
        to = bind(self.planes + self._place(y))
        with emit.choose(emit.maximum(-at, at - a["height"] + 1) > 0) as (outside, inside):
            with outside:
                for j in range(self.spec.extent):
                    with loop(0, self.vectors) as v:
                        place = to + j * step * a["plane"] + v * lanes
                        self._put(splat(const(0.0), lanes), place)
            with inside:
                self._read_row(bind(source + at * a["width"]))
                with loop(0, self.vectors + 1) as v:
                    row = bind(self.row + v * (step * lanes))
                    read = [hold(self._get(row + k * lanes), lanes) for k in range(step)]
                    for j, value in enumerate(split(read, lanes)):
                        self._put(value, to + j * step * a["plane"] + v * lanes)
                        if j < self.overlap:
                            self._put(value, self.phases + j * self.phase + v * lanes)
                for j in range(self.overlap):  # the last columns are the first of the next patch
                    with loop(0, self.vectors) as v:
                        value = self._get(self.phases + j * self.phase + v * lanes + 1)
                        self._put(value, to + (step + j) * step * a["plane"] + v * lanes)

    def _read_row(self, source: Expr) -> None:
        """Into the middle of a row of zeros."""
        a, lanes = self.a, self.lanes
        to = bind(self.row + a["left"])
        with loop(0, divide(a["width"] + (lanes - 1), lanes)) as v:
            self._put(load(a["x"], source + v * lanes, lanes), to + v * lanes)
        self._put(splat(const(0.0), lanes), to + a["width"])

    def _transform(self, at: Expr, to: Expr, row_phase: int, column_phase: int) -> None:
        """The patches at `at` of one phase of the rows and columns."""
        a, n, lanes, stride = self.a, self.n, self.lanes, self.spec.stride
        matrix = matrices(self.spec.m, self.spec.taps)[2]
        with loop(0, n) as i:
            row = bind(self.planes + at + self._place(i * stride + row_phase))
            columns = [j * stride + column_phase for j in range(n)]
            values = [hold(self._get(row + c * self.step * a["plane"]), lanes) for c in columns]
            for j, value in enumerate(even_odd_rows(matrix, values, lanes)):
                self._put(value, (i * n + j) * lanes)
        with loop(0, n) as j:
            values = [hold(self._get((i * n + j) * lanes), lanes) for i in range(n)]
            for i, value in enumerate(even_odd_rows(matrix, values, lanes)):
                store(a["y"], value, to + (i * n + j) * a["y_image"], lanes)


@dataclass(frozen=True)
class OutputTransform:
    """y = epilogue(A^T x A + bias, operands ...); items are images * features.

    x[image*n^2 + place, feature, patch]; y has any feature-major layout.
    """

    m: int
    lanes: int
    epilogue: expression.Tree | None = None
    operands: tuple[str, ...] = ()
    taps: int = 3

    @property
    def n(self) -> int:
        """Extent of a transformed patch."""
        return self.m + self.taps - 1

    @property
    def name(self) -> str:
        tail = "" if self.epilogue is None else f"_{expression.label(self.epilogue)}"
        kinds = "".join(k[0] for k in self.operands)
        size = f"m{self.m}" + ("" if self.taps == 3 else f"t{self.taps}")
        return f"winograd_output_f32_{size}_l{self.lanes}{tail}{'_' + kinds if kinds else ''}"

    @property
    def params(self) -> emit.Signature:
        return emit.signature(
            "y:float32* y_image:int32 y_tile:int32 y_row:int32 x:float32* x_image:int32 "
            "x_tile:int32 x_row:int32 scratch:float32* bias:float32* features:int32 "
            "height_out:int32 width_out:int32 tiles:int32 block:int32 "
            "patch_columns:int32 patch_tiles:int32 patch_block:int32 plane:int32 "
            + operand_params(self.operands)
        )

    def plane(self, columns: int, padded: int) -> int:
        """Elements of the results of one place in a patch, with what the last row reads behind."""
        return -(-(padded + columns + 2 * self.lanes) // 16) * 16

    def scratch_bytes(self, columns: int, padded: int, width_out: int, block: int) -> int:
        planes = self.m * self.m * self.plane(columns, padded)
        window = window_elements(width_out, block) + self.m * self.lanes
        return 4 * (self.m * self.n * self.lanes + planes + window)

    def body(self, target: Target) -> Any:
        assert self.m * self.lanes <= OVERSHOOT
        return lambda **args: _Output(self, args).run()


class _Output:
    """Scratch: m*n vectors, planes [m][m] of places, the window of the result."""

    def __init__(self, spec: OutputTransform, a: dict[str, Expr]) -> None:
        self.spec, self.a, self.m, self.lanes, self.n = spec, a, spec.m, spec.lanes, spec.n

    def run(self) -> None:
        a, m, lanes = self.a, self.m, self.lanes
        self.planes = m * self.n * lanes
        window = bind(self.planes + m * m * a["plane"])
        with loop(a["begin"], a["end"]) as item:
            image, feature = bind(divide(item, a["features"])), bind(modulo(item, a["features"]))
            source = bind(image * (self.n * self.n) * a["x_image"] + feature * a["x_row"])
            vectors = bind(divide(a["patch_block"], lanes))
            with loop(0, a["patch_tiles"]) as tile, loop(0, vectors) as v:
                at = bind(tile * a["patch_block"] + v * lanes)
                self._transform(bind(source + tile * a["x_tile"] + v * lanes), at)
            plane = _Finished(self.spec, a, item, window, image, feature)
            with loop(0, a["height_out"]) as y:
                self._row(plane, y)
            plane.end()

    def _transform(self, source: Expr, at: Expr) -> None:
        a, m, n, lanes = self.a, self.m, self.n, self.lanes
        matrix = matrices(m, self.spec.taps)[0]
        with loop(0, n) as j:
            places = [source + (i * n + j) * a["x_image"] for i in range(n)]
            values = [hold(load(a["x"], p, lanes), lanes) for p in places]
            for i, value in enumerate(even_odd_columns(matrix, values, lanes)):
                store(a["scratch"], value, (i * n + j) * lanes, lanes)
        with loop(0, m) as i:
            places = [(i * n + j) * lanes for j in range(n)]
            values = [hold(load(a["scratch"], p, lanes), lanes) for p in places]
            to = bind(self.planes + i * m * a["plane"] + at)
            for j, value in enumerate(even_odd_columns(matrix, values, lanes)):
                store(a["scratch"], value, to + j * a["plane"], lanes)

    def _row(self, plane: Plane, y: Expr) -> None:
        a, m, lanes = self.a, self.m, self.lanes
        at = modulo(y, m) * (m * a["plane"]) + divide(y, m) * a["patch_columns"]
        at, to = bind(self.planes + at), plane.row(y)
        with loop(0, divide(a["patch_columns"] + (lanes - 1), lanes)) as v:
            places = [at + j * a["plane"] + v * lanes for j in range(m)]
            phases = [hold(load(a["scratch"], p, lanes), lanes) for p in places]
            for j, value in enumerate(merge(phases, lanes)):
                store(a["scratch"], value, to + (v * m + j) * lanes, lanes)
        plane.end_row(y)


class _Finished(Plane):
    """Applies bias and epilogue to what leaves the window."""

    def __init__(
        self, spec: OutputTransform, a: dict[str, Expr], item: Expr, window: Expr, image: Expr,
        feature: Expr,
    ) -> None:  # fmt: skip
        super().__init__(a, item, window, spec.lanes)
        self.spec = spec
        self.bias = hold(splat(load(a["bias"], feature), spec.lanes), spec.lanes)
        self.sides: list[Any] = []
        for i, kind in enumerate(spec.operands):
            if kind == "feature":
                self.sides.append(hold(splat(load(a[f"o{i}"], feature), spec.lanes), spec.lanes))
            else:
                self.sides.append(bind(image * a[f"o{i}_image"] + feature * a[f"o{i}_row"]))

    def finish(self, value: Expr, tile: Expr, point: Expr) -> Expr:
        spec = self.spec
        value = value + self.bias
        if spec.epilogue is None:
            return value
        values = [hold(value, self.lanes)]
        for i, (kind, side) in enumerate(zip(spec.operands, self.sides)):
            if kind == "same":
                at = side + tile * self.a[f"o{i}_tile"] + point
                side = hold(load(self.a[f"o{i}"], at, self.lanes), self.lanes)
            values.append(side)
        return expression.emit(spec.epilogue, values, self.lanes)


# ---------------------------------------------------------------- vectors


def hold(value: Expr, lanes: int) -> Expr:
    """Compute a float value once: a cell, since TVM expands chains of bound vectors."""
    cell = Cell("float32", lanes)
    cell.set(value)
    return cell.get()


def even_odd_rows(matrix: np.ndarray, values: Sequence[Expr], lanes: int) -> list[Expr]:
    """matrix @ values, where the two rows of a pair of points differ in the sign of every other
    column only. A row for the point 0 comes first if there is one, that of infinity last."""
    first = 1 - len(matrix) % 2
    out = [_sum(row, values, lanes) for row in matrix[:first]]
    for plus, minus in zip(matrix[first:-1:2], matrix[first + 1 : -1 : 2], strict=True):
        same = plus == minus
        one, two = (plus * same, plus * ~same)
        assert np.array_equal(minus, one - two)
        one, two = (hold(_sum(c, values, lanes), lanes) for c in (one, two))
        out += [one + two, one - two]
    return [*out, _sum(matrix[-1], values, lanes)]


def even_odd_columns(matrix: np.ndarray, values: Sequence[Expr], lanes: int) -> list[Expr]:
    """matrix @ values, where the two columns of a pair of points differ in the sign of the odd
    rows only. A column for the point 0 comes first if there is one, that of infinity last."""
    last = len(values) - 1
    pairs = range(last % 2, last, 2)
    sums: dict[int, Expr] = {0: values[0]} if last % 2 else {}
    differences: dict[int, Expr] = {}
    for i in pairs:
        sums[i] = hold(values[i] + values[i + 1], lanes)
        differences[i] = hold(values[i] - values[i + 1], lanes)
    out = []
    for r, row in enumerate(matrix):
        parts = dict(differences if r % 2 else sums)
        assert all(row[i + 1] == (-1) ** r * row[i] for i in pairs)
        parts[last] = values[last]
        out.append(_sum([row[i] for i in parts], list(parts.values()), lanes))
    return out


def _sum(factors: Sequence[float], values: Sequence[Expr], lanes: int) -> Expr:
    """Sum of factor * value without the zeros and without multiplying by one."""
    total = None
    for factor, value in sorted(zip(map(float, factors), values), key=lambda t: abs(t[0]) != 1):
        if factor == 0:
            continue
        if total is None:
            total = value if factor == 1 else splat(const(factor), lanes) * value
        elif abs(factor) == 1:
            total = total + value if factor == 1 else total - value
        else:
            total = total + splat(const(factor), lanes) * value
    assert total is not None
    return total


def split(vectors: Sequence[Expr], lanes: int) -> list[Expr]:
    """Every n-th value of n consecutive vectors, from each start; n is a power of two."""
    if len(vectors) == 1:
        return list(vectors)
    pairs = list(zip(vectors[::2], vectors[1::2]))
    halves = []
    for start in (0, 1):
        picked = [_pick(a, b, range(start, 2 * lanes, 2), lanes) for a, b in pairs]
        halves.append(split(picked, lanes))
    return [v for both in zip(*halves) for v in both]


def merge(vectors: Sequence[Expr], lanes: int) -> list[Expr]:
    """The inverse of `split`."""
    if len(vectors) == 1:
        return list(vectors)
    out = []
    for a, b in zip(merge(vectors[::2], lanes), merge(vectors[1::2], lanes)):
        order = [i + side for i in range(lanes) for side in (0, lanes)]
        out += [_pick(a, b, order[:lanes], lanes), _pick(a, b, order[lanes:], lanes)]
    return out


def _pick(a: Expr, b: Expr, order: Sequence[int], lanes: int) -> Expr:
    if lanes == 1:
        return (a, b)[order[0]]
    return hold(emit.shuffle([a, b], order), lanes)
