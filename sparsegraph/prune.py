"""One-shot pruning: a dense model and a few real feeds in, the same model with exact zeros out.

Layers are taken in execution order. With `sequential`, each layer is measured on what the layers
pruned before it now produce; with `compensate`, its remaining weights also aim at the outputs of
the original model, so that errors do not pile up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from sparsegraph import reconstruct
from sparsegraph.calibrate import Moments, Products, Rows, Stream, kept_rows
from sparsegraph.errors import UsageError, message
from sparsegraph.layers import Layer
from sparsegraph.recipe import Recipe, select
from sparsegraph.sparsity import WeightPattern, analyze

Array = np.ndarray[Any, Any]
Feed = Mapping[str, Array]
Progress = Callable[[int, int, str], None]

_RECONSTRUCTING = {"sparsegpt": reconstruct.sparsegpt, "admm": reconstruct.admm}
MOST_ROWS = 2048  # rows that one feed adds to a layer's statistics


@dataclass(frozen=True)
class PrunedLayer:
    """One row of the table. `output_error` is the relative RMS change of the layer's output on the
    calibration rows, None without calibration; `method` is what ran, `note` why it is not the
    recipe's."""

    node: str
    weight: str
    shape: tuple[int, ...]
    method: str
    pattern: WeightPattern
    output_error: float | None
    note: str = ""


@dataclass(frozen=True)
class Pruned:
    """The pruned model, one row per pruned layer, and every layer left alone with the reason."""

    model: ir.Model
    table: tuple[PrunedLayer, ...]
    skipped: tuple[tuple[str, str], ...]

    @property
    def density(self) -> float:
        """Share of non-zeros over the pruned weights."""
        n = sum(int(np.prod(row.shape)) for row in self.table)
        return 1 - sum(row.pattern.n_zero for row in self.table) / n


def prune(
    model: ir.Model,
    recipe: str | Recipe,
    calibration: Iterable[Feed] | None = None,
    *,
    progress: Progress | None = None,
) -> Pruned:
    """Prune a copy of `model`; the given one is not changed (unpruned tensors are shared).

    `recipe`: see `Recipe.parse`. `calibration`: feeds, needed by every method but magnitude.
    `progress(done, total, layer)` is called after each layer. Zeros are exact and existing zeros
    stay; the same inputs give the same weights.
    Raises UsageError for a malformed recipe, one that selects no layer, or missing calibration.
    """
    recipe = Recipe.parse(recipe) if isinstance(recipe, str) else recipe
    copy = model.clone()
    chosen, skipped = select(copy, recipe)
    feeds = [] if calibration is None else list(calibration)
    if recipe.needs_calibration and not feeds:
        fix = "pass calibration feeds, or use magnitude"
        raise UsageError(message("recipe", recipe.method, "no calibration", "feeds", fix))
    report = _Report(len(chosen), progress)
    if not feeds:
        for layer in chosen:
            report.add(_by_magnitude(layer, recipe))
    else:
        _Calibrated(model, copy, recipe, feeds).run(chosen, report)
    return Pruned(copy, tuple(report.rows), tuple(skipped))


