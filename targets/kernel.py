"""What all kernel families share: a spec with a name, a C signature and an emitter.

A family is one file in `targets/kernels/`: a NumPy reference beside the emitter, a frozen
dataclass as the spec, and a table `KERNELS` of specs that tests and benchmarks iterate.
"""

from typing import Any, Protocol

from sparsegraph.targets import emit
from sparsegraph.targets.target import Target


class Kernel(Protocol):
    """A kernel's spec: equal specs generate equal code."""

    @property
    def name(self) -> str:
        """C symbol; spells the whole spec."""
        ...

    @property
    def params(self) -> emit.Signature:
        """Pointers and scalars, without the trailing range."""
        ...

    def body(self, target: Target) -> Any:
        """A function that takes the arguments by name (with `begin`, `end`) and emits TIR."""
        ...


def prim_func(kernel: Kernel, target: Target, symbol: str | None = None) -> Any:
    """The TVM function of one kernel on one target, under its own name or as `symbol`."""
    body = kernel.body(target)
    if target.output == "ptx":
        body = _one_item(body)
    with emit.with_lookups(target.lookup_lanes):
        return emit.build(symbol or kernel.name, kernel.params, body)


def _one_item(body: Any) -> Any:
    """The body for one item of the range, that of the GPU thread."""

    def of_thread(begin: emit.Expr, end: emit.Expr, **args: emit.Expr) -> None:
        item = emit.bind(begin + emit.gpu_thread())
        with emit.when(item < end):
            body(begin=item, end=item + 1, **args)

    return of_thread
