"""WebAssembly: modules run in node through the bundle's loader, against ONNX Runtime."""

from pathlib import Path

import pytest

from sparsegraph import targets
from tests.targets import cross

COMBINATIONS = [
    ("digits_cnn", 1.0), ("digits_cnn", 0.1), ("mobilenet_v1", 0.1), ("minilm", 1.0),
    ("resnet18", 0.1),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("model", "density"), COMBINATIONS)
def test_models_equal_onnx_runtime(model: str, density: float, tmp_path: Path) -> None:
    cross.require("clang", "wasm-ld", "node")
    case = cross.Case(model, density)
    compiled = case.compile(targets.get("wasm"), tmp_path / "m.sg")
    case.check(compiled, "node", cross.MODULE_RUNNER, compiled.path)


def test_loader_refuses_other_weights(tmp_path: Path) -> None:
    cross.require("clang", "wasm-ld", "node")
    case = cross.Case("digits_cnn", 0.1)
    compiled = case.compile(targets.get("wasm"), tmp_path / "m.sg")
    weights = compiled.path / "weights.bin"
    weights.write_bytes(weights.read_bytes()[:-64])
    files = case.write_inputs(compiled, tmp_path)
    done = cross.execute("node", cross.MODULE_RUNNER, compiled.path, *files, tmp_path / "out")
    assert done.returncode != 0
    assert "weights: found" in done.stderr
