"""Depthwise convolution that reads a map where it lies: no padded copy of it.

    y[m, oy, ox] = epilogue(bias[m] + sum over taps of w[m, ky, kx] * x[m // multiplier, iy, ix])

Columns outside the map are cleared by bits, which hide whatever the vector holds there (the end of
the row above, NaN); rows outside it are skipped. Vectors away from the borders need neither and
have code of their own. Horizontal stride 1 or 2: with stride 2 one shuffle within 128 bits takes
every second value of two vectors, and the sums are put in order at the end. `window.rows` rows of
the result share their loads. Items are images * channels (output channels).

With `expand` x is not in memory but the product of a few planes: channel by channel

    x[m] = expand(expand_bias[m] + sum over n in [starts[m], starts[m + 1]) of
                  values[n] * z[columns[n]])

so that a wide map never leaves the level 1 or 2 cache. `columns` holds offsets (channel * z_row).

Planes at least a vector wide are written straight away (`direct`), other layouts through a flat
plane in scratch. Planes are faster: one row of a tile after the other lies far apart, and each
store opens a line in another page (32@112: 120 us straight to planes, 150 to tiles).

Measured on AVX2 (2.87 GHz), 3x3, microseconds with the padded copy and without: 32@112 237 to 181,
128@56 225 to 177, 256@28 117 to 100; stride 2: 64@112 223 to 143, 256@28 71 to 50, 512@14 55 to 33.
Stride 1 on maps of two vectors a row has no inner vectors: 66 either way.
"""

from collections.abc import Iterator
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

MOST_TAPS = 49  # written out once with masks and once without
LEAD = 16  # values before a plane that may be read


@dataclass(frozen=True)
class Border:
    """How windows reach over the edges of a map.

    Attributes:
        pads: (top, left).
        edges: input rows of the first and of the last group of rows that may lie outside.
        below: rows below the map that are read.
        masked: per kernel column whether it ever lies outside.
    """

    pads: tuple[int, int]
    edges: tuple[int, int]
    below: int
    masked: tuple[bool, ...]

    @property
    def name(self) -> str:
        numbers = "_".join(map(str, (*self.pads, *self.edges)))
        return f"p{numbers}_m{''.join(str(int(m)) for m in self.masked)}"


def border(
    window: Window, size: tuple[int, int], pads: tuple[int, int], out: tuple[int, int]
) -> Border:
    """The border of a map of `size` under windows that begin at `-pads`."""
    (kh, kw), (sy, sx), (dy, dx) = window.kernel, window.stride, window.dilation
    below = max(0, (out[0] - 1) * sy + (kh - 1) * dy - pads[0] - size[0] + 1)
    ends = [kx * dx - pads[1] for kx in range(kw)]
    masked = tuple(e < 0 or (out[1] - 1) * sx + e >= size[1] for e in ends)
    reach = (window.rows - 1) * sy + (kh - 1) * dy
    # the last group begins at the same distance from the bottom, so `below` of its rows are outside
    return Border(pads, (min(pads[0], reach + 1), min(below, reach + 1)), below, masked)


