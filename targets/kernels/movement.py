"""Movement of elements: y[region] = x[f(index)], where f is a stride or a table per axis.

One kernel, `Move`, serves Transpose, Slice, Concat, Split, Pad, Expand, Tile, DepthToSpace,
SpaceToDepth, nearest Resize, Gather by constant indices and copies between layouts; `GatherRows`
and `GatherElements` read indices at run time. Functions below turn a node into `Call`s: a kernel,
offsets into y and x, tables, scalars and the number of items. Element types stay as they are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from sparsegraph.targets import emit
from sparsegraph.targets.emit import Expr, T
from sparsegraph.targets.kernels.convert import transpose as turn
from sparsegraph.targets.kernels.vectors import each_vector
from sparsegraph.targets.layout import FeatureMajor
from sparsegraph.targets.target import Target

INNER = ("run", "repeat", "stride", "turn", "table")


@dataclass(frozen=True)
class Axis:
    """One loop: extent, strides in y and x, or a table of offsets in x."""

    extent: int
    y: int
    x: int = 0
    table: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Move:
    """Copies over n_outer axes (the items), then `rows`, then `inner`.

    Arguments: y, x, one int32 table per tabled axis (offsets into x, for outer axes first, then
    rows, then inner); per outer axis its extent, y and x stride; rows and its strides; inner
    and its strides. Items: product of the outer extents.

    Attributes:
        dtype: element type.
        outer: per outer axis, true if its offsets in x come from a table.
        has_row_table: the rows axis has a table.
        inner: how the innermost axis goes: `run` (contiguous in y and x), `repeat` (x stays),
            `stride`, `table`, or `turn` (rows contiguous in x, inner contiguous in y: transposed
            in registers, 4-byte types only).
    """

    dtype: str
    outer: tuple[bool, ...]
    has_row_table: bool
    inner: str

    @property
    def name(self) -> str:
        axes = "".join("ts"[not t] for t in (*self.outer, self.has_row_table))
        return f"move_{self.dtype}_{axes}_{self.inner}"

    @property
    def params(self) -> emit.Signature:
        words = [f"y:{self.dtype}* x:{self.dtype}*"]
        words += [f"t{i}:int32*" for i, tabled in enumerate(self.outer) if tabled]
        words += ["t_row:int32*"] * self.has_row_table + ["t_in:int32*"] * (self.inner == "table")
        for i in range(len(self.outer)):
            words.append(f"n{i}:int32 y{i}:int32 x{i}:int32")
        words.append("rows:int32 y_row:int32 x_row:int32 inner:int32 y_in:int32 x_in:int32")
        return emit.signature(" ".join(words))

    def body(self, target: Target) -> Any:
        def emit_body(begin: Expr, end: Expr, **a: Expr) -> None:
            with emit.loop(begin, end) as item:
                y, x = self._starts(a, item)
                if self.inner == "turn":
                    _turned(a, y, x, target.shuffle_lanes)
                    return
                with emit.loop(0, a["rows"]) as row:
                    to = emit.bind(y + row * a["y_row"])
                    at = emit.load(a["t_row"], row) if self.has_row_table else row * a["x_row"]
                    self._line(a, to, emit.bind(x + at), target.lanes)

        return emit_body

    def _starts(self, a: dict[str, Expr], rest: Expr) -> tuple[Expr, Expr]:
        y, x = emit.const(0, "int32"), emit.const(0, "int32")
        for i in reversed(range(len(self.outer))):
            above = emit.bind(T.truncdiv(rest, a[f"n{i}"]))
            index = emit.bind(rest - above * a[f"n{i}"])
            y = y + index * a[f"y{i}"]
            x = x + (emit.load(a[f"t{i}"], index) if self.outer[i] else index * a[f"x{i}"])
            rest = above
        return emit.bind(y), emit.bind(x)

    def _line(self, a: dict[str, Expr], to: Expr, at: Expr, lanes: int) -> None:
        """One innermost run."""
        n, y, x = a["inner"], a["y"], a["x"]
        if self.inner == "run":
            each_vector(n, lanes, lambda i, w: emit.store(y, emit.load(x, at + i, w), to + i, w))
        elif self.inner == "repeat":
            value = emit.bind(emit.load(x, at))
            each_vector(n, lanes, lambda i, w: emit.store(y, emit.splat(value, w), to + i, w))
        else:
            with emit.loop(0, n) as i:
                step = emit.load(a["t_in"], i) if self.inner == "table" else i * a["x_in"]
                emit.store(y, emit.load(x, at + step), to + i * a["y_in"])


def _turned(a: dict[str, Expr], y: Expr, x: Expr, lanes: int) -> None:
    """y[r*y_row + i] = x[r + i*x_in] in squares of lanes x lanes, then the two borders."""
    rows, inner = a["rows"], a["inner"]
    square_rows = emit.bind(T.truncdiv(rows, emit.const(lanes, "int32")) * lanes)
    square_inner = emit.bind(T.truncdiv(inner, emit.const(lanes, "int32")) * lanes)
    with (
        emit.loop(0, T.truncdiv(square_rows, emit.const(lanes, "int32"))) as block,
        emit.loop(0, T.truncdiv(square_inner, emit.const(lanes, "int32"))) as group,
    ):
        r, i = emit.bind(block * lanes), emit.bind(group * lanes)
        loads = [emit.load(a["x"], x + r + (i + k) * a["x_in"], lanes) for k in range(lanes)]
        for k, vector in enumerate(turn([emit.bind(v) for v in loads], lanes)):
            emit.store(a["y"], vector, y + (r + k) * a["y_row"] + i, lanes)

    def border(first_row: Expr, last_row: Expr, first: Expr) -> None:
        with emit.loop(0, last_row - first_row) as dr, emit.loop(0, inner - first) as di:
            r, i = emit.bind(first_row + dr), emit.bind(first + di)
            emit.store(a["y"], emit.load(a["x"], x + r + i * a["x_in"]), y + r * a["y_row"] + i)

    border(emit.const(0, "int32"), square_rows, square_inner)
    border(square_rows, rows, emit.const(0, "int32"))


@dataclass(frozen=True)
class GatherRows:
    """y[o, m, :] = x[o, tuple m of indices, :]: Gather (depth 1) and GatherND (depth k).

    Arguments: y, x, indices, inner, count (tuples per outer), x_outer (elements of x per outer),
    i_outer (indices per outer, 0 if all share them), then per depth the extent and stride of the
    indexed axis. Negative indices count from the end; then they are clamped into the axis, so
    that a wrong index reads a wrong element but never foreign memory. Items: outer * count.

    Attributes:
        dtype, index: element types of the data and of the indices (int32 or int64).
        depth: indices per tuple.
    """

    dtype: str
    index: str = "int64"
    depth: int = 1

    @property
    def name(self) -> str:
        return f"gather_rows_{self.dtype}_{self.index}_d{self.depth}"

    @property
    def params(self) -> emit.Signature:
        sizes = "inner:int32 count:int32 x_outer:int32 i_outer:int32"
        pointers = f"y:{self.dtype}* x:{self.dtype}* indices:{self.index}*"
        return emit.signature(f"{pointers} {sizes} {axes_of_place(self.depth)}")

    def body(self, target: Target) -> Any:
        def emit_body(
            y: Expr, x: Expr, indices: Expr, inner: Expr, count: Expr, x_outer: Expr,
            i_outer: Expr, begin: Expr, end: Expr, **a: Expr,
        ) -> None:  # fmt: skip
            with emit.loop(begin, end) as item:
                outer = emit.bind(T.truncdiv(item, count))
                first = emit.bind(outer * i_outer + (item - outer * count) * self.depth)
                at = emit.bind(outer * x_outer + place(a, indices, first, self.depth))
                to = emit.bind(item * inner)
                each_vector(
                    inner,
                    target.lanes,
                    lambda i, w: emit.store(y, emit.load(x, at + i, w), to + i, w),
                )

        return emit_body


@dataclass(frozen=True)
class GatherElements:
    """y[o, j, i] = x[o, index[o, j, i], i] for x [outer, n, inner]; indices as in `GatherRows`.

    Arguments: y, x, indices, n, count (j per outer), inner. Items: outer * count.
    """

    dtype: str
    index: str = "int64"

    @property
    def name(self) -> str:
        return f"gather_elements_{self.dtype}_{self.index}"

    @property
    def params(self) -> emit.Signature:
        sizes = "n:int32 count:int32 inner:int32"
        return emit.signature(f"y:{self.dtype}* x:{self.dtype}* indices:{self.index}* {sizes}")

    def body(self, target: Target) -> Any:
        def emit_body(
            y: Expr, x: Expr, indices: Expr, n: Expr, count: Expr, inner: Expr,
            begin: Expr, end: Expr,
        ) -> None:  # fmt: skip
            with emit.loop(begin, end) as item, emit.loop(0, inner) as i:
                outer = emit.bind(T.truncdiv(item, count))
                at = emit.bind(item * inner + i)
                j = wrapped(emit.load(indices, at), n)
                emit.store(y, emit.load(x, (outer * n + j) * inner + i), at)

        return emit_body


def axes_of_place(depth: int) -> str:
    """Arguments of `place`: extent and stride of every indexed axis."""
    return " ".join(f"n{k}:int32 s{k}:int32" for k in range(depth))


def place(a: Mapping[str, Expr], indices: Expr, first: Expr, depth: int) -> Expr:
    """Where the tuple of indices that begins at `first` points to."""
    parts = (wrapped(emit.load(indices, first + k), a[f"n{k}"]) * a[f"s{k}"] for k in range(depth))
    return sum(parts, emit.const(0, "int32"))


def wrapped(index: Expr, n: Expr) -> Expr:
    """A run-time index as int32 within [0, n): negative from the end, then clamped."""
    last = emit.const((1 << 31) - 1, "int64")
    wide = T.cast(index, "int64")
    narrow = emit.Cell("int32")
    narrow.set(emit.as_int(emit.tirx.Max(emit.tirx.Min(wide, last), -last)))
    narrow.set(narrow.get() + T.Select(narrow.get() < 0, n, emit.const(0, "int32")))
    return emit.tirx.Max(emit.tirx.Min(narrow.get(), n - 1), emit.const(0, "int32"))


# ---------------------------------------------------------------- planning


@dataclass(frozen=True)
class Call:
    """One kernel call: arguments are y + y_offset, x + x_offset, tables, scalars."""

    kernel: Move
    scalars: tuple[int, ...]
    items: int
    y_offset: int = 0
    x_offset: int = 0
    tables: tuple[np.ndarray, ...] = field(default=(), compare=False)


def move(
    dtype: str, axes: Sequence[Axis], y_offset: int = 0, x_offset: int = 0, lanes: int = 8
) -> Call:
    """The cheapest call that copies over `axes` (outermost first, innermost contiguous in y).

    Neighbouring axes are merged; a contiguous axis of x is brought next to the innermost one so
    that squares are transposed in registers.
    """
    x_offset += sum(a.table[0] for a in axes if a.extent == 1 and a.table is not None)
    merged = _merge([a for a in axes if a.extent != 1])
    if not merged:
        merged = [Axis(1, 1, 1)]
    if len(merged) == 1:
        merged = [*_halves(merged[0])]
    inner = _inner_kind(merged, dtype, lanes)
    if inner == "turn":
        k = next(i for i, a in enumerate(merged[:-1]) if a.table is None and a.x == 1)
        merged = [*merged[:k], *merged[k + 1 : -1], merged[k], merged[-1]]
    *outer, rows, last = merged
    kernel = Move(dtype, tuple(a.table is not None for a in outer), rows.table is not None, inner)
    scalars = [v for a in (*outer, rows, last) for v in (a.extent, a.y, a.x)]
    tables = tuple(np.array(a.table, np.int32) for a in merged if a.table is not None)
    items = int(np.prod([a.extent for a in outer], dtype=np.int64))
    return Call(kernel, tuple(scalars), items, y_offset, x_offset, tables)


def _halves(axis: Axis) -> tuple[Axis, Axis]:
    """One axis as rows of one element more, so that every call has rows and an inner axis."""
    return Axis(1, 0, 0), axis


def _merge(axes: Sequence[Axis]) -> list[Axis]:
    merged: list[Axis] = []
    for a in axes:
        b = merged[-1] if merged else None
        plain = b is not None and a.table is None and b.table is None
        if b is not None and plain and b.y == a.y * a.extent and b.x == a.x * a.extent:
            merged[-1] = Axis(b.extent * a.extent, a.y, a.x)
        else:
            merged.append(a)
    return merged


def _inner_kind(axes: Sequence[Axis], dtype: str, lanes: int) -> str:
    last = axes[-1]
    if last.table is not None:
        return "table"
    if last.y == 1 and last.x in (0, 1):
        return "run" if last.x == 1 else "repeat"
    turns = [a for a in axes[:-1] if a.table is None and a.x == 1 and a.extent >= lanes // 2]
    is_word = np.dtype(dtype).itemsize == 4
    return "turn" if turns and last.y == 1 and is_word and last.extent >= lanes else "stride"


def strides(shape: Sequence[int]) -> list[int]:
    """Row-major strides in elements."""
    return [int(np.prod(shape[i + 1 :], dtype=np.int64)) for i in range(len(shape))]


def transpose(dtype: str, shape: Sequence[int], perm: Sequence[int]) -> Call:
    """ONNX Transpose."""
    out = [shape[p] for p in perm]
    x = strides(shape)
    return move(dtype, [Axis(n, sy, x[p]) for n, sy, p in zip(out, strides(out), perm)])


def region(
    dtype: str, y_shape: Sequence[int], y_start: Sequence[int], x_shape: Sequence[int],
    x_start: Sequence[int], extents: Sequence[int], x_steps: Sequence[int] | None = None,
) -> Call:  # fmt: skip
    """y[y_start : y_start + extents] = x[x_start :: x_steps]: Slice, Concat, Split, Pad."""
    sy, sx = strides(y_shape), strides(x_shape)
    steps = x_steps or [1] * len(extents)
    axes = [Axis(n, a, b * k) for n, a, b, k in zip(extents, sy, sx, steps)]
    y_offset = sum(a * s for a, s in zip(sy, y_start))
    return move(dtype, axes, y_offset, sum(b * s for b, s in zip(sx, x_start)))


def concat(dtype: str, shapes: Sequence[Sequence[int]], axis: int) -> list[Call]:
    """ONNX Concat: one call per input."""
    out = list(shapes[0])
    axis %= len(out)
    out[axis] = sum(s[axis] for s in shapes)
    calls, start = [], [0] * len(out)
    for shape in shapes:
        calls.append(region(dtype, out, list(start), shape, [0] * len(out), shape))
        start[axis] += shape[axis]
    return calls


def split(dtype: str, shape: Sequence[int], axis: int, sizes: Sequence[int]) -> list[Call]:
    """ONNX Split: one call per output."""
    calls, start = [], [0] * len(shape)
    axis %= len(shape)
    for size in sizes:
        out = [size if i == axis else n for i, n in enumerate(shape)]
        calls.append(region(dtype, out, [0] * len(shape), shape, list(start), out))
        start[axis] += size
    return calls


def expand(dtype: str, shape: Sequence[int], out: Sequence[int]) -> Call:
    """ONNX Expand (`out` is the result's shape); also fills y from one element."""
    padded = [1] * (len(out) - len(shape)) + list(shape)
    x = strides(padded)
    axes = [Axis(n, sy, 0 if m == 1 else sx) for n, m, sy, sx in zip(out, padded, strides(out), x)]
    return move(dtype, axes)


def tile(dtype: str, shape: Sequence[int], repeats: Sequence[int]) -> Call:
    """ONNX Tile."""
    sy, sx = strides([n * r for n, r in zip(shape, repeats)]), strides(shape)
    axes = []
    for n, r, a, b in zip(shape, repeats, sy, sx):
        axes += [Axis(r, a * n, 0), Axis(n, a, b)]
    return move(dtype, axes)


def take(dtype: str, shape: Sequence[int], tables: Sequence[Sequence[int] | None]) -> Call:
    """y[i, j, ...] = x[tables[0][i], tables[1][j], ...]; None keeps an axis.

    Gather by constant indices, Pad by edge or reflection, nearest Resize.
    """
    out = [n if t is None else len(t) for n, t in zip(shape, tables)]
    axes = []
    for n, t, sy, sx, size in zip(out, tables, strides(out), strides(shape), shape):
        offsets = None if t is None else tuple(int(i) % size * sx for i in t)
        axes.append(Axis(n, sy, sx, offsets))
    return move(dtype, axes)


def pad_table(n: int, before: int, after: int, mode: str) -> list[int]:
    """Source positions along one padded axis; mode `edge`, `reflect` or `wrap`."""
    return [int(i) for i in np.pad(np.arange(n), (before, after), mode=mode)]  # type: ignore[call-overload]


def pad_constant(dtype: str, shape: Sequence[int], pads: Sequence[int]) -> tuple[Call, Call]:
    """ONNX Pad (begins, then ends; negative crops): fill from a 1-element x, then the copy."""
    rank = len(shape)
    begin, end = pads[:rank], pads[rank:]
    out = [n + a + b for n, a, b in zip(shape, begin, end)]
    extents = [n + min(a, 0) + min(b, 0) for n, a, b in zip(shape, begin, end)]
    y_start, x_start = [max(a, 0) for a in begin], [max(-a, 0) for a in begin]
    inside = region(dtype, out, y_start, shape, x_start, extents)
    return expand(dtype, (1,) * rank, out), inside


def depth_to_space(dtype: str, shape: Sequence[int], block: int, mode: str = "DCR") -> Call:
    """ONNX DepthToSpace of [n, c, h, w]."""
    n, c, h, w = shape
    depth = c // block**2
    if mode == "DCR":
        return transpose(dtype, (n, block, block, depth, h, w), (0, 3, 4, 1, 5, 2))
    return transpose(dtype, (n, depth, block, block, h, w), (0, 1, 4, 2, 5, 3))


def space_to_depth(dtype: str, shape: Sequence[int], block: int) -> Call:
    """ONNX SpaceToDepth of [n, c, h, w]."""
    n, c, h, w = shape
    return transpose(dtype, (n, c, h // block, block, w // block, block), (0, 3, 5, 1, 2, 4))


def nearest_table(
    n: int, out: int, scale: float, coordinate: str = "half_pixel", rounding: str = ""
) -> list[int]:
    """Source positions of ONNX Resize `nearest` along one axis (all modes but tf_crop_and_resize).

    Args:
        n, out: extents; scale: out / n as given by the node.
        coordinate: coordinate_transformation_mode. rounding: nearest_mode.
    """
    i = np.arange(out, dtype=np.float64)
    size = scale * n
    positions = {
        "half_pixel": (i + 0.5) / scale - 0.5,
        "half_pixel_symmetric": n / 2 * (1 - out / size) + (i + 0.5) / scale - 0.5,
        "pytorch_half_pixel": (i + 0.5) / scale - 0.5 if out > 1 else 0 * i,
        "asymmetric": i / scale,
        "align_corners": i * (n - 1) / (out - 1) if out > 1 else 0 * i,
    }[coordinate].astype(np.float32)
    rounded = {
        "round_prefer_floor": np.ceil(positions - 0.5),
        "round_prefer_ceil": np.floor(positions + 0.5),
        "floor": np.floor(positions),
        "ceil": np.ceil(positions),
    }[rounding or "round_prefer_floor"]
    return [int(v) for v in np.clip(rounded, 0, n - 1)]


def feature_axes(layout: FeatureMajor, order: str, to_feature: bool) -> list[Call]:
    """float32 copies between row-major and `layout`: whole tiles, then the last partial tile.

    `order` is `planes` (row-major [images, features, points]) or `tokens` ([images, points,
    features]). Pad points are left as they are; `convert` is faster for whole values.
    """
    f, p, block = layout.features, layout.points, layout.block
    row, point = (p, 1) if order == "planes" else (1, f)
    whole, rest = divmod(p, block)
    calls = []
    for first, tiles, points in ((0, whole, block), (whole, 1, rest)):
        if tiles == 0 or points == 0:
            continue
        sides = [
            (layout.images, layout.image, f * p),
            (f, layout.row, row),
            (tiles, layout.tile, point * block),
            (points, 1, point),
        ]
        plain, own = first * block * point, layout.offset + first * layout.tile
        if to_feature:
            calls.append(move("float32", [Axis(n, a, b) for n, a, b in sides], own, plain))
        else:
            axes = [Axis(n, b, a) for n, a, b in sides]
            axes.sort(key=lambda a: -a.y)
            calls.append(move("float32", axes, plain, own))
    return calls


KERNELS: tuple[Move | GatherRows | GatherElements, ...] = (
    *(Move(d, (False,), False, i) for d in ("float32", "int64", "bool") for i in INNER[:3]),
    Move("float32", (False,), False, "turn"),
    Move("float32", (False,), False, "table"),
    Move("float32", (False,), True, "run"),
    Move("float32", (True,), True, "run"),
    *(
        GatherRows(d, i, k)
        for d in ("float32", "int64")
        for i in ("int32", "int64")
        for k in (1, 2)
    ),
    GatherElements("float32"),
)
