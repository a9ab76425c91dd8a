"""Several tasks over one weight file: patches, what is stored, what runs, what is refused."""

import ctypes
import json
import os
import subprocess
import threading
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from sparsegraph import delta, patch
from sparsegraph.capture import load
from sparsegraph.compile import Compiled
from sparsegraph.errors import UnsupportedError, UsageError, VerifyError
from sparsegraph.patch import Patch
from sparsegraph.runtime import InferenceSession
from sparsegraph.tasks import compile_tasks
from sparsegraph.verify import Session
from tests.test_permute import filled

SEED = 4
TOKENS, WIDTH = 32, 64
TEXT = f"""<ir_version: 9, opset_import: ["" : 18]>
net (float[n, {WIDTH}] x, float[{WIDTH}, 128] w, float[128] b, float[128, {WIDTH}] v,
     float[{WIDTH}] c, float[{WIDTH}] d) => (float[n, {WIDTH}] y)
{{
  p = MatMul(x, w)
  q = Add(p, b)
  r = Relu(q)
  s = MatMul(r, v)
  t = Add(s, c)
  u = Tanh(t)
  y = Mul(u, d)
}}"""


@pytest.mark.parametrize("size", [1, 255, 256, 257, 4000])
@pytest.mark.parametrize("share", [0.0, 0.0005, 0.03, 1.0])
@pytest.mark.parametrize("is_mask", [False, True])
def test_patches_turn_one_into_the_other(size: int, share: float, is_mask: bool) -> None:
    generator = np.random.default_rng(SEED)
    before = generator.integers(1, 1 << 32, size, dtype=np.uint32)
    after = np.where(generator.random(size) < share, 0 if is_mask else before + 1, before)
    after = after.astype(np.uint32)
    made = Patch.between(before, after)
    assert made.n_changed == (before != after).sum()
    assert is_mask == (len(made.words) == 0) or made.n_changed == 0
    data = np.frombuffer(made.data(), np.uint8)
    found = before.copy()
    Patch.read(data, len(made.gaps)).apply(found)
    np.testing.assert_array_equal(found, after)


def test_a_far_word_and_the_first() -> None:
    """Gaps at the border of one byte."""
    for places in ([0], [254], [255], [253, 508], [0, 255, 510], [1019]):
        after = np.zeros(1020, np.uint32)
        after[places] = 7
        made = Patch.between(np.zeros_like(after), after)
        found = np.zeros_like(after)
        made.apply(found)
        np.testing.assert_array_equal(found, after)


def test_the_loop_for_c_does_the_same(tmp_path: Path) -> None:
    """The lines of the module's docstring, compiled."""
    assert patch.__doc__ is not None
    body = patch.__doc__.partition("weights:\n")[2]
    source = (
        "#include <stdint.h>\nvoid apply(uint32_t *weights, const uint8_t *gaps, int n_gaps, "
        f"const uint32_t *words, int n_words) {{ int i; {body} }}"
    )
    (tmp_path / "apply.c").write_text(source)
    library = tmp_path / "apply.so"
    subprocess.run(["cc", "-shared", "-o", library, tmp_path / "apply.c"], check=True)
    apply = ctypes.CDLL(str(library)).apply
    generator = np.random.default_rng(SEED)
    before = generator.integers(1, 1 << 32, 5000, dtype=np.uint32)
    for new in (0, 9):
        after = np.where(generator.random(5000) < 0.004, np.uint32(new), before)
        made, found = Patch.between(before, after), before.copy()
        pointers = [a.ctypes.data_as(ctypes.c_void_p) for a in (found, made.gaps, made.words)]
        apply(pointers[0], pointers[1], len(made.gaps), pointers[2], len(made.words))
        np.testing.assert_array_equal(found, after)


def network(density: float) -> ir.Model:
    """Two products, the first sparse; `b` and `c` zero, so that tasks may tell them apart."""
    generator = np.random.default_rng(SEED)

    def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
        array = generator.normal(size=shape) / 8
        if name == "w":
            array *= generator.random(shape) < density
        return array * 0 if name in "bc" else array

    return load(filled(TEXT.replace("[n,", f"[{TOKENS},"), weight))


def deltas(model: ir.Model) -> dict[str, dict[str, np.ndarray]]:
    """A mask, a delta beside the zeros of the first weight, and one of a bias alone."""
    generator = np.random.default_rng(SEED + 1)
    w, v = (model.graph.initializers[name].const_value.numpy() for name in "wv")
    places = generator.random(w.shape) < 0.02
    return {
        "masked": {"v": generator.random(v.shape) > 0.026},
        "tuned": {"w": np.where(places, 0.1, 0).astype(np.float32)},
        "moved": {"c": np.linspace(-1, 1, WIDTH, dtype=np.float32)},
    }


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> tuple[ir.Model, Compiled]:
    model = network(0.2)
    path = tmp_path_factory.mktemp("tasks") / "model.sg"
    return model, compile_tasks(model, deltas(model), output=path)


