"""Algebra of weights: sparse deltas on a base, and the average of models with one mask.

A task that changes few weights is its difference to the base (diff pruning: Guo et al. 2021,
arXiv:2012.07463; composable sparse fine-tuning: Ansell et al. 2022, arXiv:2110.07560); deltas add
up. An average keeps the zeros only where all members have them (sparse model soups: Zimmer et al.
2023, arXiv:2306.16788).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from sparsegraph import output
from sparsegraph.errors import UsageError, message
from sparsegraph.tensor_file import read_arrays

Array = np.ndarray[Any, Any]
Deltas = Mapping[str, Array]

_POSITIONS, _VALUES, _SHAPE = ":positions", ":values", ":shape"
_SPARSE_BELOW = 0.5  # density; above it, positions take more than they save


@dataclass(frozen=True)
class Folded:
    """One weight before and after its deltas; densities are shares of non-zeros."""

    weight: str
    density_before: float
    density_after: float


def fold(model: ir.Model, deltas: Sequence[Deltas]) -> tuple[ir.Model, tuple[Folded, ...]]:
    """A copy with the sum of all deltas, by weight name in stored shape, added; summed in float64.

    What cancels to zero is an exact zero. A boolean array is a mask: where it is False, the weight
    becomes zero, whatever is added. Raises UsageError for a delta that fits no weight.
    """
    copy = model.clone()
    total: dict[str, Array] = {}
    kept: dict[str, Array] = {}
    for name, delta in ((n, d) for given in deltas for n, d in given.items()):
        value = copy.graph.initializers.get(name)
        array = None if value is None or value.const_value is None else value.const_value.numpy()
        if array is None or array.shape != delta.shape or array.dtype.kind != "f":
            found = "no such weight" if array is None else f"{array.dtype} {list(array.shape)}"
            need, fix = f"a floating-point {list(delta.shape)}", "use deltas of this model"
            raise UsageError(message("delta", name, found, need, fix))
        if delta.dtype == np.bool_:
            kept[name] = kept.get(name, True) & delta
            total.setdefault(name, np.zeros(()))
        else:
            total[name] = total.get(name, 0.0) + delta.astype(np.float64)
    rows = []
    for name, delta in total.items():
        value = copy.graph.initializers[name]
        array = _array(value)
        after = (array.astype(np.float64) + delta).astype(array.dtype)
        after = np.where(kept.get(name, True), after, np.zeros((), array.dtype))
        value.const_value = ir.tensor(after, name=name)
        rows.append(Folded(name, density(array), density(after)))
    return copy, tuple(rows)


def difference(base: ir.Model, tuned: ir.Model) -> dict[str, Array]:
    """What to add to `base` for the weights of `tuned`, where they differ; in float64, exact.

    Raises UsageError when the models differ in more than floating-point weights.
    """
    check_alike(base, tuned, "tuned model")
    found = {}
    for name, before, after in _paired(base, tuned):
        if after.dtype.kind == "f" and not np.array_equal(before, after):
            found[name] = after.astype(np.float64) - before
    return found


@dataclass(frozen=True)
class Averaged:
    """One weight of the average: the share of non-zeros that all members have."""

    weight: str
    density: float


def average(
    models: Sequence[ir.Model], shares: Sequence[float] | None = None
) -> tuple[ir.Model, tuple[Averaged, ...]]:
    """The weighted mean of models that differ in values alone; equal shares by default.

    Weights of two or more axes must be zero in the same places: the mean of different masks has
    their union, so it is refused with the density that the union would have. Sums are float64.
    Raises UsageError.
    """
    if len(models) < 2:
        need, fix = "at least two", "name more models"
        raise UsageError(message("average", "models", len(models), need, fix))
    parts = np.full(len(models), 1.0) if shares is None else np.asarray(shares, dtype=np.float64)
    if len(parts) != len(models) or not (parts.sum() > 0 and np.isfinite(parts).all()):
        need = f"{len(models)} numbers with a positive sum"
        raise UsageError(message("average", "shares", shares, need, "give one share per model"))
    for i, other in enumerate(models[1:], 2):
        check_alike(models[0], other, f"model {i}")
    _check_masks(models)
    copy, rows = models[0].clone(), []
    for name, value in copy.graph.initializers.items():
        arrays = [_array(model.graph.initializers[name]) for model in models]
        if arrays[0].dtype.kind != "f" or all(np.array_equal(arrays[0], a) for a in arrays[1:]):
            continue
        mean = sum(p * a.astype(np.float64) for p, a in zip(parts / parts.sum(), arrays))
        after = np.asarray(mean).astype(arrays[0].dtype)
        value.const_value = ir.tensor(after, name=name)
        rows.append(Averaged(name, density(after)))
    return copy, tuple(rows)


def _check_masks(models: Sequence[ir.Model]) -> None:
    """Raise UsageError where zeros lie in different places, for the weight that would fill most."""
    worst: tuple[float, str, float] | None = None
    n_weights = n_unequal = 0
    for name, value in models[0].graph.initializers.items():
        first = _array(value)
        if first.ndim < 2 or first.dtype.kind != "f":
            continue
        masks = [_array(model.graph.initializers[name]) != 0 for model in models]
        union = np.logical_or.reduce(masks)
        n_weights += 1
        densest = max(float(mask.mean()) for mask in masks)
        if any(not np.array_equal(masks[0], mask) for mask in masks[1:]):
            n_unequal += 1
            row = (float(union.mean()) - densest, name, densest)
            worst = row if worst is None or row > worst else worst
    if worst is None:
        return
    filled, name, densest = worst
    found = (
        f"zeros in different places in {n_unequal} of {n_weights} weights; here the average would "
        f"have {filled + densest:.1%} non-zeros where the densest member has {densest:.1%}"
    )
    fix = "prune all members with one mask: recipe masks, --masks of one of them"
    raise UsageError(message("average", name, found, "equal masks", fix))


def check_alike(base: ir.Model, other: ir.Model, name: str) -> None:
    """Raise UsageError unless the models differ in the values of floating-point weights alone."""
    found = difference_of_structure(base, other)
    if found:
        need, fix = "the same with other weights", "export both from one architecture in one way"
        raise UsageError(message("model", name, found, need, fix))


def difference_of_structure(base: ir.Model, other: ir.Model) -> str:
    """In what two models differ besides the values of floating-point weights; empty if nothing."""
    for a, b in itertools.zip_longest(_lines(base), _lines(other)):
        if a != b:
            return f"{b or 'nothing'} in place of {a or 'nothing'}"
    for key, before, after in _paired(base, other):
        if before.dtype.kind != "f" and not np.array_equal(before, after):
            return f"other values of the {before.dtype} constant '{key}'"
    return ""


def _lines(model: ir.Model) -> Iterator[str]:
    """Every node and constant in words: what two models must have in common."""
    for node in model.graph:
        inputs = ", ".join("" if v is None else str(v.name) for v in node.inputs)
        options = sorted((key, str(attr.value)) for key, attr in node.attributes.items())
        settings = " ".join(f"{key}={value}" for key, value in options)
        yield f"{node.op_type}({inputs}) {settings} -> {node.outputs[0].name}"
    for name in sorted(model.graph.initializers):
        array = _array(model.graph.initializers[name])
        yield f"constant '{name}' {array.dtype} {list(array.shape)}"


def _paired(base: ir.Model, other: ir.Model) -> Iterator[tuple[str, Array, Array]]:
    for name, value in base.graph.initializers.items():
        yield name, _array(value), _array(other.graph.initializers[name])


# ---------------------------------------------------------------- files


def write(path: Path, deltas: Deltas) -> None:
    """An .npz: NAME:positions, NAME:values and NAME:shape where few change, NAME as a whole else.

    Values are float32 where that is exact. Raises UsageError when `path` cannot be written.
    """
    arrays: dict[str, Array] = {}
    for name, delta in deltas.items():
        narrow = delta if delta.dtype == np.bool_ else delta.astype(np.float32)
        held = narrow if np.array_equal(narrow, delta) else delta
        if delta.dtype == np.bool_ or density(delta) > _SPARSE_BELOW:
            arrays[name] = held
            continue
        positions = np.flatnonzero(held)
        dtype = np.uint32 if held.size <= 1 << 32 else np.uint64
        arrays[name + _POSITIONS] = positions.astype(dtype)
        arrays[name + _VALUES] = held.reshape(-1)[positions]
        arrays[name + _SHAPE] = np.array(held.shape, dtype=np.int64)
    output.write_arrays(path, arrays)


def read(path: str | Path) -> dict[str, Array]:
    """Deltas by weight name, dense, from `write`'s file or a plain .npz or .safetensors file.

    Boolean arrays are masks. Raises UsageError for another file, or positions that do not fit.
    """
    arrays = read_arrays(path)
    found: dict[str, Array] = {}
    for key, array in arrays.items():
        name, mark = key.rpartition(":")[0], ":" + key.rpartition(":")[2]
        if mark == _POSITIONS:
            found[name] = _scattered(str(path), name, array, arrays)
        elif mark not in (_VALUES, _SHAPE):
            found[key] = array
    if not found:
        fix = "write one with `sparsegraph delta diff`"
        raise UsageError(message("delta", str(path), "no arrays", "an array per weight", fix))
    return found


def _scattered(path: str, name: str, positions: Array, arrays: Mapping[str, Array]) -> Array:
    values, shape = arrays.get(name + _VALUES), arrays.get(name + _SHAPE)
    sizes = () if shape is None else tuple(int(n) for n in shape.reshape(-1))
    n = int(np.prod(sizes, dtype=np.int64)) if sizes and min(sizes) >= 0 else -1
    is_right = values is not None and values.shape == positions.shape
    is_right &= positions.dtype.kind == "u"
    if n < 0 or not is_right or (len(positions) and int(positions.max()) >= n):
        need = "positions inside the shape, and as many values"
        fix = "write it again with `sparsegraph delta diff`"
        raise UsageError(message("delta", path, f"a damaged '{name}'", need, fix))
    assert values is not None
    dense = np.zeros(n, dtype=values.dtype)
    dense[positions] = values
    return dense.reshape(sizes)


def _array(value: ir.Value) -> Array:
    assert value.const_value is not None
    return value.const_value.numpy()


def density(array: Array) -> float:
    """Share of non-zeros."""
    return float(np.count_nonzero(array) / max(array.size, 1))
