"""Labels of axis positions, and the forest that ties them.

A label is an integer. Label 0 is the frozen one: whatever is tied to it must stay. An axis whose
positions are all frozen is written None, so that maps of any size cost nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64]
Axis = Labels | None
Axes = tuple[Axis, ...]
FROZEN = 0


@dataclass
class Forest:
    """Makes labels in batches and ties them; `roots` tells what is tied after all ties."""

    n: int = 1
    starts: list[int] = field(default_factory=lambda: [0])
    _left: list[Labels] = field(default_factory=list)
    _right: list[Labels] = field(default_factory=list)

    def fresh(self, n: int) -> Labels:
        """`n` new labels that belong to one batch."""
        self.starts.append(self.n)
        self.n += n
        return np.arange(self.n - n, self.n)

    def tie(self, a: Labels, b: Labels) -> None:
        """Position by position, with broadcasting: the two go together."""
        left, right = np.broadcast_arrays(a, b)
        self._left.append(left.reshape(-1))
        self._right.append(right.reshape(-1))

    def roots(self) -> Labels:
        """The smallest label of every label's component.

        Labels hook onto smaller neighbours, then paths halve, until nothing moves (connected
        components as in Shiloach and Vishkin 1982, with numpy doing the parallel steps).
        """
        parent = np.arange(self.n)
        if not self._left:
            return parent
        left, right = np.concatenate(self._left), np.concatenate(self._right)
        while True:
            a, b = parent[left], parent[right]
            open_edges = a != b
            if not open_edges.any():
                return parent
            left, right = left[open_edges], right[open_edges]
            a, b = a[open_edges], b[open_edges]
            np.minimum.at(parent, np.maximum(a, b), np.minimum(a, b))
            while True:
                shorter = parent[parent]
                if np.array_equal(shorter, parent):
                    break
                parent = shorter

    def batch_of(self, labels: Labels) -> Labels:
        """The number of the batch that each label was made in; the frozen label is batch 0."""
        return np.searchsorted(np.asarray(self.starts), labels, side="right") - 1


def dense(axis: Axis, n: int) -> Labels:
    """The axis as an array of `n` labels."""
    return np.zeros(n, np.int64) if axis is None else axis


def thin(labels: Labels) -> Axis:
    """None for labels that are all frozen."""
    return labels if labels.any() else None


def joined(pieces: Sequence[Axis], sizes: Sequence[int]) -> Axis:
    """Axes one behind the other."""
    return thin(np.concatenate([dense(p, n) for p, n in zip(pieces, sizes, strict=True)]))