def feed(seed: int = 2) -> dict[str, np.ndarray]:
    x = np.random.default_rng(seed).normal(size=(TOKENS, WIDTH)).astype(np.float32)
    return {"x": x}


def wanted(model: ir.Model, name: str | None) -> np.ndarray:
    made = model if name is None else delta.fold(model, [deltas(model)[name]])[0]
    return Session(made).run(feed())["y"]


def test_every_task_computes_its_own(three: tuple[ir.Model, Compiled]) -> None:
    model, compiled = three
    session = compiled.session
    assert session is not None
    assert session.tasks == ("masked", "tuned", "moved")
    seen = []
    for name in (None, "tuned", "masked", "moved", None, "tuned"):
        (found,) = session.run(None, feed(), task=name)
        want = wanted(model, name)
        np.testing.assert_allclose(found, want, atol=1e-5 * np.abs(want).max())
        seen.append(found)
    np.testing.assert_array_equal(seen[0], seen[4])
    np.testing.assert_array_equal(seen[1], seen[5])
    assert min(np.abs(seen[0] - other).max() for other in seen[1:4]) > 1e-3
    record = compiled.manifest.verification
    assert record["checked"]
    assert {name: row["checked"] for name, row in record["tasks"].items()} == {
        "masked": True, "tuned": True, "moved": True
    }  # fmt: skip


def test_a_session_may_start_with_a_task(three: tuple[ir.Model, Compiled]) -> None:
    model, compiled = three
    session = InferenceSession(compiled.path, task="moved")
    np.testing.assert_allclose(session.run(None, feed())[0], wanted(model, "moved"), atol=1e-5)
    assert [t.seconds >= 0 for t in session.profile(feed())]
    session.task = None
    np.testing.assert_allclose(session.run(None, feed())[0], wanted(model, None), atol=1e-5)


def test_the_weights_are_stored_once(three: tuple[ir.Model, Compiled]) -> None:
    model, compiled = three
    sizes = {p.name: p.stat().st_size for p in Path(compiled.path).iterdir()}
    n_mask = int((~deltas(model)["masked"]["v"]).sum())
    rows = {t.name: t for t in compiled.manifest.tasks}
    assert n_mask <= rows["masked"].n_changed < 1.1 * n_mask  # the last rows are packed twice
    assert sizes["task_masked.patch"] == rows["masked"].n_gaps < 1.5 * n_mask
    assert rows["moved"].n_changed == WIDTH
    total = sum(size for name, size in sizes.items() if name.endswith(".patch"))
    assert total < 0.2 * sizes["weights.bin"]
    w = model.graph.initializers["w"].const_value.numpy()
    union = (w != 0) | (deltas(model)["tuned"]["w"] != 0)
    (layer,) = (x for x in compiled.manifest.layers if x["format"] != "dense")
    assert layer["density"] == pytest.approx(union.mean(), abs=1e-3)


def test_threads_may_run_different_tasks(three: tuple[ir.Model, Compiled]) -> None:
    model, compiled = three
    session = InferenceSession(compiled.path)
    wrong: list[str] = []

    def work(name: str | None) -> None:
        want = wanted(model, name)
        for _ in range(30):
            if np.abs(session.run(None, feed(), task=name)[0] - want).max() > 1e-4:
                wrong.append(str(name))

    threads = [threading.Thread(target=work, args=(n,)) for n in (None, "masked", "tuned")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_damaged_patch_is_found(three: tuple[ir.Model, Compiled], tmp_path: Path) -> None:
    from sparsegraph.errors import ArtefactError

    three[1].save(tmp_path / "m.sg")
    path = tmp_path / "m.sg" / "task_tuned.patch"
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtefactError, match=r"task_tuned\.patch"):
        InferenceSession(tmp_path / "m.sg")


def test_a_replaced_artefact_does_not_reach_an_old_session(tmp_path: Path) -> None:
    """A task that first runs after the replacement still has the weights that were checked."""
    model, path = network(1.0), tmp_path / "m.sg"
    tasks = {"moved": deltas(model)["moved"]}
    session = compile_tasks(model, tasks, output=path, check=False).session
    other = delta.fold(model, [{"v": np.ones((128, WIDTH), np.float32)}])[0]
    compile_tasks(other, tasks, output=path, check=False)
    assert session is not None
    found = session.run(None, feed(), task="moved")[0]
    np.testing.assert_allclose(found, wanted(model, "moved"), atol=1e-5)


