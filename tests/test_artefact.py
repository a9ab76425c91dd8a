"""Artefacts: what is in them, equal bytes for equal plans, and never half written."""

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sparsegraph import artefact, runtime, targets
from sparsegraph.errors import UsageError, VerifyError
from sparsegraph.manifest import Manifest
from sparsegraph.program import Plan, Program, Ref, Step, Tensor
from tests import sample_program as sample

BUILD = """
import sys
from sparsegraph import artefact, targets
from tests import sample_program as sample
artefact.write(sample.mixed_plan(), targets.get("native"), sys.argv[1], sample.META)
"""


def write(path: Path, plan: Plan | None = None) -> Manifest:
    return artefact.write(plan or sample.plan(), targets.get("native"), path, sample.META)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_manifest_lists_every_member_and_round_trips(tmp_path: Path) -> None:
    manifest = write(tmp_path / "m.sg", sample.mixed_plan())
    found = contents(tmp_path / "m.sg")
    text = found.pop("manifest.json")
    assert found.pop("manifest.sha256").split()[0].decode() == hashlib.sha256(text).hexdigest()
    assert Manifest.model_validate_json(text) == manifest
    example = {"runtime.h", "main.c", "bench.c", "CMakeLists.txt"}
    assert set(found) == {"model.so", "weights.bin", "fallback_1.onnx"} | example
    for name, data in found.items():
        record = manifest.members[name]
        assert (record.n_bytes, record.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    plain = json.loads(text)
    assert [s["kind"] for s in plain["segments"]] == ["native", "onnxruntime", "native"]
    assert plain["passes"] == sample.META["passes"]
    assert plain["verification"] == sample.META["verification"]
    assert plain["target"]["features"] == list(targets.get("native").features)


def test_weights_are_aligned_and_stored_once(tmp_path: Path) -> None:
    write(tmp_path / "m.sg")
    data = (tmp_path / "m.sg" / "weights.bin").read_bytes()
    w = sample.weights()
    first, second = w["first"].tobytes(), w["second"].tobytes()
    assert data.count(first) == data.count(second) == 1
    assert data.index(first) % 64 == data.index(second) % 64 == 0
    assert len(data) >= data.index(second) + len(second) + 64


def test_builds_are_equal_bytes(tmp_path: Path) -> None:
    folders = [tmp_path / "a.sg", tmp_path / "elsewhere" / "b.sg"]
    for seed, folder in enumerate(folders):
        folder.parent.mkdir(exist_ok=True)
        environment = {
            **os.environ,
            "PYTHONHASHSEED": str(seed + 1),
            "TMPDIR": str(folder.parent),
            "PYTHONPATH": os.pathsep.join(["", *sys.path]),
        }
        subprocess.run(
            [sys.executable, "-c", BUILD, folder],
            check=True,
            env=environment,
            cwd=Path(__file__).parent.parent,
        )
    a, b = map(contents, folders)
    assert a == b
    assert not any(str(tmp_path).encode() in data for data in a.values())


def test_earlier_artefact_is_replaced_and_old_session_lives_on(tmp_path: Path) -> None:
    path, feed = tmp_path / "m.sg", sample.feed()
    write(path)
    old = runtime.InferenceSession(path)
    before = old.run(["y"], feed)[0]
    program = sample.native("x", "y", seed=1)
    program.steps[0] = Step(*_with_scale(program.steps[0], 4.0))
    write(path, Plan(program.inputs, program.outputs, [program]))
    new = runtime.InferenceSession(path)
    assert np.array_equal(old.run(["y"], feed)[0], before)
    x = feed["x"] * np.float32(2)  # scale 4 instead of 2
    np.testing.assert_allclose(new.run(["y"], feed)[0], sample.reference(x, feed["ids"], 1)[0],
                               rtol=1e-5, atol=1e-5)  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["m.sg"]


def _with_scale(step: Step, scale: float) -> tuple[object, ...]:
    return (step.kernel, (*step.args[:3], scale), step.items, step.nodes)


def test_replaced_without_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artefact, "_exchange", lambda a, b: False)
    write(tmp_path / "m.sg")
    write(tmp_path / "m.sg", sample.mixed_plan())
    assert (tmp_path / "m.sg" / "fallback_1.onnx").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["m.sg"]


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("stop", [OSError(errno.ENOSPC, "No space left on device"),
                                  KeyboardInterrupt(), MemoryError()])  # fmt: skip
