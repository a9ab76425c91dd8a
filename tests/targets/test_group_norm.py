"""Group and instance norms against float64, in blocks and in planes; rows are in tests/lower."""

from functools import cache

import numpy as np
import pytest
from sparsegraph.targets import host
from sparsegraph.targets.kernels import convert
from sparsegraph.targets.kernels.group_norm import GroupNorm, reference
from sparsegraph.targets.layout import FeatureMajor, blocked, planar

from sparsegraph import targets

TARGET = targets.native()
LANES = TARGET.lanes
CASES = [(1, 1, 1, 1), (2, 6, 3, 5), (1, 8, 8, 49), (3, 12, 2, LANES * 4), (1, 4, 1, 3137)]


@cache
def library(kernel: GroupNorm) -> host.Library:
    return host.Library([kernel], TARGET)


def normalised(x: np.ndarray, groups: int, scale: np.ndarray, bias: np.ndarray, fm: FeatureMajor,
               epsilon: float) -> np.ndarray:  # fmt: skip
    """The kernel on [images, features, points] that lies as `fm`; what pads it is not a number."""
    kernel = GroupNorm(fm.block // LANES, LANES)
    source = host.aligned(convert.pack(x, fm, fill=np.nan))
    y = host.empty(fm.size)
    strides = (fm.image, fm.tile, fm.row)
    vectors = [host.aligned(v.astype(np.float32)) for v in (scale, bias)]
    library(kernel).call(
        kernel, y, *strides, source, *strides, *vectors, epsilon, x.shape[2], fm.tiles, groups,
        x.shape[1] // groups, end=len(x) * groups,
    )  # fmt: skip
    return convert.unpack(y, fm)


@pytest.mark.parametrize("layout", [blocked, planar])
@pytest.mark.parametrize("case", CASES)
def test_a_norm_equals_the_reference(case: tuple[int, ...], layout: object) -> None:
    images, features, groups, points = case
    fm = layout(images, features, points, 1, TARGET)  # type: ignore[operator]
    rng = np.random.default_rng(points)
    x = (rng.standard_normal((images, features, points)) + 20).astype(np.float32)
    scale, bias = rng.standard_normal((2, features))
    got = normalised(x, groups, scale, bias, fm, 1e-3)
    np.testing.assert_allclose(got, reference(x, groups, scale, bias, 1e-3), atol=2e-5)


def test_a_long_sum_keeps_its_small_terms() -> None:
    """A million numbers around 100 that differ by 1: a running sum is off by a hundredth."""
    x = (np.random.default_rng(0).standard_normal((1, 1, 1 << 20)) + 100).astype(np.float32)
    fm = blocked(1, 1, 1 << 20, 1, TARGET)
    one, zero = np.ones(1), np.zeros(1)
    got = normalised(x, 1, one, zero, fm, 0.0)
    np.testing.assert_allclose(got, reference(x, 1, one, zero, 0.0), atol=2e-5)
