"""The benchmark: interleaving, medians, ONNX Runtime's time by layer."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from benchmarks import zoo
from sparsegraph import bench as module
from sparsegraph import targets, timing
from sparsegraph.bench import Bench, LayerTime, bench
from sparsegraph.capture import load
from sparsegraph.compile import compile
from sparsegraph.errors import UsageError
from sparsegraph.runtime import InferenceSession
from tests.conftest import BATCH


def test_both_are_timed_on_the_same_feed(artefact: Path, model_file: Path) -> None:
    model = load(model_file, {"batch": BATCH})
    seen: list[tuple[str, int, int]] = []
    result = bench(
        InferenceSession(artefact), model, rounds=2, block_ms=5, progress=lambda *a: seen.append(a)
    )
    assert seen == [("benchmark", 1, 2), ("benchmark", 2, 2)]
    assert 0 < result.slowest_ratio <= result.fastest_ratio
    assert result.max_rel_error <= 1e-4
    assert result.n_calls >= 6
    up = next(row for row in result.layers if "up" in row.nodes)
    assert up.dense_ms is not None
    assert up.dense_ms > 0
    assert "coded" in up.detail


def test_calls_for_the_strips_of_a_map_are_one_row() -> None:
    model = load(zoo.build("conv", c_in=3, c_out=8, kernel=3, size=96))
    target = replace(targets.native(), l2_bytes=128 << 10)
    compiled = compile(model, target, check=False, keep_native=True)
    assert compiled.session is not None
    calls = [s.kernel for s in compiled.session.profile(zoo.feeds(ir.to_proto(model)))]
    result = bench(compiled.session, model, rounds=1, block_ms=5)
    assert len(calls) > len(set(calls))
    assert [row.kernel for row in result.layers] == list(dict.fromkeys(calls))
    assert sum(row.ours_ms for row in result.layers) >= 0.5 * result.ours_ms


def test_a_wrong_feed_is_refused(artefact: Path, model_file: Path) -> None:
    model = load(model_file, {"batch": BATCH})
    with pytest.raises(UsageError, match="'x'"):
        bench(InferenceSession(artefact), model, {"z": np.zeros(3, np.float32)}, rounds=1)


def test_blocks_alternate_and_turn_around() -> None:
    order: list[str] = []

    def call(name: str) -> object:
        if not order or order[-1] != name:
            order.append(name)
        return time.sleep(0.001)

    calls = {"a": lambda: call("a"), "b": lambda: call("b")}
    blocks = timing.interleave(calls, 3, 5.0, lambda i: None)
    assert order == ["a", "b", "a", "b"]  # round 2 begins with b, which went last in round 1
    assert [len(blocks[name]) for name in "ab"] == [3, 3]
    assert all(1.0 <= t < 50 for name in "ab" for block in blocks[name] for t in block)


def test_ratio_and_json() -> None:
    row = LayerTime(("up",), "spmm", "coded", 1.0, 3.0)
    result = Bench(6.0, 2.0, 2.5, 3.5, 1e-6, 1, 9, (row,))
    assert result.ratio == 3.0
    assert result.to_json()["ratio"] == 3.0
    assert "3.00 times as fast" in str(result)


def test_names_that_onnx_runtime_makes_up_lead_to_their_node(model_file: Path) -> None:
    owner = module._Owner(load(model_file, {"batch": BATCH}))
    assert owner.of("up") == "up"
    assert owner.of("up/MatMulAddFusion") == "up"
    assert owner.of("hidden_nchwc") == "up"
    assert owner.of("upper_floor") == "upper_floor"
