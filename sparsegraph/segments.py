"""The parts of a loaded model that run one after the other: native code, or ONNX Runtime."""

import ctypes
import os
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparsegraph.errors import ArtefactError, UnsupportedError, UsageError, message, one_line
from sparsegraph.loading import LIBRARY, WEIGHTS, Array, Members, load_library
from sparsegraph.patch import Patch


@dataclass(frozen=True)
class StepTime:
    """One line of a profile.

    Attributes:
        nodes: ONNX nodes that the step computes.
        kernel: C name of the kernel, or `onnxruntime` for a whole segment.
        detail: format, density and layout, for people.
    """

    nodes: tuple[str, ...]
    kernel: str
    detail: str
    seconds: float


@dataclass(frozen=True)
class Border:
    """An input or output of the model."""

    name: str
    dtype: Any
    shape: tuple[int, ...]

    @classmethod
    def of(cls, record: dict[str, Any]) -> "Border":
        return cls(record["name"], np.dtype(record["dtype"]), tuple(record["shape"]))

    def check(self, value: Any) -> Array:
        """The value as a contiguous array.

        Raises:
            UsageError: for another type or shape.
        """
        array = value if type(value) is np.ndarray else np.asarray(value)
        if array.dtype != self.dtype:
            fix = f"pass np.asarray(value, np.{self.dtype})"
            raise UsageError(message("input", self.name, array.dtype, self.dtype, fix))
        if array.shape != self.shape:
            fix = "reshape or pad the value, or compile the model for this shape"
            raise UsageError(message("input", self.name, array.shape, self.shape, fix))
        return array if array.flags.c_contiguous else np.ascontiguousarray(array)


class _Segment:
    """A part of the model: takes its inputs out of `values`, puts its outputs there."""

    def run(
        self, values: dict[str, Array], times: list[StepTime] | None, weights: int | None
    ) -> None:
        raise NotImplementedError


class Variant:
    """The model for one set of input shapes."""

    def __init__(
        self, record: dict[str, Any], members: "Members", native: "Native | None", threads: int
    ) -> None:
        self.inputs = [Border.of(t) for t in record["inputs"]]
        self.outputs = [Border.of(t) for t in record["outputs"]]
        self.segments: list[_Segment] = []
        for segment in record["segments"]:
            if native and segment["kind"] == "native":
                self.segments.append(_NativeSegment(segment, native))
            else:
                self.segments.append(_FallbackSegment(segment, members, threads))


