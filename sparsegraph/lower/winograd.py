"""A dense 3x3 convolution by Winograd's method: its three kernel calls."""

import numpy as np
import onnx_ir as ir

from sparsegraph import formats
from sparsegraph.lower import regions
from sparsegraph.lower.builder import Builder, Stored, name_of
from sparsegraph.lower.elementwise import operand
from sparsegraph.lower.problem import Choice
from sparsegraph.lower.windows import Window
from sparsegraph.program import Arg, Scratch
from sparsegraph.targets.kernels import winograd
from sparsegraph.targets.kernels.product import Product, joined
from sparsegraph.targets.kernels.winograd import InputTransform, OutputTransform
from sparsegraph.targets.layout import FeatureMajor


def growth(m: int) -> float:
    """Bytes of the weights relative to the plain ones."""
    return (m + 2) ** 2 / 9


def step_winograd(
    b: Builder,
    nodes: list[ir.Node],
    x: Stored,
    weight: np.ndarray,
    bias: np.ndarray | None,
    to: Stored,
    window: Window,
    region: regions.Region | None,
    choice: Choice,
) -> None:
    """Append the calls of one convolution; x lies in planes, weight is [rows, channels, 3, 3]."""
    m, target, images = choice.patch, b.target, x.fm.images
    rows, channels = weight.shape[:2]
    name = nodes[0].name or name_of(nodes[0].outputs[0])
    grid = winograd.patches(window.out, m)
    before, after = (
        _places(b, f"{name}.{kind}", winograd.places(images, n, grid[0] * grid[1], m, target))
        for kind, n in (("patches", channels), ("products", rows))
    )
    text = f"Winograd F({m},3), weights {growth(m):.1f} times as large"
    _step_input(b, nodes[0], x, before, window, m)
    _step_products(b, nodes[0], before, weight, after, window, choice, text)
    _step_output(b, nodes, after, bias, to, window, region, m)


def _places(b: Builder, name: str, layout: FeatureMajor) -> Stored:
    ref = b.temporary(name, 4 * layout.size)
    return Stored(ref, (layout.images, layout.features, layout.points), "float32", layout)


def _step_input(b: Builder, node: ir.Node, x: Stored, to: Stored, window: Window, m: int) -> None:
    kernel = InputTransform(m, b.target.lanes)
    grid, padded = winograd.patches(window.out, m), to.fm.tiles * to.fm.block
    args: list[Arg] = [*to.strides(), x.address, x.fm.image, x.fm.row]
    args.append(Scratch(kernel.scratch_bytes(grid, padded, window.size[1])))
    args += [to.fm.features, *window.size, *window.pads[:2], *grid, to.fm.tiles, to.fm.block]
    args += [kernel.plane(grid, padded), kernel.line(grid[1], window.size[1])]
    b.step(kernel, args, x.fm.images * to.fm.features, [node], detail="Winograd, input")


def _step_products(
    b: Builder, node: ir.Node, x: Stored, weight: np.ndarray, to: Stored, window: Window,
    choice: Choice, detail: str,
) -> None:  # fmt: skip
    name, m, places = node.name or name_of(node.outputs[0]), choice.patch, (choice.patch + 2) ** 2
    rows, channels = weight.shape[:2]
    kernel = Product(
        "dense", choice.group, choice.split, b.target.lanes, batch=places,
        joined=joined(choice.split, b.target),
    )  # fmt: skip
    matrices = winograd.transform_weights(weight, m)
    packed = [formats.pack_dense(w, choice.group, choice.tile) for w in matrices]
    starts = np.concatenate([p.chunks for p in packed])
    starts[:, 0] += np.arange(places, dtype=np.int32) * packed[0].values.size
    args: list[Arg] = [*to.strides(), *x.strides(), x.fm.images, x.fm.tiles, channels, choice.tile]
    args += [
        b.weight(f"{name}.none", np.zeros(rows, np.float32)),
        b.weight(f"{name}.values", np.concatenate([p.values for p in packed])),
        b.weight(f"{name}.rows", packed[0].slots),
        b.weight(f"{name}.chunks", starts),
    ]
    macs = rows * channels * x.fm.images * x.fm.points
    direct = weight.size * (x.fm.images // places) * window.out[0] * window.out[1]
    b.step(
        kernel, args, x.fm.images * x.fm.tiles, [node], flops=2 * macs, dense_flops=2 * direct,
        detail=detail,
    )  # fmt: skip


def _step_output(
    b: Builder, nodes: list[ir.Node], x: Stored, bias: np.ndarray | None, to: Stored,
    window: Window, region: regions.Region | None, m: int,
) -> None:  # fmt: skip
    tree = None if region is None or not region.nodes else region.tree
    kinds = tuple(region.kinds) if region else ()
    kernel = OutputTransform(m, b.target.lanes, tree, kinds)
    name = nodes[0].name or name_of(nodes[0].outputs[0])
    rows, columns = x.fm.features, winograd.patches(window.out, m)[1]
    padded = x.fm.tiles * x.fm.block
    full_bias = np.zeros(rows, np.float32) if bias is None else bias.astype(np.float32)
    args: list[Arg] = [*to.strides(), *x.strides()]
    args.append(Scratch(kernel.scratch_bytes(columns, padded, window.out[1], to.fm.block)))
    args += [b.weight(f"{name}.bias", full_bias), rows, *window.out, to.fm.tiles, to.fm.block]
    args += [columns, x.fm.tiles, x.fm.block, kernel.plane(columns, padded)]
    if region:
        for value, kind in zip(region.operands, region.kinds):
            args += operand(b, value, kind, to)
    items = to.fm.images * rows
    b.step(kernel, args, items, nodes, detail="Winograd, result")
