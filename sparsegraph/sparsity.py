"""Which zeros a weight has, in which pattern, and whether chance would show the same pattern.

Zero means exactly 0.0, or exactly the zero point of a quantised weight. A structure is reported
only if it explains the zeros and would not arise from random zeros of the same density: each
candidate's probability under independent zeros is bounded from above, and the bound must stay
below `SIGNIFICANCE`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from sparsegraph.layers import weighted

Array = np.ndarray[Any, Any]

SIGNIFICANCE = 1e-9  # 1e-6 shared by the fewer than 1,000 candidates that one weight is tested for
LARGEST_M = 32
BLOCK_SIDES = (1, 2, 4, 8, 16, 32)
_LEAST_FILL = 0.95  # share of non-zeros in the stored blocks: below it, blocks store too many zeros
_SAMPLES = (16, 128)  # lines that are looked at before all of them
_DENSE_BELOW = 0.01  # a share of zeros that no kernel gains from

DENSE, ALL_ZERO, CHANNELS = "dense", "all zero", "dead channels"
UNSTRUCTURED, N_OF_M, ROW_GROUPED, BLOCKS, KERNELS = (
    "unstructured",
    "N:M",
    "row-grouped",
    "blocks",
    "kernels",
)


@dataclass(frozen=True)
class WeightPattern:
    """Zeros of one weight, seen as [out, in(, kh, kw)].

    `pattern` is one of the names above. `block` = (rows, columns) of row-grouped, block and kernel
    patterns; `n`, `m`, `axis` ("inputs" or "outputs") of N:M. Density counts non-zeros over all
    elements; `live_density` leaves dead rows and columns out. `log_chance` bounds the natural
    logarithm of the probability that random zeros show this pattern (0 when there is none).
    """

    shape: tuple[int, ...]
    n_zero: int
    density: float
    live_density: float
    dead_rows: tuple[int, ...]
    dead_columns: tuple[int, ...]
    pattern: str
    n: int = 0
    m: int = 0
    axis: str = ""
    block: tuple[int, int] = (1, 1)
    log_chance: float = 0.0

    @property
    def detail(self) -> str:
        """The structure in words, without the share of zeros."""
        words = [self._structure()] if self._structure() else []
        if self.dead_rows and self.pattern != ALL_ZERO:
            words.append(f"{len(self.dead_rows)} of {self.shape[0]} outputs dead")
        if self.dead_columns and self.pattern != ALL_ZERO:
            words.append(f"{len(self.dead_columns)} of {self.shape[1]} inputs dead")
        return ", ".join(words)

    def _structure(self) -> str:
        match self.pattern:
            case "N:M":
                return f"{self.n}:{self.m} along {self.axis}"
            case "row-grouped":
                return f"row groups of {self.block[0]}"
            case "blocks":
                return f"blocks {self.block[0]}x{self.block[1]}"
            case "kernels":
                return "whole kernels"
            case "dead channels":
                return ""
        return self.pattern

    def __str__(self) -> str:
        if self.pattern == N_OF_M and not (self.dead_rows or self.dead_columns):
            exact = math.isclose(self.density, self.n / self.m, abs_tol=1e-3)
            return self.detail if exact else f"{self._zeros()}, {self.detail}"
        return self.detail if self.n_zero == 0 else f"{self._zeros()}, {self.detail}"

    def _zeros(self) -> str:
        return f"{100 * (1 - self.density):.1f} % zeros"


@dataclass(frozen=True)
class _Candidate:
    pattern: str
    log_chance: float
    n: int = 0
    m: int = 0
    axis: str = ""
    block: tuple[int, int] = (1, 1)


def analyze(weight: Array, *, zero: Array | float | int = 0) -> WeightPattern:
    """Pattern of the zeros of a weight [out, in(, kh, kw)]; `zero` broadcasts against it.

    The most surprising significant structure wins; among nested blocks the largest.
    """
    kept = np.asarray(weight) != zero
    kept = kept.reshape(kept.shape[0] if kept.ndim else 1, -1) if kept.ndim < 2 else kept
    cube = kept.reshape(kept.shape[0], kept.shape[1], -1)
    live_rows, live_columns = cube.any(axis=(1, 2)), cube.any(axis=(0, 2))
    n_kept, n_live = int(np.count_nonzero(cube)), int(live_rows.sum() * live_columns.sum())
    found = _classify(cube, live_rows, live_columns, n_kept)
    return WeightPattern(
        shape=tuple(np.shape(weight)),
        n_zero=kept.size - n_kept,
        density=n_kept / max(kept.size, 1),
        live_density=n_kept / max(n_live * cube.shape[2], 1),
        dead_rows=tuple(np.flatnonzero(~live_rows).tolist()),
        dead_columns=tuple(np.flatnonzero(~live_columns).tolist()),
        pattern=found.pattern,
        n=found.n,
        m=found.m,
        axis=found.axis,
        block=found.block,
        log_chance=found.log_chance,
    )


def _classify(cube: Array, rows: Array, columns: Array, n_kept: int) -> _Candidate:
    if n_kept == cube.size:
        return _Candidate(DENSE, 0.0)
    if n_kept == 0:
        return _Candidate(ALL_ZERO, 0.0)
    density = n_kept / (int(rows.sum()) * int(columns.sum()) * cube.shape[2])
    has_dead = not (rows.all() and columns.all())
    if density > 1 - _DENSE_BELOW:
        return _Candidate(CHANNELS if has_dead else DENSE, 0.0)
    candidates = [*_n_of_m(cube, rows, columns, density), *_blocks(cube, rows, columns, density)]
    significant = [c for c in candidates if c.log_chance < math.log(SIGNIFICANCE)]
    if not significant:
        return _Candidate(UNSTRUCTURED, 0.0)
    return min(significant, key=lambda c: c.log_chance)


# ---- N:M ----------------------------------------------------------------------------------------


def _n_of_m(cube: Array, rows: Array, columns: Array, density: float) -> Iterator[_Candidate]:
    """Every N:M that holds without exception, along inputs and along outputs."""
    yield from _n_of_m_along(cube.transpose(0, 2, 1), rows, columns, density, "inputs")
    yield from _n_of_m_along(cube.transpose(1, 2, 0), columns, rows, density, "outputs")


def _n_of_m_along(
    cube: Array, live_lines: Array, live: Array, density: float, axis: str
) -> Iterator[_Candidate]:
    """The best N for every M along the last axis of a boolean [lines, positions, length] cube.

    Chance: a group with l live members keeps at most N of them with probability
    P(Binomial(l, density) <= N); groups are independent, so the logarithms add up. A sample of the
    lines settles most cases: its N is at most the true one, so its chance is a lower bound.
    """
    positions, length = cube.shape[1:]
    lines = np.flatnonzero(live_lines)
    candidates = list(range(2, min(LARGEST_M, length) + 1))
    found: list[_Candidate] = []
    for n_sampled in (*(n for n in _SAMPLES if n < len(lines)), len(lines)):
        sampled = lines[:: -(-len(lines) // n_sampled)]
        sums = _running(cube[sampled].reshape(-1, length))
        found = []
        for m in candidates:
            n = _largest_group(sums, m)
            if 0 < n < m:
                log_chance = len(lines) * positions * _log_group_chance(live, n, m, density)
                found.append(_Candidate(N_OF_M, log_chance, n=n, m=m, axis=axis))
        found = [c for c in found if c.log_chance < math.log(SIGNIFICANCE)]
        candidates = [c.m for c in found]
        if not candidates:
            return
    yield from found


def _running(matrix: Array) -> Array:
    """Running counts along each line, with a leading zero."""
    dtype = np.int16 if matrix.shape[1] < np.iinfo(np.int16).max else np.int32
    sums = np.zeros((matrix.shape[0], matrix.shape[1] + 1), dtype=dtype)
    np.cumsum(matrix, axis=1, out=sums[:, 1:], dtype=dtype)
    return sums


def _largest_group(sums: Array, m: int) -> int:
    """Most non-zeros in any aligned group of m (the last group may be shorter)."""
    edges = np.ascontiguousarray(sums[:, ::m])
    largest = int((edges[:, 1:] - edges[:, :-1]).max())
    tail = (sums.shape[1] - 1) % m
    return max(largest, int((sums[:, -1] - edges[:, -1]).max())) if tail else largest


def _log_group_chance(live: Array, n: int, m: int, density: float) -> float:
    """Sum over the groups of one line of log P(at most n non-zeros)."""
    sizes = np.add.reduceat(live.astype(np.int64), np.arange(0, len(live), m))
    members, repeats = np.unique(sizes, return_counts=True)
    return sum(
        int(k) * _log_binomial_cdf(n, int(size), density) for size, k in zip(members, repeats)
    )


def _log_binomial_cdf(n: int, trials: int, p: float) -> float:
    """log P(Binomial(trials, p) <= n)."""
    if n >= trials:
        return 0.0
    terms = (math.comb(trials, k) * p**k * (1 - p) ** (trials - k) for k in range(n + 1))
    return math.log(max(math.fsum(terms), 1e-300))


# ---- blocks -------------------------------------------------------------------------------------


def _blocks(cube: Array, rows: Array, columns: Array, density: float) -> Iterator[_Candidate]:
    """Blocks of outputs x inputs that are zero together; larger ones only where smaller hold."""
    positions = cube.shape[2]
    matrix = cube.reshape(cube.shape[0], -1) if positions == 1 else _positions_first(cube)
    live = columns if positions == 1 else np.tile(columns, positions)
    yield from _largest_blocks(matrix.astype(np.uint16), rows, live, density, cube.shape[1])
    if positions > 1:
        kernel = (1, positions)
        counts = cube.sum(axis=2, dtype=np.uint16)
        chance = _block_chance(counts, kernel, density, rows * 1, columns * positions)
        if chance is not None:
            yield _Candidate(KERNELS, chance, block=kernel)


def _positions_first(cube: Array) -> Array:
    return np.ascontiguousarray(cube.transpose(0, 2, 1)).reshape(cube.shape[0], -1)


def _largest_blocks(
    counts: Array, rows: Array, columns: Array, density: float, n_inputs: int
) -> Iterator[_Candidate]:
    """Walk the lattice of block shapes; a shape is tried only if both its halves hold."""
    holding: dict[tuple[int, int], tuple[float, Array]] = {(1, 1): (0.0, counts)}
    for r in BLOCK_SIDES:
        for c in BLOCK_SIDES:
            parent = (r // 2, c) if r > 1 else (r, c // 2)
            if (r, c) == (1, 1) or parent not in holding or not _divides(r, c, counts, n_inputs):
                continue
            pooled = _pool(holding[parent][1], 2 if r > 1 else 1, 2 if r == 1 else 1)
            live = _pool_line(rows, r), _pool_line(columns, c)
            chance = _block_chance(pooled, (r, c), density, *live)
            if chance is not None:
                holding[(r, c)] = (chance, pooled)
    del holding[(1, 1)]
    for (r, c), (chance, _) in holding.items():
        if (r > 1 or c > 2) and not _has_larger((r, c), holding):
            yield _Candidate(ROW_GROUPED if c == 1 else BLOCKS, chance, block=(r, c))


def _divides(r: int, c: int, counts: Array, n_inputs: int) -> bool:
    return counts.shape[0] % r == 0 and n_inputs % c == 0


def _has_larger(
    block: tuple[int, int], holding: dict[tuple[int, int], tuple[float, Array]]
) -> bool:
    r, c = block
    return any((x >= r and y >= c) and (x, y) != block for x, y in holding)


def _pool(counts: Array, r: int, c: int) -> Array:
    """Sum of neighbours: [rows, columns] -> [rows / r, columns / c], for r, c in {1, 2}."""
    if r == 2:
        counts = counts[0::2] + counts[1::2]
    return counts[:, 0::2] + counts[:, 1::2] if c == 2 else counts


def _pool_line(live: Array, width: int) -> Array:
    pooled: Array = live.reshape(-1, width).sum(axis=1)
    return pooled


def _block_chance(
    counts: Array, block: tuple[int, int], density: float, rows: Array, columns: Array
) -> float | None:
    """Bounded log chance of that many empty blocks, or None where blocks do not explain the zeros.

    `rows`, `columns`: live members per block row and column. Chernoff: with G live blocks of which
    a share f is empty and a mean probability q of emptiness, log P <= -G KL(f || q) for f > q.
    """
    stored = counts > 0
    n_kept, n_live = int(counts.sum()), int(rows.sum()) * int(columns.sum())
    size = int(rows @ (stored.astype(np.float32) @ columns.astype(np.float32)))
    if n_kept < _LEAST_FILL * size or n_live - size < _LEAST_FILL * (n_live - n_kept):
        return None
    n_blocks = int(np.count_nonzero(rows)) * int(np.count_nonzero(columns))
    chances = [
        k * q * (1 - density) ** float(a * b)
        for a, k in zip(*np.unique(rows[rows > 0], return_counts=True))
        for b, q in zip(*np.unique(columns[columns > 0], return_counts=True))
    ]
    empty, share = sum(chances) / n_blocks, 1 - int(np.count_nonzero(stored)) / n_blocks
    return -n_blocks * _divergence(share, empty) if share > empty else None


def _divergence(f: float, q: float) -> float:
    """Kullback-Leibler divergence of two Bernoulli variables, in nats."""
    q = min(max(q, 1e-300), 1 - 1e-16)
    left = f * math.log(f / q) if f > 0 else 0.0
    return left + ((1 - f) * math.log((1 - f) / (1 - q)) if f < 1 else 0.0)


# ---- layers of a model --------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerSparsity:
    """One row of the inspection: a layer, its weight and the pattern of its zeros."""

    node_name: str
    op: str
    weight_name: str
    shape: tuple[int, ...]
    pattern: WeightPattern
    macs: int | None


def layers(model: ir.Model) -> list[LayerSparsity]:
    """Sparsity of every MatMul, Gemm, Conv and ConvTranspose weight, in execution order."""
    return [
        LayerSparsity(
            node_name=layer.node.name or "",
            op=layer.node.op_type,
            weight_name=layer.value.name or "",
            shape=tuple(layer.array().shape),
            pattern=analyze(layer.matrix(), zero=layer.zero()),
            macs=layer.macs(),
        )
        for layer in weighted(model)
    ]
