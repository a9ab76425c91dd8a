"""Inference engines behind one shape: a model file and feeds in, a call without arguments out.

Each engine imports its runtime when it is prepared, so that this file loads in every environment.
"""

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]
Feeds = Mapping[str, Array]
Call = Callable[[], Sequence[Array]]

REFERENCE = "ort"
"""The engine that all ratios and errors refer to."""


@dataclass(frozen=True)
class Prepared:
    """An engine that holds a model and its feeds."""

    call: Call
    prepare_s: float
    """Seconds from file to callable: loading or compiling."""
    version: str
    weight_bytes: int | None = None
    """Bytes that the engine stores for weights, where it says so."""


def prepare(engine: str, model: Path, feeds: Feeds, threads: int) -> Prepared:
    """Load or compile `model`; raises whatever the engine raises."""
    if engine not in ENGINES:
        raise KeyError(f"no engine '{engine}': there are {', '.join(ENGINES)}")
    start = time.perf_counter()
    call, package, weight_bytes = ENGINES[engine](model, feeds, threads)
    return Prepared(call, time.perf_counter() - start, _version(package), weight_bytes)


def relative_error(found: Sequence[Array], expected: Sequence[Array]) -> float:
    """Largest max|a-b| / max|b| over the outputs; infinite where NaN, Inf or shapes differ."""
    if len(found) != len(expected):
        return float("inf")
    return max(_array_error(a, b) for a, b in zip(found, expected))


def _array_error(found: Array, expected: Array) -> float:
    a, b = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if a.shape != b.shape or not np.array_equal(np.isfinite(a), np.isfinite(b)):
        return float("inf")
    finite = np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return float("inf")
    difference = np.abs(a[finite] - b[finite]).max(initial=0.0)
    scale = np.abs(b[finite]).max(initial=0.0)
    if scale == 0:
        return 0.0 if difference == 0 else float("inf")
    return float(difference / scale)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


Loaded = tuple[Call, str, int | None]
"""Callable, package whose version counts, weight bytes."""


def _ort(model: Path, feeds: Feeds, threads: int) -> Loaded:
    return _ort_session(model, feeds, threads, optimised=True)


def _ort_plain(model: Path, feeds: Feeds, threads: int) -> Loaded:
    return _ort_session(model, feeds, threads, optimised=False)


def _ort_session(model: Path, feeds: Feeds, threads: int, *, optimised: bool) -> Loaded:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    feed = dict(feeds)
    return lambda: session.run(None, feed), "onnxruntime", None


def _sparsegraph(model: Path, feeds: Feeds, threads: int) -> Loaded:
    import onnx

    compiler: Any = importlib.import_module("sparsegraph")
    compiled = compiler.compile(onnx.load(model), target="native", threads=threads)
    feed = dict(feeds)
    return (
        lambda: compiled.run(None, feed),
        "sparsegraph",
        getattr(compiled, "weight_bytes", None),
    )


def _deepsparse(model: Path, feeds: Feeds, threads: int) -> Loaded:
    """DeepSparse takes arrays in graph order; analytics are switched off by the peer's caller."""
    from deepsparse import Engine

    batch = next(iter(feeds.values())).shape[0]
    engine = Engine(str(model), batch_size=batch, num_cores=threads, num_streams=1)
    arrays = [np.ascontiguousarray(feeds[name]) for name in engine.input_names]
    return lambda: engine.run(arrays, val_inp=False), "deepsparse", None


def _openvino(model: Path, feeds: Feeds, threads: int) -> Loaded:
    """OpenVINO in fp32: its own default is bfloat16 where the CPU has it."""
    import openvino

    compiled = openvino.Core().compile_model(
        str(model),
        "CPU",
        {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": str(threads),
            "INFERENCE_PRECISION_HINT": "f32",
        },
    )
    request = compiled.create_infer_request()
    for name, array in feeds.items():
        request.set_tensor(name, openvino.Tensor(np.ascontiguousarray(array)))

    def call() -> list[Array]:
        request.infer()
        return [request.get_output_tensor(i).data for i in range(len(compiled.outputs))]

    return call, "openvino", None


ENGINES: dict[str, Callable[[Path, Feeds, int], Loaded]] = {
    "ort": _ort,
    "ort-plain": _ort_plain,
    "sparsegraph": _sparsegraph,
    "deepsparse": _deepsparse,
    "openvino": _openvino,
}
