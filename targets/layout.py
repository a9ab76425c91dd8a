"""How a value lies in memory: row-major as ONNX writes it, or feature-major in blocks of points.

Feature-major (`FeatureMajor`) puts vector lanes over points (pixels of an NCHW map, tokens of a
sequence) and leaves features to scalars. Element (image n, feature c, point p) lies at

    offset + n*image + (p // block)*tile + c*row + p % block         (in elements)

`blocked` has tile = features*block, row = block: one tile of points is one contiguous panel.
`planar` has tile = block, row = plane: every feature is one contiguous plane (NCHW with padded
planes). Both are one formula, so kernels take the four strides as arguments and serve both.
A slice of features is a view: the same strides with another offset.
"""

import dataclasses
from dataclasses import dataclass

from sparsegraph.targets.target import Target

_ONE_TILE = 7  # vectors
LINE = 16  # float32 values in a cache line of 64 bytes


@dataclass(frozen=True)
class FeatureMajor:
    """Strides of a feature-major value, in elements; every stride but `offset` covers padding.

    Attributes:
        images, features, points: logical extents.
        block: points in one tile (the last tile of an image is padded up to `block`).
        image, tile, row: strides of image, tile of points, feature.
        offset: first element (feature slices are views).
        axis: the axis of the logical ONNX shape that holds the features.
    """

    images: int
    features: int
    points: int
    block: int
    image: int
    tile: int
    row: int
    axis: int
    offset: int = 0

    @property
    def tiles(self) -> int:
        """Tiles of points in one image."""
        return -(-self.points // self.block)

    @property
    def is_planar(self) -> bool:
        """True if the points of one feature are contiguous over the whole image."""
        return self.tile == self.block

    @property
    def size(self) -> int:
        """Elements to allocate for a value that is not a view, tail padding included."""
        return self.images * self.image

    def slice(self, start: int, features: int) -> "FeatureMajor":
        """The view of features [start, start+features)."""
        return dataclasses.replace(self, features=features, offset=self.offset + start * self.row)

    def same_points(self, other: "FeatureMajor") -> bool:
        """True if both tile the same points in the same way."""
        mine = (self.images, self.points, self.block)
        return mine == (other.images, other.points, other.block)


def passes(vectors: int, most: int) -> tuple[int, ...]:
    """Vectors of the fewest passes over a tile that take at most `most` each, evenly shared."""
    n = -(-vectors // most)
    return tuple(vectors // n + (i < vectors % n) for i in range(n))


def point_block(points: int, target: Target) -> int:
    """Points per tile: one tile if there are few, else least padding, then as the target has it.

    With fewer than 4 vectors a product is bound by broadcasts; with more than 6 only one row fits
    16 registers; measured on AVX2, 4 is up to 6 % ahead of 6 in sparse products, equal elsewhere.
    The 196 and 197 points of a map of 14x14 and of a picture's patches are 13 vectors of AVX-512:
    computed in passes of 4 and 3 a dense DeiT-S takes 8 to 10 % less time than in seven tiles of 2,
    with 50 % zeros 14 % less.
    """
    lanes = target.lanes
    vectors = -(-points // lanes)
    if vectors <= min(_ONE_TILE, max(target.tile_vectors)):
        return max(1, vectors) * lanes
    waste = {nv: -(-vectors // nv) * nv / vectors for nv in target.tile_vectors}
    best = min(waste.values())
    return lanes * next(nv for nv, w in waste.items() if w <= best + 0.03)


def blocked(images: int, features: int, points: int, axis: int, target: Target) -> FeatureMajor:
    """Tiles of points, each a contiguous panel [features, block]."""
    block = point_block(points, target)
    tile, tiles = features * block, -(-points // block)
    return FeatureMajor(images, features, points, block, tiles * tile, tile, block, axis)


def planar(images: int, features: int, points: int, axis: int, target: Target) -> FeatureMajor:
    """One plane per feature, padded to whole tiles and to an odd number of cache lines.

    Planes a power of two apart fall into the same cache sets; an odd number of lines avoids it.
    """
    block = point_block(points, target)
    lines = -(-(-(-points // block) * block) // LINE)
    plane = (lines | 1) * LINE
    return FeatureMajor(images, features, points, block, features * plane, block, plane, axis)


def planes(images: int, features: int, points: int, axis: int, target: Target) -> FeatureMajor:
    """The caller's row-major planes, without padding: whole tiles if `block` divides `points`."""
    block = point_block(points, target)
    return FeatureMajor(images, features, points, block, features * points, block, points, axis)


def flat(images: int, features: int, axis: int) -> FeatureMajor:
    """Single points as row-major memory has them; only kernels of single points read this."""
    return FeatureMajor(images, features, 1, 1, features, features, 1, axis)
