"""Instructions that one run of a model executes, pruned against dense, under emulators.

    python -m benchmarks.instructions [--only resnet18] [--on aarch64 wasm] [--json file.json]

Both bundles are ours: the ratio is what sparsity saves, not how good the dense code is. Programs
run under qemu with a plugin that counts; the difference between a program that runs the model twice
and one that runs it three times is one run. WebAssembly modules count for themselves
(`benchmarks.wasm_counter`). Instructions are not time.

Exit codes: 0 all ratios within the bar of 0.30 at 90 % zeros, 1 not, 2 wrong usage.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from sparsegraph.targets.target import Target

from benchmarks import bundles, results, wasm_counter
from sparsegraph import targets
from sparsegraph.errors import UnsupportedError

MODELS = ("resnet18", "minilm")
MACHINES = ("aarch64", "aarch64-sve256", "armv7", "riscv64", "riscv64-v128", "wasm")
DENSITY = 0.1
BAR = 0.30
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Count:
    """Instructions of one run of the dense and of the pruned model."""

    model: str
    target: str
    density: float
    dense: int
    pruned: int

    @property
    def ratio(self) -> float:
        return self.pruned / self.dense


def measure(model: bundles.Model, target: Target, density: float) -> Count:
    """Compile both models for `target` and count.

    Raises:
        bundles.RunFailed: a program ended with an error.
    """
    dense, pruned = (_count(bundles.Case(model, d), target) for d in (1.0, density))
    return Count(model.name, str(target), density, dense, pruned)


def _count(case: bundles.Case, target: Target) -> int:
    with tempfile.TemporaryDirectory() as folder:
        bundle = case.compile(target, Path(folder, "m.sg")).path
        return count_wasm(bundle) if target.output == "wasm" else count_native(target, bundle)


def count_wasm(bundle: Path) -> int:
    """Instructions of the module that one run executes."""
    counting = bundle.parent / "counting.wasm"
    counting.write_bytes(wasm_counter.counting((bundle / "model.wasm").read_bytes()))
    return _run("node", HERE / "count_module.mjs", bundle, counting)


def count_native(target: Target, bundle: Path) -> int:
    """Instructions of the emulated machine that one run executes."""
    plugin = bundle.parent / "count.so"
    flags = ("-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror")
    subprocess.run(["cc", *flags, HERE / "count_plugin.c", "-o", plugin], check=True)
    program = bundles.build_runner(target, bundle, "bench.c")
    emulator = [*target.emulator, "-plugin", plugin]
    counted = partial(_run, *emulator, program, bundle / "weights.bin", 1)
    return counted(2) - counted(1)


def _run(*command: object) -> int:
    done = bundles.execute(*command)
    found = re.search(r"^executed (\d+)$", done.stdout + "\n" + done.stderr, re.MULTILINE)
    if done.returncode != 0 or not found:
        raise bundles.RunFailed(f"exit code {done.returncode}: {done.stderr.strip()[-300:]}")
    return int(found[1])


def line(count: Count) -> str:
    """One row for people."""
    millions = f"{count.pruned / 1e6:9.2f} of {count.dense / 1e6:9.2f} million"
    return f"{count.model:13} {count.target:15} {count.density:4} {millions}  {count.ratio:.3f}"


def main(arguments: list[str] | None = None) -> int:
    """Parse, count, print; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m benchmarks.instructions")
    parser.add_argument("--only", nargs="+", choices=list(bundles.MODELS), default=list(MODELS))
    parser.add_argument("--on", nargs="+", default=list(MACHINES), metavar="TARGET")
    parser.add_argument("--density", type=float, default=DENSITY)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    try:
        machines = [targets.get(name) for name in options.on]
    except UnsupportedError as error:
        parser.error(str(error))
    head = asdict(results.begin(["benchmarks.instructions", *arguments]))
    counts = []
    for name in options.only:
        for target in machines:
            counts.append(measure(bundles.MODELS[name], target, options.density))
            print(line(counts[-1]), flush=True)
            if options.json:
                rows = [{**asdict(c), "ratio": round(c.ratio, 4)} for c in counts]
                options.json.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")
    return 0 if all(c.ratio <= BAR for c in counts) else 1


if __name__ == "__main__":
    sys.exit(main())
