"""Gradient steps on the layer's error, each projected onto the pattern (AWP: Liu et al. 2025,
arXiv:2506.10205; iterative hard thresholding, Blumensath & Davies 2009, arXiv:0805.0510)."""

from __future__ import annotations

import numpy as np

from sparsegraph.criteria import wanda
from sparsegraph.criteria.known import Array, Known, dampened
from sparsegraph.criteria.structure import Structure, keep_best

_STEPS = 60
_STEP_SIZE = 1.5  # over the Frobenius norm of H, as in the AWP paper; above 2 it may diverge


def prune(w: Array, known: Known, structure: Structure, frozen: Array | None = None) -> Array:
    """Start from Wanda's mask and descend; weights where `frozen` is True stay zero."""
    assert known.second is not None
    h = dampened(known.second)
    pull = (h * (_STEP_SIZE / np.linalg.norm(h))).astype(np.float32)
    frozen = np.zeros(w.shape, dtype=bool) if frozen is None else frozen
    norm = Known(norm=np.sqrt(np.diag(h)))
    target = w.astype(np.float32)
    current = wanda.prune(target, norm, structure, frozen).astype(np.float32)
    for _ in range(_STEPS):
        moved = current + (target - current) @ pull
        current = keep_best(moved, np.square(moved), structure, frozen)[0].astype(np.float32)
    return current.astype(np.float64)
