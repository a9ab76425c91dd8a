"""`compile --small`: weights that take the least memory."""

from pathlib import Path

import onnx
import pytest

from benchmarks import prune, zoo
from sparsegraph import pipeline, targets, verify
from sparsegraph.compile import Compiled, compile, load
from sparsegraph.errors import UsageError
from sparsegraph.lower import choose, partition
from tests.test_cli import invoke

BAR = 0.25  # of the dense model's weights, at 90 % zeros


def n_bytes(proto: onnx.ModelProto, name: str, *, small: bool) -> int:
    model = pipeline.optimize(load(proto), verify=False).model
    decide = (lambda case, _, target: choose.smallest(case, target)) if small else None
    plan = partition.plan(model, targets.get(name), allow_fallback=False, decide=decide)
    return sum(array.nbytes for program in plan.segments for array in program.weights.values())


@pytest.mark.parametrize("name", ["x86-64-v2", "x86-64-v3", "x86-64-v4", "aarch64", "riscv64-v128"])
def test_a_tenth_of_the_values_takes_a_quarter_of_the_memory_at_most(name: str) -> None:
    dense = zoo.build("digits_cnn")
    proto = prune.magnitude(dense, 0.1, layers=prune.all_layers)
    whole = min(n_bytes(dense, name, small=small) for small in (False, True))
    found = n_bytes(proto, name, small=True)
    assert found <= BAR * whole
    assert found <= n_bytes(proto, name, small=False)


@pytest.mark.parametrize("name", ["x86-64-v2", "x86-64-v4", "armv7", "riscv64-v256"])
def test_so_does_a_network_of_depthwise_convolutions(name: str) -> None:
    dense = zoo.build("mobilenet_v1", size=96)
    proto = prune.magnitude(dense, 0.1, layers=lambda _: True)
    assert n_bytes(proto, name, small=True) <= BAR * n_bytes(dense, name, small=False)


@pytest.mark.parametrize("density", [0.0, 0.1, 0.3, 0.5])
def test_depthwise_weights_are_stored_without_zeros_where_that_takes_half(density: float) -> None:
    dense = zoo.build("conv", c_in=32, c_out=32, kernel=3, size=14, groups=32)
    proto = prune.magnitude(dense, density, layers=lambda _: True)
    whole, kept = (n_bytes(p, "x86-64-v3", small=False) for p in (dense, proto))
    bias = 4 * 32
    assert whole == 4 * 32 * 9 + bias
    n = round(density * 9 * 32)
    fewer = 5 * n + 4 * 33 + bias
    assert kept == (fewer if density <= 0.3 else whole)
    compiled(proto, small=False)


def compiled(proto: onnx.ModelProto, *, small: bool) -> Compiled:
    made = compile(proto, "x86-64-v3", small=small, keep_native=True, check=False)
    feeds = zoo.feeds(proto)
    expected = verify.run_onnx(load(proto), feeds)
    names = [o.name for o in made.session.get_outputs()]
    assert verify.compare(dict(zip(names, made.run(None, feeds))), expected) <= 1e-5
    return made


@pytest.mark.skipif(
    not targets.runs_here(targets.get("x86-64-v3")), reason="this machine has no AVX2"
)
@pytest.mark.parametrize("density", [1.0, 0.75, 0.1])
def test_results_stay_and_patches_go(density: float) -> None:
    proto = zoo.build("conv", c_in=32, c_out=32, kernel=3, size=28)
    proto = prune.magnitude(proto, density, layers=lambda _: True)
    fast, least = (compiled(proto, small=small) for small in (False, True))
    weights = [c.manifest.members["weights.bin"].n_bytes for c in (fast, least)]
    is_patched = [any("winograd" in s.kernel for s in c.session.profile(zoo.feeds(proto)))
                  for c in (fast, least)]  # fmt: skip
    assert is_patched == [density > 0.5, False]
    assert (weights[1] < weights[0]) == is_patched[0]


def test_nothing_is_left_to_onnx_runtime_for_its_speed() -> None:
    proto = zoo.build("gemm", m=12, k=24, n=24)
    assert compile(proto, check=False).manifest.segments[0].kind != "native"
    assert compile(proto, small=True, check=False).manifest.segments[0].kind == "native"


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    onnx.save(zoo.build("digits_cnn"), "m.onnx")
    out, _ = invoke("compile", "m.onnx", "--small")
    assert "wrote m.sg" in out
    with pytest.raises(UsageError, match=r"'small'.*one of them"):
        compile("m.onnx", small=True, tune=True)
