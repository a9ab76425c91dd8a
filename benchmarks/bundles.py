"""Bundles of pruned models: build what a user would build, run it, compare with ONNX Runtime.

A bundle for another machine runs under its emulator, a WebAssembly module in node, C source as the
program that a C compiler of this machine makes of it.
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from sparsegraph.targets import link
from sparsegraph.targets.target import Target

import benchmarks.prune
from benchmarks import bare_pc, real_models, zoo
from sparsegraph import targets, verify
from sparsegraph.compile import Compiled, compile, load

STRICT = ("-std=c11", "-O2", "-Wall", "-Wextra", "-Werror")
MODULE_RUNNER = Path(__file__).with_name("run_module.mjs")
TIMEOUT_S = 900


class RunFailed(RuntimeError):
    """A program of a bundle ended with an error, or wrote something that is no number."""


@dataclass(frozen=True)
class Model:
    """A model at the size that bundles are checked at."""

    name: str
    sizes: dict[str, int]

    def build(self, root: Path | None = None) -> onnx.ModelProto:
        """The dense model; trained models come from their package or from below `root`."""
        if self.name in real_models.MODELS:
            return real_models.load(self.name, root)
        return zoo.build(self.name, **self.sizes)


MODELS = {
    m.name: m
    for m in (
        Model("digits_cnn", {}),
        Model("mobilenet_v1", {"size": 96}),
        Model("ppocr_v2_cls", {}),
        Model("resnet18", {"size": 64}),
        Model("minilm", {"sequence": 64}),
    )
}


class Case:
    """A pruned model, its feeds, and what ONNX Runtime computes from them.

    `whole`: every weight is pruned, not just those of the layers that are pruned for speed.
    """

    def __init__(
        self, model: Model, density: float, root: Path | None = None, *, whole: bool = False
    ) -> None:
        dense = model.build(root)
        prune = benchmarks.prune
        layers = prune.everything if whole else prune.selector_for(model.name)
        self.proto = prune.magnitude(dense, density, layers=layers)
        self.feeds = zoo.feeds(self.proto)
        self.expected = verify.run_onnx(load(self.proto), self.feeds)

    def compile(self, target: Target | str, path: Path) -> Compiled:
        """The model for `target`, entirely native."""
        return compile(self.proto, target, output=path, check=False, fallback=False)

    def error(self, compiled: Compiled, *command: object) -> float:
        """Run `command INPUTS... OUTPUTS...` on the feeds; max |a - b| / max |b| of the outputs.

        Raises:
            RunFailed: the program did, or a value is no finite number.
        """
        return self.compare(compiled, run(compiled, self.feeds, *command))

    def compare(self, compiled: Compiled, files: list[Path]) -> float:
        """max |a - b| / max |b| of the outputs in `files`.

        Raises:
            RunFailed: a value is no finite number.
        """
        worst = 0.0
        for record, found in zip(compiled.manifest.outputs, read(compiled, files), strict=True):
            if not np.isfinite(found).all():
                raise RunFailed(f"output '{record.name}' holds values that are not finite")
            expected = {record.name: self.expected[record.name]}
            worst = max(worst, verify.compare({record.name: found}, expected))
        return worst


def run(compiled: Compiled, feeds: verify.Feed, *command: object) -> list[Path]:
    """Run `command INPUTS... OUTPUTS...` beside the bundle; the files of its outputs.

    Raises:
        RunFailed: with what the program said.
    """
    folder = compiled.path.parent
    inputs = write(compiled, feeds, folder)
    outputs = [folder / f"out_{i}" for i in range(len(compiled.manifest.outputs))]
    done = execute(*command, *inputs, *outputs)
    if done.returncode != 0:
        raise RunFailed(f"exit code {done.returncode}: {done.stderr.strip()[-300:]}")
    return outputs


def write(compiled: Compiled, feeds: verify.Feed, folder: Path) -> list[Path]:
    """One raw file per input, in the order of the model."""
    files = []
    for i, record in enumerate(compiled.manifest.segments[0].inputs):  # those that are read
        files.append(folder / f"in_{i}")
        np.ascontiguousarray(feeds[record.name]).tofile(files[-1])
    return files


def read(compiled: Compiled, files: list[Path]) -> list[np.ndarray]:
    """The outputs from their files."""
    records = zip(compiled.manifest.outputs, files, strict=True)
    return [np.fromfile(file, r.dtype).reshape(r.shape) for r, file in records]


def build_runner(target: Target, bundle: Path, main: str = "main.c") -> Path:
    """A program of the bundle, the example or `bench.c`, linked with its library."""
    path = bundle.parent / f"{Path(main).stem}_{bundle.name}"
    rpath = f"-Wl,-rpath,$ORIGIN/{bundle.name}"
    sources = [bundle / main, "-l:model.so", rpath]
    command = [*link.driver(target), *STRICT, f"-L{bundle}", *sources, "-o", path]
    subprocess.run(command, check=True)
    return path


def build_source(bundle: Path, compiler: str, *flags: str, main: str = "main.c") -> Path:
    """A program of a bundle of C files, built with `compiler` and every warning an error."""
    path = bundle.parent / f"{Path(main).stem}_{compiler}_{bundle.name}"
    others = {"main.c", "bench.c"} - {main}
    files = [str(f) for f in sorted(bundle.glob("*.c")) if f.name not in others]
    subprocess.run([compiler, *STRICT, *flags, *files, "-lm", "-o", path], check=True)
    return path


def command(target: Target, bundle: Path) -> list[object]:
    """Builds the bundle's program; the command that runs it, up to the inputs and outputs."""
    if target.output == "wasm":
        return [*target.emulator, MODULE_RUNNER, bundle]
    if target.output == "c":
        return [build_source(bundle, "gcc"), bundle / "weights.bin", 1]
    if is_bare_pc(target):
        cpu = bare_pc.CPUS[target.name]
        return [sys.executable, bare_pc.__file__, "--cpu", cpu, bundle]
    program = build_runner(target, bundle)
    return [*emulator(target), program, bundle / "weights.bin", 1]


def is_bare_pc(target: Target) -> bool:
    """True if the target's bundles run here on the bare PC that Bochs emulates."""
    here = targets.runs_here(target) or target.emulator
    return not here and bare_pc.can_run(str(target))


def emulator(target: Target) -> tuple[str, ...]:
    """What runs the target's programs here; nothing on a machine that is one."""
    return () if targets.runs_here(target) else target.emulator


def execute(*words: object) -> subprocess.CompletedProcess[str]:
    """Run a command and keep what it says."""
    text = [str(word) for word in words]
    return subprocess.run(text, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
