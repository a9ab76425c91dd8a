"""One option per layer, such that costs stay within a limit and the sum of losses is least."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

_BINS = 8192  # of what the cheapest choice leaves free; rounding wastes layers / 16384 of it
_ROUNDING = 1e-9  # relative: sums of the same costs in another order are no reason to refuse


def choose(costs: Sequence[Array], losses: Sequence[Array], limit: float) -> list[int] | None:
    """The index of the best option of every layer, or None when even the cheapest exceed `limit`.

    Dynamic programming over discretised costs, each rounded up, so that the limit always holds.
    """
    least = [float(np.min(c)) for c in costs]
    free = limit - sum(least)
    if free < -_ROUNDING * sum(least):
        return None
    free = max(free, 0.0)
    bin_cost = free / _BINS
    best, steps = np.zeros(_BINS + 1), []
    for cost, loss, cheapest in zip(costs, losses, least):
        over = np.asarray(cost, dtype=np.float64) - cheapest
        bins = np.ceil(over / bin_cost - 1e-9) if bin_cost else np.where(over > 0, np.inf, 0)
        best, taken = _extended(best, bins, np.asarray(loss, dtype=np.float64))
        steps.append((bins, taken))
    at, chosen = _BINS, []
    for bins, taken in reversed(steps):
        option = int(taken[at])
        at -= int(bins[option])
        chosen.append(option)
    return chosen[::-1]


def _extended(best: Array, bins: Array, loss: Array) -> tuple[Array, Array]:
    """(least loss with at most b bins, the option that gives it) with one more layer."""
    reached = np.full((len(bins), len(best)), np.inf)
    for option, (used, lost) in enumerate(zip(bins, loss)):
        if used < len(best):
            reached[option, int(used) :] = best[: len(best) - int(used)] + lost
    taken = reached.argmin(axis=0)
    return np.take_along_axis(reached, taken[None], axis=0)[0], taken
