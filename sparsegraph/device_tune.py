"""Candidates of a product, timed on a device: what `compile --tune --devices` measures with.

The kernels of all candidates go into one bundle, which the device runs as it would a model's; the
times of its steps come back.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sparsegraph import artefact, device_bench
from sparsegraph.devices import Device
from sparsegraph.errors import UnsupportedError, UsageError, message
from sparsegraph.program import Arg, Plan, Program, Ref
from sparsegraph.targets.target import Target


class Kernels:
    """Stands in for `lower.trial.Kernels` where a device measures."""

    def __init__(self, target: Target, device: Device) -> None:
        self.target = target
        self.device = device

    def time(
        self, programs: Sequence[Program], *, rounds: int, block_ms: float
    ) -> list[list[float]]:
        """Milliseconds of every step of each program, in the median of the device's `repeats` runs.

        Raises:
            UnsupportedError: the device did not answer; says why.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "candidates.sg")
            plan = Plan((), (), [merged(programs)])
            artefact.write(plan, self.target, path, {"model_sha256": ""})
            (found,) = device_bench.bench(path, [self.device]).times
        if found.error is not None:
            raise UnsupportedError(found.error)
        times = iter(ms for _, ms in found.steps)
        return [[max(next(times), 1e-6) for _ in p.steps] for p in programs]


def merged(programs: Sequence[Program]) -> Program:
    """One program with the steps of all, each working on buffers of its own."""
    out = Program((), ())
    for i, program in enumerate(programs):

        def own(name: str, prefix: str = f"{i}.") -> str:
            return prefix + name

        out.weights |= {own(name): array for name, array in program.weights.items()}
        out.temporaries |= {own(name): size for name, size in program.temporaries.items()}
        for step in program.steps:
            args: list[Arg] = [
                Ref(own(a.buffer), a.offset) if isinstance(a, Ref) else a for a in step.args
            ]
            out.steps.append(replace(step, args=tuple(args), tiled=()))
    return out


def device_for(target: Target, devices: Sequence[Device]) -> Device:
    """The first device that says it is such a machine.

    Raises:
        UsageError: none does.
    """
    for device in devices:
        if device.target == str(target):
            return device
    found = ", ".join(f"{d.name} ({d.target or 'no target'})" for d in devices)
    fix = f'write target = "{target}" into the table of a device'
    raise UsageError(message("--devices", str(target), found, "a device of this target", fix))
