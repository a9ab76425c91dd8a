"""The harness itself: statistics, pruning patterns, result files, bars, tables, peers."""

import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from benchmarks import (
    bars,
    compile_cost,
    measure,
    page,
    plot,
    prune,
    real_models,
    report,
    results,
    roofline,
    run,
    zoo,
)
from benchmarks import timing as timing_module
from benchmarks.engines import prepare, relative_error
from benchmarks.timing import Plan, Samples, interleave, pinned, wait_clock
from benchmarks.workloads import DENSITIES, WORKLOADS, Workload, of_kind
from benchmarks.zoo import tagger

QUICK = Plan(rounds=2, block_ms=2)
MS = 1_000_000


def weight_of(model: onnx.ModelProto, name: str) -> np.ndarray:
    return numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == name))


def a_row(**changes: object) -> results.Row:
    row = results.Row(
        kind="models",
        workload="resnet50",
        density=0.1,
        pattern="unstructured",
        engine="sparsegraph",
        threads=1,
        median_ms=10.0,
        min_ms=9.0,
        reference_ms=25.0,
        reference_min_ms=18.0,
        max_rel_error=2e-6,
        gmacs=4.0,
    )
    return replace(row, **changes)


def some_results(*rows: results.Row) -> results.Results:
    return results.Results("python -m x", "abc", "2026-01-01", results.machine(), {}, list(rows))


