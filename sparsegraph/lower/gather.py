"""Tables by which a convolution gathers its panel: `sparsegraph.targets.kernels.gather` reads them.

Geometry only, NumPy only: which source point each (tile of points, tap) needs.
"""

from dataclasses import dataclass

import numpy as np

from sparsegraph.targets.kernels.gather import FLAT, RUN
from sparsegraph.targets.layout import FeatureMajor


@dataclass(frozen=True)
class Window:
    """How a convolution walks over a map.

    Attributes: all (height, width); pads are (top, left, bottom, right).
    """

    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    pads: tuple[int, int, int, int]

    @property
    def out(self) -> tuple[int, int]:
        (h, w), (kh, kw), (sh, sw), (dh, dw) = self.size, self.kernel, self.stride, self.dilation
        top, left, bottom, right = self.pads
        height = (h + top + bottom - dh * (kh - 1) - 1) // sh + 1
        return height, (w + left + right - dw * (kw - 1) - 1) // sw + 1

    @property
    def is_pointwise(self) -> bool:
        """True if the output map is the input map, point by point."""
        ones = (1, 1)
        return self.kernel == ones and self.stride == ones and not any(self.pads)

    @property
    def is_patches(self) -> bool:
        """True if the windows tile the map: no pixel is read twice and none is left out."""
        tiles = all(d % k == 0 for d, k in zip(self.size, self.kernel))
        return tiles and self.kernel == self.stride != (1, 1) and not any(self.pads)

    def sources(self, tap: int) -> np.ndarray:
        """Per point of the result the source point under a tap; -1 outside the map."""
        (h, w), (out_h, out_w) = self.size, self.out
        ty, tx = divmod(tap, self.kernel[1])
        iy = np.arange(out_h) * self.stride[0] + ty * self.dilation[0] - self.pads[0]
        ix = np.arange(out_w) * self.stride[1] + tx * self.dilation[1] - self.pads[1]
        inside = ((iy >= 0) & (iy < h))[:, None] & (ix >= 0) & (ix < w)
        return np.where(inside, iy[:, None] * w + ix, -1).ravel()

    @property
    def n_taps(self) -> int:
        return self.kernel[0] * self.kernel[1]


def step_of(window: Window, x: FeatureMajor) -> int:
    """`Product.gather` for this geometry.

    Flat copies need one distance between result and source. They take 45, 74, 42, 144 us where
    segments take 65, 106, 44, 186 (14x14x256, 28x28x128, 7x7x512, 56x56x64; one store a cycle would
    be 19, 39, 11, 77). Not kept: no panel but planes moved by each tap column, read in place. Then
    two of three loads are unaligned and each column loads its address: products 20 to 40 % slower.
    """
    is_flat = window.stride == (1, 1) and window.out[1] == window.size[1] and x.is_planar
    return FLAT if is_flat else window.stride[1]


def tables(
    window: Window, x: FeatureMajor, y: FeatureMajor, lanes: int
) -> tuple[np.ndarray, np.ndarray]:
    """The two tables of a gather: runs and masks, or segments and their starts."""
    if step_of(window, x) == FLAT:
        return flat(window, y, lanes)
    return segments(window, x, y, lanes)


def flat(window: Window, y: FeatureMajor, lanes: int) -> tuple[np.ndarray, np.ndarray]:
    """Runs int32 [tiles * taps, 5] and masks int32 [.., (vectors+1) * lanes], equal ones once."""
    vectors = y.block // lanes
    width, (top, left, _, _), dilation = window.size[1], window.pads, window.dilation
    runs = np.zeros((y.tiles, window.n_taps, RUN), np.int32)
    masks = np.zeros((y.tiles, window.n_taps, vectors + 1, lanes), np.int32)
    for tap in range(window.n_taps):
        ty, tx = divmod(tap, window.kernel[1])
        distance = (ty * dilation[0] - top) * width + tx * dilation[1] - left
        inside = np.zeros(y.tiles * y.block + lanes, bool)
        inside[: y.points] = window.sources(tap) >= 0
        for tile in range(y.tiles):
            start = tile * y.block
            valid = inside[start : start + y.block].reshape(vectors, lanes)
            lead, first, stop = _limits(valid, start + distance, lanes)
            runs[tile, tap] = start + distance, 0, lead, first, stop
            masks[tile, tap, :vectors] = -valid.astype(np.int32)
            if lead >= 0:
                masks[tile, tap, vectors] = -inside[start + lead :][:lanes].astype(np.int32)
    each = masks.reshape(y.tiles * window.n_taps, -1)
    unique, index = np.unique(each, axis=0, return_inverse=True)
    runs[..., 1] = index.reshape(y.tiles, -1) * each.shape[1]
    return runs.reshape(-1, RUN), np.ascontiguousarray(unique)


def _limits(valid: np.ndarray, begin: int, lanes: int) -> tuple[int, int, int]:
    """(lead, first, stop) of one row; `begin` is the source of its first point."""
    used = np.flatnonzero(valid.any(1))
    if used.size == 0:
        return -1, len(valid), len(valid)
    first, stop = int(used[0]), int(used[-1]) + 1
    if begin + first * lanes >= 0:
        return -1, first, stop
    return -begin, first + 1, stop


def segments(
    window: Window, x: FeatureMajor, y: FeatureMajor, lanes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Runs of source points for every (tile, tap).

    Returns:
        int32 [segments, 3] (to, from, vectors) and int32 [tiles * taps + 1] starts.
    """
    pieces = []
    for tap in range(window.n_taps):
        point = window.sources(tap)
        address = np.where(point < 0, -1, point // x.block * x.tile + point % x.block)
        pieces.append(_runs(address, window.stride[1], y.block, lanes))
    tile = np.concatenate([t[:, 0] for t in pieces])
    tap_of = np.concatenate([np.full(len(t), i) for i, t in enumerate(pieces)])
    rows = np.concatenate([t[:, 1:] for t in pieces])
    order = np.lexsort((rows[:, 0], tap_of, tile))
    keys = (tile * window.n_taps + tap_of)[order]
    starts = np.searchsorted(keys, np.arange(y.tiles * window.n_taps + 1))
    return np.ascontiguousarray(rows[order], np.int32), starts.astype(np.int32)


def _runs(source: np.ndarray, step: int, block: int, lanes: int) -> np.ndarray:
    """Cut source addresses (-1: zero) into runs within tiles: rows (tile, to, from, vectors)."""
    position = np.arange(len(source))
    follows = np.zeros(len(source), bool)
    zero = (source[1:] < 0) & (source[:-1] < 0)
    moves = (source[1:] >= 0) & (source[:-1] >= 0) & (source[1:] == source[:-1] + step)
    follows[1:] = (zero | moves) & (position[1:] % block != 0)
    first = position[~follows]
    length = np.diff(np.append(first, len(source)))
    longest = 4 * lanes
    pieces = -(-length // longest)
    index = np.repeat(np.arange(len(first)), pieces)
    part = np.arange(len(index)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    start = first[index] + part * longest
    rest = np.minimum(length[index] - part * longest, longest)
    return np.stack([start // block, start % block, source[start], -(-rest // lanes)], axis=1)
