"""Zero the weights whose removal changes the loss least, to first order (Molchanov et al. 2019,
arXiv:1906.10771). Gradients come from the PyTorch module: `sparsegraph.gradients`."""

from __future__ import annotations

import numpy as np

from sparsegraph.criteria.known import Array, Known
from sparsegraph.criteria.structure import Structure, keep_best


def prune(w: Array, known: Known, structure: Structure, frozen: Array | None = None) -> Array:
    """Keep the largest (w * dL/dw)^2 over the calibration data; of a block, of its sum."""
    assert known.gradient is not None
    return keep_best(w, np.square(w * known.gradient), structure, frozen)[0]
