"""Masks from outside: read from a file, matched by weight name, taken as they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from sparsegraph.errors import UsageError, message
from sparsegraph.tensor_file import read_arrays

Array = np.ndarray[Any, Any]
Masks = Mapping[str, Array]


def read_masks(path: str | Path) -> dict[str, Array]:
    """Boolean masks (True stays) by weight name, in the weight's stored shape.

    `.npz` and `.safetensors`: every array is a mask, whatever is not zero stays. `.onnx`: the
    non-zeros of every floating-point initializer of two or more axes that has zeros.
    Raises UsageError for an unreadable array file, CaptureError for a bad model.
    """
    if Path(path).suffix != ".onnx":
        return {name: array != 0 for name, array in read_arrays(path).items()}
    from sparsegraph.capture import load

    found = {}
    for name, value in load(path).graph.initializers.items():
        tensor = value.const_value
        if tensor is None or len(tensor.shape) < 2 or tensor.numpy().dtype.kind != "f":
            continue
        mask = tensor.numpy() != 0
        if not mask.all():
            found[name] = mask
    return found


def check_masks(model: ir.Model, masks: Masks) -> None:
    """Raise UsageError for a mask that fits no floating-point weight of the model."""
    constants = model.graph.initializers
    for name, mask in masks.items():
        value = constants.get(name)
        if value is None or value.const_value is None:
            names = ", ".join(list(constants)[:5])
            fix = "name masks after the model's weights"
            raise UsageError(message("mask", name, "no such weight", f"one of {names}, ...", fix))
        weight = value.const_value.numpy()
        if weight.shape != mask.shape:
            fix = "store masks in the shape of the model's weights"
            raise UsageError(message("mask", name, list(mask.shape), list(weight.shape), fix))
        if weight.dtype.kind != "f":
            fix = "mask the model before it is quantised"
            raise UsageError(message("mask", name, weight.dtype, "a floating-point weight", fix))


def apply(model: ir.Model, masks: Masks) -> None:
    """Zero what the masks drop, in place."""
    for name, mask in masks.items():
        value = model.graph.initializers[name]
        assert value.const_value is not None
        weight = value.const_value.numpy()
        kept = np.where(mask, weight, np.zeros((), dtype=weight.dtype))
        value.const_value = ir.tensor(kept, name=name)
