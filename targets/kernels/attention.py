"""Attention with features in rows and queries in lanes: softmax(scale * Q K^T + mask) V.

One item is one tile of queries of one head of one image. Its scores [keys, block] stay in scratch
(level 1 or 2 cache); both products broadcast single keys and values over vectors of queries, as
the product kernels do with weights; softmax runs down the columns, so nothing is reduced across
lanes. Source of the operator: ONNX Attention (opset 23).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from sparsegraph.targets import emit
from sparsegraph.targets.emit import Cell, Expr, bind, const, load, loop, splat, store
from sparsegraph.targets.kernels import math
from sparsegraph.targets.target import Target

_LOWEST = -2e30  # scores below are masked: a row of them gives zeros, as in ONNX Runtime
_SMALLEST = 1e-30  # a sum with one key that is not masked is at least 1


@dataclass(frozen=True)
class Attention:
    """Spec of one attention kernel.

    Attributes:
        vectors: vectors of queries in one tile.
        lanes: float32 values in a vector.
        group: keys (or value features) computed together.
        key_block: block of keys and values (points per tile of k and v).
        mask: `none`; `key` (added per key, [images, keys]); `full` (added per key and query,
            feature-major with keys as features).
    """

    vectors: int
    lanes: int
    group: int
    key_block: int
    mask: str = "none"

    @property
    def name(self) -> str:
        shape = f"v{self.vectors}_l{self.lanes}_g{self.group}_k{self.key_block}"
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

    def scratch_bytes(self, keys: int) -> int:
        """Scores of one tile, its maxima and sums."""
        return 4 * self.block * (keys + 3)

    def body(self, target: Target) -> Any:
        return lambda **args: _Emitter(self, args).run()


class _Emitter:
    def __init__(self, spec: Attention, args: dict[str, Expr]) -> None:
        self.spec, self.a = spec, args
        split = (spec.vectors,) if spec.vectors <= 6 else (4, spec.vectors - 4)
        self.split = split
        self.spans = [(sum(split[:i]), n) for i, n in enumerate(split)]

    def run(self) -> None:
        a, spec = self.a, self.spec
        per_image = bind(a["heads"] * a["tiles"])
        with loop(a["begin"], a["end"]) as item:
            self.image = bind(emit.divide(item, per_image))
            head = bind(emit.divide(emit.modulo(item, per_image), a["tiles"]))
            shared = bind(
                emit.divide(head, a["share"])
            )  # grouped queries: several heads, one key head
            self.head = head
            self.tile = bind(emit.modulo(item, a["tiles"]))
            base = {"y": head, "q": head, "k": shared, "v": shared}
            self.base = {
                p: bind(self.image * a[f"{p}_image"] + h * a[f"{p}_head"]) for p, h in base.items()
            }
            for p in "yq":
                self.base[p] = bind(self.base[p] + self.tile * a[f"{p}_tile"])
            self.max_at = bind(a["keys"] * spec.block)
            self.scores()
            self.softmax()
            self.values()

    def point(self, operand: str, index: Expr) -> Expr:
        """Address of point `index` of k or v, feature 0 of the head."""
        block = self.spec.key_block
        at = emit.divide(index, block) * self.a[f"{operand}_tile"] + emit.modulo(index, block)
        return bind(self.base[operand] + at)

    def scores(self) -> None:
        """scratch[j, :] = scale * sum_d k[d, j] q[d, :] + mask, and the maxima over j."""
        a, spec, lanes = self.a, self.spec, self.spec.lanes
        for v in range(spec.vectors):
            store(a["scratch"], splat(const(-np.inf), lanes), self.max_at + v * lanes, lanes)
        self.in_groups(a["keys"], self.score_group)

    def in_groups(self, count: Expr, body: Any) -> None:
        """body(first, group) over `count` rows; the rest one by one."""
        group = self.spec.group
        full = bind(emit.divide(count, group))
        for first, n in self.spans:
            with loop(0, full) as g:
                body(bind(g * group), group, first, n)
            with loop(full * group, count) as j:
                body(j, 1, first, n)

    def score_group(self, first: Expr, group: int, span: int, n: int) -> None:
        a, lanes, block = self.a, self.spec.lanes, self.spec.block
        acc = [[Cell("float32", lanes) for _ in range(n)] for _ in range(group)]
        keys = [self.point("k", first + r) for r in range(group)]
        for cells in acc:
            for cell in cells:
                cell.set(splat(const(0.0), lanes))
        with loop(0, a["depth"]) as d:
            at = bind(self.base["q"] + d * a["q_row"] + span * lanes)
            k = [bind(splat(load(a["k"], key + d * a["k_row"]), lanes)) for key in keys]
            for v in range(n):
                q = bind(load(a["q"], at + v * lanes, lanes))
                for r in range(group):
                    acc[r][v].set(acc[r][v].get() + k[r] * q)
        scale = bind(splat(a["scale"], lanes))
        for r in range(group):
            masks = self.mask_loads(first + r, span)
            for v in range(n):
                acc[r][v].set(acc[r][v].get() * scale)
                if masks is not None:
                    acc[r][v].set(acc[r][v].get() + masks(v))
                to = (first + r) * block + (span + v) * lanes
                store(a["scratch"], acc[r][v].get(), to, lanes)
        for v in range(n):
            at = self.max_at + (span + v) * lanes
            top = load(a["scratch"], at, lanes)
            for r in range(group):
                top = bind(emit.maximum(top, acc[r][v].get()))
            store(a["scratch"], top, at, lanes)

    def mask_loads(self, key: Expr, span: int) -> Any:
        a, lanes, kind = self.a, self.spec.lanes, self.spec.mask
        if kind == "none":
            return None
        if kind == "key":
            one = bind(splat(load(a["mask"], self.image * a["mask_image"] + key), lanes))
            return lambda v: one
        at = self.image * a["mask_image"] + self.head * a["mask_head"]
        at = bind(at + self.tile * a["mask_tile"] + key * a["mask_row"] + span * lanes)
        return lambda v: load(a["mask"], at + v * lanes, lanes)

    def softmax(self) -> None:
        """scratch = exp(scratch - max); the inverse sums replace the maxima."""
        a, spec, lanes = self.a, self.spec, self.spec.lanes
        with loop(0, spec.vectors) as v:
            at = bind(self.max_at + v * lanes)
            lowest = splat(const(_LOWEST), lanes)
            top = bind(emit.maximum(load(a["scratch"], at, lanes), lowest))
            total = Cell("float32", lanes)
            total.set(splat(const(0.0), lanes))
            with loop(0, a["keys"]) as j:
                place = bind(j * spec.block + v * lanes)
                e = bind(math.exp(load(a["scratch"], place, lanes) - top))
                total.set(total.get() + e)
                store(a["scratch"], e, place, lanes)
            safe = emit.maximum(total.get(), splat(const(_SMALLEST), lanes))
            store(a["scratch"], splat(const(1.0), lanes) / safe, at, lanes)

    def values(self) -> None:
        """y[d, :] = sum_j v[d, j] scratch[j, :] / sum."""
        self.in_groups(self.a["value_depth"], self.value_group)

    def value_group(self, first: Expr, group: int, span: int, n: int) -> None:
        a, lanes, block = self.a, self.spec.lanes, self.spec.block
        acc = [[Cell("float32", lanes) for _ in range(n)] for _ in range(group)]
        for cells in acc:
            for cell in cells:
                cell.set(splat(const(0.0), lanes))
        width = self.spec.key_block
        with loop(0, emit.divide(a["keys"] + (width - 1), width)) as t:
            row = bind(self.base["v"] + t * a["v_tile"] + first * a["v_row"])
            with loop(0, emit.minimum(const(width, "int32"), a["keys"] - t * width)) as j:
                at = bind((t * width + j) * block + span * lanes)
                w = [bind(splat(load(a["v"], row + r * a["v_row"] + j), lanes))
                     for r in range(group)]  # fmt: skip
                for v in range(n):
                    p = bind(load(a["scratch"], at + v * lanes, lanes))
                    for r in range(group):
                        acc[r][v].set(acc[r][v].get() + w[r] * p)
        for v in range(n):
            inverse = bind(load(a["scratch"], self.max_at + (span + v) * lanes, lanes))
            for r in range(group):
                to = self.base["y"] + (first + r) * a["y_row"] + (span + v) * lanes
                store(a["y"], acc[r][v].get() * inverse, to, lanes)


def group_for(vectors: int, target: Target) -> int:
    """Rows whose accumulators fit the registers beside one query vector and the broadcasts."""
    widest = vectors if vectors <= 6 else max(4, vectors - 4)
    return max(1, min(4, (target.n_registers - 4) // widest))


def reference(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, mask: np.ndarray | None = None
) -> np.ndarray:
    """[heads, queries, depth] and the like -> [heads, queries, value depth], float64."""
    scores = scale * q.astype(np.float64) @ k.astype(np.float64).swapaxes(-1, -2)
    if mask is not None:
        scores = scores + mask
    e = np.exp(scores - np.maximum(scores.max(-1, keepdims=True), _LOWEST))
    return np.asarray(e / np.maximum(e.sum(-1, keepdims=True), _SMALLEST) @ v.astype(np.float64))
