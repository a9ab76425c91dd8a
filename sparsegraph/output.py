"""Write what a user asked for, whole or not at all: a temporary sibling is renamed at the end."""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from sparsegraph.errors import UsageError, message


def write_json(path: Path, data: Any) -> None:
    """JSON with a line per value. Raises UsageError when `path` cannot be written."""
    write_text(path, json.dumps(data, indent=1, allow_nan=False, default=plain) + "\n")


def write_text(path: Path, text: str) -> None:
    """A UTF-8 file. Raises UsageError when `path` cannot be written."""
    _publish(path, lambda to: to.write_text(text, encoding="utf-8"))


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """An .npz file with the arrays by name. Raises UsageError when `path` cannot be written."""

    def fill(to: Path) -> None:
        with to.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    _publish(path, fill)


def write_model(path: Path, model: ir.Model) -> None:
    """An ONNX file, weights of 1 GB and more beside it. Raises UsageError as above."""
    from sparsegraph import debug

    _publish(path, lambda to: debug.save(model, to))


def write_folder(folder: Path, fill: Callable[[Path], object]) -> None:
    """The files that `fill` makes, in a folder that may hold others.

    Raises UsageError when the folder cannot be written.
    """
    check_folder(folder)
    try:
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".") as partial:
            fill(Path(partial))
            _move(Path(partial), folder)
    except OSError as error:
        need = "a folder that can be written"
        raise _refused(folder, error.strerror or str(error), need) from error


def check_writable(path: Path) -> None:
    """Fail before long work: raises UsageError when the file `path` could not be written."""
    if path.is_dir():
        raise _refused(path, "a folder", "a file name")
    check_folder(path)


def check_folder(path: Path) -> None:
    """Raises UsageError when nothing can be written beside `path`."""
    folder = path.parent
    if not folder.is_dir():
        raise _refused(path, f"no folder '{folder}'", "an existing folder")
    if not os.access(folder, os.W_OK):
        raise _refused(path, f"folder '{folder}' is read-only", "a folder that can be written")


def _publish(path: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` write in a temporary sibling folder, then move what it wrote into place."""
    check_writable(path)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            fill(Path(folder, path.name))
            _move(Path(folder), path.parent)
    except OSError as error:
        raise _refused(path, error.strerror or str(error), "a file that can be written") from error


def _move(source: Path, to: Path) -> None:
    """Move all files, weights before models."""
    files = sorted(source.iterdir(), reverse=True)
    for file in sorted(files, key=lambda f: f.suffix == ".onnx"):
        file.chmod(0o666 & ~_umask())
        os.replace(file, to / file.name)


def _refused(path: Path, found: str, need: str) -> UsageError:
    return UsageError(message("output", str(path), found, need, "name another output"))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def plain(value: Any) -> Any:
    """What json cannot print by itself."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    return str(value)
