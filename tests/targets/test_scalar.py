"""Kernels for machines without vectors (lanes = 1): the families' own tests, on this machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NAMES = ("depthwise", "depthwise_masked", "pool", "resize", "convert")
FAMILIES = [str(HERE / f"test_{name}.py") for name in NAMES]
PLUGIN = """
import dataclasses
from sparsegraph import targets
here = targets.native()
targets.KNOWN[here.name] = dataclasses.replace(here, lanes=1)
"""


@pytest.mark.slow
def test_families_with_one_lane(tmp_path: Path) -> None:
    (tmp_path / "one_lane.py").write_text(PLUGIN)
    paths = os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", "")))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "one_lane"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", *FAMILIES],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
