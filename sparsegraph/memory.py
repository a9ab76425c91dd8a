"""Where the temporaries of a `Program` lie: one arena, offsets fixed at compile time.

A temporary lives from the first step that names it to the last. Two temporaries may share memory
if no step lies in both lives. Largest first, each into the smallest gap that holds it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from sparsegraph.program import Program, Ref, Scratch, Step

ALIGNMENT = 64  # a cache line, and the widest vector register
SLACK = 64  # kernels may read one vector past the end of a buffer


@dataclass(frozen=True)
class MemoryPlan:
    """Offsets and sizes of one segment's memory, in bytes.

    Attributes:
        offsets: temporary -> start in the arena, a multiple of `ALIGNMENT`.
        arena_bytes: size of the arena.
        lower_bound: bytes that live at the same time at the worst step; no plan needs less.
        scratch_bytes: scratch of one thread, the most that any step asks for.
    """

    offsets: dict[str, int]
    arena_bytes: int
    lower_bound: int
    scratch_bytes: int


def plan(program: Program) -> MemoryPlan:
    """Place every temporary that a step names; the same program always gives the same plan."""
    lives = lifetimes(program)
    sizes = {name: padded(program.temporaries[name]) for name in lives}
    offsets: dict[str, int] = {}
    for name in sorted(lives, key=lambda n: (-sizes[n], lives[n], n)):
        taken = [(offsets[o], offsets[o] + sizes[o]) for o in offsets if _meet(lives, name, o)]
        offsets[name] = _best_gap(sorted(taken), sizes[name])
    return MemoryPlan(
        offsets=offsets,
        arena_bytes=max((offsets[n] + sizes[n] for n in offsets), default=0),
        lower_bound=_most_live(lives, sizes, len(program.steps)),
        scratch_bytes=max((sum(scratch_sizes(s)) for s in program.steps), default=0),
    )


def lifetimes(program: Program) -> dict[str, tuple[int, int]]:
    """Temporary -> (first, last) index of the steps that name it."""
    lives: dict[str, tuple[int, int]] = {}
    for i, step in enumerate(program.steps):
        for arg in step.args:
            if isinstance(arg, Ref) and arg.buffer in program.temporaries:
                lives[arg.buffer] = (lives.get(arg.buffer, (i, i))[0], i)
    return lives


def scratch_sizes(step: Step) -> list[int]:
    """Bytes of each scratch argument of `step`, in order; they lie one behind the other."""
    return [padded(a.n_bytes) for a in step.args if isinstance(a, Scratch)]


def padded(n_bytes: int) -> int:
    """`n_bytes` and the slack, in whole cache lines."""
    return -(-(n_bytes + SLACK) // ALIGNMENT) * ALIGNMENT


def _meet(lives: dict[str, tuple[int, int]], a: str, b: str) -> bool:
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


def _most_live(lives: dict[str, tuple[int, int]], sizes: dict[str, int], n_steps: int) -> int:
    change = [0] * (n_steps + 1)
    for name, (first, last) in lives.items():
        change[first] += sizes[name]
        change[last + 1] -= sizes[name]
    most = live = 0
    for delta in change:
        live += delta
        most = max(most, live)
    return most
