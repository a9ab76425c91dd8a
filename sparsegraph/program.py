"""What lowering produces: kernel calls over named buffers. Plain data, no TVM objects inside.

A `Program` is one native segment. A `Plan` is the model: native segments and segments that ONNX
Runtime runs, in order, over values named as in the ONNX graph.
"""

import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sparsegraph.targets.kernel import Kernel


@dataclass(frozen=True)
class Tensor:
    """A value at the border of a segment, row-major.

    Attributes:
        name: ONNX value name.
        dtype: NumPy dtype name (`bool` is one byte).
        shape: static extents.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def n_bytes(self) -> int:
        return self.size * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Ref:
    """An address: element `offset` (of the parameter's type) of a buffer."""

    buffer: str
    offset: int = 0


@dataclass(frozen=True)
class Scratch:
    """Memory of `n_bytes` that one thread owns during one call; contents are undefined."""

    n_bytes: int


Arg = Ref | Scratch | int | float


@dataclass(frozen=True)
class Step:
    """One kernel call over items [0, items); items may run on several threads.

    Attributes:
        args: one per `kernel.params`.
        nodes: names of the ONNX nodes that this call computes.
        detail: for people: format, density, layout.
        flops: floating-point operations that remain (2 per multiply-add).
        dense_flops: the same if no weight were zero.
        tiled: pointer parameters of whose value item i touches nothing but tile i of the points
            (images * tiles items); their strides are the parameters NAME_image and NAME_tile.
    """

    kernel: Kernel
    args: tuple[Arg, ...]
    items: int
    nodes: tuple[str, ...] = ()
    detail: str = ""
    flops: int = 0
    dense_flops: int = 0
    tiled: tuple[str, ...] = ()


@dataclass
class Program:
    """A native segment.

    Buffers are inputs and outputs (by tensor name, owned by the caller), weights (by name, in the
    weight file), temporaries (`temporaries`: name -> bytes, placed by the memory planner) and
    panels (`panels`: name -> bytes), one tile of points that each thread has for itself.

    Attributes:
        chains: lengths of runs of steps; the steps of one run go tile by tile, so that a tile is
            still in the cache when the next step reads it. Empty: every step on its own.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    steps: list[Step] = field(default_factory=list)
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    temporaries: dict[str, int] = field(default_factory=dict)
    panels: dict[str, int] = field(default_factory=dict)
    chains: list[int] = field(default_factory=list)

    def runs(self) -> list[range]:
        """The steps of each chain, in order."""
        lengths = self.chains or [1] * len(self.steps)
        ends = list(itertools.accumulate(lengths))
        return [range(end - n, end) for n, end in zip(lengths, ends)]


@dataclass
class Fallback:
    """A segment that ONNX Runtime runs: a serialised model with these borders."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    model: bytes
    nodes: tuple[str, ...]
    reason: str


@dataclass
class Plan:
    """The whole model: what to run in which order, and what a person should know about it.

    Attributes:
        layers: one row per product: density, format, break-even, estimate.
        estimate: estimated speed relative to ONNX Runtime on the dense model, products only.
        variants: the same model for other shapes of its inputs.
        tasks: the same steps with other weights, by the name of the task.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    segments: list[Program | Fallback]
    layers: list[dict[str, Any]] = field(default_factory=list)
    estimate: float = 1.0
    variants: list["Plan"] = field(default_factory=list)
    tasks: dict[str, "Plan"] = field(default_factory=dict)
