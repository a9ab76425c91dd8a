"""Which format and register blocks a product gets: the cheapest candidate of the cost model.

Blocks and column tiles follow rules found by sweeps on one AVX2 machine (Zen 4, L1 32 KB, L2 1 MB);
what a candidate costs says `sparsegraph.lower.cost`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from sparsegraph.formats import ALIKE
from sparsegraph.lower import cost
from sparsegraph.lower.problem import Choice, Operands, Problem
from sparsegraph.targets.kernels.panel_product import VECTORS
from sparsegraph.targets.kernels.slots import ROWS
from sparsegraph.targets.layout import passes
from sparsegraph.targets.target import Target

Decide = Callable[[Problem, Operands, Target], Choice]
"""How a product is computed."""
Way = Callable[[Problem, Target], Choice]

_BLOCKS = {4: (3, (4,)), 5: (2, (5,)), 6: (2, (6,)), 7: (3, (4, 3)), 8: (3, (4, 4))}

# Panel of one column tile relative to the level 1 cache, by least density: the fewer values, the
# more it costs to load and store partial sums once per tile.
_L1_SHARE = ((0.6, 0.75), (0.07, 1.02), (0.035, 2.0), (0.0, 4.6))
_GATHERED_L1_SHARE = ((0.6, 0.75), (0.15, 1.02), (0.07, 1.2), (0.035, 2.0), (0.0, 4.6))
_ALIKE_L2_SHARE = 0.5
_PANEL_LANES = 8  # points leave few of shorter vectors empty
_FULL = 1.02  # lanes per point of tiles that are as good as full
_JOINED = 8  # vectors of sums where they are joined: half of the registers, more spill
_WHOLE = 0.95  # of the level 1 cache: a gathered panel up to this is not cut (up to 8 % faster)
_WIDEST, _WIDE_PASS = 8, 4  # vectors of a tile that is one pass or two, and of the passes of others
_GAIN = 1.05  # least speed of `coded` over the best way that reads every weight
UNNOTICED_MS = 1.5e-3  # of a call; predictions of so short ones are no better than this
_DOUBT = 0.25  # of a time that was estimated; of predictions for measured machines p90 is 23 %
_HALF_THE_BYTES = 1 / 3  # density below which `coded` takes at most half the bytes of `dense`
CONVERSION = 19.0  # changing the layout of one element, in multiply-adds of ONNX Runtime


def choose(problem: Problem, target: Target) -> Choice:
    """The cheapest way by the cost model; zeros are left out exactly below the break-even density.

    There it gains `_GAIN`, since with few zeros it takes up to 1.5 times the bytes of the dense
    weight; or it takes half the bytes or less and loses nothing that anybody would notice. A digits
    CNN and a text classifier with 90 % zeros, stored that way, take 2 % less time and .12 and .31
    instead of .88 and .69 of the dense weights' memory (AVX2).
    """
    dense_ms = cost.dense_ms(problem, target)
    other = min(_priced(unstructured(problem, target), problem, target), key=lambda c: c.ms)
    limit = gains = break_even(problem, other.ms / _GAIN, target)
    most = _unnoticed(other.ms, problem, target)
    if gains < _HALF_THE_BYTES:
        limit = max(gains, min(break_even(problem, most, target, _small), _HALF_THE_BYTES))
    if problem.density < gains:
        other = _priced([coded(problem, target)], problem, target)[0]
    elif problem.density < limit:
        other = _in_fewest_bytes(_all_small(problem, target), most, problem)
    return dataclasses.replace(other, dense_ms=dense_ms, break_even=limit)


def smallest(problem: Problem, target: Target) -> Choice:
    """The way whose weights take the least memory; of equal ones the cheapest."""
    best = choose(problem, target)
    ways = [best, *_priced([dense(problem, target)], problem, target)]
    if problem.density < 1:
        ways += _priced(_without_zeros(problem, target), problem, target)
    found = min(ways, key=lambda c: (cost.weight_bytes(problem, c), c.ms))
    return dataclasses.replace(found, dense_ms=best.dense_ms, break_even=best.break_even)


def unstructured(problem: Problem, target: Target) -> list[Choice]:
    """Ways that read every weight."""
    ways = [dense(problem, target), *panels(problem, target)]
    return ways + [winograd(problem, m, target) for m in problem.patches]


def dense(problem: Problem, target: Target) -> Choice:
    """Every weight, zero or not."""
    group, split = _dense_blocks(problem, target)
    return Choice("dense", group, split, _column_tile(problem, split, 1.0, target))


def panels(problem: Problem, target: Target) -> list[Choice]:
    """Every weight, with rows in the lanes, where points leave lanes empty or sums are few.

    Elsewhere (AVX-512, Zen 5: 32 to 384 points of 384 to 1024 rows) it takes 0 to 4 % longer.
    """
    is_plain = problem.gather is None and not problem.single and target.joined == 1
    if not is_plain or target.shuffle_lanes < _PANEL_LANES:
        return []
    lanes = problem.tiles(target.lanes) * problem.vectors * target.lanes
    if problem.vectors > 1 and lanes <= _FULL * problem.images * problem.points:
        return []
    return [Choice("panels", VECTORS * target.lanes, (problem.vectors,), problem.columns)]


def winograd(problem: Problem, m: int, target: Target) -> Choice:
    """A dense convolution by patches of m x m."""
    inner = dense(cost.inner_problem(problem, m, target), target)
    taps = f",{problem.filter.taps}" if problem.filter.stride > 1 else ""
    return dataclasses.replace(inner, weight=f"winograd-{m}{taps}")


def coded(problem: Problem, target: Target) -> Choice:
    """Only the non-zero weights; of single points in the fewest bytes that nobody will notice."""
    if problem.single:
        ways = _priced(slots(problem, target), problem, target)
        best = min(c.ms for c in ways)
        return _in_fewest_bytes(ways, _unnoticed(best, problem, target), problem)
    problem = _joined(problem, target)
    group, split = _coded_blocks(problem, target)
    panel = 4 * problem.row_of_pass(split) * problem.columns
    if group == ALIKE and problem.gather is None and panel <= _ALIKE_L2_SHARE * target.l2_bytes:
        tile = problem.columns  # four rows share a load: level 2 keeps up, and no sums wait
    else:
        tile = _column_tile(problem, split, problem.density / min(problem.shared, group), target)
    return Choice("coded", group, split, tile)


def slots(problem: Problem, target: Target) -> list[Choice]:
    """The same of single points: a vector of rows, or fewer of them, and columns that hold any."""
    sizes = (n for n in ROWS if n <= target.lanes)
    return [Choice("slots", n, (1,), problem.columns) for n in sizes]


def _all_small(problem: Problem, target: Target) -> list[Choice]:
    """Ways that leave out zeros and take at most half the bytes of the dense weight."""
    if not problem.single:
        return _priced([coded(problem, target)], problem, target)
    ways, half = slots(problem, target), 2.0 * problem.rows * problem.columns
    small = [c for c in ways if cost.weight_bytes(problem, c) <= half]
    return _priced(small or ways[:1], problem, target)


def _small(problem: Problem, target: Target) -> Choice:
    """The fastest of these."""
    return min(_all_small(problem, target), key=lambda c: c.ms)


def _in_fewest_bytes(ways: list[Choice], most_ms: float, problem: Problem) -> Choice:
    """Of priced ways that take at most this long; the fastest if none does."""
    ways = sorted(ways, key=lambda c: c.ms)
    near = [c for c in ways if c.ms <= most_ms] or ways[:1]
    return min(near, key=lambda c: cost.weight_bytes(problem, c))


def _unnoticed(ms: float, problem: Problem, target: Target) -> float:
    """The longest time of a call that cannot be told from `ms`.

    A product of single points reads every weight once, so that memory decides, of which estimates
    for machines that were never measured know nothing.
    """
    doubt = _DOUBT if problem.single and cost.basis(target) else 0.0
    return ms * (1 + doubt) + UNNOTICED_MS


def _without_zeros(problem: Problem, target: Target) -> list[Choice]:
    """Ways to leave out zeros that are worth measuring."""
    if problem.single:
        return slots(problem, target)
    return other_tiles(coded(problem, target), problem)


def _coded_blocks(problem: Problem, target: Target) -> tuple[int, tuple[int, ...]]:
    """Rows per group and passes: four rows alike, else a pair if its sums leave room for a quad.

    With 16 registers four rows on 4 vectors (2 + 2) tie with pairs, and on 5 (3 + 2) lose 7 %.
    """
    vectors, alike = problem.vectors, alike_vectors(target)
    if vectors <= len(target.coded_blocks):
        return target.coded_blocks[vectors - 1]
    if problem.shared == ALIKE and alike and problem.rows % ALIKE == 0:
        split = passes(vectors, alike)
        if min(split) > 2 or vectors < 3 or vectors > 6:
            return ALIKE, split
    if vectors > _WIDEST and target.lanes > 1:
        return 2, passes(vectors, _WIDE_PASS)
    most = target.n_registers - 4 if target.joined == 1 else target.joined
    return 2 if 2 * vectors <= most else 1, (vectors,)


def alike_vectors(target: Target) -> int:
    """Most vectors of four rows: registers hold their sums, the activations and a weight."""
    is_plain = target.lanes > 1 and target.joined == 1 and not target.coded_blocks
    return (target.n_registers - 1) // (ALIKE + 1) if is_plain else 0


def _joined(problem: Problem, target: Target) -> Problem:
    """The problem in larger tiles, if its tiles may be joined and the machine gains by it.

    A row alone then uses as many registers as a pair of rows did, and reads each index for twice as
    many points: 2.2 instead of 2.5 instructions per multiply-add on RV64GC, although a pair shares
    the loads of columns that both rows have. ResNet-18 at 64x64 with 90 % zeros: 97 %; AArch64,
    where the index takes less: 102 %.
    """
    n, rest = divmod(target.row_vectors, problem.vectors)
    tiles = problem.tiles(target.lanes) // max(1, problem.images)
    if not problem.is_joinable or problem.shared > 1 or n < 2 or rest or tiles % n:
        return problem
    row = problem.row + (n - 1) * problem.vectors * target.lanes
    return dataclasses.replace(problem, vectors=n * problem.vectors, row=row)


def candidates(problem: Problem, target: Target) -> list[Choice]:
    """Every way that is worth measuring, by the model's time; the best guess of `choose` first."""
    best = choose(problem, target)
    found = unstructured(problem, target)
    found += other_tiles(found[0], problem)[1:]
    if problem.density < 1:
        found += _without_zeros(problem, target)
    ways = [
        dataclasses.replace(c, dense_ms=best.dense_ms, break_even=best.break_even)
        for c in sorted(_priced(found, problem, target), key=lambda c: c.ms)
    ]
    return [best, *(c for c in ways if c.way != best.way)]


