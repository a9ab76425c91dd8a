"""Timing of calls that take turns on pinned cores, so that a slow minute hits all of them alike."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

Name = TypeVar("Name")


def interleave(
    calls: Mapping[Name, Callable[[], object]],
    rounds: int,
    block_ms: float,
    on_round: Callable[[int], None] | None = None,
    *,
    least: int = 3,
) -> dict[Name, list[list[float]]]:
    """Milliseconds of every call by name and round; each block's first call is dropped.

    A block lasts `block_ms` and has at least `least` calls. The order turns around every round, so
    that drift of the machine hits all alike.
    """
    blocks: dict[Name, list[list[float]]] = {name: [] for name in calls}
    order = list(calls)
    for i in range(rounds):
        for name in order:
            blocks[name].append(_block(calls[name], block_ms, least))
        order.reverse()
        if on_round is not None:
            on_round(i + 1)
    return blocks


def _block(call: Callable[[], object], block_ms: float, least: int) -> list[float]:
    call()
    times: list[float] = []
    while len(times) < least or sum(times) < block_ms:
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return times


@contextmanager
def pinned(n_cores: int) -> Iterator[None]:
    """Keep the process on its first `n_cores` cores, where the system can."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[:n_cores])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)
