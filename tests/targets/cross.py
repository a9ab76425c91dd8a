"""Models for other machines in tests: smaller than in the benchmarks, held to a limit."""

import shutil
import subprocess
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
from sparsegraph.targets.target import PACKAGES, Target

from benchmarks import bundles
from benchmarks.bundles import MODULE_RUNNER, STRICT, build_runner, build_source, execute
from sparsegraph import targets, verify
from sparsegraph.compile import Compiled, load

__all__ = ["MODULE_RUNNER", "STRICT", "build_runner", "build_source", "execute"]

SMALLER = {"minilm": {"sequence": 64, "layers": 2}}
LIMIT = 1e-4  # largest |a - b| / max |b|


def require(*tools: str) -> None:
    """Skip the test, naming the packages, unless all commands are installed, and C libraries."""
    for tool in tools:
        path = shutil.which(tool)
        if path is None or ("linux" in tool and tool.endswith("gcc") and not _has_headers(path)):
            pytest.skip(f"needs {tool} (Debian: {PACKAGES[tool]})")


@cache
def _has_headers(compiler: str) -> bool:
    command = [compiler, "-E", "-include", "stdio.h", "-x", "c", "/dev/null"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def require_for(target: Target) -> None:
    """Skip unless programs for `target` can be linked and run."""
    if not targets.runs_here(target):
        require(*target.linker[:1], *target.emulator[:1])


def run(target: Target, program: Path, *args: object) -> subprocess.CompletedProcess[str]:
    return execute(*bundles.emulator(target), program, *args)


class Case(bundles.Case):
    """A pruned model of the zoo; MiniLM has two layers."""

    def __init__(self, name: str, density: float) -> None:
        model = bundles.MODELS[name]
        super().__init__(bundles.Model(name, SMALLER.get(name, model.sizes)), density)

    def check(self, compiled: Compiled, *command: object) -> None:
        """Run `command INPUTS... OUTPUTS...` on the feeds and compare what it writes."""
        assert self.error(compiled, *command) <= LIMIT


WIDE = """<ir_version: 9, opset_import: ["" : 17]>
g (int64[13] x) => (float[13] y) <float half = {0.5}, int64 three = {3}> {
  f = Cast<to=1>(x)  h = Mul(f, half)  i = Cast<to=7>(h)  d = Div(i, three)  y = Cast<to=1>(d)
}"""


class Wide(bundles.Case):
    """64-bit integers to floats and back: library calls on 32-bit machines."""

    def __init__(self) -> None:
        self.proto = onnx.parser.parse_model(WIDE)
        numbers = [0, 1, 6, -6, 100, -1000, 1 << 20, -(1 << 30), 1 << 33, -(1 << 40), 1 << 50]
        self.feeds = {"x": np.array([*numbers, 7, -7])}
        self.expected = verify.run_onnx(load(self.proto), self.feeds)
