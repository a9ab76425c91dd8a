"""The limits of this core, measured: multiply-adds from registers, bytes from each cache level.

Model: S. Williams, A. Waterman, D. Patterson, "Roofline", CACM 52(4), 2009: a computation that does
f operations per byte it reads runs at most at min(peak, f * bandwidth).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

FOOTPRINTS = {"L1": 16 << 10, "L2": 256 << 10, "L3": 4 << 20, "memory": 256 << 20}
"""Bytes that are read again and again to measure a level."""

_CHAINS = 12  # independent accumulators: enough for the latency of a multiply-add
_REPEATS = 7


@dataclass(frozen=True)
class Multiply:
    """Items multiply-adds on each of `_CHAINS` register accumulators."""

    lanes: int

    @property
    def name(self) -> str:
        return f"roof_multiply_l{self.lanes}"

    @property
    def params(self) -> Any:
        from sparsegraph.targets import emit

        return emit.signature("y:float32* x:float32*")

    def body(self, target: Any) -> Any:
        from sparsegraph.targets.emit import Cell, bind, load, loop, store

        def body(y: Any, x: Any, begin: Any, end: Any) -> None:
            cells = [Cell("float32", self.lanes) for _ in range(_CHAINS)]
            for i, cell in enumerate(cells):
                cell.set(load(x, i * self.lanes, self.lanes))
            factor = bind(load(x, 0, self.lanes))
            with loop(begin, end):
                for cell in cells:
                    cell.set(cell.get() * factor + factor)
            for i, cell in enumerate(cells):
                store(y, cell.get(), i * self.lanes, self.lanes)

        return body


@dataclass(frozen=True)
class Read:
    """Add up `blocks` blocks of `_CHAINS` vectors, items times."""

    lanes: int

    @property
    def name(self) -> str:
        return f"roof_read_l{self.lanes}"

    @property
    def params(self) -> Any:
        from sparsegraph.targets import emit

        return emit.signature("y:float32* x:float32* blocks:int32")

    def body(self, target: Any) -> Any:
        from sparsegraph.targets.emit import Cell, load, loop, store

        def body(y: Any, x: Any, blocks: Any, begin: Any, end: Any) -> None:
            cells = [Cell("float32", self.lanes) for _ in range(_CHAINS)]
            for i, cell in enumerate(cells):
                cell.set(load(y, i * self.lanes, self.lanes))
            with loop(begin, end), loop(0, blocks) as block:
                for i, cell in enumerate(cells):
                    at = (block * _CHAINS + i) * self.lanes
                    cell.set(cell.get() + load(x, at, self.lanes))
            for i, cell in enumerate(cells):
                store(y, cell.get(), i * self.lanes, self.lanes)

        return body


def measure() -> dict[str, float]:
    """`gflops`, and GB/s of each level of FOOTPRINTS, of the core that this thread runs on."""
    from sparsegraph.targets import host

    from sparsegraph import targets

    machine = targets.native()
    lanes = machine.lanes
    multiply, read = Multiply(lanes), Read(lanes)
    library = host.Library([multiply, read], machine)
    y, x = host.empty(_CHAINS * lanes), host.empty(max(FOOTPRINTS.values()) // 4)
    x[:] = 1e-3  # memory that was never written has no pages of its own
    n = 1 << 20
    seconds = _best(library.bind(multiply, y, x, end=n))
    found = {"gflops": 2e-9 * n * _CHAINS * lanes / seconds}
    for level, n_bytes in FOOTPRINTS.items():
        blocks = n_bytes // (4 * _CHAINS * lanes)
        times = max(1, (32 << 20) // n_bytes)
        seconds = _best(library.bind(read, y, x, blocks, end=times))
        found[level] = 4e-9 * blocks * _CHAINS * lanes * times / seconds
    return {name: round(value, 1) for name, value in found.items()}


def _best(call: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
