"""Models for other machines: compile, run under an emulator, compare with ONNX Runtime."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from sparsegraph.targets import link
from sparsegraph.targets.target import PACKAGES, Target

import benchmarks.prune
from benchmarks import zoo
from sparsegraph import targets, verify
from sparsegraph.compile import Compiled, compile, load

RUNNER = Path(link.__file__).parent / "runner.c"
MODELS: dict[str, dict[str, int]] = {
    "digits_cnn": {},
    "mobilenet_v1": {"size": 96},
    "resnet18": {"size": 64},
    "minilm": {"sequence": 64, "layers": 2},
}
LIMIT = 1e-4  # largest |a - b| / max |b|


def require(*tools: str) -> None:
    """Skip the test, naming the package, unless all commands are installed."""
    for tool in tools:
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool} (Debian: {PACKAGES[tool]})")


def require_for(target: Target) -> None:
    """Skip unless programs for `target` can be linked and run."""
    if not targets.runs_here(target):
        require(*target.linker[:1], *target.emulator[:1])


def build_runner(target: Target, model: Path) -> Path:
    """The C runner, linked with the artefact as a user would."""
    path = model.parent / f"run_{model.name}"
    flags = ["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{model}", f"-L{model}"]
    rpath = f"-Wl,-rpath,$ORIGIN/{model.name}"
    command = [*link.driver(target), *flags, RUNNER, "-l:model.so", rpath, "-o", path]
    subprocess.run(command, check=True)
    return path


def run(target: Target, program: Path, *args: object) -> subprocess.CompletedProcess[str]:
    emulator = () if targets.runs_here(target) else target.emulator
    command = [*emulator, program, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


class Case:
    """A pruned model of the zoo, its feeds, and what ONNX Runtime computes from them."""

    def __init__(self, name: str, density: float, sizes: dict[str, int] | None = None) -> None:
        proto = zoo.build(name, **(MODELS[name] if sizes is None else sizes))
        layers = benchmarks.prune.selector_for(name)
        pruned = benchmarks.prune.magnitude(proto, density, layers=layers)
        self.proto = proto if pruned is None else pruned
        self.feeds = zoo.feeds(self.proto)
        self.expected = verify.run_onnx(load(self.proto), self.feeds)

    def compile(self, target: Target, path: Path) -> Compiled:
        """The model for `target`, entirely native."""
        return compile(self.proto, target, output=path, check=False, fallback=False)

    def check(self, compiled: Compiled, folder: Path, target: Target, program: Path) -> None:
        """Run `program` on the feeds (files in `folder`) and compare the outputs."""
        inputs = self.write_inputs(compiled, folder)
        outputs = [folder / f"out_{record.name}" for record in compiled.manifest.outputs]
        weights = compiled.path / "weights.bin"
        done = run(target, program, weights, 1, *inputs, *outputs)
        assert done.returncode == 0, done.stderr
        self.compare(compiled, outputs)

    def write_inputs(self, compiled: Compiled, folder: Path) -> list[Path]:
        files = []
        for record in compiled.manifest.inputs:
            files.append(folder / f"in_{record.name}")
            np.ascontiguousarray(self.feeds[record.name]).tofile(files[-1])
        return files

    def compare(self, compiled: Compiled, files: list[Path]) -> None:
        for record, file in zip(compiled.manifest.outputs, files, strict=True):
            found = np.fromfile(file, record.dtype).reshape(record.shape)
            assert np.isfinite(found).all()
            assert verify.compare({"y": found}, {"y": self.expected[record.name]}) <= LIMIT
