"""Tables and plots from result files: every published number is printed by this.

python -m benchmarks.report results.json ... [--markdown] [--svg FOLDER]
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import plot, results
from benchmarks.bars import Verdict
from benchmarks.results import Results, Row

Table = tuple[list[str], list[list[str]]]
"""Header and rows."""

HEADER = [
    "workload", "zeros %", "pattern", "engine", "ms (min)", "ORT ms", "x ORT (min)", "GMAC/s",
    "error", "prepare s", "note",
]  # fmt: skip


FILE_WIDTH = 160
"""Columns of a table that goes to a file or a pipe."""


def line(row: Row) -> str:
    """One row as progress text."""
    return "  ".join(cell for cell in _cells(row) if cell)


def rows_table(found: Results) -> Table:
    """One line per measured engine."""
    return HEADER, [_cells(row) for row in found.rows]


def bars_table(verdicts: Sequence[Verdict]) -> Table:
    """One line per bar."""
    header = ["workload", "zeros %", "pattern", "figure", "reached", "required", "result", "note"]
    return header, [
        [
            v.bar.workload,
            f"{100 * (1 - v.bar.density):g}",
            v.bar.pattern if v.bar.density < 1 else "dense",
            v.bar.metric,
            "-" if v.reached is None else f"{v.reached:.3g}",
            f"{'<=' if v.bar.is_limit else '>='} {v.bar.required:g}",
            "pass" if v.passes else "MISS",
            v.note,
        ]
        for v in verdicts
    ]


def markdown(table: Table) -> str:
    """A Markdown table."""
    header, rows = table
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def heading(found: Results) -> str:
    """Machine, versions, commit and command: what a figure means nothing without."""
    m = found.machine
    features = " ".join(map(str, m["features"])) if isinstance(m["features"], list) else ""
    packages = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    return (
        f"{m['cpu']} ({features}), {m['cores']} cores, {m['memory_gib']} GiB; {packages}; "
        f"commit {found.commit}; {found.created}; `{found.command}`"
    )


def print_rows(found: Results) -> None:
    """The measurements on the terminal."""
    _print(found, rows_table(found))


def print_bars(found: Results, verdicts: Sequence[Verdict]) -> None:
    """The verdicts on the terminal."""
    _print(found, bars_table(verdicts))


def main(arguments: list[str] | None = None) -> int:
    """Print result files, write plots."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--svg", type=Path, metavar="FOLDER")
    options = parser.parse_args(arguments)
    for file in options.files:
        found = results.load(file)
        if options.markdown:
            print(heading(found), markdown(rows_table(found)), sep="\n\n")
        else:
            print_rows(found)
        if options.svg:
            options.svg.mkdir(parents=True, exist_ok=True)
            for name, svg in plot.plots(found.rows).items():
                (options.svg / f"{name}.svg").write_text(svg)
    return 0


def _print(found: Results, table: Table) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable

    header, rows = table
    shown = RichTable(box=box.SIMPLE)
    for name in header:
        shown.add_column(name, no_wrap=name != "note", overflow="fold")
    for row in rows:
        shown.add_row(*row)
    console = Console() if sys.stdout.isatty() else Console(width=FILE_WIDTH)
    console.print(heading(found), markup=False, highlight=False, soft_wrap=True)
    console.print(shown)


def _cells(row: Row) -> list[str]:
    start = [row.workload, f"{row.zeros_percent:g}", row.pattern, row.engine]
    if row.median_ms is None or row.min_ms is None:
        return [*start, *[""] * 6, row.error or ""]
    notes = ["noisy"] if row.is_noisy else []
    if row.n_dropped:
        notes.append(f"{row.n_dropped} dropped")
    return [
        *start,
        f"{row.median_ms:.3f} ({row.min_ms:.3f})",
        "" if row.reference_ms is None else f"{row.reference_ms:.3f}",
        _ratio(row),
        "" if row.gmacs is None else f"{1e3 * row.gmacs / row.median_ms:.1f}",
        "" if row.max_rel_error is None else f"{row.max_rel_error:.1e}",
        "" if row.prepare_s is None else f"{row.prepare_s:.2f}",
        ", ".join(notes),
    ]


def _ratio(row: Row) -> str:
    if row.ratio is None or row.reference_min_ms is None or not row.min_ms:
        return ""
    return f"{row.ratio:.2f} ({row.reference_min_ms / row.min_ms:.2f})"


if __name__ == "__main__":
    sys.exit(main())
