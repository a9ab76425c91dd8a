"""The cost model: what it must obey, what it chooses, and how wrong it is on unseen layers."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from sparsegraph.targets.kernels import gather
from sparsegraph.targets.layout import blocked, planar

from benchmarks import product_cost
from sparsegraph import targets
from sparsegraph.lower import choose, cost, problem, windows
from sparsegraph.lower.problem import Choice, Operands, Problem
from sparsegraph.lower.windows import Window

V3 = targets.get("x86-64-v3")
STORED = {
    name: Path(product_cost.__file__).parent / "results" / f"product-cost-{name}.json"
    for name in ("x86-64-v3", "x86-64-v4")
}
DENSITIES = (0.01, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0)


def product(rows: int, columns: int, points: int) -> Problem:
    x, y = (blocked(1, n, points, 1, V3) for n in (columns, rows))
    return problem.of(Operands(np.ones((rows, columns), np.float32), x, y, None), V3)


def convolution(rows: int, channels: int, size: int, kernel: int, stride: int = 1) -> Problem:
    pad = kernel // 2
    window = Window((size, size), (kernel, kernel), (stride, stride), (1, 1), (pad,) * 4)
    x = planar(1, channels, size * size, 1, V3)
    y = blocked(1, rows, window.out[0] * window.out[1], 1, V3)
    weight = np.ones((rows, channels, kernel, kernel), np.float32)
    return problem.of(Operands(weight, x, y, window), V3)


PROBLEMS = (
    product(1536, 384, 128), product(768, 3072, 384), product(1024, 1024, 49), product(64, 64, 8),
    convolution(64, 64, 56, 3), convolution(256, 128, 28, 3, 2), convolution(256, 64, 56, 1),
)  # fmt: skip


@pytest.mark.parametrize("case", PROBLEMS, ids=str)
def test_more_values_never_take_less_time(case: Problem) -> None:
    way = choose.coded(dataclasses.replace(case, density=0.1), V3)
    times = [cost.ours_ms(dataclasses.replace(case, density=d), way, V3) for d in DENSITIES]
    assert times[0] > 0
    assert all(a <= b for a, b in itertools.pairwise(times))


@pytest.mark.parametrize("case", PROBLEMS, ids=str)
@pytest.mark.parametrize("name", ["rows", "channels", "points"])
def test_more_work_takes_more_time(case: Problem, name: str) -> None:
    case = dataclasses.replace(case, patches=())  # those follow the extents of the map
    more = dataclasses.replace(case, **{name: 2 * getattr(case, name)})
    assert choose.choose(more, V3).ms > choose.choose(case, V3).ms
    assert cost.dense_ms(more, V3) > cost.dense_ms(case, V3)


@pytest.mark.parametrize("target", ["x86-64-v3", "x86-64-v4", "aarch64", "riscv64-v256"])
@pytest.mark.parametrize("case", PROBLEMS, ids=str)
def test_coded_is_chosen_exactly_below_the_break_even_density(case: Problem, target: str) -> None:
    machine = targets.get(target)
    limit = choose.choose(case, machine).break_even
    assert 0 < limit <= 1
    below = choose.choose(dataclasses.replace(case, density=limit * 0.98), machine)
    above = choose.choose(dataclasses.replace(case, density=min(1.0, limit + 0.01)), machine)
    assert below.weight == "coded"
    assert above.weight != "coded"
    assert below.ms <= above.ms + (choose.UNNOTICED_MS if limit <= 1 / 3 else 0)


@pytest.mark.parametrize(
    ("target", "rows", "columns", "density", "weight"),
    [("x86-64-v3", 37, 512, 0.1, "slots"), ("x86-64-v4", 10, 37, 0.1, "slots"),
     ("riscv64-v128", 37, 512, 0.1, "slots"), ("x86-64-v4", 10, 37, 0.5, "dense"),
     ("x86-64-v4", 1000, 1024, 0.3, "dense")],
)  # fmt: skip
def test_small_layers_are_stored_in_half_the_bytes_or_less(
    target: str, rows: int, columns: int, density: float, weight: str
) -> None:
    """Where it may cost a microsecond, not where it costs a hundred; one point."""
    machine = targets.get(target)
    case = Problem(
        rows, columns, 1, 1, 1, 1, machine.lanes, None, density, 1, 1, (1, 1), single=True
    )
    found, dense = choose.choose(case, machine), choose.dense(case, machine)
    assert found.weight == weight
    assert found.ms <= cost.ours_ms(case, dense, machine) + choose.UNNOTICED_MS


@pytest.mark.parametrize(
    ("target", "points", "columns", "weight"),
    [("x86-64-v4", 49, 512, "panels"), ("x86-64-v3", 49, 512, "panels"),
     ("x86-64-v4", 196, 512, "panels"), ("x86-64-v4", 16, 512, "panels"),
     ("x86-64-v4", 32, 512, "dense"), ("x86-64-v4", 64, 512, "dense"),
     ("x86-64-v3", 56, 512, "dense"), ("x86-64-v4", 49, 8, "dense"),
     ("aarch64", 49, 512, "dense"), ("a64fx", 49, 512, "dense"),
     ("riscv64-v256", 49, 512, "dense")],
)  # fmt: skip
def test_rows_are_in_the_lanes_where_points_would_waste_them(
    target: str, points: int, columns: int, weight: str
) -> None:
    """Not where they fill them, nor for few columns, nor where turning squares takes too long."""
    machine = targets.get(target)
    x, y = (blocked(1, n, points, 1, machine) for n in (columns, 512))
    case = problem.of(Operands(np.ones((512, columns), np.float32), x, y, None), machine)
    way = choose.choose(case, machine)
    assert (way.weight, way.format) == (weight, "dense")
    assert way.ms == cost.ours_ms(case, way, machine)
    assert bool(choose.panels(case, machine)) == (weight == "panels" or columns == 8)
    gathered = dataclasses.replace(case, gather=gather.FLAT)
    assert not choose.panels(gathered, machine)


def test_onnx_runtime_copies_the_windows_of_volumes() -> None:
    maps = dataclasses.replace(product(64, 64, 2048), taps=27)
    volumes = dataclasses.replace(maps, is_unfolded=True)
    assert 1.05 < cost.dense_ms(volumes, V3) / cost.dense_ms(maps, V3) < 1.5
    assert choose.choose(volumes, V3).speedup > 1.05 * choose.choose(maps, V3).speedup


def test_shared_zeros_are_cheaper_and_break_even_later() -> None:
    alone = dataclasses.replace(product(1536, 384, 128), density=0.1)
    shared = dataclasses.replace(alone, shared=2)
    a, b = choose.choose(alone, V3), choose.choose(shared, V3)
    assert b.ms < a.ms
    assert b.break_even > a.break_even


def test_strips_of_a_map_add_up_to_it() -> None:
    case = convolution(64, 3, 224, 7, 2)
    way = choose.winograd(case, 4, V3)
    cut, whole = (
        list(cost.counts(case, dataclasses.replace(way, tile=12), target))
        for target in (V3, dataclasses.replace(V3, l2_bytes=64 << 20))
    )
    assert [kernel for kernel, _ in cut] == [kernel for kernel, _ in whole]
    for (_, a), (_, b) in zip(cut, whole):
        work = {"fma", "transform4", "line4"} & a.keys()
        assert all(b[name] <= a[name] <= 1.2 * b[name] for name in work)
        assert work
    assert cut[0][1]["far"] == cut[1][1]["far"] == 0


def test_winograd_for_dense_weights_and_never_for_few() -> None:
    case = convolution(64, 64, 56, 3)
    dense = choose.choose(case, V3)
    assert dense.weight == "winograd-4"
    assert dense.speedup > 1.5
    assert choose.choose(dataclasses.replace(case, density=0.1), V3).weight == "coded"
    plain = choose.choose(dataclasses.replace(case, patches=()), V3)
    assert plain.weight == "dense"
    assert plain.break_even > dense.break_even


def test_a_nearly_dense_weight_stays_dense() -> None:
    """Kernels for few values would tie here, and their weights are larger."""
    case = dataclasses.replace(product(1152, 384, 197), density=0.999)
    coded, dense = (cost.ours_ms(case, way(case, V3), V3) for way in (choose.coded, choose.dense))
    assert coded < dense
    assert choose.choose(case, V3).weight == "dense"


def test_a_machine_that_was_never_measured_takes_half_the_bytes_of_a_single_point() -> None:
    case = Problem(1000, 1024, 1, 1, 1, 1, 1, None, 0.1, 1, 1, (1, 1), single=True)
    machine = targets.get("riscv64-v256")
    dense = cost.ours_ms(case, choose.dense(case, machine), machine)
    found = choose.choose(case, machine)
    assert found.weight == "slots"
    assert cost.weight_bytes(case, found) <= 2 * 1000 * 1024
    assert dense + choose.UNNOTICED_MS < found.ms <= 1.25 * dense + choose.UNNOTICED_MS


def test_a_gathered_panel_that_fits_is_not_cut() -> None:
    stem = convolution(64, 3, 224, 7, 2)
    assert choose.dense(stem, V3).tile == stem.columns
    assert choose.dense(convolution(64, 6, 224, 7, 2), V3).tile < 6 * 49
    assert choose.dense(product(1024, 240, 384), V3).tile < 240  # not gathered


@pytest.mark.parametrize(
    ("columns", "shared", "density", "tile"),
    [
        (768, 4, 0.2, 768), (2048, 4, 0.2, 2048), (4096, 4, 0.2, 256),
        (768, 1, 0.2, 128), (768, 1, 0.7, 96), (768, 2, 0.2, 128),
    ],
)  # fmt: skip
def test_panels_fit_the_cache_that_keeps_up(
    columns: int, shared: int, density: float, tile: int
) -> None:
    """Half of level 2 for four rows alike, else level 1; of dense rows less of it."""
    machine = targets.get("x86-64-v4")
    case = Problem(64, columns, 1, 1, 384, 4, 64, None, density, shared, 384, (1, 384))
    assert choose.coded(case, machine).tile == tile


def test_a_short_vector_counts_as_half_of_one() -> None:
    machine = targets.get("x86-64-v4")
    fma = {}
    for points, vectors in ((48, 3), (49, 4), (56, 4), (57, 4), (64, 4), (65, 4), (80, 4)):
        case = Problem(10, 20, 1, 3, points, vectors, 64, None, 0.1, 1, points, (1, points))
        ((_, counts),) = cost.counts(case, Choice("coded", 2, (vectors,), 20), machine)
        fma[points] = counts["fma"] / (3 * 20)  # images and values
    assert fma == {48: 3, 49: 3.5, 56: 3.5, 57: 4, 64: 4, 65: 4.5, 80: 5}


def test_gathering_is_not_free() -> None:
    direct, strided = convolution(256, 64, 28, 1), convolution(256, 64, 56, 1, 2)
    assert (direct.gather, strided.gather) == (None, 2)
    assert direct.macs == strided.macs
    assert choose.choose(strided, V3).ms > choose.choose(direct, V3).ms


def test_laying_even_and_odd_points_apart_is_not_free() -> None:
    strided = convolution(128, 32, 56, 3, 2)
    plain = dataclasses.replace(strided, source=strided.points)
    choice = choose.coded(strided, V3)
    (counts, free) = (dict(cost.counts(p, choice, V3))["coded"] for p in (strided, plain))
    assert counts["flat_vector"] - free["flat_vector"] == 32 * 56 * 56 / V3.lanes


def test_candidates_start_with_the_choice_and_differ() -> None:
    case = dataclasses.replace(convolution(64, 64, 56, 3), density=0.3)
    ways = [c.way for c in choose.candidates(case, V3)]
    assert ways[0] == choose.choose(case, V3).way
    assert len(set(ways)) == len(ways) > 4
    assert {w.split()[0] for w in ways} == {"dense", "coded", "winograd-2", "winograd-4"}


def test_lowering_and_kernels_agree_on_flat_gathers() -> None:
    assert windows.FLAT == gather.FLAT


def test_the_fit_finds_prices_and_foreign_times_show() -> None:
    records = json.loads(STORED[V3.name].read_text())["records"][::3]
    for record in records:
        record["ms"] = [2 * ms for ms in _model(record)]
    doubled = product_cost.fit(records, V3)
    known = cost.prices(V3)
    assert doubled["ort_product"]["mac"] == pytest.approx(2 * known["ort_product"]["mac"], rel=0.1)
    errors = product_cost.held_out(records, V3)
    assert np.median(np.abs(errors)) < 0.02
    layer = records[0]["layer"]
    for record in records:
        if record["layer"] == layer:
            record["ms"] = [3 * ms for ms in record["ms"]]
    errors = product_cost.held_out(records, V3)
    wrong = [e for e, r in zip(errors, records) if r["layer"] == layer]
    assert np.median(wrong) < -0.5, "a layer is predicted by the others"


def _model(record: product_cost.Record) -> list[float]:
    """The model's milliseconds of every call of a record."""
    found = product_cost.samples([record], V3)
    prices = cost.prices(V3)
    by_call = [
        sum(prices[kernel].get(name, 0.0) * value for name, value in n.items()) / 1e6
        for kernel, rows in found.items()
        for _, n, _ in rows
    ]
    assert len(by_call) == len(record["ms"])
    return by_call


