"""How a convolution or a pool walks over a map. Geometry only."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from sparsegraph.errors import Declined
from sparsegraph.graph import attribute, int_attribute, ints_attribute, is_op, static_shape
from sparsegraph.targets.kernels.phases import Phases
from sparsegraph.targets.layout import FeatureMajor
from sparsegraph.targets.target import Target

FLAT = 0  # `Product.gather`: whole rows at once; a positive number: the step between points
PATCHES = (2, 4)  # Winograd's patch sizes
_MOST_AXES = 3
_STRIP_L2 = 0.6  # of the level 2 cache: most that a strip of patches takes
_WEIGHTS_L2 = 0.25  # less of weights every strip may read without being noticed
_FAR_L2 = 16  # patches of a map that large leave the level 3 cache too
LARGEST_ERROR = 1e-5  # of the largest output of a layer computed by Winograd's method


class Depth(NamedTuple):
    """How a window walks along the first of three axes; by default there is one map."""

    size: int = 1
    kernel: int = 1
    stride: int = 1
    dilation: int = 1
    before: int = 0
    after: int = 0

    @property
    def out(self) -> int:
        reach = self.dilation * (self.kernel - 1) + 1
        return (self.size + self.before + self.after - reach) // self.stride + 1


ONE = Depth()


@dataclass(frozen=True)
class Window:
    """How a convolution walks over a map, or over a volume: maps one behind the other.

    Attributes: all (height, width); pads are (top, left, bottom, right).
        is_even: equal windows of the map give equal results, to the last bit.
        depth: the axis before height.
    """

    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    pads: tuple[int, int, int, int]
    is_even: bool = False
    depth: Depth = ONE

    @property
    def out(self) -> tuple[int, int]:
        (h, w), (kh, kw), (sh, sw), (dh, dw) = self.size, self.kernel, self.stride, self.dilation
        top, left, bottom, right = self.pads
        height = (h + top + bottom - dh * (kh - 1) - 1) // sh + 1
        return height, (w + left + right - dw * (kw - 1) - 1) // sw + 1

    @property
    def extents(self) -> tuple[int, int, int]:
        """Of the result: maps, height, width."""
        return self.depth.out, *self.out

    @property
    def taps(self) -> tuple[int, int, int]:
        """Of the kernel: maps, height, width."""
        return self.depth.kernel, *self.kernel

    @property
    def weight_taps(self) -> tuple[int, ...]:
        """How the taps of a weight lie: (height, width), before it the depth of a volume."""
        return self.kernel if self.depth == ONE else self.taps

    @property
    def is_pointwise(self) -> bool:
        """True if the result's map is the input's map, point by point."""
        return self.n_taps == 1 and self._strides == (1, 1, 1) and not any(self._pads)

    @property
    def is_patches(self) -> bool:
        """True if the windows tile the map: no pixel is read twice and none is left out."""
        tiles = all(d % k == 0 for d, k in zip((self.depth.size, *self.size), self.taps))
        is_whole = not any(self._pads) and (self.depth.dilation, *self.dilation) == (1, 1, 1)
        return tiles and is_whole and self.taps == self._strides != (1, 1, 1)

    @property
    def is_shift(self) -> bool:
        """True if all points of the result are as far from what they read under a tap."""
        height, width = self.out
        is_whole = width == self.size[1] and (height == self.size[0] or self.depth.out == 1)
        return is_whole and self._strides == (1, 1, 1)

    def distance(self, tap: int) -> int:
        """From the first point of the result to what it reads under a tap, inside the map or not.

        For the other points too, if the window `is_shift`.
        """
        z, y, x = self._first(tap)
        return (z * self.size[0] + y) * self.size[1] + x

    def sources(self, tap: int) -> np.ndarray:
        """Per point of the result the source point under a tap; -1 outside the map."""
        sizes = (self.depth.size, *self.size)
        starts = zip(self.extents, self._strides, self._first(tap))
        places = np.ix_(*(np.arange(n) * stride + first for n, stride, first in starts))
        inside, flat = np.ones((), bool), np.zeros((), np.int64)
        for place, size in zip(places, sizes):
            inside = inside & (place >= 0) & (place < size)
            flat = flat * size + place
        return np.where(inside, flat, -1).ravel()

    @property
    def n_taps(self) -> int:
        return math.prod(self.taps)

    @property
    def _strides(self) -> tuple[int, int, int]:
        return self.depth.stride, *self.stride

    @property
    def _pads(self) -> tuple[int, ...]:
        return self.depth.before, self.depth.after, *self.pads

    def _first(self, tap: int) -> tuple[int, int, int]:
        """Where the first point of the result reads under a tap."""
        ty, tx = divmod(tap, self.kernel[1])
        tz, ty = divmod(ty, self.kernel[0])
        z = tz * self.depth.dilation - self.depth.before
        return z, ty * self.dilation[0] - self.pads[0], tx * self.dilation[1] - self.pads[1]


@dataclass(frozen=True)
class Phased(Window):
    """A window of stride 2 over maps whose even and odd rows and columns lie apart.

    Every tap reads one of the phases, from all points of the result at one distance.

    Attributes:
        plane: elements from one phase to the next.
    """

    plane: int = 0

    @property
    def is_shift(self) -> bool:
        return True

    def distance(self, tap: int) -> int:
        _, y, x = self._first(tap)
        (down, row), (across, column) = divmod(y, 2), divmod(x, 2)
        return (2 * row + column) * self.plane + down * self.out[1] + across


def phased(window: Window, x: FeatureMajor, target: Target) -> Phased | None:
    """The window over the phases of x, where their rows are as long as the result's.

    With short vectors it saves nothing (instructions of ResNet-18: NEON +0.2 %, SVE -1.4 %) and
    would take memory.
    """
    suits = window.stride == (2, 2) and window.n_taps > 1 and window.depth == ONE
    suits = suits and window.out[1] == -(-window.size[1] // 2)
    if not suits or not x.is_planar or target.lanes < 8:
        return None
    plane = Phases(target.shuffle_lanes).plane(*window.size)
    return Phased(**vars(window), plane=plane)


def gather_of(window: Window, x: FeatureMajor, target: Target) -> int:
    """`Product.gather` of a product that may read phases."""
    return FLAT if phased(window, x, target) else step_of(window, x, target)


def step_of(window: Window, x: FeatureMajor, target: Target) -> int:
    """`Product.gather` for this geometry.

    Flat copies need one distance between result and source. They take 45, 74, 42, 144 us where
    segments take 65, 106, 44, 186 (14x14x256, 28x28x128, 7x7x512, 56x56x64; one store a cycle would
    be 19, 39, 11, 77). Not kept: no panel but planes moved by each tap column, read in place. Then
    two of three loads are unaligned and each column loads its address: products 20 to 40 % slower.
    """
    return FLAT if window.is_shift and x.is_planar and target.is_flat else window.stride[1]


def window_of(node: ir.Node, x: Sequence[int], weight: Sequence[int]) -> Window:
    """The window of a Conv or pool over one, two or three spatial axes.

    Raises:
        Declined: for more axes.
    """
    n = len(x) - 2
    if not 1 <= n <= _MOST_AXES:
        raise Declined(f"{n} spatial axes")
    kernel = ints_attribute(node, "kernel_shape") or tuple(weight[2:])
    stride = ints_attribute(node, "strides") or (1,) * n
    dilation = ints_attribute(node, "dilations") or (1,) * n
    pads = ints_attribute(node, "pads") or (0,) * 2 * n
    mode = attribute(node, "auto_pad", "NOTSET")
    size = tuple(x[2:])
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        pads = _same_pads(size, kernel, stride, dilation, upper=mode == "SAME_UPPER")
    lines = list(zip(size, kernel, stride, dilation, pads, pads[n:]))
    lines = [ONE] * (_MOST_AXES - n) + lines  # a row is a map of height 1
    depth, rows, columns = (Depth(*line) for line in lines)
    return Window(
        (rows.size, columns.size), (rows.kernel, columns.kernel), (rows.stride, columns.stride),
        (rows.dilation, columns.dilation), (rows.before, columns.before, rows.after, columns.after),
        _is_normalised(node), depth,
    )  # fmt: skip


def _is_normalised(node: ir.Node) -> bool:
    """True if a later norm divides single maps by their own deviation.

    Of an image in one colour that is nothing but rounding: a network for style transfer, whose
    first convolution rounds each point of a patch in its own way, came out 44 times its size off.
    """
    if node.graph is None or not any(map(_divides_maps, node.graph)):
        return False
    seen, waiting = {node}, [node]
    while waiting:
        for following in waiting.pop().successors():
            if _divides_maps(following):
                return True
            if following not in seen:
                seen.add(following)
                waiting.append(following)
    return False


def _divides_maps(node: ir.Node) -> bool:
    if is_op(node, "GroupNormalization"):
        shape = static_shape(node.inputs[0])
        return shape is not None and int_attribute(node, "num_groups", 1) == shape[1]
    return is_op(node, "InstanceNormalization")


def _same_pads(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int],
    *, upper: bool,
) -> tuple[int, ...]:  # fmt: skip
    begin, end = [], []
    for d, k, s, dil in zip(size, kernel, stride, dilation):
        total = max(0, (-(-d // s) - 1) * s + dil * (k - 1) + 1 - d)
        small, large = total // 2, total - total // 2
        begin.append(small if upper else large)
        end.append(large if upper else small)
    return (*begin, *end)


class Filter(NamedTuple):
    """A square filter of stride 1 per phase: what Winograd's method sees of a convolution.

    Attributes:
        taps: extent of the filter of a phase.
        stride: of the convolution; map and kernel have stride^2 phases, which become channels.
    """

    taps: int = 3
    stride: int = 1

    @property
    def phases(self) -> int:
        return self.stride**2

    def size(self, m: int) -> int:
        """Extent of a transformed patch of m x m results."""
        return m + self.taps - 1


PLAIN = Filter()


def filter_of(window: Window) -> Filter | None:
    """The filter that Winograd's transforms take, None for other geometries.

    Of maps, 3x3 of stride 1 with any padding up to 2, and kernels of stride 2 that are 4x4 in each
    phase.
    """
    (height, width), stride = window.kernel, window.stride[0]
    if window.depth != ONE:
        return None
    if window.dilation != (1, 1) or window.stride != (stride, stride):
        return None
    if max(window.pads) >= min(height, width):
        return None
    if window.kernel == (3, 3) and stride == 1:
        return PLAIN
    if {height, width} <= {7, 8} and stride == 2:
        return Filter(4, 2)
    return None


def patch_sizes(window: Window, channels: int) -> tuple[int, ...]:
    """Winograd's patch sizes that fit the geometry and round little enough."""
    method = filter_of(window)
    if method is None or window.is_even:
        return ()
    sizes = PATCHES if method.stride == 1 else PATCHES[-1:]
    errors = {m: error_bound(m, channels * method.phases, method.taps) for m in sizes}
    return tuple(m for m, error in errors.items() if error <= LARGEST_ERROR)


