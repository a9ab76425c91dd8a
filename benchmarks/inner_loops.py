"""The inner loops of product kernels: instruction mix, spills, and estimated throughput.

    python -m benchmarks.inner_loops [--on aarch64 cortex-a55] [--density 1 .1] [--json file.json]

How: `targets/inner_loop.py`. Cycles are estimates for the processor that LLVM schedules for.
"""

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

from sparsegraph.targets.inner_loop import look
from sparsegraph.targets.kernels.product import Product, joined
from sparsegraph.targets.target import Target

from benchmarks import results
from sparsegraph import targets
from sparsegraph.lower import choose
from sparsegraph.lower.problem import Problem

MACHINES = (
    "x86-64-v2", "x86-64-v3", "x86-64-v4", "aarch64", "aarch64-sve256", "armv7", "riscv64",
    "riscv64-v128", "riscv64-v256", "cortex-m7", "cortex-m55",
)  # fmt: skip


def kernel_for(target: Target, weight: str, vectors: int = 4) -> Product:
    """The kernel that the planner takes for a product of so many vectors of points."""
    points, density = vectors * target.lanes, 1.0 if weight == "dense" else 0.1
    problem = Problem(
        rows=256, channels=256, taps=1, images=1, points=points, vectors=vectors, row=points,
        gather=None, density=density, shared=1, source=points, out=(1, points),
    )  # fmt: skip
    choice = (choose.dense if weight == "dense" else choose.coded)(problem, target)
    kernel = Product(
        choice.weight, choice.group, choice.split, target.lanes,
        joined=joined(choice.split, target),
    )  # fmt: skip
    if weight == "dense":
        return kernel
    return replace(kernel, unit=target.index_unit, narrow=target.narrow_index, near=True)


def main(arguments: list[str] | None = None) -> int:
    """Parse, look, print."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inner_loops")
    parser.add_argument("--on", nargs="+", default=list(MACHINES), metavar="TARGET")
    parser.add_argument("--weights", nargs="+", default=["dense", "coded"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    rows = []
    print("target          weight instr fused mul loads spills registers  estimated cycles / fused")
    for name in options.on:
        target = targets.get(name)
        for weight in options.weights:
            row = look(target, kernel_for(target, weight), [target.cpu])
            rows.append(row)
            found = row.cycles[target.cpu]
            cycles = "-" if found is None else f"{found:.1f} ({found / row.work:.2f})"
            print(
                f"{name:15} {weight:6} {row.instructions:5} {row.fused:5} {row.products:3} "
                f"{row.loads:5} {row.spills:6} {row.registers:9}  {cycles}"
            )
    if options.json:
        head = asdict(results.begin(["benchmarks.inner_loops", *arguments]))
        rows_json = [{**asdict(row), "cycles_are": "estimated by llvm-mca"} for row in rows]
        options.json.write_text(json.dumps({**head, "rows": rows_json}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
