"""Jobs with real weights and real text, for the quality of pruned models, and one without.

Retrieval: MiniLM-L6 finds the rest of a documentation text by its first sentence; calibrated on the
documentation of another package. Recognition: a PP-OCR recogniser reads rendered lines of real
words, rotated, blurred and noisy. Both report a floor with everything pruned. `benchmarks.texts`
says where the texts come from. ResNet-50 with random weights looks at random pictures: how far
pruning moves its outputs says something about budgets, and nothing about quality.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from benchmarks import texts, zoo
from sparsegraph import minilm
from sparsegraph.calibrate import Stream
from sparsegraph.capture import load
from sparsegraph.demo_model import onnx_runner, retrieval, spearman
from sparsegraph.errors import CaptureError, message
from sparsegraph.gradients import Gradient
from sparsegraph.pipeline import optimize
from sparsegraph.recipe import Recipe, select

Array = np.ndarray[Any, Any]
Feed = dict[str, Array]

_SEED = 0
_SHORT_TOKENS, _TOKENS = 32, 128
_FONTS = Path("/usr/share/fonts/truetype/dejavu")
_FACES = (
    *("Sans", "Sans-Bold", "Sans-BoldOblique", "Sans-ExtraLight", "Sans-Oblique"),
    *("SansCondensed", "SansCondensed-Bold", "SansCondensed-BoldOblique", "SansCondensed-Oblique"),
    *("SansMono", "SansMono-Bold", "SansMono-BoldOblique", "SansMono-Oblique", "Serif"),
    *("Serif-Bold", "Serif-BoldItalic", "Serif-Italic", "SerifCondensed", "SerifCondensed-Bold"),
    *("SerifCondensed-BoldItalic", "SerifCondensed-Italic"),
)
_HEIGHT, _WIDTH = 48, 320
_LONGEST_LINE = 22
_N_FRESH = 32


@dataclass(frozen=True)
class Score:
    """`share` of right answers out of `n`; `rho` is the rank correlation of similarities with the
    dense model's, None where there are none."""

    share: float
    n: int
    rho: float | None = None

    @property
    def two_errors(self) -> float:
        """Two standard errors of the share."""
        return 2 * math.sqrt(self.share * (1 - self.share) / self.n)


@dataclass(frozen=True)
class Task:
    """A dense model, calibration feeds, and `score(model)`; `data` identifies what is scored.

    `gradients(method)` asks a PyTorch module, where there is one. `fresh` feeds are for measuring
    divergence: calibration does not have them.
    """

    name: str
    model: ir.Model
    calibration: Sequence[Feed]
    score: Callable[[ir.Model], Score] = field(repr=False)
    data: str = ""
    gradients: Callable[[str], Mapping[str, Gradient]] | None = field(default=None, repr=False)
    fresh: Sequence[Feed] = ()

    def floor(self) -> Score:
        """The score with every layer that pruning selects set to zero."""
        copy = self.model.clone()
        for layer in select(copy, Recipe.parse("magnitude:0.5"))[0]:
            zeros = np.zeros_like(layer.array())
            layer.value.const_value = ir.tensor(zeros, name=layer.value.name)
        return self.score(copy)


def minilm_retrieval(
    n_pairs: int = 300,
    n_calibration: int = 96,
    *,
    with_short: bool = False,
    pairs: Sequence[texts.Pair] | None = None,
    own: Sequence[texts.Pair] = (),
) -> Task:
    """Retrieval with the MiniLM wheel; raises CaptureError when it, or a text, is not there.

    Calibrated on the long part of as many other texts, and on their first sentences if
    `with_short`: half of what is scored are short sentences. `pairs` replaces what is scored, `own`
    the first of the texts to calibrate on.
    """
    folder = minilm.model_folder()
    weights = minilm.read_weights(folder / "model.safetensors")
    model = minilm.build(weights, tokens=_TOKENS)
    tokenizer = minilm.Tokenizer(folder / "tokenizer.json", _TOKENS)
    drawn = texts.calibration(n_calibration + _N_FRESH)
    shown = [*own, *drawn[:n_calibration]][:n_calibration]
    feeds = tokenizer.feeds([text for pair in shown for text in pair[0 if with_short else 1 :]])
    asked = list(pairs) if pairs is not None else texts.documentation(texts.SCORED)
    scored = _Retrieval(model, tokenizer, texts.sample(asked, n_pairs))
    name = f"minilm-{n_calibration}" if with_short else "minilm"

    def gradients(method: str) -> Mapping[str, Gradient]:
        from benchmarks import minilm_torch

        sides = (tokenizer.feeds([pair[part] for pair in shown]) for part in (0, 1))
        return minilm_torch.gradients(method, weights, *sides)

    fresh = tokenizer.feeds([pair[1] for pair in drawn[n_calibration:]])
    return Task(name, model, feeds, scored.score, texts.digest(scored.pairs), gradients, fresh)


