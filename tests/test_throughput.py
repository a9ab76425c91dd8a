"""Static estimates of compiled models: labelled, per core, summed only where all are known."""

import json
import shutil
from pathlib import Path

import pytest
from sparsegraph.targets import inner_loop
from typer.testing import CliRunner

from sparsegraph import throughput
from sparsegraph.cli import app
from sparsegraph.errors import UnsupportedError
from sparsegraph.throughput import KernelRow, Throughput

DENSE, CODED = "gemm_f32_dense_r6_v4_l4_relu_a0", "spmm_f32_coded_r2_v4_l4_near"


def manifest(target: str) -> dict[str, object]:
    steps = [(CODED, 8_000), (DENSE, 80_000), (CODED, 16_000), ("copy_f32_exact_l4", 0)]
    rows = [{"kernel": kernel, "flops": flops} for kernel, flops in steps]
    native = {"kind": "native", "steps": rows}
    return {"target": {"text": target}, "segments": [native, {"kind": "onnxruntime"}]}


def test_products_of_a_manifest() -> None:
    found = throughput.of_manifest(manifest("aarch64"))
    dense, coded = found.kernels
    assert (dense.kernel, dense.calls, dense.macs) == (DENSE, 1, 10_000)
    assert (coded.kernel, coded.calls, coded.macs) == (CODED, 2, 3_000)
    assert 1 < dense.instructions < coded.instructions < 3
    assert dense.loads < coded.loads < 1
    assert dense.spills == coded.spills == 0
    if shutil.which(inner_loop.TOOL) is None:
        assert found.note == "cycles need llvm-mca: install the Debian package llvm"
        assert found.total("cortex-a76") is None
        pytest.skip("needs llvm-mca (Debian: llvm)")
    assert set(dense.cycles) == set(found.cores) == set(inner_loop.CORES["aarch64"])
    for core in found.cores:
        total = found.total(core)
        assert total is not None
        assert total > (10_000 + 3_000) / 4  # more would be four vector pipes
        assert f"{core}: {total / 1e6:.2f} million cycles" in found.summary()
    assert found.summary().count("estimated, not measured") == len(found.cores)


def test_no_sum_where_a_kernel_is_unknown() -> None:
    rows = [KernelRow("a", 1, 100, 1, 1, 0, {"x": 0.5}), KernelRow("b", 1, 9, 1, 1, 0, {"x": None})]
    assert Throughput("t", ("x",), tuple(rows[:1]), "").total("x") == 50
    both = Throughput("t", ("x",), tuple(rows), "")
    assert both.total("x") is None
    assert "x: unknown to llvm-mca" in both.summary()


@pytest.mark.parametrize("name", ["wasm", "c11"])
def test_targets_without_assembly(name: str) -> None:
    with pytest.raises(UnsupportedError, match="a target with assembly"):
        throughput.of_manifest(manifest(name))


def test_inspect_of_a_compiled_model(artefact: Path, tmp_path: Path) -> None:
    to = tmp_path / "out.json"
    done = CliRunner().invoke(app, ["inspect", str(artefact), "--json", str(to)])
    assert done.exit_code == 0, done.output
    assert "Inner loops of model.sg" in done.stdout
    data = json.loads(to.read_text())
    assert data["cycles_are"] == "estimated by llvm-mca"
    assert {row["kernel"].split("_")[0] for row in data["kernels"]} == {"spmm", "gemm"}
