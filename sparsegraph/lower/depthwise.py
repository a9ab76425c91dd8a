"""Depthwise convolution: each group has one input channel."""

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from sparsegraph.lower import regions
from sparsegraph.lower.builder import Builder
from sparsegraph.lower.elementwise import feature_kind, operand
from sparsegraph.program import Arg, Scratch
from sparsegraph.targets.kernels import window as windows
from sparsegraph.targets.kernels.depthwise import Depthwise
from sparsegraph.targets.layout import FeatureMajor

if TYPE_CHECKING:
    from sparsegraph.lower.gather import Window


def lower_depthwise(
    b: Builder,
    node: ir.Node,
    x: ir.Value,
    weight: np.ndarray,
    bias: np.ndarray | None,
    window: "Window",
) -> None:
    """weight [outputs, 1, kh, kw]; the element-wise region that follows is fused."""
    stored, result = b.feature(x, 1, is_planar=True), node.outputs[0]
    points = window.out[0] * window.out[1]
    layout = FeatureMajor(stored.fm.images, 0, points, 0, 0, 0, 0, 1)
    region = regions.grow(result, lambda v: feature_kind(b, v, result, layout))
    to = b.new_feature(region.result, layout)
    rows = windows.output_rows(window.out[0], b.target.n_registers)
    shape = windows.Window(window.kernel, window.stride, window.dilation, rows, b.target.lanes)
    height, width = window.out
    is_direct = (
        to.fm.is_planar and width >= shape.lanes and height >= rows and "same" not in region.kinds
    )
    tree = region.tree if region.nodes else None
    kernel = Depthwise(shape, is_direct, tree, region.kinds)
    sizes = windows.Sizes(*window.size, *window.pads[:2], height, width, to.fm.block)
    ahead = shape.ahead(sizes, b.target.l1_bytes)
    outputs = len(weight)
    full_bias = np.zeros(outputs, np.float32) if bias is None else bias.astype(np.float32)
    args: list[Arg] = [
        *to.strides(), stored.address, stored.fm.image, stored.fm.row,
        Scratch(shape.scratch_bytes(sizes, ahead) + 64), *sizes.values, outputs, ahead,
        b.weight(f"{node.name}.values", np.ascontiguousarray(weight.ravel(), np.float32)),
        b.weight(f"{node.name}.bias", full_bias), outputs // stored.fm.features,
    ]  # fmt: skip
    for value, kind in zip(region.operands, region.kinds):
        args += operand(b, value, kind, to)
    macs = weight.size * stored.fm.images * points
    b.step(
        kernel, args, stored.fm.images * outputs, [node, *region.nodes],
        flops=2 * macs, dense_flops=2 * macs, detail=f"depthwise, {points} points",
    )  # fmt: skip
