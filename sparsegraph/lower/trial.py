"""Run the kernels of one product on this machine, as lowering would call them, to time them."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import onnx_ir as ir

from sparsegraph.lower.builder import Builder, Stored
from sparsegraph.lower.problem import Choice, Operands
from sparsegraph.lower.products import step_product
from sparsegraph.program import Arg, Program, Ref, Scratch, Step
from sparsegraph.targets import host
from sparsegraph.targets.emit import Param
from sparsegraph.targets.kernel import Kernel
from sparsegraph.targets.layout import FeatureMajor
from sparsegraph.targets.target import Target
from sparsegraph.timing import interleave, pinned

Call = Callable[[], Any]


def lower(operands: Operands, choice: Choice, target: Target) -> Program:
    """The steps of one product on its own, for one thread."""
    program = Program((), ())
    b = Builder(program, target, 1, decide=lambda *_: choice)
    places = [_place(b, name, fm) for name, fm in (("x", operands.x), ("y", operands.y))]
    node = ir.Node("", "Conv" if operands.window else "MatMul", [], name="layer")
    step_product(b, [node], places[0], operands.weight, None, places[1], operands.window, None)
    return program


def _place(b: Builder, name: str, fm: FeatureMajor) -> Stored:
    ref = b.temporary(name, 4 * fm.size)
    shape = (fm.images, fm.features, fm.points)
    return Stored(ref, shape, "float32", dataclasses.replace(fm, offset=0))


class Kernels:
    """Compiled kernels of this machine; each is compiled once."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._libraries: dict[str, host.Library] = {}
        self._idle_ms = math.inf  # of a call from Python that does nothing

    def add(self, kernels: Iterable[Kernel]) -> None:
        """Compile what is new, in one go."""
        new = {k.name: k for k in kernels if k.name not in self._libraries}
        if new:
            self._libraries |= dict.fromkeys(new, host.Library(new.values(), self.target))

    def time(
        self, programs: Sequence[Program], *others: Call, rounds: int, block_ms: float
    ) -> list[list[float]]:
        """Median milliseconds of every step of each program, then of each of `others`.

        All take turns. What a call from Python takes by itself is not counted in a step.
        """
        self.add(step.kernel for p in programs for step in p.steps)
        steps = [self._calls(p) for p in programs]
        idle = self._call(programs[0].steps[0], _buffers(programs[0]), items=0)
        flat = [idle, *(call for calls in steps for call in calls), *others]
        with pinned(1):
            blocks = interleave(dict(enumerate(flat)), rounds, block_ms, least=1)
        idle_ms, *found = (statistics.median(chain(*blocks[i])) for i in range(len(flat)))
        self._idle_ms = min(self._idle_ms, idle_ms)
        times = iter(found)
        ours = [[max(next(times) - self._idle_ms, 1e-6) for _ in calls] for calls in steps]
        return [*ours, *([ms] for ms in times)]

    def _calls(self, program: Program) -> list[Call]:
        buffers = _buffers(program)
        return [self._call(step, buffers, step.items) for step in program.steps]

    def _call(self, step: Step, buffers: dict[str, np.ndarray], items: int) -> Call:
        pairs = zip(step.kernel.params, step.args, strict=True)
        args = [_value(param, arg, buffers) for param, arg in pairs]
        bound = self._libraries[step.kernel.name].bind(step.kernel, *args, begin=0, end=items)
        return partial(_with_memory, bound, args)


def _with_memory(call: Call, memory: object) -> None:
    """Call; `memory` is what the call works on and lives as long."""
    call()


def _buffers(program: Program) -> dict[str, np.ndarray]:
    """Weights, and temporaries of standard normal values."""
    rng = np.random.default_rng(0)
    buffers = {name: host.aligned(array) for name, array in program.weights.items()}
    for name, n_bytes in program.temporaries.items():
        buffers[name] = host.empty(n_bytes // 4)
        buffers[name][:] = rng.standard_normal(n_bytes // 4, np.float32)
    return buffers


def _value(param: Param, arg: Arg, buffers: dict[str, np.ndarray]) -> Any:
    if isinstance(arg, Ref):
        return buffers[arg.buffer][arg.offset :]
    if isinstance(arg, Scratch):
        return host.empty(-(-arg.n_bytes // 4), np.dtype(param.dtype))
    return arg
