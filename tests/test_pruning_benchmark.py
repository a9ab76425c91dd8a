from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from benchmarks import pruning, texts
from benchmarks.pruning import Row, read, save, table
from benchmarks.quality_tasks import _FACES, Score, Task, _decode, _lines
from sparsegraph.errors import CaptureError
from tests.test_demo_model import needs_weights
from tests.test_prune import encoder, feeds


def row(recipe: str, share: float, density: float) -> Row:
    return Row("job", recipe, density, share, 0.01, 100, None, 1.0, 1)


def test_rows_merge_by_task_and_recipe(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    save(path, [row("dense", 0.9, 1.0), row("a:0.5", 0.1, 0.5)], [])
    save(path, [row("a:0.5", 0.2, 0.5)], [])
    assert [(r.recipe, r.share) for r in read(path)] == [("dense", 0.9), ("a:0.5", 0.2)]


def test_the_table_counts_from_the_floor() -> None:
    rows = [row("a:0.5", 0.5, 0.5), row("floor", 0.2, 0.0), row("dense", 0.8, 1.0)]
    lines = table(rows).splitlines()
    assert [line.split()[1] for line in lines[1:]] == ["dense", "floor", "a:0.5"]
    assert [line.split()[6] for line in lines[1:]] == ["1.00", "0.00", "0.50"]


def test_a_note_ends_its_line() -> None:
    plain, noted = row("dense", 0.8, 1.0), replace(row("a:0.5", 0.5, 0.5), note="busy machine")
    lines = table([plain, noted]).splitlines()
    assert lines[1].endswith("1.0")
    assert lines[2].endswith("1.0  busy machine")


def test_rows_of_other_data_are_not_compared() -> None:
    rows = [row("floor", 0.2, 0.0), row("dense", 0.8, 1.0), row("a:0.5", 0.5, 0.5)]
    first, second = table([*rows[:2], replace(rows[2], data="other")]).split("\n\n")
    assert len(first.splitlines()) == 3
    assert "0.50 " not in second.splitlines()[1].split("0.010")[1]  # no share of dense


def test_a_task_is_measured_and_its_floor_is_worse() -> None:
    """The score is how many feeds keep their sign pattern: 1 for dense."""
    from sparsegraph.demo_model import onnx_runner

    model, given = encoder(), feeds(12)
    want = [np.sign(onnx_runner(model, threads=1)(f)) for f in given]

    def score(candidate: object) -> Score:
        run = onnx_runner(candidate, threads=1)  # type: ignore[arg-type]
        same = [(np.sign(run(f)) == w).mean() > 0.9 for f, w in zip(given, want)]
        return Score(float(np.mean(same)), len(given))

    task = Task("toy", model, given, score)
    assert pruning.measure(task, "dense").share == 1.0
    assert pruning.measure(task, "floor").share < 0.5
    found = pruning.measure(replace(task, data="d"), "admm:0.5")
    assert (found.data, bool(found.commit)) == ("d", True)
    assert found.density == pytest.approx(0.5, abs=0.01)
    assert found.share > pruning.measure(task, "random:0.9").share


def test_tasks_of_one_calibration_are_pruned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = encoder(), []
    by = pruning.pruned_by
    monkeypatch.setattr(pruning, "pruned_by", lambda *given: calls.append(given) or by(*given))
    tasks = {
        name: Task(name, model, feeds(n), lambda m, share=share: Score(share, 8), data=name)
        for name, n, share in (("a", 6, 0.25), ("b", 6, 0.5), ("c", 5, 0.75))
    }
    monkeypatch.setattr(pruning, "load", tasks.__getitem__)
    rows = pruning.measure_all(pruning.together("a+b"), "wanda:0.5")
    assert [(r.task, r.data, r.share) for r in rows] == [("a", "a", 0.25), ("b", "b", 0.5)]
    assert len(calls) == 1
    with pytest.raises(ValueError, match="'a\\+c': calibrated on different feeds"):
        pruning.together("a+c")


def small_weights() -> dict[str, np.ndarray]:
    """A checkpoint of one layer: 24 features, 12 heads, 48 hidden units, 50 words."""
    generator = np.random.default_rng(0)
    shapes = {f"embeddings.{n}_embeddings.weight": (m, 24)
              for n, m in (("word", 50), ("position", 16), ("token_type", 2))}  # fmt: skip
    scope = "encoder.layer.0"
    for name in ("attention.self.query", "attention.self.key", "attention.self.value",
                 "attention.output.dense"):  # fmt: skip
        shapes |= {f"{scope}.{name}.weight": (24, 24), f"{scope}.{name}.bias": (24,)}
    shapes |= {f"{scope}.intermediate.dense.weight": (48, 24), f"{scope}.output.dense.bias": (24,)}
    shapes |= {f"{scope}.intermediate.dense.bias": (48,), f"{scope}.output.dense.weight": (24, 48)}
    for name in ("embeddings", f"{scope}.attention.output", f"{scope}.output"):
        shapes |= {f"{name}.LayerNorm.{part}": (24,) for part in ("weight", "bias")}
    return {n: generator.normal(size=s).astype(np.float32) / 3 for n, s in shapes.items()}


def test_the_module_is_the_graph_and_tells_its_gradients() -> None:
    from benchmarks import minilm_torch
    from sparsegraph import minilm
    from sparsegraph.demo_model import onnx_runner
    from sparsegraph.prune import prune

    torch = pytest.importorskip("torch")
    weights = small_weights()
    model = minilm.build(weights, tokens=8)
    mask = np.array([[1, 1, 1, 1, 1, 0, 0, 0]])
    given = [{"input_ids": np.arange(8)[None] + 8 * i, "attention_mask": mask} for i in range(5)]
    module = minilm_torch.Encoder(weights)
    with torch.no_grad():
        found = module(*minilm_torch._Side.of(given[:1])).numpy()
    np.testing.assert_allclose(found, onnx_runner(model, threads=1)(given[0]), atol=1e-5)
    for method in ("taylor", "fisher", "relevance"):
        gradients = minilm_torch.gradients(method, weights, given[:4], given[1:])
        pruned = prune(model, f"{method}:0.5", gradients=gradients)
        assert pruned.density == pytest.approx(0.5, abs=0.01)
        assert len(pruned.table) == 6


def test_standard_errors() -> None:
    assert Score(0.5, 100).two_errors == pytest.approx(0.1)


def test_ctc_decoding_drops_repeats_and_blanks() -> None:
    steps = [0, 1, 1, 0, 1, 2, 2, 0]
    probabilities = np.eye(3)[steps]
    assert _decode(probabilities, ["", "a", "b"]) == "aab"


def test_package_descriptions_are_read(tmp_path: Path) -> None:
    long = " ".join(["word"] * 8)
    path = tmp_path / "status"
    path.write_text(
        f"Package: a\nDescription: short text\n {long}\n .\n {long}\n\n"
        f"Package: b\nDescription: too short\n only this\n"
    )
    assert texts.descriptions(path) == [("short text", f"{long} {long}")]


def test_texts_of_pinned_releases_are_those_that_were_scored() -> None:
    """The digests in `texts` hold, so that every machine scores the same pairs and lines."""
    scored = texts.documentation(texts.SCORED)
    assert not set(scored) & set(texts.documentation(texts.CALIBRATION))
    assert texts.digest(texts.sample(scored, 300)) == "dc0c45f8"
    assert texts.digest(_lines(152)) == "865a4e9b"
    assert len(set(_FACES)) == 21


def test_more_calibration_texts_than_a_release_has_come_from_python() -> None:
    few, many = texts.calibration(100), texts.calibration(400)
    release = texts.documentation(texts.CALIBRATION)
    assert few == many[:100] == texts.sample(release, 100)
    assert len(many) == len(set(many)) == 400
    assert set(many[len(release) :]).isdisjoint({*release, *texts.documentation(texts.SCORED)})


def test_what_recipes_are_chosen_by_is_not_scored() -> None:
    pairs = texts.documentation(texts.SCORED)
    held, scored = texts.held_out(300), texts.sample(pairs, 300)
    assert (len(held), set(held) & set(scored)) == (len(pairs) - 300, set())


def test_the_pins_of_texts_are_those_of_the_project() -> None:
    project = Path(__file__).parents[1].joinpath("pyproject.toml").read_text()
    for name, release in (texts.SCORED, texts.CALIBRATION):
        assert f'"{name}=={release}"' in project


def test_another_release_is_not_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CaptureError, match=r"'torch': found release 2\.13\.0.*, need 2\.12\.0"):
        texts.documentation(("torch", "2.12.0"))
    monkeypatch.setattr(texts, "prose", lambda folders: [("a", "b")])
    with pytest.raises(CaptureError, match="reinstall"):
        texts.documentation(texts.SCORED)


