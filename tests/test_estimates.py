"""Plans for machines whose prices nobody measured: estimates of inner loops, named as such."""

import json
from pathlib import Path

import pytest
from sparsegraph.targets import get, inner_loop
from typer.testing import CliRunner

from benchmarks import estimate_cost
from sparsegraph import explain
from sparsegraph.cli import app
from sparsegraph.lower import choose, cost
from tests.lower.test_cost import product
from tests.targets import cross

MEASURED, IN_ORDER, GUESSED = "x86-64-v3", "cortex-a55", "cortex-m7"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The prices in a file of its own."""
    path = tmp_path / "costs.json"
    path.write_text(cost.FILE.read_text())
    monkeypatch.setattr(cost, "FILE", path)
    forget()
    yield path  # type: ignore[misc]
    monkeypatch.undo()
    forget()


def forget() -> None:
    cost._entries.cache_clear()
    cost._table.cache_clear()


def test_factors_scale_arithmetic_and_leave_memory(file: Path) -> None:
    known = cost.prices(get(MEASURED))
    cost.save(GUESSED, {"core": "some-core", "dense": 2.0, "coded": 3.0})
    found = cost.prices(get(GUESSED))
    arithmetic = ("fma", "load", "value", "mac", "tail", "transform2", "transform4")
    for kernel, factor in (("dense", 2), ("coded", 3), ("ort_product", 2), ("winograd_input", 2)):
        for name, price in known[kernel].items():
            scaled = factor if name in arithmetic else 1
            assert found[kernel][name] == pytest.approx(scaled * price)
    assert "some-core" in cost.basis(get(GUESSED))


def test_break_even_follows_the_estimate(file: Path) -> None:
    case, target = product(1536, 384, 128), get(GUESSED)
    limits = []
    for coded in (1.0, 2.0):
        cost.save(GUESSED, {"core": "some-core", "dense": 1.0, "coded": coded})
        limits.append(choose.choose(case, target).break_even)
    assert limits[1] < limits[0]


def test_measured_prices_stay(file: Path) -> None:
    before = cost.prices(get(MEASURED))
    cost.save(MEASURED, {"core": "some-core", "dense": 9.0, "coded": 9.0})
    assert cost.prices(get(MEASURED)) == before
    assert cost.basis(get(MEASURED)) == ""
    cost.save(GUESSED, {"core": "some-core", "dense": 9.0, "coded": 9.0})
    cost.save(GUESSED, {"prices": before})
    assert cost.prices(get(GUESSED)) == before
    assert cost.basis(get(GUESSED)) == ""


def test_the_words_of_reports() -> None:
    assert explain.prediction(MEASURED) == "predicted"
    assert explain.prediction(f"{MEASURED}+x86-64-v2") == "predicted"
    assert explain.prediction(IN_ORDER) == explain.prediction(GUESSED) == "estimated"
    assert "llvm-mca models cortex-a55" in cost.basis(get(IN_ORDER))
    assert cost.basis(get(GUESSED)) == "x86-64-v3's prices"


def test_inspect_says_that_times_are_estimated(model_file: Path, tmp_path: Path) -> None:
    words = ["inspect", str(model_file), "--dim", "batch=64", "--target", IN_ORDER]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    said = " ".join(done.stdout.split())
    assert "estimated: x86-64-v3's prices, inner loops as llvm-mca models cortex-a55" in said
    assert "predicted" not in said


def test_stored_factors_are_what_llvm_mca_says() -> None:
    cross.require(inner_loop.TOOL)
    stored = json.loads(cost.FILE.read_text())[IN_ORDER]
    if inner_loop.version() != stored["tool"]:
        pytest.skip(f"needs {stored['tool']} (Debian: llvm-{stored['tool'].split()[-1]})")
    found = estimate_cost.estimate(get(IN_ORDER))
    assert found is not None
    assert found["core"] == stored["core"]
    for weight in ("dense", "coded"):
        assert found[weight] == pytest.approx(stored[weight], rel=0.1)


def test_targets_without_an_estimate_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    before = cost.FILE.read_text()
    assert estimate_cost.main([MEASURED]) == 0
    assert capsys.readouterr().out == f"{MEASURED}: left out\n"
    assert cost.FILE.read_text() == before
