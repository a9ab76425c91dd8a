"""Products of values with one point per image: the classifier behind a global pool."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from sparsegraph.graph import constant, is_op, scalar
from sparsegraph.lower import choose, problem
from sparsegraph.lower.builder import Builder, Stored
from sparsegraph.lower.problem import Choice
from sparsegraph.program import Arg, Scratch
from sparsegraph.targets.kernels import slots
from sparsegraph.targets.kernels.vector_product import (
    MOST_IMAGES,
    VectorProduct,
    pack,
    pack_rows,
)
from sparsegraph.targets.layout import blocked
from sparsegraph.targets.target import Target

if TYPE_CHECKING:
    from sparsegraph.lower.regions import Region

_KEEPS_ZEROS = (
    "Cast", "Dropout", "Flatten", "Gather", "Identity", "MaxPool", "Mul", "Pow", "Reshape", "Slice",
    "Sqrt", "Squeeze", "Transpose", "Unsqueeze",
)  # fmt: skip
VECTORS = 4  # 128 bytes of weights for every activation on AVX2


def suits(weight: np.ndarray, points: int, target: Target, density: float | None = None) -> bool:
    """True if a product of the last axis is best computed as one of single points.

    Several share the weights of a dense matrix; zeros are better left out for a tile of points.
    `density` is that of the weight unless given.
    """
    if points == 1 or points > MOST_IMAGES:
        return points == 1
    ms = []
    for images, of_image in ((points, 1), (1, points)):
        layouts = [blocked(images, n, of_image, 1, target) for n in reversed(weight.shape)]
        case = problem.of(problem.Operands(weight, layouts[0], layouts[1], None), target)
        if density is not None:
            case = replace(case, density=density, shared=1)
        ms.append(choose.choose(case, target).ms)
    return ms[0] < ms[1]


def is_plain(region: "Region | None") -> bool:
    """True if every operand of the epilogue is a constant per feature."""
    pairs = zip(region.operands, region.kinds) if region else ()
    return all(kind == "feature" and constant(value) is not None for value, kind in pairs)


def step_vector_product(
    b: Builder,
    nodes: Sequence[ir.Node],
    name: str,
    x: Stored,
    weight: np.ndarray,
    bias: np.ndarray,
    to: Stored,
    region: "Region | None",
    choice: Choice,
) -> None:
    """Append the kernel call; weight [rows, columns], in slots if so chosen."""
    operands = [constant(v) for v in region.operands] if region else []
    tree, lanes = region.tree if region and region.nodes else None, b.target.lanes
    is_coded = choice.weight == "slots"
    n, images = len(weight), to.fm.images
    rows = choice.group if is_coded else _vectors(images, b.target) * lanes
    kernel = VectorProduct(
        lanes, rows, tree, len(operands), is_coded, flat=to.fm.row == 1,
        skips=not is_coded and _skips(nodes[0], weight, b.target),
        images=1 if is_coded else images,
    )  # fmt: skip
    args: list[Arg] = [
        to.address, to.fm.image, to.fm.row, x.address, x.fm.image, x.fm.row, images, n,
    ]  # fmt: skip
    if is_coded:
        streams = slots.pack_slots(weight, rows)._asdict()
        args += [b.weight(f"{name}.{stream}", array) for stream, array in streams.items()]
    else:
        args += [weight.shape[1], b.weight(f"{name}.values", pack(weight, rows))]
    if kernel.skips:
        args.append(Scratch(4 * (weight.shape[1] + 1)))
    args.append(b.weight(f"{name}.bias", pack_rows(bias, n, rows)))
    for i, array in enumerate(operands):
        assert array is not None
        args.append(b.weight(f"{name}.operand{i}", pack_rows(array, n, rows)))
    kept = int(np.count_nonzero(weight)) if is_coded else weight.size
    b.step(
        kernel, args, -(-n // rows), nodes, flops=2 * kept * images,
        dense_flops=2 * weight.size * images,
        detail=f"slots {kept / weight.size:.1%} non-zero, 1 point" if is_coded else
        "dense, 1 point" + ", without columns of zeros" * kernel.skips,
    )  # fmt: skip


def _vectors(images: int, target: Target) -> int:
    """In a panel: half of the registers hold the sums of all images."""
    return max(1, min(VECTORS, target.n_registers // 2 // images))


def _skips(node: ir.Node, weight: np.ndarray, target: Target) -> bool:
    """True if it pays to look for zeros in the activations: memory limits what has to be read.

    Zero times an infinite weight would be NaN, so there must be none.
    """
    is_far = 4 * weight.size > target.l2_bytes
    is_rectified = any(has_zeros(v) for v in node.inputs if v is not None and constant(v) is None)
    return is_far and is_rectified and bool(np.isfinite(weight).all())


def has_zeros(value: ir.Value) -> bool:
    """True of what lies behind a Relu or a threshold: for many inputs many values are zero."""
    seen: set[ir.Node] = set()
    waiting: list[ir.Value | None] = [value]
    while waiting:
        one = waiting.pop()
        node = None if one is None else one.producer()
        if node is None or node in seen:
            continue
        seen.add(node)
        limits = {"Clip": node.inputs[1:2], "Max": node.inputs, "Where": node.inputs[1:]}
        if is_op(node, "Relu", "ThresholdedRelu", "Shrink"):
            return True
        if is_op(node, *limits) and any(scalar(v) == 0 for v in limits[node.op_type]):
            return True
        if is_op(node, *_KEEPS_ZEROS):
            waiting += node.inputs if node.op_type == "Mul" else node.inputs[:1]
    return False
