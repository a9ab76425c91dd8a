"""Interleaved timing of several callables in one pinned process.

Engines take turns in short blocks, so that a slow minute of the machine hits all of them alike.
The first sample of a block is dropped (another engine's weights are in the caches then), and so is
every sample during which the thread waited for a core that somebody else used.
Needs the standard library only: peers run it in environments of their own.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

SCHEDSTAT = "/proc/thread-self/schedstat"
"""Linux: `ns on a core, ns waiting for one, slices` of the calling thread."""

MAX_WAIT_FRACTION = 0.02
"""A sample that waited longer than this part of its time is dropped."""

MIN_CLEAN_SAMPLES = 5
"""With fewer clean samples than this, all samples count and the result is marked noisy."""

MIN_BLOCK_SAMPLES = 3


@dataclass(frozen=True)
class Plan:
    """How long to measure."""

    rounds: int = 7
    """Blocks per engine."""
    block_ms: float = 100.0


@dataclass(frozen=True)
class Timing:
    """Times of one call of one engine."""

    median_ms: float
    min_ms: float
    n_samples: int
    n_dropped: int
    """Samples that waited for a core; a block's first samples are not counted."""
    is_noisy: bool


@dataclass
class Samples:
    """Durations of one engine's calls, those that waited apart."""

    clean_ms: list[float] = field(default_factory=list)
    waited_ms: list[float] = field(default_factory=list)

    def add(self, duration_ns: int, waited_ns: int) -> None:
        """File one sample under clean or waited."""
        is_clean = waited_ns <= duration_ns * MAX_WAIT_FRACTION
        (self.clean_ms if is_clean else self.waited_ms).append(duration_ns / 1e6)

    def summary(self) -> Timing:
        """Median and minimum over the clean samples, or over all if those are too few."""
        is_noisy = len(self.clean_ms) < MIN_CLEAN_SAMPLES
        used = self.clean_ms + self.waited_ms if is_noisy else self.clean_ms
        return Timing(
            median_ms=statistics.median(used),
            min_ms=min(used),
            n_samples=len(used),
            n_dropped=0 if is_noisy else len(self.waited_ms),
            is_noisy=is_noisy,
        )


def interleave(calls: Mapping[str, Callable[[], object]], plan: Plan) -> dict[str, Timing]:
    """Time `calls` in alternating blocks; the order turns around every round."""
    samples = {name: Samples() for name in calls}
    order = list(calls)
    for name in order:
        calls[name]()
    with wait_clock() as waited_ns:
        for _ in range(plan.rounds):
            for name in order:
                _block(calls[name], samples[name], plan.block_ms, waited_ns)
            order.reverse()
    return {name: s.summary() for name, s in samples.items()}


def _block(
    call: Callable[[], object], samples: Samples, block_ms: float, waited_ns: Callable[[], int]
) -> None:
    end = time.perf_counter_ns() + int(block_ms * 1e6)
    n = 0
    while n < MIN_BLOCK_SAMPLES or time.perf_counter_ns() < end:
        waited = waited_ns()
        start = time.perf_counter_ns()
        call()
        duration = time.perf_counter_ns() - start
        if n:
            samples.add(duration, waited_ns() - waited)
        n += 1


@contextmanager
def wait_clock(path: str = SCHEDSTAT) -> Iterator[Callable[[], int]]:
    """A clock of the nanoseconds that this thread was ready but had no core; 0 off Linux."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        yield lambda: 0
        return
    try:
        yield lambda: int(os.pread(handle, 96, 0).split()[1])
    finally:
        os.close(handle)


@contextmanager
def pinned(n_cores: int) -> Iterator[tuple[int, ...]]:
    """Keep this process on its first `n_cores` cores; yields them (empty where unsupported)."""
    if not hasattr(os, "sched_setaffinity"):
        yield ()
        return
    allowed = os.sched_getaffinity(0)
    cores = tuple(sorted(allowed)[:n_cores])
    os.sched_setaffinity(0, cores)
    try:
        yield cores
    finally:
        os.sched_setaffinity(0, allowed)