class Native:
    """The library and the weights of an artefact, with memory for calls and a thread pool."""

    def __init__(self, members: "Members", threads: int) -> None:
        self.threads = threads
        self.members = members
        self.weights = members.mapped(WEIGHTS)
        self.weights_address = self.weights.ctypes.data
        self.library = load_library(members.verified(LIBRARY), members.digest(LIBRARY))
        n_segments = self.library.sg_n_segments()
        sizes = [self.library.sg_workspace_bytes(i, threads) for i in range(n_segments)]
        self.workspace_bytes = max(sizes, default=0)
        self.free: list[tuple[Array, int]] = []  # workspaces no longer in use, and where they lie
        self.pool: Any = None
        self.process = 0

    def code(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """The part of the manifest about the code that the library picked for this CPU.

        Raises:
            ArtefactError: it found none; names what the CPU lacks.
        """
        index: int = self.library.sg_code_index()
        if index < 0:
            found = f"a CPU without {self.library.sg_missing_feature().decode()}"
            need, fix = manifest["target"]["text"], "compile with --target native on this machine"
            raise ArtefactError(message("member", LIBRARY, found, need, fix))
        codes: list[dict[str, Any]] = [*manifest["codes"], manifest]
        return codes[index]

    def of_tasks(self, records: Sequence[dict[str, Any]]) -> dict[str, "_Task"]:
        """Weights per task; of each, nothing is copied before its first run."""
        path = self.members.verified(WEIGHTS)
        return {
            r["name"]: _Task(
                np.memmap(path, np.uint8, "c"),
                Patch.read(self.members.mapped(r["member"]), r["n_gaps"]),
            )
            for r in records
        }

    def call(
        self, segment: int, inputs: Any, outputs: Any, seconds: Any, weights: int | None
    ) -> None:
        """One `sg_profile`, in a workspace of its own, with the weights at an address.

        Raises:
            ArtefactError: the library refuses.
        """
        if self.threads > 1 and self.process != os.getpid():
            self._start_pool()
        try:
            workspace, address = self.free.pop()
        except IndexError:
            workspace = np.zeros(self.workspace_bytes, np.uint8)
            address = int(workspace.ctypes.data)
        status = self.library.sg_profile(
            segment,
            self.weights_address if weights is None else weights,
            address,
            inputs,
            outputs,
            self.pool,
            seconds,
        )
        self.free.append((workspace, address))
        if status:
            self.fail(status)

    def _start_pool(self) -> None:
        """Threads do not survive a fork: every process has its own pool."""
        pool = ctypes.c_void_p()
        status = self.library.sg_pool_create(self.threads, ctypes.byref(pool))
        if status:
            self.fail(status)
        self.pool, self.process = pool, os.getpid()
        weakref.finalize(self, _stop_pool, self.library, pool, self.process)

    def fail(self, status: int) -> None:
        text = self.library.sg_status_text(status).decode()
        fix = "close other sessions, or use fewer threads"
        raise ArtefactError(message("run of", LIBRARY, text, "status ok", fix))


def _stop_pool(library: Any, pool: Any, process: int) -> None:
    if os.getpid() == process:
        library.sg_pool_destroy(pool)


class _Task:
    """The weight file, mapped so that what is written stays in this process, and its patch."""

    def __init__(self, weights: Array, patch: Patch) -> None:
        self.weights = weights
        self.patch: Patch | None = patch
        self.lock = threading.Lock()

    def address(self) -> int:
        """Where the patched weights lie."""
        with self.lock:
            if self.patch is not None:
                whole = self.weights.size // 4 * 4
                self.patch.apply(self.weights[:whole].view("<u4"))
                self.patch = None
        return int(self.weights.ctypes.data)


class _NativeSegment(_Segment):
    def __init__(self, record: dict[str, Any], native: Native) -> None:
        self.native = native
        self.index = record["index"]
        self.steps = record["steps"]
        self.inputs = [t["name"] for t in record["inputs"]]
        self.outputs = [Border.of(t) for t in record["outputs"]]
        self.input_pointers = ctypes.c_void_p * len(self.inputs)
        self.output_pointers = ctypes.c_void_p * len(self.outputs)

    def run(
        self, values: dict[str, Array], times: list[StepTime] | None, weights: int | None
    ) -> None:
        outputs = [np.empty(b.shape, b.dtype) for b in self.outputs]
        inputs = self.input_pointers(*[_address(values[name]) for name in self.inputs])
        results = self.output_pointers(*map(_address, outputs))
        seconds = None if times is None else (ctypes.c_double * len(self.steps))()
        self.native.call(self.index, inputs, results, seconds, weights)
        for border, array in zip(self.outputs, outputs):
            values[border.name] = array
        if times is not None and seconds is not None:
            times += [
                StepTime(tuple(s["nodes"]), s["kernel"], s["detail"], t)
                for s, t in zip(self.steps, seconds)
            ]


def _address(array: Any) -> int:
    """Where an array lies; `array.ctypes` takes five times as long, .6 us of a call of 5."""
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(array))
    except (TypeError, ValueError):  # it is empty, or must not be written to
        return int(array.ctypes.data)


class _FallbackSegment(_Segment):
    """A segment that ONNX Runtime runs."""

    def __init__(self, record: dict[str, Any], members: "Members", threads: int) -> None:
        self.nodes = tuple(record["nodes"])
        self.reason = record["reason"]
        self.inputs = [t["name"] for t in record["inputs"]]
        self.outputs = [t["name"] for t in record["outputs"]]
        ort = _onnxruntime(record["member"], len(self.nodes))
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        model = members.verified(record["member"]).read_bytes()
        self.member = str(record["member"])
        try:
            self.session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            need = f"nodes that ONNX Runtime {ort.__version__} runs (left to it: {self.reason})"
            fix = "export with an older opset, or install a newer onnxruntime"
            raise UnsupportedError(
                message("segment", self.member, one_line(error), need, fix)
            ) from error

    def run(
        self, values: dict[str, Array], times: list[StepTime] | None, weights: int | None
    ) -> None:
        start = time.perf_counter()
        try:
            found = self.session.run(self.outputs, {name: values[name] for name in self.inputs})
        except Exception as error:
            need, fix = "values that its nodes take", "check the inputs"
            raise UsageError(message("segment", self.member, one_line(error), need, fix)) from error
        values.update(zip(self.outputs, found))
        if times is not None:
            seconds = time.perf_counter() - start
            times.append(StepTime(self.nodes, "onnxruntime", self.reason, seconds))


def _onnxruntime(member: str, n_nodes: int) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        found, fix = f"{n_nodes} nodes that need onnxruntime", "pip install onnxruntime"
        raise ArtefactError(message("segment", member, found, "onnxruntime", fix)) from error
    return onnxruntime
