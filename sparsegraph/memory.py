"""Where the temporaries of a `Program` lie: offsets are fixed at compile time.

Temporaries share one arena, panels the scratch memory of each thread. A buffer lives from the first
chain that names it to the last, a panel from the first step of its chain to the last. Two buffers
may share memory if they never live together. Largest first, each into the smallest gap that holds
it.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from sparsegraph.program import Program, Ref, Scratch, Step

ALIGNMENT = 64  # a cache line, and the widest vector register
SLACK = 64  # kernels may read one vector past the end of a buffer
LEAD = 64  # kernels may read 16 values before a temporary (depthwise windows at a left border)

Lives = dict[str, tuple[int, int]]
"""Buffer -> first and last use."""


@dataclass(frozen=True)
class MemoryPlan:
    """Offsets and sizes of one segment's memory, in bytes.

    Attributes:
        offsets: temporary -> start in the arena, a multiple of `ALIGNMENT`, at least `LEAD`.
        arena_bytes: size of the arena.
        lower_bound: bytes that live at the same time in the worst chain; no plan needs less.
        panels: panel -> start in the scratch memory of a thread.
        scratch_starts: per step, where its own scratch begins, behind the panels of its chain.
        scratch_bytes: scratch memory of one thread, the most that any step asks for.
    """

    offsets: dict[str, int]
    arena_bytes: int
    lower_bound: int
    panels: dict[str, int]
    scratch_starts: tuple[int, ...]
    scratch_bytes: int


def plan(program: Program) -> MemoryPlan:
    """Place every buffer that a step names; the same program always gives the same plan."""
    runs = program.runs()
    lives = lifetimes(runs, program.steps, program.temporaries)
    sizes = {name: padded(program.temporaries[name]) for name in lives}
    offsets, n_bytes = _place(lives, sizes)
    lead = LEAD if lives else 0
    panels: dict[str, int] = {}
    starts: list[int] = []
    for run in runs:
        local = lifetimes([[i] for i in run], program.steps, program.panels)
        places, panel_bytes = _place(local, {n: padded(program.panels[n]) for n in local})
        panels |= places
        starts += [panel_bytes] * len(run)
    ends = (start + sum(scratch_sizes(s)) for start, s in zip(starts, program.steps))
    return MemoryPlan(
        offsets={name: lead + start for name, start in offsets.items()},
        arena_bytes=lead + n_bytes,
        lower_bound=lead + _most_live(lives, sizes, len(runs)),
        panels=panels,
        scratch_starts=tuple(starts),
        scratch_bytes=max(ends, default=0),
    )


def lifetimes(
    moments: Iterable[Iterable[int]], steps: list[Step], names: Collection[str]
) -> Lives:  # fmt: skip
    """The life of each buffer of `names`; `moments` are groups of steps, in order."""
    lives: Lives = {}
    for moment, group in enumerate(moments):
        for arg in (a for i in group for a in steps[i].args):
            if isinstance(arg, Ref) and arg.buffer in names:
                lives[arg.buffer] = (lives.get(arg.buffer, (moment, moment))[0], moment)
    return lives


def _place(lives: Lives, sizes: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """Start of every buffer, and the bytes that all need together."""
    offsets: dict[str, int] = {}
    for name in sorted(lives, key=lambda n: (-sizes[n], lives[n], n)):
        taken = [(offsets[o], offsets[o] + sizes[o]) for o in offsets if _meet(lives, name, o)]
        offsets[name] = _best_gap(sorted(taken), sizes[name])
    return offsets, max((offsets[n] + sizes[n] for n in offsets), default=0)


def scratch_sizes(step: Step) -> list[int]:
    """Bytes of each scratch argument of `step`, in order; they lie one behind the other."""
    return [padded(a.n_bytes) for a in step.args if isinstance(a, Scratch)]


def padded(n_bytes: int) -> int:
    """`n_bytes` and the slack, in whole cache lines."""
    return -(-(n_bytes + SLACK) // ALIGNMENT) * ALIGNMENT


def _meet(lives: Lives, a: str, b: str) -> bool:
    return lives[a][0] <= lives[b][1] and lives[b][0] <= lives[a][1]


def _best_gap(taken: Iterable[tuple[int, int]], size: int) -> int:
    """Start of the smallest gap between the sorted spans `taken` that holds `size` bytes."""
    best, best_size, end = None, 0, 0
    for start, stop in taken:
        gap = start - end
        if gap >= size and (best is None or gap < best_size):
            best, best_size = end, gap
        end = max(end, stop)
    return end if best is None else best


def _most_live(lives: Lives, sizes: dict[str, int], n_chains: int) -> int:
    change = [0] * (n_chains + 1)
    for name, (first, last) in lives.items():
        change[first] += sizes[name]
        change[last + 1] -= sizes[name]
    most = live = 0
    for delta in change:
        live += delta
        most = max(most, live)
    return most
