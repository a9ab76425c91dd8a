"""Dense products of values with one point per image: the classifier behind a global pool."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from sparsegraph.graph import constant
from sparsegraph.lower.builder import Builder, Stored
from sparsegraph.program import Arg
from sparsegraph.targets.kernels.vector_product import (
    MOST_IMAGES,
    VectorProduct,
    pack,
    pack_rows,
)

if TYPE_CHECKING:
    from sparsegraph.lower.regions import Region

VECTORS = 4  # 128 bytes of weights for every activation on AVX2


def fits(x: Stored, to: Stored, region: "Region | None") -> bool:
    """True if the points are few and every operand of the epilogue is a constant per feature."""
    fm = to.fm
    if fm.points != 1 or x.fm.points != 1 or fm.images > MOST_IMAGES:
        return False
    if region is None:
        return True
    pairs = zip(region.operands, region.kinds)
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
) -> None:
    """Append the kernel call; weight [rows, columns]."""
    operands = [constant(v) for v in region.operands] if region else []
    tree = region.tree if region and region.nodes else None
    kernel = VectorProduct(b.target.lanes, VECTORS, tree, len(operands))
    n, rows = len(weight), kernel.rows
    args: list[Arg] = [to.address, to.fm.image, to.fm.row, x.address, x.fm.image, x.fm.row,
                       to.fm.images, weight.shape[1], n]  # fmt: skip
    args.append(b.weight(f"{name}.values", pack(weight, rows)))
    args.append(b.weight(f"{name}.bias", pack_rows(bias, n, rows)))
    for i, array in enumerate(operands):
        assert array is not None
        args.append(b.weight(f"{name}.operand{i}", pack_rows(array, n, rows)))
    flops = 2 * weight.size * to.fm.images
    b.step(kernel, args, -(-n // rows), nodes, flops=flops, dense_flops=flops,
           detail="dense, 1 point")  # fmt: skip
