"""Tuning on devices: what they measure goes into the plan; the fastest candidate wins."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from sparsegraph.targets import Target, get, native
from typer.testing import CliRunner

from sparsegraph import device_bench, device_tune
from sparsegraph.cli import app
from sparsegraph.compile import compile
from sparsegraph.device_bench import DeviceBench, DeviceTime
from sparsegraph.devices import Device
from sparsegraph.errors import UnsupportedError, UsageError
from sparsegraph.lower import choose, trial
from sparsegraph.tuning import Tuning
from tests.conftest import BATCH
from tests.targets import cross
from tests.test_tuning import layer_of

SHAPES = {"batch": BATCH}


def device(target: Target, **changes: object) -> Device:
    words = {"name": "shelf", "target": str(target), "run": ("{words}",), "repeats": 2}
    return Device(**{**words, "retries": 0, **changes})  # type: ignore[arg-type]


def test_every_candidate_is_timed_by_its_own_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    target = native()
    case, operands = layer_of(target)
    tried = choose.candidates(case, target)[:3]
    programs = [trial.lower(operands, choice, target) for choice in tried]
    kernels = device_tune.Kernels(target, device(target))
    times = kernels.time(programs, rounds=1, block_ms=1)
    assert [len(t) for t in times] == [len(p.steps) for p in programs]
    assert all(0 < ms < 100 for steps in times for ms in steps)
    counted = [(f"step {i}", float(i)) for i in range(sum(len(p.steps) for p in programs))]
    row = DeviceTime("shelf", str(target), 1, 1, 1, 1.0, 1.0, tuple(counted))
    monkeypatch.setattr(device_bench, "bench", lambda *_: DeviceBench("", "", str(target), (row,)))
    found = kernels.time(programs, rounds=1, block_ms=1)
    assert [ms for steps in found for ms in steps] == pytest.approx(
        [ms or 1e-6 for _, ms in counted]
    )


def test_merged_programs_share_no_buffer() -> None:
    target = native()
    case, operands = layer_of(target)
    program = trial.lower(operands, choose.choose(case, target), target)
    both = device_tune.merged([program, program])
    assert len(both.steps) == 2 * len(program.steps)
    assert len(both.weights) == 2 * len(program.weights)
    assert len(both.temporaries) == 2 * len(program.temporaries)
    first, second = both.steps[0].args, both.steps[len(program.steps)].args
    assert all(a != b for a, b in zip(first, second) if hasattr(a, "buffer"))
    for name, array in program.weights.items():
        np.testing.assert_array_equal(both.weights[f"1.{name}"], array)


def test_what_a_device_measured_makes_the_plan(model_file: Path, tmp_path: Path) -> None:
    target, file = native(), tmp_path / "tuning.json"
    shelf = device(target)
    first = compile(
        model_file, shapes=SHAPES, tune=True, tuning=file, devices=[shelf],
        output=tmp_path / "a.sg", keep_native=True,
    )  # fmt: skip
    assert "2 products measured, 0 known" in str(first.tuned)
    found = Tuning.read(file, target)
    assert found.cpu == "device shelf"
    assert all(len(m.ms) > 1 for m in found.layers.values())
    assert all(layer["is_measured"] for layer in first.manifest.layers)
    chosen = sorted(layer["ms"] for layer in first.manifest.layers)
    assert chosen == sorted(min(m.ms.values()) for m in found.layers.values())
    again = compile(
        model_file, shapes=SHAPES, tune=True, tuning=file, devices=[shelf],
        output=tmp_path / "b.sg", keep_native=True,
    )  # fmt: skip
    assert "0 products measured, 2 known" in str(again.tuned)
    other = dataclasses.replace(found, cpu="device attic")
    other.write(file)
    with pytest.raises(UsageError, match="CPU device attic"):
        compile(model_file, shapes=SHAPES, tune=True, tuning=file, devices=[shelf])


def test_a_device_that_fails_is_named(model_file: Path, tmp_path: Path) -> None:
    broken = device(native(), run=("false", "{words}"))
    with pytest.raises(UnsupportedError, match="device 'shelf': found exit code 1"):
        compile(model_file, shapes=SHAPES, tune=True, tuning=tmp_path / "t.json", devices=[broken])


def test_refusals(model_file: Path) -> None:
    pi = device(get("raspberry-pi-5"))
    with pytest.raises(UsageError, match=r"shelf \(raspberry-pi-5\)"):
        compile(model_file, shapes=SHAPES, tune=True, devices=[pi])
    with pytest.raises(UsageError, match="--tune"):
        compile(model_file, shapes=SHAPES, devices=[pi])


def test_a_cross_target_is_tuned_on_an_emulated_device(model_file: Path, tmp_path: Path) -> None:
    target = get("aarch64")
    cross.require(*target.linker, *target.emulator[:1])
    inventory, file = tmp_path / "devices.toml", tmp_path / "tuning.json"
    run = json.dumps([*target.emulator, "{words}"])
    inventory.write_text(f'[devices.shelf]\ntarget = "aarch64"\nrun = {run}\nrepeats = 2\n')
    words = ["compile", str(model_file), "--target", "aarch64", "--tune", "--tuning", str(file)]
    words += ["--devices", str(inventory), "--dim", f"batch={BATCH}", "-o", str(tmp_path / "m.sg")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "2 products measured" in done.stdout
    assert json.loads(file.read_text())["cpu"] == "device shelf"
