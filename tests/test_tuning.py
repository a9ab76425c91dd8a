"""Tuning files: what they change, what is refused, and that tuning measures only what is new."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sparsegraph.targets.compiler import KernelError

from sparsegraph import pipeline, targets, tune, tuning
from sparsegraph.capture import load
from sparsegraph.compile import compile
from sparsegraph.errors import UnsupportedError, UsageError
from sparsegraph.inspect import inspect, operands
from sparsegraph.layers import weighted
from sparsegraph.lower import choose, partition, problem
from sparsegraph.lower.tiling import tiled_for
from sparsegraph.program import Program
from sparsegraph.progress import silent
from sparsegraph.tuning import Measured, Tuning
from tests.conftest import BATCH, perceptron

SHAPES = {"batch": BATCH}


def layer_of(target: targets.Target) -> tuple[problem.Problem, problem.Operands]:
    """The first product of `perceptron`, as the compiler sees it."""
    model = pipeline.optimize(load(perceptron(), SHAPES), verify=False).model
    layers = weighted(model)
    tiled = tiled_for(layers, target)
    found = operands(layers[0], tiled)
    assert found is not None
    return problem.of(found, tiled), found


@pytest.fixture
def native() -> targets.Target:
    return targets.native()


@pytest.fixture
def file(tmp_path: Path, native: targets.Target) -> Path:
    """A tuning file that claims that the first layer is fastest by a dense kernel."""
    case, found = layer_of(native)
    ways = [c.way for c in choose.candidates(case, native)]
    dense = next(w for w in ways if w.startswith("dense"))
    coded = next(w for w in ways if w.startswith("coded"))
    results = Tuning.here(native)
    key = tuning.key(case, found)
    results.layers[key] = Measured(tune.describe(case), {dense: 0.0005, coded: 0.25})
    path = tmp_path / "tuning.json"
    results.write(path)
    return path


def digests(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_a_file_changes_the_plan(file: Path, native: targets.Target) -> None:
    model = pipeline.optimize(load(perceptron(), SHAPES), verify=False).model
    decide = Tuning.read(file, native).choice
    plain = partition.plan(model, native).layers
    tuned = partition.plan(model, native, decide=decide).layers
    assert (plain[0]["format"], plain[0]["is_measured"]) == ("coded", False)
    assert (tuned[0]["format"], tuned[0]["is_measured"], tuned[0]["ms"]) == ("dense", True, 0.0005)
    assert tuned[1] == plain[1], "a layer that the file lacks goes by the model"


def test_inspect_says_measured(file: Path, native: targets.Target) -> None:
    found = inspect(load(perceptron(), SHAPES), native, tuning=file)
    up, down = found.layers
    assert (up.format, up.is_measured, up.ms) == ("dense", True, 0.0005)
    assert not down.is_measured
    assert "1 layers measured" in found.summary()
    columns, rows = found.table()
    assert [row[columns.index("from")] for row in rows] == ["measured", "predicted"]


def test_the_pattern_of_zeros_counts_and_the_values_do_not(native: targets.Target) -> None:
    case, found = layer_of(native)
    scaled = dataclasses.replace(found, weight=3 * found.weight)
    assert tuning.key(problem.of(scaled, native), scaled) == tuning.key(case, found)
    moved = dataclasses.replace(found, weight=np.roll(found.weight, 1, axis=0))
    assert problem.of(moved, native) == case
    assert tuning.key(case, moved) != tuning.key(case, found)


class FailingCandidates:
    """Stands for the compiled candidates: the code generator fails at the first, or at all."""

    def __init__(self, *, at_all: bool) -> None:
        self.at_all = at_all
        self.asked: list[list[str]] = []

    def time(self, programs: list[Program], **_: object) -> list[list[float]]:
        names = [p.steps[0].kernel.name for p in programs]
        self.asked.append(names)
        if self.at_all or self.asked[0][0] in names:
            raise KernelError({names[0]: "SIGABRT"})
        return [[0.001 + i] for i, _ in enumerate(programs)]


def test_candidates_without_code(
    tmp_path: Path, native: targets.Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "_WORTH", 1e9)
    case, found = layer_of(native)
    tuner = tune.begin(tmp_path / "t.json", native, silent)
    tuner._kernels = stub = FailingCandidates(at_all=False)  # type: ignore[assignment]
    tuner(case, found, native)
    first, second = stub.asked
    assert second == [name for name in first if name != first[0]] != []
    (measured,) = tuner.tuning.layers.values()
    assert list(measured.ms.values()) == [0.001 + i for i, _ in enumerate(second)]


def test_no_candidate_has_code(tmp_path: Path, native: targets.Target) -> None:
    tuner = tune.begin(tmp_path / "t.json", native, silent)
    tuner._kernels = FailingCandidates(at_all=True)  # type: ignore[assignment]
    with pytest.raises(KernelError):
        tuner(*layer_of(native), native)
    assert not tuner.tuning.layers


def change(edit: Callable[[dict[str, Any]], None], path: Path) -> None:
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def entry(data: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(iter(data["layers"].values()))
    return found


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda d: d.update(schema=99), "schema 99"),
        (lambda d: d.update(target="aarch64"), "aarch64"),
        (lambda d: d.update(kernels="0"), "kernels 0"),
        (lambda d: d.pop("layers"), "layers"),
        (lambda d: d.update(layers=[1]), "tuning results"),
        (lambda d: entry(d)["ms"].update({"dense 3x4 tile 32": -1.0}), "times"),
        (lambda d: entry(d)["ms"].clear(), "times"),
        (lambda d: entry(d).pop("layer"), "layer"),
    ],
)
def test_damaged_and_foreign_files(
    edit: Callable[[dict[str, Any]], None], text: str, file: Path, native: targets.Target
) -> None:
    change(edit, file)
    with pytest.raises(UsageError, match=text) as caught:
        Tuning.read(file, native)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"3"])
def test_what_is_no_tuning_file(content: bytes, file: Path, native: targets.Target) -> None:
    file.write_bytes(content)
    with pytest.raises(UsageError, match="tuning file"):
        Tuning.read(file, native)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.json"):
        compile(perceptron(), shapes=SHAPES, tuning=tmp_path / "nowhere.json")


def test_a_way_that_is_no_candidate_is_refused(file: Path, native: targets.Target) -> None:
    """Such blocks could write outside their tile."""
    change(lambda d: entry(d).update(ms={"coded 2x9 tile 7": 0.0001}), file)
    case, found = layer_of(native)
    with pytest.raises(UsageError, match="coded 2x9 tile 7"):
        Tuning.read(file, native).choice(case, found, native)


def test_a_cross_target_cannot_be_tuned_here(tmp_path: Path) -> None:
    other = next(t for t in targets.KNOWN.values() if not targets.runs_here(t))
    with pytest.raises(UnsupportedError, match="--tune"):
        compile(perceptron(), str(other), shapes=SHAPES, tune=True, tuning=tmp_path / "t.json")
    assert not (tmp_path / "t.json").exists()


def test_another_cpu_is_not_mixed_in(file: Path, native: targets.Target) -> None:
    change(lambda d: d.update(cpu="another"), file)
    Tuning.read(file, native)  # to compile for that machine
    with pytest.raises(UsageError, match="CPU another"):
        tune.begin(file, native, lambda *_: None)


def test_tuning_measures_once_and_the_file_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, native: targets.Target
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    seen: list[tuple[str, int, int]] = []

    def progress(stage: str, done: int, total: int) -> None:
        seen.append((stage, done, total))

    first = compile(perceptron(), shapes=SHAPES, tune=True, keep_native=True, progress=progress)
    path = tuning.default_path(native)
    assert path.parent == tmp_path / "cache" / "sparsegraph"
    assert first.tuned is not None
    assert first.tuned.startswith("2 products measured, 0 known")
    assert [s for s in seen if s[0] == "tune"] == [("tune", 1, 2), ("tune", 2, 2)]
    stored = json.loads(path.read_text())
    for record in stored["layers"].values():
        times = list(record["ms"].values())
        assert len(times) > 1
        assert times == sorted(times)
        assert 0 < times[0] < 1
    layers = first.manifest.layers
    assert [row["is_measured"] for row in layers] == [True, True]
    assert {row["ms"] for row in layers} == {
        min(r["ms"].values()) for r in stored["layers"].values()
    }
    second = compile(perceptron(), shapes=SHAPES, tune=True, keep_native=True)
    assert second.tuned is not None
    assert second.tuned.startswith("0 products measured, 2 known")
    third = compile(perceptron(), shapes=SHAPES, tuning=path, keep_native=True)
    assert third.tuned is None
    assert digests(first.path) == digests(second.path) == digests(third.path)


def test_a_cache_that_cannot_be_used_is_replaced_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, native: targets.Target
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tuning.default_path(native)
    path.parent.mkdir()
    path.write_text("not JSON")
    tuner = tune.begin(None, native, lambda *_: None)
    assert "not used before" in str(tuner)
    case, found = layer_of(native)
    with tuner.saving():
        choice = tuner(case, found, native)
    assert choice.is_measured
    assert Tuning.read(path, native).layers.keys() == {tuning.key(case, found)}


def test_measurements_survive_what_goes_wrong_later(tmp_path: Path, native: targets.Target) -> None:
    path = tmp_path / "t.json"
    tuner = tune.begin(path, native, lambda *_: None)

    def interrupted() -> None:
        with tuner.saving():
            tuner(*layer_of(native), native)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(Tuning.read(path, native).layers) == 1


def test_other_kernels_are_measured_anew(file: Path, native: targets.Target) -> None:
    change(lambda d: d.update(kernels="0"), file)
    tuner = tune.begin(file, native, lambda *_: None)
    assert tuner.tuning.layers == {}
    assert "other kernels" in str(tuner)
