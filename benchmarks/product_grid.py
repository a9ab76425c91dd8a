"""Layers, densities and blocks over which the cost model of products is fitted."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from sparsegraph.targets.layout import blocked, flat, planar
from sparsegraph.targets.target import Target

from sparsegraph.lower import choose, problem
from sparsegraph.lower.problem import Choice, Operands
from sparsegraph.lower.tiling import tiled
from sparsegraph.lower.windows import Window

DENSITIES = (0.03, 0.06, 0.1, 0.2, 0.35, 0.5, 0.75)
SHARED = (0.05, 0.2)  # densities at which 4 neighbouring rows share their zeros
OTHER_TILES = (0.06, 0.2, 0.5)  # densities at which other column tiles are tried as well


@dataclass(frozen=True)
class Layer:
    """A matrix product (`kernel` 0; points in `width`) or a convolution with 'same' padding."""

    height: int
    width: int
    channels: int
    rows: int
    kernel: int = 0
    stride: int = 1

    @property
    def name(self) -> str:
        """For people, and the unit in which data is held out."""
        if not self.kernel:
            return f"matmul {self.width}x{self.channels}x{self.rows}"
        size = f"{self.kernel}x{self.kernel}" + ("/2" if self.stride > 1 else "")
        return f"conv {size} {self.height}x{self.width} {self.channels}-{self.rows}"

    def window(self) -> Window | None:
        """The geometry of a convolution."""
        if not self.kernel:
            return None
        k, s, p = self.kernel, self.stride, self.kernel // 2
        return Window((self.height, self.width), (k, k), (s, s), (1, 1), (p, p, p, p))

    def weight(self, density: float, share: int = 1) -> np.ndarray:
        """Random values of a seed; the zeros of `share` neighbouring rows are the same."""
        rng = np.random.default_rng(7)
        shape: tuple[int, ...] = (self.rows, self.channels)
        if self.kernel:
            shape += (self.kernel, self.kernel)
        weight = rng.standard_normal(shape).astype(np.float32)
        kept = rng.random((-(-self.rows // share), *shape[1:])) < density
        return weight * np.repeat(kept, share, axis=0)[: self.rows]

    def operands(self, density: float, target: Target, share: int = 1) -> Operands:
        """A batch of one image; maps lie as lowering lays them out."""
        window, weight = self.window(), self.weight(density, share)
        make = planar if self.kernel > 1 else blocked
        points = window.out[0] * window.out[1] if window else self.width
        n = self.height * self.width
        x = make(1, self.channels, n, 1, target) if n > 1 else flat(1, self.channels, 1)
        return Operands(weight, x, blocked(1, self.rows, points, 1, target), window)


LAYERS = (
    *(
        Layer(1, points, channels, rows)
        for points, channels, rows in (
            (384, 768, 768), (384, 384, 1536), (384, 1536, 384), (384, 768, 3072), (384, 3072, 768),
            (128, 384, 384), (128, 384, 1536), (128, 1536, 384), (128, 768, 768), (128, 1024, 1024),
            (197, 384, 384), (197, 384, 1152), (197, 192, 768), (197, 768, 192), (256, 512, 512),
            (196, 1024, 256), (64, 512, 2048), (49, 1024, 1024), (49, 1024, 512), (32, 768, 768),
            (100, 256, 512), (512, 64, 256), (1024, 128, 128), (16, 768, 768), (77, 512, 512),
            (8, 64, 64), (16, 60, 32), (64, 64, 64), (8, 256, 256), (128, 64, 32), (1, 512, 1000),
            (1, 1024, 512), (1, 2048, 1000), (1, 1280, 1000), (1, 256, 256),
        )
    ),
    *(
        Layer(size, size, channels, rows, 1)
        for size, channels, rows in (
            (56, 64, 64), (56, 64, 256), (56, 256, 64), (28, 128, 512), (28, 512, 128),
            (14, 256, 1024), (14, 1024, 256), (7, 512, 2048), (7, 2048, 512), (7, 960, 160),
            (7, 160, 960), (56, 24, 144), (112, 32, 64), (28, 144, 32), (14, 384, 64),
            (14, 96, 576), (20, 256, 256), (40, 96, 192), (8, 32, 32), (10, 24, 48),
        )
    ),
    *(
        Layer(size, size, channels, rows, kernel, stride)
        for size, channels, rows, kernel, stride in (
            (56, 64, 64, 3, 1), (28, 128, 128, 3, 1), (14, 256, 256, 3, 1), (7, 512, 512, 3, 1),
            (40, 48, 96, 3, 1), (20, 160, 96, 3, 1), (32, 80, 80, 3, 1), (10, 192, 192, 3, 1),
            (56, 128, 128, 3, 2), (28, 256, 256, 3, 2), (14, 512, 512, 3, 2), (40, 64, 128, 3, 2),
            (56, 256, 512, 1, 2), (28, 512, 1024, 1, 2), (14, 1024, 2048, 1, 2),
            (28, 64, 64, 5, 1), (14, 96, 128, 5, 1), (16, 32, 64, 5, 2),
            (8, 16, 32, 3, 1), (16, 32, 32, 3, 1), (8, 32, 32, 3, 2),
        )
    ),
)  # fmt: skip


def cases(layer: Layer, target: Target) -> Iterator[tuple[float, Operands, list[Choice]]]:
    """(density, operands, ways to compute it) in the tiles of that density, dense ways first."""
    for share, densities in ((1, (1.0, *DENSITIES)), (4, SHARED)):
        for density in densities:
            machine = tiled(density, target)
            operands = layer.operands(density, machine, share)
            case = problem.of(operands, machine)
            if density == 1:
                dense, *others = choose.unstructured(case, machine)
                tiles = choose.other_tiles(dense, case)
                yield density, operands, [dense, *others, *tiles[1:2]]
                continue
            count = 3 if density in OTHER_TILES and share == 1 else 1
            others = choose.other_tiles(choose.coded(case, machine), case)[:count]
            yield density, operands, choose.slots(case, machine) if case.single else others
