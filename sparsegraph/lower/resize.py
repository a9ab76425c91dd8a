"""Resize and Upsample over the two spatial axes of maps: nearest and linear."""

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from sparsegraph.graph import attribute, constant, opset_of, scales_input, scales_of
from sparsegraph.lower.builder import Builder, Declined, shape_of
from sparsegraph.program import Arg, Scratch
from sparsegraph.targets.kernels.resize import Resize, blend_rows, neighbours
from sparsegraph.targets.layout import FeatureMajor

# ONNX Runtime 1.31 takes 3.4999998 for a half: found by trying all sizes up to 25 x 41.
_NEAR = 1e-5


def lower_resize(b: Builder, node: ir.Node) -> None:
    """Resize (opset 10 and later) and Upsample of [N, C, H, W] along H and W."""
    x, result = node.inputs[0], node.outputs[0]
    assert x is not None
    shape, out = shape_of(x), shape_of(result)
    mode = str(attribute(node, "mode", "nearest"))
    _check(node, shape, out, mode)
    scales = _scales(node, shape, out)
    axes = [_positions(node, shape[i], out[i], scales[i]) for i in (2, 3)]
    stored = b.maps(x, is_planar=True)
    if not stored.fm.is_planar:
        raise Declined("a constant map")
    fm, width, lanes = stored.fm, shape[3], b.target.shuffle_lanes
    like = FeatureMajor(fm.images, 0, out[2] * out[3], 0, 0, 0, 0, 1)
    if mode == "nearest":
        nearest = [_rounded(node, p, s) for p, s in zip(axes, scales[2:])]
        rows, columns = (np.clip(p, 0, n - 1).astype(np.int64) for p, n in zip(nearest, shape[2:]))
        spec = Resize(mode, _nearest_columns(columns, width), lanes)
        tables: list[Arg] = [b.weight(f"{node.name}.rows", (rows * width).astype(np.int32))]
        picked = [np.append(columns, np.zeros(lanes)).astype(np.int32)]
    else:
        spec = Resize(mode, _linear_columns(axes[1], width), lanes)
        low, high, weight = neighbours(axes[0], shape[2])
        tables = [b.weight(f"{node.name}.rows", blend_rows(low, high, width))]
        tables += [b.weight(f"{node.name}.row_weight", weight), spec.row_elements(out[3])]
        low, high, weight = neighbours(axes[1], width)
        spare = np.zeros(lanes)
        both = np.concatenate([low, spare, high, spare]).astype(np.int32)
        picked = [both, np.append(weight, spare).astype(np.float32)]
    to = b.new_feature(result, like)
    args: list[Arg] = [*to.strides(), stored.address, fm.image, fm.row, fm.features, width]
    args += [*out[2:], to.fm.tiles, to.fm.block, *tables]
    if spec.columns == "table":
        args += [b.weight(f"{node.name}.columns{i}", table) for i, table in enumerate(picked)]
    args.append(Scratch(spec.scratch_bytes(out[3], to.fm.block)))
    detail = f"{mode}, {shape[2]}x{width} to {out[2]}x{out[3]}"
    b.step(spec, args, fm.images * fm.features, [node], detail=detail)


def _check(node: ir.Node, shape: Sequence[int], out: Sequence[int], mode: str) -> None:
    """Decline what no kernel does."""
    if len(shape) != 4 or shape[:2] != out[:2]:
        raise Declined(f"a resize of {shape} to {out}; only [N, C, H, W] along H and W")
    if mode not in ("nearest", "linear"):
        raise Declined(f"mode '{mode}'")
    symmetric = attribute(node, "coordinate_transformation_mode", "") == "half_pixel_symmetric"
    if mode == "nearest" and symmetric:
        raise Declined("half_pixel_symmetric of nearest, where ONNX Runtime rounds its own way")
    if attribute(node, "antialias", 0):
        raise Declined("antialias")
    if attribute(node, "keep_aspect_ratio_policy", "stretch") != "stretch":
        raise Declined("keep_aspect_ratio_policy")


def _scales(node: ir.Node, shape: Sequence[int], out: Sequence[int]) -> list[float]:
    """Scale of every axis in single precision, as ONNX Runtime computes with it."""
    value = scales_input(node)
    if value is not None and constant(value) is None:
        raise Declined("the scales are not constant")
    given = scales_of(node, len(shape))
    scales = given or [float(np.float32(o) / np.float32(d)) for o, d in zip(out, shape)]
    for d, o, s in zip(shape, out, scales):
        if math.floor(np.float32(d) * np.float32(s)) != o and given:
            raise Declined(f"scale {s} does not make {o} of {d}")
    return scales


def _positions(node: ir.Node, size: int, out: int, scale: float) -> np.ndarray:
    """Where each output coordinate lies on the input axis, in single precision."""
    one, half = np.float32(1), np.float32(0.5)
    s, x = np.float32(scale), np.arange(out, dtype=np.float32)
    old = node.op_type == "Upsample" or opset_of(node) < 11
    default = "asymmetric" if old else "half_pixel"
    mode = attribute(node, "coordinate_transformation_mode", default)
    centres = (x + half) / s - half
    match mode:
        case "half_pixel":
            return np.asarray(centres)
        case "pytorch_half_pixel":
            return np.asarray(centres if out > 1 else np.zeros_like(x))
        case "asymmetric":
            return np.asarray(x / s)
        case "tf_half_pixel_for_nn":
            return np.asarray((x + half) / s)
        case "align_corners":
            span = np.float32(max(out - 1, 1))
            return np.asarray(x * np.float32(size - 1) / span if out > 1 else np.zeros_like(x))
        case "half_pixel_symmetric":
            adjust = np.float32(out) / (s * np.float32(size))
            offset = np.float32(size) / np.float32(2) * (one - adjust)
            return np.asarray(offset + centres)
    raise Declined(f"coordinate_transformation_mode '{mode}'")


def _rounded(node: ir.Node, position: np.ndarray, scale: float) -> np.ndarray:
    """The nearest index; before opset 11 enlarged maps round down."""
    mode = str(attribute(node, "nearest_mode", "round_prefer_floor"))
    if node.op_type == "Upsample" or opset_of(node) < 11:
        if scale < 1:
            raise Declined("a nearest resize to a smaller map before opset 11")
        mode = "floor"
    match mode:
        case "floor":
            return np.asarray(np.floor(position))
        case "ceil":
            return np.asarray(np.ceil(position))
        case "round_prefer_ceil":
            return np.asarray(np.floor(position.astype(np.float64) + (0.5 + _NEAR)))
        case "round_prefer_floor":
            return np.asarray(np.ceil(position.astype(np.float64) - (0.5 + _NEAR)))
    raise Declined(f"nearest_mode '{mode}'")


def _nearest_columns(columns: np.ndarray, width: int) -> str:
    """The cheapest kernel variant for these source columns."""
    if np.array_equal(columns, np.arange(width)):
        return "same"
    return "double" if np.array_equal(columns, np.arange(2 * width) // 2) else "table"


def _linear_columns(position: np.ndarray, width: int) -> str:
    """The cheapest kernel variant for these source positions."""
    inside = np.clip(position, 0, width - 1)
    centres = np.clip((np.arange(2 * width) + 0.5) / 2 - 0.5, 0, width - 1)
    if np.array_equal(inside, np.arange(width)):
        return "same"
    return "double" if np.array_equal(inside, centres) else "table"
