"""Walk a model layer by layer with calibration feeds in flight, measuring what each layer reads.

Two streams: the pruned model (whose weights change behind the walk) and, to compensate, the
original. Memory: the feeds, two times `calibrate.LARGEST_STATE_BYTES`, and the moments of one
group of layers, 24 * groups * columns^2 bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from sparsegraph.calibrate import Feed, Moments, Products, Rows, Stream, kept_rows
from sparsegraph.errors import UsageError, message
from sparsegraph.layers import Layer
from sparsegraph.recipe import Recipe

Array = np.ndarray[Any, Any]

MOST_ROWS = 2048  # rows that one feed adds to a layer's statistics
EQUAL_ROWS = 64  # the same where every feed counts alike


@dataclass
class Measured:
    """What calibration knows about the layers that read one value.

    `now` are the inputs that the pruned model gives; `before` pairs the original model's inputs
    with them, `drift` pairs the change of the residual with them; both None unless compensating.
    """

    now: Moments
    before: Products | None = None
    drift: Products | None = None

    @property
    def is_finite(self) -> bool:
        """Whether no row had a NaN or an infinity, and no sum overflowed."""
        paired = [products for products in (self.before, self.drift) if products is not None]
        return self.now.is_finite and all(np.isfinite(x.product).all() for x in paired)

    def add(self, now: Array, before: Array | None = None, lost: Array | None = None) -> None:
        """Add matching rows; products are left out where second moments are too wide."""
        self.now.add(now)
        if self.now.second is None:
            return
        if self.before is not None and before is not None:
            self.before.add(before, now)
        if self.drift is not None and lost is not None:
            self.drift.add(lost, now)


@dataclass
class Walk:
    """`original` and its copy that is being pruned, node by node alike."""

    original: ir.Model
    copy: ir.Model
    recipe: Recipe
    feeds: Sequence[Feed]

    def measured(self, chosen: Sequence[Layer]) -> Iterator[tuple[Layer, Measured]]:
        """Every layer of `copy` with its statistics, in execution order.

        With `sequential`, weights that the caller changed before asking for the next layer count.
        """
        sources = {v.name: v for node in self.original.graph for v in node.outputs}
        self._sources = sources | {v.name: v for v in self.original.graph.inputs}
        self._now = Stream(self.copy if self.recipe.sequential else self.original, self.feeds)
        self._before = Stream(self.original, self.feeds) if self.recipe.compensates else None
        for group in self._together(chosen):
            measured = self._measure(group)
            for layer in group:
                yield layer, measured

    def _together(self, chosen: Sequence[Layer]) -> list[list[Layer]]:
        """Layers that read the same rows share one measurement; in order of those rows.

        A layer that is joined to a residual has its own.
        """
        groups: dict[tuple[str, Rows, str], list[Layer]] = {}
        for layer in chosen:
            residual = self._residual(layer)
            alone = layer.name if residual is not None else ""
            groups.setdefault((str(layer.data.name), layer.rows(), alone), []).append(layer)
        return sorted(
            groups.values(), key=lambda group: self._now.position(self._at(group[0].data))
        )

    def _at(self, value: ir.Value) -> ir.Value:
        """`value` in the model that the stream runs."""
        return value if self.recipe.sequential else self._sources[value.name]

    def _residual(self, layer: Layer) -> ir.Value | None:
        """A residual that compensation can see: it exists before the layer runs."""
        value = layer.residual() if self.recipe.compensates and layer.group == 1 else None
        if value is None or layer.node.op_type == "ConvTranspose" or layer.bias() is None:
            return None
        ready = self._now.position(value) <= self._now.position(layer.data)
        return value if ready else None

    def _measure(self, group: Sequence[Layer]) -> Measured:
        """Statistics of what the layers of a group read, over all feeds."""
        data, residual = group[0].data, self._residual(group[0])
        self._now.advance(self._at(data))
        measured = Measured(Moments())
        if self._before is not None:
            self._before.advance(self._sources[data.name])
            measured.before = Products()
            measured.drift = Products() if residual is not None else None
        pending: list[tuple[Array, ...]] = []
        for feed in range(len(self.feeds)):
            pending.append(self._rows(feed, group[0], residual))
            if sum(len(rows[0]) for rows in pending) >= MOST_ROWS or feed == len(self.feeds) - 1:
                with np.errstate(over="ignore", invalid="ignore"):
                    measured.add(*(np.concatenate(parts) for parts in zip(*pending)))
                pending = []
        if not measured.now.n:
            found, need, fix = "no rows", "at least one", "pass feeds that are not all padding"
            raise UsageError(message("calibration", str(data.name), found, need, fix))
        if not measured.is_finite:
            found = f"NaN, infinite or huge values{self._culprit(group[0], residual)}"
            need = "finite ones on all calibration feeds"
            fix = "correct the feeds, or leave the layers that read it out with ignore="
            raise UsageError(message("calibration", str(data.name), found, need, fix))
        return measured

    def _culprit(self, layer: Layer, residual: ir.Value | None) -> str:
        """Which feed is to blame, and which of its inputs; empty if only sums are too large."""
        for at, feed in enumerate(self.feeds):
            if not all(np.isfinite(rows).all() for rows in self._rows(at, layer, residual)):
                inputs = [n for n, x in feed.items() if x.dtype.kind == "f" and np.isnan(x).any()]
                return f" in feed {at}" + "".join(f" (its input {n} has NaN)" for n in inputs)
        return ""

    def _rows(self, feed: int, layer: Layer, residual: ir.Value | None) -> tuple[Array, ...]:
        """Matching rows of one feed: inputs now, inputs before, change of the residual."""
        keep, rows = kept_rows(self.feeds[feed], self.recipe.mask), layer.rows()
        found = [rows.of(self._now.value(feed, self._at(layer.data)), keep)]
        if self._before is not None:
            found.append(rows.of(self._before.value(feed, self._sources[layer.data.name]), keep))
        if self._before is not None and residual is not None:
            lost = self._before.value(feed, self._sources[residual.name])
            lost = lost - self._now.value(feed, residual)
            found.append(Rows(feature_axis=1 if layer.is_convolution else -1).of(lost, keep))
        return tuple(_evened(x) if self.recipe.balance else _thinned(x) for x in found)


def _evened(rows: Array) -> Array:
    """EQUAL_ROWS rows of a feed, evenly spaced; a shorter one repeats some."""
    return rows[np.arange(EQUAL_ROWS if len(rows) else 0) * len(rows) // EQUAL_ROWS]


def _thinned(rows: Array) -> Array:
    """At most about MOST_ROWS rows of a feed, evenly spaced: neighbouring pixels say the same."""
    return rows[:: -(-len(rows) // MOST_ROWS) or 1]
