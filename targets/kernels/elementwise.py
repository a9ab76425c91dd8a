"""Element-wise kernels: one expression tree over operands that broadcast, one output.

`FeatureMap` works on feature-major values: an operand is `full` (pointer and strides; a row
stride of 0 repeats one row of points for every feature), `feature` (a vector of one value per
feature) or `scalar`. `RowMap` works on row-major values with NumPy broadcasting: `collapse` turns
the shapes into few axes, of which the innermost is contiguous or constant for every operand.
The output may be the same memory as an operand of equal type, shape and strides.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from sparsegraph.targets import emit
from sparsegraph.targets.emit import Expr
from sparsegraph.targets.kernels import expression
from sparsegraph.targets.kernels.operators import stored
from sparsegraph.targets.kernels.vectors import each_vector
from sparsegraph.targets.target import Target

CODES = {
    "float32": "f", "float64": "d", "int64": "l", "int32": "i", "bool": "b", "uint8": "u",
    "int8": "c", "uint16": "h", "float16": "e",
}  # fmt: skip
CHUNK = 16384  # elements of one item of a RowMap: 10 us of copying, so threads cost little


def reference(tree: expression.Tree, *arrays: np.ndarray) -> np.ndarray:
    """NumPy's value, in float64 for float operands."""
    wide = [a.astype(np.float64) if a.dtype.kind == "f" else a for a in arrays]
    return expression.evaluate(tree, wide)


def _dtypes_text(dtypes: Sequence[str]) -> str:
    return "".join(CODES[d] for d in dtypes)


# ---------------------------------------------------------------- feature-major


@dataclass(frozen=True)
class FeatureMap:
    """y = tree(operands) on feature-major values.

    Arguments: y and its strides, then per operand the pointer and, if full, its strides; then
    tiles per image, features, block (points of a tile, a multiple of the lanes).
    Items: images * tiles.

    Attributes:
        tree: the expression.
        kinds: per operand `full`, `feature` or `scalar`.
        dtypes: element type per operand.
    """

    tree: expression.Tree
    kinds: tuple[str, ...]
    dtypes: tuple[str, ...]

    @property
    def out_dtype(self) -> str:
        return expression.dtype(self.tree, self.dtypes)

    @property
    def name(self) -> str:
        letters = {"full": "t", "feature": "v", "scalar": "s"}
        kinds = "".join(letters[k] + CODES[d] for k, d in zip(self.kinds, self.dtypes))
        return f"fmap_{expression.label(self.tree)}_{kinds}"

    @property
    def params(self) -> emit.Signature:
        words = [f"y:{self.out_dtype}*", "y_image:int32 y_tile:int32 y_row:int32"]
        for i, (kind, dtype) in enumerate(zip(self.kinds, self.dtypes)):
            words.append(f"x{i}:{dtype}*")
            if kind == "full":
                words.append(f"x{i}_image:int32 x{i}_tile:int32 x{i}_row:int32")
        return emit.signature(" ".join([*words, "tiles:int32 features:int32 block:int32"]))

    def body(self, target: Target) -> Any:
        lanes = target.lanes

        def emit_body(tiles: Expr, features: Expr, block: Expr, begin: Expr, end: Expr, **a: Expr):  # type: ignore[no-untyped-def]
            with emit.loop(begin, end) as item, emit.loop(0, features) as c:
                image = emit.bind(emit.T.truncdiv(item, tiles))
                tile = emit.bind(item - image * tiles)
                rows = [self._row(a, i, image, tile, c, lanes) for i in range(len(self.kinds))]
                y = emit.bind(image * a["y_image"] + tile * a["y_tile"] + c * a["y_row"])
                with emit.loop(0, emit.T.truncdiv(block, emit.const(lanes, "int32"))) as v:
                    operands = [row(v * lanes) for row in rows]
                    value = stored(expression.emit(self.tree, operands, lanes))
                    emit.store(a["y"], value, y + v * lanes, lanes)

        return emit_body

    def _row(self, a: dict[str, Expr], i: int, image: Expr, tile: Expr, c: Expr, lanes: int) -> Any:
        """Function from the first point to the operand's vector in row c."""
        x = a[f"x{i}"]
        if self.kinds[i] != "full":
            value = emit.bind(emit.load(x, c if self.kinds[i] == "feature" else 0))
            return lambda _: emit.splat(value, lanes)
        start = image * a[f"x{i}_image"] + tile * a[f"x{i}_tile"] + c * a[f"x{i}_row"]
        start = emit.bind(start)
        return lambda point: emit.bind(emit.load(x, start + point, lanes))


# ---------------------------------------------------------------- row-major


class Axes(NamedTuple):
    """Collapsed iteration space: extents, and one stride per axis for every operand."""

    extents: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]


def collapse(out_shape: Sequence[int], shapes: Sequence[Sequence[int]]) -> Axes:
    """Fewest axes over which row-major operands of `shapes` broadcast to `out_shape`.

    Neighbouring axes merge where every operand walks through them with one stride.
    """
    rank = len(out_shape)
    strides = [_strides((1,) * (rank - len(s)) + tuple(s)) for s in shapes]
    axes = [(n, tuple(s[i] for s in strides)) for i, n in enumerate(out_shape) if n != 1]
    merged: list[tuple[int, tuple[int, ...]]] = []
    for n, step in axes:
        if merged and all(outer == inner * n for outer, inner in zip(merged[-1][1], step)):
            merged[-1] = (merged[-1][0] * n, step)
        else:
            merged.append((n, step))
    merged = merged or [(1, (0,) * len(shapes))]
    return Axes(
        tuple(n for n, _ in merged),
        tuple(tuple(step[i] for _, step in merged) for i in range(len(shapes))),
    )


