"""Runs inside a peer's own environment: ONNX Runtime and the peer on one file, interleaved.

Reads one line of JSON (see `benchmarks.measure.peer_request`) and answers with one. It needs
NumPy, onnxruntime and the peer; neither onnx nor sparsegraph.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np

from benchmarks.engines import REFERENCE, prepare, relative_error
from benchmarks.timing import Plan, interleave, pinned


def answer(request: dict[str, object]) -> dict[str, object]:
    """Measured fields of a result row, or `error` alone."""
    model, engine = Path(str(request["model"])), str(request["engine"])
    threads = int(str(request["threads"]))
    with np.load(str(request["feeds"])) as arrays:
        feeds = dict(arrays)
    try:
        prepared = {name: prepare(name, model, feeds, threads) for name in (REFERENCE, engine)}
        expected = [np.array(output) for output in prepared[REFERENCE].call()]
        error = relative_error(list(prepared[engine].call()), expected)
    except Exception as failure:
        first = str(failure).strip().splitlines() or ["no message"]
        return {"error": f"{type(failure).__name__}: {first[0]}"[:300]}
    with pinned(threads):
        plan = Plan(**request["plan"])  # type: ignore[arg-type]
        times = interleave({name: p.call for name, p in prepared.items()}, plan)
    own, reference = times[engine], times[REFERENCE]
    fields = asdict(own)
    fields["is_noisy"] = own.is_noisy or reference.is_noisy
    return {
        **fields,
        "reference_ms": reference.median_ms,
        "reference_min_ms": reference.min_ms,
        "max_rel_error": error,
        "prepare_s": prepared[engine].prepare_s,
        "version": prepared[engine].version,
    }


if __name__ == "__main__":
    print(json.dumps(answer(json.loads(sys.stdin.readline()))), flush=True)
