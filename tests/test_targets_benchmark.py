"""The matrix of models and machines: what counts as passed, what is kept, what is printed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from sparsegraph.targets import get

from benchmarks import bundles, targets
from tests.targets import cross

GOOD = targets.Row("digits_cnn", 0.1, "c11", "native", max_rel_error=1e-6)


def test_a_row_passes_only_with_a_small_error() -> None:
    assert GOOD.passes
    assert not replace(GOOD, max_rel_error=1.1e-4).passes
    assert not replace(GOOD, max_rel_error=float("nan")).passes
    assert not replace(GOOD, max_rel_error=None).passes
    assert not replace(GOOD, error="RunFailed: exit code 1").passes
    assert replace(GOOD, runner=targets.NOT_RUN, max_rel_error=None).passes


def test_table_has_a_cell_per_row() -> None:
    bad = replace(GOOD, target="wasm", error="no wasm-ld")
    lines = targets.table([GOOD, bad, replace(GOOD, density=0.2)]).splitlines()
    assert lines[0] == "| model | density | c11 | wasm |"
    assert lines[2:] == [
        "| digits_cnn | 0.1 | 1.0e-06 | FAILED |",
        "| digits_cnn | 0.2 | 1.0e-06 | - |",
    ]


def test_weights_are_compared_with_those_of_the_dense_model() -> None:
    dense = replace(GOOD, density=1.0, weight_bytes=400)
    rows = [dense, replace(GOOD, weight_bytes=50), replace(GOOD, target="wasm", weight_bytes=9)]
    lines = targets.weights(rows).splitlines()
    assert lines[2:] == ["| digits_cnn | 0.1 | 0.125 | - |"]


def test_rows_of_an_earlier_call_are_kept_and_failures_tried_again(tmp_path: Path) -> None:
    cross.require("gcc")
    file = tmp_path / "targets.json"
    words = ["--only", "digits_cnn", "--densities", ".1", "--on", "c11", "armv9x"]
    with pytest.raises(SystemExit) as caught:
        targets.main([*words, "--json", str(file)])
    assert caught.value.code == 2
    words.pop()
    assert targets.main([*words, "--json", str(file)]) == 0
    (row,) = json.loads(file.read_text())["rows"]
    assert row["max_rel_error"] <= 1e-4
    assert 0 < row["weight_bytes"] < row["code_bytes"]
    planted = json.loads(file.read_text())
    failed = row | {"density": 0.2, "error": "RunFailed: exit code 1"}
    planted["rows"] = [row | {"max_rel_error": 0.0, "commit": "earlier"}, failed]
    file.write_text(json.dumps(planted))
    words[3:4] = [".1", ".2"]
    assert targets.main([*words, "--json", str(file)]) == 0
    first, second = json.loads(file.read_text())["rows"]
    assert (first["max_rel_error"], first["commit"]) == (0.0, "earlier")  # not measured again
    assert second["commit"] == planted["commit"]
    assert second["error"] is None


def test_a_wrong_result_is_a_failed_row() -> None:
    cross.require("gcc")
    case = bundles.Case(bundles.MODELS["digits_cnn"], 0.1)
    case.expected = {name: value + 1 for name, value in case.expected.items()}
    blank = targets.Row("digits_cnn", 0.1, "c11")
    row = targets.measure(case, blank, get("c11"))
    assert not row.passes
    assert (row.max_rel_error or 0) > 0.01


def test_models_without_their_package_say_so(tmp_path: Path) -> None:
    rows = list(targets.matrix(["ppocr_v2_cls"], [1.0], ["c11"], tmp_path, set()))
    if rows[0].error is None:
        pytest.skip("the package with the model is installed")
    assert "pip install rapidocr_onnxruntime==1.4.4" in rows[0].error
