"""The same number of operations, cut elsewhere: in units of one reader, or in those of several.

A residual stream is read by several operators, the units inside a block by one. Half of both makes
the sums over the stream short, and a short sum runs at a lower rate: what is loaded and stored per
output stays. So some of the stream may stay and more of the blocks go, at equal operations. Whether
that is faster is measured on the model itself.
"""

from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

from sparsegraph.structure.groups import Group
from sparsegraph.structure.multiples import Timer, latencies

Shares = Mapping[str, float]
_MORE = (1.25, 1.5, 2.0)
"""How much more of the units with several readers may stay."""
_STEPS = 8
_GAIN = 0.97
"""Another cut than the even one must take 3 % off: less is noise."""


def balanced(
    found: Sequence[Group],
    keep: float,
    cut: Callable[[Shares], ir.Model],
    n_macs: Callable[[ir.Model], int],
    timer: Timer | None = None,
) -> tuple[Shares, dict[float, float]]:
    """Shares by group, and the milliseconds by share of the units with several readers.

    The even cut is the first; no other has more operations than that.
    """
    even = dict.fromkeys([group.name for group in found], keep)
    several = [g.name for g in found if sum(line.role == "reads" for line in g.lines) > 1]
    if not several or len(several) == len(found):
        return even, {}
    target = n_macs(cut(even))
    cuts: dict[float, Shares] = {keep: even}
    for more in _MORE:
        share = min(1.0, more * keep)
        equal = _equal(even, dict.fromkeys(several, share), target, cut, n_macs)
        if share not in cuts and equal is not None:
            cuts[share] = equal
    models = [cut(shares) for shares in cuts.values()]
    times = dict(zip(cuts, (timer or latencies)(models), strict=True))
    best = min(times, key=lambda share: times[share])
    return cuts[best if times[best] <= _GAIN * times[keep] else keep], times


def _equal(
    even: Shares,
    fixed: Shares,
    target: int,
    cut: Callable[[Shares], ir.Model],
    n_macs: Callable[[ir.Model], int],
) -> Shares | None:
    """The largest share of all other groups with at most the target's operations, by bisection.

    None where the fixed ones alone have more.
    """
    low, high = 0.0, max(even.values())
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if n_macs(cut({**dict.fromkeys(even, middle), **fixed})) <= target:
            low = middle
        else:
            high = middle
    return {**dict.fromkeys(even, low), **fixed} if low else None
