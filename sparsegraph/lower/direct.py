"""Convolutions with few non-zero weights whose maps are read in place: machines without vectors."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from sparsegraph.lower import regions
from sparsegraph.lower.builder import Builder, Stored, name_of
from sparsegraph.lower.elementwise import operand
from sparsegraph.lower.windows import ONE, Window
from sparsegraph.program import Arg
from sparsegraph.targets.kernels.direct import Axis, Direct, pack
from sparsegraph.targets.kernels.expression import is_cheap
from sparsegraph.targets.layout import FeatureMajor
from sparsegraph.targets.target import Target

_LINE = 16  # float32 values in a cache line
_LEAST = 7  # points of a tile, unless it is the whole map: fewer, and indices count too much
_NEAR = 2  # level 1 caches that a tile may read
_CODE = 32 << 10  # bytes, about


def wants_planes(target: Target, window: Window | None) -> bool:
    """True if the result of a convolution should lie in planes, so that it can be computed so."""
    is_scalar = target.lanes == 1 and target.row_vectors > 0
    return is_scalar and window is not None and not window.is_pointwise


def kernel_of(
    b: Builder, x: Stored, y: Stored, weight: np.ndarray, window: Window,
    region: regions.Region | None,
) -> Direct | None:  # fmt: skip
    """The kernel that reads the map in place, or None where the gathered product is better."""
    target, layouts = b.target, [y.fm]
    for value, kind in zip(region.operands, region.kinds) if region else ():
        if kind == "same":
            layout = b.layout_of(value)
            if layout is None:
                return None
            layouts.append(layout)
    tree = None if region is None or not region.nodes else region.tree
    if window.depth != ONE:
        return None
    if not wants_planes(target, window) or not (tree is None or is_cheap(tree)):
        return None
    if not all(map(_in_planes, (x.fm, *layouts))):
        return None
    w = window
    rows, columns = (
        Axis(w.size[i], w.out[i], w.kernel[i], w.stride[i], w.pads[i], w.dilation[i])
        for i in (0, 1)
    )
    across = _part(columns.out, target.row_vectors)
    down = _part(rows.out, target.row_vectors // across) if across == columns.out else 1
    if down * across < min(_LEAST, y.fm.points):
        return None
    pad = y.fm.tiles * y.fm.block - rows.out * columns.out
    kinds = tuple(region.kinds) if region else ()
    kernel = Direct(rows, columns, (down, across), "uint16", pad, tree, kinds)
    lines = _lines(rows, down, columns, across)
    n_bytes = 4 * _LINE * lines * weight.shape[1]
    if kernel.code_bytes > _CODE or n_bytes > _NEAR * target.l1_bytes:
        return None
    return kernel


def _in_planes(layout: FeatureMajor) -> bool:
    """True if a point lies at its number from the first one."""
    return layout.is_planar or layout.tiles == 1


def _part(n: int, most: int) -> int:
    """The largest divisor of n that is at most `most`."""
    return max(d for d in range(1, most + 1) if n % d == 0)


def _lines(rows: Axis, down: int, columns: Axis, across: int) -> int:
    """Cache lines of one channel that a tile reads."""
    height, width = (
        min(axis.size, axis.source(n - 1, axis.kernel - 1) - axis.source(0, 0) + 1)
        for axis, n in ((rows, down), (columns, across))
    )
    if width == columns.size:
        return -(-height * width // _LINE)
    return height * (-(-width // _LINE) + 1)


def step_direct(
    b: Builder,
    nodes: list[ir.Node],
    kernel: Direct,
    x: Stored,
    weight: np.ndarray,
    bias: np.ndarray,
    to: Stored,
    region: regions.Region | None,
) -> None:
    """Append the call of one convolution; `kernel` is that of `kernel_of`."""
    name, y = nodes[0].name or name_of(nodes[0].outputs[0]), to.fm
    items = y.images * kernel.n_tiles
    packed = pack(weight, 4 * x.fm.row, b.chunks if items < 4 * b.chunks else 1)
    kernel = replace(kernel, offset=str(packed.offsets.dtype))
    args: list[Arg] = [to.address, y.image, y.row, x.address, x.fm.image, y.images]
    args += [b.weight(f"{name}.bias", bias)]
    args += [b.weight(f"{name}.{k}", array) for k, array in packed._asdict().items()]
    if region:
        for value, kind in zip(region.operands, region.kinds):
            address, *strides = operand(b, value, kind, to)
            args += [address] if kind == "feature" else [address, strides[0], strides[2]]
    macs = weight.size * y.images * y.points
    density = len(packed.values) / weight.size
    b.step(
        kernel, args, items * len(packed.parts), nodes, flops=2 * y.images * _macs(kernel, weight),
        dense_flops=2 * macs, detail=f"coded {density:.1%} non-zero, {y.points} points, in place",
    )  # fmt: skip


def _macs(kernel: Direct, weight: np.ndarray) -> int:
    """Multiply-adds of one image: the points that each value has inside the map."""
    n = np.count_nonzero(weight, axis=(0, 1))
    down, across = (
        [len(axis.inside(tap, 0, axis.out)) for tap in range(axis.kernel)]
        for axis in (kernel.rows, kernel.columns)
    )
    return int(n.ravel() @ np.outer(down, across).ravel())
