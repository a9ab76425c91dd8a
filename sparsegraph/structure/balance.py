"""The same number of operations, cut elsewhere: at counts that a runtime likes, and where it pays.

Two things make an even cut slower than its operations say. ONNX Runtime's convolutions hold 8
channels in a block with AVX2 and 16 with AVX-512, and leave that layout where a count is no
multiple: nine tenths of MobileNetV2 then take 1.5 times as long as the whole. And half of a
residual stream, which several operators read, makes the sums over it short: what is loaded and
stored per output stays, so some of the stream may stay and more of the units inside a block go.

Which cut is faster is measured on the model itself, against the even one at equal operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import onnx_ir as ir

from sparsegraph.graph import weight_bytes
from sparsegraph.structure.groups import Group
from sparsegraph.structure.multiples import Timer, latencies

Shares = Mapping[str, float]
Build = Callable[[Shares, int], ir.Model]
Pair = tuple["Cut", ir.Model]

MULTIPLES = (8, 16)
_MORE = (1.0, 1.25, 1.5, 2.0)
"""How much more of the units with several readers may stay."""
_STEPS = 8
_LEAST = 0.6
"""The others keep at least this much of the share that was asked for."""
_GAIN = 0.95
"""Another cut must take 5 % off: less might be noise, and the next run would cut elsewhere."""
_NEAR = 1.03
_MOVED = 1.05
"""Its outputs may be off by 5 % more than those of the even cut."""
_HELD_BYTES = 1 << 30
"""Of weights in models that are timed against each other."""


@dataclass(frozen=True)
class Cut:
    """A way to cut. `ms`: ONNX Runtime's latency; `moved`: distance of the outputs, if it matters.

    `several` is the largest share, that of units with several readers if there are any.
    """

    multiple: int
    several: float
    shares: Shares
    ms: float = 0.0
    moved: float | None = None

    def __str__(self) -> str:
        counts = f" at multiples of {self.multiple}" if self.multiple > 1 else ""
        least = min(self.shares.values(), default=self.several)
        others = f" with several readers, {least:.0%} of others" if least < self.several else ""
        return f"{self.several:.0%} of units{others}{counts}: {self.ms:.3g} ms"


@dataclass(frozen=True)
class Search:
    """The cut that was chosen, and all that were timed; the even one is the first.

    `refused` says why a faster one was not the masked model.
    """

    chosen: Cut
    tried: tuple[Cut, ...]
    refused: str = ""

    def __str__(self) -> str:
        even, others = self.tried[0], self.tried[1:]
        if self.refused:
            return f"cut evenly: what is faster failed the proof: {self.refused}"
        if self.chosen.several != even.several:
            return f"cut elsewhere at equal operations: {self.chosen} (evenly {even.ms:.3g} ms)"
        if self.chosen is not even:
            return f"counts rounded up: {self.chosen} (without {even.ms:.3g} ms)"
        if any(cut.moved is not None for cut in others):
            return "cut evenly: what is faster moves the outputs further"
        if not others:
            return "cut evenly: there is no other cut of as many operations"
        return f"cut evenly: none of {len(others)} other cuts is 5 % faster"


@dataclass(frozen=True)
class Space:
    """What a search needs to know of a model.

    Attributes:
        build: the model cut by shares, with counts at multiples.
        moved: how far the outputs of a model are from the whole one's.
    """

    found: Sequence[Group]
    build: Build
    n_macs: Callable[[ir.Model], int]
    moved: Callable[[ir.Model], float]
    timer: Timer | None = None

    @property
    def several(self) -> list[str]:
        """Names of the groups with several readers, if there are others."""
        names = [g.name for g in self.found if sum(line.role == "reads" for line in g.lines) > 1]
        return names if len(names) < len(self.found) else []

    def timed(self, pairs: Sequence[Pair]) -> list[Pair]:
        """The same with milliseconds, from models that take turns."""
        if len(pairs) == 1:
            return list(pairs)
        times = (self.timer or latencies)([model for _, model in pairs])
        return [(replace(cut, ms=ms), model) for (cut, model), ms in zip(pairs, times, strict=True)]


def search(space: Space, keep: float, multiples: Sequence[int]) -> Search:
    """The fastest cut, among rounded ones and then among those of as many operations.

    Any is taken in place of the even one only if it is 5 % faster and, at equal operations, moves
    the outputs hardly further; of several within 3 % the mildest.
    """
    rounded = space.timed(list(_rounded(space, keep, multiples)))
    at = 0
    for i, (cut, _) in enumerate(rounded):
        at = i if cut.ms <= _GAIN * rounded[at][0].ms else at
    elsewhere = space.timed(list(_elsewhere(space, rounded[at], multiples[1:] or multiples)))
    cuts = [cut for cut, _ in elsewhere]
    for i, (cut, model) in enumerate(elsewhere):
        if i and cut.ms <= _GAIN * cuts[0].ms:
            cuts[i] = replace(cut, moved=space.moved(model))
    best = _mildest(cuts, space.moved(elsewhere[0][1]))
    before = [cut for cut, _ in rounded if cut is not rounded[at][0]]
    first = [cuts[0], *before] if at == 0 else [*before, cuts[0]]
    return Search(cuts[best], (*first, *cuts[1:]))


def _mildest(cuts: Sequence[Cut], moved: float) -> int:
    """The first cut that is about as fast as any of those that move the outputs hardly further."""
    good = [i for i, c in enumerate(cuts) if c.moved is not None and c.moved <= _MOVED * moved]
    fastest = min((cuts[i].ms for i in good), default=0.0)
    return next((i for i in good if cuts[i].ms <= _NEAR * fastest), 0)


def _rounded(space: Space, keep: float, multiples: Sequence[int]) -> Iterator[Pair]:
    """The even cut, with counts as they come and rounded up; at least half of it must remain."""
    even = dict.fromkeys([group.name for group in space.found], keep)
    model = space.build(even, multiples[0])
    whole = space.n_macs(space.build(dict.fromkeys(even, 1.0), 1))
    most = (whole + space.n_macs(model)) / 2
    seen = {_size(space, model)}
    yield Cut(multiples[0], keep, even), model
    if 2 * weight_bytes(model.graph) > _HELD_BYTES:
        return
    for n in multiples[1:]:
        model = space.build(even, n)
        if _size(space, model) not in seen and space.n_macs(model) <= most:
            seen.add(_size(space, model))
            yield Cut(n, keep, even), model


def _elsewhere(space: Space, start: Pair, multiples: Sequence[int]) -> Iterator[Pair]:
    """`start`, then others of no more operations, the mildest first; as many as memory bears.

    Equal models come once.
    """
    cut, model = start
    target = space.n_macs(model)
    n_held = _HELD_BYTES // max(1, weight_bytes(model.graph))
    seen = {_size(space, model)}
    yield start
    for more in _MORE if space.several else _MORE[:1]:
        fixed = dict.fromkeys(space.several if more > 1 else (), min(1.0, more * cut.several))
        for n in multiples if n_held > 1 else ():
            shares = _equal(cut.shares, fixed, target, partial(_macs, space, n))
            if shares is None or len(seen) >= n_held:
                continue
            model = space.build(shares, n)
            if _size(space, model) not in seen:
                seen.add(_size(space, model))
                share = next(iter(fixed.values())) if fixed else min(shares.values())
                yield Cut(n, share, shares), model


def _macs(space: Space, multiple: int, shares: Shares) -> int:
    return space.n_macs(space.build(shares, multiple))


def _size(space: Space, model: ir.Model) -> tuple[int, int]:
    """What tells cuts of one model apart."""
    return space.n_macs(model), weight_bytes(model.graph)


def _equal(
    even: Shares, fixed: Shares, target: int, n_macs: Callable[[Shares], int]
) -> Shares | None:
    """The largest share of all other groups with at most the target's operations, by bisection.

    None where they would keep much less than what was asked for.
    """
    high = max(even.values())
    low = _LEAST * high
    if n_macs({**dict.fromkeys(even, low), **fixed}) > target:
        return None
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if n_macs({**dict.fromkeys(even, middle), **fixed}) <= target:
            low = middle
        else:
            high = middle
    return {**dict.fromkeys(even, low), **fixed}
