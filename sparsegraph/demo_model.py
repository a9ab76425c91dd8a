"""The default job's model, calibration text and quality metric, all real and all local.

Task: retrieval over the docstrings of this Python's standard library. The query is a docstring's
first sentence, the document is the rest of it. Calibration text comes from other modules, so
nothing that is scored was seen while pruning.
"""

from __future__ import annotations

import ast
import re
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from sparsegraph import minilm
from sparsegraph.errors import CaptureError, message

Array = np.ndarray[Any, Any]
Feed = Mapping[str, Array]
Run = Callable[[Feed], Array]

# Calibration and evaluation modules are split by this hash of the module name, never by docstring.
_EVALUATION_SHARE = 4  # of 8 name buckets
_MIN_QUERY_WORDS, _MIN_DOCUMENT_WORDS = 5, 15
_SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages"}


@dataclass(frozen=True)
class Passage:
    """One docstring: where it stands, its first sentence, and the rest."""

    module: str
    name: str
    query: str
    document: str


@dataclass(frozen=True)
class Quality:
    """Retrieval quality of one encoder over the demo's pairs.

    recall_at_1 and mrr are in [0, 1]; rho is the Spearman rank correlation of all query-document
    similarities with the dense model's (1 for the dense model itself).
    """

    recall_at_1: float
    mrr: float
    rho: float


def split_docstring(text: str) -> tuple[str, str] | None:
    """(first sentence, rest) of a docstring, or None when either is too short to be a task."""
    flat = " ".join(text.split())
    parts = re.split(r"(?<=[.!?])\s", flat, maxsplit=1)
    if len(parts) < 2 or len(parts[0].split()) < _MIN_QUERY_WORDS:
        return None
    return (parts[0], parts[1]) if len(parts[1].split()) >= _MIN_DOCUMENT_WORDS else None


def _docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of every class and function in a source file."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield node.name, text


@cache
def passages(folder: Path | None = None) -> tuple[Passage, ...]:
    """Every usable docstring of the standard library, ordered by path; queries are distinct."""
    root = folder or Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, Passage] = {}
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if _SKIPPED_FOLDERS & set(inside.parts):
            continue
        for name, text in _docstrings(path):
            pair = split_docstring(text)
            if pair is not None:
                found.setdefault(pair[0], Passage(inside.as_posix(), name, *pair))
    return tuple(found.values())


def _bucket(module: str) -> int:
    return sum(module.split("/")[0].removesuffix(".py").encode()) % 8


def split(found: Sequence[Passage]) -> tuple[list[Passage], list[Passage]]:
    """(evaluation, calibration) passages; no top-level module appears in both."""
    evaluation = [p for p in found if _bucket(p.module) < _EVALUATION_SHARE]
    calibration = [p for p in found if _bucket(p.module) >= _EVALUATION_SHARE]
    return evaluation, calibration


def _sample(found: Sequence[Passage], n: int, seed: int, what: str) -> list[Passage]:
    if len(found) < n:
        fix = f"ask for at most {len(found)}, or run a Python that ships its library sources"
        raise CaptureError(message("demo text", what, f"{len(found)} docstrings", str(n), fix))
    order = np.random.default_rng(seed).permutation(len(found))[:n]
    return [found[i] for i in sorted(order)]


def _ranks(values: Array) -> Array:
    """Ranks of a flat array, 0 for the smallest; ties keep their order (floats rarely tie)."""
    ranks = np.empty(values.size)
    ranks[np.argsort(values, kind="stable")] = np.arange(values.size)
    return ranks


def spearman(a: Array, b: Array) -> float:
    """Spearman rank correlation of two arrays of equal size."""
    return float(np.corrcoef(_ranks(a.ravel()), _ranks(b.ravel()))[0, 1])


def retrieval(similarity: Array) -> tuple[float, float]:
    """(R@1, MRR) of a [query, document] matrix whose right answers lie on the diagonal.

    Ties count against the right answer, so a constant encoder scores the worst rank, not the best.
    """
    right = np.diag(similarity)[:, None]
    rank = (similarity >= right).sum(axis=1)
    return float((rank == 1).mean()), float((1.0 / rank).mean())


@dataclass(frozen=True)
class Demo:
    """A model, feeds to calibrate on, and feeds to score on."""

    model: ir.Model
    calibration: Sequence[Feed]
    queries: Sequence[Feed]
    documents: Sequence[Feed]

    @cached_property
    def _dense_similarity(self) -> Array:
        return self.similarity(onnx_runner(self.model))

    def similarity(self, run: Run, on_feed: Callable[[int, int], None] | None = None) -> Array:
        """Cosine similarities [n_queries, n_documents] of an encoder, one sentence per call.

        `on_feed(done, total)` is called after every sentence.
        """
        feeds = [*self.queries, *self.documents]
        rows = []
        for done, feed in enumerate(feeds, 1):
            rows.append(np.asarray(run(feed), dtype=np.float64).reshape(-1))
            if on_feed is not None:
                on_feed(done, len(feeds))
        embeddings = np.stack(rows)
        n = len(self.queries)
        return embeddings[:n] @ embeddings[n:].T

    def evaluate(self, run: Run, on_feed: Callable[[int, int], None] | None = None) -> Quality:
        """Quality of `run(feed) -> embedding`; the dense model is run once, at the first call."""
        similarity = self.similarity(run, on_feed)
        recall, mrr = retrieval(similarity)
        return Quality(recall, mrr, spearman(similarity, self._dense_similarity))

    def dense(self) -> Quality:
        """Quality of the unpruned model in ONNX Runtime."""
        return Quality(*retrieval(self._dense_similarity), rho=1.0)

    def floor(self) -> Quality:
        """Quality with every linear layer zeroed: what the embeddings alone can do."""
        return self.evaluate(onnx_runner(without_linears(self.model)))


def without_linears(model: ir.Model) -> ir.Model:
    """A copy of the demo's model whose linear weights are all zero."""
    copy = model.clone()
    for name, value in copy.graph.initializers.items():
        array = value.const_value
        if name.startswith("encoder.") and array is not None and len(array.shape) == 2:
            zeros = np.zeros_like(array.numpy())
            value.const_value = ir.tensor(zeros, name=name)
    return copy


def onnx_runner(model: ir.Model, *, threads: int = 0) -> Run:
    """The model's first output in ONNX Runtime as a function of a feed (0 threads: all cores)."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    proto = ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])

    def run(feed: Feed) -> Array:
        return np.asarray(session.run(None, dict(feed))[0])

    return run


def load(*, n_pairs: int = 200, n_calibration: int = 96, tokens: int = 128, seed: int = 0) -> Demo:
    """Model with real weights, `n_pairs` retrieval pairs, two calibration feeds per other passage.

    Raises CaptureError naming the missing package, or when the standard library has too few
    docstrings.
    """
    folder = minilm.model_folder()
    weights = minilm.read_weights(folder / "model.safetensors")
    tokenizer = minilm.Tokenizer(folder / "tokenizer.json", tokens)
    evaluation, calibration = split(passages())
    pairs = _sample(evaluation, n_pairs, seed, "evaluation")
    shown = _sample(calibration, n_calibration, seed, "calibration")
    return Demo(
        model=minilm.build(weights, tokens=tokens),
        calibration=tokenizer.feeds([text for p in shown for text in (p.query, p.document)]),
        queries=tokenizer.feeds([p.query for p in pairs]),
        documents=tokenizer.feeds([p.document for p in pairs]),
    )