def other_tiles(choice: Choice, problem: Problem) -> list[Choice]:
    """The choice, and the same with twice and half as many column tiles, one fewer, one more."""
    n = -(-problem.columns // choice.tile)
    counts = [n, 2 * n, n // 2, n - 1, n + 1]
    sizes = [_equal_tiles(problem, k) for k in counts if 0 < k <= problem.channels]
    return [dataclasses.replace(choice, tile=tile) for tile in dict.fromkeys(sizes)]


def break_even(problem: Problem, ms: float, target: Target, way: Way = coded) -> float:
    """The density below which a way to leave out zeros takes less than `ms`."""
    low, high = 0.0, 1.0
    if _ms_at(1.0, way, problem, target) < ms:
        return 1.0
    while high - low > 1 / 512:
        middle = (low + high) / 2
        wins = _ms_at(middle, way, problem, target) < ms
        low, high = (middle, high) if wins else (low, middle)
    return low


def _ms_at(density: float, way: Way, problem: Problem, target: Target) -> float:
    """Predicted milliseconds at another density."""
    other = dataclasses.replace(problem, density=density)
    return cost.ours_ms(other, way(other, target), target)


def _priced(choices: list[Choice], problem: Problem, target: Target) -> list[Choice]:
    return [dataclasses.replace(c, ms=cost.ours_ms(problem, c, target)) for c in choices]


def _column_tile(problem: Problem, split: Sequence[int], density: float, target: Target) -> int:
    """Columns per tile: whole channels in equal tiles that fill a share of the level 1 cache."""
    shares = _L1_SHARE if problem.gather is None else _GATHERED_L1_SHARE
    share = next(s for d, s in shares if density >= d)
    n_bytes = 4 * problem.row * problem.columns
    if problem.gather is not None and n_bytes <= _WHOLE * target.l1_bytes:
        return problem.columns
    row = problem.row_of_pass(split)
    fits = int(target.l1_bytes * share) // (4 * row) // problem.taps
    return _equal_tiles(problem, -(-problem.channels // max(1, fits)))


def _equal_tiles(problem: Problem, n: int) -> int:
    return -(-problem.channels // n) * problem.taps


def _dense_blocks(problem: Problem, target: Target) -> tuple[int, tuple[int, ...]]:
    """Rows per group and passes such that accumulators, weights and activations fit.

    With 16 registers LLVM spills some blocks that would fit; those of `_BLOCKS` have no spills in
    the inner loop where three registers make a multiply-add; other machines name their own.
    """
    vectors = problem.vectors
    if vectors <= len(target.dense_blocks):
        return target.dense_blocks[vectors - 1]
    part = math.gcd(vectors, target.joined)
    if part > 1:  # one load and one multiplication per row cover all vectors of a pass
        return _JOINED // part, (part,) * (vectors // part)
    if target.n_registers <= 16:
        if vectors in _BLOCKS:
            return _BLOCKS[vectors]
        return min(4, max(1, 12 // vectors)), (vectors,)
    is_whole = target.lanes > 1 and vectors == target.tile_vectors[0]
    split = (vectors,) if vectors <= 6 or is_whole else passes(vectors, _WIDE_PASS)
    spare = 8 if target.lanes > 1 else 12  # with 4, a block of 7 rows spills on every such target
    most = 7 if max(split) > 2 else 8  # of 3 vectors, 8 rows spill
    return max(1, min(most, (target.n_registers - spare) // max(split))), split
