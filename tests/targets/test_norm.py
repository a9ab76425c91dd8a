"""Normalisation over features against float64: every variant, both layouts, hard values."""

import numpy as np
import pytest
from sparsegraph.targets import emit, host
from sparsegraph.targets.kernel import prim_func
from sparsegraph.targets.kernels import convert, norm
from sparsegraph.targets.kernels.norm import Norm, Softmax
from sparsegraph.targets.layout import FeatureMajor, passes
from sparsegraph.targets.target import Target

from sparsegraph import targets

LANES = targets.native().lanes
KERNELS = norm.kernels(LANES)
NORMS = [k for k in KERNELS if isinstance(k, Norm)]
SOFTMAXES = [k for k in KERNELS if isinstance(k, Softmax)]
EPSILON = 1e-5
UNIT = 2.0**-24


@pytest.fixture(scope="module")
def library() -> host.Library:
    return host.Library(KERNELS, targets.native())


def layouts(features: int, vectors: int) -> list[FeatureMajor]:
    """Blocked and planar values with two images and a partial last tile."""
    block = vectors * LANES
    points = 2 * block + 1
    row = block + 16
    blocked = FeatureMajor(2, features, points, block, 3 * features * row, features * row, row, 1)
    plane = 3 * block + 16
    return [blocked, FeatureMajor(2, features, points, block, features * plane, block, plane, 1)]


def strides(layout: FeatureMajor) -> tuple[int, int, int]:
    return layout.image, layout.tile, layout.row


