"""Several tasks over one base model in one artefact, chosen at run time.

Each task is a fine-tuned model, a sparse delta or a mask of the base. All run the same kernels over
one weight file; a task adds a patch with the words that it changes (task vectors as swappable
deltas: Guo et al. 2021, arXiv:2012.07463; binary masks over one set of weights: Mallya et al. 2018,
arXiv:1801.06519). A kernel stores non-zeros only, so each weight keeps those that any task has.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from sparsegraph import artefact, delta, half, pipeline
from sparsegraph.compile import Compiled, Shapes, chosen_by, load, model_digest, pass_record
from sparsegraph.errors import UnsupportedError, UsageError, message
from sparsegraph.lower import partition
from sparsegraph.lower.choose import Decide
from sparsegraph.program import Fallback, Plan, Program
from sparsegraph.progress import Progress, silent
from sparsegraph.proof import prove
from sparsegraph.runtime import InferenceSession
from sparsegraph.targets import codes, compiler, runs_here
from sparsegraph.targets.target import Target

Array = np.ndarray[Any, Any]

SKIPPED = ("dedupe", "remove_dead_channels")
"""Passes that look at values, so that tasks might get different graphs."""
NEXT = (*SKIPPED, "remove_identity")
"""Where they still do, because one adds zeros or multiplies by ones."""
_NAME = re.compile(r"\w[\w.-]{0,99}")
_PRESENT = np.float32(2.0**-120)
"""Stands for a zero where another task has something, until the weights are packed."""
_NOTHING = np.float32(2.0**-100)
"""Below it, packed weights are zeros: no sum in fp32 notices them."""


def compile_tasks(
    base: Any,
    tasks: Mapping[str, Any],
    target: str | Target = "native",
    *,
    shapes: Shapes | Sequence[Shapes] | None = None,
    threads: int = 1,
    output: str | Path | None = None,
    check: bool = True,
    skip: Collection[str] = (),
    tune: bool = False,
    tuning: str | Path | None = None,
    progress: Progress | None = None,
) -> Compiled:
    """Compile a base model and its tasks for one machine, and prove each against ONNX Runtime.

    Args:
        base: whatever `compile` takes.
        tasks: by name, a model of the base's architecture (an ONNX path or onnx_ir.Model), deltas
            by weight name (boolean arrays are masks), or the path of a file of deltas.
        output: the artefact's folder; a temporary one by default.

    The other arguments are those of `compile`; what `tune` measures are the weights that all share,
    so a file of the base model alone does not help. Everything runs natively: ONNX Runtime has its
    own copy of the weights, which no patch reaches. Run a task by
    `session.run(None, feed, task=name)`; the base model is what runs without a name.

    Raises:
        UsageError: a bad name, or a task of another architecture.
        UnsupportedError: a target without shared libraries, a node without a kernel, or a task that
            needs other code than the base.
        VerifyError: the outputs of a task differ from ONNX Runtime's.
    """
    report = progress or silent
    machine = _machine(target)
    _check_names(tasks)
    file = None if tuning is None else Path(tuning)
    tuner, decide = chosen_by([machine], tune, file, report, ())
    saving = contextlib.nullcontext if tuner is None else tuner.saving
    several = list(shapes) if isinstance(shapes, Sequence) else [shapes]
    compiler.warm_up()
    models: dict[str | None, list[ir.Model]] = {}
    plans: dict[str | None, list[Plan]] = {}
    records: list[dict[str, Any]] = []
    digest = ""
    for one in several:
        report("capture", 0, 1)
        model = load(base, None, one)
        digest = digest or model_digest(model)
        given: dict[str | None, ir.Model] = {None: model}
        given |= {name: _of_task(model, name, task, one) for name, task in tasks.items()}
        wide = {name: half.widened(task, verify=check) for name, task in given.items()}
        found = {name: done.model for name, done in wide.items()}
        slim = _optimized(found, skip, report, check=check)
        passes = [*wide[None].records, *slim[None].records]
        records = records or [pass_record(r) for r in passes]
        passed = {name: done.model for name, done in slim.items()}
        with saving():
            alike = _alike(passed, machine, threads, decide)
        for name, plan in alike.items():
            plans.setdefault(name, []).append(plan)
            models.setdefault(name, []).append(found[name])
    for made in plans.values():
        made[0].variants = made[1:]
    plan = plans.pop(None)[0]
    plan.tasks = {str(name): made[0] for name, made in plans.items()}
    is_here = runs_here(machine)

    def proved(folder: Path) -> dict[str, Any]:
        report("verify", 0, 1)
        if not (check and is_here):
            return {"checked": False}
        rows = {name: prove(made, folder, threads, name) for name, made in models.items()}
        return {**rows.pop(None), "tasks": rows}

    path = Path(output) if output is not None else Path(tempfile.mkdtemp(), "model.sg")
    meta = {"model_sha256": digest, "passes": records}
    manifest = artefact.write(plan, machine, path, meta, report, proved)
    session = InferenceSession(path, threads=threads) if is_here else None
    return Compiled(path, session, manifest, None if tuner is None else str(tuner))


def _machine(target: str | Target) -> Target:
    machines = codes(target) if isinstance(target, str) else [target]
    machine = machines[-1]
    if len(machines) > 1 or machine.output != "library":
        found, need = str(target), "one target with shared libraries"
        raise UnsupportedError(message("tasks", "target", found, need, "compile for native"))
    return machine


def _check_names(tasks: Mapping[str, Any]) -> None:
    if not tasks:
        need, fix = "at least one", "name a task, or use compile"
        raise UsageError(message("tasks", "of the model", "none", need, fix))
    for name in tasks:
        if not _NAME.fullmatch(name):
            need, fix = "letters, digits, '_', '-' and '.'", "rename the task"
            raise UsageError(message("task", name, f"the name '{name}'", need, fix))


def _of_task(base: ir.Model, name: str, given: Any, shapes: Shapes | None) -> ir.Model:
    """The captured model of a task."""
    if isinstance(given, str | Path) and Path(given).suffix != ".onnx":
        given = delta.read(given)
    if isinstance(given, Mapping):
        return delta.fold(base, [given])[0]
    model = load(given, None, shapes)
    delta.check_alike(base, model, name)
    return model


def _optimized(
    models: Mapping[str | None, ir.Model], skip: Collection[str], report: Progress, *, check: bool
) -> dict[str | None, pipeline.Optimized]:
    """Every model after the passes, in one structure.

    Raises UnsupportedError naming a task of another one.
    """
    for left_out in (SKIPPED, NEXT):
        found: dict[str | None, pipeline.Optimized] = {}
        wrong, reason = None, ""
        for name, model in models.items():
            found[name] = pipeline.optimize(model, verify=check, skip={*skip, *left_out})
            report("passes", len(found), len(models))
            why = delta.difference_of_structure(found[None].model, found[name].model)
            wrong, reason = (name, why) if why and not reason else (wrong, reason)
        if not reason:
            return found
    raise _refused(wrong, f"another graph after the passes: {reason}")


def _alike(
    models: Mapping[str | None, ir.Model], machine: Target, threads: int, decide: Decide | None
) -> dict[str | None, Plan]:
    """One plan per model; they differ in weights alone.

    Raises UnsupportedError naming the task that needs something else.
    """
    _mark_union(list(models.values()))
    plans = {}
    for name, model in models.items():
        plan = partition.plan(model, machine, threads=threads, allow_fallback=False, decide=decide)
        for program in _programs(plan):
            program.weights = {key: _settled(array) for key, array in program.weights.items()}
        plans[name] = plan
        reason = _difference(plans[None], plan)
        if reason:
            raise _refused(name, reason)
    return plans


def _refused(name: str | None, found: str) -> UnsupportedError:
    need, fix = "the base's code with other weights", "compile this task on its own"
    return UnsupportedError(message("task", str(name), found, need, fix))


def _mark_union(models: Sequence[ir.Model]) -> None:
    """Give all models non-zeros in the same places of every weight, the missing ones tiny."""
    for name in models[0].graph.initializers:
        values = [model.graph.initializers[name] for model in models]
        arrays = [_array(value) for value in values]
        if arrays[0].dtype != np.float32 or arrays[0].ndim < 2:
            continue
        union = np.logical_or.reduce([array != 0 for array in arrays])
        for value, array in zip(values, arrays):
            missing = union & (array == 0)
            if missing.any():
                value.const_value = ir.tensor(np.where(missing, _PRESENT, array), name=name)


def _settled(array: Array) -> Array:
    """Packed weights with the marks gone."""
    if array.dtype != np.float32:
        return array
    return np.where(np.abs(array) < _NOTHING, np.float32(0), array)


def _difference(base: Plan, plan: Plan) -> str:
    """In what the programs differ besides the contents of weights; empty if in nothing."""
    for a, b in zip(base.segments, plan.segments, strict=True):
        assert isinstance(a, Program)
        assert isinstance(b, Program)
        for one, other in zip(a.steps, b.steps):
            if one != other:
                return f"other code for {', '.join(other.nodes) or other.kernel.name}"
        for key, array in a.weights.items():
            other_array = b.weights.get(key)
            if other_array is None or other_array.shape != array.shape:
                return f"another size of '{key}' once packed"
        if len(a.steps) != len(b.steps) or a.weights.keys() != b.weights.keys():
            return f"{len(b.steps)} kernel calls in place of {len(a.steps)}"
    return ""


def _programs(plan: Plan) -> list[Program]:
    assert not any(isinstance(s, Fallback) for s in plan.segments)
    return [s for s in plan.segments if isinstance(s, Program)]


def _array(value: ir.Value) -> Array:
    assert value.const_value is not None
    return value.const_value.numpy()
