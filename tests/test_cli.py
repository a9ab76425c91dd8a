"""Every command on a small model: exit code, table, JSON, files; and every kind of bad input."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import typer.main
from onnx import TensorProto, helper
from safetensors.numpy import save_file
from typer.testing import CliRunner

from sparsegraph import cli
from tests.conftest import BATCH, INPUTS, OUTPUTS, perceptron

DIM = ["--dim", f"batch={BATCH}"]
OK, USAGE, UNSUPPORTED, UNVERIFIED, UNREACHABLE, INTERRUPTED = 0, 2, 3, 4, 5, 130


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")], "left half written"


def invoke(*words: str | Path, code: int = OK) -> tuple[str, str]:
    """(stdout, stderr) of a command that must end with `code`."""
    result = CliRunner().invoke(cli.app, [str(w) for w in words])
    assert result.exit_code == code, (words, result.output, result.exception)
    return result.stdout, result.stderr


def refused(*words: str | Path, code: int) -> str:
    """The one line of error of a command that must fail with `code`."""
    out, err = invoke(*words, code=code)
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert err.startswith("error: ")
    assert "Fix: " in err
    assert "Traceback" not in err
    return err


# ---- what works


def test_inspect_names_the_layer_that_wins_and_the_one_that_stays_dense(model_file: Path) -> None:
    out, _ = invoke("inspect", model_file, *DIM, "--json", "i.json", "--html", "i.html")
    assert "unstructured" in out
    assert "no zeros" in out
    data = json.loads(Path("i.json").read_text())
    up, down = data["layers"]
    assert (up["node"], up["format"], up["reason"]) == ("up", "coded", "")
    assert up["speedup"] > 1
    assert (down["format"], down["reason"]) == ("dense", "no zeros")
    assert not down["is_measured"]
    assert data["n_faster"] == 1
    assert "<svg" in Path("i.html").read_text()


def test_inspect_imposes_zeros(model_file: Path) -> None:
    args = ("inspect", model_file, *DIM, "--impose", "0.9", "--json", "-")
    out, err = invoke(*args)
    data = json.loads(out)
    assert "what-if" in err  # the table makes room for the JSON
    assert data["what_if_speedup"] > data["speedup"]


def test_prune_writes_a_model_with_the_zeros_asked_for(model_file: Path) -> None:
    calibration = np.random.default_rng(0).standard_normal((128, INPUTS)).astype(np.float32)
    np.savez("data.npz", x=calibration)
    invoke(
        "prune", model_file, *DIM, "--recipe", "wanda:0.75", "--calibration", "data.npz",
        "-o", "pruned.onnx", "--json", "p.json",
    )  # fmt: skip
    weights = {
        t.name: onnx.numpy_helper.to_array(t) for t in onnx.load("pruned.onnx").graph.initializer
    }
    assert (weights["down.weight"] == 0).mean() == pytest.approx(0.75, abs=0.01)
    assert json.loads(Path("p.json").read_text())["layers"][1]["layer"] == "down"


def test_prune_within_a_budget(model_file: Path) -> None:
    x = np.random.default_rng(0).standard_normal((4, BATCH, INPUTS)).astype(np.float32)
    save_file({"x": x}, "data.safetensors")
    args = ("prune", model_file, *DIM, "--recipe", "admm:0.5", "--calibration", "data.safetensors")
    out, _ = invoke(
        *args, "--flops", "0.4x", "-o", "p.onnx", "--json", "p.json", "--html", "p.html"
    )
    assert "Trade-off" in out
    assert "Pruned with admm:0.5 within flops 0.4x" in out
    page = Path("p.html").read_text()
    assert page.count("<circle") == 18  # two plots of 8 plans and the choice
    assert "Trade-off" in page
    found = json.loads(Path("p.json").read_text())
    assert all(row["ms"] > 0 for row in found["layers"] if row["method"] == "admm")
    dense = 2 * BATCH * INPUTS * 64
    assert found["plan"]["macs"] <= 0.4 * dense + 1
    assert found["density"] <= 0.45
    invoke(*args, "--max-drop", "0.2", "-o", "drop.onnx", "--json", "d.json")
    assert json.loads(Path("d.json").read_text())["density"] < 1
    error = refused(*args, "--size", "0.01x", "-o", "never.onnx", code=UNREACHABLE)
    assert "need at least" in error
    assert "found 2 limits" in refused(
        *args, "--size", "1x", "--flops", "1x", "-o", "never.onnx", code=USAGE
    )
    assert "no positive number" in refused(*args, "--max-drop", "x", "-o", "n.onnx", code=USAGE)
    assert not Path("never.onnx").exists()


@pytest.mark.parametrize(
    ("shape", "fix"),
    [((8, BATCH, INPUTS + 1), "arrays of that shape"), ((BATCH + 1, INPUTS), "stack samples"),
     ((INPUTS,), "stack samples"), ((8, INPUTS + 1), "arrays of that shape")],
)  # fmt: skip
def test_calibration_of_another_shape_is_told_how_to_fit(
    model_file: Path, shape: tuple[int, ...], fix: str
) -> None:
    np.savez("data.npz", x=np.zeros(shape, dtype=np.float32))
    args = ("prune", model_file, *DIM, "--recipe", "wanda:0.5", "-o", "never.onnx")
    assert fix in refused(*args, "--calibration", "data.npz", code=USAGE)
    assert "--calibration FILE.npz" in refused(*args, code=USAGE)


def test_prune_takes_masks_from_a_file(model_file: Path) -> None:
    mask = np.random.default_rng(0).random((64, OUTPUTS)) < 0.3
    np.savez("masks.npz", **{"down.weight": mask})
    invoke("prune", model_file, *DIM, "--recipe", "masks", "--masks", "masks.npz", "-o", "p.onnx")
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load("p.onnx").graph.initializer}
    np.testing.assert_array_equal(weights["down.weight"] != 0, mask)


def test_optimize_writes_a_model_and_stages(model_file: Path) -> None:
    out, _ = invoke(
        "optimize", model_file, *DIM, "-o", "small.onnx", "--dump", "stages",
        "--stop-after", "fold_constants", "--skip", "dedupe", "--fuel", "3", "--json", "o.json",
    )  # fmt: skip
    onnx.checker.check_model("small.onnx")
    names = [record["name"] for record in json.loads(Path("o.json").read_text())]
    assert names[-1] == "fold_constants"
    assert "dedupe" not in names
    assert Path("stages/00_capture.onnx").is_file()
    assert "wrote small.onnx" in out


def test_snap_reports_the_change_of_the_outputs(model_file: Path) -> None:
    invoke("optimize", model_file, *DIM, "-o", "s.onnx", "--snap", "0.02", "--json", "o.json")
    (snap,) = [r for r in json.loads(Path("o.json").read_text()) if r["name"] == "snap_near_zeros"]
    assert snap["n_applied"] >= 1
    assert 0 < snap["max_rel_error"] < 0.5


def test_compile_then_run_gives_the_outputs_of_onnx_runtime(model_file: Path) -> None:
    from sparsegraph.verify import run_onnx

    out, _ = invoke("compile", model_file, *DIM, "--json", "c.json", "--html", "c.html")
    assert "wrote model.sg" in out
    manifest = json.loads(Path("c.json").read_text())
    assert manifest["verification"]["checked"] is True
    assert manifest == json.loads(Path("model.sg/manifest.json").read_text())
    x = np.random.default_rng(1).standard_normal((BATCH, INPUTS)).astype(np.float32)
    np.savez("feed.npz", x=x)
    np.save("x.npy", x)
    for given in ("feed.npz", "x=x.npy"):
        invoke("run", "model.sg", "--input", given, "-o", "out.npz")
        with np.load("out.npz") as got:
            want = run_onnx(onnx.load(model_file), {"x": x})["y"]
            assert np.abs(got["y"] - want).max() <= 1e-4 * np.abs(want).max()


def test_several_targets_give_one_bundle_each(model_file: Path) -> None:
    names = ["native", "c11"]
    out, _ = invoke(
        "compile", model_file, *DIM, "--target", names[0], "--target", names[1],
        "-o", "m.sg", "--json", "c.json",
    )  # fmt: skip
    assert "wrote m.native.sg" in out
    assert Path("m.native.sg/model.so").is_file()
    assert Path("m.c11.sg/kernels.c").is_file()
    rows = json.loads(Path("c.json").read_text())
    assert [row["target"]["arch"] for row in rows][1] == "c"
    for name, row in zip(names, rows, strict=True):
        assert row == json.loads(Path(f"m.{name}.sg/manifest.json").read_text())


def test_an_unknown_target_stops_before_the_first_is_compiled(model_file: Path) -> None:
    given = ("compile", model_file, *DIM, "--target", "native", "--target", "aarch65")
    assert "write aarch64" in refused(*given, code=3)
    assert not list(Path().glob("*.sg"))


def test_c_source_takes_one_shape(model_file: Path) -> None:
    given = ("compile", model_file, "--dim", "batch=1,2", "--target", "c11")
    error = refused(*given, code=3)
    assert "found 2 shapes, need one shape" in error


def test_run_makes_up_inputs(artefact: Path) -> None:
    out, _ = invoke("run", artefact, "--threads", "2", "--json", "-")
    row = json.loads(out)["outputs"][0]
    assert (row["output"], row["shape"]) == ("y", f"{BATCH}x{OUTPUTS}")


@pytest.mark.parametrize("what", ["artefact", "model"])
def test_bench_times_both(what: str, artefact: Path, model_file: Path) -> None:
    given = [artefact] if what == "artefact" else [model_file, *DIM]
    out, _ = invoke("bench", *given, "--rounds", "1", "--json", "b.json", "--html", "b.html")
    assert "times as fast" in out
    data = json.loads(Path("b.json").read_text())
    assert data["ratio"] == pytest.approx(data["dense_ms"] / data["ours_ms"])
    assert data["max_rel_error"] <= 1e-4
    assert {n for row in data["layers"] for n in row["nodes"]} == {"up", "act", "down"}
    assert "dense ms" in Path("b.html").read_text()


def test_targets_lists_this_machine() -> None:
    out, _ = invoke("targets", "--json", "-")
    data = json.loads(out)
    assert sum(row["is_native"] for row in data["targets"]) <= 1
    assert {"x86-64-v3", "aarch64"} <= {row["name"] for row in data["targets"]}
    assert data["machine"]["cores"] >= 1


def test_help_says_every_word_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    for name, command in typer.main.get_command(cli.app).commands.items():
        out, _ = invoke(name, "--help")
        text = " ".join(out.split())
        for option in command.params:
            said = " ".join((option.help or "").replace("\\[", "[").split())
            assert said in text, (name, option.name)


def test_help_names_every_command() -> None:
    out, _ = invoke("--help")
    for name in ("inspect", "prune", "optimize", "compile", "run", "bench", "targets", "demo"):
        assert name in out
        invoke(name, "--help")


def test_tuned_times_reach_inspect(model_file: Path) -> None:
    out, _ = invoke("compile", model_file, *DIM, "--tune", "--tuning", "t.json", "--keep-native")
    assert "2 products measured, 0 known" in " ".join(out.split())
    invoke("inspect", model_file, *DIM, "--tuning", "t.json", "--json", "i.json")
    assert all(row["is_measured"] for row in json.loads(Path("i.json").read_text())["layers"])


# ---- what is refused


def test_tuning_for_another_machine(model_file: Path) -> None:
    text = refused("compile", model_file, *DIM, "--target", "c11", "--tune", code=UNSUPPORTED)
    assert "c11" in text


def test_a_file_that_is_no_tuning_file(model_file: Path) -> None:
    Path("t.json").write_text("{}")
    assert "t.json" in refused("inspect", model_file, *DIM, "--tuning", "t.json", code=USAGE)


def test_truncated_model(model_file: Path) -> None:
    Path("cut.onnx").write_bytes(model_file.read_bytes()[:2000])
    assert "cut.onnx" in refused("compile", "cut.onnx", code=UNSUPPORTED)


def test_random_bytes() -> None:
    Path("noise.onnx").write_bytes(np.random.default_rng(0).bytes(5000))
    assert "noise.onnx" in refused("inspect", "noise.onnx", code=UNSUPPORTED)


def test_missing_model() -> None:
    assert "nowhere.onnx" in refused("inspect", "nowhere.onnx", code=UNSUPPORTED)


@pytest.mark.parametrize("location", ["gone.bin", "../../gone.bin", "/etc/passwd"])
def test_external_data_that_is_missing_or_outside(location: str) -> None:
    model = perceptron()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    Path("model.onnx").write_bytes(model.SerializeToString())
    assert "up.weight" in refused("compile", "model.onnx", *DIM, code=UNSUPPORTED)
    assert not Path("model.sg").exists()


def test_unknown_op() -> None:
    model = perceptron()
    model.graph.node[1].op_type = "Frobnicate"
    onnx.save(model, "op.onnx")
    assert "Frobnicate" in refused("compile", "op.onnx", *DIM, code=UNSUPPORTED)


def test_unknown_opset() -> None:
    model = perceptron()
    model.opset_import[0].version = 999
    onnx.save(model, "opset.onnx")
    assert "999" in refused("compile", "opset.onnx", *DIM, code=UNSUPPORTED)


def test_unbound_dimension_names_the_option(model_file: Path) -> None:
    error = refused("compile", model_file, code=UNSUPPORTED)
    assert "batch" in error
    assert "--dim" in error


@pytest.mark.parametrize(
    ("option", "text"),
    [("--dim", "batch"), ("--dim", "batch=many"), ("--dim", "batch=0"), ("--shape", "x=1,,3")],
)
def test_malformed_shape_options(option: str, text: str, model_file: Path) -> None:
    assert text in refused("inspect", model_file, option, text, code=USAGE)


def test_unknown_dimension(model_file: Path) -> None:
    assert "tokens" in refused("inspect", model_file, *DIM, "--dim", "tokens=8", code=UNSUPPORTED)


def test_unsupported_target(model_file: Path) -> None:
    error = refused("compile", model_file, *DIM, "--target", "z80", code=UNSUPPORTED)
    assert "z80" in error
    assert "aarch64" in error


def test_unknown_pass(model_file: Path) -> None:
    error = refused("optimize", model_file, *DIM, "-o", "o.onnx", "--skip", "nope", code=USAGE)
    assert "nope" in error
    assert "fold_constants" in error


@pytest.mark.parametrize("recipe", ["magic:0.5", "wanda:1.5", "wanda:0.5,colour=red"])
def test_malformed_recipe(recipe: str, model_file: Path) -> None:
    error = refused("prune", model_file, *DIM, "--recipe", recipe, "-o", "p.onnx", code=USAGE)
    assert recipe in error
    assert not Path("p.onnx").exists()


def test_missing_calibration(model_file: Path) -> None:
    args = ("prune", model_file, *DIM, "--recipe", "wanda:0.5", "-o", "p.onnx")
    assert "calibration" in refused(*args, code=USAGE)
    np.savez("data.npz", z=np.zeros((4, BATCH, INPUTS), np.float32))
    assert "add an array named x" in refused(*args, "--calibration", "data.npz", code=USAGE)
    np.savez("data.npz", x=np.zeros((0, BATCH, INPUTS), np.float32))
    assert "found no samples" in refused(*args, "--calibration", "data.npz", code=USAGE)
    np.savez("data.npz", x=np.zeros((4, 3), np.float32))
    assert "[4, 3]" in refused(*args, "--calibration", "data.npz", code=USAGE)
    Path("data.npz").write_bytes(b"no archive")
    assert "data.npz" in refused(*args, "--calibration", "data.npz", code=USAGE)


def test_impose_is_a_share(model_file: Path) -> None:
    assert "90" in refused("inspect", model_file, *DIM, "--impose", "90", code=USAGE)


@pytest.mark.parametrize(
    ("arrays", "parts"),
    [
        ({"z": np.zeros((BATCH, INPUTS), np.float32)}, ("'x'", "z")),
        ({"x": np.zeros((BATCH, 5), np.float32)}, ("'x'", "(64, 5)", "(64, 32)")),
        ({"x": np.zeros((BATCH, INPUTS))}, ("'x'", "float64", "float32")),
    ],
)
def test_wrong_feeds(arrays: dict[str, np.ndarray], parts: tuple[str, ...], artefact: Path) -> None:
    np.savez("feed.npz", **arrays)  # type: ignore[arg-type]
    error = refused("run", artefact, "--input", "feed.npz", "-o", "out.npz", code=USAGE)
    for part in parts:
        assert part in error
    assert not Path("out.npz").exists()


def test_no_artefact() -> None:
    assert "nothing.sg" in refused("run", "nothing.sg", code=USAGE)


def test_modified_artefact(artefact: Path) -> None:
    shutil.copytree(artefact, "broken.sg")
    library = Path("broken.sg/model.so")
    data = bytearray(library.read_bytes())
    data[len(data) // 2] ^= 1
    library.write_bytes(data)
    assert "model.so" in refused("run", "broken.sg", code=UNSUPPORTED)


def test_bench_wants_the_model_that_was_compiled(artefact: Path, tmp_path: Path) -> None:
    shutil.copytree(artefact, "alone.sg")
    assert "--model" in refused("bench", "alone.sg", code=USAGE)
    other = perceptron()
    other.graph.node[1].op_type = "Sigmoid"
    onnx.save(other, "alone.onnx")
    assert "another model" in refused("bench", "alone.sg", code=USAGE)


@pytest.mark.parametrize("option", ["--json", "--html"])
def test_unwritable_report_is_found_before_the_work(option: str, model_file: Path) -> None:
    error = refused("compile", model_file, *DIM, option, "no/such/folder/file", code=USAGE)
    assert "no/such/folder" in error
    assert not Path("model.sg").exists()


def test_unwritable_outputs(model_file: Path, artefact: Path) -> None:
    Path("file").write_text("in the way")
    for words in (
        ("compile", model_file, *DIM, "-o", "file"),
        ("compile", model_file, *DIM, "-o", "file/model.sg"),
        ("optimize", model_file, *DIM, "-o", "file/small.onnx"),
        ("prune", model_file, *DIM, "--recipe", "magnitude:0.5", "-o", "file/p.onnx"),
        ("run", artefact, "-o", "file/out.npz"),
    ):
        assert "file" in refused(*words, code=USAGE)
    assert [p.name for p in Path().iterdir()] == ["file"]
    assert Path("file").read_text() == "in the way"


def test_nodes_without_a_kernel_and_without_fallback() -> None:
    nodes = [helper.make_node("Det", ["x"], ["y"], "determinant")]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 3, 3])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    graph = helper.make_graph(nodes, "g", [x], [y])
    opset = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), "det.onnx")
    assert "determinant" in refused("compile", "det.onnx", "--no-fallback", code=UNSUPPORTED)
    out, _ = invoke("compile", "det.onnx")
    assert "1 nodes in ONNX Runtime" in out


def test_verification_failure(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsegraph.proof.verify.compare", lambda got, want: 0.5)
    monkeypatch.setattr("sparsegraph.pipeline.compare", lambda got, want: 0.0)
    error = refused("compile", model_file, *DIM, code=UNVERIFIED)
    assert "5.00e-01" in error
    assert not Path("model.sg").exists()


def test_interruption_is_quiet(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsegraph.lower import partition

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(partition, "plan", interrupt)
    out, err = invoke("compile", model_file, *DIM, code=INTERRUPTED)
    assert (out, err) == ("", "interrupted\n")
    assert not Path("model.sg").exists()


@pytest.mark.parametrize("words", [["compile"], ["frobnicate"], ["run", "x.sg", "--threads", "0"]])
def test_wrong_command_lines(words: list[str]) -> None:
    _, err = invoke(*words, code=USAGE)
    assert "Usage" in err
