"""Tuning files: what was measured for which product on which machine.

A file belongs to one target, one CPU and one state of the kernels. A product is found by its shape,
its points and the digest of its pattern of zeros; weights themselves do not matter. The same file
gives the same plan, whatever machine compiles.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from sparsegraph import output
from sparsegraph.errors import UsageError, message
from sparsegraph.lower.choose import candidates, choose
from sparsegraph.lower.problem import Choice, Operands, Problem
from sparsegraph.machine import cpu_name
from sparsegraph.targets.target import Target

SCHEMA = 1
_CODE = (
    "formats.py", "lower/direct.py", "lower/panels.py", "lower/products.py",
    "lower/single_point.py", "lower/winograd.py", "targets/emit.py", "targets/layout.py",
    "targets/kernels/direct.py", "targets/kernels/gather.py", "targets/kernels/panel_product.py",
    "targets/kernels/phases.py", "targets/kernels/product.py", "targets/kernels/slots.py",
    "targets/kernels/vector_product.py", "targets/kernels/winograd.py",
)  # fmt: skip
"""Sources that decide what a kernel does; another state of them needs other measurements."""


@dataclass(frozen=True)
class Measured:
    """One product: its shape for people, and milliseconds by `Choice.way`, the fastest first."""

    layer: str
    ms: dict[str, float]


@dataclass
class Tuning:
    """The contents of a tuning file; `layers` by `key`."""

    target: str
    cpu: str
    kernels: str
    layers: dict[str, Measured] = field(default_factory=dict)

    @staticmethod
    def here(target: Target) -> Tuning:
        """An empty one for this machine and these kernels."""
        return Tuning(str(target), cpu_name(), kernel_digest())

    @staticmethod
    def read(path: Path, target: Target) -> Tuning:
        """The file of a target.

        Raises:
            UsageError: it cannot be read, is no tuning file, or is for another target or kernels.
        """
        found = Tuning.parse(path)
        fix = "tune again: compile --tune"
        if found.target != str(target):
            raise UsageError(message("tuning file", str(path), found.target, str(target), fix))
        if found.kernels != kernel_digest():
            have, need = f"kernels {found.kernels}", f"kernels {kernel_digest()}"
            raise UsageError(message("tuning file", str(path), have, need, fix))
        return found

    @staticmethod
    def parse(path: Path) -> Tuning:
        """Whatever tuning file lies at `path`.

        Raises:
            UsageError: there is none.
        """
        fix = "name another file, or delete it and compile --tune"
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            found = error.strerror or "no file"
            raise UsageError(message("tuning file", str(path), found, "a file", fix)) from error
        except ValueError as error:
            raise UsageError(message("tuning file", str(path), "no JSON", "JSON", fix)) from error
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            found = f"schema {data.get('schema')}" if isinstance(data, dict) else "no object"
            raise UsageError(message("tuning file", str(path), found, f"schema {SCHEMA}", fix))
        try:
            layers = {name: _measured(entry) for name, entry in data["layers"].items()}
            return Tuning(data["target"], data["cpu"], data["kernels"], layers)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            found = f"{type(error).__name__}: {error}"
            raise UsageError(
                message("tuning file", str(path), found, "tuning results", fix)
            ) from error

    def write(self, path: Path) -> None:
        """Write whole or not at all; equal contents give equal bytes."""
        layers = {key: dataclasses.asdict(m) for key, m in sorted(self.layers.items())}
        head = {"schema": SCHEMA, "target": self.target, "cpu": self.cpu, "kernels": self.kernels}
        output.write_json(path, {**head, "layers": layers})

    def choice(self, problem: Problem, operands: Operands, target: Target) -> Choice:
        """The measured way to compute a product, or the model's."""
        found = self.layers.get(key(problem, operands))
        if found is None:
            return choose(problem, target)
        way, ms = next(iter(found.ms.items()))
        ways = {c.way: c for c in candidates(problem, target)}
        if way not in ways:
            fix = "tune again: compile --tune"
            raise UsageError(message("tuning of", found.layer, way, ", ".join(ways), fix))
        return dataclasses.replace(ways[way], ms=ms, is_measured=True)


def key(problem: Problem, operands: Operands) -> str:
    """A digest of everything that a product's time depends on."""
    facts = dataclasses.asdict(dataclasses.replace(problem, density=0.0))
    window = operands.window
    facts["window"] = None if window is None else dataclasses.asdict(window)
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    digest.update(np.packbits(operands.weight != 0).tobytes())
    return digest.hexdigest()[:32]


def default_path(target: Target, cpu: str = "") -> Path:
    """Where results go that nobody named a file for: the user's cache folder."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "sparsegraph")
    machine = hashlib.sha256((cpu or cpu_name()).encode()).hexdigest()[:8]
    return folder / f"tuning-{str(target).replace(':', '-').replace(',', '-')}-{machine}.json"


@cache
def kernel_digest() -> str:
    """Digest of the sources in `_CODE`."""
    import sparsegraph.targets

    digest = hashlib.sha256()
    for name in _CODE:
        at_targets = name.startswith("targets/")
        root = Path(sparsegraph.targets.__file__ if at_targets else __file__).parent
        digest.update((root / name.removeprefix("targets/")).read_bytes())
    return digest.hexdigest()[:12]


def _measured(entry: Mapping[str, Any]) -> Measured:
    ms = {str(way): float(value) for way, value in entry["ms"].items()}
    if not ms or not all(0 < value < math.inf for value in ms.values()):
        raise ValueError(f"times {ms}")
    return Measured(str(entry["layer"]), dict(sorted(ms.items(), key=lambda item: item[1])))
