"""Write a `Plan` as an artefact: a folder that runs without a compiler, TVM or Python.

    model.so         kernels, driver and runtime, with the C interface of runtime.h; other targets
                     get a WebAssembly module or C files (targets/bundle.py)
    weights.bin      weights, each on a cache line, stored once per content
    task_NAME.patch  what a task changes in them, if there are several (patch.py)
    runtime.h        the C interface, with main.c, an example, bench.c, a timing, and CMakeLists.txt
    fallback_0.onnx  a segment that ONNX Runtime runs, if there are any
    manifest.json    what the artefact is, with the SHA-256 of every other member
    manifest.sha256  the checksum of the manifest, in the form of `sha256sum`

Equal plans give equal bytes: no member holds a time, a path or a random number. The checksums find
damage and accidental changes; they are no signature.
"""

import ctypes
import errno
import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from sparsegraph import memory, runtime
from sparsegraph.errors import UsageError, message
from sparsegraph.patch import WORD, Patch
from sparsegraph.program import Fallback, Plan, Program, Ref, Step, Tensor
from sparsegraph.progress import Progress, silent
from sparsegraph.targets import bundle, driver, emit, features, link
from sparsegraph.targets.kernel import Kernel, prim_func
from sparsegraph.targets.target import Target

Check = Callable[[Path], Mapping[str, JsonValue]]

