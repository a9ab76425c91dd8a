"""Static estimates of a compiled model's product kernels: what their inner loops cost on a core.

The kernels are named in the manifest; their inner loops are emitted again for the same target and
handed to llvm-mca, which models a core with perfect caches. Nothing is run or measured. What lies
around the inner loops (gathers, epilogues, other kernels) is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sparsegraph import targets
from sparsegraph.errors import UnsupportedError, message
from sparsegraph.targets import inner_loop
from sparsegraph.targets.target import PACKAGES


@dataclass(frozen=True)
class KernelRow:
    """The inner loop of one kernel.

    Attributes:
        calls: kernel calls in one run of the model.
        macs: multiply-adds of vectors in all of them.
        instructions, loads: per multiply-add of a vector; `spills`: in one round of the loop.
        cycles: per multiply-add of a vector, by core; None where llvm-mca cannot tell.
    """

    kernel: str
    calls: int
    macs: int
    instructions: float
    loads: float
    spills: int
    cycles: dict[str, float | None]


@dataclass(frozen=True)
class Throughput:
    """All product kernels of a model, those with the most work first.

    Attributes:
        note: why there are no cycles, or empty.
    """

    target: str
    cores: tuple[str, ...]
    kernels: tuple[KernelRow, ...]
    note: str

    def total(self, core: str) -> float | None:
        """Estimated cycles of all inner loops in one run; None unless every kernel has some."""
        each = [(row.macs, row.cycles[core]) for row in self.kernels]
        known = [macs * cycles for macs, cycles in each if cycles is not None]
        return sum(known) if len(known) == len(each) else None

    def table(self) -> tuple[list[str], list[list[object]]]:
        """Columns and rows; cycles are estimates per multiply-add of a vector."""
        columns = ["kernel", "calls", "M vector MAC", "instructions/MAC", "loads/MAC", "spills"]
        rows: list[list[object]] = [
            [
                row.kernel, row.calls, row.macs / 1e6, row.instructions, row.loads, row.spills,
                *(row.cycles[core] for core in self.cores),
            ]
            for row in self.kernels
        ]  # fmt: skip
        return [*columns, *(f"{core}, est. cycles/MAC" for core in self.cores)], rows

    def summary(self) -> str:
        """One line per core."""
        if self.note:
            return self.note
        lines = []
        for core in self.cores:
            total = self.total(core)
            text = "unknown to llvm-mca" if total is None else f"{total / 1e6:.2f} million cycles"
            lines.append(f"{core}: {text} in inner loops of products, estimated, not measured")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Everything above as plain data."""
        totals = {core: self.total(core) for core in self.cores}
        return {**asdict(self), "total_cycles": totals, "cycles_are": "estimated by llvm-mca"}


def of_manifest(manifest: Mapping[str, Any]) -> Throughput:
    """Estimates for the kernels of a compiled model.

    Raises:
        UnsupportedError: its target has no assembly that is read here.
    """
    target = targets.get(str(manifest["target"]["text"]))
    if target.arch not in inner_loop.SYNTAX or target.output == "c":
        need, fix = "a target with assembly", "compile for one of them"
        raise UnsupportedError(message("estimates", str(target), target.output, need, fix))
    cores = inner_loop.CORES.get(target.arch, (target.cpu,))
    calls: Counter[str] = Counter()
    macs: Counter[str] = Counter()
    for segment in manifest["segments"]:
        for step in segment.get("steps", ()):
            if inner_loop.kernel_of(step["kernel"]) is not None:
                calls[step["kernel"]] += 1
                macs[step["kernel"]] += step["flops"] // 2 // target.lanes
    rows = []
    for name, n in macs.most_common():
        kernel = inner_loop.kernel_of(name)
        assert kernel is not None
        loop = inner_loop.look(target, kernel, cores)
        cycles = {c: None if x is None else x / loop.work for c, x in loop.cycles.items()}
        per_mac = (loop.instructions / loop.work, loop.loads / loop.work)
        rows.append(KernelRow(name, calls[name], n, *per_mac, loop.spills, cycles))
    missing = inner_loop.find_tool() is None
    need = f"cycles need {inner_loop.TOOL}: install the Debian package {PACKAGES[inner_loop.TOOL]}"
    return Throughput(str(target), cores, tuple(rows), need if missing else "")
