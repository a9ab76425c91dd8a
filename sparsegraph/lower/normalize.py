"""LayerNormalization and RMSNormalization over the last axis of feature-major values."""

import math
from contextlib import suppress

import numpy as np
import onnx_ir as ir

from sparsegraph.graph import constant, float_attribute, int_attribute
from sparsegraph.lower.builder import Builder, Declined, shape_of
from sparsegraph.program import Arg
from sparsegraph.targets.kernels.norm import Norm
from sparsegraph.targets.kernels.reduce import RowNorm
from sparsegraph.targets.layout import FeatureMajor


def lower_norm(b: Builder, node: ir.Node) -> None:
    """One kernel; scale and bias are constant vectors."""
    x = node.inputs[0]
    assert x is not None
    shape = shape_of(x)
    axis = int_attribute(node, "axis", -1) % len(shape)
    if any(v.consumers() or v.is_graph_output() for v in node.outputs[1:]):
        raise Declined("the mean is an output")
    layout = b.layout_of(x)
    if axis != len(shape) - 1 or len(shape) < 2 or (layout is not None and layout.axis != axis):
        _lower_rows(b, node, x, axis)
        return
    stored = b.feature(x, axis)
    fm, result = stored.fm, node.outputs[0]
    vectors = [_vector(v, shape[-1:]) for v in node.inputs[1:] if v is not None]
    lanes = b.target.lanes
    kind = "layer" if node.op_type == "LayerNormalization" else "rms"
    kernel = Norm(kind, fm.block // lanes, lanes, bias=len(vectors) == 2)
    to = b.new_feature(result, FeatureMajor(fm.images, 0, fm.points, 0, 0, 0, 0, axis))
    refs = [b.weight(f"{node.name}.{i}", v) for i, v in enumerate(vectors)]
    epsilon = float_attribute(node, "epsilon", 1e-5)
    args: list[Arg] = [*to.strides(), *stored.strides(), *refs, epsilon, fm.tiles, fm.features]
    detail = f"{fm.features} features"
    b.step(kernel, args, fm.images * fm.tiles, [node], tiled=("y", "x"), detail=detail)


def _lower_rows(b: Builder, node: ir.Node, x: ir.Value, axis: int) -> None:
    """Row-major, over all axes from `axis` on."""
    shape = shape_of(x)
    n = int(np.prod(shape[axis:], dtype=np.int64))
    vectors = [_vector(v, shape[axis:]) for v in node.inputs[1:] if v is not None]
    kernel = RowNorm(node.op_type == "RMSNormalization", len(vectors) == 2)
    refs = [b.weight(f"{node.name}.{i}", v) for i, v in enumerate(vectors)]
    row, to = b.row(x), b.new_row(node.outputs[0])
    epsilon = float_attribute(node, "epsilon", 1e-5)
    args: list[Arg] = [to.address, row.address, *refs, n, epsilon]
    outer = int(np.prod(shape[:axis], dtype=np.int64))
    b.step(kernel, args, outer, [node], detail=f"{n} values, row-major")


def _vector(value: ir.Value, space: tuple[int, ...]) -> np.ndarray:
    """One number per place of the normalised axes; PyTorch writes scales of one in the shape of x.

    Raises:
        Declined: it is computed, or differs along other axes.
    """
    array = constant(value)
    if array is not None:
        lead = array.shape[: max(0, array.ndim - len(space))]
        with suppress(ValueError):  # from shapes that do not fit
            rows = np.broadcast_to(array, (*lead, *space)).reshape(-1, math.prod(space))
            if np.array_equal(rows, np.broadcast_to(rows[0], rows.shape)):
                return np.ascontiguousarray(rows[0], np.float32)
    raise Declined("scale or bias is not a constant vector")
