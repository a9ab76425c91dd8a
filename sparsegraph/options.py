"""Read the values of command-line options: shapes, feeds, calibration files."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np

from sparsegraph.errors import UsageError, message
from sparsegraph.tensor_file import read_arrays

Array = np.ndarray[Any, Any]
Feeds = dict[str, Array]


def shapes(shape: Sequence[str], dim: Sequence[str]) -> dict[str, int | tuple[int, ...]]:
    """`--shape x=1,3,224,224` and `--dim batch=1` as the `shapes` of `load` and `compile`.

    Raises UsageError for text of another form.
    """
    found: dict[str, int | tuple[int, ...]] = {}
    for text in shape:
        name, sizes = _pair("--shape", text, "name=1,3,224,224")
        found[name] = tuple(_size("--shape", text, s) for s in sizes.split(","))
    for text in dim:
        name, size = _pair("--dim", text, "batch=1")
        found[name] = _size("--dim", text, size)
    return found


def variants(shape: Sequence[str], dim: Sequence[str]) -> list[dict[str, int | tuple[int, ...]]]:
    """As `shapes`, once for every combination of values in `--dim sequence=32,64,128`."""
    several = []
    for text in dim:
        name, sizes = _pair("--dim", text, "batch=1")
        several.append([f"{name}={size}" for size in sizes.split(",")])
    return [shapes(shape, chosen) for chosen in itertools.product(*several)]


def keep(given: Sequence[str]) -> float | dict[str, float]:
    """`0.5` for all groups (also when nothing is given), or `group=0.25` for the named ones."""
    if not given:
        return 0.5
    if len(given) == 1 and "=" not in given[0]:
        return _share(given[0], given[0])
    pairs = [_pair("--keep", text, "GROUP=SHARE") for text in given]
    return {name: _share(f"{name}={share}", share) for name, share in pairs}


def multiple(text: str) -> int | Literal["measured"]:
    """A count, or the word `measured`."""
    if text == "measured":
        return "measured"
    if not text.isdigit() or int(text) < 1:
        fix = "write --multiple 8"
        raise UsageError(message("--multiple", text, f"'{text}'", "a count or 'measured'", fix))
    return int(text)


def _share(text: str, share: str) -> float:
    try:
        return float(share)
    except ValueError as error:
        fix = "write --keep 0.5"
        raise UsageError(message("--keep", text, f"'{share}'", "a number", fix)) from error


def bundles(path: Path, targets: Sequence[str]) -> dict[str, Path]:
    """Where the bundle of each target goes: `path`, or model.A.sg and model.B.sg beside it."""
    names = list(dict.fromkeys(targets))
    if len(names) == 1:
        return {names[0]: path}
    tags = {name: name.replace(":", "-").replace(",", "-") for name in names}
    return {name: path.with_name(f"{path.stem}.{tags[name]}{path.suffix}") for name in names}


def read_feed(given: Sequence[str]) -> Feeds:
    """Arrays by input name from `feed.npz`, `feed.safetensors` and `name=array.npy`.

    Raises UsageError for files that are missing or hold something else.
    """
    found: Feeds = {}
    for text in given:
        name, equals, path = text.partition("=")
        if equals and path.endswith(".npy"):
            found[name] = _read(Path(path))
        else:
            found |= read_arrays(Path(text))
    return found


def read_calibration(path: Path, inputs: Mapping[str, tuple[int, ...]]) -> list[Feeds]:
    """Feeds from an .npz or .safetensors file, an array per input, samples along the first axis.

    `inputs` maps names to the static shapes that the model takes. An input of shape [b, ...] takes
    arrays [n, b, ...], or [n * b, ...], which are cut into batches of b.
    Raises UsageError when names, shapes or numbers of samples do not fit.
    """
    archive = read_arrays(path)
    missing = sorted(inputs.keys() - archive.keys())
    if missing:
        found, need = ", ".join(sorted(archive)) or "no arrays", ", ".join(inputs)
        fix = f"add an array named {missing[0]}"
        raise UsageError(message("calibration", str(path), found, need, fix))
    samples = {name: _samples(name, archive[name], shape) for name, shape in inputs.items()}
    counts = {name: len(array) for name, array in samples.items()}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{n} of {name}" for name, n in counts.items())
        need, fix = "as many samples for every input", "save matching arrays"
        raise UsageError(message("calibration", str(path), found, need, fix))
    n = next(iter(counts.values()), 0)
    if not n:
        need, fix = "at least one", "save samples along the first axis"
        raise UsageError(message("calibration", str(path), "no samples", need, fix))
    return [{name: array[i] for name, array in samples.items()} for i in range(n)]


def _samples(name: str, array: Array, shape: tuple[int, ...]) -> Array:
    if array.shape[1:] == shape:
        return array
    batch = shape[0] if shape else 1
    if array.ndim == len(shape) and array.shape[1:] == shape[1:] and len(array) % batch == 0:
        return array.reshape(-1, *shape)
    need = f"[samples, {', '.join(map(str, shape))}]"
    fix = "stack samples along a new first axis"
    if array.shape[array.ndim - len(shape[1:]) :] != shape[1:]:
        fix = "save arrays of that shape, or load the model with another --shape"
    raise UsageError(message("calibration input", name, list(array.shape), need, fix))


def _read(path: Path) -> Array:
    loaded = _load(path)
    if not isinstance(loaded, np.ndarray):
        raise UsageError(message("file", str(path), "an .npz file", "an .npy file", "pass it bare"))
    return loaded


def _load(path: Path) -> Any:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        found = getattr(error, "strerror", None) or "no NumPy data"
        fix = "save it with np.save(file, array)"
        raise UsageError(message("file", str(path), found, "an .npy file", fix)) from error


def _pair(option: str, text: str, form: str) -> tuple[str, str]:
    name, equals, value = text.rpartition("=")
    if not (name and equals and value):
        raise UsageError(message(option, text, "another form", form, f"write {option} {form}"))
    return name, value


def _size(option: str, text: str, size: str) -> int:
    if not size.strip().isdecimal() or int(size) < 1:
        fix = "write positive whole numbers"
        raise UsageError(message(option, text, f"'{size}'", "a size of at least 1", fix))
    return int(size)