def test_tasks_in_several_shapes(tmp_path: Path) -> None:
    generator = np.random.default_rng(SEED)
    source = ir.to_proto(filled(TEXT, lambda _, shape: generator.normal(size=shape) / 8))
    task = {"one": {"v": generator.normal(size=(128, WIDTH)).astype(np.float32) / 8}}
    shapes = [{"n": 8}, {"n": 16}]
    compiled = compile_tasks(source, task, shapes=shapes, output=tmp_path / "m.sg")
    assert compiled.session is not None
    for n in (8, 16):
        x = generator.normal(size=(n, WIDTH)).astype(np.float32)
        model = load(source, {"n": n})
        want = Session(delta.fold(model, [task["one"]])[0]).run({"x": x})["y"]
        (found,) = compiled.session.run(None, {"x": x}, task="one")
        np.testing.assert_allclose(found, want, atol=1e-4)


def test_a_tuned_model_is_a_task(tmp_path: Path) -> None:
    model = network(0.2)
    tuned = delta.fold(model, [deltas(model)["tuned"]])[0]
    delta.write(tmp_path / "d.npz", delta.difference(model, tuned))
    sources = {"whole": tuned, "patch": tmp_path / "d.npz"}
    session = compile_tasks(model, sources, output=tmp_path / "m.sg").session
    assert session is not None
    whole, patch = (session.run(None, feed(), task=name)[0] for name in sources)
    np.testing.assert_array_equal(whole, patch)
    np.testing.assert_allclose(whole, wanted(model, "tuned"), atol=1e-5)


def test_measured_times_choose_the_code_that_all_share(tmp_path: Path) -> None:
    """The file's fastest way for each product is what base and tasks get."""
    model, file = network(0.2), tmp_path / "times.json"
    first = compile_tasks(model, deltas(model), tune=True, tuning=file, output=tmp_path / "a.sg")
    assert first.tuned is not None
    data = json.loads(file.read_text())
    for entry in data["layers"].values():
        entry["ms"] = {way: 0.001 * (at + 1) for at, way in enumerate(reversed(entry["ms"]))}
    file.write_text(json.dumps(data))
    found = compile_tasks(model, deltas(model), tuning=file, output=tmp_path / "b.sg")
    assert found.tuned is None
    plain = compile_tasks(model, deltas(model), output=tmp_path / "c.sg")
    assert {row["is_measured"] for row in plain.manifest.layers} == {False}
    assert [row["ms"] for row in found.manifest.layers] == [0.001] * len(plain.manifest.layers)
    assert found.session is not None
    for name in (None, *deltas(model)):
        got = found.session.run(None, feed(), task=name)[0]
        np.testing.assert_allclose(got, wanted(model, name), atol=1e-5)


def test_unknown_names_are_one_clear_error(
    three: tuple[ir.Model, Compiled], artefact: Path
) -> None:
    session = three[1].session
    assert session is not None
    for make in (
        lambda: session.run(None, feed(), task="other"),
        lambda: InferenceSession(three[1].path, task="other"),
    ):
        with pytest.raises(UsageError, match="found no such task, need one of masked, tuned, mov"):
            make()
    with pytest.raises(UsageError, match="it has no tasks"):
        InferenceSession(artefact, task="other")


def test_what_is_no_task_of_the_base_is_refused(tmp_path: Path) -> None:
    model, path = network(1.0), tmp_path / "m.sg"
    for tasks, text in (
        ({}, "found none"),
        ({"../x": {}}, "need letters"),
        ({"a": {"z": np.ones(3)}}, "no such weight"),
        ({"a": other_architecture()}, r"Sigmoid\(t\)  -> u in place of Tanh"),
    ):
        with pytest.raises(UsageError, match=text):
            compile_tasks(model, tasks, output=path)
    with pytest.raises(UnsupportedError, match="shared libraries"):
        compile_tasks(model, deltas(model), "wasm", output=path)
    assert os.listdir(tmp_path) == []


def other_architecture() -> ir.Model:
    text = TEXT.replace("Tanh", "Sigmoid").replace("[n,", f"[{TOKENS},")
    return load(filled(text, lambda _, shape: np.ones(shape)))


def test_a_number_in_the_code_is_refused(tmp_path: Path) -> None:
    """A constant of one element is compiled into a kernel: no patch reaches it."""
    text = TEXT.replace(f"float[{WIDTH}] d", "float[1] d").replace("[n,", f"[{TOKENS},")
    generator = np.random.default_rng(SEED)
    model = load(filled(text, lambda _, shape: generator.normal(size=shape) / 8))
    task = {"twice": {"d": np.ones(1, np.float32)}}
    with pytest.raises(
        UnsupportedError, match=r"'twice': found other code for .*compile this task"
    ):
        compile_tasks(model, task, output=tmp_path / "m.sg")


def test_a_wrong_patch_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof runs every task, so a patch of the wrong words cannot get out."""
    between = Patch.between
    monkeypatch.setattr(Patch, "between", staticmethod(lambda a, b: between(a, np.roll(b, 1))))
    model = network(1.0)
    with pytest.raises(VerifyError):
        compile_tasks(model, deltas(model), output=tmp_path / "m.sg")
    assert os.listdir(tmp_path) == []