def run_norm(
    library: host.Library, spec: Norm, layout: FeatureMajor, x: np.ndarray, r: np.ndarray,
    scale: np.ndarray, bias: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """y and the stored sum, as planes."""
    y, s = host.empty(layout.size + 16), host.empty(layout.size + 16)
    side = strides(layout)
    args = [y, *side, host.aligned(convert.pack(x, layout)), *side]
    if spec.residual:
        args += [host.aligned(convert.pack(r, layout)), *side]
    if spec.keep_sum:
        args += [s, *side]
    args += [scale, bias] if spec.bias else [scale]
    end = layout.images * layout.tiles
    library.call(spec, *args, EPSILON, layout.tiles, layout.features, end=end)
    return convert.unpack(y, layout), convert.unpack(s, layout)


@pytest.mark.parametrize("features", [1, 7, 384])
@pytest.mark.parametrize("spec", NORMS, ids=lambda k: k.name)
def test_norm_against_float64(library: host.Library, spec: Norm, features: int) -> None:
    """Error bound: features * 2^-24 on sums, amplified by |mean| / deviation; plus rounding."""
    rng = np.random.default_rng(features)
    for layout in layouts(features, spec.vectors):
        shape = (2, features, layout.points)
        x, r = (rng.standard_normal(shape).astype("f4") + 3 for _ in range(2))
        scale, bias = (rng.standard_normal(features).astype("f4") for _ in range(2))
        y, s = run_norm(library, spec, layout, x, r, scale, bias)
        total = x + r if spec.residual else x
        expected = norm.reference_norm(
            spec.kind, total, scale, bias if spec.bias else None, EPSILON
        )
        deviation = total.astype("f8").std(1, keepdims=True) if spec.kind == "layer" else 3.0
        reach = np.abs(total).max(1, keepdims=True) / np.sqrt(deviation**2 + EPSILON)
        bound = (8 + features**0.5) * UNIT * (reach * np.abs(scale)[:, None] + np.abs(expected) + 1)
        assert (np.abs(y - expected) <= bound).all(), np.abs(y - expected).max()
        if spec.keep_sum:
            np.testing.assert_array_equal(s, total)


def test_mean_is_subtracted_before_squares(library: host.Library) -> None:
    """Values 4096 +- 1: a variance from E[x^2] - E[x]^2 would have no correct digit."""
    spec = NORMS[0]
    layout = layouts(64, spec.vectors)[0]
    rng = np.random.default_rng(5)
    x = (4096 + rng.standard_normal((2, 64, layout.points))).astype("f4")
    one = np.ones(64, "f4")
    y, _ = run_norm(library, spec, layout, x, x, one, 0 * one)
    np.testing.assert_allclose(y, norm.reference_norm("layer", x, one, None, EPSILON), atol=2e-3)


@pytest.mark.parametrize("features", [1, 7, 384])
@pytest.mark.parametrize("spec", [k for k in NORMS if k.kind == "layer"], ids=lambda k: k.name)
def test_equal_features_are_their_mean(library: host.Library, spec: Norm, features: int) -> None:
    """A rounded mean would be divided by sqrt(epsilon); all of zeros often gets there."""
    rng = np.random.default_rng(features)
    for layout in layouts(features, spec.vectors):
        shape = (2, features, layout.points)
        x, r = (np.broadcast_to(rng.uniform(-99, 99, (2, 1, shape[2])), shape) for _ in range(2))
        scale, bias = (rng.standard_normal(features).astype("f4") for _ in range(2))
        y, _ = run_norm(library, spec, layout, x.astype("f4"), r.astype("f4"), scale, bias)
        expected = bias if spec.bias else np.zeros_like(bias)
        np.testing.assert_array_equal(y, np.broadcast_to(expected[:, None], shape))


@pytest.mark.parametrize("features", [1, 5, 197])
@pytest.mark.parametrize("spec", SOFTMAXES, ids=lambda k: k.name)
def test_softmax_against_float64(library: host.Library, spec: Softmax, features: int) -> None:
    """Relative error (8 + max - x + sqrt(features)) * 2^-23: exp scales its argument's rounding."""
    rng = np.random.default_rng(features)
    for layout in layouts(features, spec.vectors):
        x = rng.standard_normal((2, features, layout.points)).astype("f4") * 8
        x[0, :, 0] = 3e38
        x[0, 1:, 1] = -np.inf
        x[0, 0, 2] = 200
        y = host.empty(layout.size + 16)
        side = strides(layout)
        packed = host.aligned(convert.pack(x, layout))
        end = 2 * layout.tiles
        library.call(spec, y, *side, packed, *side, layout.tiles, features, end=end)
        got, expected = convert.unpack(y, layout), norm.reference_softmax(x, log=spec.log)
        if spec.log:
            infinite = np.isinf(expected)
            np.testing.assert_array_equal(got[infinite], expected[infinite])
            error = np.abs(got[~infinite] - expected[~infinite])
            assert (error <= 2 * UNIT * (8 + features**0.5 + np.abs(expected[~infinite]))).all()
            continue
        distance = np.minimum(x.max(1, keepdims=True).astype("f8") - x, 200)
        bound = 2 * UNIT * (8 + distance + features**0.5) * expected + 1e-37
        assert (np.abs(got - expected) <= bound).all()
        assert np.abs(got.sum(1) - 1).max() < 1e-5


@pytest.mark.parametrize("most", [1, 2, 4, 8])
@pytest.mark.parametrize("vectors", range(1, 9))
def test_passes_cover_the_tile(vectors: int, most: int) -> None:
    parts = passes(vectors, most)
    assert sum(parts) == vectors
    assert max(parts) <= most


@pytest.mark.parametrize("name", ["aarch64", "x86-64-v4"])
def test_compiles_for_other_machines(name: str) -> None:
    machine: Target = targets.get(name)
    functions = {k.name: prim_func(k, machine) for k in norm.kernels(machine.lanes)}
    text = emit.assembly(functions, machine)
    assert all(f"{name}:" in text for name in functions)
    assert "expf" not in text
    assert "sqrtf" not in text


def test_softmax_over_many_classes_keeps_the_small_terms(library: host.Library) -> None:
    spec = SOFTMAXES[0]
    layout = layouts(20000, spec.vectors)[0]
    planes = np.full((2, 20000, layout.points), -12.0, np.float32)
    planes[:, 77] = 0.0  # the others together weigh 0.12, each less than a rounding of 1
    x, y = host.aligned(convert.pack(planes, layout)), host.empty(layout.size)
    sides = strides(layout)
    library.call(spec, y, *sides, x, *sides, layout.tiles, layout.features, end=2 * layout.tiles)
    expected = norm.reference_softmax(planes, log=False)
    assert np.abs(convert.unpack(y, layout) - expected).max() <= 2e-5  # one running sum: 1e-3
