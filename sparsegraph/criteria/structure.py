"""How many weights go and which go together, and the mask that a score makes of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

INPUTS, OUTPUTS = "inputs", "outputs"


@dataclass(frozen=True)
class Structure:
    """How many weights go, and which go together.

    Blocks of `rows` outputs x `columns` inputs stay or go as one. Of these, either `m` > 0: `n` of
    every `m` neighbours along `axis` stay; or the share `sparsity` goes, counted per row of blocks
    if `per_row`. With `channels`, a block is an input channel: all outputs and kernel positions.
    """

    sparsity: float = 0.0
    n: int = 0
    m: int = 0
    rows: int = 1
    columns: int = 1
    per_row: bool = False
    axis: str = INPUTS
    channels: bool = False

    def of(self, out: int, n_taps: int) -> Structure:
        """The structure with the size of a channel in a layer of `out` outputs."""
        return replace(self, rows=out, columns=n_taps) if self.channels else self

    @property
    def target(self) -> float:
        """The share of zeros that results."""
        return 1 - self.n / self.m if self.m else self.sparsity

    @property
    def has_blocks(self) -> bool:
        return self.rows > 1 or self.columns > 1 or self.channels

    @property
    def run(self) -> int:
        """Neighbouring columns that must be decided together; 1 where each stands alone."""
        return self.columns * (self.m if self.m and self.axis == INPUTS else 1)

    @property
    def stack(self) -> int:
        """Neighbouring rows that must be decided together."""
        return self.rows * (self.m if self.m and self.axis == OUTPUTS else 1)

    def __str__(self) -> str:
        amount = f"{self.n}:{self.m}" if self.m else f"{self.sparsity:g}"
        blocks = "channels" if self.channels else f"{self.rows}x{self.columns}"
        text = f"{amount}:{blocks}" if self.has_blocks else amount
        return f"{text},axis={OUTPUTS}" if self.axis == OUTPUTS else text


def keep_mask(score: Array, structure: Structure) -> Array:
    """Boolean mask of the weights that stay: the highest scores [out, columns], exact counts.

    A block's score is the sum of its members; groups and blocks at the border count what they have.
    """
    if not structure.has_blocks:
        return _keep(score, structure)
    keep = _keep(_pool(score, structure.rows, structure.columns), structure)
    wide = np.repeat(np.repeat(keep, structure.rows, axis=0), structure.columns, axis=1)
    return wide[: score.shape[0], : score.shape[1]]


def keep_best(
    w: Array, score: Array, structure: Structure, frozen: Array | None = None
) -> tuple[Array, Array]:
    """(weights, mask) with the lowest scores zeroed; existing and frozen zeros go first.

    In a block they count nothing: the block goes first only if it holds nothing else.
    """
    zero = w == 0 if frozen is None else frozen | (w == 0)
    keep = keep_mask(np.where(zero, 0.0 if structure.has_blocks else -1.0, score), structure)
    if frozen is not None:
        keep &= ~frozen
    return np.where(keep, w, 0.0), keep


def _keep(score: Array, structure: Structure) -> Array:
    if structure.m and structure.axis == OUTPUTS:
        return _keep_n_of_m(score.T, structure.n, structure.m).T
    if structure.m:
        return _keep_n_of_m(score, structure.n, structure.m)
    lines = score if structure.per_row else score.reshape(1, -1)
    n_gone = round(structure.sparsity * lines.shape[1])
    keep = np.ones(lines.shape, dtype=bool)
    if n_gone:
        gone = np.argpartition(lines, n_gone - 1, axis=1)[:, :n_gone]
        np.put_along_axis(keep, gone, False, axis=1)
    return keep.reshape(score.shape)


def _keep_n_of_m(score: Array, n: int, m: int) -> Array:
    out, columns = score.shape
    padded = np.full((out, -(-columns // m) * m), -np.inf)
    padded[:, :columns] = score
    order = np.argsort(-padded.reshape(out, -1, m), axis=2, kind="stable")
    keep = np.zeros(order.shape, dtype=bool)
    np.put_along_axis(keep, order[:, :, :n], True, axis=2)
    return keep.reshape(out, -1)[:, :columns]


def _pool(score: Array, rows: int, columns: int) -> Array:
    """Sum over blocks of rows x columns."""
    out, wide = score.shape
    down, across = -(-out // rows), -(-wide // columns)
    padded = np.zeros((down * rows, across * columns))
    padded[:out, :wide] = score
    pooled: Array = padded.reshape(down, rows, across, columns).sum(axis=(1, 3))
    return pooled
