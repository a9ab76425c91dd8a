"""Texts that any machine rebuilds: documentation inside the releases that pyproject.toml pins.

Scored: prose of torch's docstrings, first sentence against the rest. Calibration: the same of
TVM's, so no sentence is in both. Both are read from source files; neither package is imported. Who
wants more than TVM's 318 texts gets docstrings of the standard library, which differ a little
between releases of Python.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import numpy as np

from sparsegraph.demo_model import passages
from sparsegraph.errors import CaptureError, message

Pair = tuple[str, str]

SCORED, CALIBRATION = ("torch", "2.13.0"), ("apache-tvm", "0.27.0.post1")
_SOURCES = {  # package and its folders; others hold the same sentences again, or none
    "torch": (
        *("torch", "amp", "autograd", "compiler", "cuda", "distributed", "distributions"),
        *("export", "futures", "fx", "nn", "optim", "package", "profiler", "utils"),
    ),
    "apache-tvm": ("tvm", "backend", "ir", "relax", "runtime", "s_tir", "script", "tirx", "topi"),
}
_DIGESTS = {"torch": "4a7dfb19", "apache-tvm": "b89d974f"}
_SEED = 0
_LEAST_WORDS, _MOST_QUERY_WORDS = 20, 25
_LEAST_DESCRIPTION = 15  # words, as in published figures
_STATUS = Path("/var/lib/dpkg/status")
_NOT_PROSE = re.compile(
    r"\s(?:\w+ )?(?:Args?|Arguments|Parameters?|Returns?|Yields?|Examples?|Raises|Attributes|Usage"
    r"|Shape|References|Inputs?|Outputs?)\s*(?:::?|-{3,})|\s\.\. |>>>|```|\s#|\$\$"
)


def documentation(release: tuple[str, str]) -> list[Pair]:
    """(first sentence, prose that follows) of every public docstring of a pinned release.

    Raises CaptureError when another release is installed, or its sources hold other texts.
    """
    name, need = release
    found = _version(name)
    if found.partition("+")[0] != need:
        fix = f"pip install {name}=={need}"
        raise CaptureError(message("texts", name, f"release {found}", need, fix))
    package, *folders = _SOURCES[name]
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent
    pairs = prose([root / folder for folder in folders])
    if digest(pairs) != _DIGESTS[name]:
        fix = f"reinstall {name}=={need} without changes"
        raise CaptureError(message("texts", name, digest(pairs), _DIGESTS[name], fix))
    return pairs


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "none"


def prose(folders: Sequence[Path]) -> list[Pair]:
    """Pairs from the sources in folders, up to the first section, example or formula block.

    Of texts that begin alike but for digits, as those of 1D and 2D layers do, the first counts.
    """
    found: dict[str, Pair] = {}
    alike: set[str] = set()
    for passage in (p for folder in folders for p in passages(folder)):
        parts = (*passage.module.split("/"), passage.name)
        is_private = any(p.startswith("_") and p != "__init__.py" for p in parts)
        document = _NOT_PROSE.split(f" {passage.document}", maxsplit=1)[0].strip()
        n_words = len(document.split())
        if is_private or n_words < _LEAST_WORDS or _NOT_PROSE.search(f" {passage.query}"):
            continue
        keys = {_letters(passage.query), _letters(document)}
        if len(passage.query.split()) <= _MOST_QUERY_WORDS and not keys & alike:
            found[document] = (passage.query, document)
            alike |= keys
    return list(found.values())


def _letters(text: str) -> str:
    """The first 40 letters of a text."""
    return re.sub("[^a-z]", "", text.lower())[:40]


def sample(pairs: list[Pair], n: int) -> list[Pair]:
    """`n` pairs by lot, always the same ones of the same list."""
    order = np.random.default_rng(_SEED).permutation(len(pairs))[:n]
    return [pairs[i] for i in order]


def held_out(n_scored: int) -> list[Pair]:
    """The pairs of torch's that are not among the `n_scored` that are scored: to choose by."""
    pairs = documentation(SCORED)
    return sample(pairs, len(pairs))[n_scored:]


def calibration(n: int) -> list[Pair]:
    """`n` pairs of TVM's by lot; beyond what it has, of this Python's standard library."""
    drawn = sample(documentation(CALIBRATION), n)
    if len(drawn) == n:
        return drawn
    others = [(passage.query, passage.document) for passage in passages()]
    return drawn + sample(others, n - len(drawn))


def descriptions(path: Path = _STATUS) -> list[Pair]:
    """(short, long) descriptions of the Debian packages of this machine; short ones are distinct.

    Other machines have other packages: results on them do not compare.
    """
    found: dict[str, str] = {}
    for stanza in path.read_text(encoding="utf-8").split("\n\n"):
        match = re.search(r"^Description: (.+)\n((?: .*\n?)+)", stanza, re.M)
        if match is not None:
            text = " ".join(match[2].replace("\n .", " ").split())
            if len(text.split()) >= _LEAST_DESCRIPTION:
                found.setdefault(match[1], text)
    return list(found.items())


def digest(data: object) -> str:
    """Eight letters that change with the data; arrays count by their bytes."""
    raw = data.tobytes() if isinstance(data, np.ndarray) else repr(data).encode()
    return hashlib.sha256(raw).hexdigest()[:8]
