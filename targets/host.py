"""Compile kernels for this machine and call them from Python: tests, benchmarks, tuning."""

import ctypes
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from sparsegraph.targets import link
from sparsegraph.targets.compiler import Job, compile_all
from sparsegraph.targets.kernel import Kernel
from sparsegraph.targets.target import Target

ALIGNMENT = 64


def empty(size: int, dtype: Any = np.float32) -> np.ndarray:
    """A zeroed array of `size` elements that starts on a cache line, with a line of slack."""
    item = np.dtype(dtype).itemsize
    raw = np.zeros(size * item + 2 * ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size * item].view(dtype)


def aligned(array: np.ndarray) -> np.ndarray:
    """A flat copy of `array` that starts on a cache line."""
    flat = empty(array.size, array.dtype)
    flat[:] = array.ravel()
    return flat


class Library:
    """Compiled kernels: `library.call(kernel, *args, begin=0, end=1)`."""

    def __init__(self, kernels: Iterable[Kernel], target: Target) -> None:
        unique = {k.name: k for k in kernels}
        with tempfile.TemporaryDirectory() as folder:
            objects = [Path(folder, f"{i}.o") for i in range(len(unique))]
            jobs = zip(unique.values(), objects, strict=True)
            compile_all([Job(kernel, target, kernel.name, path) for kernel, path in jobs])
            out = Path(folder, "kernels.so")
            link.shared_library(objects, [], target, out)
            self._library = ctypes.CDLL(str(out))

    def call(self, kernel: Kernel, *args: Any, begin: int = 0, end: int = 1) -> None:
        """Run `kernel` on items [begin, end); arrays must be C-contiguous."""
        self.bind(kernel, *args, begin=begin, end=end)()

    def bind(self, kernel: Kernel, *args: Any, begin: int = 0, end: int = 1) -> Any:
        """A function without arguments that makes the same call again, for timing."""
        if len(args) != len(kernel.params):
            raise TypeError(f"{kernel.name} takes {len(kernel.params)} arguments, not {len(args)}")
        values = [_c_value(p.type, a) for p, a in zip(kernel.params, args)]
        function = self._library[kernel.name]
        function.restype = None
        return lambda: function(*values, ctypes.c_int32(begin), ctypes.c_int32(end))


def _c_value(kind: str, value: Any) -> Any:
    if kind.endswith("*"):
        assert value.flags.c_contiguous, value.strides
        assert value.dtype == np.dtype(kind[:-1]), (kind, value.dtype)
        return ctypes.c_void_p(value.ctypes.data)
    return ctypes.c_float(value) if kind == "float32" else ctypes.c_int32(int(value))
