"""Which format and register blocks a product gets, from its density, its points and the target.

Time model, in vector multiply-adds per cycle relative to the dense kernel of the same machine:
fitted to `python -m benchmarks.run kernels` (benchmarks/results); see `coded_slowdown`.
"""

import itertools
from dataclasses import dataclass

from sparsegraph.targets.target import Target

# Cost of one non-zero value of a coded product relative to one value of a dense one, by density
# (linear between the points); benchmarks/results: kernels, shapes 384x768x768 to 49x1024x512.
_SLOWDOWN = (
    (0.0, 2.4),
    (0.02, 2.2),
    (0.05, 2.05),
    (0.1, 1.85),
    (0.2, 1.62),
    (0.5, 1.32),
    (1.0, 1.2),
)

_DIRECT_BLOCKS = {
    4: (3, (4,)), 5: (2, (5,)), 6: (2, (6,)), 7: (3, (4, 3)), 8: (3, (4, 4)),
}  # fmt: skip
_GATHERED_BLOCKS = {  # 79, 70, 81, 63 GF/s; without the change 38, 29, 81, 43 (3x3 layers)
    4: (2, (4,)), 5: (3, (3, 2)), 6: (2, (6,)), 7: (2, (4, 3)), 8: (2, (4, 4)),
}  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """How one product is computed.

    Attributes:
        weight: `dense` or `coded`.
        group: rows that share activation loads.
        split: vectors per pass over a tile of points.
        tile: columns per column tile.
        break_even: density below which `coded` wins on this machine.
        cost: time relative to the dense kernel.
    """

    weight: str
    group: int
    split: tuple[int, ...]
    tile: int
    break_even: float
    cost: float


def coded_slowdown(density: float) -> float:
    """Time of a non-zero value relative to a value of the dense kernel."""
    points = _SLOWDOWN
    for (d0, s0), (d1, s1) in itertools.pairwise(points):
        if density <= d1:
            return s0 + (s1 - s0) * (density - d0) / (d1 - d0)
    return points[-1][1]


def break_even() -> float:
    """The density at which both kernels take the same time."""
    density = 1.0
    while density * coded_slowdown(density) > 1.0:
        density -= 0.005
    return density


def choose(
    density: float, vectors: int, columns: int, target: Target,
    *, taps: int = 1, row: int = 0, is_gathered: bool = False,
) -> Choice:  # fmt: skip
    """Pick format and blocks.

    Args:
        density: share of non-zero weights.
        vectors: vectors in one tile of points.
        columns: columns of the weight matrix.
        taps: columns per channel (a column tile holds whole channels).
        row: elements between rows of the activation panel.
        is_gathered: the panel of a convolution is gathered.
    """
    cost = density * coded_slowdown(density)
    dense = cost >= 1.0
    group, split = (
        _dense_blocks(vectors, target) if dense else _coded_blocks(density, vectors, target)
    )
    panel_bytes = target.l1_bytes * (
        0.75 if dense or density > 0.3 else 1.1 if density > 0.07 else 1.6
    )
    tile = int(panel_bytes) // (4 * (row or vectors * target.lanes))
    tile = max(1, tile // taps) * taps
    n_tiles = -(-columns // tile)
    tile = -(-columns // taps // n_tiles) * taps  # equal tiles
    return Choice("dense" if dense else "coded", group, split, tile, break_even(), min(1.0, cost))


def _dense_blocks(
    vectors: int, target: Target, *, is_gathered: bool
) -> tuple[int, tuple[int, ...]]:
    """Rows per group and passes such that accumulators, weights and activations fit.

    With 16 registers LLVM spills some blocks that would fit, others when the panel is gathered
    (it then keeps all activation loads live); the blocks below have no spills in the inner loop.
    """
    if target.n_registers <= 16:
        blocks = _GATHERED_BLOCKS if is_gathered else _DIRECT_BLOCKS
        if vectors in blocks:
            return blocks[vectors]
        return min(4, max(1, 12 // vectors)), (vectors,)
    passes = 1 if vectors <= 6 else 2
    split = tuple(vectors // passes + (i < vectors % passes) for i in range(passes))
    return max(1, min(8, (target.n_registers - 4) // max(split))), split


def _coded_blocks(density: float, vectors: int, target: Target) -> tuple[int, tuple[int, ...]]:
    budget = target.n_registers - 4
    group = budget // vectors
    limit = 3 if density > 0.3 else 2
    return max(1, min(limit, group)), (vectors,)
