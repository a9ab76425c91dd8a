"""AArch64: an artefact made here runs under qemu and computes what NumPy computes."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from sparsegraph.targets import link
from sparsegraph.targets.target import Target

import benchmarks.prune
from benchmarks import zoo
from sparsegraph import artefact, runtime, targets, verify
from sparsegraph.compile import compile, load
from sparsegraph.errors import ArtefactError
from tests import sample_program as sample

RUNNER = Path(link.__file__).parent / "runner.c"
PACKAGES = {"aarch64-linux-gnu-gcc": "gcc-aarch64-linux-gnu", "qemu-aarch64": "qemu-user"}


@pytest.fixture(scope="module")
def target() -> Target:
    for program, package in PACKAGES.items():
        if shutil.which(program) is None:
            pytest.skip(f"needs {program} (Debian: {package})")
    return targets.get("aarch64")


@pytest.fixture(scope="module")
def model(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("aarch64") / "m.sg"
    artefact.write(sample.plan(), target, path, sample.META)
    return path


@pytest.fixture(scope="module")
def program(target: Target, model: Path) -> Path:
    return build_runner(target, model)


def build_runner(target: Target, model: Path) -> Path:
    """The C runner, linked with the artefact as a user would."""
    path = model.parent / "run"
    flags = ["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{model}", f"-L{model}"]
    rpath = f"-Wl,-rpath,$ORIGIN/{model.name}"
    command = [*link.driver(target), *flags, RUNNER, "-l:model.so", rpath, "-o", path]
    subprocess.run(command, check=True)
    return path


def run(target: Target, program: Path, *args: object) -> subprocess.CompletedProcess[str]:
    command = [*target.emulator, program, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_outputs_equal_numpy(
    target: Target, model: Path, program: Path, tmp_path: Path, threads: int
) -> None:
    feed = sample.feed(threads)
    paths = [tmp_path / name for name in ("x", "ids", "y", "middle")]
    feed["x"].tofile(paths[0])
    feed["ids"].tofile(paths[1])
    done = run(target, program, model / "weights.bin", threads, *paths)
    assert done.returncode == 0, done.stderr
    for path, expected in zip(paths[2:], sample.reference(feed["x"], feed["ids"]), strict=True):
        found = np.fromfile(path, np.float32).reshape(sample.ROWS, sample.WIDTH)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_runner_refuses_wrong_files(target: Target, model: Path, program: Path) -> None:
    weights = model / "weights.bin"
    assert "usage" in run(target, program, weights, 1).stderr
    done = run(target, program, weights, 1, weights, weights, "y", "middle")
    assert done.returncode == 1
    assert f"wrong size of '{weights}'" in done.stderr


def test_this_machine_refuses_it(model: Path) -> None:
    if targets.native().arch == "aarch64":
        pytest.skip("this is an AArch64 machine")
    with pytest.raises(ArtefactError, match="need aarch64"):
        runtime.InferenceSession(model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes", "density"),
    [
        ("digits_cnn", {}, 0.2),
        ("mobilenet_v2", {"size": 64}, 0.2),
        ("resnet18", {"size": 64}, 0.1),
        ("minilm", {"sequence": 20, "layers": 2}, 0.1),
    ],
)
def test_whole_models_equal_onnx_runtime(
    target: Target, tmp_path: Path, name: str, sizes: dict[str, int], density: float
) -> None:
    proto = zoo.build(name, **sizes)
    pruned = benchmarks.prune.magnitude(proto, density, layers=benchmarks.prune.selector_for(name))
    proto = proto if pruned is None else pruned
    path = tmp_path / "m.sg"
    compiled = compile(proto, target, output=path, check=False, fallback=False)
    runner, feeds = build_runner(target, path), zoo.feeds(proto)
    files = []
    for record in compiled.manifest.inputs:
        files.append(tmp_path / f"in_{record.name}")
        np.ascontiguousarray(feeds[record.name]).tofile(files[-1])
    expected = verify.run_onnx(load(proto), feeds)
    outputs = [tmp_path / f"out_{record.name}" for record in compiled.manifest.outputs]
    done = run(target, runner, path / "weights.bin", 1, *files, *outputs)
    assert done.returncode == 0, done.stderr
    for record, file in zip(compiled.manifest.outputs, outputs, strict=True):
        found = np.fromfile(file, np.float32).reshape(record.shape)
        assert verify.compare({"y": found}, {"y": expected[record.name]}) <= 1e-4
