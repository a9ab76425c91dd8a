"""Products of a constant weight matrix with a feature-major activation: MatMul, Gemm, Conv.

    y[n, p] = epilogue(bias[n] + sum_k w[n, k] * x[k, p], operands[n, p] ...)

Scheme: for one tile of points and one tile of columns, the activation panel lies in the level 1
cache; a group of rows keeps its accumulators in registers and shares every activation load. The
partial sums of earlier column tiles wait in y; of vectors shorter than a cache line they are asked
for a few groups ahead. `coded` weights (sparsegraph.formats) are read in quads, groups with equal
counts after each other, so the work is proportional to the non-zero values and the loops' trip
counts repeat. Convolutions gather the panel of each column tile (im2col of one tile, never of the
whole map): kernels/gather.py. Where shorter vectors take less time, the last tile ends with its
points: with AVX-512 on Zen 4 ResNet-50 takes 3 (90 % zeros) to 5 % less time (dense), products of
49 points 6 to 12 %.

Every kernel is generic in all sizes and strides; the spec fixes only what changes the code.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from typing import Any

import numpy as np
from sparsegraph.targets import emit
from sparsegraph.targets.emit import Cell, Expr, bind, const, load, loop, splat, store, when
from sparsegraph.targets.kernels import expression, gather
from sparsegraph.targets.layout import LINE
from sparsegraph.targets.target import Target

from sparsegraph.formats import ALIKE, GROUPS_AHEAD, QUAD, QUADS_AHEAD, Packed

UNIT = 2  # float32 values; x86 scales an index by 8 bytes for nothing
BYTES = 0  # `Product.unit`: indices are not scaled


@dataclass(frozen=True)
class Product:
    """Spec of one product kernel.

    Attributes:
        weight: `dense` or `coded`.
        group: rows that are computed together: 1 to 4, `coded` 1, 2 or 4 (`formats.ALIKE`).
        split: vectors per pass over the tile; their sum is the tile's width in vectors.
        lanes: float32 values in a vector.
        gather: None for a matrix product; of a convolution how it gathers (`gather.Gather.step`).
        epilogue: expression over (accumulated value, operand 0, operand 1 ...), or None.
        operands: per operand `same` (feature-major like y) or `feature` (one value per row).
        batch: number of matrices of equal shape; image i takes matrix i modulo batch, one chunk of
            the packed weights each.
        near: column indices of `coded` are distances in the panel, in `unit`s; else columns.
        far: the panel is larger than the level 1 cache: its rows are asked for a few quads ahead.
        unit: float32 values that `near` counts, or `BYTES` (`Target.index_unit`).
        narrow: column indices of `coded` are loaded one by one (`Target.narrow_index`).
        joined: vectors that are computed as one; `split` is in multiples of it (`Target.joined`).
        line: elements of which a row of the gathered panel takes a multiple (`Target.panel_line`).
        points: points that are computed (`computed_points`) of every tile of an image, or of all
            but the last and of the last one. Empty: of all tiles all.
    """

    weight: str
    group: int
    split: tuple[int, ...]
    lanes: int
    gather: int | None = None
    epilogue: expression.Tree | None = None
    operands: tuple[str, ...] = ()
    batch: int = 1
    near: bool = False
    far: bool = False
    unit: int = UNIT
    narrow: bool = False
    joined: int = 1
    line: int = LINE
    points: tuple[int, ...] = ()

    @property
    def vectors(self) -> int:
        return sum(self.split)

    @property
    def block(self) -> int:
        """Points in one tile."""
        return self.vectors * self.lanes

    def passes(self, points: int) -> Iterator["_Pass"]:
        """The passes over the first `points` points of a tile."""
        lanes, first = self.lanes * self.joined, 0
        for vectors in self.split:
            whole, rest = divmod(min(vectors * self.lanes, points - first), lanes)
            yield _Pass(first, (lanes,) * whole + (rest,) * bool(rest))
            first += vectors * self.lanes
            if first >= points:
                return

    @property
    def gather_lanes(self) -> int:
        """Lanes of the vectors that fill the panel; a segment reads as many steps."""
        if self.gather == gather.FLAT:
            return min(self.lanes * self.joined, max(self.lanes, LINE))
        return self.lanes if (self.gather or 0) * self.lanes <= gather.SLACK else 1

    @property
    def panel_row(self) -> int:
        """Elements between rows of the gathered panel.

        The kernel takes it as an argument: with a constant here LLVM spills accumulators.
        """
        assert self.gather is not None
        return panel_row(self.gather, self.block, self.gather_lanes, self.line)

    @property
    def name(self) -> str:
        kind = "spmm" if self.weight == "coded" else "gemm"
        shape = f"r{self.group}_v" + "x".join(map(str, self.split)) + f"_l{self.lanes}"
        source = "" if self.gather is None else f"_gather{self.gather}"
        tail = "" if self.epilogue is None else f"_{expression.label(self.epilogue)}"
        kinds = "".join(k[0] for k in self.operands)
        source += f"_b{self.batch}" if self.batch > 1 else ""
        source += "_p" * bool(self.points) + "_".join(map(str, self.points))
        source += "_near" * self.near + "_far" * self.far + "_narrow" * self.narrow
        source += f"_unit{self.unit}" if self.unit != UNIT else ""
        source += f"_x{self.joined}" if self.joined > 1 else ""
        return f"{kind}_f32_{self.weight}_{shape}{source}{tail}{'_' + kinds if kinds else ''}"

    @property
    def params(self) -> emit.Signature:
        text = (
            "y:float32* y_image:int32 y_tile:int32 y_row:int32 "
            "x:float32* x_image:int32 x_tile:int32 x_row:int32 images:int32 tiles:int32 "
            "columns:int32 column_tile:int32 bias:float32* values:float32* "
        )
        if self.weight == "coded":
            record, index = ("int32", "uint16") if self.narrow else ("int64", "int64")
            text += f"groups:{record}* chunks:int32* column_index:{index}* counts:int32* "
        else:
            text += "slots:int32* chunks:int32* "
        if self.gather is not None:
            text += gather.PARAMS[self.gather == gather.FLAT]
        for i, kind in enumerate(self.operands):
            text += f"o{i}:float32* "
            if kind == "same":
                text += f"o{i}_image:int32 o{i}_tile:int32 o{i}_row:int32 "
        return emit.signature(text)

    def streams(self, packed: Packed) -> list[tuple[str, np.ndarray]]:
        """Name and array of the arguments `values` and what follows, as this kernel reads them."""
        values, chunks = ("values", packed.values), ("chunks", packed.chunks)
        if self.weight == "dense":
            return [values, ("rows", packed.slots), chunks]
        groups, columns = packed.slots, packed.column_index
        if self.narrow:
            columns = columns.view(np.uint16)
        else:
            groups = groups.view(np.int64)
        counts = ("counts", packed.counts)
        return [values, ("groups", groups), chunks, ("columns", columns), counts]

    def body(self, target: Target) -> Any:
        return lambda **args: _Emitter(self, args, target).run()

    def panel_bytes(self, column_tile: int) -> int:
        """Scratch for the gathered panel."""
        return 4 * self.panel_row * column_tile if self.gather is not None else 0


def panel_row(step: int, block: int, lanes: int, line: int) -> int:
    """Elements between rows of a panel of `block` points; segments may overshoot by a vector."""
    spare = 0 if step == gather.FLAT else lanes
    return -(-(block + spare) // line) * line


def joined(split: Sequence[int], target: Target) -> int:
    """`Product.joined` for passes of `split` vectors: as many as machine and passes take."""
    return math.gcd(target.joined, *split)


def computed_points(points: int, block: int, target: Target) -> tuple[int, ...]:
    """`Product.points` for images of `points` points in tiles of `block`.

    Of the last tile whole vectors, then one of 4, 8 ... lanes; nobody reads what lies behind them.
    """
    if not target.short_vectors:
        return ()
    last = points - (-(-points // block) - 1) * block
    whole, rest = divmod(last, target.lanes)
    short = max(QUAD, 1 << (rest - 1).bit_length()) if rest else 0
    last = whole * target.lanes + short
    if last == block:
        return ()
    return (last,) if points <= block else (block, last)


@dataclass(frozen=True)
class _Pass:
    """Vectors that are computed at once.

    Attributes:
        first: the point of the tile where they begin.
        lanes: of each vector; the last may be shorter than the others.
    """

    first: int
    lanes: tuple[int, ...]

    @property
    def spans(self) -> Iterator[tuple[int, int]]:
        """(first point, lanes) of each vector, counted from the first."""
        return zip(range(0, len(self.lanes) * self.lanes[0], self.lanes[0]), self.lanes)

    @property
    def points(self) -> int:
        return sum(self.lanes)


_Sums = list[list[Cell]]  # by row and vector
_Place = tuple[Expr, Expr]  # a buffer and an index
_Spread = dict[int, Expr]  # number of lanes -> a value over as many


class _Emitter:
    """Loops of one product kernel, outermost first."""

    def __init__(self, spec: Product, args: dict[str, Expr], target: Target) -> None:
        self.spec = spec
        self.a = args
        self.prefetches = target.output in ("library", "bare")
        self.index = "int64" if "64" in target.arch else "int32"  # of the coded streams
        self.scalar_factors = target.scalar_factors
        self.spares = target.narrow_index  # instructions
        self.segment = target.segment
        self.joins_pairs = target.joined > 1
        self.chains = target.chains
        self.indices_ahead = target.indices_ahead
        self.is_short = target.n_registers <= 16

    def run(self) -> None:
        a = self.a
        self.cursors = {n: Cell("int32") for n in ("value", "column", "tile", "slot")}
        per_chunk = bind(a["images"] * a["tiles"])
        self.n_tiles = bind(emit.divide(a["columns"] + a["column_tile"] - 1, a["column_tile"]))
        with loop(a["begin"], a["end"]) as item:
            chunk = bind(emit.divide(item, per_chunk))
            point = bind(emit.modulo(item, per_chunk))
            self.image = bind(emit.divide(point, a["tiles"]))
            self.tile = bind(emit.modulo(point, a["tiles"]))
            if self.spec.batch > 1:
                chunk = bind(emit.modulo(self.image, self.spec.batch))
            for i, cursor in enumerate(self.cursors.values()):
                cursor.set(load(a["chunks"], chunk * 5 + i))
            parts = bind(load(a["chunks"], chunk * 5 + 4))
            if self.spec.weight == "dense":
                with loop(0, self.n_tiles) as t:
                    self.column_tile(t, parts)
            else:
                with loop(0, parts), loop(0, self.n_tiles) as t:
                    self.column_tile(t, parts)

    def column_tile(self, t: Expr, groups: Expr) -> None:
        a, spec = self.a, self.spec
        start = bind(t * a["column_tile"])
        width = bind(emit.minimum(a["column_tile"], a["columns"] - start))
        if spec.gather is None:
            self.panel, self.panel_row = a["x"], a["x_row"]
            base = self.image * a["x_image"] + self.tile * a["x_tile"] + start * a["x_row"]
            self.panel_base = bind(base)
        else:
            kind = (spec.gather, spec.block // spec.gather_lanes, spec.gather_lanes)
            panel = gather.Gather(
                a, *kind, by_vector=self.spares, segment=self.segment, joins_pairs=self.joins_pairs
            )
            panel.fill(self.image, self.tile, start, width)
            self.panel, self.panel_row = a["panel"], a["panel_row"]
            self.panel_base = const(0, "int32")
        of_tile = {name: bind(cursor.get()) for name, cursor in self.cursors.items()}

        def tile(points: int) -> None:
            for part in spec.passes(points):
                self.part, self.lanes = part, part.lanes[0]
                for name, cursor in self.cursors.items():  # every pass reads the same weights
                    cursor.set(of_tile[name])
                if spec.weight == "dense":
                    self.dense(t, groups, width)
                else:
                    self.coded(t)

        whole, *last = spec.points or (spec.block,)
        if last:
            with emit.choose(self.tile < a["tiles"] - 1) as (then, otherwise):
                with then:
                    tile(whole)
                with otherwise:
                    tile(*last)
        else:
            tile(whole)
        if spec.weight == "dense":
            self.cursors["slot"].set(of_tile["slot"])

    def dense(self, t: Expr, groups: Expr, width: Expr) -> None:
        """All groups of rows: every column of the tile for each of them."""
        panel, group = bind(self.panel_base + self.part.first), self.spec.group
        with loop(0, groups):
            slot = bind(self.cursors["slot"].get())
            self.cursors["slot"].set(slot + group)
            rows = [bind(load(self.a["slots"], slot + r)) for r in range(group)]
            acc, at = self.begin_group(t, rows)
            value = bind(self.cursors["value"].get())
            with loop(0, width) as k:
                weights = (self.spread("values", value + k * group + r) for r in range(group))
                self.multiply(acc, weights, (self.panel, panel + k * self.panel_row))
            self.cursors["value"].set(value + width * group)
            self.end_group(t, acc, at, rows)

    def coded(self, t: Expr) -> None:
        """All groups: each tells its rows and counts; the cursors run through all of them.

        Every load beside those of the sums would cost half a cycle: hence one record per group, and
        no state that would not fit in registers.
        """
        a, spec, cursors = self.a, self.spec, self.cursors
        part, first = bind(cursors["tile"].get()), bind(cursors["slot"].get())
        n_groups = bind(load(a["counts"], part))
        starts = [self.wide(cursors[name].get()) for name in ("value", "column")]
        quads = _Quads(self, self.wide(self.panel_base + self.part.first), *starts)
        with loop(0, n_groups) as i:
            record = self.wide(first + i)
            rows = self.rows(record)
            both, single = (self.wide(n) for n in self.pair_of(record * 2 + 1))
            self.prefetch(record + GROUPS_AHEAD)
            acc, at = self.begin_group(t, rows)
            turns = self.turns(acc)
            if spec.group > 1:
                with loop(0, both):
                    self.both(turns, quads)
            if spec.group < ALIKE:
                self.singles(turns, quads, single)
            self.join(turns)
            self.end_group(t, acc, at, rows)
        cursors["value"].set(emit.as_int(quads.value.get()))
        cursors["column"].set(emit.as_int(quads.column.get()))
        cursors["tile"].set(part + 1)
        cursors["slot"].set(first + n_groups)

    def rows(self, record: Expr) -> list[Expr]:
        """The rows of a group."""
        first, last = self.pair_of(record * 2)
        if self.spec.group < ALIKE:
            return [first, last][: self.spec.group]
        return [first, *(bind(first + r) for r in range(1, ALIKE))]

    def pair_of(self, word: Expr) -> list[Expr]:
        """The two numbers in a word of `groups`."""
        groups = self.a["groups"]
        if self.spec.narrow:
            return [bind(load(groups, word * 2 + i)) for i in range(2)]
        both = bind(load(groups, word))
        return [bind(both & const(0xFFFFFFFF, "int64")), bind(both >> const(32, "int64"))]

    def turns(self, acc: _Sums) -> list[_Sums]:
        """Sums that take turns: with few, each multiply-add would wait for the one before.

        On Zen 5 with tiles of 2 vectors 6 % less time at 80 % zeros, up to 3 % at 90; with tiles of
        4 vectors 6 to 10 % at 50 % zeros; four rows that share all columns 5 to 12 %.
        """
        if len(acc) * len(acc[0]) >= self.chains:
            return [acc]
        more = [[Cell("float32", n) for n in self.part.lanes] for _ in acc]
        for cells in more:
            for n, cell in zip(self.part.lanes, cells):
                cell.set(splat(const(0.0), n))
        return [acc, more]

    def join(self, turns: Sequence[_Sums]) -> None:
        """Add what took turns to the first."""
        for acc, more in pairwise(turns):
            for cells, others in zip(acc, more):
                for cell, other in zip(cells, others):
                    cell.set(cell.get() + other.get())

    def both(self, turns: Sequence[_Sums], quads: "_Quads") -> None:
        """Four columns that all rows of the group have."""
        columns, n = quads.columns(), self.spec.group
        for first in range(0, QUAD, QUAD // n):
            weights = quads.values()
            for i in range(first, first + QUAD // n):
                self.multiply(turns[i % len(turns)], islice(weights, n), columns[i])
            quads.advance()

    def singles(self, turns: Sequence[_Sums], quads: "_Quads", n: Expr) -> None:
        """All quads of single rows; two at a time where the loop's own instructions count."""
        if not self.spares:
            with loop(0, n):
                self.single(turns, quads)
            return
        pairs = bind(emit.divide(n, const(2, self.index)))
        with loop(0, pairs):
            self.single(turns, quads)
            self.single(turns, quads)
        with when(pairs * 2 < n):
            self.single(turns, quads)

    def single(self, turns: Sequence[_Sums], quads: "_Quads") -> None:
        columns, weights = quads.columns(), quads.values()
        for k, place in enumerate(columns):
            turn, row = divmod(k, self.spec.group)
            self.multiply([turns[turn % len(turns)][row]], islice(weights, 1), place)
        quads.advance()

    def spread(self, name: str, index: Expr) -> _Spread:
        """One value of a buffer over all lanes."""
        value = load(self.a[name], index)
        return {n: bind(splat(value, n)) for n in dict.fromkeys(self.part.lanes)}

    def wide(self, x: Expr) -> Expr:
        """`x` as wide as an address, once: not extended again at every use."""
        return bind(emit.T.cast(x, self.index))

    def begin_group(self, t: Expr, rows: Sequence[Expr]) -> tuple[_Sums, list[Expr]]:
        """Accumulators with the bias or the partial sums, and where they lie in y."""
        a = self.a
        base = self.image * a["y_image"] + self.tile * a["y_tile"] + self.part.first
        at = [bind(base + row * a["y_row"]) for row in rows]
        acc = [[Cell("float32", n) for n in self.part.lanes] for _ in rows]
        with emit.choose(t == 0) as (then, otherwise):
            with then:
                for row, cells in zip(rows, acc):
                    bias = self.spread("bias", row)
                    for n, cell in zip(self.part.lanes, cells):
                        cell.set(bias[n])
            with otherwise:
                for start, cells in zip(at, acc):
                    for (first, n), cell in zip(self.part.spans, cells):
                        cell.set(load(a["y"], start + first, n))
        return acc, at

    def prefetch(self, record: Expr) -> None:
        """Ask for the memory of a later group's sums: a store that misses is slower than a load.

        Not if a vector fills a cache line, so that a store need not read it: on Zen 5 products of
        AVX-512 took 0 to 5 % more time, of 3x3 windows 5 to 10 %.
        """
        is_short = self.spares and self.spec.block < LINE  # rows lie side by side in a line
        if not self.prefetches or self.spec.lanes >= LINE or is_short:
            return
        a = self.a
        base = self.image * a["y_image"] + self.tile * a["y_tile"] + self.part.first
        for row in self.rows(record):
            ahead = bind(base + row * a["y_row"])
            for point in range(0, self.part.points, LINE):
                emit.prefetch(a["y"], ahead + point)

    def end_group(
        self, t: Expr, acc: Sequence[Sequence[Cell]], at: Sequence[Expr], rows: Sequence[Expr]
    ) -> None:
        """Store the sums; in the last column tile through the epilogue."""
        if self.spec.epilogue is None:
            self.store(acc, at)
            return
        with emit.choose(t == self.n_tiles - 1) as (then, otherwise):
            with then:
                self.finish(acc, at, rows)
            with otherwise:
                self.store(acc, at)

    def multiply(
        self, rows: Sequence[Sequence[Cell]], weights: Iterable[_Spread], place: _Place
    ) -> None:
        """rows[r][v] += weights[r] * x[v] for one column.

        In registers are all weights and one x, or where they are short and rows are more than
        vectors, all x and one weight.
        """
        lanes, (panel, index) = self.part.lanes, place
        at = bind(index)
        xs = (bind(load(panel, at + first, n)) for first, n in self.part.spans)
        if self.is_short and len(rows) > len(rows[0]):
            inner = list(xs)
            terms = (((r, v), w, x) for r, w in enumerate(weights) for v, x in enumerate(inner))
        else:
            factors = list(weights)
            terms = (((r, v), w, x) for v, x in enumerate(xs) for r, w in enumerate(factors))
        for (r, v), w, x in terms:
            rows[r][v].set(rows[r][v].get() + w[lanes[v]] * x)

    def store(self, acc: Sequence[Sequence[Cell]], at: Sequence[Expr]) -> None:
        for r in reversed(range(len(acc))):  # a repeated row is stored before the real one
            for (first, n), cell in zip(self.part.spans, acc[r]):
                store(self.a["y"], cell.get(), at[r] + first, n)

    def finish(
        self, acc: Sequence[Sequence[Cell]], at: Sequence[Expr], rows: Sequence[Expr]
    ) -> None:
        """Epilogue. Costly expressions run in a loop over what was just stored: less code."""
        lanes, tree = self.lanes, self.spec.epilogue
        assert tree is not None
        cheap = expression.is_cheap(tree)
        for r in reversed(range(len(acc))):  # as in `store`, repeated rows come first
            operands = self.operand_loads(rows[r])
            if cheap:
                for (first, n), cell in zip(self.part.spans, acc[r]):
                    values = [cell.get(), *(o(first, n) for o in operands)]
                    store(self.a["y"], expression.emit(tree, values, n), at[r] + first, n)
                continue
            for (first, n), cell in zip(self.part.spans, acc[r]):
                store(self.a["y"], cell.get(), at[r] + first, n)
            with loop(0, len(acc[r])) as v:  # what follows a short vector does not matter
                value = load(self.a["y"], at[r] + v * lanes, lanes)
                values = [bind(value), *(o(v * lanes, lanes) for o in operands)]
                result = expression.emit(tree, values, lanes)
                store(self.a["y"], result, at[r] + v * lanes, lanes)

    def operand_loads(self, row: Expr) -> list[Any]:
        """Per operand a function from point of the pass and lanes to its vector."""
        a = self.a
        loads: list[Any] = []
        for i, kind in enumerate(self.spec.operands):
            if kind == "feature":
                loads.append(partial(_constant, self.spread(f"o{i}", row)))
                continue
            base = self.image * a[f"o{i}_image"] + self.tile * a[f"o{i}_tile"]
            base = bind(base + row * a[f"o{i}_row"] + self.part.first)
            loads.append(partial(_load_from, a[f"o{i}"], base))
        return loads