@dataclass(frozen=True)
class _Retrieval:
    model: ir.Model
    tokenizer: minilm.Tokenizer
    pairs: Sequence[texts.Pair]

    @cached_property
    def _dense(self) -> Array:
        return self._similarity(self.model)

    def score(self, model: ir.Model) -> Score:
        similarity = self._similarity(model)
        return Score(retrieval(similarity)[0], len(self.pairs), spearman(similarity, self._dense))

    @cached_property
    def _feeds(self) -> list[list[Feed]]:
        """[queries, documents], each padded to 32 tokens if it fits, to 128 otherwise."""
        parts = ([pair[part] for pair in self.pairs] for part in (0, 1))
        return [[_trimmed(f) for f in self.tokenizer.feeds(part)] for part in parts]

    def _similarity(self, model: ir.Model) -> Array:
        run = {_TOKENS: onnx_runner(model), _SHORT_TOKENS: onnx_runner(self._short(model))}
        queries, documents = (
            np.stack([run[f["input_ids"].shape[1]](f)[0].astype(np.float64) for f in feeds])
            for feeds in self._feeds
        )
        return np.asarray(queries @ documents.T)

    def _short(self, model: ir.Model) -> ir.Model:
        """The model for 32 tokens, with the weights and biases of `model`."""
        weights = minilm.read_weights(minilm.model_folder() / "model.safetensors")
        short = minilm.build(weights, tokens=_SHORT_TOKENS)
        for name, value in short.graph.initializers.items():
            if name.startswith("encoder."):
                value.const_value = model.graph.initializers[name].const_value
        return short


def _trimmed(feed: Feed) -> Feed:
    n_used = int(feed["attention_mask"].sum())
    return {k: v[:, :_SHORT_TOKENS] for k, v in feed.items()} if n_used <= _SHORT_TOKENS else feed


def pictures(n_calibration: int = 16) -> Task:
    """ResNet-50 with random weights and batch norms that fit its calibration pictures.

    Scored: how often the largest of its outputs stays the largest.
    """
    feeds = [{"input": _picture(i)} for i in range(n_calibration + _N_FRESH)]
    shown, fresh = feeds[:n_calibration], feeds[n_calibration:]
    model = load(zoo.build("resnet50"))
    _fit_batch_norms(model, shown)
    model = optimize(model, verify=False).model
    run = onnx_runner(model)
    wanted = [int(run(feed)[0].argmax()) for feed in fresh]

    def score(candidate: ir.Model) -> Score:
        found = onnx_runner(candidate)
        right = [int(found(feed)[0].argmax()) == best for feed, best in zip(fresh, wanted)]
        return Score(float(np.mean(right)), len(fresh))

    data = texts.digest(np.concatenate([feed["input"] for feed in feeds]))
    return Task("resnet50", model, shown, score, data, fresh=fresh)


def _fit_batch_norms(model: ir.Model, feeds: Sequence[Feed]) -> None:
    """Give batch norms the means and variances of what they read, as training would."""
    stream = Stream(model, feeds)
    for node in [n for n in model.graph if n.op_type == "BatchNormalization"]:
        value = node.inputs[0]
        assert value is not None
        stream.advance(value)
        x = np.concatenate([stream.value(i, value) for i in range(len(feeds))])
        for at, array in ((3, x.mean(axis=(0, 2, 3))), (4, x.var(axis=(0, 2, 3)))):
            held = node.inputs[at]
            assert held is not None
            held.const_value = ir.tensor(array, name=held.name)


