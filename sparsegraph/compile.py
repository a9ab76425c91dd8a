"""The driver: capture -> passes -> plan -> kernels -> artefact -> proof."""

import contextlib
import hashlib
import itertools
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from sparsegraph import artefact, half, pipeline, quantised
from sparsegraph.capture import Source, capture
from sparsegraph.capture import load as load_onnx
from sparsegraph.device_tune import device_for
from sparsegraph.devices import Device
from sparsegraph.errors import UnsupportedError, UsageError, VerifyError, message
from sparsegraph.layers import weighted
from sparsegraph.lower import partition
from sparsegraph.lower.choose import Decide, smallest
from sparsegraph.manifest import Code, Manifest
from sparsegraph.program import Plan, Program
from sparsegraph.progress import Progress, silent
from sparsegraph.proof import Lost, is_mixed, prove, race
from sparsegraph.prune import Pruned
from sparsegraph.runtime import InferenceSession
from sparsegraph.targets import codes, compiler, runs_here
from sparsegraph.targets.compiler import KernelError
from sparsegraph.targets.target import Target
from sparsegraph.tune import Tuner, begin
from sparsegraph.tuning import Tuning

WORTHWHILE = 1.03
"""Below this estimate of speed the whole model is left to ONNX Runtime. A dense MobileNetV1 with
AVX-512 is estimated at 1.02 and takes 2 % longer: a chain of pointwise convolutions is faster there
than one alone, between whose layout changes it was measured."""
LEAVE_REFUSED = True
"""Leave nodes to ONNX Runtime whose kernels the code generator fails at, where it may have nodes;
tests want to see it fail."""
Shapes = Mapping[str, int | Sequence[int]]


class Compiled:
    """A compiled model on this machine: callable, and a folder that can be saved.

    Attributes:
        path: the artefact.
        session: the loaded artefact; None for a target that cannot run here.
        manifest: what the artefact says about itself.
        tuned: what tuning measured and where it is kept, if there was any.
    """

    def __init__(
        self, path: Path, session: InferenceSession | None, manifest: Any, tuned: str | None = None
    ) -> None:
        self.path = path
        self.session = session
        self.manifest = manifest
        self.tuned = tuned

    def run(
        self, output_names: Sequence[str] | None, feeds: Mapping[str, np.ndarray]
    ) -> list[np.ndarray]:
        """As `onnxruntime.InferenceSession.run`."""
        assert self.session is not None, f"{self.path} is for another machine"
        return self.session.run(output_names, feeds)

    def __call__(self, *inputs: np.ndarray) -> Any:
        """Outputs for inputs by position; a single output is returned bare."""
        assert self.session is not None, f"{self.path} is for another machine"
        names = [i.name for i in self.session.get_inputs()]
        outputs = self.run(None, dict(zip(names, inputs)))
        return outputs[0] if len(outputs) == 1 else outputs

    def save(self, path: str | Path) -> None:
        """Copy the artefact to `path`, which must not exist."""
        shutil.copytree(self.path, path)

    def report(self, path: str | Path | None = None) -> str:
        """What became of each layer, as text; with `path`, also an HTML report there."""
        from sparsegraph import explain, output, report

        manifest = self.manifest.model_dump(mode="json", by_alias=True)
        if path is not None:
            output.write_text(Path(path), report.of_artefact(manifest, self.path.name))
        return explain.text(manifest)

    @property
    def weight_bytes(self) -> int:
        """Size of the weight file."""
        return int(self.manifest.members["weights.bin"].n_bytes)

    @property
    def fallback_nodes(self) -> list[str]:
        """Nodes that ONNX Runtime runs."""
        return [n for s in self.manifest.segments if s.kind != "native" for n in s.nodes]


