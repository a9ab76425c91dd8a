"""Tiles of points that suit the zeros of most of a model's weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from sparsegraph import formats
from sparsegraph.layers import Layer
from sparsegraph.lower.choose import alike_vectors
from sparsegraph.targets.target import Target


def tiled_for(layers: Sequence[Layer], target: Target) -> Target:
    """The target, with tiles of as many vectors as four rows take if most weights have four alike.

    All values of a model share their tiles, hence one answer for all layers. With 16 registers a
    product of 384x768x3072, 4x1 zeros, takes 10 to 12 % less time in tiles of 3 than of 4 vectors.
    """
    most = alike_vectors(target)
    if not most or most >= min(target.tile_vectors):
        return target
    sparse = [w for w in (layer.matrix() for layer in layers) if _is_sparse(w)]
    alike = sum(w.size for w in sparse if _has_four(w))
    if 2 * alike <= sum(w.size for w in sparse):
        return target
    return replace(target, tile_vectors=(most, *target.tile_vectors))


def _is_sparse(weight: np.ndarray) -> bool:
    return bool(2 * np.count_nonzero(weight) < weight.size)


def _has_four(weight: np.ndarray) -> bool:
    return len(weight) % formats.ALIKE == 0 and formats.shared_rows(weight) == formats.ALIKE
