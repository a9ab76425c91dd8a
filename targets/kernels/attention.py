"""Attention with features in rows and queries in lanes: softmax(scale * Q K^T + mask) V.

One item is one tile of queries of one head of one image. Keys are taken in chunks whose scores
[keys, block] stay in the level 1 cache; a running maximum rescales what earlier chunks gave (the
online softmax of Milakov and Gimelshein, 2018). Both products broadcast single keys and values
over vectors of queries, as the product kernels do with weights; softmax runs down the columns, so
nothing is reduced across lanes. Scale and log2(e) are multiplied into a copy of the queries, so
that the exponential is 2^x. Source of the operator: ONNX Attention (opset 23).
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from sparsegraph.targets import emit
from sparsegraph.targets.emit import Cell, Expr, bind, const, load, loop, splat, store, when
from sparsegraph.targets.kernels import math
from sparsegraph.targets.kernels.vectors import in_groups, unrolled
from sparsegraph.targets.target import Target

_LOWEST = -2e30  # scores below are masked: a row of them gives zeros, as in ONNX Runtime
_SMALLEST = 1e-30  # a sum with one key that is not masked is at least 1
_UNROLLED = 4  # steps of a product at once: 1 % faster
_SCORES_BYTES = 16 << 10  # of one chunk; 8 to 28 KB are equally fast

Visit = Callable[[Expr, int], None]
Operand = Callable[[int], Expr]


@dataclass(frozen=True)
class Attention:
    """Spec of one attention kernel.

    Attributes:
        vectors: vectors of queries in one tile.
        lanes: float32 values in a vector.
        span: vectors of queries, at most, whose accumulators are in registers together.
        group: keys (or value features) computed together.
        key_block: block of keys and values (points per tile of k and v).
        mask: `none`; `key` (added per key, [images, keys]); `full` (added per key and query,
            feature-major with keys as features).
    """

    vectors: int
    lanes: int
    span: int
    group: int
    key_block: int
    mask: str = "none"

    @property
    def name(self) -> str:
        shape = f"v{self.vectors}_l{self.lanes}_s{self.span}_g{self.group}_k{self.key_block}"
        return f"attention_f32_{shape}_mask_{self.mask}"

    @property
    def params(self) -> emit.Signature:
        side = "{0}:float32* {0}_image:int32 {0}_head:int32 {0}_tile:int32 {0}_row:int32 "
        text = "".join(side.format(p) for p in "yqkv")
        text += "scratch:float32* scale:float32 heads:int32 share:int32 tiles:int32 "
        text += "keys:int32 depth:int32 value_depth:int32 "
        if self.mask == "key":
            text += "mask:float32* mask_image:int32 "
        if self.mask == "full":
            text += "mask:float32* mask_image:int32 mask_head:int32 mask_tile:int32 mask_row:int32 "
        return emit.signature(text)

    @property
    def block(self) -> int:
        """Queries in one tile."""
        return self.vectors * self.lanes

    @property
    def chunk(self) -> int:
        """Tiles of keys whose scores are computed together."""
        return max(1, _SCORES_BYTES // (4 * self.block * self.key_block))

    def scratch_bytes(self, depth: int) -> int:
        """Scores of one chunk, its queries, and per query two maxima, sum, its inverse, factor."""
        return 4 * self.block * (self.chunk * self.key_block + depth + 5)

    def body(self, target: Target) -> Any:
        return lambda **args: _Emitter(self, args).run()


class _Emitter:
    """Rows of scratch: queries [depth], `top`, `sum`, `inverse`, `factor`, `peak`, the scores."""

    def __init__(self, spec: Attention, args: dict[str, Expr]) -> None:
        self.spec, self.a = spec, args

    def run(self) -> None:
        a, spec = self.a, self.spec
        per_image = bind(a["heads"] * a["tiles"])
        self.top = bind(a["depth"] * spec.block)
        rows = (bind(self.top + i * spec.block) for i in range(1, 6))
        self.sum, self.inverse, self.factor, self.peak, self.weights = rows
        self.key_tiles = bind(emit.divide(a["keys"] + (spec.key_block - 1), spec.key_block))
        with loop(a["begin"], a["end"]) as item:
            self.image = bind(emit.divide(item, per_image))
            self.head = bind(emit.divide(emit.modulo(item, per_image), a["tiles"]))
            shared = bind(emit.divide(self.head, a["share"]))  # several heads may share one key
            self.tile = bind(emit.modulo(item, a["tiles"]))
            heads = {"y": self.head, "q": self.head, "k": shared, "v": shared}
            base = {p: self.image * a[f"{p}_image"] + h * a[f"{p}_head"] for p, h in heads.items()}
            for p in "yq":
                base[p] = base[p] + self.tile * a[f"{p}_tile"]
            self.base = {p: bind(at) for p, at in base.items()}
            self.start()
            n_chunks = bind(emit.divide(self.key_tiles + (spec.chunk - 1), spec.chunk))
            with loop(0, n_chunks) as chunk:
                self.is_first, self.is_last = chunk == 0, chunk == n_chunks - 1
                self.first = bind(chunk * spec.chunk)
                tiles = emit.minimum(const(spec.chunk, "int32"), self.key_tiles - self.first)
                self.n_tiles = bind(tiles)
                self.scores()
                self.softmax()
                self.values()

    def spans(self, visit: Visit, span: int | None = None) -> None:
        """visit(first vector, vectors) for parts of at most `span` vectors, as even as possible."""
        vectors, parts = self.spec.vectors, -(-self.spec.vectors // (span or self.spec.span))
        size, n_larger = divmod(vectors, parts)
        for first, count, n in ((0, n_larger, size + 1), (n_larger * (size + 1), parts - n_larger,
                                                          size)):  # fmt: skip
            if count == 1:
                visit(const(first, "int32"), n)
            elif count:
                with loop(0, count) as i:
                    visit(bind(first + i * n), n)

    def each_query_vector(self, visit: Callable[[Expr], None]) -> None:
        with loop(0, self.spec.vectors) as v:
            visit(bind(v * self.spec.lanes))

    def constant(self, value: float) -> Expr:
        return splat(const(value), self.spec.lanes)

    def put(self, index: Expr, value: Expr) -> None:
        store(self.a["scratch"], value, index, self.spec.lanes)

    def get(self, index: Expr) -> Expr:
        return load(self.a["scratch"], index, self.spec.lanes)

    def start(self) -> None:
        """Scaled queries; no maximum, no sum yet."""
        a, lanes, block = self.a, self.spec.lanes, self.spec.block
        scale = bind(splat(a["scale"] * const(math.LOG2_E), lanes))
        with loop(0, a["depth"]) as d:
            at = bind(self.base["q"] + d * a["q_row"])
            self.each_query_vector(
                lambda v: self.put(d * block + v, load(a["q"], at + v, lanes) * scale)
            )

        def clear(v: Expr) -> None:
            self.put(self.top + v, self.constant(_LOWEST * math.LOG2_E))
            self.put(self.peak + v, self.constant(_LOWEST * math.LOG2_E))
            self.put(self.sum + v, self.constant(0.0))

        self.each_query_vector(clear)

    def tile_keys(self, t: Expr) -> Expr:
        """Keys in tile t of the chunk."""
        width = self.spec.key_block
        left = self.a["keys"] - (self.first + t) * width
        return bind(emit.minimum(const(width, "int32"), left))

    def scores(self) -> None:
        """weights[j, :] = log2(e) (scale * sum_d k[d, j] q[d, :] + mask)."""
        with loop(0, self.n_tiles) as t:
            keys = self.tile_keys(t)
            row = bind(t * self.spec.key_block)
            at = bind(self.base["k"] + (self.first + t) * self.a["k_tile"])
            self.spans(
                lambda span, n: in_groups(
                    keys,
                    self.spec.group,
                    lambda j, group: self.score_group(at, row, j, group, span, n),
                )
            )

    def score_group(self, at: Expr, row: Expr, j: Expr, group: int, span: Expr, n: int) -> None:
        a, lanes, block = self.a, self.spec.lanes, self.spec.block
        side = bind(span * lanes)
        acc = [[Cell("float32", lanes) for _ in range(n)] for _ in range(group)]
        for r, cells in enumerate(acc):
            masks = self.masks(self.first * self.spec.key_block + row + j + r, side)
            for v, cell in enumerate(cells):
                cell.set(masks(v))
        key = bind(at + j)

        def feature(d: Expr) -> None:
            here, k_row = bind(d * block + side), bind(key + d * a["k_row"])
            multiply_add(
                acc,
                lambda r: splat(load(a["k"], k_row + r), lanes),
                lambda v: self.get(here + v * lanes),
            )

        unrolled(a["depth"], _UNROLLED, feature)
        to = bind(self.weights + (row + j) * block + side)
        for r, cells in enumerate(acc):
            for v, cell in enumerate(cells):
                self.put(to + r * block + v * lanes, cell.get())
        for v in range(n):
            peak = bind(self.peak + side + v * lanes)
            highest = self.get(peak)
            for cells in acc:
                highest = emit.maximum(highest, cells[v].get())
            self.put(peak, highest)

    def masks(self, key: Expr, side: Expr) -> Callable[[int], Expr]:
        """Per vector of queries what is added to the scores of `key`."""
        a, lanes, kind = self.a, self.spec.lanes, self.spec.mask
        if kind == "none":
            return lambda v: self.constant(0.0)
        if kind == "key":
            number = load(a["mask"], self.image * a["mask_image"] + key)
            one = bind(splat(number * const(math.LOG2_E), lanes))
            return lambda v: one
        at = self.image * a["mask_image"] + self.head * a["mask_head"]
        at = bind(at + self.tile * a["mask_tile"] + key * a["mask_row"] + side)
        return lambda v: load(a["mask"], at + v * lanes, lanes) * self.constant(math.LOG2_E)

    def softmax(self) -> None:
        """weights = 2^(weights - top), 1 / their sum, and the factor for what came before."""
        spec, lanes = self.spec, self.spec.lanes
        count = emit.minimum(
            self.n_tiles * spec.key_block, self.a["keys"] - self.first * spec.key_block
        )
        count = bind(count)

        def columns(span: Expr, n: int) -> None:
            side = [bind((span + v) * lanes) for v in range(n)]
            tops = [bind(self.get(self.peak + s)) for s in side]
            totals = [Cell("float32", lanes) for _ in range(n)]
            for total in totals:
                total.set(self.constant(0.0))
            with loop(0, count) as j:
                for s, top, total in zip(side, tops, totals):
                    place = bind(self.weights + j * spec.block + s)
                    e = math.hold(math.exp2_negative(self.get(place) - top))
                    total.set(total.get() + e)
                    self.put(place, e)
            for s, top, total in zip(side, tops, totals):
                factor = math.hold(math.exp2_negative(self.get(self.top + s) - top))
                self.put(self.factor + s, factor)
                self.put(self.top + s, top)
                summed = math.hold(self.get(self.sum + s) * factor + total.get())
                self.put(self.sum + s, summed)
                safe = emit.maximum(summed, self.constant(_SMALLEST))
                self.put(self.inverse + s, self.constant(1.0) / safe)

        self.spans(columns, 2)

    def values(self) -> None:
        """y[d, :] = y[d, :] * factor + sum_j v[d, j] weights[j, :], at last times `inverse`."""
        self.spans(
            lambda span, n: in_groups(
                self.a["value_depth"],
                self.spec.group,
                lambda d, group: self.value_group(d, group, span, n),
            )
        )

    def value_group(self, first: Expr, group: int, span: Expr, n: int) -> None:
        a, lanes, block = self.a, self.spec.lanes, self.spec.block
        side = bind(span * lanes)
        to = bind(self.base["y"] + first * a["y_row"] + side)
        acc = [[Cell("float32", lanes) for _ in range(n)] for _ in range(group)]
        with emit.choose(self.is_first) as (then, otherwise):
            with then:
                for cell in chain.from_iterable(acc):
                    cell.set(self.constant(0.0))
            with otherwise:
                factors = self.row(self.factor + side, n)
                for r, cells in enumerate(acc):
                    for v, cell in enumerate(cells):
                        cell.set(load(a["y"], to + r * a["y_row"] + v * lanes, lanes) * factors[v])
        row = bind(self.base["v"] + first * a["v_row"])
        with loop(0, self.n_tiles) as t:
            at = bind(row + (self.first + t) * a["v_tile"])
            line = bind(self.weights + t * self.spec.key_block * block + side)

            def key(j: Expr) -> None:
                here = bind(line + j * block)
                multiply_add(
                    acc,
                    lambda r: splat(load(a["v"], at + r * a["v_row"] + j), lanes),
                    lambda v: self.get(here + v * lanes),
                )

            unrolled(self.tile_keys(t), _UNROLLED, key)
        with when(self.is_last):
            inverses = self.row(self.inverse + side, n)
            for cells in acc:
                for cell, inverse in zip(cells, inverses):
                    cell.set(cell.get() * inverse)
        for r in range(group):
            for v in range(n):
                store(a["y"], acc[r][v].get(), to + r * a["y_row"] + v * lanes, lanes)

    def row(self, at: Expr, n: int) -> list[Expr]:
        """`n` vectors of a row of scratch."""
        return [bind(self.get(at + v * self.spec.lanes)) for v in range(n)]


def multiply_add(acc: list[list[Cell]], row: Operand, vector: Operand) -> None:
    """acc[r][v] += row(r) * vector(v); the smaller side is held in registers."""
    n = len(acc[0])
    if len(acc) < n:
        rows = [bind(row(r)) for r in range(len(acc))]
        for v in range(n):
            x = bind(vector(v))
            for cells, one in zip(acc, rows):
                cells[v].set(cells[v].get() + one * x)
        return
    vectors = [bind(vector(v)) for v in range(n)]
    for r, cells in enumerate(acc):
        one = bind(row(r))
        for cell, x in zip(cells, vectors):
            cell.set(cell.get() + one * x)


def shape_for(vectors: int, target: Target) -> tuple[int, int]:
    """(span, group): accumulators, one side and one value of the other fill the registers.

    On 16 registers 4 rows of 3 vectors need 7 loads for 12 products, 2 rows of 6 need 8.
    """
    if vectors == 4:
        return 4, max(3, min(4, (target.n_registers - 4) // 4))
    group = 8 if vectors == 1 else 4
    span = max(1, (target.n_registers - 1) // (group + 1))
    return min(vectors, span), group


def reference(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, mask: np.ndarray | None = None
) -> np.ndarray:
    """[heads, queries, depth] and the like -> [heads, queries, value depth], float64."""
    scores = scale * q.astype(np.float64) @ k.astype(np.float64).swapaxes(-1, -2)
    if mask is not None:
        scores = scores + mask
    e = np.exp(scores - np.maximum(scores.max(-1, keepdims=True), _LOWEST))
    return np.asarray(e / np.maximum(e.sum(-1, keepdims=True), _SMALLEST) @ v.astype(np.float64))
