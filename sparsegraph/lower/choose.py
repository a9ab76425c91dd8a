"""Which format and register blocks a product gets, from its density, its points and the target.

Time model, relative to ONNX Runtime's dense kernel. The cost of `coded` values is the median over
five products of what `python -m benchmarks.product_cost` prints on one AVX2 machine (Zen 4, L1 32
KB, L2 1 MB); single shapes are up to 20 % off it, with shared zeros and few points up to 40 %. The
other numbers were read by hand off warm timings of single kernels on the same machine.
"""

import itertools
from dataclasses import dataclass

from sparsegraph.targets.target import Target

# Cost of one non-zero value of a coded product relative to one value of a dense one, by density
# (linear between the points).
_SLOWDOWN = (
    (0.0, 2.7), (0.02, 2.42), (0.05, 1.97), (0.1, 1.69), (0.2, 1.41), (0.3, 1.33),
    (0.5, 1.25), (0.7, 1.19), (0.9, 1.13), (1.0, 1.1),
)  # fmt: skip
# The same where pairs of rows share their zeros.
_SHARED_SLOWDOWN = (
    (0.0, 2.2), (0.02, 1.87), (0.05, 1.35), (0.1, 1.2), (0.2, 1.17), (0.5, 1.1), (1.0, 1.08),
)  # fmt: skip

_DIRECT_BLOCKS = {
    4: (3, (4,)), 5: (2, (5,)), 6: (2, (6,)), 7: (3, (4, 3)), 8: (3, (4, 4)),
}  # fmt: skip
_GATHERED_BLOCKS = {  # 79, 70, 81, 63 GF/s; with the direct blocks 38, 29, 81, 43
    4: (2, (4,)), 5: (3, (3, 2)), 6: (2, (6,)), 7: (2, (4, 3)), 8: (2, (4, 4)),
}  # fmt: skip

_DIRECT_SLOWDOWN = {4: 1.0, 5: 1.06, 6: 1.0, 7: 1.1, 8: 1.0}  # padding of points is not in it
_GATHERED_SLOWDOWN = {4: 1.13, 5: 1.27, 6: 1.1, 7: 1.4, 8: 1.3}
# Panel of one column tile relative to the level 1 cache, by least density: the fewer values, the
# more it costs to load and store partial sums once per tile.
_L1_SHARE = ((0.15, 0.75), (0.07, 1.02), (0.035, 2.0), (0.0, 4.6))
_GATHERED_L1_SHARE = ((0.15, 0.75), (0.07, 1.35), (0.035, 2.0), (0.0, 4.6))
_GATHER = 9.0  # gathering one vector costs as much as this many dense multiply-adds
CONVERSION = 19.0  # changing the layout of one element, in the same unit


@dataclass(frozen=True)
class Choice:
    """How one product is computed.

    Attributes:
        weight: `dense` or `coded`.
        group: rows that share activation loads.
        split: vectors per pass over a tile of points.
        tile: columns per column tile.
        break_even: density below which `coded` wins on this machine.
        cost: estimated time relative to ONNX Runtime's dense kernel.
    """

    weight: str
    group: int
    split: tuple[int, ...]
    tile: int
    break_even: float
    cost: float


def coded_slowdown(density: float, *, is_shared: bool = False) -> float:
    """Time of a non-zero value relative to a value of the dense kernel."""
    points = _SHARED_SLOWDOWN if is_shared else _SLOWDOWN
    for (d0, s0), (d1, s1) in itertools.pairwise(points):
        if density <= d1:
            return s0 + (s1 - s0) * (density - d0) / (d1 - d0)
    return points[-1][1]


def dense_slowdown(vectors: int, *, is_gathered: bool) -> float:
    """Time of our dense kernel relative to ONNX Runtime's."""
    return (_GATHERED_SLOWDOWN if is_gathered else _DIRECT_SLOWDOWN).get(vectors, 1.4)


def break_even(vectors: int, *, is_gathered: bool, is_shared: bool = False) -> float:
    """The density at which both kernels take the same time."""
    return density_at(dense_slowdown(vectors, is_gathered=is_gathered), is_shared=is_shared)


def density_at(cost: float, *, is_shared: bool = False) -> float:
    """The density at which a coded product has this cost, relative to ONNX Runtime's kernel."""
    density = 1.0
    while density > 0 and density * coded_slowdown(density, is_shared=is_shared) > cost:
        density -= 0.005
    return density


def choose(
    density: float, vectors: int, columns: int, target: Target,
    *, taps: int = 1, row: int = 0, rows: int = 1 << 20, is_gathered: bool = False,
    is_shared: bool = False,
) -> Choice:  # fmt: skip
    """Pick format and blocks.

    Args:
        density: share of non-zero weights.
        vectors: vectors in one tile of points.
        columns: columns of the weight matrix.
        taps: columns per channel (a column tile holds whole channels).
        row: elements between rows of the activation panel.
        rows: rows of the weight matrix, over which the cost of gathering is spread.
        is_gathered: the panel of a convolution is gathered.
        is_shared: pairs of rows have the same zeros (`formats.is_shared`).
    """
    limit = break_even(vectors, is_gathered=is_gathered, is_shared=is_shared)
    is_dense = density >= limit
    if is_dense:
        group, split = _dense_blocks(vectors, target, is_gathered=is_gathered)
        cost = dense_slowdown(vectors, is_gathered=is_gathered)
    else:
        group, split = _coded_blocks(vectors, target)
        cost = density * coded_slowdown(density, is_shared=is_shared)
    cost += _GATHER / rows if is_gathered else 0.0
    loads = density / 2 if is_shared and not is_dense else density
    shares = _GATHERED_L1_SHARE if is_gathered else _L1_SHARE
    share = next(s for d, s in shares if loads >= d)
    tile = _column_tile(share, columns, row or vectors * target.lanes, taps, target)
    return Choice("dense" if is_dense else "coded", group, split, tile, limit, cost)


def _column_tile(share: float, columns: int, row: int, taps: int, target: Target) -> int:
    """Columns per tile: whole channels in equal tiles of at most `share` level 1 caches."""
    tile = max(1, int(target.l1_bytes * share) // (4 * row) // taps) * taps
    n_tiles = -(-columns // tile)
    return -(-columns // taps // n_tiles) * taps  # equal tiles


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


def _coded_blocks(vectors: int, target: Target) -> tuple[int, tuple[int, ...]]:
    """A pair of rows if its accumulators leave registers for a value and the quad it comes from."""
    return (2 if 2 * vectors <= target.n_registers - 4 else 1), (vectors,)