class TestTiming:
    def test_samples_that_waited_are_dropped(self) -> None:
        samples = Samples()
        for duration in (10, 11, 12, 13, 14):
            samples.add(duration * MS, waited_ns=0)
        samples.add(100 * MS, waited_ns=50 * MS)
        samples.add(1 * MS, waited_ns=MS // 40)
        summary = samples.summary()
        assert (summary.median_ms, summary.min_ms) == (12, 10)
        assert (summary.n_samples, summary.n_dropped, summary.is_noisy) == (5, 2, False)

    def test_too_few_clean_samples_count_all_and_say_so(self) -> None:
        samples = Samples()
        samples.add(10 * MS, waited_ns=0)
        samples.add(30 * MS, waited_ns=20 * MS)
        summary = samples.summary()
        assert (summary.median_ms, summary.n_samples, summary.is_noisy) == (20, 2, True)

    def test_engines_take_turns_and_the_order_turns_around(self) -> None:
        blocks: list[str] = []

        def engine(name: str):  # type: ignore[no-untyped-def]
            def call() -> None:
                if not blocks or blocks[-1] != name:
                    blocks.append(name)
                time.sleep(0.0005)

            return call

        interleave({"a": engine("a"), "b": engine("b")}, Plan(rounds=4, block_ms=2))
        warm_up, rest = blocks[:2], blocks[2:]
        assert warm_up == ["a", "b"]
        assert rest == ["a", "b", "a", "b", "a"]  # a b, b a, a b, b a with neighbours merged

    def test_first_sample_of_each_block_is_dropped(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(timing_module, "MAX_WAIT_FRACTION", math.inf)
        n_calls = 0

        def call() -> None:
            nonlocal n_calls
            n_calls += 1

        times = interleave({"a": call}, Plan(rounds=5, block_ms=0))
        assert n_calls == 1 + 5 * timing_module.MIN_BLOCK_SAMPLES
        assert times["a"].n_samples == 5 * (timing_module.MIN_BLOCK_SAMPLES - 1)

    def test_slower_engine_measures_slower_by_its_factor(self) -> None:
        calls = {"fast": lambda: time.sleep(0.001), "slow": lambda: time.sleep(0.004)}
        times = interleave(calls, Plan(rounds=3, block_ms=20))
        assert 2 < times["slow"].median_ms / times["fast"].median_ms < 6

    def test_wait_clock_reads_the_second_field(self, tmp_path: Path) -> None:
        stat = tmp_path / "schedstat"
        stat.write_text("123 456 7\n")
        with wait_clock(str(stat)) as waited:
            assert waited() == 456
        with wait_clock(str(tmp_path / "missing")) as waited:
            assert waited() == 0

    @pytest.mark.skipif(not hasattr(__import__("os"), "sched_setaffinity"), reason="Linux only")
    def test_pinning_ends_with_the_block(self) -> None:
        import os

        before = os.sched_getaffinity(0)
        with pinned(1) as cores:
            assert os.sched_getaffinity(0) == set(cores)
            assert len(cores) == 1
        assert os.sched_getaffinity(0) == before


class TestRelativeError:
    def test_is_the_largest_over_outputs_and_relative_to_the_reference(self) -> None:
        expected = [np.array([1.0, -2.0]), np.array([100.0])]
        found = [np.array([1.0, -1.9]), np.array([101.0])]
        assert relative_error(found, expected) == pytest.approx(0.05)

    @pytest.mark.parametrize(
        ("found", "expected"),
        [
            ([np.nan], [1.0]),
            ([1.0], [np.nan]),
            ([np.inf], [-np.inf]),
            ([1.0], [0.0]),
            ([1.0, 2.0], [1.0]),
        ],
    )
    def test_mismatch_is_infinite(self, found: list[float], expected: list[float]) -> None:
        assert relative_error([np.array(found)], [np.array(expected)]) == math.inf

    def test_missing_output_is_infinite(self) -> None:
        assert relative_error([], [np.ones(1)]) == math.inf

    def test_equal_infinities_and_zeros_are_no_error(self) -> None:
        same = [np.array([np.inf, np.nan, 0.0, 3.0]), np.zeros(4)]
        assert relative_error(same, [a.copy() for a in same]) == 0


class TestPrune:
    @pytest.mark.parametrize("density", [0.0, 0.02, 0.1, 0.5, 0.999, 1.0])
    def test_density_is_exact_and_the_largest_survive(self, density: float) -> None:
        model = zoo.build("gemm", m=2, k=64, n=48)
        before = weight_of(model, "linear.weight")
        after = weight_of(prune.magnitude(model, density), "linear.weight")
        kept = after != 0
        assert kept.sum() == round(density * before.size)
        np.testing.assert_array_equal(after[kept], before[kept])
        if 0 < density < 1:
            assert np.abs(before[kept]).min() >= np.abs(before[~kept]).max()

    def test_input_model_is_left_alone(self) -> None:
        model = zoo.build("digits_cnn")
        before = model.SerializeToString()
        prune.magnitude(model, 0.1)
        assert model.SerializeToString() == before

    @pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 16), (3, 5)])
    def test_n_of_m_along_inputs(self, n: int, m: int) -> None:
        model = prune.magnitude(zoo.build("gemm", m=2, k=80, n=24), 0.5, pattern=f"{n}:{m}")
        groups = weight_of(model, "linear.weight").reshape(24, 80 // m, m)
        assert (np.count_nonzero(groups, axis=2) == n).all()

    def test_n_of_m_in_a_convolution_runs_along_input_channels(self) -> None:
        model = zoo.build("conv", c_in=8, c_out=4, size=5)
        weight = weight_of(prune.magnitude(model, 0.5, pattern="2:4"), "conv.weight")
        groups = np.moveaxis(weight, 1, -1).reshape(4, 3, 3, 2, 4)
        assert (np.count_nonzero(groups, axis=-1) == 2).all()

    def test_n_of_m_keeps_at_most_n_of_a_short_last_group(self) -> None:
        model = prune.magnitude(zoo.build("gemm", m=2, k=7, n=5), 0.5, pattern="2:4")
        weight = weight_of(model, "linear.weight")
        assert (np.count_nonzero(weight[:, :4], axis=1) == 2).all()
        assert (np.count_nonzero(weight[:, 4:], axis=1) == 2).all()

    @pytest.mark.parametrize("rows", [4, 8, 16])
    def test_row_groups_share_every_index(self, rows: int) -> None:
        model = prune.magnitude(zoo.build("gemm", m=2, k=40, n=32), 0.25, pattern=f"{rows}x1")
        kept = weight_of(model, "linear.weight").reshape(32 // rows, rows, 40) != 0
        assert (kept.all(axis=1) == kept.any(axis=1)).all()
        assert kept.mean() == pytest.approx(0.25, abs=rows / kept.size)

    def test_row_groups_follow_outputs_of_a_matmul_weight(self) -> None:
        model = zoo.build("minilm", sequence=4, layers=1)
        pruned = prune.magnitude(model, 0.1, pattern="4x1")
        kept = weight_of(pruned, "encoder.layer.0.intermediate.dense.weight") != 0  # [in, out]
        groups = kept.reshape(384, 1536 // 4, 4)
        assert (groups.all(axis=2) == groups.any(axis=2)).all()

    def test_row_groups_follow_outputs_of_a_transposed_convolution(self) -> None:
        weight = np.random.default_rng(0).standard_normal((6, 8, 2, 2)).astype(np.float32)
        graph = onnx.helper.make_graph(
            [onnx.helper.make_node("ConvTranspose", ["x", "w"], ["y"])],
            "g",
            [onnx.helper.make_tensor_value_info("x", 1, (1, 6, 3, 3))],
            [onnx.helper.make_tensor_value_info("y", 1, (1, 8, 4, 4))],
            [numpy_helper.from_array(weight, "w")],
        )
        pruned = prune.magnitude(onnx.helper.make_model(graph), 0.5, pattern="4x1")
        groups = weight_of(pruned, "w").reshape(6, 2, 4, 4) != 0
        assert (groups.all(axis=2) == groups.any(axis=2)).all()
        assert groups.mean() == 0.5

    def test_blocks(self) -> None:
        model = prune.magnitude(zoo.build("gemm", m=2, k=96, n=64), 0.5, pattern="32x32")
        blocks = weight_of(model, "linear.weight").reshape(2, 32, 3, 32) != 0
        per_block = blocks.sum(axis=(1, 3))
        assert sorted(per_block.ravel()) == [0] * 3 + [1024] * 3

    @pytest.mark.parametrize("pattern", ["banana", "4:2", "4:4", "0x1", "x1"])
    def test_unknown_pattern_is_refused(self, pattern: str) -> None:
        with pytest.raises(ValueError, match="unknown pattern"):
            prune.magnitude(zoo.build("gemm", m=1, k=4, n=4), 0.5, pattern=pattern)

    def test_density_out_of_range_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"found density 1\.5"):
            prune.magnitude(zoo.build("gemm", m=1, k=4, n=4), 1.5)

    @pytest.mark.parametrize(
        ("name", "n_layers", "excluded"),
        [
            ("resnet18", 20, "conv1.weight"),
            ("mobilenet_v1", 13, "blocks.0.depthwise.weight"),
            ("minilm", 36, "embeddings.word_embeddings.weight"),
            ("deit_tiny", 48, "patch_embed.proj.weight"),
        ],
    )
    def test_published_selections(self, name: str, n_layers: int, excluded: str) -> None:
        model = zoo.build(name)
        chosen = [layer.weight for layer in prune.selected(model)]
        assert len(chosen) == n_layers
        assert excluded not in chosen

    def test_pruned_model_has_the_density_in_chosen_layers_and_nowhere_else(self) -> None:
        model = zoo.build("digits_cnn")
        pruned = prune.magnitude(model, 0.25, layers=prune.all_but_the_stem)
        found = prune.densities(pruned, prune.layers(pruned))
        assert found.pop("conv1.weight") == 1
        assert list(found.values()) == [0.25] * 3

    @pytest.mark.parametrize("pattern", ["unstructured", "16x1"])
    def test_both_weights_of_a_recurrence_are_pruned(self, pattern: str) -> None:
        model = tagger.tagger(2, width=32, hidden=32)
        pruned = prune.magnitude(model, 0.25, pattern=pattern)
        found = prune.densities(pruned, prune.selected(pruned))
        names = ["lstm.0.w", "lstm.0.r", "lstm.1.w", "lstm.1.r", "head.weight"]
        assert found == dict.fromkeys(names, 0.25)

    def test_everything_means_embeddings_too(self) -> None:
        model = zoo.build("minilm", sequence=8, layers=1)
        pruned = prune.magnitude(model, 0.25, layers=prune.everything)
        found = prune.densities(pruned, prune.layers(pruned))
        assert len(found) == 9  # three tables, six products
        assert found == dict.fromkeys(found, 0.25)
        spared = prune.magnitude(model, 0.25, layers=prune.all_layers)
        assert list(prune.densities(spared, prune.layers(spared)).values()).count(0.25) == 6

    def test_recurrences_count(self) -> None:
        sizes = [(32, 32), (64, 32)]  # inputs and units of a layer, both ways
        per_token = sum(2 * 4 * units * (inputs + units) for inputs, units in sizes) + 64 * 32
        assert zoo.macs(tagger.tagger(2, width=32, hidden=32)) == 2 * per_token

    def test_weights_in_constant_nodes_are_pruned_too(self) -> None:
        model = zoo.build("gemm", m=2, k=8, n=8)
        (tensor,) = (t for t in model.graph.initializer if t.name == "linear.weight")
        node = onnx.helper.make_node("Constant", [], ["linear.weight"], value=tensor)
        model.graph.initializer.remove(tensor)
        model.graph.node.insert(0, node)
        pruned = prune.magnitude(model, 0.25)
        assert prune.densities(pruned, prune.layers(pruned)) == {"linear.weight": 0.25}


class TestResults:
    def test_round_trip(self, tmp_path: Path) -> None:
        found = results.begin(["benchmarks.run", "layers"])
        found.rows.append(a_row())
        found.costs.append(results.Cost("resnet50", 0.1, compile_s=3.5))
        found.save(tmp_path / "r.json")
        assert results.load(tmp_path / "r.json") == found
        assert [p.name for p in tmp_path.iterdir()] == ["r.json"]

    def test_file_says_where_and_how(self, tmp_path: Path) -> None:
        results.begin(["benchmarks.run", "layers"]).save(tmp_path / "r.json")
        data = json.loads((tmp_path / "r.json").read_text())
        assert data["command"] == "python -m benchmarks.run layers"
        assert data["schema"] == results.SCHEMA
        assert data["commit"]
        assert data["machine"]["cpu"]
        assert data["machine"]["cores"] >= 1
        assert data["versions"]["onnxruntime"]

    def test_another_schema_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "r.json").write_text('{"schema": 99}')
        with pytest.raises(ValueError, match="found schema 99, need 1"):
            results.load(tmp_path / "r.json")

    def test_merged_files_keep_all_rows_and_the_later_row_counts(self) -> None:
        old = some_results(a_row(median_ms=100.0))
        merged = results.merge([old, some_results(a_row())])
        assert len(merged.rows) == 2
        reached = {v.bar.density: v.reached for v in bars.judge(merged, bars.FOUNDATION)
                   if v.bar.workload == "resnet50" and v.bar.metric == "speedup"}  # fmt: skip
        assert reached[0.1] == 2.5

    def test_files_of_different_machines_do_not_merge(self) -> None:
        other = replace(some_results(), machine={"cpu": "another"})
        with pytest.raises(ValueError, match="found another"):
            results.merge([other, some_results()])

    def test_ratio_is_how_much_faster_than_the_reference(self) -> None:
        assert a_row().ratio == 2.5
        assert a_row(median_ms=None).ratio is None


class TestBars:
    def test_bars_are_those_of_the_issue(self) -> None:
        required = {
            (b.workload, b.density): b.required for b in bars.FOUNDATION if b.required != 0.97
        }
        assert required[("resnet50", 0.1)] == 2.4
        assert required[("minilm-128", 0.05)] == 4.2
        assert required[(bars.GEMM, 0.02)] == 18
        assert len(required) == 14

    def test_every_bar_names_a_workload(self) -> None:
        all_bars = (*bars.FOUNDATION, *bars.FRONTIER, *bars.COST)
        assert {b.workload for b in all_bars} <= set(WORKLOADS)

    @pytest.mark.parametrize(("median", "passes"), [(10.0, True), (10.5, False)])
    def test_speed_bar(self, median: float, passes: bool) -> None:
        found = some_results(a_row(median_ms=median, reference_ms=24.0))
        verdict = next(v for v in bars.judge(found, bars.FOUNDATION) if v.bar.workload == "resnet50"
                       and v.bar.density == 0.1 and v.bar.metric == "speedup")  # fmt: skip
        assert verdict.passes is passes

    def test_unpruned_rows_as_measured_count_for_both_dense_bars(self) -> None:
        setup = measure.Setup(engines=("ort-plain",), plan=QUICK)
        row = measure.measure(WORKLOADS["digits_cnn"], 1.0, setup)[1]
        ours = replace(row, engine="sparsegraph", workload="resnet50")
        verdicts = [
            v for v in bars.judge(some_results(ours), bars.FOUNDATION) if v.reached is not None
        ]
        assert [v.bar.required for v in verdicts] == [0.85, 0.97, 1e-4]

    def test_unmeasured_bar_fails(self) -> None:
        verdicts = bars.judge(some_results(), bars.FRONTIER)
        assert len(verdicts) == len(bars.FRONTIER) + len(bars.COST)
        assert not any(v.passes for v in verdicts)

    @pytest.mark.parametrize("changes", [{"engine": "ort"}, {"pattern": "4x1"}, {"threads": 2}])
    def test_rows_of_others_do_not_count(self, changes: dict[str, object]) -> None:
        verdicts = bars.judge(some_results(a_row(**changes)), bars.FOUNDATION)
        assert all(v.reached is None for v in verdicts if v.bar.metric == "speedup")

    def test_bar_of_a_pattern_takes_rows_of_that_pattern(self) -> None:
        rows = [a_row(workload=bars.GEMM, pattern=p, median_ms=m) for p, m in
                (("unstructured", 5.0), ("4x1", 2.5))]  # fmt: skip
        verdicts = bars.judge(some_results(*rows), bars.FRONTIER)
        reached = {v.bar.pattern: v.reached for v in verdicts
                   if v.bar.metric == "speedup" and v.reached is not None}  # fmt: skip
        assert reached == {"unstructured": 5.0, "4x1": 10.0}

    def test_two_threads_are_compared_with_one(self) -> None:
        rows = [a_row(threads=n, median_ms=m) for n, m in ((1, 10.0), (2, 6.0))]
        for found, expected in ((rows, 10 / 6), (rows[:1], None)):
            verdicts = bars.judge(some_results(*found), bars.FRONTIER)
            verdict = next(v for v in verdicts if v.bar.metric == "two threads"
                           and v.bar.workload == "resnet50")  # fmt: skip
            assert verdict.reached == expected

    @pytest.mark.parametrize(("error", "passes"), [(9e-5, True), (2e-4, False), (math.inf, False)])
    def test_error_bar(self, error: float, passes: bool) -> None:
        verdict = bars.judge(some_results(a_row(max_rel_error=error)), bars.FOUNDATION)[-1]
        assert verdict.bar.metric == "max_rel_error"
        assert verdict.passes is passes

    def test_cost_bars(self) -> None:
        found = some_results()
        cost = results.Cost("resnet50", 0.1, 59.0, 4 * bars.GIB, 70, 100, 50)
        found.costs.append(cost)
        verdicts = {
            v.bar.metric: v
            for v in bars.judge(found, ())
            if v.bar.workload == "resnet50" and v.bar.is_limit
        }
        assert verdicts["compile_s"].passes
        assert not verdicts["peak_memory_gib"].passes
        assert verdicts["weight_ratio"].reached == 0.2


class TestReport:
    def test_table_shows_the_ratio_and_the_error_beside_it(self) -> None:
        text = report.markdown(report.rows_table(some_results(a_row())))
        assert "| resnet50 | 90 | unstructured | sparsegraph | 10.000 (9.000) | 25.000 " in text
        assert "2.50 (2.00) | 400.0 | 2.0e-06" in text

    def test_failed_engine_shows_its_reason(self) -> None:
        row = a_row(median_ms=None, min_ms=None, error="ValueError: no kernel")
        header, (cells,) = report.rows_table(some_results(row))
        assert cells[-1] == "ValueError: no kernel"
        assert len(cells) == len(header)

    def test_missed_bar_is_loud(self) -> None:
        _, rows = report.bars_table(bars.judge(some_results(), bars.FOUNDATION))
        assert {row[6] for row in rows} == {"MISS"}

    def test_plot_is_wellformed_and_has_a_line_per_engine(self) -> None:
        rows = [
            a_row(engine=e, density=d, median_ms=d * 10 + 1)
            for e in ("ort", "a&b")
            for d in (1.0, 0.1)
        ]
        drawn = plot.plots([*rows, a_row(workload="alone")])
        assert list(drawn) == ["resnet50"]
        tree = ElementTree.fromstring(drawn["resnet50"])
        tags = [element.tag.rpartition("}")[2] for element in tree.iter()]
        assert tags.count("circle") == 4
        assert "a&b" in [element.text for element in tree.iter()]

    def test_patterns_have_plots_of_their_own_and_labels_keep_apart(self) -> None:
        rows = [a_row(density=d, median_ms=1.0) for d in (0.5, 0.1, 0.05, 0.02)]
        rows += [a_row(density=d, median_ms=1.0, pattern="4x1") for d in (0.2, 0.1)]
        drawn = plot.plots(rows)
        assert list(drawn) == ["resnet50", "resnet50 4x1"]
        labels = [e.text for e in ElementTree.fromstring(drawn["resnet50"]).iter()]
        assert [t for t in labels if t and t.endswith("%")] == ["98 %", "90 %", "50 %"]


class TestPage:
    def test_shows_every_engine_and_marks_the_fastest(self) -> None:
        rows = [
            a_row(kind="models", engine=e, density=d, median_ms=m)
            for e, m in (("ort", 25.0), ("sparsegraph", 5.0), ("peer<1>", 10.0))
            for d in (1.0, 0.1)
        ]
        text = page.page([some_results(*rows)])
        assert text.count('<td class="best">5.00</td>') == 2
        assert "<td>2.50</td>" in text
        assert "peer&lt;1&gt;" in text
        assert "<svg" in text
        assert "Roofline" not in text, "nothing was measured for it"

    def test_roofline_places_layers_under_the_measured_limits(self) -> None:
        row = a_row(kind="layers", workload="gemm", median_ms=1.0, gmacs=0.25, weight_bytes=10**7)
        found = some_results(row)
        found.roof.update({"gflops": 92.0, "L1": 180.0, "memory": 30.0})
        drawn = page.page([found])
        assert "gemm 90 % unstructured: 50.0 GF/s" in drawn
        assert "registers: 92 GF/s" in drawn
        start = drawn.rindex("<svg")
        ElementTree.fromstring(drawn[start : drawn.rindex("</svg>") + 6])

    def test_limits_of_this_core_are_in_order(self) -> None:
        roof = roofline.measure()
        assert roof["gflops"] > 1
        assert roof["L1"] > roof["memory"] > 0.1


class TestMeasure:
    tiny = Workload("layers", "tiny", lambda: zoo.build("digits_cnn"), prune.all_but_the_stem)

    def test_rows_carry_reference_and_error(self) -> None:
        setup = measure.Setup(engines=("ort-plain",), plan=QUICK)
        ort, plain = measure.measure(self.tiny, 0.25, setup)
        assert (ort.engine, plain.engine) == ("ort", "ort-plain")
        assert ort.ratio == 1
        assert plain.reference_ms == ort.median_ms
        assert plain.max_rel_error is not None
        assert plain.max_rel_error < 1e-5
        assert plain.gmacs == pytest.approx(337_536 / 1e9)
        assert plain.version == results.versions()["onnxruntime"]

    def test_unknown_engine_is_a_row_with_a_reason(self) -> None:
        rows = measure.measure(self.tiny, 1.0, measure.Setup(engines=("nosuch",), plan=QUICK))
        assert [r.engine for r in rows] == ["ort", "nosuch"]
        assert "no engine 'nosuch'" in (rows[1].error or "")
        assert rows[0].error is None

    def test_peer_runs_in_another_process(self) -> None:
        setup = measure.Setup(engines=(), peers={"ort-plain": sys.executable}, plan=QUICK)
        _, peer = measure.measure(self.tiny, 1.0, setup)
        assert peer.error is None
        assert peer.engine == "ort-plain"
        assert peer.median_ms is not None
        assert peer.max_rel_error is not None
        assert peer.max_rel_error < 1e-5

    def test_compile_cost_reports_why_it_failed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(compile_cost.WORKLOADS, "tiny", self.tiny)
        monkeypatch.setattr(compile_cost, "CHILD", "benchmarks.no_such_module")
        cost = compile_cost.measure("tiny", 0.25)
        assert "no_such_module" in (cost.error or "")
        assert cost.compile_s is None

    def test_missing_peer_and_failing_peer_give_reasons(self) -> None:
        peers = {"deepsparse": "/nonexistent/python", "nosuch": sys.executable}
        setup = measure.Setup(engines=(), peers=peers, plan=QUICK)
        _, missing, failing = measure.measure(self.tiny, 1.0, setup)
        assert "FileNotFoundError" in (missing.error or "")
        assert "no engine 'nosuch'" in (failing.error or "")

    def test_wrong_outputs_show_as_error(self, tmp_path: Path) -> None:
        model = zoo.build("digits_cnn")
        other = zoo.build("digits_cnn", seed=1)
        feeds = zoo.feeds(model)
        outputs = []
        for i, proto in enumerate((model, other)):
            onnx.save(proto, tmp_path / f"{i}.onnx")
            outputs.append(prepare("ort", tmp_path / f"{i}.onnx", feeds, 1).call())
        assert relative_error(outputs[1], outputs[0]) > 0.1


class TestCommand:
    def test_layers_to_json(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "r.json"
        arguments = ["models", "--only", "digits_cnn", "--engines", "ort-plain", "--rounds", "1"]
        code = run.main([*arguments, "--block-ms", "1", "--densities", "1", ".1",
                         "--json", str(out)])  # fmt: skip
        assert code == 0
        rows = results.load(out).rows
        assert [(r.density, r.engine) for r in rows] == [
            (1.0, "ort"), (1.0, "ort-plain"), (0.1, "ort"), (0.1, "ort-plain"),
        ]  # fmt: skip
        assert rows[0].pattern == "dense"
        assert "digits_cnn" in capsys.readouterr().out

    def test_bars_from_a_file(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        some_results(a_row()).save(tmp_path / "r.json")
        assert run.main(["bars", "--from", str(tmp_path / "r.json")]) == 1
        out = capsys.readouterr().out
        assert "not measured" in out
        assert ["resnet50", "90", "unstructured", "speedup", "2.5", ">=", "2.4", "pass"] in [
            line.split() for line in out.splitlines()
        ]

    def test_costs_without_a_compiler_miss_their_bars(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        failed = results.Cost("resnet50", 0.1, error="no compiler")
        monkeypatch.setattr(compile_cost, "measure", lambda workload, density: failed)
        assert run.main(["costs", "--only", "resnet50"]) == 1
        out = capsys.readouterr().out
        assert "no compiler" in out
        assert "speedup" not in out

    def test_failed_engine_fails_the_command(self, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ["models", "--only", "digits_cnn", "--engines", "nosuch", "--rounds", "1"]
        assert run.main([*arguments, "--densities", "1", "--block-ms", "1"]) == 1

    def test_list_names_all_kinds(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run.main(["list"]) == 0
        assert {"resnet50", bars.GEMM} <= set(capsys.readouterr().out.split())

    def test_unknown_workload_is_a_usage_error(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stop:
            run.main(["layers", "--only", "nosuch"])
        assert stop.value.code == 2
        assert "nosuch" in capsys.readouterr().err

    def test_default_densities_are_those_of_the_issue(self) -> None:
        assert DENSITIES == (1.0, 0.2, 0.1, 0.05)


class TestRealModels:
    def test_missing_package_names_the_pip_command(self, tmp_path: Path) -> None:
        absent = replace(real_models.MODELS["ppocr_v6_det"], package="no-such-distribution")
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(real_models.MODELS, "ppocr_v6_det", absent)
            with pytest.raises(
                real_models.MissingPackage, match=r"pip install no-such-distr.*3\.10"
            ):
                real_models.load("ppocr_v6_det", tmp_path)

    def test_workloads_hold_only_models_that_are_here(self) -> None:
        names = {w.name for w in of_kind("models")}
        assert names & set(real_models.names()) == set(real_models.available())

    @pytest.mark.parametrize("name", real_models.names())
    def test_shipped_model_runs_with_bound_shapes(self, name: str, tmp_path: Path) -> None:
        if name not in real_models.available():
            pytest.skip(f"needs package {real_models.MODELS[name].package}")
        model = real_models.load(name)
        onnx.save(model, tmp_path / "m.onnx")
        outputs = prepare("ort", tmp_path / "m.onnx", zoo.feeds(model), 1).call()
        assert all(np.isfinite(o).all() for o in outputs)

    def test_bind_replaces_dynamic_dimensions(self) -> None:
        model = zoo.build("digits_cnn")
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "N"
        bound = real_models.bind(model, {"input": (3, 1, 8, 8)})
        shapes = zoo.counts.value_shapes(bound)
        assert shapes["output"] == (3, 10)

    def test_safetensors_reader(self, tmp_path: Path) -> None:
        array = np.arange(6, dtype=np.float32).reshape(2, 3)
        header = json.dumps(
            {"__metadata__": {}, "w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
        ).encode()
        file = tmp_path / "w.safetensors"
        file.write_bytes(len(header).to_bytes(8, "little") + header + array.tobytes())
        np.testing.assert_array_equal(real_models._safetensors(file)["w"], array)
