"""Whether calibration feeds fit a model, said before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from sparsegraph.errors import UsageError, message

Feed = Mapping[str, np.ndarray[Any, Any]]


def checked(model: ir.Model, calibration: Iterable[Feed]) -> list[Feed]:
    """The feeds as a list, when each has the model's inputs in their types and shapes.

    Raises UsageError naming the first input of the first feed that does not fit.
    """
    if isinstance(calibration, Mapping):
        fix = "pass a list of feeds"
        raise UsageError(message("calibration", "feeds", "one mapping", "an iterable of them", fix))
    wanted = {str(v.name): v for v in model.graph.inputs if v.name not in model.graph.initializers}
    feeds = list(calibration)
    for at, feed in enumerate(feeds):
        if not isinstance(feed, Mapping):
            found, need = f"a {type(feed).__name__}", "arrays by input name"
            raise UsageError(message("calibration", f"feed {at}", found, need, "pass mappings"))
        for name in (*wanted, *feed):
            given = wanted.get(name)
            found, need, fix = _misfit(feed.get(name), given)
            if found:
                fix = f"{fix} (feed {at})"
                raise UsageError(message("calibration", str(name), found, need, fix))
    return feeds


def _misfit(array: Any, given: ir.Value | None) -> tuple[str, str, str]:
    """(what was found, what is needed, what to do) of an input's array; empty where it fits."""
    if given is None:
        return "an input that the model has not", "the model's inputs alone", "leave it out"
    if array is None:
        return "no array", "one for every input of the model", "add it"
    if not isinstance(array, np.ndarray):
        return f"a {type(array).__name__}", "a NumPy array", "pass np.asarray of it"
    dtype = None if given.dtype is None else given.dtype.numpy()
    if dtype is not None and array.dtype != dtype and given.dtype != ir.DataType.STRING:
        return (
            str(array.dtype),
            str(dtype),
            f"prepare it as the model wants it, then .astype({dtype})",
        )
    dims = None if given.shape is None else given.shape.dims
    sizes = array.shape
    if dims is not None and (
        len(dims) != len(sizes) or any(isinstance(d, int) and d != n for d, n in zip(dims, sizes))
    ):
        return (
            f"shape {list(sizes)}",
            str(list(dims)),
            "correct it, or load the model with other shapes",
        )
    return "", "", ""
