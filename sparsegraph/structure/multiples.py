"""Counts that a runtime likes: kernels work on blocks of channels, a part of a block costs a whole.

ONNX Runtime's convolutions hold 8 channels in a block with AVX2 and 16 with AVX-512, its products
tile columns by 16 or more. Which multiple pays is measured, on the model itself.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Final, Literal

import onnx_ir as ir

from sparsegraph.timing import interleave
from sparsegraph.verify import Session, feeds_for

MEASURED: Final[Literal["measured"]] = "measured"
MULTIPLES = (1, 4, 8, 16)
_FREE = 1.02
"""Latency within 2 % of the lowest is noise on a quiet machine."""
_ROUNDS = 7
_ROUND_S = 0.05
_LONG_MS = 700.0
"""Rounds times one run."""

Timer = Callable[[Sequence[ir.Model]], Sequence[float]]


def fastest(
    cut: Callable[[int], ir.Model], timer: Timer | None = None
) -> tuple[int, dict[int, float]]:
    """The largest multiple whose model is as fast as any, and the milliseconds of all."""
    models = [cut(n) for n in MULTIPLES]
    times = dict(zip(MULTIPLES, (timer or latencies)(models), strict=True))
    best = min(times.values())
    return max(n for n, ms in times.items() if ms <= _FREE * best), times


def latencies(
    models: Sequence[ir.Model], rounds: int = _ROUNDS, round_s: float = _ROUND_S
) -> list[float]:
    """Milliseconds of one run in ONNX Runtime, one thread: the lowest, the models taking turns.

    Fewer rounds where one run takes long.
    """
    ready = [(Session(model, optimize=True, threads=1), feeds_for(model, 2)[1]) for model in models]
    calls = {at: partial(session.run, feed) for at, (session, feed) in enumerate(ready)}
    (first,) = interleave({0: calls[0]}, 1, 0.0, least=1)[0]
    rounds = max(2, min(rounds, int(_LONG_MS / first[0])))
    blocks = interleave(calls, rounds, 1e3 * round_s)
    return [min(chain(*blocks[at])) for at in range(len(ready))]
