"""Prune column by column, moving the remaining weights (Frantar & Alistarh 2023, arXiv:2301.00774).

The optimal brain surgeon with one elimination order for all rows, applied lazily in blocks of
columns. The order is the weight's own, as in the paper.
"""

from __future__ import annotations

import numpy as np

from sparsegraph.criteria.known import Array, Known, dampened
from sparsegraph.criteria.structure import Structure, keep_mask

_COLUMN_BLOCK = 128  # columns that are updated eagerly before one lazy product


def prune(w: Array, known: Known, structure: Structure, frozen: Array | None = None) -> Array:
    """Prune and update. Weights where `frozen` is True stay zero.

    The unstructured count is exact within every block of 128 columns.
    """
    from scipy.linalg import cholesky

    assert known.second is not None
    upper = cholesky(np.linalg.inv(dampened(known.second)), lower=False)
    work = np.array(w, dtype=np.float64)
    frozen = np.zeros(w.shape, dtype=bool) if frozen is None else frozen
    step = max(_COLUMN_BLOCK - _COLUMN_BLOCK % structure.run, structure.run)
    for start in range(0, w.shape[1], step):
        end = min(start + step, w.shape[1])
        errors = _eliminate(work, upper, start, end, structure, frozen)
        work[:, end:] -= errors @ upper[start:end, end:]
    return work


def _eliminate(
    work: Array, upper: Array, start: int, end: int, structure: Structure, frozen: Array
) -> Array:
    """Prune columns start..end of `work` in place; returns their errors [out, end - start].

    A share is chosen over all these columns at once, N:M when its group is reached.
    """
    diagonal = np.diag(upper)
    errors = np.zeros((work.shape[0], end - start))
    width = structure.run if structure.m else end - start
    keep: Array = np.zeros(0)
    for column in range(start, end):
        at = (column - start) % width
        if at == 0:
            chunk = slice(column, min(column + width, end))
            score = (work[:, chunk] / diagonal[chunk]) ** 2
            score[frozen[:, chunk]] = -1.0
            keep = keep_mask(score, structure) & ~frozen[:, chunk]
        pruned = np.where(keep[:, at], work[:, column], 0.0)
        error = (work[:, column] - pruned) / diagonal[column]
        work[:, column + 1 : end] -= np.outer(error, upper[column, column + 1 : end])
        work[:, column] = pruned
        errors[:, column - start] = error
    return errors