@dataclass(frozen=True)
class MaskedDepthwise:
    """Spec of one kernel.

    Attributes:
        window: kernel, stride, dilation, rows at a time (at most those of the result), lanes.
        border: what lies outside.
        direct: y is planar and at least `lanes` wide, no operand is feature-major.
        epilogue: expression over (accumulated value, operand 0, operand 1 ...), or None.
        operands: per operand `same` (feature-major like y) or `feature` (one value per channel).
        expand: vectors in a tile of z and the expression that makes x of a sum; None: x is read.
    """

    window: Window
    border: Border
    direct: bool = False
    epilogue: expression.Tree | None = None
    operands: tuple[str, ...] = ()
    expand: "Expand | None" = None

    def __post_init__(self) -> None:
        assert self.window.stride[1] in (1, 2)
        assert not (self.direct and "same" in self.operands)
        assert self.border.pads[1] <= LEAD or self.expand

    @property
    def name(self) -> str:
        parts = [f"depthwise_f32_{self.window.name}", self.border.name]
        parts.append("direct" * self.direct)
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
            + "block:int32 channels:int32 weights:float32* bias:float32* "
            + "multiplier:int32 "
        )
        return emit.signature(text + operand_params(self.operands))

    def scratch_bytes(self, width: int, out: tuple[int, int], block: int, z_points: int) -> int:
        """Scratch of one thread; `z_points`: those of all tiles of z, 0 without `expand`."""
        lanes = self.window.lanes
        n = sum(self.border.masked) * -(-out[1] // lanes) * lanes
        if not self.direct:
            n += out[0] * out[1] + block + 4 * lanes
        if self.expand:
            rows = self.border.pads[0] + self.border.below
            across = (self.window.kernel[1] - 1) * self.window.dilation[1]
            n += rows * width + z_points + across + 4 * LEAD + 8 * lanes
        return int(4 * n)

    def body(self, target: Target) -> Any:
        return lambda **args: _Emitter(self, args).run()


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
    def __init__(self, spec: MaskedDepthwise, args: dict[str, Expr]) -> None:
        self.spec, self.a, self.window, self.lanes = spec, args, spec.window, spec.window.lanes
        lanes = self.lanes
        self.even = list(range(0, 2 * lanes, 2))
        if spec.window.stride[1] == 2 and lanes > 4:
            self.even = [s + q + i for q in range(0, lanes, 4) for s in (0, lanes) for i in (0, 2)]
        # lane i of a vector of taps belongs to point order[i] of the result
        is_picked = spec.window.stride[1] == 2
        self.order = [e // 2 for e in self.even] if is_picked else list(range(lanes))
        self.taps = [kx for kx, is_masked in enumerate(spec.border.masked) if is_masked]

    # ------------------------------------------------------------ loops

    def run(self) -> None:
        a, lanes = self.a, self.lanes
        self.points = bind(a["out_height"] * a["out_width"])
        self.n_columns = bind(self.vectors(a["out_width"]))
        self.last_column = bind(emit.maximum(a["out_width"] - lanes, const(0, "int32")))
        self.tiles = bind(emit.divide(self.points + a["block"] - 1, a["block"]))
        self.fill_masks()
        self.flat: Expr = bind(self.n_columns * (len(self.taps) * lanes))
        if self.spec.expand:
            self.open_map()
        with loop(a["begin"], a["end"]) as item:
            image = bind(emit.divide(item, a["channels"]))
            self.plane(image, bind(item - image * a["channels"]))

    def vectors(self, n: Expr) -> Expr:
        return emit.divide(n + (self.lanes - 1), self.lanes)

    def plane(self, image: Expr, channel: Expr) -> None:
        """One plane of the result."""
        a, w, lanes = self.a, self.window, self.lanes
        if self.spec.expand:
            self.fill_map(self.spec.expand, image, channel)
            x = self.map
        else:
            x = bind(image * a["x_image"] + emit.divide(channel, a["multiplier"]) * a["x_row"])
        y = bind(image * a["y_image"] + channel * a["y_row"])
        self.prepare(channel)
        reach = (w.rows - 1) * w.stride[0] + (w.kernel[0] - 1) * w.dilation[0]
        with loop(0, emit.divide(a["out_height"] + (w.rows - 1), w.rows)) as group:
            oy = bind(emit.minimum(group * w.rows, a["out_height"] - w.rows))
            iy = bind(oy * w.stride[0] - self.spec.border.pads[0])
            at = bind(x + iy * a["width"])
            rows_inside = T.And(iy >= 0, iy + reach < a["height"])
            with loop(0, self.n_columns) as v:
                ox = bind(emit.minimum(v * lanes, self.last_column))
                inside = self.columns_inside(ox)
                if not self.spec.expand:
                    inside = T.And(rows_inside, inside)
                with emit.choose(inside) as (then, otherwise):
                    with then:
                        self.windows(at, iy, oy, ox, y, {})
                    with otherwise:
                        self.windows(at, iy, oy, ox, y, self.masks(v))
        self.end_plane(image, channel, y)

    def prepare(self, channel: Expr) -> None:
        """What stays the same over one plane."""
        a, lanes = self.a, self.lanes
        n_taps = self.window.kernel[0] * self.window.kernel[1]
        first = bind(channel * n_taps)
        self.weights = [bind(splat(load(a["weights"], first + i), lanes)) for i in range(n_taps)]
        self.bias = bind(splat(load(a["bias"], channel), lanes))
        kinds = enumerate(self.spec.operands)
        names = [f"o{i}" if kind == "feature" else None for i, kind in kinds]
        self.constants = [n and bind(splat(load(a[n], channel), lanes)) for n in names]

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

    def masks(self, v: Expr) -> dict[int, Expr]:
        """Masked tap -> bits, for vector v of a row."""
        n, lanes = len(self.taps), self.lanes
        loads = [load(self.a["scratch"], (v * n + i) * lanes, lanes) for i in range(n)]
        return {kx: bind(bits(x, "int32")) for kx, x in zip(self.taps, loads)}

    def windows(
        self, at: Expr, iy: Expr, oy: Expr, ox: Expr, y: Expr, masks: dict[int, Expr]
    ) -> None:
        """One vector of each of `rows` rows of the result; without masks all is inside."""
        w, guard = self.window, bool(masks) or not self.taps
        uses: dict[int, list[tuple[int, int]]] = {}
        for r in range(w.rows):
            for ky in range(w.kernel[0]):
                uses.setdefault(r * w.stride[0] + ky * w.dilation[0], []).append((r, ky))
        acc = [Cell("float32", self.lanes) for _ in range(w.rows)]
        for cell in acc:
            cell.set(self.bias)
        place = bind(at + ox * w.stride[1])
        for j, pairs in sorted(uses.items()):
            with self.if_inside(bind(iy + j), j, max(uses), guard):
                for kx, x in self.row_taps(bind(place + j * self.a["width"])):
                    if kx in masks:
                        x = bits(bits(x, "int32") & masks[kx], "float32")
                    x = bind(x)
                    for r, ky in pairs:
                        weight = self.weights[ky * w.kernel[1] + kx]
                        acc[r].set(acc[r].get() + weight * x)
        for r, cell in enumerate(acc):
            self.put(self.in_order(cell.get()), bind((oy + r) * self.a["out_width"] + ox), y)

    def if_inside(self, row: Expr, j: int, last: int, guard: bool) -> Any:
        """A condition on map row `row`, the j-th of a group, if it may lie outside."""
        first_rows, last_rows = self.spec.border.edges
        above, below = j < first_rows, j > last - last_rows
        if self.spec.expand or not guard or not (above or below):
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
                pairs[d] = [bind(load(x, row + d + i * lanes, lanes)) for i in (0, 1)]
                yield kx, emit.shuffle(pairs[d], self.even)

    def in_order(self, value: Expr) -> Expr:
        natural = list(range(self.lanes))
        if self.order == natural or self.lanes == 1:
            return value
        return emit.shuffle([bind(value)], [self.order.index(i) for i in natural])

    # ------------------------------------------------------------ the result

    def put(self, value: Expr, place: Expr, y: Expr) -> None:
        """A vector of the result whose first point is `place`."""
        a, lanes = self.a, self.lanes
        if self.spec.direct:
            store(a["y"], self.finish([value, *self.constants]), y + place, lanes)
        else:
            store(a["scratch"], value, self.flat + place, lanes)

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


def kernels(lanes: int) -> list[MaskedDepthwise]:
    """Representative variants for vectors of `lanes` values, without an expanding product."""
    relu = ("Relu", ("arg", 0))
    residual = ("Relu", ("Add", ("Mul", ("arg", 0), ("arg", 2)), ("arg", 1)))
    one, two = (1, 1), (2, 2)
    three = Window((3, 3), one, one, 4, lanes)
    strided = Window((3, 3), two, one, 4, lanes)
    both = (True, False, True)
    return [
        MaskedDepthwise(three, Border(one, one, 1, both), True, relu),
        MaskedDepthwise(three, Border(one, one, 1, both), False, residual, ("same", "feature")),
        MaskedDepthwise(strided, Border(one, (1, 0), 0, (True, False, False)), True),
        MaskedDepthwise(strided, Border(one, one, 1, both), False, relu),
        MaskedDepthwise(
            Window((5, 5), two, one, 3, lanes), Border(two, two, 2, (True, True, False, True, True))
        ),
        MaskedDepthwise(
            Window((3, 3), (1, 2), two, 2, lanes), Border((0, 0), (0, 0), 0, (False,) * 3)
        ),
        MaskedDepthwise(
            Window((2, 5), (3, 1), (1, 3), 2, lanes),
            Border((1, 9), (1, 0), 0, (True,) * 5),
            direct=True,
        ),
    ]
