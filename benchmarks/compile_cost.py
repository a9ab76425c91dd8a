"""Compile one model in a fresh process: seconds, peak memory, weight bytes.

python -m benchmarks.compile_cost model.onnx     ->  one line of JSON
"""

import importlib
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import onnx
from sparsegraph.targets import compiler as compiler_processes

from benchmarks import prune
from benchmarks.results import Cost
from benchmarks.workloads import WORKLOADS
from benchmarks.zoo.counts import parameters

CHILD = "benchmarks.compile_cost"
FLOAT_BYTES = 4
KIB = 1024
ROOT = Path(__file__).resolve().parent.parent


def measure(workload: str, density: float) -> Cost:
    """Build, prune and save the model here, compile it in a child process."""
    work = WORKLOADS[workload]
    model = work.build(density)
    total = parameters(model) * FLOAT_BYTES
    dense = FLOAT_BYTES * sum(
        math.prod(shape)
        for shape in {s.weight: s.shape for s in prune.selected(model, work.selector)}.values()
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        onnx.save(model, file)
        child = subprocess.run(
            [sys.executable, "-m", CHILD, str(file)],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    if child.returncode:
        reason = child.stderr.strip().splitlines()[-1:] or [f"exit code {child.returncode}"]
        return Cost(workload, density, error=reason[0])
    figures = json.loads(child.stdout.splitlines()[-1])
    return Cost(
        workload, density, dense_weight_bytes=dense, other_weight_bytes=total - dense, **figures
    )


def main(arguments: list[str]) -> None:
    """The child: compile the file named first, print the figures."""
    compiler: Any = importlib.import_module("sparsegraph")
    start = time.perf_counter()
    compiled = compiler.compile(onnx.load(arguments[0]), target="native", threads=1)
    seconds = time.perf_counter() - start
    compiler_processes.end_servers()  # only those that ended are counted
    figures = {
        "compile_s": seconds,
        "peak_memory_bytes": _peak_bytes(),
        "weight_bytes": getattr(compiled, "weight_bytes", None),
    }
    print(json.dumps(figures))


def _peak_bytes() -> int:
    """Own peak plus the largest child's; children of code generation share most of theirs."""
    own, children = (
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return (own + children) * (1 if sys.platform == "darwin" else KIB)


if __name__ == "__main__":
    main(sys.argv[1:])
