"""The call of a dense product whose lanes are rows."""

import numpy as np
import onnx_ir as ir

from sparsegraph.lower import regions
from sparsegraph.lower.builder import Builder, Stored, name_of
from sparsegraph.lower.elementwise import operand
from sparsegraph.program import Arg
from sparsegraph.targets.kernels.panel_product import PanelProduct, most_points


def points_of(points: int, block: int) -> tuple[int, ...]:
    """`PanelProduct.points` for images of `points` points in tiles of `block`."""
    last = points - (-(-points // block) - 1) * block
    return (last,) if points <= block or last == block else (block, last)


def step_panels(
    b: Builder,
    nodes: list[ir.Node],
    x: Stored,
    weight: np.ndarray,
    bias: np.ndarray,
    to: Stored,
    region: regions.Region | None,
) -> None:
    """Append the call; weight [rows, columns]."""
    name, y = nodes[0].name or name_of(nodes[0].outputs[0]), to.fm
    kernel = PanelProduct(
        b.target.lanes, y.block, points_of(y.points, y.block), most_points(b.target),
        None if region is None or not region.nodes else region.tree,
        tuple(region.kinds) if region else (),
    )  # fmt: skip
    n_panels, items = -(-len(weight) // kernel.rows), y.images * y.tiles
    parts = min(b.chunks, n_panels) if items < 4 * b.chunks else 1
    args: list[Arg] = [to.address, y.image, y.tile, y.row, *x.strides(), y.images, y.tiles]
    args += [*weight.shape, n_panels, parts]
    args += [b.weight(f"{name}.{stream}", array) for stream, array in kernel.streams(weight, bias)]
    if region:
        for value, kind in zip(region.operands, region.kinds):
            args += operand(b, value, kind, to)
    same = (f"o{i}" for i, kind in enumerate(kernel.operands) if kind == "same")
    macs = weight.size * y.images * y.points
    b.step(
        kernel, args, items * parts, nodes, flops=2 * macs, dense_flops=2 * macs,
        tiled=("y", "x", *same) if parts == 1 else (), detail=f"dense, {y.points} points",
    )  # fmt: skip
