"""im2col of one tile of points and one tile of columns: the activation panel of a convolution.

Panel row tap*channels + c holds channel c of the source, moved by the tap. Two ways to fill it:

`FLAT` (stride 1, the result as wide as the source, planes): under one tap every point of the result
reads the source at one distance, so a row of the panel is one run of whole vectors. Points whose
source lies outside the map are masked to zero by bits, in registers. The masks of a (tile, tap)
stay in registers over all channels. Tables, made by `sparsegraph.lower.gather`:

    places int32 [tiles, 2]        first run of the tile's kind, where the tile gathers from
    runs   int32 [kinds, taps, 5]  source, mask, lead, first, stop
    masks  int32 [.., vectors+1, lanes]   bits of each vector, then those of the vector at `lead`

Most tiles are of few kinds: tables of every tile would be larger than sparse weights (84 KB for the
stem of a PP-OCR classifier on a machine without vectors).

`source` counts from the tile's place. Vectors [first, stop) are copied from `source + point`; all
others are zero. Whatever vector holds no valid point is not read, so nothing is read more than a
vector behind the source. Where the first valid point lies less than a vector behind the start of
the source, it is copied to point `lead` of the row on its own (`lead` < 0: there is none), so
nothing is read before the source. What overshoots the row there is zeros, as the next row begins.

Segments (every other geometry): see `segments`.
"""

from collections.abc import Mapping, Sequence

from sparsegraph.targets import emit
from sparsegraph.targets.emit import Cell, Expr, bind, const, divide, load, loop, splat, store, when
from sparsegraph.targets.kernels.math import bits

SLACK = 256  # float32 values behind x that may be read (`lower.builder.SLACK_BYTES`)
FLAT = 0  # Product.gather; a positive number is the step between source points of segments
RUN = 5  # values per (tile, tap) of the table `runs`
_PANEL = "panel:float32* panel_row:int32 taps:int32 places:int32* "
PARAMS = {
    True: _PANEL + "runs:int32* masks:int32* ",
    False: _PANEL + "starts:int32* segments:int32* ",
}
"""By whether the gather is flat."""


