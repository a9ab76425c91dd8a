"""GridSample: warped maps, deformable attention."""

from dataclasses import replace

import onnx_ir as ir

from sparsegraph.graph import attribute, int_attribute
from sparsegraph.lower.builder import Builder, Declined, shape_of
from sparsegraph.lower.movement import emit_call
from sparsegraph.targets.kernels import movement
from sparsegraph.targets.kernels.sample import MODES, PADDINGS, GridSample

_MODES = {"bilinear": "linear", "bicubic": "cubic"}  # as opset 16 called them
_MOST = 1 << 31  # elements that int32 counts


def lower_grid_sample(b: Builder, node: ir.Node) -> None:
    """Of [N, C, H, W]: many channels become innermost, each point reads its pixels, and back."""
    x, grid = node.inputs
    assert x is not None
    assert grid is not None
    kernel = _kernel(node, shape_of(x))
    row, places = b.row(x), b.row(grid)
    (images, channels, height, width), (rows, columns) = row.shape, places.shape[1:3]
    pixels, points = height * width, rows * columns
    if max(row.size, images * max(2, channels) * points) >= _MOST:
        raise Declined("more elements than int32 counts")
    to = b.new_row(node.outputs[0])
    source, result = row.address, to.address
    if channels < b.target.lanes:
        kernel = replace(kernel, is_planar=True)
    else:
        source = b.temporary(f"{node.name}.pixels", 4 * row.size)
        result = b.temporary(f"{node.name}.points", 4 * images * points * channels)
        call = movement.transpose("float32", (images, channels, pixels), (0, 2, 1))
        emit_call(b, call, source, row.address, [node])
    b.step(
        kernel, [result, source, places.address, rows, columns, height, width, channels],
        images * rows, [node], detail=f"{points} points in {height}x{width}",
    )  # fmt: skip
    if not kernel.is_planar:
        call = movement.transpose("float32", (images, points, channels), (0, 2, 1))
        emit_call(b, call, to.address, result, [node])


def _kernel(node: ir.Node, shape: tuple[int, ...]) -> GridSample:
    if len(shape) != 4:
        raise Declined(f"samples of {len(shape) - 2} axes")
    mode = str(attribute(node, "mode", "linear"))
    mode, padding = _MODES.get(mode, mode), str(attribute(node, "padding_mode", "zeros"))
    if mode not in MODES or padding not in PADDINGS:
        raise Declined(f"mode '{mode}' with padding '{padding}'")
    is_aligned = bool(int_attribute(node, "align_corners", 0))
    if is_aligned and padding == "reflection" and 1 in shape[2:]:
        raise Declined("a single pixel between mirrors")
    return GridSample(mode, padding, is_aligned)