def _strides(shape: Sequence[int]) -> list[int]:
    """Row-major strides, 0 on axes of extent 1."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(0 if n == 1 else step)
        step *= n
    return strides[::-1]


@dataclass(frozen=True)
class RowMap:
    """y = tree(operands) with broadcasting over row-major values.

    Arguments: y, the operands, `inner` (extent of the innermost axis), `chunk` (elements of one
    item), then per outer axis its extent and every operand's stride on it.
    Items: product of the outer extents * ceil(inner / chunk). `row_map` makes them.

    Attributes:
        tree: the expression.
        dtypes: element type per operand.
        contiguous: per operand, true if the innermost axis is contiguous, false if repeated.
        n_outer: axes outside the innermost.
    """

    tree: expression.Tree
    dtypes: tuple[str, ...]
    contiguous: tuple[bool, ...]
    n_outer: int

    @property
    def out_dtype(self) -> str:
        return expression.dtype(self.tree, self.dtypes)

    @property
    def name(self) -> str:
        inner = "".join("v" if c else "s" for c in self.contiguous)
        types = _dtypes_text(self.dtypes)
        return f"rmap_{expression.label(self.tree)}_{types}_{inner}_o{self.n_outer}"

    @property
    def params(self) -> emit.Signature:
        words = [f"y:{self.out_dtype}*"]
        words += [f"x{i}:{d}*" for i, d in enumerate(self.dtypes)]
        words += ["inner:int32", "chunk:int32"]
        for axis in range(self.n_outer):
            words.append(f"n{axis}:int32")
            words += [f"x{i}_s{axis}:int32" for i in range(len(self.dtypes))]
        return emit.signature(" ".join(words))

    def body(self, target: Target) -> Any:
        def emit_body(inner: Expr, chunk: Expr, begin: Expr, end: Expr, **a: Expr) -> None:
            chunks = emit.bind(emit.T.truncdiv(inner + chunk - 1, chunk))
            with emit.loop(begin, end) as item:
                row = emit.bind(emit.T.truncdiv(item, chunks))
                first = emit.bind((item - row * chunks) * chunk)
                count = emit.bind(emit.tirx.Min(chunk, inner - first))
                starts = self._starts(a, row, first)
                self._run(a, starts, emit.bind(row * inner + first), count, target.lanes)

        return emit_body

    def _starts(self, a: dict[str, Expr], row: Expr, first: Expr) -> list[Expr]:
        """First element of every operand for outer index `row`."""
        starts = [first if c else emit.const(0, "int32") for c in self.contiguous]
        for axis in reversed(range(self.n_outer)):
            outer = emit.bind(emit.T.truncdiv(row, a[f"n{axis}"]))
            index = emit.bind(row - outer * a[f"n{axis}"])
            starts = [s + index * a[f"x{i}_s{axis}"] for i, s in enumerate(starts)]
            row = outer
        return [emit.bind(s) for s in starts]

    def _run(self, a: dict[str, Expr], starts: list[Expr], y: Expr, n: Expr, lanes: int) -> None:
        """`n` elements: whole vectors, then one by one."""
        fixed = [
            None if c else emit.bind(emit.load(a[f"x{i}"], starts[i]))
            for i, c in enumerate(self.contiguous)
        ]

        def step(at: Expr, width: int) -> None:
            operands = [
                emit.bind(emit.load(a[f"x{i}"], starts[i] + at, width))
                if value is None
                else emit.splat(value, width)
                for i, value in enumerate(fixed)
            ]
            value = stored(expression.emit(self.tree, operands, width))
            emit.store(a["y"], value, y + at, width)

        each_vector(n, lanes, step)


class RowCall(NamedTuple):
    """A `RowMap`, its arguments after the pointers, and the number of items."""

    kernel: RowMap
    scalars: tuple[int, ...]
    items: int


def row_map(
    tree: expression.Tree,
    out_shape: Sequence[int],
    shapes: Sequence[Sequence[int]],
    dtypes: Sequence[str],
    chunk: int = CHUNK,
) -> RowCall:
    """The kernel and arguments that compute `tree` on row-major operands of `shapes`."""
    axes = collapse(out_shape, shapes)
    kernel = RowMap(tree, tuple(dtypes), tuple(s[-1] == 1 for s in axes.strides),
                    len(axes.extents) - 1)  # fmt: skip
    inner = axes.extents[-1]
    scalars = [inner, chunk]
    for axis, n in enumerate(axes.extents[:-1]):
        scalars += [n, *(s[axis] for s in axes.strides)]
    rows = int(np.prod(axes.extents[:-1], dtype=np.int64))
    return RowCall(kernel, tuple(scalars), rows * -(-inner // chunk))


def _kernels() -> Iterator[FeatureMap | RowMap]:
    a, b, c = ("arg", 0), ("arg", 1), ("arg", 2)
    f = "float32"
    yield FeatureMap(("Relu", a), ("full",), (f,))
    yield FeatureMap(("Gelu", ("Add", a, b)), ("full", "feature"), (f, f))
    yield FeatureMap(("Add", ("Mul", a, b), c), ("full", "scalar", "full"), (f, f, f))
    yield FeatureMap(("Where", a, b, ("const", -1.0)), ("full", "full"), ("bool", f))
    yield RowMap(("Relu", a), (f,), (True,), 0)
    yield RowMap(("Gelu", a), (f,), (True,), 0)
    yield RowMap(("Add", a, b), (f, f), (True, True), 1)
    yield RowMap(("Mul", a, b), (f, f), (True, False), 1)
    yield RowMap(("Less", a, b), ("int64", "int64"), (True, False), 2)
    yield RowMap(("Cast", a, ("type", f)), ("int64",), (True,), 0)


KERNELS: tuple[FeatureMap | RowMap, ...] = tuple(_kernels())
