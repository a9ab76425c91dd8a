"""What the commands share: options, and errors as one line with an exit code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from sparsegraph.errors import SparsegraphError

_INTERRUPTED = 130  # the shell's code for SIGINT


class Commands(TyperGroup):
    """Turns errors that a user can act on into one line and their exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except SparsegraphError as error:
            typer.echo(f"error: {in_options(str(error))}", err=True)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(_INTERRUPTED) from None


Model = Annotated[Path, typer.Argument(help="An ONNX file.", show_default=False)]
Artefact = Annotated[Path, typer.Argument(help="A compiled model.", show_default=False)]
Shape = Annotated[
    list[str] | None, typer.Option("--shape", help="An input's shape: name=1,3,224,224.")
]
Dim = Annotated[list[str] | None, typer.Option("--dim", help="A free dimension: batch=1.")]
TargetName = Annotated[str, typer.Option("--target", help="A name that `targets` lists.")]
TargetNames = Annotated[
    list[str] | None,
    typer.Option("--target", help="A name that `targets` lists; several give one bundle each."),
]
Threads = Annotated[int, typer.Option("--threads", min=1, help="Threads of one run.")]
Json = Annotated[
    str | None, typer.Option("--json", help="Also write JSON to this file; - is standard output.")
]
Html = Annotated[Path | None, typer.Option("--html", help="Also write an HTML report.")]
Skip = Annotated[list[str] | None, typer.Option("--skip", help="A pass to leave out.")]
Check = Annotated[
    bool, typer.Option("--check/--no-check", help="Verify against ONNX Runtime as we go.")
]
Devices = Annotated[
    Path | None,
    typer.Option(
        "--devices",
        help="Measure on these devices: a TOML file of tables \\[devices.NAME] with ssh = HOST, or "
        "run = \\[...] and push = \\[...].",
    ),
]
Tune = Annotated[
    bool, typer.Option("--tune", help="Measure the best ways to compute each layer, here.")
]
Tuning = Annotated[
    Path | None, typer.Option("--tuning", help="A file of measured times that `--tune` wrote.")
]
Inputs = Annotated[
    list[str] | None,
    typer.Option("--input", help="feed.npz, or name=array.npy; random values by default."),
]


def in_options(text: str) -> str:
    """An error text on one line, with the Python argument `shapes` written as options."""
    line = " ".join(text.split())
    return re.sub(
        r"shapes=\{(.*)\}", r"--dim NAME=SIZE or --shape INPUT=SIZES for \1", line
    ).replace(": ...", "")
