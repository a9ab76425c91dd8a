"""Zero the weights that contribute least to the outputs, by layer-wise relevance propagation (Yeom
et al. 2021, arXiv:1912.08881). Relevance comes from the PyTorch module: `sparsegraph.relevance`."""

from __future__ import annotations

from sparsegraph.criteria.known import Array, Known
from sparsegraph.criteria.structure import Structure, keep_best


def prune(w: Array, known: Known, structure: Structure, frozen: Array | None = None) -> Array:
    """Keep the largest mean absolute relevance; of a block, its sum."""
    assert known.relevance is not None
    return keep_best(w, known.relevance, structure, frozen)[0]
