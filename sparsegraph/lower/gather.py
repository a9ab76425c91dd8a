"""Tables by which a convolution gathers its panel: `sparsegraph.targets.kernels.gather` reads them.

Geometry only, NumPy only: which source point each (tile of points, tap) needs.
"""

from typing import NamedTuple

import numpy as np

from sparsegraph.lower.windows import FLAT, Window, step_of
from sparsegraph.targets.kernels.gather import RUN
from sparsegraph.targets.layout import FeatureMajor
from sparsegraph.targets.target import Target


class Tables(NamedTuple):
    """What tiles of points gather; tiles that gather alike from another place share a kind.

    Attributes:
        places: int32 [tiles, 2], where the tile's kind begins in `taps`, and where it gathers from.
        taps: `flat`'s runs or `segments`' starts, of all taps of one kind after the other.
        pieces: what they refer to.
    """

    places: np.ndarray
    taps: np.ndarray
    pieces: np.ndarray


def tables(window: Window, x: FeatureMajor, y: FeatureMajor, lanes: int, target: Target) -> Tables:
    """The tables of a gather."""
    if step_of(window, x, target) == FLAT:
        return flat(window, y, lanes)
    return segments(window, x, y, lanes, target.segment)


def flat(window: Window, y: FeatureMajor, lanes: int) -> Tables:
    """Runs int32 [kinds * taps, 5] and masks int32 [.., (vectors+1) * lanes], equal ones once."""
    vectors = y.block // lanes
    runs = np.zeros((y.tiles, window.n_taps, RUN), np.int32)
    masks = np.zeros((y.tiles, window.n_taps, vectors + 1, lanes), np.int32)
    for tap in range(window.n_taps):
        distance = window.distance(tap)
        inside = np.zeros(y.tiles * y.block + lanes, bool)
        inside[: y.points] = window.sources(tap) >= 0
        for tile in range(y.tiles):
            start = tile * y.block
            valid = inside[start : start + y.block].reshape(vectors, lanes)
            lead, first, stop = _limits(valid, start + distance, lanes)
            runs[tile, tap] = distance, 0, lead, first, stop
            masks[tile, tap, :vectors] = -valid.astype(np.int32)
            if lead >= 0:
                mine = inside[start + lead : start + y.block]  # the next row begins with zeros
                masks[tile, tap, vectors, : len(mine[:lanes])] = -mine[:lanes].astype(np.int32)
    each = masks.reshape(y.tiles * window.n_taps, -1)
    unique, index = np.unique(each, axis=0, return_inverse=True)
    runs[..., 1] = index.reshape(y.tiles, -1) * each.shape[1]
    kinds, kind = np.unique(runs.reshape(y.tiles, -1), axis=0, return_inverse=True)
    places = np.stack([kind.ravel() * window.n_taps, np.arange(y.tiles) * y.block], axis=1)
    runs = np.ascontiguousarray(kinds.reshape(-1, RUN))
    return Tables(places.astype(np.int32), runs, np.ascontiguousarray(unique))


def _limits(valid: np.ndarray, begin: int, lanes: int) -> tuple[int, int, int]:
    """(lead, first, stop) of one row; `begin` is the source of its first point."""
    used = np.flatnonzero(valid.any(1))
    if used.size == 0:
        return -1, len(valid), len(valid)
    first, stop = int(used[0]), int(used[-1]) + 1
    if begin + first * lanes >= 0:
        return -1, first, stop
    return -begin, first + 1, stop


def segments(window: Window, x: FeatureMajor, y: FeatureMajor, lanes: int, most: int) -> Tables:
    """Starts int32 [kinds * taps + 1] of segments int32 [.., 3] (to, from, vectors).

    `from` counts from the tile's place; a negative number of vectors writes as many zeros.
    """
    pieces = []
    for tap in range(window.n_taps):
        point = window.sources(tap)
        address = np.where(point < 0, -1, point // x.block * x.tile + point % x.block)
        pieces.append(_runs(address, window.stride[1], y.block, lanes, most))
    tile = np.concatenate([t[:, 0] for t in pieces])
    tap_of = np.concatenate([np.full(len(t), i) for i, t in enumerate(pieces)])
    rows = np.concatenate([t[:, 1:] for t in pieces])
    order = np.lexsort((rows[:, 0], tap_of, tile))
    keys = (tile * window.n_taps + tap_of)[order]
    starts = np.searchsorted(keys, np.arange(y.tiles * window.n_taps + 1))
    return _by_kind(rows[order], starts, window.n_taps)


def _by_kind(rows: np.ndarray, starts: np.ndarray, n_taps: int) -> Tables:
    """Segments (to, from, vectors) of every (tile, tap), once for all tiles that gather alike."""
    kinds: dict[bytes, int] = {}
    places, counts, pieces = [], [], []
    for at in range(0, len(starts) - 1, n_taps):
        count = np.diff(starts[at : at + n_taps + 1])
        mine = rows[starts[at] : starts[at + n_taps]].copy()
        is_zero = mine[:, 1] < 0
        place = int(mine[~is_zero, 1].min()) if not is_zero.all() else 0
        mine[:, 1] = np.where(is_zero, 0, mine[:, 1] - place)
        mine[is_zero, 2] *= -1
        key = count.tobytes() + mine.tobytes()
        if key not in kinds:
            kinds[key] = len(kinds) * n_taps
            counts.append(count)
            pieces.append(mine)
        places.append((kinds[key], place))
    ends = np.cumsum(np.concatenate([[0], *counts]))
    found = np.array(places), ends, np.concatenate(pieces)
    return Tables(*(array.astype(np.int32) for array in found))


def _runs(source: np.ndarray, step: int, block: int, lanes: int, most: int) -> np.ndarray:
    """Cut source addresses (-1: zero) into runs within tiles: rows (tile, to, from, vectors)."""
    position = np.arange(len(source))
    follows = np.zeros(len(source), bool)
    zero = (source[1:] < 0) & (source[:-1] < 0)
    moves = (source[1:] >= 0) & (source[:-1] >= 0) & (source[1:] == source[:-1] + step)
    follows[1:] = (zero | moves) & (position[1:] % block != 0)
    first = position[~follows]
    length = np.diff(np.append(first, len(source)))
    longest = most * lanes
    pieces = -(-length // longest)
    index = np.repeat(np.arange(len(first)), pieces)
    part = np.arange(len(index)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    start = first[index] + part * longest
    rest = np.minimum(length[index] - part * longest, longest)
    return np.stack([start // block, start % block, source[start], -(-rest // lanes)], axis=1)
