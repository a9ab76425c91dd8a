"""Load and run an artefact, with the interface of `onnxruntime.InferenceSession`.

Needs NumPy and the standard library alone; onnxruntime only if the artefact has segments that
lowering left to it.
"""

import ctypes
import hashlib
import json
import os
import platform
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparsegraph.errors import ArtefactError, UsageError, message
from sparsegraph.patch import Patch
from sparsegraph.targets import cpu_features

SCHEMA = 2  # version of manifest.json
ABI = 1  # SG_ABI in runtime.h
MANIFEST, CHECKSUM = "manifest.json", "manifest.sha256"
LIBRARY, WEIGHTS, HEADER = "model.so", "weights.bin", "runtime.h"

Array = np.ndarray[Any, Any]

_TYPES = {"float32": "float", "float64": "double", "object": "string"}
_REBUILD = "compile the model again"


@dataclass(frozen=True)
class NodeArg:
    """An input or output, as onnxruntime describes it.

    Attributes:
        type: for example `tensor(float)`.
        shape: extents; None where the variants differ.
    """

    name: str
    type: str
    shape: list[int | None]


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


class InferenceSession:
    """A compiled model, ready to run. Safe to share between threads.

    Attributes:
        target: the machine whose code runs, of those that the artefact has code for.
        task: the task that runs when `run` names none; None for the base model.
        tasks: the tasks whose weights the artefact holds beside the base model's.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        sess_options: Any = None,
        providers: Sequence[Any] | None = None,
        *,
        threads: int = 1,
        task: str | None = None,
    ) -> None:
        """Check and load the artefact at `path`.

        Args:
            sess_options: an `onnxruntime.SessionOptions`; its `intra_op_num_threads` counts if it
                is not 0, nothing else does.
            providers: None, or a list that holds `CPUExecutionProvider`.
            threads: threads of one run, the caller included; at most one per core is used.
            task: whose weights to run with; None for the base model.

        Raises:
            ArtefactError: damaged or modified files, another schema, or a CPU that lacks features.
            UsageError: no artefact at `path`, other providers, a bad number of threads, or an
                unknown task.
        """
        _check_providers(providers)
        self.threads = _thread_count(sess_options, threads)
        folder = Path(path)
        self.manifest = read_manifest(folder)
        check_machine(self.manifest["target"], str(folder))
        members = _Members(folder, self.manifest["members"])
        native = _Native(members, self.threads) if LIBRARY in members.records else None
        code = native.code(self.manifest) if native else self.manifest
        self.target: str = code["target"]["text"]
        records = [code, *code["variants"]]
        self._variants = [_Variant(r, members, native, self.threads) for r in records]
        self._names = {b.name for b in self._variants[0].inputs}
        self._output_names = [b.name for b in self._variants[0].outputs]
        tasks = self.manifest.get("tasks", [])
        self._weights = native.of_tasks(tasks) if native else {}
        self.tasks = tuple(t["name"] for t in tasks)
        self.task = task
        self._address(task)

    def get_inputs(self) -> list[NodeArg]:
        """Inputs in the order of the model."""
        return [_describe(forms) for forms in zip(*(v.inputs for v in self._variants))]

    def get_outputs(self) -> list[NodeArg]:
        """Outputs in the order of the model."""
        return [_describe(forms) for forms in zip(*(v.outputs for v in self._variants))]

    def get_providers(self) -> list[str]:
        """Where the model runs."""
        return ["CPUExecutionProvider"]

    def run(
        self,
        output_names: Sequence[str] | None,
        input_feed: Mapping[str, Any],
        run_options: Any = None,
        *,
        task: str | None = None,
    ) -> list[Array]:
        """Outputs by name, or all of them for None or an empty list; of a task, by its name.

        The first run of a task copies those pages of the weights that it changes.

        Raises:
            UsageError: an unknown output or task, or a missing, unknown or wrong input.
        """
        names = self._wanted(output_names)
        variant, values = self._checked(input_feed)
        weights = self._address(self.task if task is None else task)
        for segment in variant.segments:
            segment.run(values, None, weights)
        return [values[name] for name in names]

    def profile(self, input_feed: Mapping[str, Any]) -> list[StepTime]:
        """Run once and tell the time of every step.

        Raises:
            UsageError: a missing, unknown or wrong input.
        """
        variant, values = self._checked(input_feed)
        times: list[StepTime] = []
        weights = self._address(self.task)
        for segment in variant.segments:
            segment.run(values, times, weights)
        return times

    def _address(self, task: str | None) -> int | None:
        """Where the weights of a task lie; None for the base model's."""
        if task is None:
            return None
        if task not in self.tasks:
            need = f"one of {', '.join(self.tasks)}" if self.tasks else "none: it has no tasks"
            fix = "name a task of this artefact, or none for the base model"
            raise UsageError(message("task", task, "no such task", need, fix))
        return self._weights[task].address()

    def _wanted(self, names: Sequence[str] | None) -> Sequence[str]:
        if not names:
            return self._output_names
        for name in names:
            if name not in self._output_names:
                need = f"one of {', '.join(self._output_names)}"
                fix = "pass None for all outputs"
                raise UsageError(message("output", name, "no such output", need, fix))
        return names

    def _checked(self, feed: Mapping[str, Any]) -> tuple["_Variant", dict[str, Array]]:
        """The variant for the shapes of `feed`, and its checked values."""
        if feed.keys() != self._names:
            raise _wrong_names(feed, self._names)
        variant = self._variants[0]
        if len(self._variants) > 1:
            variant = self._variant_for({name: np.shape(value) for name, value in feed.items()})
        return variant, {b.name: b.check(feed[b.name]) for b in variant.inputs}

    def _variant_for(self, shapes: dict[str, tuple[int, ...]]) -> "_Variant":
        for variant in self._variants:
            if all(shapes[b.name] == b.shape for b in variant.inputs):
                return variant
        found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        need = "; or ".join(
            ", ".join(f"{b.name} {b.shape}" for b in variant.inputs) for variant in self._variants
        )
        fix = "reshape or pad the values, or compile the model for these shapes too"
        raise UsageError(message("inputs", "of the model", found, need, fix))


