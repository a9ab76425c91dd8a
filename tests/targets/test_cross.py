"""Whole models on machines that are not this one, under qemu, against ONNX Runtime."""

from pathlib import Path

import pytest

from sparsegraph import targets
from tests.targets import cross

# Every machine runs the digits CNN; the larger models share the machines among them.
COMBINATIONS = [
    *(("digits_cnn", density, name)
      for name in ("armv7", "riscv64", "riscv64-v128", "riscv64-v256", "aarch64-sve256",
                   "raspberry-pi-5", "x86-64-v2")
      for density in (1.0, 0.1)),
    ("mobilenet_v1", 0.1, "aarch64"),
    ("mobilenet_v1", 1.0, "armv7"),
    ("minilm", 0.1, "a64fx"),
    ("resnet18", 1.0, "aarch64"),
    ("resnet18", 0.1, "riscv64-v256"),
    ("minilm", 0.1, "armv7"),
    ("minilm", 0.1, "riscv64"),
    ("minilm", 1.0, "riscv64-v128"),
]  # fmt: skip


LENGTHS = {
    "riscv64-v128": ("rv64,v=true,vext_spec=v1.0,vlen=128", "rv64,v=true,vext_spec=v1.0,vlen=512"),
    "aarch64-sve256": ("max,sve-max-vq=2", "max,sve-max-vq=8,sve-default-vector-length=128"),
    "a64fx": ("max,sve-max-vq=4", "max,sve-max-vq=16,sve-default-vector-length=256"),
}


@pytest.mark.parametrize("name", LENGTHS)
def test_results_do_not_depend_on_the_vector_length(name: str, tmp_path: Path) -> None:
    target = targets.get(name)
    cross.require_for(target)
    if targets.runs_here(target):
        pytest.skip("this machine has one vector length")
    case = cross.Case("digits_cnn", 0.1)
    compiled = case.compile(target, tmp_path / "m.sg")
    program = cross.build_runner(target, compiled.path)
    results = []
    for cpu in LENGTHS[name]:
        command = [target.emulator[0], "-cpu", cpu, *target.emulator[-2:], program]
        case.check(compiled, *command, compiled.path / "weights.bin", 1)
        results.append([p.read_bytes() for p in sorted(tmp_path.glob("out_*"))])
    assert results[0] == results[1]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "density", "name"), COMBINATIONS)
def test_models_equal_onnx_runtime(model: str, density: float, name: str, tmp_path: Path) -> None:
    target = targets.get(name)
    cross.require_for(target)
    case = cross.Case(model, density)
    compiled = case.compile(target, tmp_path / "m.sg")
    program = cross.build_runner(target, compiled.path)
    emulator = () if targets.runs_here(target) else target.emulator
    case.check(compiled, *emulator, program, compiled.path / "weights.bin", 1)