class Gather:
    """Fills the panel for one tile of points.

    Attributes:
        a: the kernel's arguments.
        step: `FLAT` or the step between source points.
        vectors, lanes: size of a panel row without its spare vector.
        by_vector: parted rows are filled a vector of all channels after the other.
        segment: most vectors of a segment (`Target.segment`).
        joins_pairs: every second point is picked of one vector of twice the lanes (`emit.pair`).
    """

    def __init__(
        self, a: Mapping[str, Expr], step: int, vectors: int, lanes: int, *,
        by_vector: bool = False, segment: int = 4, joins_pairs: bool = False,
    ) -> None:  # fmt: skip
        self.a, self.step, self.vectors, self.lanes = a, step, vectors, lanes
        self.by_vector = by_vector
        self.segment, self.joins_pairs = segment, joins_pairs

    def fill(self, image: Expr, tile: Expr, start: Expr, width: Expr) -> None:
        """Columns [start, start + width) of a tile; whole channels, taps outermost."""
        a = self.a
        channels = bind(divide(width, a["taps"]))
        first, place = (bind(load(a["places"], tile * 2 + i)) for i in (0, 1))
        source = bind(image * a["x_image"] + divide(start, a["taps"]) * a["x_row"] + place)
        with loop(0, a["taps"]) as tap:
            at = bind(first + tap)
            to = bind(tap * channels * a["panel_row"])
            if self.step == FLAT:
                self._run(at, to, source, channels)
            else:
                self._segments(at, to, source, channels)

    # ------------------------------------------------------------ flat

    def _run(self, at: Expr, to: Expr, source: Expr, channels: Expr) -> None:
        a, vectors, lanes = self.a, self.vectors, self.lanes
        begin, mask, lead, first, stop = (bind(load(a["runs"], at * RUN + i)) for i in range(RUN))
        begin, zero = bind(source + begin), self._zeros_at(to)
        with emit.choose(first + vectors - stop == 0) as (whole, parted):
            with whole:
                keep = []
                for v in range(vectors):
                    cell = Cell("int32", lanes)
                    cell.set(load(a["masks"], mask + v * lanes, lanes))
                    keep.append(cell)
                with loop(0, channels) as c:
                    row, x = bind(to + c * a["panel_row"]), bind(begin + c * a["x_row"])
                    for v, cell in enumerate(keep):
                        self._copy(x + v * lanes, row + v * lanes, cell.get())
            with parted:
                if self.by_vector:
                    self._vectors(begin, to, channels, (mask, lead, first, stop), zero)
                else:
                    self._rows(begin, to, channels, (mask, lead, first, stop), zero)

    def _rows(self, begin: Expr, to: Expr, channels: Expr, run: Sequence[Expr], zero: Expr) -> None:
        """Row by row of a parted tile."""
        a, vectors, lanes = self.a, self.vectors, self.lanes
        mask, lead, first, stop = run
        with loop(0, channels) as c:
            row, x = bind(to + c * a["panel_row"]), bind(begin + c * a["x_row"])
            self._zero(row, 0, first, zero)
            with when(lead >= 0):
                bits_at_lead = load(a["masks"], mask + vectors * lanes, lanes)
                self._copy(x + lead, row + lead, bits_at_lead)
            with loop(first, stop) as v:
                some = load(a["masks"], mask + v * lanes, lanes)
                self._copy(x + v * lanes, row + v * lanes, some)
            self._zero(row, stop, vectors, zero)

    def _vectors(
        self, begin: Expr, to: Expr, channels: Expr, run: Sequence[Expr], zero: Expr
    ) -> None:
        """Vector by vector of a parted tile: masks stay in registers, pointers just step."""
        vectors, lanes = self.vectors, self.lanes
        mask, lead, first, stop = run
        self._zeros(to, 0, first, channels, zero)
        with when(lead >= 0):
            self._column(begin + lead, to + lead, mask + vectors * lanes, channels)
        with loop(first, stop) as v:
            self._column(begin + v * lanes, to + v * lanes, mask + v * lanes, channels)
        self._zeros(to, stop, vectors, channels, zero)

    def _column(self, source: Expr, to: Expr, mask: Expr, channels: Expr) -> None:
        a = self.a
        source, to, cell = bind(source), bind(to), Cell("int32", self.lanes)
        cell.set(load(a["masks"], mask, self.lanes))
        with loop(0, channels) as c:
            self._copy(source + c * a["x_row"], to + c * a["panel_row"], cell.get())

    def _zeros(
        self, to: Expr, first: Expr | int, stop: Expr | int, channels: Expr, zero: Expr
    ) -> None:
        with loop(first, stop) as v:
            at = bind(to + v * self.lanes)
            with loop(0, channels) as c:
                store(self.a["panel"], zero, at + c * self.a["panel_row"], self.lanes)

    def _copy(self, source: Expr, to: Expr, mask: Expr) -> None:
        """One vector; bits that `mask` clears become zero."""
        value = bits(load(self.a["x"], source, self.lanes), "int32") & mask
        store(self.a["panel"], bits(value, "float32"), to, self.lanes)

    def _zero(self, row: Expr, first: Expr | int, stop: Expr | int, zero: Expr) -> None:
        with loop(first, stop) as v:
            store(self.a["panel"], zero, row + v * self.lanes, self.lanes)

    # ------------------------------------------------------------ segments

    def _segments(self, at: Expr, to_tap: Expr, source: Expr, channels: Expr) -> None:
        """A segment (to, from, vectors) copies 1 to `segment` whole vectors of every channel.

        What overshoots is overwritten by the next segment or falls into the spare vector at the
        row's end; its sources lie less than `step * lanes` values behind the last one. `from`
        counts from the tile's place; `vectors` < 0 writes as many zeros. `starts` [kinds*taps + 1]
        tells the segments of each tap of a kind.
        """
        a = self.a
        stop = bind(load(a["starts"], at + 1))
        with loop(load(a["starts"], at), stop) as s:
            to = bind(to_tap + load(a["segments"], s * 3))
            begin = bind(load(a["segments"], s * 3 + 1))
            vectors = bind(load(a["segments"], s * 3 + 2))
            with emit.choose(vectors < 0) as (then, otherwise):
                with then:
                    self._segment(to, None, bind(0 - vectors), channels)
                with otherwise:
                    self._segment(to, bind(source + begin), vectors, channels)

    def _segment(self, to: Expr, begin: Expr | None, vectors: Expr, channels: Expr) -> None:
        a, lanes, row = self.a, self.lanes, self.a["panel_row"]
        zero = self._zeros_at(to) if begin is None else None
        for n in range(1, self.segment + 1):
            with when(vectors == n), loop(0, channels) as c:
                for v in range(n):
                    value = zero if begin is None else self._read(begin + c * a["x_row"], v)
                    store(a["panel"], value, to + c * row + v * lanes, lanes)

    def _zeros_at(self, to: Expr) -> Expr:
        """A vector of zeros; a constant would hold registers in the products, which need all."""
        zero = emit.minimum(to + self.a["panel_row"], const(0, "int32"))
        return bind(splat(emit.T.cast(zero, "float32"), self.lanes))

    def _read(self, begin: Expr, v: int) -> Expr:
        """Vector v of a segment: every point, or every second point of two vectors."""
        x, lanes, step = self.a["x"], self.lanes, self.step
        if step == 1 or lanes == 1:
            return load(x, begin + v * lanes * step, lanes)
        if step == 2:
            pair = emit.pair(x, begin + 2 * v * lanes, lanes, is_joined=self.joins_pairs)
            return emit.shuffle(pair, range(0, 2 * lanes, 2))
        points = [bind(load(x, begin + (v * lanes + i) * step)) for i in range(lanes)]
        return emit.shuffle(points, range(lanes))
