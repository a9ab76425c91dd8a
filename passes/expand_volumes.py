"""Operators over volumes in terms of operators over maps, which kernels know.

    y = MaxPool<kernel_shape=[2,3,3]>(x)                                    (x: float[n,c,d,h,w])
        ->  a = MaxPool<kernel_shape=[3,3]>(Reshape(x, [n, c*d, h, w]))
            b = MaxPool<kernel_shape=[2,1]>(Reshape(a, [n, c, d, h2*w2])); y = Reshape(b, ..)
    y = Resize(x, scales=[1,1,2,3,3])   ->  the same in two steps
    y = Conv<group=c>(x, w)             ->  y = Add(Conv(x0, w0), Conv(x1, w1), ..): a term per tap
                                            along the depth, of c*d features of maps
    y = ConvTranspose<strides=[2,2,2]>(x, w: float[c,m,2,2,2])
        ->  a Conv with a feature per (feature, tap), then Reshape, Transpose, Reshape

Convolutions of all channels stay: a kernel gathers from volumes as it does from maps.

Declines when: a shape or the weight is not known, the indices of maxima are read, a transposed
convolution has overlapping taps or groups, a depthwise one several features per channel, or an
opset is older than the operators that are needed.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sparsegraph.graph import (
    attribute,
    constant,
    input_at,
    int_attribute,
    ints_attribute,
    is_op,
    is_used,
    operand,
    scales_input,
    scales_of,
    static_shape,
)
from sparsegraph.rewrite import Attribute, Builder, Decline, RewritePass, Rule, decline

_RANK = 5
_OLDEST = 13  # opset: Pad and Slice with inputs, Resize without a region
_MAPS, _DEPTH = (1, 2), (0,)  # of the axes (depth, height, width)


@dataclass(frozen=True)
class ExpandVolumes(RewritePass):
    """Pools, resizes, depthwise and transposed convolutions of [n, c, d, h, w]."""

    name: ClassVar[str] = "expand_volumes"

    def match(self, node: ir.Node, graph: ir.Graph) -> ir.Node | Decline | None:
        """A node over three axes that has a rule."""
        rule = _RULES.get(node.op_type) if is_op(node, *_RULES) else None
        if rule is None or (rule is _DEPTHWISE and not _is_depthwise(node)):
            return None
        x, out = static_shape(node.inputs[0]), static_shape(node.outputs[0])
        if x is None or len(x) != _RANK:
            return None
        if out is None or 0 in (*x, *out):
            return decline(node, "its shape is not known")
        if graph.opset_imports.get("", 0) < _OLDEST:
            return decline(node, f"an opset before {_OLDEST}")
        reason = rule.obstacle(node, graph)
        return node if reason is None else decline(node, reason)

    def rewrite(self, found: ir.Node, build: Builder) -> Sequence[ir.Value]:
        """The same over maps."""
        return [_RULES[found.op_type].expand(found, build)]


def _in_two_steps(
    node: ir.Node,
    build: Builder,
    step: Callable[[ir.Value, Sequence[int], Sequence[int]], ir.Value],
) -> ir.Value:
    """First all maps, as features of one image, then all depths, as rows of points.

    `step` makes the operator over some of the three axes, given the shape of its result.
    """
    x, (n, c, d, h, w), (_, _, out_d, out_h, out_w) = operand(node)
    x = step(build.reshaped(x, (n, c * d, h, w)), _MAPS, (n, c * d, out_h, out_w))
    points = out_h * out_w
    x = step(build.reshaped(x, (n, c, d, points)), _DEPTH, (n, c, out_d, points))
    return build.reshaped(x, (n, c, out_d, out_h, out_w))


# ---------------------------------------------------------------- pools


def _open_pool(node: ir.Node, _graph: ir.Graph) -> str | None:
    return "the indices of the maxima are read" if any(map(is_used, node.outputs[1:])) else None


def _pool(node: ir.Node, build: Builder) -> ir.Value:
    kept = {
        name: value
        for name in ("auto_pad", "ceil_mode", "count_include_pad")
        if isinstance(value := attribute(node, name), int | str)
    }

    def step(x: ir.Value, axes: Sequence[int], shape: Sequence[int]) -> ir.Value:
        window = _window(node, axes)
        is_still = set(window["kernel_shape"]) == set(window["strides"]) == {1}
        if is_still and not any(window["pads"]):
            return x
        if kept.get("auto_pad", "NOTSET") != "NOTSET":
            del window["pads"]
        if node.op_type == "AveragePool" and set(window["dilations"]) == {1}:
            del window["dilations"]  # since opset 19
        return build.op(node.op_type, [x], {**window, **kept}, like=node.outputs[0], shape=shape)

    return _in_two_steps(node, build, step)


def _window(node: ir.Node, axes: Sequence[int]) -> dict[str, list[int]]:
    """Attributes of a window over two axes: of maps, or of depths and points."""
    still = [1] * (2 - len(axes))
    found = {}
    for name in ("kernel_shape", "strides", "dilations"):
        given = ints_attribute(node, name) or (1, 1, 1)
        found[name] = [*(given[a] for a in axes), *still]
    pads = ints_attribute(node, "pads") or (0,) * 6
    none = [0] * len(still)
    before, after = ([*(pads[a + at] for a in axes), *none] for at in (0, 3))
    return {**found, "pads": before + after}


# ---------------------------------------------------------------- resizes


def _open_resize(node: ir.Node, _graph: ir.Graph) -> str | None:
    _, shape, out = operand(node)
    if shape[:2] != out[:2]:
        return f"a resize of {shape} to {out}; images and channels must stay"
    if attribute(node, "mode", "nearest") not in ("nearest", "linear"):
        return f"mode '{attribute(node, 'mode')}'"
    for name, usual in _USUAL.items():
        if attribute(node, name, usual) != usual:
            return f"{name} {attribute(node, name)}"
    if attribute(node, "coordinate_transformation_mode") == "tf_crop_and_resize":
        return "a region"
    given = scales_input(node)
    return "its scales are computed" if given is not None and constant(given) is None else None


def _resize(node: ir.Node, build: Builder) -> ir.Value:
    """By scales where they were given, since they may not be quotients of the sizes."""
    scales = scales_of(node, _RANK)
    names = ("mode", "coordinate_transformation_mode", "nearest_mode")
    kept = {n: v for n in names if isinstance(v := attribute(node, n), str)}

    def step(x: ir.Value, axes: Sequence[int], shape: Sequence[int]) -> ir.Value:
        if scales is None:
            if tuple(shape) == static_shape(x):
                return x
            sizes = build.constant(np.array(shape, np.int64), f"{build.hint}_sizes")
            return build.op("Resize", [x, None, None, sizes], kept, like=x, shape=shape)
        wanted = [1.0, 1.0, *(scales[a + 2] for a in axes), 1.0][:4]
        if set(wanted) == {1.0}:
            return x
        factors = build.constant(np.array(wanted, np.float32), f"{build.hint}_scales")
        return build.op("Resize", [x, None, factors], kept, like=x, shape=shape)

    return _in_two_steps(node, build, step)


# ---------------------------------------------------------------- depthwise convolutions


def _is_depthwise(node: ir.Node) -> bool:
    shape = static_shape(node.inputs[1])
    return shape is not None and shape[1] == 1 and int_attribute(node, "group", 1) > 1


def _open_depthwise(node: ir.Node, _graph: ir.Graph) -> str | None:
    _, shape, out = operand(node)
    bias = input_at(node, 2)
    if constant(node.inputs[1]) is None or (bias is not None and constant(bias) is None):
        return "weight or bias is not constant"
    if out[1] != shape[1]:
        return f"{out[1] // shape[1]} features per channel"
    mode = attribute(node, "auto_pad", "NOTSET")
    return f"auto_pad {mode}" if mode not in ("NOTSET", "VALID") else None


def _depthwise(node: ir.Node, build: Builder) -> ir.Value:
    """One convolution of maps per tap along the depth, on the maps that it meets."""
    x, (n, c, _, h, w), (_, _, d, out_h, out_w) = operand(node)
    weight, bias = constant(node.inputs[1]), input_at(node, 2)
    assert weight is not None
    taps = [t for t in range(weight.shape[2]) if weight[:, :, t].any()] or [0]
    volume = _padded(node, build, x)
    total = None
    for tap in taps:
        maps = build.reshaped(_met(node, build, volume, tap, d), (n, c * d, h, w))
        inputs = [maps, _repeated(build, weight[:, :, tap], d, node.inputs[1])]
        if tap == taps[-1] and bias is not None:
            inputs.append(_repeated(build, constant(bias), d, bias))
        window = {**_window(node, _MAPS), "kernel_shape": list(weight.shape[3:])}
        shape = (n, c * d, out_h, out_w)
        given: dict[str, Attribute] = {**window, "group": c * d}
        term = build.op("Conv", inputs, given, like=node.outputs[0], shape=shape)
        total = term if total is None else build.op("Add", [total, term], like=term)
    assert total is not None
    return build.reshaped(total, (n, c, d, out_h, out_w))


def _repeated(
    build: Builder, array: np.ndarray | None, n: int, source: ir.Value | None
) -> ir.Value:
    assert array is not None
    return build.constant(np.repeat(array, n, axis=0), f"{build.hint}_maps", source)


def _padded(node: ir.Node, build: Builder, x: ir.Value) -> ir.Value:
    """The volume with maps of zeros before and behind it."""
    pads = ints_attribute(node, "pads") or (0,) * 6
    if not pads[0] and not pads[3]:
        return x
    n, c, d, h, w = static_shape(x) or ()
    widths = np.array([0, 0, pads[0], 0, 0, 0, 0, pads[3], 0, 0], np.int64)
    given = build.constant(widths, f"{build.hint}_pads")
    return build.op("Pad", [x, given], like=x, shape=(n, c, pads[0] + d + pads[3], h, w))


def _met(node: ir.Node, build: Builder, x: ir.Value, tap: int, n_maps: int) -> ir.Value:
    """The maps that a tap meets, one per map of the result."""
    n, c, d, h, w = static_shape(x) or ()
    stride = (ints_attribute(node, "strides") or (1,))[0]
    first = tap * (ints_attribute(node, "dilations") or (1,))[0]
    if (first, stride, n_maps) == (0, 1, d):
        return x
    bounds = (first, first + (n_maps - 1) * stride + 1, 2, stride)
    inputs = [build.constant(np.array([b], np.int64), f"{build.hint}_bound") for b in bounds]
    return build.op("Slice", [x, *inputs], like=x, shape=(n, c, n_maps, h, w))


# ---------------------------------------------------------------- transposed convolutions


def _open_transposed(node: ir.Node, _graph: ir.Graph) -> str | None:
    weight, bias = constant(node.inputs[1]), input_at(node, 2)
    if weight is None or (bias is not None and constant(bias) is None):
        return "weight or bias is not constant"
    if int_attribute(node, "group", 1) != 1:
        return "groups"
    strides = ints_attribute(node, "strides") or (1, 1, 1)
    _, shape, out = operand(node)
    is_apart = tuple(n * s for n, s in zip(shape[2:], strides)) == out[2:]
    if (
        weight.shape[2:] != tuple(strides)
        or not is_apart
        or any(ints_attribute(node, "pads") or ())
    ):
        return "its taps overlap, or leave gaps"
    return None


def _transposed(node: ir.Node, build: Builder) -> ir.Value:
    """Every tap is a feature of its own, whose volumes are then interleaved."""
    x, (n, _, d, h, w), out = operand(node)
    weight, bias = constant(node.inputs[1]), input_at(node, 2)
    assert weight is not None
    inputs, features, taps = weight.shape[0], weight.shape[1], weight.shape[2:]
    rows = features * math.prod(taps)
    by_tap = np.moveaxis(weight, 0, -1).reshape(rows, inputs, 1, 1, 1)
    operands = [x, build.constant(by_tap, f"{build.hint}_taps", node.inputs[1])]
    if bias is not None:
        operands.append(_repeated(build, constant(bias), math.prod(taps), bias))
    made = build.op("Conv", operands, like=node.outputs[0], shape=(n, rows, d, h, w))
    parted = build.reshaped(made, (n, features, *taps, d, h, w))
    order = (0, 1, 5, 2, 6, 3, 7, 4)
    shape = [(n, features, *taps, d, h, w)[axis] for axis in order]
    apart = build.op("Transpose", [parted], {"perm": order}, like=made, shape=shape)
    return build.reshaped(apart, out)


_USUAL: Mapping[str, Attribute] = {
    "antialias": 0, "exclude_outside": 0, "keep_aspect_ratio_policy": "stretch",
}  # fmt: skip
_POOL = Rule(_open_pool, _pool)
_DEPTHWISE = Rule(_open_depthwise, _depthwise)
_RULES: Mapping[str, Rule] = {
    "MaxPool": _POOL,
    "AveragePool": _POOL,
    "Resize": Rule(_open_resize, _resize),
    "Conv": _DEPTHWISE,
    "ConvTranspose": Rule(_open_transposed, _transposed),
}
