"""A model's tiles of points follow its weights where four rows alike want other ones."""

import onnx
import pytest
from sparsegraph.targets.kernels.product import Product

from benchmarks import prune, zoo
from sparsegraph import formats, pipeline, targets, verify
from sparsegraph.compile import compile, load
from sparsegraph.layers import weighted
from sparsegraph.lower import partition
from sparsegraph.lower.tiling import tiled_for


def pruned(name: str, pattern: str, density: float, **sizes: int) -> onnx.ModelProto:
    layers = prune.selector_for(name)
    return prune.magnitude(zoo.build(name, **sizes), density, layers=layers, pattern=pattern)


@pytest.mark.parametrize(
    ("name", "pattern", "density", "first", "rows"),
    [
        ("x86-64-v3", "4x1", 0.1, 3, 48), ("x86-64-v3", "2x1", 0.1, 4, 48),
        ("x86-64-v3", "unstructured", 0.1, 4, 48), ("x86-64-v3", "4x1", 0.9, 4, 48),
        ("x86-64-v3", "4x1", 0.1, 4, 46), ("x86-64-v4", "4x1", 0.1, 2, 48),
        ("x86-64-v4", "unstructured", 0.25, 2, 48), ("x86-64-v4", "unstructured", 0.4, 4, 48),
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