def test_prose_ends_before_arguments(tmp_path: Path) -> None:
    words = " ".join(f"word{letter}" for letter in "abcdefghijklmnopqrst")
    text = f"Say what this function does. {words}.\n\n    Args:\n        a: none\n"
    other = f"This one is not for anybody to read. {words[::-1]}."
    private = f'def _private():\n    r"""{other}"""\n'
    code = f'def public():\n    r"""{text}"""\n\n{private}'
    tmp_path.joinpath("m.py").write_text(code)
    assert texts.prose([tmp_path]) == [("Say what this function does.", f"{words}.")]


@needs_weights
def test_calibration_may_have_short_sentences_too() -> None:
    plain, both = pruning.load("minilm"), pruning.load("minilm-96")
    assert (plain.name, both.name) == ("minilm", "minilm-96")
    assert len(both.calibration) == 2 * len(plain.calibration) == 192
    n_tokens = [int(f["attention_mask"].sum()) for f in both.calibration]
    assert np.mean(n_tokens[::2]) < np.mean(n_tokens[1::2]) / 2


def test_published_results_keep_their_order() -> None:
    """Solving for the kept weights beats choosing alone, which beats magnitude and the lot."""
    rows = {(r.task, r.recipe): r for r in read(pruning.FILE)}
    rho = {r.recipe: r.rho for (task, _), r in rows.items() if task == "minilm"}
    order = ["random:0.7", "magnitude:0.7", "wanda:0.7", "sparsegpt:0.7", "admm:0.7"]
    assert [rho[a] < rho[b] for a, b in pairwise(order)] == [True] * 4
    order = ["random:0.7", "magnitude:0.7", "relevance:0.7@torch", "wanda:0.7"]
    assert [rho[a] < rho[b] for a, b in pairwise(order)] == [True] * 3
    assert rho["magnitude:0.7"] + 0.1 < rho["fisher:0.7@torch"]
    assert rho["magnitude:0.7"] + 0.1 < rho["taylor:0.7@torch"]
    assert rho["wanda:0.7"] < rho["wanda:0.7,allocate=ecoflap"]
    order = [f"{name}:0.5:channels" for name in ("random", "wanda", "lasso")]
    assert [rho[a] < rho[b] for a, b in pairwise(order)] == [True] * 2
    order = ["random:2:4", "magnitude:2:4", "wanda:2:4,permute=yes", "admm:2:4"]
    assert [rho[a] < rho[b] for a, b in pairwise(order)] == [True] * 3
    share = {r.recipe: r.share for (task, _), r in rows.items() if task == "v6"}
    assert share["magnitude:0.5"] < share["wanda:0.5"] < share["admm:0.5"]


