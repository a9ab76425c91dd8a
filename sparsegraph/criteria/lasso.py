"""Select what stays by LASSO on the layer's output, then refit it by least squares.

Channel selection of He et al. 2017 (arXiv:1707.06168): every unit (an input channel with
`channels`, else a block or a single weight) is multiplied by a coefficient, and the penalty on the
coefficients grows until as many as wanted are zero.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sparsegraph import repair
from sparsegraph.criteria.known import Array, Known, dampened
from sparsegraph.criteria.structure import Structure, keep_best

_PENALTIES = 12  # on the way up, each half as large again
_FIRST, _GROWTH = 0.02, 1.5  # of the largest correlation with the output
_STEPS = 25  # of accelerated proximal gradient per penalty, each starting where the last ended
_POWER_STEPS, _MARGIN = 20, 1.1
_LEAST = 1e-9  # length of a unit over the longest: weights that are zero already
_TINY = float(np.finfo(np.float64).tiny)


def prune(w: Array, known: Known, structure: Structure, frozen: Array | None = None) -> Array:
    """Keep the units that last longest on the path, and move their weights to the best fit."""
    assert known.second is not None
    h = dampened(known.second)
    units = np.arange(w.shape[1]) // structure.columns
    if structure.rows == 1:
        score = _path(_products(w, h, units), _norms(w, h, units), structure.target)[:, units]
    else:
        score = np.empty(w.shape)
        for start in range(0, w.shape[0], structure.rows):
            rows = slice(start, start + structure.rows)
            gram = _gram(w[rows], h, units)
            norms = np.sqrt(np.maximum(np.diag(gram), _TINY))[None]
            found = _path(lambda beta, g=gram: beta @ g, norms, structure.target)  # type: ignore[misc]
            score[rows] = found[:, units]
    size = np.square(w) * np.diag(h)
    size /= max(float(size.max()), _TINY)
    kept = keep_best(w, score + 1e-6 * size, structure, frozen)[0]
    return repair.refit(kept, w, known.second)


def _pooled(x: Array, units: Array) -> Array:
    """Sums over the columns of every unit."""
    starts = np.flatnonzero(np.diff(units, prepend=-1))
    return np.asarray(np.add.reduceat(x, starts, axis=1))


def _gram(w: Array, h: Array, units: Array) -> Array:
    """[units, units] inner products of what the units of some rows add to the output."""
    return _pooled(_pooled((w.T @ w) * h, units).T, units)


def _products(w: Array, h: Array, units: Array) -> Callable[[Array], Array]:
    """Coefficients [out, units] times the inner products of each row's own units."""
    return lambda beta: _pooled(w * ((w * beta[:, units]) @ h), units)


def _norms(w: Array, h: Array, units: Array) -> Array:
    """Length of what every unit of every row adds, [out, units]."""
    if units[-1] == len(units) - 1:
        return np.asarray(np.maximum(np.abs(w) * np.sqrt(np.diag(h)), _TINY))
    squares = np.empty((w.shape[0], units[-1] + 1))
    for unit in range(squares.shape[1]):
        at = units == unit
        squares[:, unit] = np.einsum("ij,ij->i", w[:, at] @ h[np.ix_(at, at)], w[:, at])
    return np.asarray(np.sqrt(np.maximum(squares, _TINY)))


def _path(product: Callable[[Array], Array], norms: Array, share: float) -> Array:
    """How large every coefficient is on average until `share` of its line are zero, at most 1."""
    norms = np.maximum(norms, _LEAST * norms.max(axis=1, keepdims=True))

    def scaled(beta: Array) -> Array:
        return product(beta / norms) / norms

    pull = scaled(norms)
    step = 1 / np.maximum(_largest(scaled, norms.shape), _TINY)
    most = np.abs(pull * norms).max(axis=1, keepdims=True)
    penalty = _FIRST * most / norms  # in the paper's units: every coefficient starts at 1
    beta, total = norms.copy(), np.zeros(norms.shape)
    for _ in range(_PENALTIES):
        beta = _descended(scaled, pull - penalty, beta, step)
        total += beta / norms
        if ((beta == 0).mean(axis=1) >= share).all():
            break
        penalty = penalty * _GROWTH
    return np.asarray(total / np.maximum(total.max(axis=1, keepdims=True), _TINY))


def _largest(product: Callable[[Array], Array], shape: tuple[int, ...]) -> Array:
    """The largest eigenvalue of every line's inner products, and a tenth."""
    x = np.random.default_rng(0).normal(size=shape)
    for _ in range(_POWER_STEPS):
        x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), _TINY)
        x = product(x)
    return np.asarray(_MARGIN * np.linalg.norm(x, axis=1, keepdims=True))


def _descended(product: Callable[[Array], Array], pull: Array, beta: Array, step: Array) -> Array:
    """FISTA (Beck & Teboulle 2009) on a half |beta|^2 - pull beta over beta >= 0."""
    ahead, momentum = beta, 1.0
    for _ in range(_STEPS):
        found = np.maximum(ahead + step * (pull - product(ahead)), 0.0)
        following = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        ahead = found + (momentum - 1) / following * (found - beta)
        beta, momentum = found, following
    return beta
