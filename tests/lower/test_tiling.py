"""A model's tiles of points follow its weights where four rows alike want other ones."""

import onnx
import pytest
from sparsegraph.targets.kernels.product import Product
from sparsegraph.targets.layout import point_block

from benchmarks import prune, zoo
from sparsegraph import formats, pipeline, targets, verify
from sparsegraph.compile import compile, load
from sparsegraph.layers import weighted
from sparsegraph.lower import choose, partition
from sparsegraph.lower.problem import Problem
from sparsegraph.lower.tiling import tiled, tiled_for


def pruned(name: str, pattern: str, density: float, **sizes: int) -> onnx.ModelProto:
    layers = prune.selector_for(name)
    return prune.magnitude(zoo.build(name, **sizes), density, layers=layers, pattern=pattern)


@pytest.mark.parametrize(
    ("name", "pattern", "density", "first", "rows"),
    [
        ("x86-64-v3", "4x1", 0.1, 3, 48), ("x86-64-v3", "2x1", 0.1, 4, 48),
        ("x86-64-v3", "unstructured", 0.1, 4, 48), ("x86-64-v3", "4x1", 0.9, 4, 48),
        ("x86-64-v3", "4x1", 0.1, 4, 46), ("x86-64-v4", "4x1", 0.1, 4, 48),
        ("x86-64-v4", "unstructured", 0.25, 4, 48), ("x86-64-v4", "unstructured", 0.4, 4, 48),
        ("x86-64-v4", "unstructured", 0.9, 4, 48), ("aarch64", "unstructured", 0.1, 8, 48),
        ("riscv64-v128", "4x1", 0.1, 4, 48),
    ],
)  # fmt: skip
def test_tiles_follow_the_zeros_of_most_weights(
    name: str, pattern: str, density: float, first: int, rows: int
) -> None:
    model = pruned("gemm", pattern, density, m=96, k=64, n=rows)
    layers = weighted(pipeline.optimize(load(model), verify=False).model)
    assert tiled_for(layers, targets.get(name)).tile_vectors[0] == first


@pytest.mark.parametrize(("density", "tile"), [(0.1, 4), (0.25, 4), (0.26, 13), (1.0, 13)])
def test_few_non_zeros_take_tiles_of_four_vectors_with_avx512(density: float, tile: int) -> None:
    """Not one of thirteen for a map of 14x14; up to four vectors are one tile anyway."""
    tiles = tiled(density, targets.get("x86-64-v4"))
    points = (16, 48, 49, 64, 128, 196)
    assert [point_block(p, tiles) // 16 for p in points] == [1, 3, 4, 4, 4, tile]


@pytest.mark.parametrize("density", [1.0, 0.4])
def test_thirteen_vectors_are_one_tile_in_four_passes(density: float) -> None:
    """197 points with AVX-512; as many columns are a tile as if it held the widest pass alone."""
    target = targets.get("x86-64-v4")
    assert point_block(197, target) == point_block(196, target) == 13 * 16
    way = choose.dense if density == 1 else choose.coded
    found = {}
    for vectors in (4, 13):
        problem = Problem(
            256, 1024, 1, 1, 197, vectors, vectors * 16, None, density, 1, 197, (1, 197)
        )
        found[vectors] = way(problem, target)
    assert (found[4].split, found[13].split) == ((4,), (4, 3, 3, 3))
    assert found[4].tile == found[13].tile < 1024


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("gemm", {"m": 192, "k": 70, "n": 64}), ("conv", {"c_in": 24, "c_out": 32, "size": 20}),
     ("conv", {"c_in": 24, "c_out": 32, "size": 7}), ("minilm", {"sequence": 72, "layers": 1})],
    ids=str,
)  # fmt: skip
def test_models_with_four_rows_alike_equal_onnx_runtime(name: str, sizes: dict[str, int]) -> None:
    model = pruned(name, "4x1", 0.15, **sizes)
    plan = partition.plan(pipeline.optimize(load(model), verify=False).model, targets.native())
    kernels = [s.kernel for program in plan.segments for s in program.steps]
    coded = [k for k in kernels if isinstance(k, Product) and k.weight == "coded"]
    assert coded
    assert {k.group for k in coded} == {formats.ALIKE}
    compiled = compile(model, check=False, fallback=False)
    feeds = zoo.feeds(model)
    expected = verify.run_onnx(load(model), feeds)
    names = [o.name for o in compiled.session.get_outputs()]
    assert verify.compare(dict(zip(names, compiled.run(None, feeds))), expected) <= 1e-5