def compile(
    source: Source | Any,
    target: str | Target = "native",
    *,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    shapes: Shapes | Sequence[Shapes] | None = None,
    threads: int = 1,
    output: str | Path | None = None,
    check: bool = True,
    fallback: bool = True,
    keep_native: bool = False,
    small: bool = False,
    skip: Collection[str] = (),
    tune: bool = False,
    tuning: str | Path | None = None,
    devices: Sequence[Device] = (),
    progress: Progress | None = None,
) -> Compiled:
    """Compile a model for one machine and prove it against ONNX Runtime.

    Args:
        source: an ONNX path, bytes, ModelProto or onnx_ir.Model; or a torch module or
            ExportedProgram together with `example_inputs`, by position or by name.
        target: a name that `sparsegraph targets` lists; `native` is this machine; `A+B` makes one
            library with code for both, which picks by the CPU when it is loaded.
        shapes: values of dynamic dimensions, by dimension name, or whole shapes by input name; a
            list of these makes one artefact that takes each of them.
        threads: threads that the plan should keep busy.
        output: the artefact's folder; a temporary one by default.
        check: verify every pass and the artefact against ONNX Runtime, and it against PyTorch.
        fallback: let ONNX Runtime run nodes that no kernel covers, and whole models that are
            estimated, or if quantised measured, to be slower here than there; never for WebAssembly
            modules and C source.
        keep_native: never leave the whole model to ONNX Runtime.
        small: each weight in the form that takes the least memory, not the least time; nothing is
            left to ONNX Runtime for its speed.
        skip: passes to leave out.
        tune: measure the best ways to compute each product, instead of trusting the cost model.
        tuning: the file of measured times; without `tune` it is only read, with it the default is
            in the user's cache folder, and products that it lacks are added.
        devices: with `tune`, what measures instead of this machine: the first that is the target.
        progress: called as progress(stage, done, total).

    Raises:
        CaptureError, UsageError: the model or an option is wrong.
        UnsupportedError: a node or the target cannot be compiled.
        VerifyError: the outputs differ from ONNX Runtime's.
    """
    report = progress or silent
    machines = codes(target) if isinstance(target, str) else [target]
    machine = machines[-1]
    if machine.output == "ptx":
        found, need = "kernels that nothing launches yet", "a machine that runs whole models"
        fix = "compile for a CPU; `sparsegraph.targets.emit.assembly` gives the kernels' PTX"
        raise UnsupportedError(message("target", str(machine), found, need, fix))
    is_here = runs_here(machine)
    several = list(shapes) if isinstance(shapes, Sequence) else [shapes]
    fallback = fallback and len(machines) == 1
    if machine.output != "library":  # there is no ONNX Runtime, and the loaders take one shape
        fallback = False
        if len(several) > 1:
            fix = "compile one bundle per shape"
            found = f"{len(several)} shapes"
            raise UnsupportedError(message("target", str(machine), found, "one shape", fix))
    tuner, decide = chosen_by(
        machines, tune, None if tuning is None else Path(tuning), report, devices, small=small
    )
    work = _Work(
        machines, threads, check, skip, fallback, fallback and not (keep_native or small), is_here,
        tuner, decide, report,
    )  # fmt: skip
    compiler.warm_up()
    report("capture", 0, 1)
    captured = [load(source, example_inputs, one, check=check) for one in several]
    path = Path(output) if output is not None else Path(tempfile.mkdtemp(), "model.sg")
    while True:
        try:
            manifest = work.written(captured, path)
            break
        except KernelError as error:
            refused = {**work.refused, **error.reasons}
            if not LEAVE_REFUSED or refused == work.refused:
                raise
            work = replace(work, refused=refused)
    session = InferenceSession(path, threads=threads) if is_here else None
    return Compiled(path, session, manifest, None if tuner is None else str(tuner))


