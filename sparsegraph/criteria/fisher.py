"""Zero the weights whose removal changes the outputs least, to second order: w^2 E[g^2] / 2.

The empirical Fisher information in place of the Hessian's diagonal (Theis et al. 2018,
arXiv:1801.05787). E[g^2] comes from the PyTorch module, or by `sparsegraph.probe` from runs alone.
"""

from __future__ import annotations

import numpy as np

from sparsegraph.criteria.known import Array, Known
from sparsegraph.criteria.structure import Structure, keep_best


def prune(w: Array, known: Known, structure: Structure, frozen: Array | None = None) -> Array:
    """Keep the largest w^2 * mean squared gradient."""
    assert known.fisher is not None
    return keep_best(w, np.square(w) * known.fisher, structure, frozen)[0]
