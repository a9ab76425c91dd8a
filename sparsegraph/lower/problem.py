"""One product with a constant weight, as far as its time depends on it, and how it is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sparsegraph import formats
from sparsegraph.lower import windows
from sparsegraph.lower.windows import PLAIN, Filter, Window
from sparsegraph.targets.kernels.product import panel_row
from sparsegraph.targets.kernels.slots import MOST_COLUMNS, ROWS
from sparsegraph.targets.kernels.vector_product import MOST_IMAGES
from sparsegraph.targets.layout import LINE, FeatureMajor
from sparsegraph.targets.target import Target

_NEARLY_DENSE = 0.9  # above it rows share their zeros by chance


@dataclass(frozen=True)
class Problem:
    """A product of a weight [rows, channels, taps] with activations of `images * points` points.

    Attributes:
        vectors: vectors in one tile of points.
        row: elements between rows of the activation panel.
        gather: None where the activations lie as the kernel reads them, else `windows.gather_of`.
        density: share of non-zero weights.
        shared: neighbouring rows that have the same zeros (`formats.shared_rows`).
        source: points of one image of the input.
        out: extents of the map (height, width), of a volume's maps one below the other; `(1,
            points)` of a matrix product.
        patches: Winograd's patch sizes that this layer can use.
        filter: what Winograd's method sees of the kernel.
        is_joinable: neighbouring tiles of points may be computed as one.
        single: one point in each of a few images, which has kernels of its own.
        is_unfolded: windows over volumes, of which ONNX Runtime makes a matrix first.
    """

    rows: int
    channels: int
    taps: int
    images: int
    points: int
    vectors: int
    row: int
    gather: int | None
    density: float
    shared: int
    source: int
    out: tuple[int, int]
    patches: tuple[int, ...] = ()
    filter: Filter = PLAIN
    is_joinable: bool = False
    single: bool = False
    is_unfolded: bool = False

    @property
    def columns(self) -> int:
        """Columns of the weight matrix."""
        return self.channels * self.taps

    def row_of_pass(self, split: Sequence[int]) -> int:
        """Values of a row of the panel that the level 1 cache holds during one of many passes.

        Of a gathered panel all, since it is written there; of one or two passes, as was measured.
        """
        if self.gather is not None or len(split) <= 2:
            return self.row
        return self.row * max(split) // sum(split)

    @property
    def macs(self) -> int:
        """Multiply-adds of a dense run."""
        return self.rows * self.columns * self.images * self.points

    def tiles(self, lanes: int) -> int:
        """Tiles of points of all images."""
        return self.images * -(-self.points // (self.vectors * lanes))


@dataclass(frozen=True)
class Operands:
    """What a problem was read from: enough to run it.

    Attributes:
        weight: [rows, columns], or [rows, channels, *taps] with a `window`.
        x, y: how activations and result lie.
        window: None for a matrix product.
        planes: other operands lie in planes too.
        plain: other operands are constants of a feature.
    """

    weight: np.ndarray
    x: FeatureMajor
    y: FeatureMajor
    window: Window | None
    planes: bool = True
    plain: bool = True


@dataclass(frozen=True)
class Choice:
    """How one product is computed.

    Attributes:
        weight: `dense`, `panels` (dense with rows in the lanes), `coded`, `slots` (the same of
            single points), or `winograd-M` with patches of M x M; `winograd-M,T` where the kernel
            is T x T in each phase of a stride.
        group: rows that share activation loads.
        split: vectors per pass over a tile of points; of tiles that were joined more than the
            problem's.
        tile: columns per column tile; group, split and tile of Winograd's inner product.
        ms: time of the kernels, `dense_ms`: of ONNX Runtime's dense kernel.
        break_even: density below which zeros are left out on this machine.
        is_measured: `ms` was measured here, not predicted.
    """

    weight: str
    group: int
    split: tuple[int, ...]
    tile: int
    ms: float = 0.0
    dense_ms: float = 0.0
    break_even: float = 0.0
    is_measured: bool = False

    @property
    def way(self) -> str:
        """The choice itself: `coded 2x4 tile 512`."""
        passes = "+".join(map(str, self.split))
        return f"{self.weight} {self.group}x{passes} tile {self.tile}"

    @property
    def format(self) -> str:
        """What is stored: in panels a dense weight."""
        return "dense" if self.weight == "panels" else self.weight

    @property
    def cost(self) -> float:
        """Time relative to ONNX Runtime's dense kernel."""
        return self.ms / self.dense_ms if self.dense_ms else 1.0

    @property
    def speedup(self) -> float:
        """How many times faster than ONNX Runtime's dense kernel."""
        return self.dense_ms / self.ms if self.ms else 1.0

    @property
    def patch(self) -> int:
        """Winograd's patch size, 0 for a direct product."""
        if "winograd" not in self.weight:
            return 0
        return int(self.weight.removeprefix("winograd-").partition(",")[0])


def of(operands: Operands, target: Target) -> Problem:
    """What the time of a product depends on."""
    weight, x, y, window = operands.weight, operands.x, operands.y, operands.window
    gathered = window is not None and not window.is_pointwise
    gather = windows.gather_of(window, x, target) if window is not None and gathered else None
    density = float(np.count_nonzero(weight)) / max(1, weight.size)
    row = x.row if gather is None else panel_row(gather, y.block, target.lanes, target.panel_line)
    patches: tuple[int, ...] = ()
    if window is not None and x.is_planar:
        patches = windows.patch_sizes(window, weight.shape[1])
    single = operands.plain and gather is None and x.points == y.points == 1
    single = single and y.images <= MOST_IMAGES and weight.shape[1] <= MOST_COLUMNS
    sizes = tuple(reversed(ROWS[1:])) if single else (4, 2)
    return Problem(
        rows=len(weight),
        channels=weight.shape[1],
        taps=int(np.prod(weight.shape[2:], dtype=np.int64)),
        images=y.images,
        points=y.points,
        vectors=y.block // target.lanes,
        row=min(row, y.block + LINE),
        gather=gather,
        density=density,
        shared=formats.shared_rows(weight, sizes) if density < _NEARLY_DENSE else 1,
        source=x.points,
        out=(y.points // window.out[1], window.out[1]) if window is not None else (1, y.points),
        patches=patches,
        filter=(window and windows.filter_of(window)) or PLAIN,
        is_joinable=gathered and y.is_planar and operands.planes,
        single=single,
        is_unfolded=window is not None and window.n_taps > 1 and window.depth != windows.ONE,
    )
