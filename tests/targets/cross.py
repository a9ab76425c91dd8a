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

STRICT = ["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror"]
MODULE_RUNNER = Path(__file__).with_name("run_module.mjs")
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
    """The example of the bundle, linked with its library as a user would."""
    path = model.parent / f"run_{model.name}"
    rpath = f"-Wl,-rpath,$ORIGIN/{model.name}"
    command = [*link.driver(target), *STRICT, f"-L{model}", model / "main.c", "-l:model.so", rpath]
    subprocess.run([*command, "-o", path], check=True)
    return path


def build_source(model: Path, compiler: str, *flags: str) -> Path:
    """The example of a bundle of C files, built with `compiler` and everything as an error."""
    path = model.parent / f"run_{compiler}_{model.name}"
    files = [str(f) for f in sorted(model.glob("*.c"))]
    subprocess.run([compiler, *STRICT, *flags, *files, "-lm", "-o", path], check=True)
    return path


def run(target: Target, program: Path, *args: object) -> subprocess.CompletedProcess[str]:
    emulator = () if targets.runs_here(target) else target.emulator
    return execute(*emulator, program, *args)


def execute(*command: object) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)


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

    def check(self, compiled: Compiled, *command: object) -> None:
        """Run `command INPUTS... OUTPUTS...` on the feeds and compare what it writes."""
        folder = compiled.path.parent
        inputs = self.write_inputs(compiled, folder)
        outputs = [folder / f"out_{record.name}" for record in compiled.manifest.outputs]
        done = execute(*command, *inputs, *outputs)
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