@dataclass(frozen=True)
class _Border:
    """An input or output of the model."""

    name: str
    dtype: Any
    shape: tuple[int, ...]

    @classmethod
    def of(cls, record: dict[str, Any]) -> "_Border":
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


def _describe(forms: Sequence[_Border]) -> NodeArg:
    """An input or output over all variants."""
    name = str(forms[0].dtype)
    shape = [n[0] if len(set(n)) == 1 else None for n in zip(*(form.shape for form in forms))]
    return NodeArg(forms[0].name, f"tensor({_TYPES.get(name, name)})", shape)


def _wrong_names(feed: Mapping[str, Any], names: set[str]) -> UsageError:
    need = ", ".join(sorted(names)) or "no inputs"
    missing, unknown = names - feed.keys(), feed.keys() - names
    if missing:
        found, fix = ", ".join(map(str, feed)) or "no inputs", "add it to the feed"
        return UsageError(message("input", min(missing), found, need, fix))
    text = message("input", min(map(str, unknown)), "an unknown name", need, "remove it")
    return UsageError(text)


# ---------------------------------------------------------------- segments


class _Segment:
    """A part of the model: takes its inputs out of `values`, puts its outputs there."""

    def run(
        self, values: dict[str, Array], times: list[StepTime] | None, weights: int | None
    ) -> None:
        raise NotImplementedError


class _Variant:
    """The model for one set of input shapes."""

    def __init__(
        self, record: dict[str, Any], members: "_Members", native: "_Native | None", threads: int
    ) -> None:
        self.inputs = [_Border.of(t) for t in record["inputs"]]
        self.outputs = [_Border.of(t) for t in record["outputs"]]
        self.segments: list[_Segment] = []
        for segment in record["segments"]:
            if native and segment["kind"] == "native":
                self.segments.append(_NativeSegment(segment, native))
            else:
                self.segments.append(_FallbackSegment(segment, members, threads))


