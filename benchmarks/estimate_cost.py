"""Factors on the prices of the cost model for machines that are not here, from static estimates.

    python -m benchmarks.estimate_cost [TARGET ...]

Compiles the product kernels that the planner takes for tiles of 4 to 8 vectors, hands their inner
loops to llvm-mca, and compares the cycles per multiply-add of a vector with those on the machine
whose prices were measured. The factors go into `costs.json`, with the core that was modelled; a
target with measured prices keeps them. Clocks are taken to be equal, caches perfect: a plan made of
such prices is better than one for another machine, and worse than a measured one (`--tune`).

Cores that llvm-mca does not know, and targets without assembly, are left out and named. Later
versions of llvm-mca know more: the newest that is installed is asked.
"""

import argparse
import sys
from functools import cache

from sparsegraph.targets import inner_loop
from sparsegraph.targets.target import Target

from benchmarks.inner_loops import kernel_for
from sparsegraph import targets
from sparsegraph.lower import cost

REFERENCE, REFERENCE_CORE = "x86-64-v3", "znver4"  # whose prices `costs.json` holds
CORES = {  # for targets that stand for many machines: a common one
    "x86-64-v2": "znver4", "x86-64-v4": "znver4", "aarch64": "cortex-a76", "armv7": "cortex-a57",
    "riscv64": "sifive-u74", "riscv64-v128": "sifive-p670", "riscv64-v256": "sifive-p670",
}  # fmt: skip
VECTORS = (4, 5, 6, 7, 8)


@cache
def cycles(target: Target, core: str, weight: str) -> float | None:
    """Estimated cycles per multiply-add of a vector; None if llvm-mca cannot tell."""
    loops = [inner_loop.look(target, kernel_for(target, weight, n), (core,)) for n in VECTORS]
    found = [loop.cycles[core] for loop in loops]
    if any(c is None for c in found):
        return None
    return sum(c or 0.0 for c in found) / sum(loop.work for loop in loops)


def estimate(target: Target) -> dict[str, object] | None:
    """Factors of `dense` and `coded` products, and whose they are; None if llvm-mca cannot tell."""
    core = CORES.get(target.name, target.cpu)
    entry: dict[str, object] = {"core": core, "tool": inner_loop.version()}
    for weight in ("dense", "coded"):
        there = cycles(target, core, weight)
        here = cycles(targets.get(REFERENCE), REFERENCE_CORE, weight)
        if there is None or here is None:
            return None
        entry[weight] = round(there / here, 3)
    return entry


def main(arguments: list[str] | None = None) -> int:
    """Parse, estimate, write; returns the exit code."""
    every = [t.name for t in targets.KNOWN.values() if t.output == "library"]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.estimate_cost")
    parser.add_argument("targets", nargs="*", default=every, metavar="TARGET")
    for name in parser.parse_args(arguments).targets:
        target = targets.get(name)
        entry = None if name == REFERENCE else estimate(target)
        if entry is None:
            print(f"{name}: left out")
            continue
        cost.save(target.name, entry)
        print(f"{name}: dense {entry['dense']}, coded {entry['coded']} ({entry['core']})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
