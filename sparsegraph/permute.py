"""Reorder inner channels so that N:M groups keep more, with the inverse in the layers around.

Search as in Pool & Yu 2021 ("Channel permutations for N:M sparsity"): swaps of two channels between
pairs of groups, as long as the sum of what N:M keeps grows. Every operator between the layer that
makes the channels and those that read them must treat them alike, by `structure.ties`; a
permutation then changes the order of sums, and nothing else.

The paper fine-tunes nets in which every layer can be reordered. MiniLM is neither: one shot, and
only the hidden units of its feed-forward layers are free, 6 layers of 36 (the residual stream is
the output, heads are sums over fixed channels). There 2:4 keeps .894 of the squares in place of
.886, and rho does not rise: magnitude .674 to .660, Wanda .772 to .772, ADMM .893 to .890.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from sparsegraph.calibrate import Feed, Rows, statistics
from sparsegraph.layers import Layer, weighted
from sparsegraph.structure.labels import FROZEN
from sparsegraph.structure.ties import Analysis, analyse

Array = np.ndarray[Any, Any]

_MOST_SWEEPS = 30
_MOST_ROWS = 128  # of scores that the search looks at
_LEAST_GAIN = 1e-4  # of what is kept, over _PATIENCE sweeps
_PATIENCE = 5


@dataclass(frozen=True)
class Reordered:
    """Channels that were reordered: the layers that read them, and the share of the score that N:M
    keeps before and after."""

    layers: tuple[str, ...]
    n_channels: int
    before: float
    after: float


@dataclass(frozen=True)
class Permuted:
    """The same model with other orders of inner channels."""

    model: ir.Model
    table: tuple[Reordered, ...]


@dataclass(frozen=True)
class _Group:
    """Channels with one order everywhere: layers that sum over them, and (constant, axis) pairs."""

    readers: tuple[Layer, ...]
    constants: tuple[tuple[ir.Value, int], ...]


def permute(
    model: ir.Model, n: int, m: int, feeds: Sequence[Feed] = (), *, seed: int = 0
) -> Permuted:
    """A copy of `model` whose layers keep more with `n` of every `m` neighbouring inputs.

    The score of a weight is its square, times the mean square of its input where there are feeds.
    Channels whose number is no multiple of `m`, or whose order something depends on, stay.
    """
    copy = model.clone()
    found = _groups(analyse(copy), weighted(copy), m)
    taps = {str(layer.data.name): _channels(layer) for group in found for layer in group.readers}
    squares: Mapping[str, Array] = {}
    if len(feeds) and taps:
        moments = statistics(copy, feeds, taps)
        squares = {name: np.square(moment.norm[0]) for name, moment in moments.items()}
    rows = []
    for group in found:
        scores = np.concatenate([_scores(layer, squares) for layer in group.readers])
        order = search(scores, n, m, seed=seed)
        before, after = (_kept(scores[:, o], n, m) for o in (np.arange(len(order)), order))
        if after <= before:
            continue
        for value, axis in group.constants:
            assert value.const_value is not None
            array = np.take(value.const_value.numpy(), order, axis=axis)
            value.const_value = ir.tensor(np.ascontiguousarray(array), name=value.name)
        names, total = tuple(layer.name for layer in group.readers), float(scores.sum())
        rows.append(Reordered(names, len(order), before / total, after / total))
    return Permuted(copy, tuple(rows))


def _channels(layer: Layer) -> Rows:
    """The layer's input with its channels as columns."""
    return Rows(feature_axis=1) if layer.is_convolution else layer.rows()


def _groups(analysis: Analysis, layers: Sequence[Layer], m: int) -> list[_Group]:
    by_node = {layer.node: layer for layer in layers}
    readers: dict[bytes, list[Layer]] = {}
    sequences: dict[bytes, Array] = {}
    for sink in analysis.ties.sinks:
        layer, roots = by_node.get(sink.node), analysis.roots[sink.labels]
        if layer is None:
            continue
        if (roots == FROZEN).any() or len(np.unique(roots)) < len(roots) or len(roots) % m:
            continue
        readers.setdefault(roots.tobytes(), []).append(layer)
        sequences[roots.tobytes()] = roots
    constants = {key: _constants(analysis, roots) for key, roots in sequences.items()}
    return [
        _Group(tuple(readers[key]), found) for key, found in constants.items() if found is not None
    ]


