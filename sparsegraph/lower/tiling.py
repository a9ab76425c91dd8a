"""Tiles of points that suit the zeros of most of a model's weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from sparsegraph import formats
from sparsegraph.layers import Layer
from sparsegraph.lower.choose import alike_vectors
from sparsegraph.targets.target import Target

_FEW = 0.25  # non-zeros, from which on larger tiles cost no more partial sums than they save


def tiled_for(layers: Sequence[Layer], target: Target) -> Target:
    """The target, with tiles that suit the zeros of most of the weights.

    All values of a model share their tiles, hence one answer for all layers.
    """
    sparse = [w for w in (layer.matrix() for layer in layers) if _is_sparse(w)]
    n, alike = sum(w.size for w in sparse), sum(w.size for w in sparse if _has_four(w))
    density = sum(map(np.count_nonzero, sparse)) / n if n else 1.0
    return tiled(density, target, four_alike=2 * alike > n)


def tiled(density: float, target: Target, *, four_alike: bool = False) -> Target:
    """The target with tiles for weights of this density.

    Few non-zeros: with 32 registers of 16 lanes always 4 vectors, since a panel of 13 (maps of
    14x14) holds few columns. Against tiles of 2 and 3, 4 take 2 to 8 % less time on Zen 5
    (ResNet-50, MiniLM, DeiT-S, MobileNets, 75 to 95 % zeros); on Zen 4, which computes vectors in
    halves, a product of 384x768x3072 with 90 % zeros took 5 to 7 % more.

    Four rows alike: as many vectors as four rows take. With 16 registers a product of 384x768x3072,
    4x1 zeros, takes 10 to 12 % less time in tiles of 3 than of 4 vectors.
    """
    most = alike_vectors(target)
    if four_alike and most and most < min(target.tile_vectors):
        return replace(target, tile_vectors=(most, *target.tile_vectors))
    if target.sparse_tiles and density <= _FEW:
        return replace(target, tile_vectors=target.sparse_tiles)
    return target


def _is_sparse(weight: np.ndarray) -> bool:
    return bool(2 * np.count_nonzero(weight) < weight.size)


def _has_four(weight: np.ndarray) -> bool:
    return len(weight) % formats.ALIKE == 0 and formats.shared_rows(weight) == formats.ALIKE
