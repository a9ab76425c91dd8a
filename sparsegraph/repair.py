"""Make up for pruned weights without training: new targets, refitted weights, better masks.

NumPy on one matrix W [out, columns] and H = E[x x^T] [columns, columns] of its inputs; the error
that counts is tr((W' - T) H (W' - T)^T), the mean squared distance from the wanted output T x.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sparsegraph.criteria.known import dampened
from sparsegraph.criteria.structure import OUTPUTS, Structure

Array = np.ndarray[Any, Any]

_MOST_STEPS = 60  # conjugate gradients; MiniLM's layers need 20 to 40
_TOLERANCE = 1e-6  # of the squared, scaled gradient: 1e-3 of the step that is left
_MOST_SWAPS = 64  # per row; DSnoT stops at 50
_LEAST_GAIN = 1e-7  # of a row's error


def retarget(w: Array, cross: Array, second: Array, drift: Array | None = None) -> Array:
    """Weights that map changed inputs to the original outputs as well as a linear layer can.

    `second` = E[x x^T] of the changed inputs, `cross` = E[x0 x^T] with the original inputs x0,
    `drift` = E[(r0 - r) x^T] of the residual that is added to the output: the layer then also makes
    up for what the residual lost. Least squares, dampened towards W itself.
    """
    wanted = w @ (cross - second)
    if drift is not None:
        wanted = wanted + drift
    return w + np.linalg.solve(dampened(second), wanted.T).T


def refit(found: Array, target: Array, second: Array) -> Array:
    """The non-zeros of `found` moved to the least squares fit of `target`; zeros stay.

    All rows at once by conjugate gradients (Hestenes & Stiefel 1952) with the diagonal of H as
    preconditioner, on H dampened towards the target.
    """
    h = dampened(second)
    diagonal, keep, x = np.diag(h), found != 0, np.array(found, dtype=np.float64)
    residual = np.where(keep, (target - x) @ h, 0.0)
    step = scaled = residual / diagonal
    size = np.einsum("ij,ij->i", residual, scaled)
    enough = _TOLERANCE * size
    for _ in range(_MOST_STEPS):
        if (size <= enough).all():
            break
        pushed = np.where(keep, step @ h, 0.0)
        curvature = np.einsum("ij,ij->i", step, pushed)
        length = np.divide(size, curvature, out=np.zeros_like(size), where=curvature > 0)[:, None]
        x = x + length * step
        residual = residual - length * pushed
        scaled = residual / diagonal
        before, size = size, np.einsum("ij,ij->i", residual, scaled)
        ratio = np.divide(size, before, out=np.zeros_like(size), where=before > 0)
        step = scaled + ratio[:, None] * step
    return np.where(keep, x, 0.0)


def swap(
    found: Array,
    target: Array,
    second: Array,
    structure: Structure,
    frozen: Array | None = None,
) -> Array:
    """Exchange pruned for kept weights, one pair per row and round, while the error falls.

    Prune-and-grow without training after DSnoT (Zhang et al. 2023, arXiv:2310.08915), with the
    exact change of the output error in place of its mean and variance. A weight that grows takes
    its target value. N:M along inputs swaps inside its groups; blocks and N:M along outputs are
    returned as they are.
    """
    if structure.has_blocks or (structure.m and structure.axis == OUTPUTS):
        return found
    columns, width = found.shape[1], structure.m or found.shape[1]
    short = -columns % width
    x, target = (
        np.pad(np.asarray(a, dtype=np.float64), ((0, 0), (0, short))) for a in (found, target)
    )
    h = np.pad(np.asarray(second, dtype=np.float64), (0, short))
    closed = target == 0
    if frozen is not None:
        closed |= np.pad(frozen, ((0, 0), (0, short)), constant_values=True)
    slope = (x - target) @ h
    least = _LEAST_GAIN * np.einsum("ij,ij->i", slope, x - target)
    for _ in range(_MOST_SWAPS):
        grown, dropped, change = _best_pairs(x, target, h, slope, closed, width)
        better = np.flatnonzero(np.isfinite(change) & (change < -least))
        if not len(better):
            break
        i, j = dropped[better], grown[better]
        value = target[better, j]
        slope[better] += value[:, None] * h[j] - x[better, i][:, None] * h[i]
        x[better, i], x[better, j] = 0.0, value
    return x[:, :columns]


def _best_pairs(
    x: Array, target: Array, h: Array, slope: Array, closed: Array, width: int
) -> tuple[Array, Array, Array]:
    """(column that grows, column that goes, change of the error) for each row's best swap.

    Growth is chosen alone in each group of `width` columns, what goes for it exactly.
    """
    out, columns = x.shape
    kept, diagonal, grouped = x != 0, np.diag(h), (out, -1, width)
    first = np.arange(0, columns, width)
    grow = np.where(kept | closed, np.inf, target * (2 * slope + target * diagonal))
    j = grow.reshape(grouped).argmin(axis=2) + first
    partner = np.repeat(j, width, axis=1)
    together = np.take_along_axis(target, partner, axis=1) * h[partner, np.arange(columns)]
    drop = np.where(kept, x * (x * diagonal - 2 * slope - 2 * together), np.inf)
    i = drop.reshape(grouped).argmin(axis=2) + first
    change = np.take_along_axis(grow, j, axis=1) + np.take_along_axis(drop, i, axis=1)
    best, lines = change.argmin(axis=1), np.arange(out)
    return j[lines, best], i[lines, best], change[lines, best]
