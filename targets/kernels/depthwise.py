"""Depthwise convolution: every channel has its own window, one input channel per output channel.

    y[m, oy, ox] = epilogue(bias[m] + sum over taps of w[m, ky, kx] * x[m // multiplier, iy, ix])
    iy = oy * stride_y + ky * dilation_y - pad_top, ix alike; x is 0 outside the plane

One item is one output plane. Its input plane is copied into a padded frame in scratch, columns
split by their remainder modulo the stride (phases), so that every tap of every stride is a run of
consecutive values. Then `rows` output rows are computed together and share their loads. The
borders of a frame are filled once per call. A result goes straight to a planar output
(`direct`), or to a flat plane in scratch from which whole vectors of any layout are written.

    frame[j][phase][q] = x[j - pad_top][q * stride_x + phase - pad_left], or 0

Taps are a loop: written out, 256@56 with 5x5 and stride 4 takes 650 us instead of 400 (AVX-512).
Items are images * channels (output channels). Strides up to 2 are for `depthwise_masked`.
"""

import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
from sparsegraph.targets import emit
from sparsegraph.targets.emit import Cell, Expr, bind, const, load, loop, splat, store, when
from sparsegraph.targets.kernels import expression
from sparsegraph.targets.kernels.convert import zero_after
from sparsegraph.targets.kernels.window import Window, operand_params
from sparsegraph.targets.target import Target

_SIZES = ["height", "width", "pad_top", "pad_left", "out_height", "out_width"]
_PARAMS = (
    "y:float32* y_image:int32 y_tile:int32 y_row:int32 x:float32* x_image:int32 x_row:int32 "
    + "scratch:float32* "
    + " ".join(f"{s}:int32" for s in (*_SIZES, "block", "channels", "ahead"))
    + " "
)


@dataclass(frozen=True)
class Sizes:
    """Run-time sizes of one call: input plane, leading pads, output plane, points per tile."""

    height: int
    width: int
    pad_top: int
    pad_left: int
    out_height: int
    out_width: int
    block: int

    @property
    def values(self) -> tuple[int, ...]:
        """As the kernel takes them, `block` included."""
        pads = (self.pad_top, self.pad_left)
        return (self.height, self.width, *pads, self.out_height, self.out_width, self.block)


@dataclass(frozen=True)
class Frame:
    """Extents: columns read per phase, phase stride, rows; elements of a frame and a flat plane."""

    width: Any
    phase: Any
    rows: Any
    size: Any
    flat: Any