def strip_of(
    out: tuple[int, int], m: int, method: Filter, features: tuple[int, int], block: int,
    target: Target,
) -> int:  # fmt: skip
    """Rows of patches that Winograd's three steps take at a time.

    The transformed patches of a whole map go to the outer caches and back, twice. Those of a strip
    stay in the level 2 cache; the price is that each strip reads the transformed weights. One
    thread, Zen 5, whole map and strips: 7x7 of stride 2, 224x224, 3 to 64 channels 1.40, .64 ms;
    3x3, 64 channels of 224x224 10.4, 8.3, of 112x112 1.66, 1.72 (not taken), 32 channels of 224x224
    3.25, 2.55.

    Args:
        out: height and width of the result.
        features: in the input and in the result.
        block: points of the result in one tile; a strip begins with a tile.
    """
    rows, columns = -(-out[0] // m), -(-out[1] // m)
    channels, places = features[0] * method.phases, method.size(m) ** 2
    row_bytes = 4 * places * columns * (channels + features[1])
    weight_bytes, l2 = 4 * places * channels * features[1], target.l2_bytes
    if rows * row_bytes <= l2:
        return rows
    least = block // math.gcd(m * out[1], block)
    strip = max(int(_STRIP_L2 * l2) // row_bytes // least, 1) * least
    is_far = rows * row_bytes > _FAR_L2 * l2 and weight_bytes <= 3 * strip * row_bytes
    return min(strip, rows) if is_far or weight_bytes < _WEIGHTS_L2 * l2 else rows


def error_bound(m: int, channels: int, taps: int = 3) -> float:
    """Bound on max|error| / max|output| for inputs of random sign; rounding grows as its root.

    Set with a margin over a NumPy float32 model of the method, one draw each of 16, 64, 256 and 512
    channels: at most 5e-8 (m = 2) and 2e-7 (m = 4) times sqrt(channels); with 4 taps 8e-7, 4 and 12
    channels. The tests hold the kernels to it up to 512 channels; beyond, the root is extrapolated.
    """
    return {(2, 3): 1e-7, (4, 3): 3e-7, (4, 4): 1e-6}[m, taps] * math.sqrt(channels)
