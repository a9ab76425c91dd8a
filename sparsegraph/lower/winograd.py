"""A dense convolution by Winograd's method: its three kernel calls."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from sparsegraph import formats
from sparsegraph.lower import regions
from sparsegraph.lower.builder import Builder, Stored, name_of
from sparsegraph.lower.elementwise import operand
from sparsegraph.lower.problem import Choice
from sparsegraph.lower.windows import Filter, Window, filter_of, strip_of
from sparsegraph.program import Arg, Ref, Scratch
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
    """Append the calls of one convolution; x lies in planes, weight is [rows, channels, kh, kw].

    Strip by strip of rows of patches (`strip_of`), so that a strip stays in the level 2 cache.
    """
    method = filter_of(window)
    assert method is not None
    parts = _Parts(b, nodes, window, choice, method)
    rows, channels, n = len(weight), weight.shape[1] * method.phases, method.size(choice.patch)
    name = nodes[0].name or name_of(nodes[0].outputs[0])
    features, block = (weight.shape[1], rows), to.fm.block
    high = strip_of(window.out, choice.patch, method, features, block, b.target)
    n_patches = high * parts.columns
    before, after = (
        _places(b, f"{name}.{kind}", winograd.places(x.fm.images, size, n_patches, n, b.target))
        for kind, size in (("patches", channels), ("products", rows))
    )
    weights = parts.weights(name, weight)
    full_bias = np.zeros(rows, np.float32) if bias is None else bias.astype(np.float32)
    sums = b.weight(f"{name}.bias", full_bias)
    operands = [operand(b, *o, to) for o in zip(region.operands, region.kinds)] if region else []
    for start in range(0, window.out[0], high * choice.patch):
        height = min(high * choice.patch, window.out[0] - start)
        n_patches = -(-height // choice.patch) * parts.columns
        before, after = (
            replace(s, layout=replace(s.fm, points=n_patches)) for s in (before, after)
        )
        parts.step_input(x, before, start)
        parts.step_products(before, weights, after, height)
        parts.step_output(after, sums, to, region, operands, start, height)


def _places(b: Builder, name: str, layout: FeatureMajor) -> Stored:
    ref = b.temporary(name, 4 * layout.size)
    return Stored(ref, (layout.images, layout.features, layout.points), "float32", layout)


@dataclass(frozen=True)
class _Parts:
    """The calls of a strip: `height` rows of the result from row `start` on."""

    b: Builder
    nodes: list[ir.Node]
    window: Window
    choice: Choice
    method: Filter

    @property
    def columns(self) -> int:
        """Patches side by side."""
        return winograd.patches(self.window.out, self.choice.patch)[1]

    def weights(self, name: str, weight: np.ndarray) -> tuple[Arg, ...]:
        """The transformed weights [place, rows, channels], as the product reads them."""
        b, choice = self.b, self.choice
        matrices = winograd.transform_weights(weight, choice.patch, *self.method)
        packed = [formats.pack_dense(w, choice.group, choice.tile) for w in matrices]
        starts = np.concatenate([p.chunks for p in packed])
        starts[:, 0] += np.arange(len(packed), dtype=np.int32) * packed[0].values.size
        return (
            b.weight(f"{name}.none", np.zeros(len(weight), np.float32)),
            b.weight(f"{name}.values", np.concatenate([p.values for p in packed])),
            b.weight(f"{name}.rows", packed[0].slots),
            b.weight(f"{name}.chunks", starts),
        )

    def step_input(self, x: Stored, to: Stored, start: int) -> None:
        b, size, (top, left) = self.b, self.window.size, self.window.pads[:2]
        kernel = InputTransform(self.choice.patch, b.target.lanes, *self.method)
        padded, grid = to.fm.tiles * to.fm.block, (to.fm.points // self.columns, self.columns)
        args: list[Arg] = [*to.strides(), x.address, x.fm.image, x.fm.row]
        args.append(Scratch(kernel.scratch_bytes(grid, padded, size[1])))
        args += [x.fm.features, *size, top - start * self.method.stride, left, *grid]
        args += [to.fm.tiles, to.fm.block]
        args += [kernel.plane(grid, padded), kernel.line(self.columns, size[1])]
        items = x.fm.images * x.fm.features
        b.step(kernel, args, items, self.nodes[:1], detail="Winograd, input")

    def step_products(self, x: Stored, weights: Sequence[Arg], to: Stored, height: int) -> None:
        b, choice, method, fm = self.b, self.choice, self.method, x.fm
        places, taps, rows = method.size(choice.patch) ** 2, self.window.n_taps, to.fm.features
        kernel = Product(
            "dense", choice.group, choice.split, b.target.lanes, batch=places,
            joined=joined(choice.split, b.target),
            points=computed_points(fm.points, fm.block, b.target),
        )  # fmt: skip
        args: list[Arg] = [*to.strides(), *x.strides(), fm.images, fm.tiles, fm.features]
        macs = rows * fm.features * fm.images * fm.points
        out = fm.images // places * height * self.window.out[1]
        direct = rows * fm.features // method.phases * taps * out
        growth = method.phases * places / taps
        detail = f"Winograd F({choice.patch},{method.taps}), weights {growth:.1f} times as large"
        b.step(
            kernel, [*args, choice.tile, *weights], fm.images * fm.tiles, self.nodes[:1],
            flops=2 * macs, dense_flops=2 * direct, detail=detail,
        )  # fmt: skip

    def step_output(
        self, x: Stored, bias: Arg, to: Stored, region: regions.Region | None,
        operands: Sequence[tuple[Arg, ...]], start: int, height: int,
    ) -> None:  # fmt: skip
        tree = None if region is None or not region.nodes else region.tree
        kinds = tuple(region.kinds) if region else ()
        b, m, width, block = self.b, self.choice.patch, self.window.out[1], to.fm.block
        kernel = OutputTransform(m, b.target.lanes, tree, kinds, self.method.taps)
        padded, rows, tile = x.fm.tiles * x.fm.block, x.fm.features, start * width // block
        args: list[Arg] = [*_from_tile(to.strides(), tile), *x.strides()]
        args.append(Scratch(kernel.scratch_bytes(self.columns, padded, width, block)))
        args += [bias, rows, height, width, -(-height * width // block), block]
        args += [self.columns, x.fm.tiles, x.fm.block, kernel.plane(self.columns, padded)]
        for kind, values in zip(kinds, operands):
            args += _from_tile(values, tile) if kind == "same" else values
        b.step(kernel, args, to.fm.images * rows, self.nodes, detail="Winograd, result")


def _from_tile(strides: tuple[Arg, ...], tile: int) -> tuple[Arg, ...]:
    """Pointer and strides (image, tile, row) of the part that begins with a tile of points."""
    address, image, distance, row = strides
    assert isinstance(address, Ref)
    assert isinstance(distance, int)
    return Ref(address.buffer, address.offset + tile * distance), image, distance, row