def _constants(analysis: Analysis, roots: Array) -> tuple[tuple[ir.Value, int], ...] | None:
    """Every constant axis that has these channels; None if some axis has them in another order."""
    ties, own = analysis.ties, np.zeros(analysis.ties.forest.n, dtype=bool)
    own[roots] = True
    found: dict[tuple[ir.Value, int], int] = {}
    values = [(None, axis, number) for axes in ties.values.values()
              for number, axis in enumerate(axes)]  # fmt: skip
    held = [(node.inputs[at], axis, number) for (node, at), axes in ties.constants.items()
            for number, axis in enumerate(axes)]  # fmt: skip
    for value, axis, number in [*values, *held]:
        if axis is None or not own[analysis.roots[axis]].any():
            continue
        if not np.array_equal(analysis.roots[axis], roots):
            return None
        if value is not None:
            found[value, number] = found.get((value, number), 0) + 1
    is_whole = all(n == len(value.uses()) for (value, _), n in found.items())
    return tuple(found) if is_whole else None


def _scores(layer: Layer, squares: Mapping[str, Array]) -> Array:
    """[outputs and kernel positions, input channels]."""
    weight = np.square(layer.matrix().astype(np.float64))
    flat = weight.reshape(*weight.shape[:2], -1).transpose(0, 2, 1).reshape(-1, weight.shape[1])
    return np.asarray(flat * squares.get(str(layer.data.name), 1.0))


def _kept(scores: Array, n: int, m: int) -> float:
    grouped = scores.reshape(len(scores), -1, m)
    return float(np.partition(grouped, m - n, axis=2)[:, :, m - n :].sum())


def search(scores: Array, n: int, m: int, *, seed: int = 0) -> Array:
    """An order of the columns of `scores` [rows, columns] in which N:M keeps more of their sum.

    Each sweep pairs all groups at random and makes the best swap within every pair.
    """
    generator = np.random.default_rng(seed)
    s = np.asarray(scores[:: -(-len(scores) // _MOST_ROWS)], dtype=np.float32)
    order = np.arange(s.shape[1]).reshape(-1, m)
    gains: list[float] = []
    whole = _kept(s, n, m)
    for _ in range(_MOST_SWEEPS if len(order) > 1 else 0):
        drawn = generator.permutation(len(order))
        half = len(order) // 2
        left, right = drawn[:half], drawn[half : 2 * half]
        gains.append(_swap(s, order, left, right, n))
        if len(gains) >= _PATIENCE and sum(gains[-_PATIENCE:]) < _LEAST_GAIN * whole:
            break
    return order.reshape(-1)


def _swap(s: Array, order: Array, left: Array, right: Array, n: int) -> float:
    """Make the best swap of every pair of groups in place; returns what is kept more."""
    a, b = s[:, order[left]], s[:, order[right]]
    m = order.shape[1]
    plain = _per_group(a, n) + _per_group(b, n)
    best, at = np.zeros(len(left)), np.zeros((len(left), 2), dtype=int)
    for i in range(m):
        for j in range(m):
            first, second = a.copy(), b.copy()
            first[:, :, i], second[:, :, j] = b[:, :, j], a[:, :, i]
            gain = _per_group(first, n) + _per_group(second, n) - plain
            better = gain > best
            best[better], at[better] = gain[better], (i, j)
    rows = np.flatnonzero(best > 0)
    i, j = at[rows].T
    held = order[left[rows], i].copy()
    order[left[rows], i] = order[right[rows], j]
    order[right[rows], j] = held
    return float(best.sum())


def _per_group(scores: Array, n: int) -> Array:
    """What N:M keeps of [rows, groups, m], per group."""
    m = scores.shape[2]
    return np.asarray(np.partition(scores, m - n, axis=2)[:, :, m - n :].sum(axis=(0, 2)))
