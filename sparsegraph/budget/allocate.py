"""Densities per layer from shapes and weights alone, for one share of zeros over all layers.

Every rule keeps round(n * (1 - share)) weights in all, to the rounding of single layers, unless
the floors alone need more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Rule = Callable[[Sequence[Array], float, float], list[float]]

UNIFORM = "uniform"
FORWARD = "ecoflap"  # needs runs of the model: `sparsegraph.budget.forward`


def uniform(weights: Sequence[Array], share: float, floor: float) -> list[float]:
    """The same density everywhere."""
    return [max(1 - share, floor)] * len(weights)


def erdos_renyi_kernel(weights: Sequence[Array], share: float, floor: float) -> list[float]:
    """Density proportional to (out + in + kernel) / (out * in * kernel), at most 1.

    Erdos-Renyi-kernel: Evci et al. 2020 (arXiv:1911.11134), after Mocanu et al. 2018.
    """
    raw = np.array([sum(w.shape) / w.size for w in weights])
    return proportional(raw, weights, share, floor)


def proportional(raw: Array, weights: Sequence[Array], share: float, floor: float) -> list[float]:
    """Densities proportional to `raw` [layers], within [floor, 1]."""
    sizes = np.array([w.size for w in weights], dtype=np.float64)
    density = np.zeros(len(weights))
    wanted = sizes.sum() * (1 - share)
    full, low = np.zeros(len(weights), dtype=bool), np.zeros(len(weights), dtype=bool)
    while True:
        free = ~(full | low)
        left = wanted - sizes[full].sum() - floor * sizes[low].sum()
        mass = (raw * sizes)[free].sum()
        density = np.where(full, 1.0, floor)
        if mass == 0:
            break
        density[free] = raw[free] * max(left, 0.0) / mass
        over, under = free & (density > 1), free & (density < floor)
        if over.any():  # what is cut off here raises the others: floors are looked at last
            full |= over
        elif under.any():
            low |= under
        else:
            break
    return [float(d) for d in density]


def global_magnitude(weights: Sequence[Array], share: float, floor: float) -> list[float]:
    """One threshold on |weight| over all layers, with a floor (Gupta et al. 2022, 2209.14624)."""
    return _by_threshold([np.abs(w).ravel() for w in weights], share, floor)


def lamp(weights: Sequence[Array], share: float, floor: float) -> list[float]:
    """One threshold on LAMP scores over all layers (Lee et al. 2021, arXiv:2010.07611).

    The score of a weight is its square over the sum of the squares of the weights of its layer
    that are not smaller; the largest of each layer scores 1, so no layer goes empty.
    """
    return _by_threshold([lamp_score(w) for w in weights], share, floor)


def lamp_score(w: Array) -> Array:
    """LAMP scores of one layer, ascending."""
    squares = np.sort(np.square(np.asarray(w, dtype=np.float64)).ravel())
    not_smaller = np.cumsum(squares[::-1])[::-1]
    score: Array = np.zeros_like(squares)
    np.divide(squares, not_smaller, out=score, where=not_smaller > 0)
    return score


def _by_threshold(scores: Sequence[Array], share: float, floor: float) -> list[float]:
    """Densities when one threshold cuts all scores; layers below the floor are raised to it."""
    sizes = np.array([s.size for s in scores])
    n_kept = round(float(sizes.sum() * (1 - share)))
    raised: set[int] = set()
    while True:
        free = [i for i in range(len(scores)) if i not in raised]
        left = n_kept - sum(round(floor * sizes[i]) for i in raised)
        density = np.full(len(scores), floor)
        if not free:
            break
        together = np.concatenate([scores[i] for i in free])
        left = min(max(left, 0), together.size)
        cut = np.inf
        if left:
            cut = np.partition(together, together.size - left)[together.size - left]
        density[free] = [np.count_nonzero(scores[i] >= cut) / sizes[i] for i in free]
        low = [i for i in free if density[i] < floor]
        if not low:
            break
        raised.update(low)
    return [float(d) for d in density]


ALLOCATIONS: dict[str, Rule] = {
    UNIFORM: uniform,
    "erk": erdos_renyi_kernel,
    "global": global_magnitude,
    "lamp": lamp,
}
