"""The benchmark command.

    python -m benchmarks.run layers|models [--only NAME ...] [--densities 1 .1] [--json out.json]
    python -m benchmarks.run bars [--set frontier] [--from a.json b.json]    reached, required, pass
    python -m benchmarks.run costs         compile time, memory and weight bytes alone
    python -m benchmarks.run list          names of all workloads

Exit codes: 0 done, 1 an engine failed or a bar was missed, 2 wrong usage.
"""

import argparse
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks import bars
    from benchmarks.results import Results

Point = tuple[str, float, str]
"""Workload, density and pattern."""


def main(arguments: list[str] | None = None) -> int:
    """Parse, measure, save, print; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    options = parser.parse_args(arguments)
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = str(options.threads)
    if options.command == "list":
        return _list()
    _check(parser, options)
    if options.command == "bars":
        return _bars(options, arguments)
    if options.command == "costs":
        return _costs(options, arguments)
    return _measure(options, arguments)


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    from benchmarks.engines import ENGINES
    from benchmarks.workloads import WORKLOADS

    for name in options.only or ():
        if name not in WORKLOADS:
            parser.error(f"no workload '{name}': there are {', '.join(WORKLOADS)}")
    for peer in options.peer:
        if "=" not in peer or peer.split("=", 1)[0] not in ENGINES:
            parser.error(f"bad peer '{peer}': need ENGINE=PYTHON with ENGINE of {list(ENGINES)}")


def _measure(options: argparse.Namespace, arguments: list[str]) -> int:
    from benchmarks import report, results, roofline
    from benchmarks.timing import pinned

    found = results.begin(["benchmarks.run", *arguments])
    if options.command == "layers" and "sparsegraph" in options.engines:
        with pinned(1):
            found.roof.update(roofline.measure())
    _collect(options, found, _points(options))
    report.print_rows(found)
    return 1 if any(row.error for row in found.rows) else 0


def _costs(options: argparse.Namespace, arguments: list[str]) -> int:
    from benchmarks import bars, report, results
    from benchmarks.compile_cost import measure

    found = results.begin(["benchmarks.run", *arguments])
    for workload, ((density, _),) in _wanted(options, bars.points(bars.COST)).items():
        found.costs.append(measure(workload, density))
        _save(options, found)
    verdicts = [v for v in bars.judge(found, ()) if v.bar.metric in bars.COST_METRICS]
    report.print_bars(found, verdicts)
    return 0 if all(v.passes for v in verdicts) else 1


def _bars(options: argparse.Namespace, arguments: list[str]) -> int:
    from benchmarks import bars, report, results

    if options.source:
        found = results.merge([results.load(path) for path in options.source])
    else:
        found = results.begin(["benchmarks.run", *arguments])
        wanted = _wanted(options, bars.points(bars.SETS[options.set]))
        _collect(options, found, ((w, *point) for w, points in wanted.items() for point in points))
    verdicts = bars.judge(found, bars.SETS[options.set])
    report.print_bars(found, verdicts)
    return 0 if all(v.passes for v in verdicts) else 1


def _wanted(
    options: argparse.Namespace, points: "dict[str, list[bars.Point]]"
) -> "dict[str, list[bars.Point]]":
    return {w: d for w, d in points.items() if not options.only or w in options.only}


def _collect(options: argparse.Namespace, found: "Results", points: Iterable[Point]) -> None:
    """Measure `points` one by one; the file is complete after each."""
    from benchmarks import report
    from benchmarks.measure import Setup, measure
    from benchmarks.timing import Plan
    from benchmarks.workloads import WORKLOADS

    setup = Setup(
        engines=tuple(options.engines),
        peers=dict(peer.split("=", 1) for peer in options.peer),
        threads=options.threads,
        plan=Plan(rounds=options.rounds, block_ms=options.block_ms),
    )
    for name, density, pattern in points:
        for row in measure(WORKLOADS[name], density, replace(setup, pattern=pattern)):
            found.rows.append(row)
            print(report.line(row), file=sys.stderr, flush=True)
        _save(options, found)


def _points(options: argparse.Namespace) -> Iterator[Point]:
    from benchmarks.workloads import of_kind

    for workload in of_kind(options.command):
        if not options.only or workload.name in options.only:
            for density in options.densities:
                yield workload.name, density, options.pattern


def _save(options: argparse.Namespace, found: "Results") -> None:
    if options.json:
        found.save(options.json)


def _list() -> int:
    from benchmarks.workloads import of_kind

    for kind in ("layers", "models"):
        print(kind, *(w.name for w in of_kind(kind)), sep="\n  ")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run")
    parser.add_argument("command", choices=("layers", "models", "bars", "costs", "list"))
    parser.add_argument("--only", nargs="+", metavar="NAME", help="workloads to run")
    parser.add_argument("--densities", nargs="+", type=float, default=[1.0, 0.2, 0.1, 0.05])
    parser.add_argument("--pattern", default="unstructured", help="unstructured, 2:4, 4x1, 32x32")
    parser.add_argument(
        "--set", choices=("foundation", "frontier"), default="foundation", help="bars: which ones"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--engines", nargs="*", default=["sparsegraph"], help="beside ort")
    parser.add_argument(
        "--peer", action="append", default=[], metavar="ENGINE=PYTHON",
        help="an engine with an environment of its own",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=7, help="blocks per engine")
    parser.add_argument("--block-ms", type=float, default=100.0)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument(
        "--from", dest="source", type=Path, nargs="+", metavar="JSON",
        help="bars: judge these files, the later ones first",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
