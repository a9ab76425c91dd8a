"""`manifest.json`: what an artefact says about itself, and how that follows from its plans."""

import subprocess
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from sparsegraph import loading
from sparsegraph.program import Fallback, Plan, Program, Step, Tensor
from sparsegraph.targets import driver, link
from sparsegraph.targets.target import Target


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

    schema_version: int = Field(default=loading.SCHEMA, alias="schema")
    abi: int = loading.ABI
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


def all_segments(plan: Plan) -> list[Program | Fallback]:
    """The segments of the plan and of its variants: the order that numbers them."""
    return [s for p in (plan, *plan.variants) for s in p.segments]


def fallback_name(i: int) -> str:
    return f"fallback_{i}.onnx"


def describe(
    codes: Sequence[Code],
    placed: Sequence[Sequence[driver.Segment]],
    meta: Mapping[str, Any],
    members: dict[str, MemberRecord],
) -> Manifest:
    """The manifest of the first variant, its others, and the codes for better CPUs."""
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
    for i, segment in enumerate(all_segments(plan)):
        inputs, outputs = _tensors(segment.inputs), _tensors(segment.outputs)
        if isinstance(segment, Fallback):
            yield FallbackRecord(
                member=fallback_name(i),
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
