"""The terminal: tables on standard output, progress and errors on standard error."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from sparsegraph import output

Report = Callable[[str, int, int], None]
_WIDE = 132  # columns of a table that goes to a file or pipe


class Screen:
    """Where one command writes. `json_to` is None, a file, or `-` for standard output.

    With `-`, tables move to standard error so that the JSON stands alone.
    """

    def __init__(self, json_to: str | None = None) -> None:
        self._json_to = json_to
        stream = sys.stderr if json_to == "-" else sys.stdout
        width = None if stream.isatty() else _WIDE
        self._out = Console(file=stream, width=width, highlight=False)
        self._err = Console(stderr=True, highlight=False)
        if json_to not in (None, "-"):
            output.check_writable(Path(str(json_to)))

    def say(self, text: str) -> None:
        """One line."""
        self._out.print(text, markup=False)

    def table(
        self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], footer: str = ""
    ) -> None:
        """A table; columns that hold numbers are set right."""
        table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
        for i, name in enumerate(columns):
            is_number = any(_is_numeric(row[i]) for row in rows)
            table.add_column(name, justify="right" if is_number else "left", overflow="fold")
        for row in rows:
            table.add_row(*[_cell(value) for value in row])
        self._out.print(table)
        if footer:
            self._out.print(footer, markup=False)

    def json(self, data: Any) -> None:
        """The same content as data, where the user asked for it."""
        if self._json_to == "-":
            json.dump(data, sys.stdout, indent=1, default=output.plain)
            sys.stdout.write("\n")
        elif self._json_to is not None:
            output.write_json(Path(self._json_to), data)

    @contextmanager
    def progress(self) -> Iterator[Report]:
        """A bar per stage: `report(stage, done, total)`. Nothing is drawn off a terminal."""
        bar = Progress(
            TextColumn("{task.description:18}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._err,
            transient=True,
            disable=not self._err.is_terminal,
        )
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                for task in tasks.values():
                    bar.stop_task(task)
                tasks[stage] = bar.add_task(stage, total=total or None)
            bar.update(tasks[stage], completed=done, total=total or None)

        with bar:
            yield report


def _is_numeric(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cell(value: object) -> str:
    from rich.markup import escape

    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else escape(str(value))