class _Quads:
    """Reads the two streams of `coded` four entries at a time: values one quad ahead, indices more.

    Addresses that wait for a load hold up the loads behind them: see `Target.indices_ahead`.

    Eight scalar loads per quad would take as many load slots as half its activations do. The quad
    of values is repeated over the vector and carried through the loop, so that LLVM splats it
    within 128 bits by a shuffle; straight from memory it would turn it back into four loads. (Four
    rows that share all columns have few loads and no register to spare: there it is four loads,
    and indices are loaded where they are used.)
    Scalars are loaded where they are used: carried through the loop, LLVM gathers them in a vector;
    so are indices that are loaded one by one.
    """

    def __init__(self, emitter: _Emitter, panel: Expr, value: Expr, column: Expr) -> None:
        self.e, self.lanes, self.panel = emitter, emitter.lanes, panel
        self.value, self.column = Cell(emitter.index), Cell(emitter.index)
        self.value.set(value)
        self.column.set(column)
        self.step = emitter.wide(emitter.panel_row)
        if emitter.spec.near:
            self.step = const(emitter.spec.unit, emitter.index)
            if emitter.spec.unit == BYTES:
                self.memory = emit.moved(emitter.panel, panel * 4)
        self.is_wide = (
            self.lanes % QUAD == 0 and not emitter.scalar_factors and emitter.spec.group < ALIKE
        )
        self.is_ahead = not emitter.spec.narrow and emitter.spec.group < ALIKE
        if self.is_ahead:
            at = bind(self.column.get())
            self.words = [Cell("int64") for _ in range(emitter.indices_ahead)]
            for i, word in enumerate(self.words):
                word.set(self._word(at + i))
        if self.is_wide:
            self.quad = Cell("float32", self.lanes)
            self.load_values()

    def columns(self) -> list[_Place]:
        """Where the panel rows of the next four columns lie."""
        at = bind(self.column.get())
        self.column.set(at + 1)
        if self.e.spec.far and self.e.prefetches:
            for panel, row in self._places(self._indices(at + QUADS_AHEAD)):
                row = bind(row)
                for point in range(0, self.e.spec.block, LINE):
                    emit.prefetch(panel, row + point, is_written=False)
        if not self.is_ahead:
            return self._places(self._indices(at))
        parts = self._parts(bind(self.words[0].get()))
        for word, following in pairwise(self.words):
            word.set(following.get())
        self.words[-1].set(self._word(at + len(self.words)))
        return self._places(parts)

    def _places(self, parts: list[Expr]) -> list[_Place]:
        if self.e.spec.near and self.e.spec.unit == BYTES:
            return [(emit.moved(self.memory, k), const(0, "int32")) for k in parts]
        return [(self.e.panel, self.panel + k * self.step) for k in parts]

    def _indices(self, quad: Expr) -> list[Expr]:
        index = self.e.a["column_index"]
        if self.e.spec.narrow:
            return [self.e.wide(load(index, quad * QUAD + i)) for i in range(QUAD)]
        return self._parts(bind(load(index, quad)))

    def _parts(self, word: Expr) -> list[Expr]:
        mask = const(0xFFFF, "int64")
        return [self.e.wide((word >> const(16 * i, "int64")) & mask) for i in range(QUAD)]

    def values(self) -> Iterator[_Spread]:
        """The next four values, each over all lanes; of four rows each when it is asked for."""
        if not self.is_wide:
            start = bind(self.value.get())
            found = (self.e.spread("values", start + i) for i in range(QUAD))
            return found if self.e.spec.group == ALIKE else iter(list(found))
        quad, sizes = bind(self.quad.get()), dict.fromkeys(self.e.part.lanes)
        lane = [j for j in range(0, self.lanes, QUAD) for _ in range(QUAD)]
        return (
            {n: emit.shuffle([quad], [j + i for j in lane[:n]]) for n in sizes} for i in range(QUAD)
        )

    def advance(self) -> None:
        """Go on to the next four values."""
        self.value.set(self.value.get() + QUAD)
        if self.is_wide:
            self.load_values()

    def _word(self, quad: Expr) -> Expr:
        return load(self.e.a["column_index"], quad)

    def load_values(self) -> None:
        values, start = self.e.a["values"], bind(self.value.get())
        quad = bind(load(values, start, QUAD))
        copies = [quad] * (self.lanes // QUAD)
        whole = quad if self.lanes == QUAD else emit.shuffle(copies, range(self.lanes))
        self.quad.set(whole)


def _constant(value: _Spread, at: Any, lanes: int) -> Expr:
    return value[lanes]


def _load_from(pointer: Expr, base: Expr, at: Any, lanes: int) -> Expr:
    return load(pointer, base + at, lanes)


def reference(
    weight: np.ndarray, x: np.ndarray, bias: np.ndarray, epilogue: Any = None, *operands: Any
) -> np.ndarray:
    """The meaning: weight [rows, columns], x [columns, points] -> [rows, points], float64."""
    y = bias.astype(np.float64)[:, None] + weight.astype(np.float64) @ x.astype(np.float64)
    return y if epilogue is None else expression.evaluate(epilogue, [y, *operands])
