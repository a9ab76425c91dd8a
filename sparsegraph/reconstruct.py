"""Choose which weights of one matrix go, and move the rest so that the layer's output stays.

Everything here is NumPy on one matrix W [out, columns] and one second moment H [columns, columns]
of its inputs: the error that matters is tr((W - W') H (W - W')^T), the mean squared change of the
layer's output. Deterministic; no random numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

_DAMPENING = 1e-2  # of the mean diagonal, as in the SparseGPT paper
_COLUMN_BLOCK = 128  # columns that SparseGPT updates eagerly before one lazy product
_ADMM_STEPS, _ADMM_MASK_STEPS = 20, 15  # as in the paper; 30, 20 gained nothing on MiniLM


@dataclass(frozen=True)
class Structure:
    """How many weights go, and which go together.

    Either `m` > 0: `n` of every `m` neighbouring columns stay; or the share `sparsity` goes,
    counted per row if `per_row`, in groups of `rows` outputs that keep the same columns.
    """

    sparsity: float = 0.0
    n: int = 0
    m: int = 0
    rows: int = 1
    per_row: bool = False

    @property
    def target(self) -> float:
        """The share of zeros that results."""
        return 1 - self.n / self.m if self.m else self.sparsity

    def __str__(self) -> str:
        amount = f"{self.n}:{self.m}" if self.m else f"{self.sparsity:g}"
        return f"{amount}:{self.rows}x1" if self.rows > 1 else amount


def keep_mask(score: Array, structure: Structure) -> Array:
    """Boolean mask of the weights that stay: the highest scores [out, columns], exact counts."""
    if structure.rows > 1:
        return np.repeat(
            _keep_flat(_pool_rows(score, structure.rows), structure), structure.rows, 0
        )[: score.shape[0]]
    return _keep_flat(score, structure)


def _keep_flat(score: Array, structure: Structure) -> Array:
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


def _pool_rows(score: Array, rows: int) -> Array:
    """Sum of every `rows` neighbouring rows; a short last group counts what it has."""
    short = -score.shape[0] % rows
    padded = np.concatenate([score, np.zeros((short, score.shape[1]))]) if short else score
    pooled: Array = padded.reshape(-1, rows, score.shape[1]).sum(axis=1)
    return pooled


def dampened(second: Array) -> Array:
    """H + 0.01 mean(diag H) I in fp64: invertible also with fewer rows than columns."""
    h = np.array(second, dtype=np.float64)
    level = _DAMPENING * float(np.mean(np.diag(h)))
    h[np.diag_indices_from(h)] += level if level > 0 else 1.0
    return h


def magnitude(w: Array, structure: Structure) -> Array:
    """Zero the smallest weights (Han et al. 2015, arXiv:1506.02626)."""
    return np.where(keep_mask(_preserving(np.abs(w), w), structure), w, 0.0)


def wanda(w: Array, norm: Array, structure: Structure) -> Array:
    """Zero the smallest |weight| * input norm (Sun et al. 2023, arXiv:2306.11695).

    `norm` [columns] is the root mean square of each input.
    """
    return np.where(keep_mask(_preserving(np.abs(w) * norm, w), structure), w, 0.0)


def sparsegpt(w: Array, second: Array, structure: Structure, frozen: Array | None = None) -> Array:
    """Prune column by column, moving the remaining weights (Frantar & Alistarh 2023, 2301.00774).

    `second` is H, undampened. Weights where `frozen` is True stay zero. The unstructured count is
    exact within every block of 128 columns.
    """
    from scipy.linalg import cholesky

    inverse = np.linalg.inv(dampened(second))
    upper = cholesky(inverse, lower=False)
    work = np.array(w, dtype=np.float64)
    frozen = np.zeros(w.shape, dtype=bool) if frozen is None else frozen
    step = _COLUMN_BLOCK - _COLUMN_BLOCK % structure.m if structure.m else _COLUMN_BLOCK
    for start in range(0, w.shape[1], max(step, structure.m)):
        end = min(start + max(step, structure.m), w.shape[1])
        errors = _eliminate(work, upper, start, end, structure, frozen)
        work[:, end:] -= errors @ upper[start:end, end:]
    return work


def _eliminate(
    work: Array, upper: Array, start: int, end: int, structure: Structure, frozen: Array
) -> Array:
    """Prune columns start..end of `work` in place; returns their errors [out, end - start]."""
    diagonal = np.diag(upper)
    errors = np.zeros((work.shape[0], end - start))
    width = structure.m or end - start
    keep: Array = np.zeros(0)
    for column in range(start, end):
        at = (column - start) % width
        if at == 0:
            chunk = slice(column, min(column + width, end))
            score = (work[:, chunk] / diagonal[chunk]) ** 2
            score[frozen[:, chunk]] = -1.0
            keep = keep_mask(score, structure) & ~frozen[:, chunk]
        pruned = np.where(keep[:, at], work[:, column], 0.0)
        error = (work[:, column] - pruned) / diagonal[column]
        work[:, column + 1 : end] -= np.outer(error, upper[column, column + 1 : end])
        work[:, column] = pruned
        errors[:, column - start] = error
    return errors


def admm(w: Array, second: Array, structure: Structure, frozen: Array | None = None) -> Array:
    """Prune gradually while solving for the remaining weights by ADMM (Boza 2024, 2401.02938).

    Columns are scaled to unit norm, the penalty is 1; the sparsity grows cubically over the first
    15 of 20 steps, then the mask is fixed.
    """
    h = dampened(second)
    norm = np.sqrt(np.diag(h))
    scaled = h / np.outer(norm, norm)
    penalty = 1.0
    inverse = np.linalg.inv(scaled + penalty * np.eye(len(h))).astype(np.float32)
    origin = (w * norm).astype(np.float32)
    pull = origin @ (scaled.astype(np.float32) @ inverse)
    frozen = np.zeros(w.shape, dtype=bool) if frozen is None else frozen
    current, dual = origin.copy(), np.zeros_like(origin)
    keep, kept = ~frozen, origin
    for step in range(1, _ADMM_STEPS + 1):
        total = current + dual
        if step <= _ADMM_MASK_STEPS:
            keep = _gradual_mask(total, structure, step / _ADMM_MASK_STEPS, frozen)
        kept = np.where(keep, total, np.float32(0))
        dual = total - kept
        current = pull + penalty * ((kept - dual) @ inverse)
    return np.where(keep, current / norm, 0.0)


def _gradual_mask(total: Array, structure: Structure, progress: float, frozen: Array) -> Array:
    """The mask at a share `progress` of the schedule; a pattern is imposed from half way on."""
    share = structure.target * (1 - (1 - progress) ** 3)
    now = Structure(sparsity=share, rows=structure.rows, per_row=structure.per_row)
    if progress == 1 or (structure.m and progress >= 0.5):
        now = structure
    score = np.square(total)
    score[frozen] = -1.0
    return keep_mask(score, now) & ~frozen


def retarget(w: Array, cross: Array, second: Array, drift: Array | None = None) -> Array:
    """Weights that map changed inputs to the original outputs as well as a linear layer can.

    `second` = E[x x^T] of the changed inputs, `cross` = E[x0 x^T] with the original inputs x0,
    `drift` = E[(r0 - r) x^T] of the residual that is added to the output: the layer then also makes
    up for what the residual lost. Least squares, dampened towards W itself.
    """
    wanted = w @ (cross - second)
    if drift is not None:
        wanted = wanted + drift
    return w + np.linalg.solve(dampened(second), wanted.T).T


def output_error(delta: Array, w: Array, second: Array) -> float:
    """sqrt(tr(D H D^T) / tr(W H W^T)): relative change of the output, 0 for an all-zero layer."""
    change = float(np.einsum("ij,ij->", delta @ second, delta))
    whole = float(np.einsum("ij,ij->", w @ second, w))
    return float(np.sqrt(max(change, 0.0) / whole)) if whole > 0 else 0.0


def _preserving(score: Array, w: Array) -> Array:
    """Scores that let existing zeros go first."""
    return np.where(w == 0, -1.0, score)