class _Native:
    """The library and the weights of an artefact, with memory for calls and a thread pool."""

    def __init__(self, members: "_Members", threads: int) -> None:
        self.threads = threads
        self.members = members
        self.weights = members.mapped(WEIGHTS)
        self.weights_address = self.weights.ctypes.data
        self.library = _load(members.verified(LIBRARY), members.digest(LIBRARY))
        n_segments = self.library.sg_n_segments()
        sizes = [self.library.sg_workspace_bytes(i, threads) for i in range(n_segments)]
        self.workspace_bytes = max(sizes, default=0)
        self.free: list[Array] = []  # workspaces of calls that ended
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
            workspace = self.free.pop()
        except IndexError:
            workspace = np.zeros(self.workspace_bytes, np.uint8)
        status = self.library.sg_profile(
            segment,
            self.weights_address if weights is None else weights,
            workspace.ctypes.data,
            inputs,
            outputs,
            self.pool,
            seconds,
        )
        self.free.append(workspace)
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
    def __init__(self, record: dict[str, Any], native: _Native) -> None:
        self.native = native
        self.index = record["index"]
        self.steps = record["steps"]
        self.inputs = [t["name"] for t in record["inputs"]]
        self.outputs = [_Border.of(t) for t in record["outputs"]]
        self.input_pointers = ctypes.c_void_p * len(self.inputs)
        self.output_pointers = ctypes.c_void_p * len(self.outputs)

    def run(
        self, values: dict[str, Array], times: list[StepTime] | None, weights: int | None
    ) -> None:
        outputs = [np.empty(b.shape, b.dtype) for b in self.outputs]
        inputs = self.input_pointers(*[values[name].ctypes.data for name in self.inputs])
        results = self.output_pointers(*[a.ctypes.data for a in outputs])
        seconds = None if times is None else (ctypes.c_double * len(self.steps))()
        self.native.call(self.index, inputs, results, seconds, weights)
        for border, array in zip(self.outputs, outputs):
            values[border.name] = array
        if times is not None and seconds is not None:
            times += [
                StepTime(tuple(s["nodes"]), s["kernel"], s["detail"], t)
                for s, t in zip(self.steps, seconds)
            ]


class _FallbackSegment(_Segment):
    """A segment that ONNX Runtime runs."""

    def __init__(self, record: dict[str, Any], members: "_Members", threads: int) -> None:
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
        self.session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def run(
        self, values: dict[str, Array], times: list[StepTime] | None, weights: int | None
    ) -> None:
        start = time.perf_counter()
        found = self.session.run(self.outputs, {name: values[name] for name in self.inputs})
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


