"""Prune one layer: its criterion, then the repairs, group by group of a convolution."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sparsegraph import repair
from sparsegraph.criteria.known import Known, output_error
from sparsegraph.criteria.structure import Structure
from sparsegraph.criteria.table import CRITERIA, SECOND_MOMENTS
from sparsegraph.layers import Layer
from sparsegraph.probe import Slope
from sparsegraph.recipe import Recipe
from sparsegraph.walk import Measured

Array = np.ndarray[Any, Any]

_TOO_WIDE = "input too wide for second moments"


@dataclass(frozen=True)
class Solved:
    """A pruned weight [group, out, columns] and what it did.

    `bias_change` [group * out] restores the mean output, None without statistics. `error` is the
    relative RMS change of the output against what was aimed at, None without second moments;
    `distortion` its mean square, summed over outputs, against the original weight.
    """

    product: Array
    method: str
    bias_change: Array | None = None
    error: float | None = None
    distortion: float | None = None
    note: str = ""


def solve(
    layer: Layer,
    recipe: Recipe,
    structure: Structure,
    measured: Measured | None = None,
    mask: Array | None = None,
    slope: Slope | None = None,
) -> Solved:
    """Prune a layer without storing it. `mask` (stored shape, True stays) replaces the criterion.

    `measured` may be None if the recipe needs no calibration. An input that is too wide for second
    moments falls back to Wanda, without repairs but the bias, and says so.
    """
    weight = layer.product().astype(np.float64)
    n_taps = layer.matrix()[0, 0].size if layer.node.op_type == "Conv" else 1
    structure, order = structure.of(weight.shape[1], n_taps), _column_order(layer, structure)
    keep = None if mask is None else layer.product(mask)
    is_wide = measured is not None and measured.now.second is None
    method = recipe.method
    if is_wide and recipe.criterion is not None and recipe.criterion.needs == SECOND_MOMENTS:
        method = "wanda"
    seed = (recipe.seed, zlib.crc32(str(layer.value.name).encode()))
    corrects = recipe.correct_bias and layer.bias() is not None
    parts = [
        _Matrix(
            w[:, order],
            None if keep is None else keep[i][:, order],
            _Inputs.of(measured, i, order, (*seed, i), is_centred=corrects).sloped(slope, i, order),
        ).solve(method, recipe, structure)
        for i, w in enumerate(weight)
    ]
    needed_more = is_wide and recipe.moves_weights
    known = [part for part in parts if part.error is not None]
    return Solved(
        np.stack([_restore(part.weight, order) for part in parts]),
        method,
        np.concatenate([p.bias_change for p in parts]) if measured is not None else None,
        float(np.sqrt(np.mean([p.error**2 for p in known]))) if known else None,  # type: ignore[operator]
        float(sum(p.distortion for p in known)) if known else None,
        _TOO_WIDE if needed_more else "",
    )


def _column_order(layer: Layer, structure: Structure) -> Array:
    """Order of columns in which groups count: inputs run fastest, kernel positions slowest."""
    columns = layer.product().shape[2]
    if structure.run == 1 or structure.channels or layer.node.op_type != "Conv":
        return np.arange(columns)
    return np.arange(columns).reshape(layer.matrix().shape[1], -1).T.ravel()


def _restore(w: Array, order: Array) -> Array:
    restored = np.empty_like(w)
    restored[:, order] = w
    return restored


@dataclass(frozen=True)
class _Inputs:
    """Per-row statistics of one group's columns, in solver order; centred if a bias can move."""

    known: Known
    mean: Array
    mean_before: Array
    cross: Array | None = None
    drift_mean: Array | float = 0.0
    drift: Array | None = None

    @staticmethod
    def of(
        measured: Measured | None,
        group: int,
        order: Array,
        seed: tuple[int, ...],
        *,
        is_centred: bool,
    ) -> _Inputs:
        if measured is None:
            return _Inputs(Known(seed=seed), np.zeros(len(order)), np.zeros(len(order)))
        now, before, drift = measured.now, measured.before, measured.drift
        mean = now.mean[group][order]
        off = mean if is_centred else np.zeros_like(mean)
        second = cross = drifted = None
        mean_before, drift_mean = mean, 0.0
        if now.second is not None:
            second = now.second[group][np.ix_(order, order)] / now.n - np.outer(off, off)
        if before is not None and before.n:
            mean_before = np.asarray(before.total)[group][order] / before.n
            cross = np.asarray(before.product)[group][np.ix_(order, order)] / before.n
            cross -= np.outer(mean_before if is_centred else off, off)
        if drift is not None and drift.n:
            drift_mean = np.asarray(drift.total)[group] / drift.n
            drifted = np.asarray(drift.product)[group][:, order] / drift.n
            drifted -= np.outer(drift_mean, off)
        known = Known(now.norm[group][order], second, seed)
        return _Inputs(known, mean, mean_before, cross, drift_mean, drifted)

    def sloped(self, slope: Slope | None, group: int, order: Array) -> _Inputs:
        """With gradients; those of outputs are spread over weights by the inputs' mean squares."""
        if slope is None:
            return self
        if slope.outputs is not None and self.known.norm is not None:
            fisher = slope.outputs[group][:, None] * np.square(self.known.norm)
        else:
            fisher = None if slope.square is None else slope.square[group][:, order]
        parts = None if slope.relevance is None else slope.relevance[group][:, order]
        known = replace(self.known, fisher=fisher, relevance=parts)
        return replace(self, known=known)


@dataclass(frozen=True)
class _Part:
    weight: Array
    bias_change: Array
    error: float | None
    distortion: float


@dataclass(frozen=True)
class _Matrix:
    """One group's weight [out, columns], the mask that it must have, and its inputs."""

    w: Array
    keep: Array | None
    x: _Inputs

    def solve(self, method: str, recipe: Recipe, structure: Structure) -> _Part:
        """The pruned matrix; its error compares it with what was aimed at."""
        w, x, second = self.w, self.x, self.x.known.second
        target = w
        if second is not None and x.cross is not None and recipe.moves_weights:
            target = repair.retarget(w, x.cross, second, x.drift)
        found = self._prune(target, method, recipe, structure)
        if second is not None and recipe.swap:
            found = repair.swap(found, target, second, structure, w == 0)
        if second is not None and recipe.refit:
            found = repair.refit(found, target, second)
        change = np.asarray(w @ x.mean_before - found @ x.mean + x.drift_mean)
        if second is None:
            return _Part(found, change, None, 0.0)
        delta = found - w
        return _Part(
            found,
            change,
            output_error(found - target, target, second),
            float(np.einsum("ij,ij->", delta @ second, delta)),
        )

    def _prune(self, target: Array, method: str, recipe: Recipe, structure: Structure) -> Array:
        if self.keep is not None:
            return np.where(self.keep, target if recipe.refit else self.w, 0.0)
        criterion = CRITERIA[method]
        start = target if criterion.moves_weights else self.w
        return criterion.prune(start, self.x.known, structure, self.w == 0)
