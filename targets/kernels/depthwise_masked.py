"""Depthwise convolution that reads a map where it lies: no padded copy of it.

    y[m, oy, ox] = epilogue(bias[m] + sum over taps of w[m, ky, kx] * x[m // multiplier, iy, ix])

Each vector of columns is computed from the top down: a row of the map is read once and adds to the
sums of all rows of the result that it touches, of which the topmost is then complete. Few registers
hold addresses or sums, so that the weights stay in the others, as many as there is room for
(`_Memory`). `rows` rows of the result are computed before the next columns, so that what neighbours
share is still in the level 1 cache.

Columns outside the map are cleared by bits, which hide whatever the vector holds there (the end of
the row above, NaN); rows outside it are skipped. Vectors away from the borders have code of their
own, and so have the last rows of the result. Horizontal stride 1 or 2: with stride 2 one shuffle
within 128 bits takes every second value of two vectors, and the sums are put in order at the end.
Items are images * output channels.

With `expand` x is not in memory but the product of a few planes: channel by channel

    x[m] = expand(expand_bias[m] + sum over n in [starts[m], starts[m + 1]) of
                  values[n] * z[columns[n]])

so that a wide map never leaves the level 1 or 2 cache. `columns` holds offsets (channel * z_row).

Weights with many zeros are `coded`: those of channel m are weights[n] at tap taps[n], with n in
[firsts[m], firsts[m + 1]) (`sparsegraph.compressed_rows`). They are laid out before a plane is
computed: memory is saved, not time.

Planes at least a vector wide are written straight away (`direct`), other layouts through a flat
plane in scratch. Planes are faster: one row of a tile after the other lies far apart, and each
store opens a line in another page (32@112: 120 us straight to planes, 150 to tiles).

Measured with AVX-512, 3x3, microseconds with four rows at a time and from the top down: 128@56 108
to 87, 256@28 62 to 42, 1024@7 50 to 33; stride 2: 64@112 97 to 84, 256@28 32 to 24, 512@14 42 to 18
(two vectors of 8 lanes take the place of one of 16). 32@112 waits for memory: 72 either way.
With AVX2, weights and masks that LLVM spills and those that are read at every use: 512@14 40 to 33,
960@7 37 to 30, 5x5 480@14 80 to 76.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from sparsegraph.targets import emit
from sparsegraph.targets.emit import Cell, Expr, T, bind, const, load, loop, splat, store, when
from sparsegraph.targets.kernels import expression
from sparsegraph.targets.kernels.convert import zero_after
from sparsegraph.targets.kernels.math import bits
from sparsegraph.targets.kernels.window import Window, operand_params
from sparsegraph.targets.target import Target

from sparsegraph.formats import QUAD

MOST_TAPS = 49  # written out once with masks and once without
LEAD = 16  # values before a plane that may be read
_OTHERS = 3  # registers for the bias and for what an epilogue holds


@dataclass(frozen=True)
class Border:
    """How windows reach over the edges of a map.

    Attributes:
        pads: (top, left).
        below: rows below the map that are read.
        masked: per kernel column whether it ever lies outside.
    """

    pads: tuple[int, int]
    below: int
    masked: tuple[bool, ...]

    @property
    def name(self) -> str:
        numbers = "_".join(map(str, (*self.pads, self.below)))
        return f"p{numbers}_m{''.join(str(int(m)) for m in self.masked)}"


def border(
    window: Window, size: tuple[int, int], pads: tuple[int, int], out: tuple[int, int]
) -> Border:
    """The border of a map of `size` under windows that begin at `-pads`."""
    (kh, kw), (sy, sx), (dy, dx) = window.kernel, window.stride, window.dilation
    below = max(0, (out[0] - 1) * sy + (kh - 1) * dy - pads[0] - size[0] + 1)
    ends = [kx * dx - pads[1] for kx in range(kw)]
    masked = tuple(e < 0 or (out[1] - 1) * sx + e >= size[1] for e in ends)
    return Border(pads, below, masked)


@dataclass(frozen=True)
class MaskedDepthwise:
    """Spec of one kernel.

    Attributes:
        window: kernel, stride, dilation, one row at a time, lanes.
        border: what lies outside.
        direct: y is planar and at least `lanes` wide, no operand is feature-major.
        epilogue: expression over (accumulated value, operand 0, operand 1 ...), or None.
        operands: per operand `same` (feature-major like y) or `feature` (one value per channel).
        expand: vectors in a tile of z and the expression that makes x of a sum; None: x is read.
        coded: weights are stored without their zeros.
        spread: weights that registers have no room for are read as vectors, from scratch.
    """

    window: Window
    border: Border
    direct: bool = False
    epilogue: expression.Tree | None = None
    operands: tuple[str, ...] = ()
    expand: "Expand | None" = None
    coded: bool = False
    spread: bool = False

    def __post_init__(self) -> None:
        assert self.window.stride[1] in (1, 2)
        assert not (self.direct and "same" in self.operands)
        assert self.border.pads[1] <= LEAD or self.expand

    @property
    def name(self) -> str:
        parts = [f"depthwise_f32_{self.window.name}", self.border.name]
        parts += ["direct" * self.direct, "coded" * self.coded, "spread" * self.spread]
        if self.epilogue is not None:
            parts.append(expression.label(self.epilogue))
        parts.append("".join(k[0] for k in self.operands))
        parts.append(self.expand.name if self.expand else "")
        return "_".join(filter(None, parts))

    @property
    def params(self) -> emit.Signature:
        source = "x:float32* x_image:int32 x_row:int32 "
        if self.expand:
            source = (
                "z:float32* z_image:int32 z_tile:int32 z_tiles:int32 starts:int32* columns:int32* "
                + "values:float32* expand_bias:float32* "
            )
        text = (
            "y:float32* y_image:int32 y_tile:int32 y_row:int32 "
            + source
            + "scratch:float32* height:int32 width:int32 out_height:int32 out_width:int32 "
            + "rows:int32 block:int32 channels:int32 weights:float32* "
            + "taps:uint8* firsts:int32* " * self.coded
            + "bias:float32* multiplier:int32 "
        )
        return emit.signature(text + operand_params(self.operands))

    @property
    def laid_out(self) -> tuple[int, int]:
        """Values of scratch for the weights of a channel: one by one, and as vectors."""
        lanes, n = self.window.lanes, math.prod(self.window.kernel)
        return self.coded * -(-n // lanes) * lanes, self.spread * n * lanes

    def scratch_bytes(self, width: int, out: tuple[int, int], block: int, z_points: int) -> int:
        """Scratch of one thread; `z_points`: those of all tiles of z, 0 without `expand`."""
        lanes = self.window.lanes
        n = sum(self.border.masked) * -(-out[1] // lanes) * lanes + sum(self.laid_out)
        if not self.direct:
            n += out[0] * out[1] + block + 4 * lanes
        if self.expand:
            rows = self.border.pads[0] + self.border.below
            across = (self.window.kernel[1] - 1) * self.window.dilation[1]
            n += rows * width + z_points + across + 4 * LEAD + 8 * lanes
        return int(4 * n)

    def body(self, target: Target) -> Any:
        return lambda **args: _Emitter(self, args, target).run()


@dataclass(frozen=True)
class Expand:
    """The product that makes the map.

    Attributes:
        vectors: in a tile of z.
        epilogue: expression over the sum alone, or None.
    """

    vectors: int
    epilogue: expression.Tree | None

    @property
    def name(self) -> str:
        tail = "" if self.epilogue is None else f"_{expression.label(self.epilogue)}"
        return f"of_v{self.vectors}{tail}"


class _Emitter:
    def __init__(self, spec: MaskedDepthwise, args: dict[str, Expr], target: Target) -> None:
        self.index = "int64" if "64" in target.arch else "int32"  # as wide as an address
        self.scalar_factors = target.scalar_factors
        self.spec, self.a, self.window, self.lanes = spec, args, spec.window, spec.window.lanes
        lanes = self.lanes
        self.even = list(range(0, 2 * lanes, 2))
        is_picked = spec.window.stride[1] == 2
        # RVV: 31 instructions a row, not 85
        self.joins_pairs = is_picked and target.joined > 1
        if is_picked and lanes > 4 and not self.joins_pairs:
            self.even = [s + q + i for q in range(0, lanes, 4) for s in (0, lanes) for i in (0, 2)]
        # lane i of a vector of taps belongs to point order[i] of the result
        self.order = [e // 2 for e in self.even] if is_picked else list(range(lanes))
        self.taps = [kx for kx, is_masked in enumerate(spec.border.masked) if is_masked]
        self.room = _Room.of(spec.window, len(self.taps), target)

    # ------------------------------------------------------------ loops

    def run(self) -> None:
        a, lanes = self.a, self.lanes
        self.points = bind(a["out_height"] * a["out_width"])
        self.n_columns = bind(self.vectors(a["out_width"]))
        self.last_column = bind(emit.maximum(a["out_width"] - lanes, const(0, "int32")))
        self.tiles = bind(emit.divide(self.points + a["block"] - 1, a["block"]))
        self.fill_masks()
        self.laid_out = bind(self.n_columns * (len(self.taps) * lanes))
        self.still = emit.hidden_zero(a["width"])
        self.vectors_at = bind(self.laid_out + self.spec.laid_out[0])
        self.flat: Expr = bind(self.vectors_at + self.spec.laid_out[1])
        if self.spec.expand:
            self.open_map()
        with loop(a["begin"], a["end"]) as item:
            image = bind(emit.divide(item, a["channels"]))
            self.plane(image, bind(item - image * a["channels"]))

    def vectors(self, n: Expr) -> Expr:
        return emit.divide(n + (self.lanes - 1), self.lanes)

    def plane(self, image: Expr, channel: Expr) -> None:
        """One plane of the result: some rows of all columns, then the next rows."""
        a, w, lanes = self.a, self.window, self.lanes
        if self.spec.expand:
            self.fill_map(self.spec.expand, image, channel)
            x = self.map
        else:
            x = bind(image * a["x_image"] + emit.divide(channel, a["multiplier"]) * a["x_row"])
        y = bind(image * a["y_image"] + channel * a["y_row"])
        self.prepare(channel)
        with loop(0, emit.divide(a["out_height"] + a["rows"] - 1, a["rows"])) as part:
            oy = bind(part * a["rows"])
            rows = bind(emit.minimum(a["rows"], a["out_height"] - oy))
            at = bind(x + (oy * w.stride[0] - self.spec.border.pads[0]) * a["width"])
            to = bind((y if self.spec.direct else self.flat) + oy * a["out_width"])
            with loop(0, self.n_columns) as v:
                ox = bind(emit.minimum(v * lanes, self.last_column))
                first, begin = bind(at + ox * w.stride[1]), bind(to + ox)
                if self.taps:
                    with emit.choose(self.columns_inside(ox)) as (then, otherwise):
                        with then:
                            self.down(first, begin, oy, rows, None)
                        with otherwise:
                            self.down(first, begin, oy, rows, bind(v * (len(self.taps) * lanes)))
                else:
                    self.down(first, begin, oy, rows, None)
        self.end_plane(image, channel, y)

    def prepare(self, channel: Expr) -> None:
        """What stays the same over one plane."""
        a, lanes = self.a, self.lanes
        n_taps = math.prod(self.window.kernel)
        if self.spec.coded:
            self.lay_out(channel)
        self.source = a["scratch" if self.spec.coded else "weights"]
        self.first = self.laid_out if self.spec.coded else bind(channel * n_taps)
        self.weights = self.spread(self.source, self.first, self.room.weights)
        if self.spec.spread:
            for tap in range(self.room.weights_beside_masks, n_taps):
                value = splat(load(self.source, self.first + tap), lanes)
                store(a["scratch"], value, self.vectors_at + tap * lanes, lanes)
        self.bias = bind(splat(load(a["bias"], channel), lanes))
        kinds = enumerate(self.spec.operands)
        names = [f"o{i}" if kind == "feature" else None for i, kind in kinds]
        self.constants = [n and bind(splat(load(a[n], channel), lanes)) for n in names]

    def lay_out(self, channel: Expr) -> None:
        """All weights of a channel in scratch, zeros too."""
        a = self.a
        self.zeros(self.laid_out, const(self.spec.laid_out[0], "int32"))
        with loop(load(a["firsts"], channel), load(a["firsts"], channel + 1)) as n:
            tap = T.cast(load(a["taps"], n), "int32")
            store(a["scratch"], load(a["weights"], n), self.laid_out + tap)

    def spread(self, weights: Expr, first: Expr, n: int) -> list[Expr]:
        """A vector of each of n weights, which share registers where instructions name a lane."""
        lanes = self.lanes
        if lanes != QUAD or n < QUAD or self.scalar_factors:
            return [bind(splat(load(weights, first + i), lanes)) for i in range(n)]
        starts = [_quad(i, n) for i in range(n)]
        quads = {start: bind(load(weights, first + start, QUAD)) for start in sorted(set(starts))}
        return [emit.shuffle([quads[at]], [i - at] * QUAD) for i, at in enumerate(starts)]

    # ------------------------------------------------------------ the map from a product

    def open_map(self) -> None:
        """Where x lies in scratch: zero rows above, then the plane."""
        a, pads = self.a, self.spec.border.pads
        start = self.flat
        if not self.spec.direct:
            start = start + (self.points + a["block"] + 4 * self.lanes)
        lead = bind(pads[0] * a["width"] + (pads[1] + LEAD))
        start = bind(emit.divide(start + LEAD - 1, LEAD) * LEAD)
        self.map = bind(start + emit.divide(lead, LEAD) * LEAD)
        self.zeros(start, bind(self.map - start))

    def zeros(self, start: Expr, n: Expr) -> None:
        """At least n zeros, whole vectors."""
        with loop(0, self.vectors(n)) as v:
            zero = splat(const(0.0), self.lanes)
            store(self.a["scratch"], zero, start + v * self.lanes, self.lanes)

    def fill_map(self, expand: Expand, image: Expr, channel: Expr) -> None:
        """One channel of the product, tile by tile; rows below it are zero again."""
        a, lanes = self.a, self.lanes
        first, stop = bind(load(a["starts"], channel)), bind(load(a["starts"], channel + 1))
        bias = bind(splat(load(a["expand_bias"], channel), lanes))
        with loop(0, a["z_tiles"]) as tile:
            z = bind(image * a["z_image"] + tile * a["z_tile"])
            acc = [Cell("float32", lanes) for _ in range(expand.vectors)]
            for cell in acc:
                cell.set(bias)
            with loop(first, stop) as n:
                weight = bind(splat(load(a["values"], n), lanes))
                row = bind(z + load(a["columns"], n))
                for v, cell in enumerate(acc):
                    cell.set(cell.get() + weight * load(a["z"], row + v * lanes, lanes))
            to = bind(self.map + tile * (expand.vectors * lanes))
            for v, cell in enumerate(acc):
                value = cell.get()
                if expand.epilogue is not None:
                    value = expression.emit(expand.epilogue, [value], lanes)
                store(a["scratch"], value, to + v * lanes, lanes)
        if self.spec.border.below:
            end = bind(self.map + a["height"] * a["width"])
            self.zeros(end, a["width"] * self.spec.border.below)

    # ------------------------------------------------------------ windows

    def columns_inside(self, ox: Expr) -> Expr:
        """True if no tap of the vector at column ox of the result lies outside."""
        step, last = self.window.stride[1], self.window.kernel[1] - 1
        end = (ox + (self.lanes - 1)) * step + self.offset(last)
        return T.And(ox * step + self.offset(0) >= 0, end < self.a["width"])

    def offset(self, kx: int) -> int:
        """Column of tap kx relative to stride * the result's column."""
        return int(kx * self.window.dilation[1] - self.spec.border.pads[1])

    def fill_masks(self) -> None:
        """For every vector of a row and every masked tap the bits of the lanes inside the map."""
        lanes, step = self.lanes, self.window.stride[1]
        zero, one = (splat(const(i, "int32"), lanes) for i in (0, 1))
        lane = emit.shuffle([const(i, "int32") for i in self.order], range(lanes))
        with loop(0, self.n_columns) as v:
            ox = bind(emit.minimum(v * lanes, self.last_column))
            for i, kx in enumerate(self.taps):
                first = splat(bind(ox * step + self.offset(kx)), lanes)
                at = bind(first + lane * splat(const(step, "int32"), lanes))
                mask = emit.select(at < splat(self.a["width"], lanes), zero - one, zero)
                mask = bits(emit.select(at >= zero, mask, zero), "float32")
                store(self.a["scratch"], mask, (v * len(self.taps) + i) * lanes, lanes)

    def down(self, at: Expr, to: Expr, oy: Expr, rows: Expr, masks: Expr | None) -> None:
        """One vector of each of `rows` rows of the result.

        `masks` is where its masks lie, None if no column is outside.

        From the top down: every row of the map is read once and adds to the sums of all rows of the
        result that it touches; the topmost sum is then complete.
        """
        w, border = self.window, self.spec.border
        reach, step = (w.kernel[0] - 1) * w.dilation[0], w.stride[0]
        memory = _Memory(self, masks)
        sums = [Cell("float32", self.lanes) for _ in range(reach // step + 1)]
        for cell in sums:
            cell.set(self.bias)
        place, result = Cell(self.index), Cell(self.index)
        place.set(self.wide(at))
        result.set(self.wide(to))
        lead = max(0, reach + 1 - step)  # rows that the first row of the result shares
        width, out_width = self.wide(self.a["width"]), self.wide(self.a["out_width"])

        def add(j: int, number: Expr, above: bool, below: bool) -> None:
            """Row j of the first window, which is row `number` of the map."""
            pairs = [divmod(j - ky * w.dilation[0], step) for ky in range(w.kernel[0])]
            uses = [(i, ky) for ky, (i, rest) in enumerate(pairs) if i >= 0 and not rest]
            if uses:
                with self.if_inside(number, above, below):
                    self.add_row(place.get(), uses, sums, memory)
            place.set(place.get() + width)

        def window(r: Expr, outside: int) -> None:
            """Row r of the result; the last `outside` rows of its window lie below the map."""
            iy = bind((oy + r) * step + (lead - border.pads[0]))
            for t in range(step):
                if not outside or lead + t <= reach - outside:
                    add(lead + t, iy + t, t < border.pads[0] - lead, below=False)
            self.put(self.in_order(sums[0].get()), result.get())
            result.set(result.get() + out_width)
            for cell, following in itertools.pairwise(sums):
                cell.set(following.get())
            sums[-1].set(self.bias)
            memory.turn()

        iy = bind(oy * step - border.pads[0])
        for j in range(lead):
            add(j, iy + j, j < border.pads[0], border.below > reach - j)
        n_last = 0 if self.spec.expand else -(-border.below // step)
        last = bind(self.a["out_height"] - (oy + n_last))  # row whose window reaches below the map
        whole = bind(emit.minimum(emit.maximum(last, const(0, "int32")), rows))
        with loop(0, whole) as r:
            window(r, 0)
        for i in range(n_last):
            with when(T.And(last + i >= 0, last + i < rows)):
                window(bind(last + i), border.below - (n_last - 1 - i) * step)

    def add_row(
        self, row: Expr, uses: Sequence[tuple[int, int]], sums: Sequence[Cell], memory: "_Memory"
    ) -> None:
        """Add what the row of the map at `row` gives: `uses` holds (sum, kernel row)."""
        quads: dict[int, Expr] = {}
        for kx, x in self.row_taps(row):
            x = bind(memory.inside(kx, x))
            for i, ky in uses:
                weight = memory.weight(ky * self.window.kernel[1] + kx, quads)
                sums[i].set(sums[i].get() + weight * x)

    def if_inside(self, row: Expr, above: bool, below: bool) -> Any:
        """A condition on row `row` of the map, if it may lie above or below."""
        if self.spec.expand or not (above or below):
            return nullcontext()
        inside = T.And(row >= 0, row < self.a["height"])
        return when(inside if above and below else row >= 0 if above else row < self.a["height"])

    def row_taps(self, row: Expr) -> Iterator[tuple[int, Expr]]:
        """(kernel column, its vector) of one row of the map."""
        lanes = self.lanes
        x = self.a["scratch"] if self.spec.expand else self.a["x"]
        pairs: dict[int, list[Expr]] = {}
        for kx in range(self.window.kernel[1]):
            d = self.offset(kx)
            if self.window.stride[1] == 1 or lanes == 1:
                yield kx, load(x, row + d, lanes)
            elif d - 1 in pairs:
                yield kx, emit.shuffle(pairs[d - 1], [i + 1 for i in self.even])
            else:
                pairs[d] = emit.pair(x, row + d, lanes, is_joined=self.joins_pairs)
                yield kx, emit.shuffle(pairs[d], self.even)

    def in_order(self, value: Expr) -> Expr:
        natural = list(range(self.lanes))
        if self.order == natural or self.lanes == 1:
            return value
        return emit.shuffle([bind(value)], [self.order.index(i) for i in natural])

    # ------------------------------------------------------------ the result

    def put(self, value: Expr, place: Expr) -> None:
        """A vector of the result whose first point is `place`."""
        a, lanes = self.a, self.lanes
        if self.spec.direct:
            store(a["y"], self.finish([value, *self.constants]), place, lanes)
        else:
            store(a["scratch"], value, place, lanes)

    def wide(self, x: Expr) -> Expr:
        """`x` as wide as an address."""
        return T.cast(x, self.index)

    def end_plane(self, image: Expr, channel: Expr, y: Expr) -> None:
        """Pad points become zeros; a flat plane goes out."""
        a, lanes = self.a, self.lanes
        if self.spec.direct:
            zero_after(a["y"], y, self.points, self.tiles * a["block"], lanes)
        else:
            self.zeros(bind(self.flat + self.points), a["block"])
            self.write_flat(image, channel, y)

    def write_flat(self, image: Expr, channel: Expr, y: Expr) -> None:
        a, lanes = self.a, self.lanes
        with loop(0, self.tiles) as t:
            begin, to = bind(self.flat + t * a["block"]), bind(y + t * a["y_tile"])
            sides = [
                bind(image * a[f"o{i}_image"] + t * a[f"o{i}_tile"] + channel * a[f"o{i}_row"])
                if kind == "same"
                else None
                for i, kind in enumerate(self.spec.operands)
            ]
            with loop(0, emit.divide(a["block"], lanes)) as v:
                values = [load(a["scratch"], begin + v * lanes, lanes)]
                for i, side in enumerate(sides):
                    if side is None:
                        values.append(self.constants[i])
                    else:
                        values.append(bind(load(a[f"o{i}"], side + v * lanes, lanes)))
                store(a["y"], self.finish(values), to + v * lanes, lanes)

    def finish(self, values: list[Expr]) -> Expr:
        if self.spec.epilogue is None:
            return values[0]
        return expression.emit(self.spec.epilogue, [bind(values[0]), *values[1:]], self.lanes)


@dataclass(frozen=True)
class _Room:
    """What registers have room for, beside sums, what is read, bias and epilogue.

    Attributes:
        weights: of a window away from the borders.
        weights_beside_masks: of one at a border.
        masks: True if all masks.
        quads: no weight; they are read four at a time, for instructions that name a lane. Elsewhere
            LLVM finds that out by itself. On ARMv7 a round of 3x3 with two sums takes 38
            instructions instead of 44 if weights stay in registers, with five sums 54, not 35.
    """

    weights: int
    weights_beside_masks: int
    masks: bool
    quads: bool = False

    @staticmethod
    def of(window: Window, n_masks: int, target: Target) -> "_Room":
        n_taps = math.prod(window.kernel)
        n_sums = (window.kernel[0] - 1) * window.dilation[0] // window.stride[0] + 1
        n_used = n_sums + window.stride[1] + _OTHERS
        n = max(0, target.n_registers - n_used)
        if window.lanes == 1:
            return _Room(n_taps, n_taps, True)
        if target.arch == "armv7l":
            is_small = n_taps < QUAD or (n_taps <= 9 and n_sums <= 2)
            if window.lanes == QUAD and not is_small:
                return _Room(0, 0, True, quads=True)
            return _Room(n_taps, n_taps, True)
        if target.joined > 1:  # factors have registers of their own
            has_masks = n_masks * window.stride[1] <= n
            return _Room(n_taps, n_taps if has_masks else n_taps - n_masks, has_masks)
        if target.arch == "aarch64" and window.lanes == QUAD:
            n *= QUAD
        has_masks = n_taps + n_masks <= n
        beside = n if has_masks else max(0, n - n_masks)  # LLVM keeps masks for a row
        return _Room(min(n_taps, n), min(n_taps, beside), has_masks)


def _quad(i: int, n: int) -> int:
    """First of four neighbours among n weights, weight i one of them."""
    return min(i - i % QUAD, n - QUAD)


def is_spread(window: Window, target: Target) -> bool:
    """True if weights are read as vectors: SSE takes two instructions to spread one.

    With AVX2 laying them out costs small maps what it saves large ones (960@7 +6 %, 256@28 -2 %).
    """
    return window.lanes > 1 and target.scalar_factors and target.joined == 1


class _Memory:
    """Weights and masks while the windows of one vector of columns are computed.

    Those that registers have no room for are read at every use. LLVM would move such loads out of
    the loop, and keep the values on the stack; so they are read from an address that goes on by
    `still` with every row of the result, and that this is 0 only we know.
    """

    def __init__(self, emitter: _Emitter, masks: Expr | None) -> None:
        self.e, self.masks = emitter, masks
        self.kept: dict[int, Expr] = {}
        self.turned: Cell | None = None
        room = emitter.room
        self.n_kept = room.weights if masks is None else room.weights_beside_masks
        if masks is not None and room.masks:
            self.kept = {kx: bind(self.mask(kx)) for kx in emitter.taps}
        reads_masks = masks is not None and not room.masks
        if reads_masks or self.n_kept < math.prod(emitter.window.kernel):
            self.turned = Cell(emitter.index)
            self.turned.set(const(0, emitter.index))

    def turn(self) -> None:
        """After a row of the result."""
        if self.turned:
            self.turned.set(self.turned.get() + self.e.wide(self.e.still))

    def at(self, place: Expr) -> Expr:
        return self.e.wide(place) + self.turned.get() if self.turned else place

    def weight(self, tap: int, quads: dict[int, Expr]) -> Expr:
        """A weight over all lanes; `quads`: those that this row of the map has read, by tap."""
        e = self.e
        if e.room.quads:
            start = _quad(tap, math.prod(e.window.kernel))
            if start not in quads:
                quads[start] = bind(load(e.source, self.at(e.first) + start, QUAD))
            return emit.shuffle([quads[start]], [tap - start] * QUAD)
        if tap < self.n_kept:
            return e.weights[tap]
        if e.spec.spread:
            return load(e.a["scratch"], self.at(e.vectors_at) + tap * e.lanes, e.lanes)
        return bind(splat(load(e.source, self.at(e.first) + tap), e.lanes))

    def mask(self, kx: int) -> Expr:
        e = self.e
        place = self.at(self.masks) + e.taps.index(kx) * e.lanes
        return bits(load(e.a["scratch"], place, e.lanes), "int32")

    def inside(self, kx: int, x: Expr) -> Expr:
        """The vector of tap kx, cleared where its lanes lie outside."""
        if self.masks is None or kx not in self.e.taps:
            return x
        mask = self.kept[kx] if self.kept else self.mask(kx)
        if self.e.joins_pairs:  # LLVM does not see through `&`
            zero = splat(const(0, "int32"), self.e.lanes)
            return emit.select(mask < zero, x, splat(const(0.0), self.e.lanes))
        return bits(bits(x, "int32") & mask, "float32")


def kernels(lanes: int) -> list[MaskedDepthwise]:
    """Representative variants for vectors of `lanes` values, without an expanding product."""
    relu = ("Relu", ("arg", 0))
    residual = ("Relu", ("Add", ("Mul", ("arg", 0), ("arg", 2)), ("arg", 1)))
    one, two = (1, 1), (2, 2)
    three = Window((3, 3), one, one, 1, lanes)
    strided = Window((3, 3), two, one, 1, lanes)
    five = Window((5, 5), two, one, 1, lanes)
    both = (True, False, True)
    return [
        MaskedDepthwise(three, Border(one, 1, both), True, relu),
        MaskedDepthwise(three, Border(one, 1, both), True, relu, coded=True),
        MaskedDepthwise(three, Border(one, 1, both), True, relu, coded=True, spread=True),
        MaskedDepthwise(three, Border(one, 1, both), False, residual, ("same", "feature")),
        MaskedDepthwise(strided, Border(one, 0, (True, False, False)), True),
        MaskedDepthwise(strided, Border(one, 1, both), False, relu),
        MaskedDepthwise(five, Border(two, 2, (True, True, False, True, True))),
        MaskedDepthwise(five, Border(two, 2, (True, True, False, True, True)), spread=True),
        MaskedDepthwise(Window((3, 3), (1, 2), two, 1, lanes), Border((0, 0), 0, (False,) * 3)),
        MaskedDepthwise(
            Window((2, 5), (3, 1), (1, 3), 1, lanes),
            Border((1, 9), 0, (True,) * 5),
            direct=True,
        ),
    ]