# ---------------------------------------------------------------- loading


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of the artefact in `folder`.

    Raises:
        UsageError: there is no artefact.
        ArtefactError: its text does not match its checksum, or the schema is another one.
    """
    path = folder / MANIFEST
    if not path.is_file():
        found, fix = "no " + MANIFEST, "compile a model, or name its folder"
        raise UsageError(message("artefact", str(folder), found, "a folder with one", fix))
    text = path.read_bytes()
    digest = hashlib.sha256(text).hexdigest()
    if _read_member(folder / CHECKSUM) != checksum_line(digest):
        found, need = f"SHA-256 {digest[:12]}...", f"that of {CHECKSUM}"
        raise ArtefactError(message("member", str(path), found, need, _REBUILD))
    manifest: dict[str, Any] = json.loads(text)
    if manifest["schema"] != SCHEMA or manifest["abi"] != ABI:
        found = f"schema {manifest['schema']}, ABI {manifest['abi']}"
        need = f"schema {SCHEMA}, ABI {ABI}"
        raise ArtefactError(message("artefact", str(folder), found, need, _REBUILD))
    return manifest


def checksum_line(digest: str) -> bytes:
    """What `manifest.sha256` holds; `sha256sum -c` reads it."""
    return f"{digest}  {MANIFEST}\n".encode()


def check_machine(target: Mapping[str, Any], name: str) -> None:
    """Refuse a machine that lacks what the code was compiled for.

    Raises:
        ArtefactError: names the missing features.
    """
    machine = platform.machine()
    if target["arch"] != machine:
        fix = f"run it on {target['arch']}, or compile for this machine"
        raise ArtefactError(message("artefact", name, machine, target["arch"], fix))
    have = {_plain(f) for f in cpu_features()}
    missing = [f for f in target["features"] if _plain(f) not in have]
    if missing:
        found = f"a CPU without {', '.join(missing)}"
        fix = "compile with --target native on this machine"
        raise ArtefactError(message("artefact", name, found, target["text"], fix))


def _plain(feature: str) -> str:
    """LLVM writes avx512vnni and sse4.1 where Linux writes avx512_vnni and sse4_1."""
    return feature.replace("_", "").replace(".", "")


class _Members:
    """Files of an artefact, checked against the manifest before use."""

    def __init__(self, folder: Path, records: dict[str, dict[str, Any]]) -> None:
        self.folder = folder
        self.records = records
        self.maps = {name: self._open(name) for name in records}

    def mapped(self, name: str) -> Array:
        """The bytes of a member, mapped read-only."""
        return self.maps[name]

    def verified(self, name: str) -> Path:
        """The path of a member."""
        return self.folder / name

    def digest(self, name: str) -> str:
        return str(self.records[name]["sha256"])

    def _open(self, name: str) -> Array:
        path, record = self.folder / name, self.records[name]
        found: object = path.stat().st_size if path.is_file() else "no file"
        if found != record["n_bytes"]:
            found = f"{found} bytes" if isinstance(found, int) else found
            need = f"{record['n_bytes']} bytes"
            raise ArtefactError(message("member", str(path), found, need, _REBUILD))
        data = np.memmap(path, np.uint8, "r")
        digest = hashlib.sha256(data.data).hexdigest()
        if digest != record["sha256"]:
            need = f"{record['sha256'][:12]}..."
            found = f"SHA-256 {digest[:12]}..."
            raise ArtefactError(message("member", str(path), found, need, _REBUILD))
        return data


def _read_member(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        found = error.strerror or str(error)
        text = message("member", str(path), found, "a readable file", _REBUILD)
        raise ArtefactError(text) from error


def _load(path: Path, digest: str) -> Any:
    """dlopen with the C types of `runtime.h`.

    glibc returns an earlier library for an equal path, even if the file was replaced since. So the
    path is spelled by content: 32 bits of the digest as `/` or `/.` in front of the file name.

    Raises:
        ArtefactError: the system cannot load it, or its ABI is another one.
    """
    bits = f"{int(digest[:8], 16):032b}"
    spelled = (
        f"{path.parent.resolve()}{''.join('/.' if b == '1' else '/' for b in bits)}/{path.name}"
    )
    try:
        library = ctypes.CDLL(spelled)
    except OSError as error:
        text = message("member", str(path), error, "a loadable library", _REBUILD)
        raise ArtefactError(text) from error
    if library.sg_abi() != ABI:
        found = f"ABI {library.sg_abi()}"
        raise ArtefactError(message("member", str(path), found, f"ABI {ABI}", _REBUILD))
    pointer, number = ctypes.c_void_p, ctypes.c_int32
    pointers = ctypes.POINTER(ctypes.c_void_p)
    library.sg_profile.argtypes = [
        number, pointer, pointer, pointers, pointers, pointer, ctypes.POINTER(ctypes.c_double)
    ]  # fmt: skip
    library.sg_workspace_bytes.argtypes = [number, number]
    library.sg_workspace_bytes.restype = ctypes.c_int64
    library.sg_pool_create.argtypes = [number, ctypes.POINTER(pointer)]
    library.sg_pool_destroy.argtypes = [pointer]
    library.sg_pool_destroy.restype = None
    library.sg_status_text.restype = library.sg_missing_feature.restype = ctypes.c_char_p
    return library


def _check_providers(providers: Sequence[Any] | None) -> None:
    names = [p if isinstance(p, str) else p[0] for p in providers or ["CPUExecutionProvider"]]
    if "CPUExecutionProvider" not in names:
        fix = "add it, or leave providers out"
        raise UsageError(message("providers", ", ".join(names), names, "CPUExecutionProvider", fix))


def _thread_count(sess_options: Any, threads: int) -> int:
    """Threads to use: never more than there are cores for (results are the same)."""
    wished = getattr(sess_options, "intra_op_num_threads", 0) or threads
    if isinstance(wished, int) and 1 <= wished <= 1024:
        return min(wished, len(os.sched_getaffinity(0)))
    raise UsageError(message("option", "threads", wished, "1 to 1024", "pass threads=1"))
