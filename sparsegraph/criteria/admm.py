"""Prune gradually while solving for the remaining weights by ADMM (Boza 2024, arXiv:2401.02938)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from sparsegraph.criteria.known import Array, Known, dampened
from sparsegraph.criteria.structure import Structure, keep_mask

_STEPS, _MASK_STEPS = 20, 15  # as in the paper; 30, 20 gained nothing on MiniLM


def prune(w: Array, known: Known, structure: Structure, frozen: Array | None = None) -> Array:
    """Prune and update. Weights where `frozen` is True stay zero.

    Columns are scaled to unit norm, the penalty is 1; the sparsity grows cubically over the first
    15 of 20 steps, then the mask is fixed.
    """
    assert known.second is not None
    h = dampened(known.second)
    norm = np.sqrt(np.diag(h))
    scaled = h / np.outer(norm, norm)
    inverse = np.linalg.inv(scaled + np.eye(len(h))).astype(np.float32)
    origin = (w * norm).astype(np.float32)
    pull = origin @ (scaled.astype(np.float32) @ inverse)
    frozen = np.zeros(w.shape, dtype=bool) if frozen is None else frozen
    current, dual = origin.copy(), np.zeros_like(origin)
    keep = ~frozen
    for step in range(1, _STEPS + 1):
        total = current + dual
        if step <= _MASK_STEPS:
            keep = _gradual_mask(total, structure, step / _MASK_STEPS, frozen)
        kept = np.where(keep, total, np.float32(0))
        dual = total - kept
        current = pull + (kept - dual) @ inverse
    return np.where(keep, current / norm, 0.0)


def _gradual_mask(total: Array, structure: Structure, progress: float, frozen: Array) -> Array:
    """The mask at a share `progress` of the schedule; N:M is imposed from half way on."""
    now = structure
    if progress < 1 and not (structure.m and progress >= 0.5):
        share = structure.target * (1 - (1 - progress) ** 3)
        now = replace(structure, sparsity=share, n=0, m=0)
    score = np.square(total)
    score[frozen] = -1.0
    return keep_mask(score, now) & ~frozen