def test_nothing_is_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: bool, stop: BaseException
) -> None:
    path = tmp_path / "m.sg"
    if earlier:
        write(path)
    before = contents(path) if earlier else None

    def fail(*args: object) -> None:
        raise stop

    monkeypatch.setattr(artefact, "_write_manifest", fail)
    expected = UsageError if isinstance(stop, OSError) else type(stop)
    with pytest.raises(expected) as error:
        write(path, sample.mixed_plan())
    if isinstance(stop, OSError):
        assert "No space left on device" in str(error.value)
        assert "free some space" in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == (["m.sg"] if earlier else [])
    assert not earlier or contents(path) == before


def test_output_that_is_no_artefact_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "one.jpg").write_bytes(b"1")
    file = tmp_path / "file"
    file.write_text("text")
    link = tmp_path / "link"
    link.symlink_to(folder)
    for path in (folder, file, link):
        with pytest.raises(UsageError, match="need a new name or an earlier artefact"):
            write(path)
    assert contents(folder) == {"one.jpg": b"1"}
    with pytest.raises(UsageError, match="No such file or directory"):
        write(tmp_path / "missing" / "m.sg")


def test_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "m.sg").mkdir()
    write(tmp_path / "m.sg")
    assert (tmp_path / "m.sg" / "manifest.json").exists()


def test_members_are_readable_as_other_new_files(tmp_path: Path) -> None:
    write(tmp_path / "m.sg")
    (tmp_path / "plain").write_text("")
    (tmp_path / "folder").mkdir()
    mode = (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "m.sg").stat().st_mode == (tmp_path / "folder").stat().st_mode
    assert {p.stat().st_mode for p in (tmp_path / "m.sg").iterdir()} == {mode}


def test_progress_counts_kernels(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    target = targets.get("native")
    artefact.write(sample.plan(), target, tmp_path / "m.sg", sample.META,
                   lambda *a: calls.append(a))  # fmt: skip
    assert calls == [("compile kernels", i, 2) for i in range(3)]


def test_artefact_of_onnx_runtime_segments_alone_needs_no_library(tmp_path: Path) -> None:
    fallback = sample.mixed_plan().segments[1]
    write(tmp_path / "m.sg", Plan(fallback.inputs, fallback.outputs, [fallback]))
    assert not (tmp_path / "m.sg" / "model.so").exists()
    session = runtime.InferenceSession(tmp_path / "m.sg")
    x = sample.feed()["x"]
    assert np.array_equal(session.run(None, {"y": x})[0], np.maximum(x, 0))


def test_wrong_references_are_our_own_bugs(tmp_path: Path) -> None:
    x = Tensor("x", "float32", (1, 8))
    y = Tensor("y", "float32", (1, 8))
    weights = {"w": np.zeros(8, np.float32), "d": np.zeros(8)}

    def build(*args: object) -> None:
        step = Step(sample.Affine(8), args, 1)  # type: ignore[arg-type]
        program = Program((x,), (y,), [step], weights)
        write(tmp_path / "m.sg", Plan((x,), (y,), [program]))

    cases = [
        (Ref("y"), Ref("x", 9), Ref("w"), 1.0),  # outside
        (Ref("y"), Ref("nobody"), Ref("w"), 1.0),
        (Ref("y"), Ref("x"), Ref("d"), 1.0),  # float64
        (Ref("y"), Ref("x"), Ref("w")),
        (Ref("y"), Ref("x"), 1.0, 1.0),
        (Ref("y"), Ref("x"), Ref("w"), Ref("w")),
    ]
    for args in cases:
        with pytest.raises(AssertionError):
            build(*args)
    assert list(tmp_path.iterdir()) == []


def test_check_runs_the_folder_before_it_appears(tmp_path: Path) -> None:
    path, feed = tmp_path / "m.sg", sample.feed()

    def check(folder: Path) -> dict[str, object]:
        assert not path.exists()
        y = runtime.InferenceSession(folder).run(["y"], feed)[0]
        return {"shape": list(y.shape)}

    target = targets.get("native")
    manifest = artefact.write(sample.plan(), target, path, sample.META, check=check)
    assert manifest.verification == {"shape": [sample.ROWS, sample.WIDTH]}
    assert runtime.InferenceSession(path).manifest["verification"] == manifest.verification


def test_failed_check_leaves_nothing(tmp_path: Path) -> None:
    def check(folder: Path) -> dict[str, object]:
        raise VerifyError("wrong")

    with pytest.raises(VerifyError, match="wrong"):
        artefact.write(sample.plan(), targets.get("native"), tmp_path / "m.sg", sample.META,
                       check=check)  # fmt: skip
    assert list(tmp_path.iterdir()) == []
