"""What the compiler shows while it works: one variable for words, one for files.

SPARSEGRAPH_DEBUG=1 prints a line per pass, 2 adds the reasons for declining, 3 the changed nodes.
SPARSEGRAPH_DUMP=folder keeps every stage as a numbered, runnable model.
"""

import os
import sys
from collections import Counter
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx_ir as ir

from sparsegraph.rewrite import Decline

_EXTERNAL_FROM_BYTES = 1 << 30  # below, one file per stage is handier


class Record(Protocol):
    """The part of a pass record that is printed."""

    @property
    def name(self) -> str: ...
    @property
    def n_applied(self) -> int: ...
    @property
    def declined(self) -> tuple[Decline, ...]: ...
    @property
    def nodes_before(self) -> int: ...
    @property
    def nodes_after(self) -> int: ...
    @property
    def ms(self) -> float: ...
    @property
    def max_rel_error(self) -> float | None: ...


def level() -> int:
    """Verbosity, 0 to 5. A value that is no number counts as 1."""
    text = os.environ.get("SPARSEGRAPH_DEBUG", "0")
    return int(text) if text.isdigit() else 1


def dump_folder() -> Path | None:
    """Where to keep every stage, or None."""
    text = os.environ.get("SPARSEGRAPH_DUMP")
    return Path(text) if text else None


def show(record: Record, before: ir.Model, after: ir.Model) -> None:
    """Print what a pass did, as far as the level asks for it."""
    verbosity = level()
    if verbosity < 1:
        return
    error = "" if record.max_rel_error is None else f"  error {record.max_rel_error:.1e}"
    nodes = f"{record.nodes_before:5} -> {record.nodes_after:5} nodes"
    _print(f"{record.name:22} {record.n_applied:5} applied  {nodes} {record.ms:8.1f} ms{error}")
    if verbosity >= 2:
        for item in record.declined:
            _print(f"    {item.node}: {item.reason}")
    if verbosity >= 3:
        for line in difference(before, after):
            _print(f"    {line}")


def difference(before: ir.Model, after: ir.Model) -> list[str]:
    """`- node` and `+ node` lines for what one model has and the other has not."""
    old, new = (Counter(_line(n) for n in m.graph) for m in (before, after))
    gone = [f"- {line}" for line in (old - new)]
    return gone + [f"+ {line}" for line in (new - old)]


def dump(model: ir.Model, folder: Path, number: int, name: str) -> Path:
    """Write one stage as `NN_name.onnx`; returns the path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{number:02}_{name}.onnx"
    save(model, path)
    return path


def save(model: ir.Model, path: Path) -> None:
    """Write a model, with its weights beside it when one file could not hold them."""
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value)
    external = f"{path.name}.data" if size >= _EXTERNAL_FROM_BYTES else None
    ir.save(model.clone() if external else model, path, external_data=external)


def reproducer(model: ir.Model, feed: dict[str, np.ndarray], folder: Path, name: str) -> Path:
    """Write the model before a failing pass and the feed that shows it; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}_before.onnx"
    save(model, path)
    np.savez(folder / f"{name}_feed.npz", **feed)  # type: ignore[arg-type]
    return path


def _line(node: ir.Node) -> str:
    outputs = ", ".join(str(v.name) for v in node.outputs)
    inputs = ", ".join("" if v is None else str(v.name) for v in node.inputs)
    return f"{outputs} = {node.op_type}({inputs})"


def _print(text: str) -> None:
    print(text, file=sys.stderr)
