"""Zero the smallest weights (Han et al. 2015, arXiv:1506.02626).

With `allocate=global` one threshold serves all layers, with a floor per layer (Gupta et al. 2022,
arXiv:2209.14624); with `allocate=lamp` the threshold is on LAMP scores.
"""

from __future__ import annotations

import numpy as np

from sparsegraph.criteria.known import Array, Known
from sparsegraph.criteria.structure import Structure, keep_best


def prune(w: Array, known: Known, structure: Structure, frozen: Array | None = None) -> Array:
    """Keep the largest |weight|; nothing about the inputs is needed."""
    return keep_best(w, np.abs(w), structure, frozen)[0]
