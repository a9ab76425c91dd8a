"""Weights of models with 90 % zeros, on every kind of target: at most a quarter of dense."""

import math

import onnx_ir as ir
import pytest

import benchmarks.prune
from benchmarks import zoo
from sparsegraph import pipeline, targets
from sparsegraph.capture import load
from sparsegraph.lower import partition
from sparsegraph.program import Program, Ref

LIMIT = 0.25
MODELS = {"minilm": {"sequence": 64, "layers": 1}, "resnet18": {"size": 64}}
NAMES = (
    "x86-64-v2", "x86-64-v3", "x86-64-v4", "aarch64", "aarch64-sve256", "a64fx", "armv7",
    "riscv64", "riscv64-v128", "riscv64-v256", "wasm", "c11", "cortex-m7", "cortex-m55",
)  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def pruned(request: pytest.FixtureRequest) -> tuple[ir.Model, int, int]:
    """An optimized model, bytes of its pruned layers before pruning, bytes of the rest."""
    dense = zoo.build(request.param, **MODELS[request.param])
    layers = benchmarks.prune.selected(dense)
    n_pruned = sum(math.prod(layer.shape) for layer in layers)
    model = load(benchmarks.prune.magnitude(dense, 0.1, layers=lambda layer: layer in layers))
    optimized = pipeline.optimize(model, verify=False).model
    constants = (v.const_value for v in optimized.graph.initializers.values())
    n_all = sum(c.nbytes for c in constants if c is not None)
    return optimized, 4 * n_pruned, n_all - 4 * n_pruned


@pytest.mark.parametrize("name", NAMES)
def test_pruned_layers_take_a_quarter(name: str, pruned: tuple[ir.Model, int, int]) -> None:
    model, before, rest = pruned
    plan = partition.plan(model, targets.get(name), allow_fallback=False)
    (program,) = plan.segments
    assert isinstance(program, Program)
    used = {a.buffer for step in program.steps for a in step.args if isinstance(a, Ref)}
    stored = {w.tobytes() for key, w in program.weights.items() if key in used}
    after = sum(map(len, stored)) - rest
    assert 0.1 < after / before <= LIMIT