def _picture(seed: int) -> Array:
    """Random clouds, [1, 3, 224, 224]; as in photographs, power falls with frequency squared."""
    generator = np.random.default_rng([_SEED, seed])
    noise = np.fft.rfft2(generator.normal(size=(3, 224, 224)))
    high, wide = np.fft.fftfreq(224)[:, None], np.fft.rfftfreq(224)[None]
    clouds = np.fft.irfft2(noise / np.hypot(high, wide).clip(1 / 224), s=(224, 224))
    mixed = np.einsum("ij,jhw->ihw", generator.normal(size=(3, 3)), clouds)
    return np.asarray(mixed / mixed.std(), dtype=np.float32)[None]


def recognition(path: Path, name: str, n_lines: int = 120, n_calibration: int = 32) -> Task:
    """Reading rendered lines with a PP-OCR recogniser; needs Pillow and the DejaVu fonts.

    `data` counts the pixels too: another Pillow may draw them differently.
    """
    model = load(path, {"x": (1, 3, _HEIGHT, _WIDTH)})
    alphabet = _alphabet(model)
    lines = _lines(n_lines + n_calibration)
    feeds = [{"x": _render(text, i)} for i, text in enumerate(lines)]
    shown, asked = lines[:n_lines], feeds[:n_lines]

    def score(candidate: ir.Model) -> Score:
        run = onnx_runner(candidate)
        read = [_decode(run(feed)[0], alphabet) for feed in asked]
        right = [a.replace(" ", "") == b.replace(" ", "") for a, b in zip(read, shown)]
        return Score(float(np.mean(right)), n_lines)

    data = texts.digest(np.concatenate([feed["x"] for feed in feeds]))
    return Task(name, model, feeds[n_lines:], score, data)


def _alphabet(model: ir.Model) -> list[str]:
    """Class 0 is the blank; the last class is a space."""
    return ["", *model.metadata_props["character"].splitlines(), " "]


def _lines(n: int) -> list[str]:
    """Lines of two or three words of documentation, all different."""
    prose = texts.documentation(texts.SCORED)
    words = sorted({w for pair in prose for w in re.findall(r"\b[A-Za-z]{3,9}\b", pair[1])})
    generator = np.random.default_rng(_SEED)
    found: dict[str, None] = {}
    while len(found) < n:
        line = " ".join(generator.choice(words, size=int(generator.integers(2, 4))))
        if len(line) <= _LONGEST_LINE:
            found[line] = None
    return list(found)


def _render(text: str, seed: int) -> Array:
    """A line as the recogniser wants it, [1, 3, 48, 320] in [-1, 1]."""
    from PIL import Image, ImageDraw, ImageFilter, ImageFont

    generator = np.random.default_rng([_SEED, seed])
    font = ImageFont.truetype(_font(_FACES[int(generator.integers(len(_FACES)))]), 40)
    box = font.getbbox(text)
    page = Image.new("L", (int(box[2]) + 40, 80), 255)
    ImageDraw.Draw(page).text((20, 16), text, font=font, fill=int(generator.integers(0, 90)))
    page = page.rotate(float(generator.uniform(-1.5, 1.5)), fillcolor=255)
    page = page.filter(ImageFilter.GaussianBlur(float(generator.uniform(0.2, 1.2))))
    wide = min(round(page.width * _HEIGHT / page.height), _WIDTH)
    pixels: Array = np.asarray(page.resize((wide, _HEIGHT)), dtype=np.float32)
    pixels = pixels + generator.normal(scale=generator.uniform(2, 14), size=pixels.shape)
    line = np.zeros((_HEIGHT, _WIDTH), dtype=np.float32)
    line[:, :wide] = np.clip(pixels, 0, 255) / 127.5 - 1
    return np.broadcast_to(line, (1, 3, _HEIGHT, _WIDTH)).copy()


def _font(face: str) -> Path:
    path = _FONTS / f"DejaVu{face}.ttf"
    if not path.exists():
        fix = "apt-get install fonts-dejavu-core fonts-dejavu-extra"
        raise CaptureError(message("font", path.name, "no such file", "the DejaVu fonts", fix))
    return path


def _decode(probabilities: Array, alphabet: Sequence[str]) -> str:
    """Greedy CTC: the best class of every step, repeats and blanks dropped."""
    best = probabilities.argmax(axis=1)
    kept = best[np.flatnonzero(np.diff(best, prepend=-1))]
    return "".join(alphabet[i] for i in kept if i < len(alphabet))