_ALIGNMENT = 64
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TensorRecord(_Record):
    """An input or output."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class TargetRecord(_Record):
    """The machine that the code needs."""

    text: str
    arch: str
    triple: str
    cpu: str
    features: tuple[str, ...]


class StepRecord(_Record):
    """One kernel call: see `program.Step`."""

    nodes: tuple[str, ...]
    kernel: str
    detail: str
    items: int
    flops: int
    dense_flops: int


class NativeRecord(_Record):
    """A segment in the library; `index` is its number there."""

    kind: Literal["native"] = "native"
    index: int
    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]
    arena_bytes: int
    arena_lower_bound: int
    scratch_bytes: int
    steps: tuple[StepRecord, ...]


class FallbackRecord(_Record):
    """A segment that ONNX Runtime runs."""

    kind: Literal["onnxruntime"] = "onnxruntime"
    member: str
    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]
    nodes: tuple[str, ...]
    reason: str


class VariantRecord(_Record):
    """The model for one set of input shapes."""

    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]
    segments: tuple[NativeRecord | FallbackRecord, ...]


class MemberRecord(_Record):
    """A file of the artefact."""

    sha256: str
    n_bytes: int


class TaskRecord(_Record):
    """Other weights for the same code: a patch of `n_gaps` gaps, then words, as in patch.py."""

    name: str
    member: str
    n_gaps: int
    n_changed: int


class CodeRecord(VariantRecord):
    """The model for a better CPU than the one that the rest of the manifest is about."""

    target: TargetRecord
    variants: tuple[VariantRecord, ...]


class Footprint(_Record):
    """Memory of a program without an operating system, start-up code and stack left out."""

    flash_bytes: int
    ram_bytes: int


class Manifest(VariantRecord):
    """`manifest.json`: what the first variant is, and what all have in common.

    Attributes:
        codes: the same model for CPUs with more features, the best first: `sg_code_index`.
        variants: the others, for other shapes.
        tasks: names under which the same code runs with other weights.
        model_sha256: hash of the ONNX model that was compiled.
        tools: tool -> version.
        passes: what the passes did, as the driver of the compiler recorded it.
        verification: how the outputs compare with the reference runtime.
        layers: one row per layer: density, pattern, format, estimated time.
    """

    schema_version: int = Field(default=runtime.SCHEMA, alias="schema")
    abi: int = runtime.ABI
    model_sha256: str
    target: TargetRecord
    tools: dict[str, str]
    variants: tuple[VariantRecord, ...] = ()
    tasks: tuple[TaskRecord, ...] = ()
    codes: tuple[CodeRecord, ...] = ()
    passes: list[JsonValue]
    verification: dict[str, JsonValue]
    layers: list[dict[str, JsonValue]]
    members: dict[str, MemberRecord]
    footprint: Footprint | None = None


class Code(NamedTuple):
    """The model as one kind of CPU runs it."""

    target: Target
    plan: Plan


def write(
    plan: Plan,
    target: Target,
    path: str | os.PathLike[str],
    meta: Mapping[str, Any],
    progress: Progress | None = None,
    check: Check | None = None,
    better: Sequence[Code] = (),
) -> Manifest:
    """Compile `plan` for `target` into the folder `path`.

    The folder appears, or replaces an earlier artefact, in one step at the end; whatever stops
    the work before leaves `path` as it was.

    Args:
        meta: JSON values for the manifest: `model_sha256`, and optionally `passes`,
            `verification` and `tools` (more versions). Times would make builds differ.
        progress: called as `progress("compile kernels", done, total)`.
        check: runs the finished folder before it appears under `path`; what it returns is the
            verification record, what it raises stops the work.
        better: the same model for CPUs that have all features of `target` and more, the best first;
            the library picks one when it is loaded. All of it must be native.

    Raises:
        UsageError: `path` cannot be written, or holds something that is not an artefact.
        UnsupportedError: there is no C compiler for the target.
    """
    output = Path(path)
    _check_output(output)
    with _output_errors(output), _sibling(output) as folder:
        codes = [*better, Code(target, plan)]
        placed, n_weight_bytes = _place([c.plan for c in codes], folder / runtime.WEIGHTS)
        tasks = _write_patches(plan, placed[-1], folder)
        used = _build_library(codes, placed, n_weight_bytes, folder, progress or silent)
        _write_fallbacks(plan, folder)
        manifest = _manifest(codes, placed, meta, _members(folder))
        manifest = manifest.model_copy(update={"footprint": used, "tasks": tasks})
        _write_manifest(manifest, folder)
        if check is not None:
            manifest = manifest.model_copy(update={"verification": check(folder)})
            _write_manifest(manifest, folder)
        _publish(folder, output)
    return manifest


# ---------------------------------------------------------------- weights


def _place(plans: Sequence[Plan], path: Path) -> tuple[list[list[driver.Segment]], int]:
    """Write the weight file; per plan where memory and weights of its programs lie; its size."""
    places: dict[bytes, int] = {}
    with path.open("wb") as file:
        placed = [[_segment(p, file, places) for p in _by_task(plan)] for plan in plans]
        file.write(bytes(memory.SLACK))
        return placed, file.tell()


def _programs(plan: Plan) -> list[Program]:
    return [s for s in _all_segments(plan) if isinstance(s, Program)]


def _by_task(plan: Plan) -> list[tuple[Program, ...]]:
    """Per segment its program, and the same with the weights of each task."""
    return list(zip(_programs(plan), *map(_programs, plan.tasks.values()), strict=True))


def _segment(programs: Sequence[Program], file: Any, places: dict[bytes, int]) -> driver.Segment:
    program = programs[0]
    weights = {
        name: _append(file, [p.weights[name] for p in programs], places)
        for name in _weights_in_use(program)
    }
    return driver.Segment(program, memory.plan(program), weights)


def _weights_in_use(program: Program) -> list[str]:
    """Weights in the order of their first use: that is also how a run walks through the file."""
    names = (
        arg.buffer
        for step in program.steps
        for arg in step.args
        if isinstance(arg, Ref) and arg.buffer in program.weights
    )
    return list(dict.fromkeys(names))


def _append(file: Any, forms: Sequence[np.ndarray], places: dict[bytes, int]) -> int:
    """Offset of the weight's bytes in `file`; writes them unless they are there.

    `forms` are the weight and what the tasks have in its place: all must be equal to share room.
    """
    raw, *others = map(_bytes, forms)
    digest = hashlib.sha256(raw.data)
    for other in others:
        if not np.array_equal(raw, other):
            digest.update(other.data)
        digest.update(b"|")
    key = digest.digest()
    if key not in places:
        file.write(bytes(-file.tell() % _ALIGNMENT))
        places[key] = file.tell()
        file.write(raw.data)
    return places[key]


def _bytes(weight: np.ndarray) -> np.ndarray:
    data = np.ascontiguousarray(weight, weight.dtype.newbyteorder("<"))
    return data.reshape(-1).view(np.uint8)


def _write_patches(
    plan: Plan, placed: Sequence[driver.Segment], folder: Path
) -> tuple[TaskRecord, ...]:
    """One file per task with what it changes in the weight file."""
    records = []
    if plan.tasks:
        before = np.fromfile(folder / runtime.WEIGHTS, np.uint8)
    for name, task in plan.tasks.items():
        after = before.copy()
        for segment, program in zip(placed, _programs(task), strict=True):
            for weight, offset in segment.weights.items():
                raw = _bytes(program.weights[weight])
                after[offset : offset + raw.size] = raw
        whole = before.size // WORD * WORD
        patch = Patch.between(before[:whole].view("<u4"), after[:whole].view("<u4"))
        member = f"task_{name}.patch"
        (folder / member).write_bytes(patch.data())
        records.append(
            TaskRecord(name=name, member=member, n_gaps=patch.gaps.size, n_changed=patch.n_changed)
        )
    return tuple(records)


# ---------------------------------------------------------------- code


def _build_library(
    codes: Sequence[Code],
    placed: Sequence[Sequence[driver.Segment]],
    n_weight_bytes: int,
    folder: Path,
    progress: Progress,
) -> Footprint | None:
    target = codes[-1].target
    if not placed[-1]:
        return None
    drivers = [
        driver.Code(
            segments, tuple(sorted(features(code.target))), f"__{i}" if i + 1 < len(codes) else ""
        )
        for i, (code, segments) in enumerate(zip(codes, placed, strict=True))
    ]
    with tempfile.TemporaryDirectory() as temporary:
        text = Path(temporary, "driver.c")
        text.write_text(driver.generate(drivers, n_weight_bytes))
        if target.output == "c":
            kernels = list(drivers[-1].kernels.values())
            bundle.write_source(kernels, text, target, folder, folder / runtime.WEIGHTS)
            return None
        work = [
            _Work(kernel, code.target, kernel.name + suffixed.suffix)
            for code, suffixed in zip(codes, drivers, strict=True)
            for kernel in suffixed.kernels.values()
        ]
        objects = _compile(work, Path(temporary), progress)
        if target.output == "bare":
            flash, ram = bundle.write_bare(objects, text, target, folder, placed[-1][0])
            return Footprint(flash_bytes=flash, ram_bytes=ram)
        write = bundle.write_wasm if target.output == "wasm" else bundle.write_library
        write(objects, text, target, folder)
        return None


class _Work(NamedTuple):
    """A kernel to compile, and the symbol that it gets."""

    kernel: Kernel
    target: Target
    symbol: str


def _compile(work: Sequence[_Work], folder: Path, progress: Progress) -> list[Path]:
    """One object per kernel, so that the code does not depend on how many cores compile it."""
    paths = [folder / f"{i}.o" for i in range(len(work))]
    done = 0
    progress("compile kernels", done, len(work))

    def compile_one(i: int) -> None:
        kernel, target, symbol = work[i]
        emit.write_object({symbol: prim_func(kernel, target, symbol)}, target, paths[i])

    pool = ThreadPoolExecutor(os.cpu_count() or 1)  # TVM lets go of the GIL while LLVM works
    try:
        for _ in pool.map(compile_one, range(len(work))):
            done += 1
            progress("compile kernels", done, len(work))
    finally:
        pool.shutdown(cancel_futures=True)
    return paths


# ---------------------------------------------------------------- manifest


def _all_segments(plan: Plan) -> list[Program | Fallback]:
    """The segments of the plan and of its variants: the order that numbers them."""
    return [s for p in (plan, *plan.variants) for s in p.segments]


def _write_fallbacks(plan: Plan, folder: Path) -> None:
    for i, segment in enumerate(_all_segments(plan)):
        if isinstance(segment, Fallback):
            (folder / _fallback_name(i)).write_bytes(segment.model)


def _fallback_name(i: int) -> str:
    return f"fallback_{i}.onnx"


def _members(folder: Path) -> dict[str, MemberRecord]:
    records = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        records[path.name] = MemberRecord(sha256=digest, n_bytes=path.stat().st_size)
    return records


def _manifest(
    codes: Sequence[Code],
    placed: Sequence[Sequence[driver.Segment]],
    meta: Mapping[str, Any],
    members: dict[str, MemberRecord],
) -> Manifest:
    known = {"model_sha256", "passes", "verification", "tools"}
    assert known >= meta.keys(), f"unknown meta: {sorted(meta.keys() - known)}"
    *better, (target, plan) = codes
    variants = _variants(plan, placed[-1])
    return Manifest(
        model_sha256=meta["model_sha256"],
        target=_target(target),
        tools=dict(sorted({**_tools(target), **meta.get("tools", {})}.items())),
        **dict(variants[0]),
        variants=tuple(variants[1:]),
        codes=tuple(_code(c, segments) for c, segments in zip(better, placed)),
        passes=list(meta.get("passes", [])),
        verification=dict(meta.get("verification", {})),
        layers=plan.layers,
        members=members,
    )


def _code(code: Code, placed: Sequence[driver.Segment]) -> CodeRecord:
    variants = _variants(code.plan, placed)
    return CodeRecord(
        target=_target(code.target), **dict(variants[0]), variants=tuple(variants[1:])
    )


def _target(target: Target) -> TargetRecord:
    return TargetRecord(
        text=str(target),
        arch=target.arch,
        triple=target.triple,
        cpu=target.cpu,
        features=(*target.features, *target.extra_features),
    )


def _variants(plan: Plan, placed: Sequence[driver.Segment]) -> list[VariantRecord]:
    records = list(_segments(plan, placed))
    return [_variant(p, [records.pop(0) for _ in p.segments]) for p in (plan, *plan.variants)]


def _variant(plan: Plan, segments: Sequence[NativeRecord | FallbackRecord]) -> VariantRecord:
    inputs, outputs = _tensors(plan.inputs), _tensors(plan.outputs)
    return VariantRecord(inputs=inputs, outputs=outputs, segments=tuple(segments))


def _segments(
    plan: Plan, placed: Sequence[driver.Segment]
) -> Iterator[NativeRecord | FallbackRecord]:
    natives = enumerate(placed)
    for i, segment in enumerate(_all_segments(plan)):
        inputs, outputs = _tensors(segment.inputs), _tensors(segment.outputs)
        if isinstance(segment, Fallback):
            yield FallbackRecord(
                member=_fallback_name(i),
                inputs=inputs,
                outputs=outputs,
                nodes=segment.nodes,
                reason=segment.reason,
            )
            continue
        index, native = next(natives)
        yield NativeRecord(
            index=index,
            inputs=inputs,
            outputs=outputs,
            arena_bytes=native.memory.arena_bytes,
            arena_lower_bound=native.memory.lower_bound,
            scratch_bytes=native.memory.scratch_bytes,
            steps=tuple(_step(s) for s in segment.steps),
        )


def _step(step: Step) -> StepRecord:
    return StepRecord(
        nodes=step.nodes,
        kernel=step.kernel.name,
        detail=step.detail,
        items=step.items,
        flops=step.flops,
        dense_flops=step.dense_flops,
    )


def _tensors(tensors: Sequence[Tensor]) -> tuple[TensorRecord, ...]:
    return tuple(TensorRecord(name=t.name, dtype=t.dtype, shape=t.shape) for t in tensors)


def _tools(target: Target) -> dict[str, str]:
    """Versions of what decides over the generated code."""
    return {
        "sparsegraph": _version("sparsegraph"),
        "apache-tvm": _version("apache-tvm"),
        "numpy": np.__version__,
        "c": _compiler_version(target),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _compiler_version(target: Target) -> str:
    if target.output == "c":
        return "none"
    command = [*link.driver(target), "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout.splitlines() or ["unknown"])[0]


def _write_manifest(manifest: Manifest, folder: Path) -> None:
    text = manifest.model_dump_json(indent=1, by_alias=True).encode() + b"\n"
    (folder / runtime.MANIFEST).write_bytes(text)
    line = runtime.checksum_line(hashlib.sha256(text).hexdigest())
    (folder / runtime.CHECKSUM).write_bytes(line)


# ---------------------------------------------------------------- files


def _check_output(output: Path) -> None:
    """Refuse to replace anything but an artefact or an empty folder.

    Raises:
        UsageError: names what is there.
    """
    need, fix = "a new name or an earlier artefact", "name another output"
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise UsageError(message("output", str(output), "a file or link", need, fix))
    if output.is_dir() and any(output.iterdir()) and not (output / runtime.MANIFEST).is_file():
        raise UsageError(message("output", str(output), "a folder with other files", need, fix))


@contextmanager
def _output_errors(output: Path) -> Iterator[None]:
    """Turn what the file system says into a UsageError."""
    try:
        yield
    except OSError as error:
        found = error.strerror or str(error)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        need = "enough free space" if full else "a folder that can be written"
        fix = "free some space, or name another output" if full else "name another output"
        raise UsageError(message("output", str(output), found, need, fix)) from error


@contextmanager
def _sibling(output: Path) -> Iterator[Path]:
    """A new folder beside `output`; whatever is left of it goes at the end."""
    folder = output.absolute().with_name(f".{output.name}.{uuid.uuid4().hex}")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _publish(folder: Path, output: Path) -> None:
    """Give the finished `folder` its name; an earlier artefact takes the temporary one."""
    for member in folder.iterdir():
        member.chmod(member.stat().st_mode & ~(stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH))
    if not output.exists():
        folder.rename(output)
    elif not _exchange(folder, output):
        earlier = folder.with_name(folder.name + ".old")
        output.rename(earlier)
        try:
            folder.rename(output)
        except BaseException:
            earlier.rename(output)
            raise
        shutil.rmtree(earlier, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step; False where the system cannot (Linux and glibc 2.28 can)."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    names = os.fsencode(a), os.fsencode(b)
    done: int = renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE)
    return done == 0