@dataclass(frozen=True)
class _Work:
    """How every shape of a model is planned; the fields are those of `compile`."""

    machines: Sequence[Target]
    threads: int
    check: bool
    skip: Collection[str]
    fallback: bool
    may_leave: bool
    """Whether ONNX Runtime may have the whole model."""
    is_here: bool
    tuner: Tuner | None
    decide: Decide | None
    report: Progress
    refused: Mapping[str, str] = field(default_factory=dict)
    """Kernels that the code generator failed at."""

    def written(self, captured: Sequence[ir.Model], path: Path) -> Manifest:
        """Plan for every shape, compile, prove, and write the artefact."""
        models, plans, records = zip(*map(self.plan, captured), strict=True)
        meta = {"model_sha256": model_digest(captured[0]), "passes": records[0]}

        def checked(folder: Path) -> dict[str, Any]:
            self.report("verify", 0, 1)
            is_run = self.check and self.is_here
            return prove(models, folder, self.threads) if is_run else {"checked": False}

        def built(plans: Sequence[Sequence[Plan]], check: artefact.Check) -> Manifest:
            codes = zip(self.machines, zip(*plans, strict=True), strict=True)
            *better, code = (Code(t, replace(p[0], variants=list(p[1:]))) for t, p in codes)
            return artefact.write(code.plan, code.target, path, meta, self.report, check, better)

        if not (self.may_leave and is_mixed(models, plans)):
            return built(plans, checked)
        try:
            return built(plans, partial(race, models, self.threads, checked))
        except Lost as lost:
            left = [[partition.whole_model_fallback(model, str(lost))] for model in models]
            return built(left, checked)

    def plan(self, captured: ir.Model) -> tuple[ir.Model, list[Plan], list[dict[str, Any]]]:
        """The model to compute, one plan per machine, and what the passes did."""
        wide = half.widened(captured, verify=self.check)
        model, widening = wide.model, [pass_record(r) for r in wide.records]
        on_pass = _counter(self.report)
        try:
            done = pipeline.optimize(model, verify=self.check, skip=self.skip, on_pass=on_pass)
        except VerifyError:
            if not (self.may_leave and quantised.has_quantised(model)):
                raise
            return model, [partition.whole_model_fallback(model, quantised.REASON)], widening
        self.report("plan", 0, 1)
        if self.tuner is not None:
            self.tuner.n_layers += len(weighted(done.model))
        made = [self._lowered(done.model, machine) for machine in self.machines]
        kept = "; ".join(d.reason for r in wide.records[:1] for d in r.declined)
        reason = self._why_leave(model, made[-1], kept)
        if reason is not None:
            made[-1] = partition.whole_model_fallback(model, reason, made[-1])
        return model, made, widening + [pass_record(r) for r in done.records]

    def _lowered(self, model: ir.Model, machine: Target) -> Plan:
        with self.tuner.saving() if self.tuner is not None else contextlib.nullcontext():
            return partition.plan(
                model, machine, threads=self.threads, allow_fallback=self.fallback,
                decide=self.decide, refused=self.refused,
            )  # fmt: skip

    def _why_leave(self, model: ir.Model, plan: Plan, half_kept: str) -> str | None:
        """Why the whole model is ONNX Runtime's, as far as that is known without running it."""
        if not self.may_leave:
            return None
        if quantised.has_quantised(model) and not (self.is_here and plan.layers):
            return quantised.REASON
        if not any(isinstance(segment, Program) for segment in plan.segments):
            return f"half precision stays: {half_kept}" if half_kept else None
        if self.is_here and plan.estimate < WORTHWHILE:
            return f"dense kernels are estimated at {plan.estimate:.2f} of ONNX Runtime's speed"
        return None


def chosen_by(
    machines: Sequence[Target],
    tune: bool,
    path: Path | None,
    report: Progress,
    devices: Sequence[Device],
    *,
    small: bool = False,
) -> tuple[Tuner | None, Decide | None]:
    """What measures, if anything does, and what decides, if the cost model does not."""
    if devices and not tune:
        raise UsageError(
            message("option", "devices", "no tuning", "something to measure", "--tune")
        )
    if small and (tune or path is not None):
        fix = "leave one of them away"
        found = "--small, and times to choose by"
        raise UsageError(message("option", "small", found, "one of them", fix))
    if small:
        return None, lambda case, _, target: smallest(case, target)
    if not tune and path is None:
        return None, None
    if len(machines) > 1:
        found, need = " + ".join(map(str, machines)), "one target"
        raise UnsupportedError(message("tuning", "target", found, need, "compile one at a time"))
    if not tune and path is not None:
        return None, Tuning.read(path, machines[0]).choice
    device = device_for(machines[0], devices) if devices else None
    tuner = begin(path, machines[0], report, device)
    return tuner, tuner


def _counter(report: Progress) -> Callable[[pipeline.PassRecord], None]:
    """A callback that reports every pass."""
    done = itertools.count(1)
    return lambda _: report("passes", next(done), len(pipeline.PASSES))


def load(
    source: Any,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    shapes: Shapes | None = None,
    *,
    check: bool = True,
) -> ir.Model:
    """The captured model of whatever `compile` takes."""
    if isinstance(source, Pruned | pipeline.Optimized):
        source = source.model
    if example_inputs is not None:
        return capture(source, example_inputs, shapes, check=check)
    return load_onnx(source, shapes)


def pass_record(record: pipeline.PassRecord) -> dict[str, Any]:
    """A pass record without its time, which would make builds differ."""
    row = asdict(record)
    row.pop("ms")
    row["declined"] = [f"{d['node']}: {d['reason']}" for d in row["declined"]]
    error = row["max_rel_error"]
    row["max_rel_error"] = None if error is None else float(f"{error:.1e}")
    return row


def model_digest(model: ir.Model) -> str:
    """SHA-256 over the graph's structure and the contents of its initializers."""
    digest = hashlib.sha256()
    for node in model.graph:
        inputs = [None if v is None else v.name for v in node.inputs]
        outputs = [v.name for v in node.outputs]
        attributes = sorted((k, str(a.value)) for k, a in node.attributes.items())
        digest.update(repr((node.domain, node.op_type, inputs, outputs, attributes)).encode())
    for name, value in sorted(model.graph.initializers.items()):
        digest.update(name.encode())
        if value.const_value is not None:
            with contextlib.suppress(TypeError):
                digest.update(np.ascontiguousarray(value.const_value.numpy()).tobytes())
    return digest.hexdigest()
