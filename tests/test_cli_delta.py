"""`sparsegraph delta` on small models: files, tables, JSON, errors."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import typer.main

from sparsegraph import cli_delta
from tests.conftest import BATCH, INPUTS
from tests.test_branches import network
from tests.test_cli import DIM, UNSUPPORTED, USAGE, folder, invoke, refused
from tests.test_prune import raw

__all__ = ["folder"]  # the fixture that every test runs in


def weights(path: str | Path) -> dict[str, np.ndarray]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


@pytest.fixture
def tuned(model_file: Path) -> str:
    """The perceptron with a few other weights."""
    model = onnx.load(model_file)
    for tensor in model.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor).copy()
        array[:1] *= 1.5
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    onnx.save(model, "tuned.onnx")
    return "tuned.onnx"


def test_a_difference_folds_back(model_file: Path, tuned: str) -> None:
    out, _ = invoke("delta", "diff", model_file, tuned, *DIM, "-o", "d.npz", "--json", "d.json")
    assert "2 weights change" in out
    rows = {row["weight"]: row for row in json.loads(Path("d.json").read_text())}
    assert rows["down.weight"]["share that changes"] == 1 / 64
    invoke("delta", "fold", model_file, *DIM, "--delta", "d.npz", "-o", "again.onnx")
    for name, array in weights(tuned).items():
        np.testing.assert_array_equal(weights("again.onnx")[name], array)
    invoke(
        "delta", "fold", model_file, *DIM, "--delta", "d.npz", "--delta", "d.npz", "-o", "2.onnx"
    )
    twice = 2 * weights(tuned)["down.weight"] - weights(model_file)["down.weight"]
    np.testing.assert_allclose(weights("2.onnx")["down.weight"], twice, rtol=1e-5)


def test_an_average(model_file: Path, tuned: str) -> None:
    models = (model_file, tuned)
    invoke("delta", "average", *models, *DIM, "--share", "1", "--share", "3", "-o", "mean.onnx")
    first, second = (weights(path)["up.weight"] for path in models)
    np.testing.assert_allclose(weights("mean.onnx")["up.weight"], (first + 3 * second) / 4)
    dense = onnx.load(tuned)
    for tensor in dense.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        tensor.CopyFrom(onnx.numpy_helper.from_array(np.ones_like(array), tensor.name))
    onnx.save(dense, "dense.onnx")
    error = refused("delta", "average", model_file, "dense.onnx", *DIM, "-o", "n.onnx", code=USAGE)
    assert "average 'up.weight'" in error
    assert "1 of 2 weights" in error
    assert not Path("n.onnx").exists()


def test_branches_are_settled() -> None:
    ir.save(network(0.3), "lora.onnx")
    out, _ = invoke("delta", "branches", "lora.onnx", "-o", "s.onnx", "--json", "s.json")
    assert "kept" in out
    (row,) = json.loads(Path("s.json").read_text())
    assert (row["fate"], row["rank"]) == ("kept", 2)
    invoke("delta", "branches", "lora.onnx", "-o", "m.onnx", "--few", "1")
    assert (weights("m.onnx")["w"] != 0).all()
    assert "a" not in weights("m.onnx")


def test_branches_of_a_raw_capture_say_what_to_run() -> None:
    ir.save(raw(is_linear=False), "raw.onnx")
    out, _ = invoke("delta", "branches", "raw.onnx", "-o", "s.onnx")
    assert "1 products compute their weights; optimise first: `sparsegraph optimize" in out
    ir.save(network(1.0), "plain.onnx")
    assert "optimise first" not in invoke("delta", "branches", "plain.onnx", "-o", "s.onnx")[0]


def test_tasks_in_one_artefact(model_file: Path, tuned: str) -> None:
    mask = np.random.default_rng(0).random((64, 16)) > 0.03
    np.savez("mask.npz", **{"down.weight": mask})
    args = ("--task", f"tuned={tuned}", "--task", "masked=mask.npz", "-o", "m.sg")
    out, _ = invoke("delta", "tasks", model_file, *DIM, *args, "--json", "t.json")
    assert "tuned" in out
    assert "weights that all share" in out
    manifest = json.loads(Path("t.json").read_text())
    assert [t["name"] for t in manifest["tasks"]] == ["tuned", "masked"]
    x = np.random.default_rng(1).standard_normal((BATCH, INPUTS)).astype(np.float32)
    np.savez("x.npz", x=x)
    invoke("run", "m.sg", "--input", "x.npz", "--task", "tuned", "-o", "y.npz")
    w = weights(tuned)
    want = np.maximum(x @ w["up.weight"], 0) @ w["down.weight"]
    np.testing.assert_allclose(np.load("y.npz")["y"], want, atol=1e-4)
    error = refused("run", "m.sg", "--task", "other", code=USAGE)
    assert "need one of tuned, masked" in error


def test_wrong_tasks(model_file: Path, tuned: str) -> None:
    base = ("delta", "tasks", model_file, *DIM)
    for given, text in (("tuned", "need NAME=FILE"), ("a=no.npz", "no such file")):
        assert text in refused(*base, "--task", given, code=USAGE)
    twice = ("--task", f"a={tuned}", "--task", f"a={tuned}")
    assert "each name once" in refused(*base, *twice, code=USAGE)
    two = ("--task", f"a={tuned}", "--target", "x86-64-v3+x86-64-v2")
    assert "one target" in refused(*base, *two, code=UNSUPPORTED)


def test_help_of_every_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    commands = typer.main.get_command(cli_delta.app).commands
    assert set(commands) == {"diff", "fold", "average", "branches", "tasks"}
    for name, command in commands.items():
        text = " ".join(invoke("delta", name, "--help")[0].split())
        for option in command.params:
            assert " ".join((option.help or "").replace("\\[", "[").split()) in text
