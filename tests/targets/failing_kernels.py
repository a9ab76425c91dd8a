"""Kernels that stop the code generator in every way."""

import ctypes
import errno
import os
import signal
from dataclasses import dataclass
from typing import Any

from sparsegraph.targets import emit
from sparsegraph.targets.kernels.pool import GlobalPool
from sparsegraph.targets.target import Target


@dataclass(frozen=True)
class Failing:
    """A kernel without code; `how` it fails."""

    how: str

    @property
    def name(self) -> str:
        return f"failing_{self.how}"

    @property
    def params(self) -> emit.Signature:
        return emit.signature("y:float32*")

    def body(self, target: Target) -> Any:
        fail(self.how)


class FailingPool(GlobalPool):
    """A kernel of a real node that brings the code generator down."""

    def body(self, target: Target) -> Any:
        fail("abort")


class FullDiskPool(GlobalPool):
    """A kernel of a real node whose object LLVM cannot write."""

    def body(self, target: Target) -> Any:
        fail("llvm_disk")


def fail(how: str) -> None:
    """What the code generator may do."""
    if how == "raise":
        raise ValueError("this lies\n  deep inside")
    if how == "abort":
        os.write(2, b"Check failed: vectors differ\n")
        os.abort()
    if how == "segfault":
        ctypes.string_at(0)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "memory":
        raise MemoryError
    if how == "disk":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if how == "llvm_disk":
        os.write(2, b"LLVM ERROR: IO failure on output stream: No space left on device\n")
        os.abort()
    if how == "server":
        os.kill(os.getppid(), signal.SIGKILL)
