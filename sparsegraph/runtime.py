"""Load and run an artefact, with the interface of `onnxruntime.InferenceSession`.

Needs NumPy and the standard library alone; onnxruntime only if the artefact has segments that
lowering left to it.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparsegraph.errors import UsageError, message
from sparsegraph.loading import LIBRARY, Array, Members, check_machine, read_manifest
from sparsegraph.segments import Border, Native, StepTime, Variant

_TYPES = {"float32": "float", "float64": "double", "object": "string"}


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
        members = Members(folder, self.manifest["members"])
        native = Native(members, self.threads) if LIBRARY in members.records else None
        code = native.code(self.manifest) if native else self.manifest
        self.target: str = code["target"]["text"]
        records = [code, *code["variants"]]
        self._variants = [Variant(r, members, native, self.threads) for r in records]
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

    def _checked(self, feed: Mapping[str, Any]) -> tuple["Variant", dict[str, Array]]:
        """The variant for the shapes of `feed`, and its checked values."""
        if feed.keys() != self._names:
            raise _wrong_names(feed, self._names)
        variant = self._variants[0]
        if len(self._variants) > 1:
            variant = self._variant_for({name: np.shape(value) for name, value in feed.items()})
        return variant, {b.name: b.check(feed[b.name]) for b in variant.inputs}

    def _variant_for(self, shapes: dict[str, tuple[int, ...]]) -> "Variant":
        for variant in self._variants:
            if all(shapes[b.name] == b.shape for b in variant.inputs):
                return variant
        found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        need = "; or ".join(
            ", ".join(f"{b.name} {b.shape}" for b in variant.inputs) for variant in self._variants
        )
        fix = "reshape or pad the values, or compile the model for these shapes too"
        raise UsageError(message("inputs", "of the model", found, need, fix))


def _describe(forms: Sequence[Border]) -> NodeArg:
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