@pytest.mark.parametrize("name", STORED)
def test_the_published_error_on_unseen_layers_is_what_the_measurements_give(name: str) -> None:
    data, target = json.loads(STORED[name].read_text()), targets.get(name)
    records = data["records"]
    found = product_cost.table(records, product_cost.held_out(records, target))
    stored = {row["family"]: row for row in data["held_out"]}
    for row in found:
        assert row["records"] == stored[row["family"]]["records"]
        assert row["median"] == pytest.approx(stored[row["family"]]["median"], abs=0.01)
        assert row["median"] <= product_cost.BAR, row
    assert stored["all of ours"]["records"] > 900
    assert len({r["layer"] for r in records}) >= 60


@pytest.mark.parametrize("name", STORED)
def test_the_prices_in_use_are_fitted_to_the_stored_measurements(name: str) -> None:
    records, target = json.loads(STORED[name].read_text())["records"], targets.get(name)
    fitted, prices = product_cost.fit(records, target), cost.prices(target)
    for record in records[::7]:
        want = product_cost.predicted(record, fitted, target)
        assert product_cost.predicted(record, prices, target) == pytest.approx(want, rel=0.02)


def test_of_two_measurements_the_shorter_counts() -> None:
    records = json.loads(STORED[V3.name].read_text())["records"][:6]
    slower = [{**r, "ms": [2 * ms for ms in r["ms"]]} for r in records]
    mixed = [*slower[:3], *records[3:]]
    assert product_cost.shorter(mixed, records[:5]) == records
    assert product_cost.shorter([], slower) == slower
