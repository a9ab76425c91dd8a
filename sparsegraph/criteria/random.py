"""Zero weights by lot: the baseline that every other criterion has to beat.

Densities per layer are uniform or, with `allocate=erk`, those of Mocanu et al. 2018 and Evci et
al. 2020 (arXiv:1911.11134); random masks as a serious baseline: Liu et al. 2022 (arXiv:2202.02643).
"""

from __future__ import annotations

import numpy as np

from sparsegraph.criteria.known import Array, Known
from sparsegraph.criteria.structure import Structure, keep_best


def prune(w: Array, known: Known, structure: Structure, frozen: Array | None = None) -> Array:
    """Keep weights (or blocks) by lot; the same seed and shape give the same mask."""
    score = np.asarray(np.random.default_rng(known.seed).random(w.shape))
    return keep_best(w, score, structure, frozen)[0]