@dataclass(frozen=True)
class Depthwise:
    """Spec of one depthwise kernel.

    Attributes:
        window: kernel, stride, dilation, rows at a time, lanes.
        direct: y is planar, at least `lanes` wide and `rows` high, no operand is feature-major.
        epilogue: expression over (accumulated value, operand 0, operand 1 ...), or None.
        operands: per operand `same` (feature-major like y) or `feature` (one value per channel).
    """

    window: Window
    direct: bool = False
    epilogue: expression.Tree | None = None
    operands: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert not (self.direct and "same" in self.operands)

    @property
    def name(self) -> str:
        tail = "" if self.epilogue is None else f"_{expression.label(self.epilogue)}"
        kinds = "".join(k[0] for k in self.operands)
        kinds = "_" + kinds if kinds else ""
        return f"depthwise_f32_{self.window.name}{'_direct' * self.direct}{tail}{kinds}"

    @property
    def params(self) -> emit.Signature:
        text = _PARAMS + "weights:float32* bias:float32* multiplier:int32 "
        return emit.signature(text + operand_params(self.operands))

    def body(self, target: Target) -> Any:
        return lambda **args: _Emitter(self, args).run()

    def frame(self, a: Any, largest: Any = max, divide: Any = operator.floordiv) -> Frame:
        """Extents of frame and flat plane; `a` maps size names to numbers or expressions."""
        w, lanes, step = self.window, self.window.lanes, self.window.stride[1]
        width = largest(a["out_width"], lanes) + (w.kernel[1] - 1) * w.dilation[1] // step
        data = divide(a["width"] + a["pad_left"] + step - 1, step)
        phase = divide(largest(width, data) + lanes - 1, lanes) * lanes + 2 * lanes
        out_rows = largest(a["out_height"], w.rows)
        rows = (out_rows - 1) * w.stride[0] + (w.kernel[0] - 1) * w.dilation[0] + 1
        flat = divide(out_rows * a["out_width"] + a["block"] + 2 * lanes + 15, 16) * 16
        return Frame(width, phase, rows, rows * step * phase + lanes, flat)

    def ahead(self, sizes: Sizes, l1_bytes: int) -> int:
        """Planes padded before the first is computed: a load soon after its store would wait."""
        frame = self.frame(vars(sizes))
        return max(1, min(16, l1_bytes // 2 // (4 * int(frame.size + frame.flat))))

    def scratch_bytes(self, sizes: Sizes, ahead: int) -> int:
        """Scratch of one thread."""
        frame = self.frame(vars(sizes))
        return 4 * ahead * int(frame.size + frame.flat)


def output_rows(out_height: int, target_registers: int) -> int:
    """Rows per pass: least recomputed rows, then most sharing."""
    candidates = (4, 5, 6, 3) if target_registers <= 16 else (7, 6, 5, 4)
    if out_height <= max(candidates):
        return min(out_height, max(candidates))
    waste = {r: -(-out_height // r) * r for r in candidates}
    return min(candidates, key=lambda r: waste[r])


class _Emitter:
    def __init__(self, spec: Depthwise, args: dict[str, Expr]) -> None:
        self.spec, self.a, self.window = spec, args, spec.window
        self.lanes, self.zeros = self.window.lanes, splat(const(0.0), self.window.lanes)

    def run(self) -> None:
        a = self.a
        f = self.spec.frame(a, _largest, emit.divide)
        self.frame = Frame(*(bind(v) for v in (f.width, f.phase, f.rows, f.size, f.flat)))
        self.row = bind(self.frame.phase * self.window.stride[1])
        self.points = bind(a["out_height"] * a["out_width"])
        self.flats = bind(a["ahead"] * self.frame.size)
        with loop(0, self.vectors(self.flats)) as v:
            self.put(v * self.lanes, self.zeros)
        with loop(0, emit.divide(a["end"] - a["begin"] + a["ahead"] - 1, a["ahead"])) as chunk:
            first = bind(a["begin"] + chunk * a["ahead"])
            n = bind(emit.minimum(a["ahead"], a["end"] - first))
            with loop(0, n) as i:
                self.copy_plane(first + i, bind(i * self.frame.size))
            with loop(0, n) as i:
                self.sweep(first + i, i)
            if not self.spec.direct:
                with loop(0, n) as i:
                    self.write(first + i, bind(self.flats + i * self.frame.flat))

    def put(self, index: Expr, value: Expr) -> None:
        store(self.a["scratch"], value, index, self.lanes)

    def place(self, item: Expr) -> tuple[Expr, Expr]:
        """Image and output channel."""
        channels = self.a["channels"]
        return bind(emit.divide(item, channels)), bind(emit.modulo(item, channels))

    def copy_plane(self, item: Expr, frame: Expr) -> None:
        """Copy the rows of the input plane that the windows reach into the frame."""
        a = self.a
        image, channel = self.place(item)
        x = bind(image * a["x_image"] + emit.divide(channel, a["multiplier"]) * a["x_row"])
        n = bind(emit.minimum(a["height"], self.frame.rows - a["pad_top"]))
        to = bind(frame + a["pad_top"] * self.row)
        if self.window.stride[1] == 1:
            self.copy_rows(x, to, n)
            return
        copy = self.split_row if self.window.stride[1] == 2 else self.pick_row
        with loop(0, n) as j:
            copy(bind(x + j * a["width"]), bind(to + j * self.row))

    def copy_rows(self, x: Expr, to: Expr, n: Expr) -> None:
        """Stride 1, 2 or 4 vectors at a time. The last ones overlap: nothing is written past a row.

        Single vectors in a loop take 1.5 times as long for maps of 14 columns.
        """
        a, lanes = self.a, self.lanes
        first = bind(to + a["pad_left"])
        last = bind(a["width"] - lanes)
        for group, fits in ((4, last > lanes), (2, last <= lanes)):
            with when(last >= 0), when(fits), loop(0, n) as j:
                source, place = bind(x + j * a["width"]), bind(first + j * self.row)
                with loop(0, self.vectors(a["width"], group)) as v:
                    for i in range(group):
                        start = bind(emit.minimum((v * group + i) * lanes, last))
                        self.put(place + start, load(a["x"], source + start, lanes))
        with when(last < 0), loop(0, n) as j:
            vector = load(a["x"], x + j * a["width"], lanes)
            self.put(first + j * self.row, self.first(vector, a["width"]))

    def vectors(self, n: Expr, group: int = 1) -> Expr:
        """Groups of vectors that cover n values."""
        return emit.divide(n + (group * self.lanes - 1), group * self.lanes)

    def first(self, vector: Expr, n: Expr) -> Expr:
        """The first n lanes of `vector`, zeros in the others."""
        if self.lanes == 1:
            return emit.select(n > 0, vector, const(0.0))
        numbers = [const(i, "int32") for i in range(self.lanes)]
        lane = bind(emit.shuffle(numbers, range(self.lanes)))
        return emit.select(lane < splat(n, self.lanes), vector, self.zeros)

    def split_row(self, x: Expr, to: Expr) -> None:
        """Stride 2: even and odd columns by shuffles; what lies past the row becomes 0."""
        a, lanes = self.a, self.lanes
        at = [bind(to + self.phase_start(a["pad_left"] + odd)) for odd in (0, 1)]
        count = [bind(emit.divide(a["width"] + 1 - odd, 2)) for odd in (0, 1)]
        with loop(0, self.vectors(a["width"], 2)) as v:
            i = bind(x + v * 2 * lanes)
            second = emit.minimum(i + lanes, x + a["width"] - 1)
            pair = [bind(load(a["x"], i, lanes)), bind(load(a["x"], second, lanes))]
            for odd in (0, 1):
                half = emit.shuffle(pair, range(odd, 2 * lanes, 2)) if lanes > 1 else pair[odd]
                self.put(at[odd] + v * lanes, self.first(half, count[odd] - v * lanes))

    def phase_start(self, column: Expr) -> Expr:
        """Where padded column `column` lies in a row of the frame, stride 2."""
        return emit.modulo(column, 2) * self.frame.phase + emit.divide(column, 2)

    def pick_row(self, x: Expr, to: Expr) -> None:
        """Any stride, one value at a time."""
        step = self.window.stride[1]
        with loop(0, self.a["width"]) as i:
            column = bind(i + self.a["pad_left"])
            place = to + emit.modulo(column, step) * self.frame.phase + emit.divide(column, step)
            store(self.a["scratch"], load(self.a["x"], x + i), place)

    def sweep(self, item: Expr, i: Expr) -> None:
        """All windows of one plane. Last rows and columns overlap: no partial vectors."""
        a, rows, lanes = self.a, self.window.rows, self.lanes
        image, channel = self.place(item)
        kh, kw = self.window.kernel
        self.first_weight = bind(channel * (kh * kw))
        self.bias = bind(splat(load(a["bias"], channel), lanes))
        frame = bind(i * self.frame.size)
        if self.spec.direct:
            out = bind(image * a["y_image"] + channel * a["y_row"])
            constants = self.constants(channel)
        else:
            out = bind(self.flats + i * self.frame.flat)
        zero = const(0, "int32")
        last_row = bind(emit.maximum(a["out_height"] - rows, zero))
        last_column = bind(emit.maximum(a["out_width"] - lanes, zero))
        with loop(0, emit.divide(a["out_height"] + rows - 1, rows)) as group:
            oy = bind(emit.minimum(group * rows, last_row))
            first = bind(frame + oy * self.window.stride[0] * self.row)
            to = bind(out + oy * a["out_width"])
            with loop(0, self.vectors(a["out_width"])) as v:
                ox = bind(emit.minimum(v * lanes, last_column))
                for r, value in enumerate(self.compute(bind(first + ox))):
                    place = to + r * a["out_width"] + ox
                    if self.spec.direct:
                        store(a["y"], self.finish([value, *constants]), place, lanes)
                    else:
                        self.put(place, value)
        if self.spec.direct:
            zero_after(a["y"], out, self.points, self.tiles() * a["block"], lanes)
            return
        with loop(0, self.vectors(a["block"])) as v:
            self.put(out + self.points + v * lanes, self.zeros)

    def write(self, item: Expr, flat: Expr) -> None:
        """Apply the epilogue to the flat plane and write it in the layout of y."""
        a, lanes = self.a, self.lanes
        image, channel = self.place(item)
        to = bind(image * a["y_image"] + channel * a["y_row"])
        constants = self.constants(channel)
        with loop(0, self.tiles()) as t:
            begin, end = bind(flat + t * a["block"]), bind(to + t * a["y_tile"])
            sides = [self.side(i, image, channel, t) for i in range(len(self.spec.operands))]
            with loop(0, self.vectors(a["block"])) as v:
                values = [bind(load(a["scratch"], begin + v * lanes, lanes))]
                for i, kind in enumerate(self.spec.operands):
                    if kind == "feature":
                        values.append(constants[i])
                        continue
                    values.append(bind(load(a[f"o{i}"], sides[i] + v * lanes, lanes)))
                store(a["y"], self.finish(values), end + v * lanes, lanes)

    def tiles(self) -> Expr:
        """Tiles of one output plane."""
        return emit.divide(self.points + self.a["block"] - 1, self.a["block"])

    def side(self, i: int, image: Expr, channel: Expr, t: Expr) -> Expr:
        """Where tile t of the feature-major operand i starts."""
        if self.spec.operands[i] == "feature":
            return None
        a = self.a
        at = image * a[f"o{i}_image"] + t * a[f"o{i}_tile"] + channel * a[f"o{i}_row"]
        return bind(at)

    def constants(self, channel: Expr) -> list[Expr]:
        """Per operand its value for this channel, None for a feature-major one."""
        kinds = enumerate(self.spec.operands)
        names = [f"o{i}" if kind == "feature" else None for i, kind in kinds]
        return [n and bind(splat(load(self.a[n], channel), self.lanes)) for n in names]

    def finish(self, values: list[Expr]) -> Expr:
        if self.spec.epilogue is None:
            return values[0]
        return expression.emit(self.spec.epilogue, [bind(values[0]), *values[1:]], self.lanes)

    def compute(self, at: Expr) -> list[Expr]:
        """One vector for each of `rows` output rows; `at` is the frame's first tap.

        LLVM would write out small windows, and spill weights or, on 32-bit Arm, addresses.
        """
        a, w, none = self.a, self.window, emit.hidden_zero(self.a["width"])
        acc = [Cell("float32", self.lanes) for _ in range(w.rows)]
        for cell in acc:
            cell.set(self.bias)
        with loop(0, none + w.kernel[0]) as ky, loop(0, none + w.kernel[1]) as kx:
            tap = bind(ky * w.kernel[1] + kx)
            for r, cell in enumerate(acc):
                x = bind(self.tap(at, ky * w.dilation[0] + r * w.stride[0], kx * w.dilation[1]))
                weight = bind(splat(load(a["weights"], self.first_weight + tap), self.lanes))
                cell.set(cell.get() + weight * x)
        return [c.get() for c in acc]

    def tap(self, at: Expr, row: Expr, column: Expr) -> Expr:
        """The vector at frame row `row` (from the first tap) and padded column `column`."""
        step = self.window.stride[1]
        place = at + row * self.row + emit.divide(column, step)
        if step > 1:
            place = place + (column - emit.divide(column, step) * step) * self.frame.phase
        return load(self.a["scratch"], place, self.lanes)


def _largest(a: Expr, b: Any) -> Expr:
    return emit.maximum(a, const(b, "int32") if isinstance(b, int) else b)


def reference(
    x: np.ndarray, weights: np.ndarray, bias: np.ndarray, window: Window,
    pads: tuple[int, int, int, int],
) -> np.ndarray:  # fmt: skip
    """Float64 meaning: x [images, channels, h, w], weights [out channels, kh, kw].

    `pads` is (top, left, bottom, right).
    """
    top, left, bottom, right = pads
    x = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (top, bottom), (left, right)))
    x = np.repeat(x, weights.shape[0] // x.shape[1], axis=1)
    (kh, kw), (sy, sx), (dy, dx) = window.kernel, window.stride, window.dilation
    height = (x.shape[2] - (kh - 1) * dy - 1) // sy + 1
    width = (x.shape[3] - (kw - 1) * dx - 1) // sx + 1
    y = np.zeros((x.shape[0], x.shape[1], height, width)) + bias[:, None, None]
    for i in range(kh):
        for j in range(kw):
            rows = slice(i * dy, i * dy + (height - 1) * sy + 1, sy)
            columns = slice(j * dx, j * dx + (width - 1) * sx + 1, sx)
            y += weights[:, i, j, None, None].astype(np.float64) * x[:, :, rows, columns]
    return np.asarray(y)


def kernels(lanes: int) -> list[Depthwise]:
    """Representative variants for vectors of `lanes` values."""
    relu = ("Relu", ("arg", 0))
    residual = ("Relu", ("Add", ("Mul", ("arg", 0), ("arg", 2)), ("arg", 1)))
    one, two = (1, 1), (2, 2)
    return [
        Depthwise(Window((3, 3), one, one, 4, lanes), direct=True, epilogue=relu),
        Depthwise(Window((3, 3), one, one, 5, lanes), epilogue=residual,
                  operands=("same", "feature")),
        Depthwise(Window((3, 3), two, one, 4, lanes)),
        Depthwise(Window((5, 5), two, one, 3, lanes), direct=True),
        Depthwise(Window((3, 3), (1, 2), two, 4, lanes)),
        Depthwise(Window((2, 3), (3, 3), (1, 2), 2, lanes)),
        Depthwise(Window((9, 7), one, one, 2, lanes), direct=True),
        Depthwise(Window((1, 9), (2, 1), one, 1, lanes)),
    ]  # fmt: skip
