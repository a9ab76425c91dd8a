"""Transposed convolutions without overlap, and DepthToSpace of values that lie feature-major."""

import numpy as np
import onnx_ir as ir

from sparsegraph.graph import attribute, constant, input_at, int_attribute, ints_attribute
from sparsegraph.lower.builder import Builder, Declined, Stored, shape_of
from sparsegraph.lower.movement import lower_depth_space
from sparsegraph.lower.products import step_product
from sparsegraph.program import Arg, Scratch
from sparsegraph.targets.kernels.conv_transpose import PixelShuffle
from sparsegraph.targets.kernels.plane import OVERSHOOT
from sparsegraph.targets.layout import FeatureMajor, planar


def lower_conv_transpose(b: Builder, node: ir.Node) -> None:
    """ConvTranspose with kernel = stride: every output pixel reads one input pixel.

    A product with one row per (output feature, ky, kx), whose rows are then shuffled into place.
    """
    x, weight = node.inputs[0], constant(node.inputs[1])
    assert x is not None
    bias_value = input_at(node, 2)
    bias = None if bias_value is None else constant(bias_value)
    if weight is None or (bias_value is not None and bias is None):
        raise Declined("weight or bias is not constant")
    _check(node, shape_of(x), weight)
    if weight.shape[3] * b.target.lanes > OVERSHOOT:
        raise Declined(f"a kernel {weight.shape[3]} columns wide")
    kernel = weight.shape[2:]
    taps, features = kernel[0] * kernel[1], weight.shape[1]
    matrix = np.ascontiguousarray(weight.reshape(len(weight), -1).T)
    stored = b.feature(x, 1)
    fm = planar(stored.fm.images, features * taps, stored.fm.points, 1, b.target)
    shape = (fm.images, fm.features, *shape_of(x)[2:])
    made = Stored(b.temporary(f"{node.name}.taps", 4 * fm.size), shape, "float32", fm)
    repeated = None if bias is None else np.repeat(bias, taps)
    step_product(b, [node], stored, matrix, repeated, made, None, None)
    _step_shuffle(b, node, made, kernel, (taps, kernel[1], 1))


def _check(node: ir.Node, x: tuple[int, ...], weight: np.ndarray) -> None:
    """Decline overlapping windows and everything that moves them."""
    if len(x) != 4:
        raise Declined(f"{len(x) - 2} spatial axes")
    kernel = weight.shape[2:]
    strides = ints_attribute(node, "strides") or (1, 1)
    if int_attribute(node, "group", 1) != 1:
        raise Declined("groups")
    if strides != kernel:
        raise Declined(f"a {kernel} kernel with strides {strides}; only equal ones")
    moved = [ints_attribute(node, name) or (0,) for name in ("pads", "output_padding")]
    if any(map(any, moved)) or any(d != 1 for d in ints_attribute(node, "dilations") or (1,)):
        raise Declined("padding or dilation")
    if attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise Declined("auto_pad")
    if shape_of(node.outputs[0])[2:] != (x[2] * kernel[0], x[3] * kernel[1]):
        raise Declined("an output_shape of its own")


def lower_depth_to_space(b: Builder, node: ir.Node) -> None:
    """DepthToSpace: the shuffle alone if x lies feature-major, else row-major movement."""
    x = node.inputs[0]
    assert x is not None
    layout, side = b.layout_of(x), int_attribute(node, "blocksize", 0)
    if layout is None or layout.axis != 1 or side * b.target.lanes > OVERSHOOT:
        lower_depth_space(b, node)
        return
    features = layout.features // side**2
    if attribute(node, "mode", "DCR") == "CRD":
        steps = (side * side, side, 1)
    else:
        steps = (1, side * features, features)
    _step_shuffle(b, node, b.feature(x, 1, is_planar=True), (side, side), steps)


def _step_shuffle(
    b: Builder, node: ir.Node, x: Stored, kernel: tuple[int, ...], steps: tuple[int, int, int]
) -> None:
    """`steps`: features of x from one output feature, one ky, one kx to the next."""
    spec = PixelShuffle(kernel[1], b.target.lanes)
    height, width = x.shape[2:]
    out = (height * kernel[0], width * kernel[1])
    like = FeatureMajor(x.fm.images, 0, out[0] * out[1], 0, 0, 0, 0, 1)
    to = b.new_feature(node.outputs[0], like)
    feature, ky, kx = (s * x.fm.row for s in steps)
    args: list[Arg] = [*to.strides(), x.address, x.fm.image, feature, ky, kx, to.fm.features]
    args += [width, kernel[0], *out, to.fm.tiles, to.fm.block]
    args.append(Scratch(spec.scratch_bytes(out[1], to.fm.block)))
    items = x.fm.images * to.fm.features
    b.step(spec, args, items, [node], detail=f"{kernel[0]}x{kernel[1]} pixels per pixel")