class _Report:
    """The table under construction."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.rows: list[PrunedLayer] = []
        self._total, self._progress = total, progress

    def add(self, row: PrunedLayer) -> None:
        self.rows.append(row)
        if self._progress is not None:
            self._progress(len(self.rows), self._total, row.node)


def _by_magnitude(layer: Layer, recipe: Recipe) -> PrunedLayer:
    weight = layer.product().astype(np.float64)
    order = _column_order(layer, recipe)
    found = [_restore(reconstruct.magnitude(w[:, order], recipe.structure), order) for w in weight]
    return _store(layer, np.stack(found), "magnitude", None, "")


def _store(
    layer: Layer, product: Array, method: str, error: float | None, note: str
) -> PrunedLayer:
    """Write the pruned weight [group, out, columns] and describe it."""
    layer.value.const_value = ir.tensor(layer.from_product(product), name=layer.value.name)
    shape, pattern = tuple(layer.array().shape), analyze(layer.matrix())
    return PrunedLayer(layer.name, str(layer.value.name), shape, method, pattern, error, note)


def _column_order(layer: Layer, recipe: Recipe) -> Array:
    """Order of columns in which N:M groups count: inputs run fastest, kernel positions slowest."""
    columns = layer.product().shape[2]
    if not recipe.structure.m or layer.node.op_type != "Conv":
        return np.arange(columns)
    return np.arange(columns).reshape(layer.matrix().shape[1], -1).T.ravel()


def _restore(w: Array, order: Array) -> Array:
    restored = np.empty_like(w)
    restored[:, order] = w
    return restored


def _thinned(rows: Array) -> Array:
    """At most about MOST_ROWS rows of a feed, evenly spaced: neighbouring pixels say the same."""
    return rows[:: -(-len(rows) // MOST_ROWS) or 1]


@dataclass
class _Measured:
    """What calibration knows about the layers that read one value.

    `now` are the inputs that the pruned model gives; `before` pairs the original model's inputs
    with them, `drift` pairs the change of the residual with them; both None unless compensating.
    """

    now: Moments
    before: Products | None = None
    drift: Products | None = None

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
class _Calibrated:
    """The layer-by-layer walk of two streams of feeds: the original and the pruned model."""

    original: ir.Model
    copy: ir.Model
    recipe: Recipe
    feeds: Sequence[Feed]

    def run(self, chosen: Sequence[Layer], report: _Report) -> None:
        sources = {v.name: v for node in self.original.graph for v in node.outputs}
        self._sources = sources | {v.name: v for v in self.original.graph.inputs}
        self._now = Stream(self.copy if self.recipe.sequential else self.original, self.feeds)
        self._before = Stream(self.original, self.feeds) if self.recipe.compensate else None
        for group in self._together(chosen):
            measured = self._measure(group)
            for layer in group:
                report.add(self._prune(layer, measured))

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
        value = layer.residual() if self.recipe.compensate and layer.group == 1 else None
        if value is None or layer.node.op_type == "ConvTranspose" or layer.bias() is None:
            return None
        ready = self._now.position(value) <= self._now.position(layer.data)
        return value if ready else None

    def _measure(self, group: Sequence[Layer]) -> _Measured:
        """Statistics of what the layers of a group read, over all feeds."""
        data, residual = group[0].data, self._residual(group[0])
        self._now.advance(self._at(data))
        measured = _Measured(Moments())
        if self._before is not None:
            self._before.advance(self._sources[data.name])
            measured.before = Products()
            measured.drift = Products() if residual is not None else None
        pending: list[tuple[Array, ...]] = []
        for feed in range(len(self.feeds)):
            pending.append(self._rows(feed, group[0], residual))
            if sum(len(rows[0]) for rows in pending) >= MOST_ROWS or feed == len(self.feeds) - 1:
                measured.add(*(np.concatenate(parts) for parts in zip(*pending)))
                pending = []
        return measured

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
        return tuple(_thinned(x) for x in found)

    def _prune(self, layer: Layer, measured: _Measured) -> PrunedLayer:
        weight = layer.product().astype(np.float64)
        bias = layer.bias() if self.recipe.correct_bias else None
        order, wide = _column_order(layer, self.recipe), measured.now.second is None
        found = [
            _solve(w, _Inputs.of(measured, i, order, centred=bias is not None), order, self.recipe)
            for i, w in enumerate(weight)
        ]
        if bias is not None:
            change = np.concatenate([f.bias_change for f in found])
            bias.add(change, f"{layer.value.name}.bias", self.copy.graph)
        is_fallback = wide and self.recipe.method in _RECONSTRUCTING
        note = "input too wide for second moments" if is_fallback else ""
        error = None if wide else float(np.sqrt(np.mean([f.error**2 for f in found])))
        method = "wanda" if is_fallback else self.recipe.method
        return _store(layer, np.stack([f.weight for f in found]), method, error, note)


@dataclass(frozen=True)
class _Inputs:
    """Per-row statistics of one group's columns, in solver order; centred if a bias can move."""

    norm: Array
    mean: Array
    second: Array | None
    mean_before: Array
    cross: Array | None
    drift_mean: Array | float
    drift: Array | None

    @staticmethod
    def of(measured: _Measured, group: int, order: Array, *, centred: bool) -> _Inputs:
        now, before, drift = measured.now, measured.before, measured.drift
        mean = now.mean[group][order]
        off = mean if centred else np.zeros_like(mean)
        second = cross = drifted = None
        mean_before, drift_mean = mean, 0.0
        if now.second is not None:
            second = now.second[group][np.ix_(order, order)] / now.n - np.outer(off, off)
        if before is not None and before.n:
            mean_before = np.asarray(before.total)[group][order] / before.n
            cross = np.asarray(before.product)[group][np.ix_(order, order)] / before.n
            cross -= np.outer(mean_before if centred else off, off)
        if drift is not None and drift.n:
            drift_mean = np.asarray(drift.total)[group] / drift.n
            drifted = np.asarray(drift.product)[group][:, order] / drift.n
            drifted -= np.outer(drift_mean, off)
        norm = now.norm[group][order]
        return _Inputs(norm, mean, second, mean_before, cross, drift_mean, drifted)


@dataclass(frozen=True)
class _Solved:
    weight: Array
    bias_change: Array
    error: float


def _solve(w: Array, x: _Inputs, order: Array, recipe: Recipe) -> _Solved:
    """One group's weight [out, columns], pruned; the error compares it with what was aimed at."""
    w = w[:, order]
    target, found = w, _by_score(w, x, recipe)
    if x.second is not None and recipe.method in _RECONSTRUCTING:
        if x.cross is not None:
            target = reconstruct.retarget(w, x.cross, x.second, x.drift)
        found = _RECONSTRUCTING[recipe.method](target, x.second, recipe.structure, w == 0)
    error = 0.0 if x.second is None else reconstruct.output_error(found - target, target, x.second)
    change = w @ x.mean_before - found @ x.mean + x.drift_mean
    return _Solved(_restore(found, order), change, error)


def _by_score(w: Array, x: _Inputs, recipe: Recipe) -> Array:
    if recipe.method == "magnitude":
        return reconstruct.magnitude(w, recipe.structure)
    return reconstruct.wanda(w, x.norm, recipe.structure)
