"""What a criterion may know about the inputs of the matrix that it prunes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

_DAMPENING = 1e-2  # of the mean diagonal, as in the SparseGPT paper


@dataclass(frozen=True)
class Known:
    """Statistics of the inputs x of one weight matrix [out, columns], and a seed.

    `norm` [columns]: root mean square of each; `second` [columns, columns]: E[x x^T]. None where
    nothing was measured. `fisher` [out, columns]: mean square of dL/dw over the calibration data,
    `relevance` [out, columns] what each contributes. `seed` makes random criteria repeatable.
    """

    norm: Array | None = None
    second: Array | None = None
    seed: tuple[int, ...] = (0,)
    fisher: Array | None = None
    relevance: Array | None = None


def dampened(second: Array) -> Array:
    """H + 0.01 mean(diag H) I in fp64: invertible also with fewer rows than columns."""
    h = np.array(second, dtype=np.float64)
    level = _DAMPENING * float(np.mean(np.diag(h)))
    h[np.diag_indices_from(h)] += level if level > 0 else 1.0
    return h


def output_error(delta: Array, w: Array, second: Array) -> float:
    """sqrt(tr(D H D^T) / tr(W H W^T)): relative change of the output, 0 for an all-zero layer."""
    change = float(np.einsum("ij,ij->", delta @ second, delta))
    whole = float(np.einsum("ij,ij->", w @ second, w))
    return float(np.sqrt(max(change, 0.0) / whole)) if whole > 0 else 0.0
