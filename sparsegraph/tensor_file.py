"""Named arrays from .npz and .safetensors files of strangers: no pickle, every range checked.

A .npz is read whole; a .safetensors file is mapped, so that only what is used comes to memory.
"""

from __future__ import annotations

import json
import math
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from sparsegraph.errors import UsageError, message

Array = np.ndarray[Any, Any]

_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2",
    "I8": "i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip
_LARGEST_HEADER = 100 << 20  # the limit of the format's own reader
_MALFORMED = (OSError, ValueError, KeyError, TypeError, EOFError, struct.error)
_DAMAGED = (zipfile.BadZipFile, zlib.error, RuntimeError, MemoryError)


def read_arrays(path: str | Path) -> dict[str, Array]:
    """Every array of a .npz or .safetensors file, by name.

    Raises UsageError for a file that is missing, damaged, pickled, or of another kind.
    """
    path = Path(path)
    try:
        return _safetensors(path) if path.suffix == ".safetensors" else _npz(path)
    except _DAMAGED as error:
        found, fix = f"an archive that is damaged ({error})", "save or copy it again"
        raise UsageError(message("file", str(path), found, "a whole one", fix)) from error
    except _MALFORMED as error:
        found = getattr(error, "strerror", None) or str(error) or type(error).__name__
        need, fix = "an .npz or .safetensors file", "save it with np.savez(file, name=array)"
        raise UsageError(message("file", str(path), found, need, fix)) from error


def _npz(path: Path) -> dict[str, Array]:
    try:
        loaded = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError("no NumPy data") from error
    if not isinstance(loaded, np.lib.npyio.NpzFile):
        raise ValueError("one array")
    with loaded:
        return {name: _plain(loaded, name) for name in loaded.files}


def _plain(archive: Any, name: str) -> Array:
    try:
        return np.asarray(archive[name])
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
        raise ValueError(f"Python objects in '{name}'") from error


def _safetensors(path: Path) -> dict[str, Array]:
    """8 bytes of header length (little-endian), a JSON header with byte ranges, then the data."""
    if path.stat().st_size < 8:
        raise ValueError("no safetensors header")
    raw = np.memmap(path, dtype=np.uint8, mode="r")
    (n_header,) = struct.unpack("<Q", raw[:8].tobytes())
    if n_header > min(_LARGEST_HEADER, raw.size - 8):
        raise ValueError(f"a header of {n_header} bytes in a file of {raw.size}")
    header = json.loads(raw[8 : 8 + n_header].tobytes())
    if not isinstance(header, dict):
        raise ValueError("a header that is no table")
    data = raw[8 + n_header :]
    entries = ((name, entry) for name, entry in header.items() if name != "__metadata__")
    return {str(name): _tensor(str(name), entry, data) for name, entry in entries}


def _tensor(name: str, entry: dict[str, Any], data: Array) -> Array:
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"{name} of type {entry['dtype']}")
    dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), tuple(int(d) for d in entry["shape"])
    begin, end = (int(offset) for offset in entry["data_offsets"])
    is_inside = 0 <= begin <= end <= data.size and min(shape, default=0) >= 0
    if not is_inside or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} of shape {list(shape)} in bytes {begin} to {end}")
    if begin % dtype.itemsize:
        return np.frombuffer(data[begin:end].tobytes(), dtype=dtype).reshape(shape)
    return data[begin:end].view(dtype).reshape(shape)
