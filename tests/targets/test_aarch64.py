"""AArch64: an artefact made here runs under qemu and computes what NumPy computes."""

from pathlib import Path

import numpy as np
import pytest
from sparsegraph.targets.target import Target

from sparsegraph import artefact, runtime, targets
from sparsegraph.errors import ArtefactError
from tests import sample_program as sample
from tests.targets import cross


@pytest.fixture(scope="module")
def target() -> Target:
    cross.require("aarch64-linux-gnu-gcc", "qemu-aarch64")
    return targets.get("aarch64")


@pytest.fixture(scope="module")
def model(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("aarch64") / "m.sg"
    artefact.write(sample.plan(), target, path, sample.META)
    return path


@pytest.fixture(scope="module")
def program(target: Target, model: Path) -> Path:
    return cross.build_runner(target, model)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_outputs_equal_numpy(
    target: Target, model: Path, program: Path, tmp_path: Path, threads: int
) -> None:
    feed = sample.feed(threads)
    paths = [tmp_path / name for name in ("x", "ids", "y", "middle")]
    feed["x"].tofile(paths[0])
    feed["ids"].tofile(paths[1])
    done = cross.run(target, program, model / "weights.bin", threads, *paths)
    assert done.returncode == 0, done.stderr
    for path, expected in zip(paths[2:], sample.reference(feed["x"], feed["ids"]), strict=True):
        found = np.fromfile(path, np.float32).reshape(sample.ROWS, sample.WIDTH)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_runner_refuses_wrong_files(target: Target, model: Path, program: Path) -> None:
    weights = model / "weights.bin"
    assert "usage" in cross.run(target, program, weights, 1).stderr
    done = cross.run(target, program, weights, 1, weights, weights, "y", "middle")
    assert done.returncode == 1
    assert f"wrong size of '{weights}'" in done.stderr


def test_this_machine_refuses_it(model: Path) -> None:
    if targets.native().arch == "aarch64":
        pytest.skip("this is an AArch64 machine")
    with pytest.raises(ArtefactError, match="need aarch64"):
        runtime.InferenceSession(model)
