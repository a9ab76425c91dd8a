"""Zero the smallest |weight| * input norm (Sun et al. 2023, arXiv:2306.11695)."""

from __future__ import annotations

import numpy as np

from sparsegraph.criteria.known import Array, Known
from sparsegraph.criteria.structure import Structure, keep_best


def prune(w: Array, known: Known, structure: Structure, frozen: Array | None = None) -> Array:
    """Keep the largest |weight| * root mean square of its input."""
    assert known.norm is not None
    score = np.abs(w) * known.norm
    if structure.has_blocks:
        score = np.square(score)  # a block's score is then its expected squared output
    return keep_best(w, score, structure, frozen)[0]
