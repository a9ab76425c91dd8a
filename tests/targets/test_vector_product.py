"""Products with single points against float64: odd sizes, several images, epilogue."""

import numpy as np
import pytest
from sparsegraph.targets import host
from sparsegraph.targets.kernels import convert, slots
from sparsegraph.targets.kernels.vector_product import (
    VectorProduct,
    kernels,
    pack,
    pack_rows,
    reference,
)
from sparsegraph.targets.layout import blocked, flat

from sparsegraph import targets

TARGET = targets.native()
KERNELS = kernels(TARGET.lanes)


@pytest.fixture(scope="module")
def library() -> host.Library:
    return host.Library(KERNELS, TARGET)


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 3), (32, 8), (33, 7), (100, 129)])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_single_points(
    kernel: VectorProduct, rows: int, columns: int, images: int, library: host.Library
) -> None:
    rng = np.random.default_rng(rows + columns)
    images = images if kernel.coded else kernel.images
    weight = rng.standard_normal((rows, columns)).astype(np.float32)
    if kernel.coded:
        weight[rng.random(weight.shape) < 0.7] = 0
        weights = [host.aligned(array) for array in slots.pack_slots(weight, kernel.rows)]
    else:
        weights = [columns, host.aligned(pack(weight, kernel.rows))]
    if kernel.skips:
        weights.append(host.empty(columns + 1, np.dtype(np.int32)))
    bias, scale = (rng.standard_normal(rows).astype(np.float32) for _ in range(2))
    x = rng.standard_normal((images, columns, 1)).astype(np.float32)
    x[rng.random(x.shape) < 0.6] = 0
    xl, yl = (
        flat(images, n, 1) if kernel.flat else blocked(images, n, 1, 1, TARGET)
        for n in (columns, rows)
    )  # fmt: skip
    y = host.empty(yl.size + 64)
    y[:] = 7
    operands = [host.aligned(pack_rows(scale, rows, kernel.rows))] * kernel.n_operands
    library.call(
        kernel, y, yl.image, yl.row, host.aligned(convert.pack(x, xl, fill=0.5)), xl.image,
        xl.row, images, rows, *weights,
        host.aligned(pack_rows(bias, rows, kernel.rows)), *operands,
        end=-(-rows // kernel.rows),
    )  # fmt: skip
    expected = reference(x[:, :, 0], weight, bias)
    size = np.abs(x[:, :, 0]) @ np.abs(weight.T) + np.abs(bias)
    if kernel.n_operands:
        expected, size = np.maximum(expected * scale, 0), size * np.abs(scale)
    got = convert.unpack(y, yl)[:, :, 0]
    assert (np.abs(got - expected) <= 1e-6 * size + 1e-9).all()
    assert (y[yl.size :] == 7).all(), "wrote past the end"
