"""Operators that are linear in their one operand, as products with constant matrices.

    y = Resize<mode="cubic">(x, , scales)    ->  y = MatMul(Transpose(Resize(eye(h))),
                                                            MatMul(x, Resize(eye(w))))
    y = Col2Im<..>(x, [h, w], [kh, kw])      ->  y = ConvTranspose<..>(Reshape(x, [n * c, kh * kw,
                                                     ..]), w), of which w[i] has its i-th tap alone
    y = DFT(x, , axis)                       ->  y = MatMul(Transpose(x), [[cos, sin], ..])
    y = STFT(x, step, window)                ->  y = Conv<strides=[step]>(x, window * [cos, sin])

Most of these matrices are sparse: four weights of a column of pixels, one tap of a patch. What a
resize does to the unit vectors is left to ONNX Runtime, which computes it once as a constant.

Declines when: a shape, a length or a window is not known, a resize has a kernel of its own or a
region, patches are not those of maps, spectra are halves of an inverse or of complex numbers, or a
matrix is too large.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sparsegraph.graph import (
    attribute,
    constant,
    input_at,
    int_attribute,
    integers,
    ints_attribute,
    is_op,
    operand,
    opset_of,
    scalar,
    scales_input,
    scales_of,
    static_shape,
)
from sparsegraph.rewrite import Attribute, Builder, Decline, RewritePass, Rule, decline

_MOST = 1 << 22  # elements of a matrix
_OLDEST_RESIZE = 13  # opset: no region is asked for


@dataclass(frozen=True)
class ExpandLinear(RewritePass):
    """Resizes without a kernel, sums of patches and Fourier transforms."""

    name: ClassVar[str] = "expand_linear"

    def match(self, node: ir.Node, graph: ir.Graph) -> ir.Node | Decline | None:
        """A node that has a rule, of activations in float32."""
        rule = _RULES.get(node.op_type) if is_op(node, *_RULES) else None
        x = node.inputs[0] if rule else None
        if rule is None or x is None or x.dtype != ir.DataType.FLOAT or constant(x) is not None:
            return None
        if rule is _RULES["Resize"] and _has_kernel(node):
            return None
        shapes = (static_shape(x), static_shape(node.outputs[0]))
        if any(shape is None or 0 in shape for shape in shapes):
            return decline(node, "its shape is not known")
        reason = rule.obstacle(node, graph)
        return node if reason is None else decline(node, reason)

    def rewrite(self, found: ir.Node, build: Builder) -> Sequence[ir.Value]:
        """The same as a product."""
        return [_RULES[found.op_type].expand(found, build)]


def _transposed(build: Builder, x: ir.Value, perm: Sequence[int]) -> ir.Value:
    if list(perm) == list(range(len(perm))):
        return x
    shape = static_shape(x) or ()
    return build.op("Transpose", [x], {"perm": perm}, like=x, shape=[shape[a] for a in perm])


def _too_large(elements: int) -> str | None:
    return f"a matrix of {elements:,} elements" if elements > _MOST else None


# ---------------------------------------------------------------- resizes


def _has_kernel(node: ir.Node) -> bool:
    mode = attribute(node, "mode", "nearest")
    return mode != "cubic" and not (mode == "linear" and attribute(node, "antialias", 0))


def _open_resize(node: ir.Node, _graph: ir.Graph) -> str | None:
    _, shape, out = operand(node)
    if opset_of(node) < _OLDEST_RESIZE:
        return f"an opset before {_OLDEST_RESIZE}"
    if len(shape) != 4 or shape[:2] != out[:2]:
        return f"a resize of {shape} to {out}; only [N, C, H, W] along H and W"
    if attribute(node, "keep_aspect_ratio_policy", "stretch") != "stretch":
        return "keep_aspect_ratio_policy"
    if attribute(node, "coordinate_transformation_mode") == "tf_crop_and_resize":
        return "a region"
    given = scales_input(node)
    if given is not None and constant(given) is None:
        return "its scales are computed"
    return _too_large(max(a * b for a, b in zip(shape[2:], out[2:])))


def _resize(node: ir.Node, build: Builder) -> ir.Value:
    """Rows first or columns first, whichever leaves less to the second."""
    x, shape, out = operand(node)
    scales = scales_of(node, len(shape))
    steps = sorted((out[axis] / shape[axis], axis) for axis in (2, 3))
    for _, axis in steps:
        scale = None if scales is None else scales[axis]
        if scale == 1 or (scale is None and shape[axis] == out[axis]):
            continue
        now = list(static_shape(x) or ())
        now[axis] = out[axis]
        matrix = _of_unit_vectors(node, build, shape[axis], out[axis], scale)
        pair = [x, matrix] if axis == 3 else [_transposed(build, matrix, (1, 0)), x]
        x = build.op("MatMul", pair, like=x, shape=now)
    return x


def _of_unit_vectors(
    node: ir.Node, build: Builder, n: int, out: int, scale: float | None
) -> ir.Value:
    """What the resize makes of unit vectors, [n, out]."""
    kept: dict[str, Attribute] = {
        name: a.value for name, a in node.attributes.items() if name != "axes"
    }
    eye = build.constant(np.eye(n, dtype=np.float32)[None, None], f"{build.hint}_eye")
    if scale is None:
        sizes = build.constant(np.array([1, 1, n, out], np.int64), f"{build.hint}_sizes")
        operands = [eye, None, None, sizes]
    else:
        scales = np.array([1, 1, 1, scale], np.float32)
        operands = [eye, None, build.constant(scales, f"{build.hint}_scales")]
    made = build.op("Resize", operands, kept, like=eye, shape=(1, 1, n, out))
    return build.reshaped(made, (n, out))


# ---------------------------------------------------------------- sums of patches


def _open_col2im(node: ir.Node, _graph: ir.Graph) -> str | None:
    sizes = [integers(value) for value in node.inputs[1:3]]
    if any(size is None or len(size) != 2 for size in sizes):
        return "patches that are not of maps, or of computed sizes"
    return None


def _col2im(node: ir.Node, build: Builder) -> ir.Value:
    """A transposed convolution of each channel, by one-hot weights."""
    x, (n, _, _), out = operand(node)
    kernel = integers(node.inputs[2]) or ()
    stride, dilation = (ints_attribute(node, k) or (1, 1) for k in ("strides", "dilations"))
    pads = ints_attribute(node, "pads") or (0, 0, 0, 0)
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation)]
    room = [size + pads[i] + pads[i + 2] - reach[i] for i, size in enumerate(out[2:])]
    places = [r // s + 1 for r, s in zip(room, stride)]
    taps = math.prod(kernel)
    weight = np.eye(taps, dtype=np.float32).reshape(taps, 1, *kernel)
    given: dict[str, Attribute] = {
        "kernel_shape": kernel, "strides": stride, "dilations": dilation, "pads": pads,
        "output_padding": [r % s for r, s in zip(room, stride)],
    }  # fmt: skip
    patches = build.reshaped(x, (n * out[1], taps, *places))
    operands = [patches, build.constant(weight, f"{build.hint}_taps")]
    shape = (n * out[1], 1, *out[2:])
    return build.reshaped(build.op("ConvTranspose", operands, given, like=x, shape=shape), out)


# ---------------------------------------------------------------- Fourier transforms


def _open_dft(node: ir.Node, _graph: ir.Graph) -> str | None:
    _, shape, out = operand(node)
    axis = _axis(node)
    if axis is None:
        return "its axis is computed"
    is_half = bool(int_attribute(node, "onesided", 0))
    if is_half and (int_attribute(node, "inverse", 0) or shape[-1] == 2):
        return "half a spectrum, of an inverse or of complex numbers"
    length = input_at(node, 1)
    if length is not None and scalar(length) is None:
        return "its length is computed"
    return _too_large(2 * shape[-1] * shape[axis] * out[axis])


def _axis(node: ir.Node) -> int | None:
    rank = len(operand(node)[1])
    if opset_of(node) < 20:  # an attribute until then
        return int_attribute(node, "axis", 1) % rank
    value = input_at(node, 2)
    axis = -2 if value is None else scalar(value)
    return None if axis is None else int(axis) % rank


def _dft(node: ir.Node, build: Builder) -> ir.Value:
    """The axis next to real and imaginary parts, and both as features of a product."""
    x, shape, out = operand(node)
    axis = _axis(node)
    assert axis is not None
    rank, n_parts = len(shape), shape[-1]
    length = scalar(input_at(node, 1)) if input_at(node, 1) is not None else shape[axis]
    matrix = _spectrum(
        shape[axis], out[axis], int(length or 0), bool(int_attribute(node, "inverse", 0))
    )
    if n_parts == 1:
        matrix = matrix[:, 0]
    weight = matrix.reshape(n_parts * shape[axis], 2 * out[axis])
    order = [a for a in range(rank - 1) if a != axis] + [axis, rank - 1]
    rest = [shape[a] for a in order[:-2]]
    rows = build.reshaped(_transposed(build, x, order), (math.prod(rest), len(weight)))
    operands = [rows, build.constant(weight, f"{build.hint}_waves")]
    shape_of_product = (math.prod(rest), weight.shape[1])
    product = build.op("MatMul", operands, like=x, shape=shape_of_product)
    parted = build.reshaped(product, (*rest, out[axis], 2))
    return _transposed(build, parted, [order.index(a) for a in range(rank)])


def _spectrum(n: int, n_out: int, length: int, is_inverse: bool) -> np.ndarray:
    """The transform of `n` values, cut or followed by zeros, [n, 2, n_out, 2] (real, imaginary)."""
    turns = np.outer(np.arange(n), np.arange(n_out)) % length / length
    angle = 2 * np.pi * turns * (1 if is_inverse else -1)
    wave = np.exp(1j * angle) * (np.arange(n) < length)[:, None] / (length if is_inverse else 1)
    parts = [[wave.real, wave.imag], [-wave.imag, wave.real]]
    return np.asarray(np.array(parts, np.float32).transpose(2, 0, 3, 1))


def _open_stft(node: ir.Node, _graph: ir.Graph) -> str | None:
    _, shape, out = operand(node)
    if len(shape) == 3 and shape[2] != 1:
        return "spectra of complex numbers"
    window = _window(node)
    if scalar(node.inputs[1]) is None or window is None:
        return "its step, window or length is computed"
    n = len(window)
    if out[2] != (n // 2 + 1 if int_attribute(node, "onesided", 1) else n):
        return f"shape inference gave it {out[2]} bins"  # onnx 1.23 forgets the default
    return _too_large(2 * out[2] * n)


def _window(node: ir.Node) -> np.ndarray | None:
    """Factors of a frame."""
    window, length = input_at(node, 2), input_at(node, 3)
    if window is not None:
        return constant(window)
    n = None if length is None else scalar(length)
    return None if n is None else np.ones(int(n), np.float32)


def _stft(node: ir.Node, build: Builder) -> ir.Value:
    """A convolution of the signal by the waves of a frame."""
    x, shape, (n, frames, bins, _) = operand(node)
    window, step = _window(node), int(scalar(node.inputs[1]) or 1)
    assert window is not None
    length = len(window)
    waves = _spectrum(length, bins, length, False)[:, 0] * window[:, None, None]
    weight = np.ascontiguousarray(waves.reshape(length, 2 * bins).T[:, None], np.float32)
    signal = build.reshaped(x, (n, 1, shape[1]))
    operands = [signal, build.constant(weight, f"{build.hint}_waves")]
    spectra = build.op("Conv", operands, {"strides": [step]}, like=x, shape=(n, 2 * bins, frames))
    return build.reshaped(_transposed(build, spectra, (0, 2, 1)), (n, frames, bins, 2))


_RULES: Mapping[str, Rule] = {
    "Resize": Rule(_open_resize, _resize),
    "Col2Im": Rule(_open_col2im, _col2im),
    "DFT": Rule(_open_dft, _dft),
    "STFT": Rule(_open_stft, _stft),
}
