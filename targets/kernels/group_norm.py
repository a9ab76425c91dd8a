"""Normalisation over the points of some features: InstanceNorm (one feature), GroupNorm.

    y = (x - mean) / sqrt(var + epsilon) * scale[feature] + bias[feature]

mean and variance are over all points of a group of neighbouring features. One formula of strides
(targets/layout.py) serves feature-major values and row-major maps. The first value is subtracted
before summing and the mean before squaring, and sums are of partial sums over 16 tiles, so that
rounding does not grow with the map.
Items: images * groups.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from sparsegraph.targets import emit
from sparsegraph.targets.emit import Cell, Expr, bind, const, load, loop, splat, store
from sparsegraph.targets.kernels.math import cast, hold
from sparsegraph.targets.kernels.vectors import each_vector
from sparsegraph.targets.target import Target

_TILES = 16  # per partial sum
_WAYS = 4  # sums at a time: an addition takes 4 cycles


@dataclass(frozen=True)
class GroupNorm:
    """Spec of one kernel.

    Attributes:
        vectors: vectors of points in one tile.
        lanes: float32 values in a vector.
    """

    vectors: int
    lanes: int

    @property
    def name(self) -> str:
        return f"group_norm_f32_v{self.vectors}_l{self.lanes}"

    @property
    def params(self) -> emit.Signature:
        side = "{0}:float32* {0}_image:int32 {0}_tile:int32 {0}_row:int32 "
        return emit.signature(
            side.format("y") + side.format("x") + "scale:float32* bias:float32* epsilon:float32 "
            "points:int32 tiles:int32 groups:int32 features:int32"
        )

    def body(self, target: Target) -> Any:
        return lambda **args: _Emitter(self, args).run()


class _Emitter:
    """`features` are those of one group."""

    def __init__(self, spec: GroupNorm, args: dict[str, Expr]) -> None:
        self.spec, self.a = spec, args

    def run(self) -> None:
        a = self.a
        with loop(a["begin"], a["end"]) as item:
            image = bind(emit.divide(item, a["groups"]))
            self.first = bind(emit.modulo(item, a["groups"]) * a["features"])
            self.base = {
                p: bind(image * a[f"{p}_image"] + self.first * a[f"{p}_row"]) for p in "yx"
            }
            share = bind(const(1.0) / cast(a["points"] * a["features"], "float32"))
            shift = bind(load(a["x"], self.base["x"]))
            near = self.total(lambda x, lanes: hold(x - splat(shift, lanes)))
            mean = hold(shift + near * share)

            def square(x: Expr, lanes: int) -> Expr:
                return hold((centred := hold(x - splat(mean, lanes))) * centred)

            variance = self.total(square) * share
            factor = hold(const(1.0) / emit.T.sqrt(variance + a["epsilon"]))
            with loop(0, a["features"]) as feature:
                gain = hold(load(a["scale"], self.first + feature) * factor)
                bias = bind(load(a["bias"], self.first + feature))

                def finish(x: Expr, lanes: int, to: Expr) -> None:
                    centred = hold(x - splat(mean, lanes))
                    value = centred * splat(gain, lanes) + splat(bias, lanes)
                    store(a["y"], value, to, lanes)

                with loop(0, a["tiles"]) as tile:
                    row = bind(self.base["y"] + feature * a["y_row"] + tile * a["y_tile"])
                    self.tile(
                        feature, tile, lambda x, at, lanes, _: finish(x, lanes, bind(row + at))
                    )

    def tile(self, feature: Expr, tile: Expr, visit: Callable[[Expr, Any, int, int], None]) -> None:
        """visit(values, place in the tile, lanes, way) for the points of one tile."""
        a, lanes, block = self.a, self.spec.lanes, self.spec.vectors * self.spec.lanes
        source = bind(self.base["x"] + feature * a["x_row"] + tile * a["x_tile"])
        left = bind(a["points"] - tile * block)
        with emit.choose(left < block) as (partly, wholly):
            with partly:
                each_vector(
                    left,
                    lanes,
                    lambda at, n: visit(hold(load(a["x"], source + at, n)), at, n, 0),
                )
            with wholly:
                for v in range(self.spec.vectors):
                    at = v * lanes
                    visit(hold(load(a["x"], source + at, lanes)), at, lanes, v % _WAYS)

    def total(self, value: Callable[[Expr, int], Expr]) -> Expr:
        """The sum of `value` over all points of the group."""
        a, lanes = self.a, self.spec.lanes
        ways = min(_WAYS, self.spec.vectors)
        total, rest = Cell("float32", lanes), Cell("float32", 1)
        parts = [Cell("float32", lanes) for _ in range(ways)]
        total.set(splat(const(0.0), lanes))
        rest.set(const(0.0))

        def add(x: Expr, at: Any, n: int, way: int) -> None:
            cell = parts[way] if n == lanes else rest
            cell.set(cell.get() + value(x, n))

        chunks = bind(emit.divide(a["tiles"] + (_TILES - 1), _TILES))
        with loop(0, a["features"]) as feature, loop(0, chunks) as chunk:
            for part in parts:
                part.set(splat(const(0.0), lanes))
            first = bind(chunk * _TILES)
            with loop(first, emit.minimum(first + _TILES, a["tiles"])) as tile:
                self.tile(feature, tile, add)
            for part in parts:
                total.set(total.get() + part.get())
        whole = bind(total.get())
        return hold(sum((emit.shuffle([whole], [i]) for i in range(lanes)), rest.get()))


def reference(
    x: np.ndarray, groups: int, scale: np.ndarray, bias: np.ndarray, epsilon: float
) -> np.ndarray:
    """Float64 meaning for x [images, features, points]."""
    parts = x.astype(np.float64).reshape(len(x), groups, -1)
    parts = parts - parts.mean(2, keepdims=True)
    y = parts / np.sqrt((parts * parts).mean(2, keepdims=True) + epsilon)
    return np.asarray(y.reshape(x.shape) * scale[:, None] + bias[:, None])
