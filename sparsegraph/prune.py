"""One-shot pruning: a dense model and a few real feeds in, the same model with exact zeros out.

Layers are taken in execution order. With `sequential`, each layer is measured on what the layers
pruned before it now produce; with `compensate`, its remaining weights also aim at the outputs of
the original model, so that errors do not pile up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from sparsegraph import half
from sparsegraph.batch_norm import reestimate
from sparsegraph.budget import forward
from sparsegraph.budget.allocate import ALLOCATIONS, FORWARD, UNIFORM
from sparsegraph.criteria.structure import Structure
from sparsegraph.errors import UsageError, message
from sparsegraph.feeds import checked
from sparsegraph.gradients import Gradient
from sparsegraph.layers import Layer, weighted
from sparsegraph.masks import Masks, apply, check_masks
from sparsegraph.permute import permute
from sparsegraph.probe import slopes
from sparsegraph.recipe import MASKS, Recipe, impossible, select
from sparsegraph.solve import Solved, solve
from sparsegraph.sparsity import WeightPattern, analyze
from sparsegraph.walk import Measured, Walk

Array = np.ndarray[Any, Any]
Feed = Mapping[str, Array]
Progress = Callable[[int, int, str], None]


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
        return 1 - sum(row.pattern.n_zero for row in self.table) / n if n else 1.0


def prune(
    model: ir.Model,
    recipe: str | Recipe,
    calibration: Iterable[Feed] | None = None,
    *,
    masks: Masks | None = None,
    densities: Mapping[str, float] | None = None,
    gradients: Mapping[str, Gradient] | None = None,
    progress: Progress | None = None,
) -> Pruned:
    """Prune a copy of `model`; the given one is not changed (unpruned tensors are shared).

    Args:
        recipe: see `Recipe.parse`.
        calibration: feeds, needed by criteria that look at activations, by `swap` and by `refit`.
        masks: boolean arrays (True stays) by weight name, for the recipe `masks`; see `read_masks`.
        densities: share of non-zeros by layer (node) name, in place of the recipe's; a layer with
            density 1 is left alone.
        gradients: by weight name, for `taylor` and `fisher`; see `sparsegraph.gradients`. Without
            them `fisher` estimates from runs of the model.
        progress: `progress(done, total, layer)` is called after each layer.

    Zeros are exact and existing zeros stay; the same inputs and seed give the same weights, those
    of float16 rounded in the end.
    Raises UsageError for a malformed recipe, one that selects no layer, masks or densities that fit
    no layer, missing calibration, feeds that are not the model's inputs, or NaN in what they give.
    """
    wide = half.widened(model, verify=False).model
    if wide is not model:
        done = prune(
            wide, recipe, calibration, masks=masks, densities=densities, gradients=gradients,
            progress=progress,
        )  # fmt: skip
        return replace(done, model=half.narrowed(done.model, model))
    recipe = Recipe.parse(recipe) if isinstance(recipe, str) else recipe
    feeds = [] if calibration is None else checked(model, calibration)
    if recipe.needs_calibration and not feeds:
        fix = "pass calibration (--calibration FILE.npz), or use magnitude"
        raise UsageError(message("recipe", recipe.method, "no calibration", "feeds", fix))
    if (masks is not None) != (recipe.method == MASKS):
        found = "no masks" if masks is None else "masks"
        need = "masks exactly for the recipe masks"
        fix = (
            "pass masks= (--masks FILE), or another recipe" if masks is None else "drop one of them"
        )
        raise UsageError(message("recipe", str(recipe), found, need, fix))
    if recipe.permute:
        model = permute(model, recipe.structure.n, recipe.structure.m, feeds).model
    job = _Job(model, model.clone(), recipe, feeds, progress)
    if masks is not None:
        return job.with_masks(masks)
    return job.with_criterion(densities, gradients)


def structures(
    recipe: Recipe, chosen: Sequence[Layer], densities: Mapping[str, float] | None = None
) -> dict[str, Structure]:
    """The structure of every layer, by node name: the recipe's, with its own share of zeros.

    Raises UsageError for densities of unknown layers, outside [0, 1], or with N:M.
    """
    if densities is None:
        if recipe.allocate == UNIFORM:
            return dict.fromkeys((layer.name for layer in chosen), recipe.structure)
        weights = [layer.matrix() for layer in chosen]
        found = ALLOCATIONS[recipe.allocate](weights, recipe.structure.sparsity, recipe.floor)
        densities = dict(zip((layer.name for layer in chosen), found))
    unknown = sorted(densities.keys() - {layer.name for layer in chosen})
    wrong = [*unknown, *(name for name, d in densities.items() if not 0 <= d <= 1)]
    if wrong or (recipe.structure.m and densities):
        need = "shares in [0, 1] of layers that the recipe prunes, without N:M"
        found_text = f"density of {', '.join(wrong)}" if wrong else str(recipe.structure)
        raise UsageError(message("densities", str(recipe), found_text, need, "correct them"))
    return {
        layer.name: replace(recipe.structure, sparsity=1 - densities[layer.name])
        if layer.name in densities
        else recipe.structure
        for layer in chosen
    }


@dataclass
class _Job:
    """One call of `prune`."""

    model: ir.Model
    copy: ir.Model
    recipe: Recipe
    feeds: Sequence[Feed]
    progress: Progress | None

    def with_criterion(
        self, densities: Mapping[str, float] | None, gradients: Mapping[str, Gradient] | None
    ) -> Pruned:
        chosen, skipped = select(self.copy, self.recipe)
        if densities is None and self.recipe.allocate == FORWARD:
            densities = self._forward(chosen)
        wanted = structures(self.recipe, chosen, densities)
        full = [layer for layer in chosen if wanted[layer.name].target == 0 and densities]
        skipped += [(layer.name, "its budget is full density") for layer in full]
        chosen = [layer for layer in chosen if layer not in full]
        known = slopes(self.model, self.recipe, chosen, self.feeds, gradients)
        rows = []
        for layer, measured in self._measured(chosen):
            slope = known.get(layer.name)
            solved = solve(layer, self.recipe, wanted[layer.name], measured, slope=slope)
            rows.append(self._store(layer, solved))
            self._report(len(rows), len(chosen), layer.name)
        return self._done(rows, skipped)

    def _forward(self, chosen: Sequence[Layer]) -> dict[str, float]:
        share, floor, seed = self.recipe.structure.sparsity, self.recipe.floor, self.recipe.seed
        return forward.densities(self.model, chosen, self.feeds, share, floor, seed)

    def _done(self, rows: Sequence[PrunedLayer], skipped: Sequence[tuple[str, str]]) -> Pruned:
        if self.recipe.batch_norm:
            reestimate(self.model, self.copy, self.feeds)
        return Pruned(self.copy, tuple(rows), tuple(skipped))

    def with_masks(self, masks: Masks) -> Pruned:
        """Masks on layers are repaired; on any other weight they are only applied."""
        check_masks(self.copy, masks)
        layers = weighted(self.copy)
        repaired = [x for x in layers if x.value.name in masks and not impossible(x)]
        names = {x.value.name for x in repaired}
        rest = {name: mask for name, mask in masks.items() if name not in names}
        apply(self.copy, rest)
        rows = [_described(self.copy, name, layers) for name in rest]
        for layer, measured in self._measured(repaired):
            mask = masks[str(layer.value.name)]
            solved = solve(layer, self.recipe, Structure(), measured, mask)
            rows.append(self._store(layer, solved))
            self._report(len(rows), len(masks), layer.name)
        others = [x.name for x in layers if x.value.name not in masks]
        return self._done(rows, [(name, "no mask given") for name in others])

    def _measured(self, chosen: Sequence[Layer]) -> Iterator[tuple[Layer, Measured | None]]:
        if not self.feeds:
            return iter([(layer, None) for layer in chosen])
        return iter(Walk(self.model, self.copy, self.recipe, self.feeds).measured(chosen))

    def _store(self, layer: Layer, solved: Solved) -> PrunedLayer:
        """Write weight and bias, and describe what was written."""
        bias = layer.bias() if self.recipe.correct_bias else None
        if bias is not None and solved.bias_change is not None:
            bias.add(solved.bias_change, f"{layer.value.name}.bias", self.copy.graph)
        name = str(layer.value.name)
        layer.value.const_value = ir.tensor(layer.from_product(solved.product), name=name)
        shape, pattern = tuple(layer.array().shape), analyze(layer.matrix())
        error, note = solved.error, solved.note
        return PrunedLayer(layer.name, name, shape, solved.method, pattern, error, note)

    def _report(self, done: int, total: int, layer: str) -> None:
        if self.progress is not None:
            self.progress(done, total, layer)


def _described(model: ir.Model, name: str, layers: Sequence[Layer]) -> PrunedLayer:
    """The row of a weight that was masked without a layer to repair."""
    value = model.graph.initializers[name]
    assert value.const_value is not None
    array = value.const_value.numpy()
    layer = next((x for x in layers if x.value is value), None)
    node = layer.name if layer is not None else next((u.node.name or "" for u in value.uses()), "")
    pattern = analyze(array if layer is None else layer.matrix())
    return PrunedLayer(node, name, array.shape, MASKS, pattern, None)
