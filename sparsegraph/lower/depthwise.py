"""Depthwise convolution: each group has one input channel."""

import numpy as np
import onnx_ir as ir

from sparsegraph import compressed_rows
from sparsegraph.lower import regions
from sparsegraph.lower.builder import Builder, Declined, Stored, name_of
from sparsegraph.lower.elementwise import feature_kind, operand
from sparsegraph.lower.expand import Expansion
from sparsegraph.lower.windows import Window
from sparsegraph.program import Arg, Scratch
from sparsegraph.targets.kernels import depthwise_masked as masked
from sparsegraph.targets.kernels import window as shapes
from sparsegraph.targets.kernels.depthwise import Depthwise, Sizes, output_rows
from sparsegraph.targets.layout import FeatureMajor
from sparsegraph.targets.target import Target

_FEWEST_LANES = 4
_HALF = 0.5  # of the bytes: with more, zeros are stored too
_FARTHEST = 128  # columns from the first tap to the last: less than the slack behind a map


def lower_depthwise(
    b: Builder,
    node: ir.Node,
    x: ir.Value,
    weight: np.ndarray,
    bias: np.ndarray | None,
    window: Window,
) -> None:
    """weight [outputs, 1, kh, kw]; the element-wise region that follows is fused."""
    source = b.expansions.get(name_of(x)) if _is_masked(window) else None
    stored = source.z if source else b.maps(x, is_planar=True)
    if not source and not stored.fm.is_planar:
        raise Declined("a constant map")
    result, (height, width) = node.outputs[0], window.out
    layout = FeatureMajor(stored.fm.images, 0, height * width, 0, 0, 0, 0, 1)
    region = regions.grow(result, lambda v: feature_kind(b, v, result, layout))
    to = b.new_feature(region.result, layout, is_planar=True)
    full_bias = np.zeros(len(weight), np.float32) if bias is None else bias.astype(np.float32)
    streams = [("values", np.ascontiguousarray(weight.ravel(), np.float32))]
    step: tuple[Depthwise | masked.MaskedDepthwise, list[Arg]]
    if _is_masked(window):
        rows = compressed_rows.pack(weight.reshape(len(weight), -1), np.uint8)
        is_coded = rows.nbytes <= _HALF * 4 * weight.size
        if is_coded:
            streams = list(zip(("weights", "taps", "firsts"), rows))
        step = _masked(b, window, stored, to, region, source, is_coded)
    else:
        step = _framed(b, window, stored, to, region)
    kernel, args = step
    n_channels = stored.fm.features if source is None else len(weight)
    args += [b.weight(f"{node.name}.{k}", array) for k, array in streams]
    args += [b.weight(f"{node.name}.bias", full_bias), len(weight) // n_channels]
    for value, kind in zip(region.operands, region.kinds):
        args += operand(b, value, kind, to)
    macs = weight.size * stored.fm.images * height * width
    detail, kept, dense, nodes = f"depthwise, {height * width} points", macs, macs, [node]
    if source:
        kept, dense = macs + int(source.macs * source.density), macs + source.macs
        detail += f" of a product, {source.density:.1%} non-zero"
        nodes = [*source.nodes, node]
        source.describe(b)
    b.step(
        kernel, args, stored.fm.images * len(weight), [*nodes, *region.nodes],
        flops=2 * kept, dense_flops=2 * dense, detail=detail,
    )  # fmt: skip


def _is_masked(window: Window) -> bool:
    """True if the kernel that needs no padded copy takes this window."""
    taps = window.kernel[0] * window.kernel[1]
    width = (window.kernel[1] - 1) * window.dilation[1]
    return (
        window.stride[1] <= 2
        and taps <= masked.MOST_TAPS
        and window.pads[1] <= masked.LEAD
        and width <= _FARTHEST
    )


def _masked(
    b: Builder, window: Window, stored: Stored, to: Stored, region: regions.Region,
    source: Expansion | None, is_coded: bool,
) -> tuple[masked.MaskedDepthwise, list[Arg]]:  # fmt: skip
    """The kernel that reads maps where they lie, and its arguments up to the weights."""
    out, block = window.out, to.fm.block
    lanes = b.target.lanes if window.stride[1] == 1 else b.target.shuffle_lanes
    while lanes > _FEWEST_LANES and 2 * out[1] <= lanes:
        lanes //= 2
    shape = shapes.Window(window.kernel, window.stride, window.dilation, 1, lanes)
    is_direct = "same" not in region.kinds and to.fm.is_planar and out[1] >= lanes
    kernel = masked.MaskedDepthwise(
        shape, masked.border(shape, window.size, window.pads[:2], out), is_direct,
        region.tree if region.nodes else None, region.kinds,
        source.kernel(lanes) if source else None, is_coded,
        masked.is_spread(shape, b.target),
    )  # fmt: skip
    z_points = source.z.fm.tiles * source.z.fm.block if source else 0
    n_bytes = kernel.scratch_bytes(window.size[1], out, block, z_points)
    x: list[Arg] = [stored.address, stored.fm.image, stored.fm.row]
    args: list[Arg] = [*to.strides(), *(source.args(b) if source else x), Scratch(n_bytes + 64)]
    args += [*window.size, *out, _rows_of_a_pass(window, b.target), block, to.fm.features]
    return kernel, args


def _rows_of_a_pass(window: Window, target: Target) -> int:
    """Rows of the result for which the rows of the map that they read fill half a level 1 cache.

    Columns are the outer loop. Fewer rows read more of them twice: 128@56 takes 98 us in one pass,
    102 in two of 40 rows, 109 in four; 64@112 with stride 2 takes 99, 87 and 85 (AVX-512).
    """
    height, plane = window.out[0], 4 * window.size[0] * window.size[1]
    passes = -(-plane // (target.l1_bytes // 2))
    return max(-(-height // passes), 4 * window.kernel[0])


def _framed(
    b: Builder, window: Window, stored: Stored, to: Stored, region: regions.Region
) -> tuple[Depthwise, list[Arg]]:  # fmt: skip
    """The kernel of any window, which copies maps into padded frames."""
    height, width = window.out
    rows = output_rows(height, b.target.n_registers)
    shape = shapes.Window(window.kernel, window.stride, window.dilation, rows, b.target.lanes)
    sizes = Sizes(*window.size, *window.pads[:2], height, width, to.fm.block)
    is_direct = (
        to.fm.is_planar
        and width >= shape.lanes
        and height >= shape.rows
        and "same" not in region.kinds
    )
    tree = region.tree if region.nodes else None
    kernel = Depthwise(shape, is_direct, tree, region.kinds)
    ahead = kernel.ahead(sizes, b.target.l1_bytes)
    args: list[Arg] = [
        *to.strides(), stored.address, stored.fm.image, stored.fm.row,
        Scratch(kernel.scratch_bytes(sizes, ahead) + 64), *sizes.values, to.fm.features, ahead,
    ]  # fmt: skip
    return kernel, args
