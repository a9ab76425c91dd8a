"""The weights of one task as a patch of the weight file that all tasks share. NumPy alone.

A patch is a list of gaps, one byte each, then the new 32-bit words, little-endian. A gap below 255
moves that many words ahead of the last one that changed and names a word that changes; 255 moves
255 words and names none. The first gap counts from the word before the file. Where every new word
is zero, as with a mask, the words are left out. In C, on a copy of the weights:

    uint32_t *at = weights - 1;
    for (i = 0; i < n_gaps; i++) { at += gaps[i]; if (gaps[i] < 255) *at = n_words ? *words++ : 0; }
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

WORD = 4
_FAR = 255


@dataclass(frozen=True)
class Patch:
    """`gaps` uint8 and `words` uint32, as the module's docstring says."""

    gaps: Array
    words: Array

    @staticmethod
    def between(before: Array, after: Array) -> Patch:
        """What turns words `before` into `after`, both uint32 and of one size."""
        places = np.flatnonzero(before != after)
        steps = np.diff(places, prepend=-1)
        n_far, rest = np.divmod(steps, _FAR)
        ends = np.cumsum(n_far + 1) - 1
        gaps = np.full(int(ends[-1]) + 1 if len(ends) else 0, _FAR, dtype=np.uint8)
        gaps[ends] = rest
        words = after[places]
        return Patch(gaps, words if words.any() else words[:0])

    @staticmethod
    def read(data: Array, n_gaps: int) -> Patch:
        """The patch in the bytes of a file."""
        return Patch(data[:n_gaps], np.frombuffer(data[n_gaps:].tobytes(), dtype="<u4"))

    def data(self) -> bytes:
        """The bytes of a file."""
        return self.gaps.tobytes() + self.words.astype("<u4").tobytes()

    @property
    def n_changed(self) -> int:
        """Words that change."""
        return int(np.count_nonzero(self.gaps != _FAR))

    def apply(self, weights: Array) -> None:
        """Change uint32 `weights` in place."""
        ends = np.cumsum(self.gaps, dtype=np.int64) - 1
        weights[ends[self.gaps != _FAR]] = self.words if len(self.words) else 0
