"""Arrays of many feeds, of which no more than a limit lies in memory."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


class Shelf:
    """One dictionary of arrays per feed.

    Arrays that would exceed `limit` bytes together are written to a temporary folder and mapped;
    the folder goes with the shelf. What the feeds brought themselves is not counted.
    """

    def __init__(self, feeds: Iterable[Mapping[str, Array]], limit: int) -> None:
        self._arrays: list[dict[str, Array]] = [dict(feed) for feed in feeds]
        self._counted: list[dict[str, int]] = [{} for _ in self._arrays]
        self._limit, self.in_memory = limit, 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._arrays)

    def __getitem__(self, feed: int) -> Mapping[str, Array]:
        return self._arrays[feed]

    def put(self, feed: int, name: str, array: Array) -> None:
        """Store an array, in memory while there is room."""
        self.drop(feed, name)
        if self.in_memory + array.nbytes > self._limit and array.nbytes:
            array = self._mapped(array)
        else:
            self._counted[feed][name] = array.nbytes
            self.in_memory += array.nbytes
        self._arrays[feed][name] = array

    def drop(self, feed: int, name: str) -> None:
        """Forget an array and its file; nothing happens if there is none."""
        self.in_memory -= self._counted[feed].pop(name, 0)
        array = self._arrays[feed].pop(name, None)
        if isinstance(array, np.memmap) and self._folder is not None and array.filename:
            path = Path(str(array.filename))
            if path.parent == Path(self._folder.name):
                path.unlink()

    def _mapped(self, array: Array) -> Array:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="sparsegraph-")
        path = Path(self._folder.name) / str(next(self._numbers))
        mapped: Array = np.memmap(path, dtype=array.dtype, mode="w+", shape=array.shape)
        mapped[...] = array
        return mapped
