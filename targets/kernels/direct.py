"""Convolutions with few non-zero weights on machines without vectors: maps are read in place.

    y[n, p] = epilogue(bias[n] + sum over the non-zero weights of row n, operands[n, p] ...)

Scheme: a tile is some rows and columns of the result whose sums fill the registers. For every row
of the weight, tap by tap, each non-zero value takes one index, one value and one load and
multiply-add per point. The geometry is part of the spec, so every address is the channel's plus a
constant. No panel is gathered, no partial sum leaves the registers, and what a tap would read
outside the map is not computed: 3x3 on a 4x4 map takes 100 instead of 144 multiply-adds, on a 2x2
map 16 instead of 36.

Where the tiles of a map differ in what lies outside, a tap has one body for each kind of tile.
"""

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

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
    store,
    when,
)
from sparsegraph.targets.kernels import expression
from sparsegraph.targets.target import Target

UNROLLED = 4  # values per turn of the inner loop
NARROW = (1 << 16) - 1  # largest 16-bit index
_FLOAT = 4  # bytes


class Axis(NamedTuple):
    """One axis of a convolution: extents of map and result, the window, padding in front."""

    size: int
    out: int
    kernel: int
    stride: int
    pad: int
    dilation: int = 1

    def inside(self, tap: int, first: int, n: int) -> tuple[int, ...]:
        """Which of the n results from `first` on a tap reads inside the map."""
        sources = (first * self.stride + self.source(i, tap) for i in range(n))
        return tuple(i for i, s in enumerate(sources) if 0 <= s < self.size)

    def source(self, i: int, tap: int) -> int:
        """What result i reads under a tap; negative in front of the map."""
        return i * self.stride + tap * self.dilation - self.pad

    def kinds(self, tap: int, n: int) -> dict[tuple[int, ...], tuple[int, int]]:
        """Results inside -> first and last tile of n results where it is these; neighbours."""
        found: dict[tuple[int, ...], tuple[int, int]] = {}
        for tile in range(self.out // n):
            inside = self.inside(tap, tile * n, n)
            found[inside] = (found.get(inside, (tile, tile))[0], tile)
        return found


@dataclass(frozen=True)
class Direct:
    """Spec of one kernel; items are (part of the rows, image, tile of rows, tile of columns).

    Attributes:
        rows, columns: the axes of the map.
        tile: rows and columns of the result in a tile; they divide the result.
        offset: type of the offsets, which are the bytes from channel 0 to a value's channel.
        pad: elements behind the points of y that become zero.
        epilogue, operands: as `Product`; costly operators are not taken.
    """

    rows: Axis
    columns: Axis
    tile: tuple[int, int]
    offset: str = "uint16"
    pad: int = 0
    epilogue: expression.Tree | None = None
    operands: tuple[str, ...] = ()

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles of one image."""
        return self.rows.out // self.tile[0], self.columns.out // self.tile[1]

    @property
    def n_tiles(self) -> int:
        return math.prod(self.grid)

    @property
    def n_taps(self) -> int:
        return self.rows.kernel * self.columns.kernel

    @property
    def n_bodies(self) -> int:
        """How often the inner loop is emitted."""
        axes = ((self.rows, self.tile[0]), (self.columns, self.tile[1]))
        down, across = (
            sum(sum(map(bool, axis.kinds(t, n))) for t in range(axis.kernel)) for axis, n in axes
        )
        return down * across

    @property
    def code_bytes(self) -> int:
        """Size of the inner loops, about: instructions of 4 bytes."""
        per_value = 3 + 2 * math.prod(self.tile)
        return 4 * self.n_bodies * (UNROLLED + 1) * per_value

    @property
    def name(self) -> str:
        axes = (self.rows, self.columns)
        shape = "_".join(f"{a.size}k{a.kernel}s{a.stride}p{a.pad}d{a.dilation}" for a in axes)
        shape += f"_t{self.tile[0]}x{self.tile[1]}o{self.rows.out}x{self.columns.out}"
        shape += "_wide" * (self.offset != "uint16") + (f"_z{self.pad}" if self.pad else "")
        tail = "" if self.epilogue is None else f"_{expression.label(self.epilogue)}"
        kinds = "".join(k[0] for k in self.operands)
        return f"sconv_f32_{shape}{tail}{'_' + kinds if kinds else ''}"

    @property
    def params(self) -> emit.Signature:
        text = (
            "y:float32* y_image:int32 y_row:int32 x:float32* x_image:int32 images:int32 "
            f"bias:float32* values:float32* offsets:{self.offset}* ends:int32* parts:int32* "
        )
        for i, kind in enumerate(self.operands):
            text += f"o{i}:float32* " + f"o{i}_image:int32 o{i}_row:int32 " * (kind == "same")
        return emit.signature(text)

    def body(self, target: Target) -> Any:
        return lambda **args: _Emitter(self, args, target).run()


_NAME = re.compile(
    r"sconv_f32_" + 2 * r"(\d+)k(\d+)s(\d+)p(\d+)d(\d+)_" + r"t(\d+)x(\d+)o(\d+)x(\d+)"
    r"(?P<wide>_wide)?(?:_z(?P<pad>\d+))?"
)


def named(name: str) -> Direct | None:
    """The kernel of this name, without its epilogue; None for any other kernel."""
    found = _NAME.match(name)
    if found is None:
        return None
    wide, pad, numbers = found["wide"], found["pad"], [int(n) for n in found.groups()[:14]]
    rows, columns = (
        Axis(numbers[i], out, *numbers[i + 1 : i + 5]) for i, out in zip((0, 5), numbers[12:])
    )
    tile = numbers[10], numbers[11]
    return Direct(rows, columns, tile, "int32" if wide else "uint16", int(pad or 0))


class Packed(NamedTuple):
    """The non-zero values of a weight, row by row, tap by tap, channel by channel.

    Attributes:
        values: float32.
        offsets: of each value, `plane` bytes times its channel.
        ends: int32 [rows, taps], where the values of each end.
        parts: int32 [parts, 3]: first row, row behind the last, first value.
    """

    values: np.ndarray
    offsets: np.ndarray
    ends: np.ndarray
    parts: np.ndarray


def pack(weight: np.ndarray, plane: int, parts: int = 1) -> Packed:
    """Pack [rows, channels, kh, kw]; `plane`: bytes between channels of the map."""
    n, channels = weight.shape[:2]
    by_tap = weight.reshape(n, channels, -1).transpose(0, 2, 1)
    _, _, channel = np.nonzero(by_tap)
    ends = np.count_nonzero(by_tap, axis=2).ravel().cumsum().astype(np.int32)
    starts = np.concatenate([[0], ends])
    pieces = np.array_split(np.arange(n), min(parts, n))
    bounds = [(p[0], p[-1] + 1, starts[p[0] * by_tap.shape[1]]) for p in pieces]
    kind = np.uint16 if (channels - 1) * plane <= NARROW else np.int32
    values = by_tap[np.nonzero(by_tap)].astype(np.float32)
    return Packed(values, (channel * plane).astype(kind), ends, np.array(bounds, np.int32))


_Point = tuple[int, int]  # row and column in the tile


class _Emitter:
    """Loops of one kernel, outermost first."""

    def __init__(self, spec: Direct, args: dict[str, Expr], target: Target) -> None:
        self.spec, self.a = spec, args
        self.int = "int64" if "64" in target.arch else "int32"  # as wide as an address

    def run(self) -> None:
        a, spec = self.a, self.spec
        per_part = bind(a["images"] * spec.n_tiles)
        with loop(a["begin"], a["end"]) as item:
            part, rest = bind(divide(item, per_part)), bind(modulo(item, per_part))
            image, place = bind(divide(rest, spec.n_tiles)), bind(modulo(rest, spec.n_tiles))
            self.at = [bind(divide(place, spec.grid[1])), bind(modulo(place, spec.grid[1]))]
            rows, columns = spec.rows, spec.columns
            first = self.at[0] * (spec.tile[0] * rows.stride * columns.size)
            first = first + self.at[1] * (spec.tile[1] * columns.stride) + image * a["x_image"]
            self.x = emit.moved(a["x"], self.wide(first) * _FLOAT)
            self.image = image
            point = self.at[0] * (spec.tile[0] * columns.out) + self.at[1] * spec.tile[1]
            self.point = bind(point)
            self.cursor = Cell(self.int)
            self.cursor.set(self.wide(load(a["parts"], part * 3 + 2)))
            with loop(load(a["parts"], part * 3), load(a["parts"], part * 3 + 1)) as row:
                self.row(row, place)

    def wide(self, x: Expr) -> Expr:
        return bind(emit.T.cast(x, self.int))

    def row(self, row: Expr, place: Expr) -> None:
        """All points of the tile of one row of the weight."""
        spec = self.spec
        bias = bind(load(self.a["bias"], row))
        down, across = map(range, spec.tile)
        sums = {p: Cell() for p in itertools.product(down, across)}
        for cell in sums.values():
            cell.set(bias)
        ends = bind(row * spec.n_taps)
        taps = itertools.product(range(spec.rows.kernel), range(spec.columns.kernel))
        for tap, (ky, kx) in enumerate(taps):
            end = self.wide(load(self.a["ends"], ends + tap))
            for inside_rows, in_rows in self.kinds(0, ky):
                with in_rows:
                    for inside_columns, in_columns in self.kinds(1, kx):
                        with in_columns:
                            inside = itertools.product(inside_rows, inside_columns)
                            self.tap((ky, kx), {p: sums[p] for p in inside}, end)
            self.cursor.set(end)
        self.finish(row, list(sums.items()))
        self.zeros(row, place)

    def kinds(self, axis: int, tap: int) -> Iterator[tuple[tuple[int, ...], Any]]:
        """Per kind of tile that reads anything under the tap: what it reads, and `with` for it."""
        found = (self.spec.rows, self.spec.columns)[axis].kinds(tap, self.spec.tile[axis])
        at = self.at[axis]
        for inside, (first, last) in found.items():
            if inside and len(found) == 1:
                yield inside, nullcontext()
            elif inside:
                yield inside, when(emit.maximum(first - at, at - last) <= 0)

    def tap(self, tap: _Point, sums: dict[_Point, Cell], end: Expr) -> None:
        """Add all values of one row and tap."""
        spec, a = self.spec, self.a
        rows, columns = spec.rows, spec.columns
        places = (
            rows.source(i, tap[0]) * columns.size + columns.source(j, tap[1]) for i, j in sums
        )
        offsets = [const(place, "int32") for place in places]
        start = bind(self.cursor.get())
        turns = bind((end - start) >> const(UNROLLED.bit_length() - 1, self.int))
        rest = bind(start + turns * UNROLLED)

        def add(at: Expr) -> None:
            memory = emit.moved(self.x, self.wide(load(a["offsets"], at)))
            value = bind(load(a["values"], at))
            for cell, offset in zip(sums.values(), offsets, strict=True):
                cell.set(cell.get() + value * load(memory, offset))

        with loop(0, turns) as i:
            for k in range(UNROLLED):
                add(start + i * UNROLLED + k)
        with loop(0, end - rest) as i:
            add(rest + i)

    def finish(self, row: Expr, sums: Sequence[tuple[_Point, Cell]]) -> None:
        """Store the sums through the epilogue."""
        a, spec = self.a, self.spec
        to = self.first("y", row)
        sides = [
            bind(load(a[f"o{i}"], row)) if kind == "feature" else self.first(f"o{i}", row)
            for i, kind in enumerate(spec.operands)
        ]
        for (i, j), cell in sums:
            point = i * spec.columns.out + j
            result = cell.get()
            if spec.epilogue is not None:
                values = [result]
                for k, (kind, side) in enumerate(zip(spec.operands, sides, strict=True)):
                    is_one = kind == "feature"
                    values.append(side if is_one else bind(load(a[f"o{k}"], side + point)))
                result = expression.emit(spec.epilogue, values, 1)
            store(a["y"], result, to + point)

    def first(self, name: str, row: Expr) -> Expr:
        """Where the tile of a row begins in y or an operand."""
        a = self.a
        return bind(self.image * a[f"{name}_image"] + row * a[f"{name}_row"] + self.point)

    def zeros(self, row: Expr, place: Expr) -> None:
        """What lies behind the last point."""
        a, spec = self.a, self.spec
        if not spec.pad:
            return
        with when(place == spec.n_tiles - 1):
            end = spec.rows.out * spec.columns.out
            to = bind(self.image * a["y_image"] + row * a["y_row"] + end)
            with loop(0, spec.pad) as i:
                store(a["y"], const(0.0), to + i)
