"""Transposed convolutions by phases, and DepthToSpace of values that lie feature-major."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from sparsegraph.graph import attribute, constant, input_at, int_attribute, ints_attribute
from sparsegraph.lower.builder import Builder, Declined, Stored, shape_of
from sparsegraph.lower.movement import lower_depth_space
from sparsegraph.lower.products import step_product
from sparsegraph.lower.windows import Window
from sparsegraph.program import Arg, Scratch
from sparsegraph.targets.kernels.conv_transpose import PixelShuffle
from sparsegraph.targets.kernels.plane import OVERSHOOT
from sparsegraph.targets.layout import FeatureMajor, planar


@dataclass(frozen=True)
class Phases:
    """One axis: output stride * m + phase reads input m - j with tap (phase + pad + stride * j).

    Attributes:
        taps: [stride, window] the tap that a phase has at each place of the window, -1: none.
        window: inputs that the phases together read.
        before: inputs in front of the first that output 0 to stride - 1 read.
        positions: m in all.
    """

    taps: np.ndarray
    before: int
    positions: int

    @property
    def window(self) -> int:
        return int(self.taps.shape[1])


def phases(kernel: int, stride: int, dilation: int, pad: int, out: int) -> Phases:
    """The phases of an axis of `out` results."""
    reach = dilation * (kernel - 1) - pad  # stride * j + phase lies in [-pad, reach]
    first, last = -((pad + stride - 1) // stride), reach // stride
    place = np.arange(last, first - 1, -1) * stride + np.arange(stride)[:, None] + pad
    is_tap = (place >= 0) & (place <= dilation * (kernel - 1)) & (place % dilation == 0)
    return Phases(np.where(is_tap, place // dilation, -1), last, -(-out // stride))


def lower_conv_transpose(b: Builder, node: ir.Node) -> None:
    """A convolution of stride 1 with a row per (output feature, phase), then a shuffle of rows.

    No zero is inserted into the map: a phase's row has weights only where its taps fall, and the
    zeros between them are skipped as those of any sparse weight.
    """
    x, weight = node.inputs[0], constant(node.inputs[1])
    assert x is not None
    bias_value = input_at(node, 2)
    bias = None if bias_value is None else constant(bias_value)
    if weight is None or (bias_value is not None and bias is None):
        raise Declined("weight or bias is not constant")
    size, out, rows, columns = _axes(node, shape_of(x), weight)
    if len(columns.taps) > OVERSHOOT:
        raise Declined(f"a stride of {len(columns.taps)} columns")
    weight = weight.reshape(*weight.shape[:2], -1, weight.shape[-1])
    matrix = _by_phase(weight, rows, columns)
    pads = (rows.before, columns.before, rows.positions - size[0] + rows.window - 1 - rows.before,
            columns.positions - size[1] + columns.window - 1 - columns.before)  # fmt: skip
    ones = (1, 1)
    window = Window(size, (rows.window, columns.window), ones, ones, pads)
    stored = b.maps(x)
    positions = (rows.positions, columns.positions)
    assert window.out == positions
    points = positions[0] * positions[1]
    fm = planar(stored.fm.images, len(matrix), points, 1, b.target)
    shape = (fm.images, fm.features, *positions)
    made = Stored(b.temporary(f"{node.name}.phases", 4 * fm.size), shape, "float32", fm)
    strides = (len(rows.taps), len(columns.taps))
    n_phases = strides[0] * strides[1]
    repeated = None if bias is None else np.repeat(bias, n_phases)
    step_product(b, [node], stored, matrix, repeated, made, window, None)
    _step_shuffle(b, node, made, strides, (n_phases, strides[1], 1), out)


def _by_phase(weight: np.ndarray, rows: Phases, columns: Phases) -> np.ndarray:
    """[inputs, outputs, kh, kw] -> [(output, row phase, column phase), inputs, window]."""
    spare = np.pad(weight, ((0, 0), (0, 0), (0, 1), (0, 1)))  # tap -1 is zero
    picked = spare[:, :, rows.taps[:, None, :, None], columns.taps[None, :, None, :]]
    inputs = weight.shape[0]
    ordered = picked.transpose(1, 2, 3, 0, 4, 5)
    return np.ascontiguousarray(ordered.reshape(-1, inputs, rows.window, columns.window))


def _axes(
    node: ir.Node, x: tuple[int, ...], weight: np.ndarray
) -> tuple[tuple[int, int], tuple[int, int], Phases, Phases]:
    """Size of the map and of the result, and the phases of both axes; a row is a map of height 1.

    Raises:
        Declined: for groups, three or more axes, or pads that only the result's shape implies.
    """
    n = len(x) - 2
    if n not in (1, 2):
        raise Declined(f"{n} spatial axes")
    if int_attribute(node, "group", 1) != 1:
        raise Declined("groups")
    if attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise Declined("auto_pad")
    stride = ints_attribute(node, "strides") or (1,) * n
    dilation = ints_attribute(node, "dilations") or (1,) * n
    pads = ints_attribute(node, "pads") or (0,) * 2 * n
    extra = ints_attribute(node, "output_padding") or (0,) * n
    out = shape_of(node.outputs[0])[2:]
    found: list[tuple[int, int, Phases]] = [] if n == 2 else [(1, 1, phases(1, 1, 1, 0, 1))]
    for i, (size, kernel) in enumerate(zip(x[2:], weight.shape[2:])):
        whole = (size - 1) * stride[i] + dilation[i] * (kernel - 1) + 1 + extra[i]
        if whole - pads[i] - pads[i + n] != out[i]:
            raise Declined("an output_shape of its own")
        found.append((size, out[i], phases(kernel, stride[i], dilation[i], pads[i], out[i])))
    (h, out_h, rows), (w, out_w, columns) = found
    return (h, w), (out_h, out_w), rows, columns


def lower_depth_to_space(b: Builder, node: ir.Node) -> None:
    """DepthToSpace: the shuffle alone if x lies feature-major, else row-major movement."""
    x = node.inputs[0]
    assert x is not None
    layout, side = b.layout_of(x), int_attribute(node, "blocksize", 0)
    if layout is None or layout.axis != 1 or side > OVERSHOOT:
        lower_depth_space(b, node)
        return
    features = layout.features // side**2
    if attribute(node, "mode", "DCR") == "CRD":
        steps = (side * side, side, 1)
    else:
        steps = (1, side * features, features)
    out = shape_of(node.outputs[0])[2:]
    _step_shuffle(b, node, b.maps(x, is_planar=True), (side, side), steps, (out[0], out[1]))


def _step_shuffle(
    b: Builder, node: ir.Node, x: Stored, kernel: tuple[int, int], steps: tuple[int, int, int],
    out: tuple[int, int],
) -> None:  # fmt: skip
    """`steps`: features of x from one output feature, one ky, one kx to the next."""
    most = 1 << (OVERSHOOT // kernel[1]).bit_length() - 1
    spec = PixelShuffle(kernel[1], min(b.target.shuffle_lanes, most))
    width = x.shape[3]
    like = FeatureMajor(x.fm.images, 0, out[0] * out[1], 0, 0, 0, 0, 1)
    to = b.new_feature(node.outputs[0], like)
    feature, ky, kx = (s * x.fm.row for s in steps)
    args: list[Arg] = [*to.strides(), x.address, x.fm.image, feature, ky, kx, to.fm.features]
    args += [width, kernel[0], *out, to.fm.tiles, to.fm.block]
    args.append(Scratch(spec.scratch_bytes(out[1], to.fm.block)))
    items = x.fm.images * to.fm.features
    b.step(spec, args, items, [node], detail=f"{kernel[0]}x{kernel[1]} pixels per pixel")