def test_published_results_can_be_measured_again_and_hold_their_bars() -> None:
    """Every row names its commit and its data, which is one set for each job."""
    rows = read(pruning.FILE)
    assert all(row.commit and row.data for row in rows)
    jobs = {(row.task.partition("-")[0], row.data) for row in rows}
    assert len(jobs) == len({job for job, _ in jobs})
    found = {(row.task, row.recipe): row for row in rows}
    bars = {"admm:0.7,refit=yes": 0.80, "admm:0.8,refit=yes": 0.70, "admm:2:4": 0.90}
    for recipe, least in bars.items():
        assert (found["minilm-288", recipe].rho or 0) >= least
    share = {"admm:0.5": 0.97, "admm:0.6": 0.85, "admm:2:4": 0.90}
    for recipe, least in share.items():
        assert found["v6", recipe].share >= least


def test_retrieval_at_70_percent_keeps_what_its_bar_asks() -> None:
    """.73 of a dense .747 over a floor of .21; one pair more than needed, 17 of 300 are 2 SE."""
    rows = {row.recipe: row for row in read(pruning.FILE) if row.task == "minilm-1200"}
    best = rows["admm:0.7,swap=yes,refit=yes,balance=yes"]
    floor, dense = rows["floor"].share, rows["dense"].share
    assert (best.share - floor) / (dense - floor) >= (0.73 - 0.21) / (0.747 - 0.21)
    assert (best.rho or 0) >= 0.80
    assert best.density <= 0.301
