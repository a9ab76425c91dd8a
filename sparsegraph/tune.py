"""`compile --tune`: measure the best candidates of every product while a model is lowered.

Kernels are those that the artefact will hold, weights have the model's own pattern of zeros, and
candidates take turns on one pinned core. What was measured goes into a tuning file, so that the
next compilation measures only what is new, and the same file gives the same artefact.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sparsegraph import device_tune
from sparsegraph.devices import Device
from sparsegraph.errors import UnsupportedError, UsageError, message
from sparsegraph.lower import trial
from sparsegraph.lower.choose import candidates
from sparsegraph.lower.problem import Choice, Operands, Problem
from sparsegraph.machine import cpu_name
from sparsegraph.program import Program
from sparsegraph.progress import Progress
from sparsegraph.targets import runs_here
from sparsegraph.targets.compiler import KernelError
from sparsegraph.targets.target import Target
from sparsegraph.tuning import Measured, Tuning, default_path, kernel_digest, key

_MOST = 6  # candidates that are measured
_WORTH = 1.6  # of the best prediction; the model is off by less on 99 of 100 layers
_ROUNDS, _BLOCK_MS = 5, 5.0


@dataclass
class Tuner:
    """Chooses by measuring; usable as `Builder.decide`.

    Attributes:
        path: where `tuning` is kept.
        note: why an earlier file was not used, or empty.
        n_layers: products that are expected, for progress.
        n_measured, n_known: products of either kind so far.
        device: what measures; None: this machine.
    """

    target: Target
    path: Path
    tuning: Tuning
    report: Progress
    note: str = ""
    n_layers: int = 0
    n_measured: int = 0
    n_known: int = 0
    device: Device | None = None
    _kernels: trial.Kernels | device_tune.Kernels = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.device is None:
            self._kernels = trial.Kernels(self.target)
        else:
            self._kernels = device_tune.Kernels(self.target, self.device)

    def __call__(self, problem: Problem, operands: Operands, target: Target) -> Choice:
        """The fastest way to compute a product."""
        name = key(problem, operands)
        if name in self.tuning.layers:
            self.n_known += 1
        else:
            self.tuning.layers[name] = self._measure(problem, operands, target)
            self.n_measured += 1
        done = self.n_known + self.n_measured
        self.report("tune", done, max(done, self.n_layers))
        return self.tuning.choice(problem, operands, target)

    def _measure(self, problem: Problem, operands: Operands, target: Target) -> Measured:
        best, *others = candidates(problem, target)
        limit = _WORTH * best.ms
        tried = [best, *(c for c in others[: _MOST - 1] if c.ms <= limit)]
        programs = {choice.way: trial.lower(operands, choice, target) for choice in tried}
        times = self._times(programs)
        ms = {way: round(sum(steps), 6) for way, steps in zip(programs, times)}
        return Measured(describe(problem), dict(sorted(ms.items(), key=lambda item: item[1])))

    def _times(self, programs: dict[str, Program]) -> list[list[float]]:
        """Milliseconds per step; `programs` loses those that the code generator fails at."""
        while True:
            try:
                found = self._kernels.time([*programs.values()], rounds=_ROUNDS, block_ms=_BLOCK_MS)
            except KernelError as error:
                for way, program in list(programs.items()):
                    if not error.reasons.keys().isdisjoint(s.kernel.name for s in program.steps):
                        del programs[way]
                if not programs:
                    raise
            else:
                return found

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Keep what was measured, also when something else goes wrong."""
        try:
            yield
        finally:
            if self.n_measured:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.tuning.write(self.path)

    def __str__(self) -> str:
        text = f"{self.n_measured} products measured, {self.n_known} known: {self.path}"
        return f"{text} ({self.note})" if self.note else text


def begin(
    path: Path | None, target: Target, report: Progress, device: Device | None = None
) -> Tuner:
    """A tuner that goes on where the file stopped.

    A file for other kernels is measured anew, the tuner's `note` says so; so is whatever lies in
    the default place and cannot be used.

    Raises:
        UnsupportedError: the target does not run on this machine, and no device is given.
        UsageError: `path` holds something else, or what another machine measured.
    """
    if device is None and not runs_here(target):
        fix = "name such machines with --devices, or tune on one and pass its file with --tuning"
        need = "a target that runs on this machine"
        raise UnsupportedError(message("--tune", str(target), "a cross target", need, fix))
    cpu = cpu_name() if device is None else f"device {device.name}"
    to = path or default_path(target, cpu)
    empty = Tuning(str(target), cpu, kernel_digest())
    if not to.exists():
        return Tuner(target, to, empty, report, device=device)
    try:
        found = Tuning.parse(to)
        for what, have, need in (
            ("target", found.target, str(target)),
            ("CPU", found.cpu, cpu),
        ):
            if have != need:
                fix = "name another file"
                raise UsageError(message("tuning file", str(to), f"{what} {have}", need, fix))
    except UsageError as error:
        if path is not None:
            raise
        return Tuner(target, to, empty, report, note=f"not used before: {error}", device=device)
    if found.kernels != kernel_digest():
        note = "the earlier results are of other kernels"
        return Tuner(target, to, empty, report, note=note, device=device)
    return Tuner(target, to, found, report, device=device)


def describe(problem: Problem) -> str:
    """A product for people: `3072x768, 384 points, 10.0 % non-zero`."""
    taps = f"x{problem.taps} taps" if problem.taps > 1 else ""
    points = f"{problem.images * problem.points} points"
    return f"{problem.rows}x{problem.channels}{taps}, {points}, {problem.density:.1%} non-zero"
