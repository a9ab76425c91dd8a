"""Measure one workload: engines of this environment together, peers each beside their own ORT."""

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx

from benchmarks import zoo
from benchmarks.engines import REFERENCE, Feeds, Prepared, prepare, relative_error
from benchmarks.results import Row
from benchmarks.timing import Plan, Timing, interleave, pinned
from benchmarks.workloads import Workload

ROOT = Path(__file__).resolve().parent.parent
FLOAT_BYTES = 4
PEER_TIMEOUT_S = 600
PEER_ENVIRONMENT = {"NM_DISABLE_ANALYTICS": "True", "CI": "true"}
"""Peers must not report this machine to their vendors: DeepSparse's switch, OpenVINO's switch."""


@dataclass(frozen=True)
class Setup:
    """What runs, and how."""

    engines: tuple[str, ...] = ("sparsegraph",)
    """Engines of this environment that run beside ONNX Runtime."""
    peers: Mapping[str, str] | None = None
    """Engine -> Python interpreter of the environment that has it."""
    threads: int = 1
    pattern: str = "unstructured"
    plan: Plan = field(default_factory=Plan)


def measure(workload: Workload, density: float, setup: Setup) -> list[Row]:
    """One row per engine; an engine that fails gives a row with the reason."""
    model = workload.build(density, setup.pattern)
    blank = Row(
        kind=workload.kind,
        workload=workload.name,
        density=density,
        pattern=setup.pattern if density < 1 else "dense",
        engine=REFERENCE,
        threads=setup.threads,
        dense_weight_bytes=zoo.parameters(model) * FLOAT_BYTES or None,
        gmacs=_gmacs(model),
    )
    feeds = zoo.feeds(model)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        onnx.save(model, file)
        rows = measure_file(file, feeds, setup, blank)
        for peer, python in (setup.peers or {}).items():
            rows.append(_measure_peer(peer, python, file, feeds, setup, blank))
    return rows


def measure_file(file: Path, feeds: Feeds, setup: Setup, blank: Row) -> list[Row]:
    """Prepare all engines, compare their outputs with the reference, time them interleaved."""
    rows, prepared = [], {}
    for engine in (REFERENCE, *setup.engines):
        try:
            prepared[engine] = prepare(engine, file, feeds, setup.threads)
            prepared[engine].call()
        except Exception as error:
            prepared.pop(engine, None)
            rows.append(replace(blank, engine=engine, error=_reason(error)))
    if REFERENCE not in prepared:
        return rows
    expected = [np.array(output) for output in prepared[REFERENCE].call()]
    errors = {engine: relative_error(list(p.call()), expected) for engine, p in prepared.items()}
    with pinned(setup.threads):
        times = interleave({engine: p.call for engine, p in prepared.items()}, setup.plan)
    reference = times[REFERENCE]
    done = [
        _row(blank, engine, times[engine], reference, prepared[engine], errors[engine])
        for engine in prepared
    ]
    return done + rows


def peer_request(file: Path, feeds: Path, engine: str, setup: Setup) -> str:
    """The one line of JSON that `benchmarks.peer_worker` reads."""
    return json.dumps(
        {
            "model": str(file),
            "feeds": str(feeds),
            "engine": engine,
            "threads": setup.threads,
            "plan": asdict(setup.plan),
        }
    )


def _measure_peer(
    peer: str, python: str, file: Path, feeds: Feeds, setup: Setup, blank: Row
) -> Row:
    arrays = file.with_name("feeds.npz")
    np.savez(arrays, **feeds)  # type: ignore[arg-type]
    request = peer_request(file, arrays, peer, setup)
    environment = {**os.environ, **PEER_ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    try:
        run = subprocess.run(
            [python, "-m", "benchmarks.peer_worker"],
            input=request,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=PEER_TIMEOUT_S,
        )
        answer = json.loads(run.stdout.splitlines()[-1])
    except (OSError, subprocess.TimeoutExpired) as error:
        return replace(blank, engine=peer, error=_reason(error))
    except (IndexError, json.JSONDecodeError):
        last = run.stderr.strip().splitlines()[-1:] or [f"exit code {run.returncode}"]
        return replace(blank, engine=peer, error=last[0])
    return replace(blank, engine=peer, **answer)


def _row(
    blank: Row, engine: str, time: Timing, reference: Timing, prepared: Prepared, error: float
) -> Row:
    return replace(
        blank,
        engine=engine,
        version=prepared.version,
        median_ms=time.median_ms,
        min_ms=time.min_ms,
        reference_ms=reference.median_ms,
        reference_min_ms=reference.min_ms,
        n_samples=time.n_samples,
        n_dropped=time.n_dropped,
        is_noisy=time.is_noisy or reference.is_noisy,
        max_rel_error=error,
        prepare_s=prepared.prepare_s,
        weight_bytes=prepared.weight_bytes,
    )


def _gmacs(model: onnx.ModelProto) -> float | None:
    try:
        return zoo.macs(model) / 1e9
    except ValueError:
        return None


def _reason(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"[:300]
