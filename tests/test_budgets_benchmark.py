"""The benchmark of latency budgets: equal times for both, and what the published rows must hold."""

from pathlib import Path

import onnx_ir as ir
import pytest

from benchmarks import budgets, pruning
from benchmarks.budgets import BUDGET, DENSE, ORT, UNIFORM, Row, next_density, read, save, table
from benchmarks.quality_tasks import Score, Task
from sparsegraph.budget.measured import Timing
from tests.test_budget import MS, encoder
from tests.test_prune import feeds

FIXED, PER_WEIGHT, DENSE_MS = 1.0, 8.0, 10.0


def task() -> Task:
    def score(model: ir.Model) -> Score:
        return Score(pruning.density(Task("", encoder(), [], score), "wanda:0.5", model), 10, 0.5)

    return Task("toy", encoder(), feeds(8), score, "data", fresh=feeds(4, seed=7))


def clock(model: ir.Model) -> Timing:
    """Time grows with the number of weights, less than in proportion."""
    ms = FIXED + PER_WEIGHT * pruning.density(task(), "wanda:0.5", model) ** 0.8
    return Timing(ms, DENSE_MS, ((("up", "down", "head"), ms),))


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("start", [0.1, 0.9])
def test_the_uniform_model_takes_the_time_that_it_is_given(share: float, start: float) -> None:
    found = budgets.uniform_at(task(), "wanda:0.5", share, clock, start)
    timing = clock(found)
    assert timing.ms / timing.dense_ms == pytest.approx(share, rel=0.03)


def test_the_next_density_lies_on_the_line_through_the_nearest_points() -> None:
    assert next_density([(0.5, 4.0)], 2.0) == 0.25
    assert next_density([(0.5, 4.0), (0.3, 3.0)], 2.0) == pytest.approx(0.1)
    assert next_density([(0.9, 9.0), (0.5, 4.0), (0.3, 3.0)], 3.5) == pytest.approx(0.4)
    assert next_density([(0.5, 4.0), (0.5, 4.0)], 2.0) == 0.25
    assert next_density([(0.5, 4.0), (0.3, 3.0)], 0.1) == 0.01
    assert next_density([(0.5, 4.0), (0.3, 3.0)], 99.0) == 1.0


def test_a_measurement_has_all_four_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "timer", lambda target, feed: clock)
    fixed = {ORT: 20.0, DENSE: 18.0, BUDGET: 9.9, UNIFORM: 10.1}
    monkeypatch.setattr(budgets, "times", lambda models, feed: fixed)
    monkeypatch.setattr("sparsegraph.budget.table.dense_node_ms", lambda model, feed: MS)
    job = task()
    for limit, share in (("0.5x", 0.5), ("0.5x-own", 0.45)):
        rows = {row.way: row for row in budgets.measure(job, "wanda:0.5", limit)}
        assert {way: row.ms for way, row in rows.items()} == fixed
        assert {row.limit_ms for row in rows.values()} == {share * fixed[ORT]}
        assert rows[ORT].divergence == rows[DENSE].divergence == 0
        assert rows[ORT].density == rows[DENSE].density == 1
        settled = rows[BUDGET].settled_ms
        assert settled is not None
        assert 0.9 < settled / rows[BUDGET].limit_ms <= 1
        assert rows[UNIFORM].density == pytest.approx(rows[BUDGET].density, abs=0.1)
        assert rows[BUDGET].share == pytest.approx(rows[BUDGET].density)
        assert min(rows[way].divergence for way in (BUDGET, UNIFORM)) > 0


def test_rows_merge_by_task_and_limit(tmp_path: Path) -> None:
    def row(limit: str, way: str, ms: float) -> Row:
        return Row("job", "r", limit, way, 0.5, ms, 5.0, None, 0.25, 0.9, None, "d", "c")

    path = tmp_path / "b.json"
    save(path, [row("0.5x", ORT, 10.0), row("0.5x", BUDGET, 5.0), row("0.4x", ORT, 9.0)], [])
    save(path, [row("0.5x", ORT, 8.0), row("0.5x", BUDGET, 4.0)], [])
    assert [(r.limit, r.ms) for r in read(path)] == [("0.4x", 9.0), ("0.5x", 8.0), ("0.5x", 4.0)]
    last = table(read(path)).splitlines()[-1].split()
    assert last == ["job", "0.5x", "budget", "50.0%", "4.00", "0.500", "0.800", "0.2500", "0.900"]


@pytest.mark.parametrize("name", ["budgets.json", "budgets-avx512.json"])
def test_published_budgets_hold_and_beat_one_density_for_all(name: str) -> None:
    """Half of ONNX Runtime's time within 5 %, at least 20 % less divergence at equal time."""
    rows = {(r.task, r.limit, r.way): r for r in read(budgets.FILE.with_name(name))}
    assert {task for task, _, _ in rows} == {"minilm", "resnet50"}
    for job in {task for task, _, _ in rows}:
        budget, uniform = (rows[job, "0.5x", way] for way in (BUDGET, UNIFORM))
        assert 0.5 * rows[job, "0.5x", ORT].ms == pytest.approx(budget.limit_ms)
        assert 0.9 * budget.limit_ms < budget.ms <= 1.05 * budget.limit_ms
        assert uniform.ms == pytest.approx(budget.ms, rel=0.03)
        assert budget.divergence < 0.8 * uniform.divergence
    assert (rows["minilm", "0.5x", BUDGET].rho or 0) > (rows["minilm", "0.5x", UNIFORM].rho or 1)
