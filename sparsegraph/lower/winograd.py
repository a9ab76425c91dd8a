"""A dense convolution by Winograd's method: its three kernel calls."""

import math

import numpy as np
import onnx_ir as ir

from sparsegraph import formats
from sparsegraph.lower import regions
from sparsegraph.lower.builder import Builder, Stored, name_of
from sparsegraph.lower.elementwise import operand
from sparsegraph.lower.problem import Choice
from sparsegraph.lower.windows import Filter, Window, filter_of
from sparsegraph.program import Arg, Scratch
from sparsegraph.targets.kernels import winograd
from sparsegraph.targets.kernels.product import Product, computed_points, joined
from sparsegraph.targets.kernels.winograd import InputTransform, OutputTransform
from sparsegraph.targets.layout import FeatureMajor


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
    """Append the calls of one convolution; x lies in planes, weight is [rows, channels, kh, kw]."""
    m, target, images = choice.patch, b.target, x.fm.images
    method = filter_of(window)
    assert method is not None
    n, (rows, channels) = method.size(m), weight.shape[:2]
    name = nodes[0].name or name_of(nodes[0].outputs[0])
    grid = winograd.patches(window.out, m)
    before, after = (
        _places(b, f"{name}.{kind}", winograd.places(images, features, math.prod(grid), n, target))
        for kind, features in (("patches", channels * method.phases), ("products", rows))
    )
    _step_input(b, nodes[0], x, before, window, m, method)
    _step_products(b, nodes[0], before, weight, after, window, choice, method)
    _step_output(b, nodes, after, bias, to, window, region, m, method.taps)


def _places(b: Builder, name: str, layout: FeatureMajor) -> Stored:
    ref = b.temporary(name, 4 * layout.size)
    return Stored(ref, (layout.images, layout.features, layout.points), "float32", layout)


def _step_input(
    b: Builder, node: ir.Node, x: Stored, to: Stored, window: Window, m: int, method: Filter
) -> None:
    kernel = InputTransform(m, b.target.lanes, *method)
    grid, padded = winograd.patches(window.out, m), to.fm.tiles * to.fm.block
    args: list[Arg] = [*to.strides(), x.address, x.fm.image, x.fm.row]
    args.append(Scratch(kernel.scratch_bytes(grid, padded, window.size[1])))
    args += [x.fm.features, *window.size, *window.pads[:2], *grid, to.fm.tiles, to.fm.block]
    args += [kernel.plane(grid, padded), kernel.line(grid[1], window.size[1])]
    b.step(kernel, args, x.fm.images * x.fm.features, [node], detail="Winograd, input")


def _step_products(
    b: Builder, node: ir.Node, x: Stored, weight: np.ndarray, to: Stored, window: Window,
    choice: Choice, method: Filter,
) -> None:  # fmt: skip
    name, places = node.name or name_of(node.outputs[0]), method.size(choice.patch) ** 2
    rows, channels = len(weight), x.fm.features
    kernel = Product(
        "dense", choice.group, choice.split, b.target.lanes, batch=places,
        joined=joined(choice.split, b.target),
        points=computed_points(x.fm.points, x.fm.block, b.target),
    )  # fmt: skip
    matrices = winograd.transform_weights(weight, choice.patch, *method)
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
    growth = channels * places / (weight.size / rows)
    detail = f"Winograd F({choice.patch},{method.taps}), weights {growth:.1f} times as large"
    b.step(
        kernel, args, x.fm.images * x.fm.tiles, [node], flops=2 * macs, dense_flops=2 * direct,
        detail=detail,
    )  # fmt: skip


def _step_output(
    b: Builder, nodes: list[ir.Node], x: Stored, bias: np.ndarray | None, to: Stored,
    window: Window, region: regions.Region | None, m: int, taps: int,
) -> None:  # fmt: skip
    tree = None if region is None or not region.nodes else region.tree
    kinds = tuple(region.kinds) if region else ()
    kernel = OutputTransform(m, b.target.lanes, tree, kinds, taps)
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
