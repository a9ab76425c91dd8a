"""The driver: capture -> passes -> plan -> kernels -> artefact -> proof."""

import contextlib
import hashlib
import itertools
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from sparsegraph import artefact, pipeline, verify
from sparsegraph.capture import Source, capture
from sparsegraph.capture import load as load_onnx
from sparsegraph.device_tune import device_for
from sparsegraph.devices import Device
from sparsegraph.errors import UnsupportedError, UsageError, VerifyError, message
from sparsegraph.layers import weighted
from sparsegraph.lower import partition
from sparsegraph.lower.choose import Decide
from sparsegraph.manifest import Code
from sparsegraph.program import Plan
from sparsegraph.progress import Progress, silent
from sparsegraph.prune import Pruned
from sparsegraph.runtime import InferenceSession
from sparsegraph.targets import codes, runs_here
from sparsegraph.targets.target import Target
from sparsegraph.tune import Tuner, begin
from sparsegraph.tuning import Tuning

TOLERANCE = 1e-4  # largest |a - b| / max |b| between the artefact and ONNX Runtime, fp32
WORTHWHILE = 1.02  # below this estimate of speed the whole model is left to ONNX Runtime
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
    example_inputs: Sequence[Any] | None = None,
    shapes: Shapes | Sequence[Shapes] | None = None,
    threads: int = 1,
    output: str | Path | None = None,
    check: bool = True,
    fallback: bool = True,
    keep_native: bool = False,
    skip: Collection[str] = (),
    tune: bool = False,
    tuning: str | Path | None = None,
    devices: Sequence[Device] = (),
    progress: Progress | None = None,
) -> Compiled:
    """Compile a model for one machine and prove it against ONNX Runtime.

    Args:
        source: an ONNX path, bytes, ModelProto or onnx_ir.Model; or a torch module or
            ExportedProgram together with `example_inputs`.
        target: a name that `sparsegraph targets` lists; `native` is this machine; `A+B` makes one
            library with code for both, which picks by the CPU when it is loaded.
        shapes: values of dynamic dimensions, by dimension name, or whole shapes by input name; a
            list of these makes one artefact that takes each of them.
        threads: threads that the plan should keep busy.
        output: the artefact's folder; a temporary one by default.
        check: verify every pass and the artefact against ONNX Runtime.
        fallback: let ONNX Runtime run nodes that no kernel covers, and whole models that are
            estimated to be slower here than there; never for WebAssembly modules and C source.
        keep_native: never leave the whole model to ONNX Runtime.
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
    tuner, decide = _tuning(
        machines, tune, None if tuning is None else Path(tuning), report, devices
    )
    models, records = [], []
    plans: list[list[Plan]] = [[] for _ in machines]
    for one in several:
        report("capture", 0, 1)
        model = load(source, example_inputs, one)
        optimized = pipeline.optimize(model, verify=check, skip=skip, on_pass=_counter(report))
        report("plan", 0, 1)
        if tuner is not None:
            tuner.n_layers += len(weighted(optimized.model))
        for made, one_machine in zip(plans, machines, strict=True):
            with tuner.saving() if tuner is not None else contextlib.nullcontext():
                made.append(
                    partition.plan(
                        optimized.model, one_machine, threads=threads, allow_fallback=fallback,
                        decide=decide,
                    )
                )  # fmt: skip
        plan = plans[-1][-1]
        if fallback and is_here and not keep_native and plan.estimate < WORTHWHILE:
            reason = f"dense kernels are estimated at {plan.estimate:.2f} of ONNX Runtime's speed"
            plans[-1][-1] = partition.whole_model_fallback(model, plan, reason)
        models.append(model)
        records.append([pass_record(r) for r in optimized.records])
    for made in plans:
        made[0].variants = made[1:]
    meta = {"model_sha256": model_digest(models[0]), "passes": records[0]}
    path = Path(output) if output is not None else Path(tempfile.mkdtemp(), "model.sg")

    def checked(folder: Path) -> dict[str, Any]:
        report("verify", 0, 1)
        return prove(models, folder, threads) if check and is_here else {"checked": False}

    *better, code = (Code(t, made[0]) for t, made in zip(machines, plans, strict=True))
    manifest = artefact.write(code.plan, code.target, path, meta, report, checked, better)
    session = InferenceSession(path, threads=threads) if is_here else None
    return Compiled(path, session, manifest, None if tuner is None else str(tuner))


def _tuning(
    machines: Sequence[Target],
    tune: bool,
    path: Path | None,
    report: Progress,
    devices: Sequence[Device],
) -> tuple[Tuner | None, Decide | None]:
    """What measures, if anything does, and what decides, if the cost model does not."""
    if devices and not tune:
        raise UsageError(
            message("option", "devices", "no tuning", "something to measure", "--tune")
        )
    if not tune and path is None:
        return None, None
    if len(machines) > 1:
        found, need = " + ".join(map(str, machines)), "one target"
        raise UnsupportedError(message("tuning", "target", found, need, "compile one at a time"))
    if not tune and path is not None:
        return None, partial(Tuning.read(path, machines[0]).choice, target=machines[0])
    device = device_for(machines[0], devices) if devices else None
    tuner = begin(path, machines[0], report, device)
    return tuner, tuner


def _counter(report: Progress) -> Callable[[pipeline.PassRecord], None]:
    """A callback that reports every pass."""
    done = itertools.count(1)
    return lambda _: report("passes", next(done), len(pipeline.PASSES))


def load(
    source: Any,
    example_inputs: Sequence[Any] | None = None,
    shapes: Shapes | None = None,
) -> ir.Model:
    """The captured model of whatever `compile` takes."""
    if isinstance(source, Pruned | pipeline.Optimized):
        source = source.model
    if example_inputs is not None:
        return capture(source, example_inputs, shapes)
    return load_onnx(source, shapes)


def prove(
    models: Sequence[ir.Model], folder: Path, threads: int, task: str | None = None
) -> dict[str, Any]:
    """Compare the artefact, or one task of it, with ONNX Runtime on every captured model.

    Raises:
        VerifyError: names the feed, the figure and the limit.
    """
    session = InferenceSession(folder, threads=threads, task=task)
    names = [o.name for o in session.get_outputs()]
    worst, n_feeds = 0.0, 0
    for model in models:
        reference = verify.Session(model)
        for i, feed in enumerate(verify.feeds_for(model)):
            expected = reference.run(feed)
            error = verify.compare(dict(zip(names, session.run(None, feed))), expected)
            worst, n_feeds = max(worst, error), n_feeds + 1
            limit = max(TOLERANCE, verify.tolerance(expected))
            if not error <= limit:
                fix = "report this model; nothing was written"
                found = f"max|a-b|/max|b| = {error:.2e} on feed {i}"
                need = f"<= {limit:.0e}"
                raise VerifyError(message("artefact", str(folder.name), found, need, fix))
    return {"checked": True, "feeds": n_feeds, "max_rel_error": float(f"{worst:.2e}")}


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
