"""What every density of every layer costs in time, bytes and multiply-adds, and in quality."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from sparsegraph import targets
from sparsegraph.bench import dense_node_ms
from sparsegraph.calibrate import Feed
from sparsegraph.criteria.table import NOTHING
from sparsegraph.errors import UsageError, message
from sparsegraph.feeds import checked
from sparsegraph.inspect import always_dense, gain
from sparsegraph.layers import Layer, weighted
from sparsegraph.recipe import MASKS, Recipe
from sparsegraph.sensitivity import Alone, Loss
from sparsegraph.solve import solve
from sparsegraph.targets.target import Target
from sparsegraph.walk import Measured

Array = np.ndarray[Any, Any]
Progress = Callable[[int, int, str], None]

DENSITIES = (1.0, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.07, 0.05)
_PIVOT = 0.3  # the density at which a layer's part in the model's loss is measured
_BYTES, _CODED_BYTES = 4, 6  # per value: fp32, with a 16 bit column index where it is coded


@dataclass(frozen=True)
class Option:
    """One density of one layer. `loss` adds up over layers; `macs` are multiply-adds."""

    density: float
    loss: float
    ms: float
    n_bytes: float
    macs: float


@dataclass(frozen=True)
class LayerOptions:
    """A layer and its densities, densest first."""

    layer: str
    n_weights: int
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Table:
    """All layers that can be pruned, and what the rest of the model costs whatever is chosen."""

    layers: tuple[LayerOptions, ...]
    rest_ms: float
    rest_bytes: float
    rest_macs: float


def tabulate(
    model: ir.Model,
    recipe: str | Recipe,
    calibration: Iterable[Feed],
    *,
    target: Target | str = "native",
    dense_ms: Mapping[str, float] | None = None,
    measured_ms: Mapping[str, Mapping[float, float]] | None = None,
    loss: Loss | None = None,
    densities: Sequence[float] = DENSITIES,
    progress: Progress | None = None,
) -> Table:
    """Measure and model every (layer, density).

    A layer's loss curve is the error of its own output, with Wanda where the recipe's criterion
    moves weights (same order, a fraction of the time), scaled so that at density 0.3 it is the loss
    of the whole model with that layer alone pruned; additivity as in Xu et al. 2023
    (arXiv:2308.10438). Layers whose input is too wide for second moments get a line instead.

    Time: ONNX Runtime's dense milliseconds of the layer times the cost model of
    `sparsegraph.lower.cost`, unless `measured_ms` has milliseconds by layer and density.

    Args:
        recipe: which layers, which structure, which criterion, which floor; its share of zeros does
            not count.
        dense_ms: milliseconds by node name; measured here in ONNX Runtime if None.
        loss: see `sensitivity.scan`.

    Raises UsageError for N:M recipes, outside masks, unknown shapes, or no feeds.
    """
    recipe = Recipe.parse(recipe) if isinstance(recipe, str) else recipe
    if recipe.structure.m or recipe.method == MASKS:
        need, fix = "a recipe whose density can vary", "write for instance admm:0.5"
        raise UsageError(message("budget", str(recipe), "a fixed density", need, fix))
    densities = [d for d in densities if d >= min(recipe.floor, max(densities))]
    feeds = checked(model, calibration)
    quick = _quick(recipe)
    alone = Alone(model, quick, feeds, loss)
    node_ms = dict(dense_node_ms(model, feeds[0]) if dense_ms is None else dense_ms)
    machine = targets.get(target) if isinstance(target, str) else target
    rows: list[LayerOptions] = []
    spent = _Spent(machine, node_ms, _rate(model, node_ms), measured_ms or {})
    inside: list[Layer] = []
    for layer, measured in alone:
        if layer.macs() is None:
            need, fix = "a static shape of its output", "load the model with shapes"
            raise UsageError(message("budget", layer.name, "an unknown shape", need, fix))
        losses = _losses(layer, quick, measured, alone, densities)
        options = [spent.option(layer, d, lost) for d, lost in zip(densities, losses)]
        rows.append(LayerOptions(layer.name, layer.array().size, tuple(options)))
        inside.append(layer)
        if progress is not None:
            progress(len(rows), alone.n_layers, layer.name)
    return Table(tuple(rows), *_rest(model, inside, node_ms))


def _quick(recipe: Recipe) -> Recipe:
    criterion = recipe.criterion
    measured = criterion is not None and criterion.needs != NOTHING
    structure = replace(recipe.structure, per_row=recipe.structure.per_row or measured)
    method = "wanda" if measured else recipe.method
    return replace(recipe, method=method, structure=structure, swap=False, refit=False)


def _losses(
    layer: Layer, recipe: Recipe, measured: Measured, alone: Alone, densities: Sequence[float]
) -> list[float]:
    """The model's loss at every density of one layer, non-decreasing as the density falls."""
    pivot = solve(layer, recipe, replace(recipe.structure, sparsity=1 - _PIVOT), measured)
    whole = alone.loss(layer, pivot)
    found = []
    for density in densities:
        structure = replace(recipe.structure, sparsity=1 - density)
        own = solve(layer, recipe, structure, measured).distortion
        if own is None or not pivot.distortion:
            found.append(whole * (1 - density) / (1 - _PIVOT))
        else:
            found.append(whole * own / pivot.distortion)
    return [float(loss) for loss in np.maximum.accumulate(found)]


@dataclass(frozen=True)
class _Spent:
    """What one layer costs at a density."""

    target: Target
    node_ms: Mapping[str, float]
    ms_per_mac: float
    measured_ms: Mapping[str, Mapping[float, float]]

    def option(self, layer: Layer, density: float, loss: float) -> Option:
        size, macs = layer.array().size, float(layer.macs() or 0)
        choice = None if always_dense(layer) else gain(layer, density, self.target)
        form, speedup = (choice.weight, choice.speedup) if choice else ("dense", 1.0)
        dense = self.node_ms.get(layer.name, macs * self.ms_per_mac)
        ms = self.measured_ms.get(layer.name, {}).get(density, dense / speedup)
        n_bytes = size * (_CODED_BYTES * density if form in ("coded", "slots") else _BYTES)
        return Option(density, loss, ms, n_bytes, macs * density)


def _rate(model: ir.Model, node_ms: Mapping[str, float]) -> float:
    """Milliseconds per multiply-add over the layers that were timed."""
    timed = [(node_ms[x.name], x.macs() or 0) for x in weighted(model) if x.name in node_ms]
    return sum(ms for ms, _ in timed) / max(sum(macs for _, macs in timed), 1)


def _rest(
    model: ir.Model, inside: Sequence[Layer], node_ms: Mapping[str, float]
) -> tuple[float, float, float]:
    """(milliseconds, bytes, multiply-adds) of everything but the given layers."""
    names = {layer.name for layer in inside}
    weights = {layer.value.name for layer in inside}
    constants = model.graph.initializers.items()
    tensors = [v.const_value for name, v in constants if name not in weights]
    return (
        sum(ms for name, ms in node_ms.items() if name not in names),
        float(sum(tensor.nbytes for tensor in tensors if tensor is not None)),
        float(sum(x.macs() or 0 for x in weighted(model) if x.name not in names)),
    )
