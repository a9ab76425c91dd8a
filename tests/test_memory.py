"""The memory planner: no two live buffers overlap, whatever the program."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import hypothesis.strategies as st
from hypothesis import given, settings
from sparsegraph.targets import emit
from sparsegraph.targets.target import Target

from sparsegraph import memory
from sparsegraph.program import Program, Ref, Scratch, Step


@dataclass(frozen=True)
class Nothing:
    """A kernel that is never compiled."""

    name: str = "nothing"
    params: emit.Signature = ()

    def body(self, target: Target) -> Any:
        raise AssertionError("not compiled")


def program(steps: list[list[str]], sizes: dict[str, int]) -> Program:
    calls = [Step(Nothing(), tuple(Ref(n) for n in names), 1) for names in steps]
    return Program((), (), calls, {}, sizes)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    names = [f"t{i}" for i in range(draw(st.integers(0, 12)))]
    sizes = {n: draw(st.integers(0, 3000)) for n in names}
    some = st.lists(st.sampled_from(names), max_size=4) if names else st.just([])
    made = program(draw(st.lists(some, max_size=15)), sizes)
    rest = len(made.steps)
    while rest:
        made.chains.append(draw(st.integers(1, rest)))
        rest -= made.chains[-1]
    return made


@settings(max_examples=300, deadline=None)
@given(programs())
def test_live_buffers_never_overlap(p: Program) -> None:
    plan, lives = memory.plan(p), memory.lifetimes(p.runs(), p.steps, p.temporaries)
    assert plan.offsets.keys() == lives.keys()
    for a, (first_a, last_a) in lives.items():
        start_a, stop_a = plan.offsets[a], plan.offsets[a] + p.temporaries[a]
        assert start_a % memory.ALIGNMENT == 0
        assert start_a >= memory.LEAD
        assert stop_a + memory.SLACK <= plan.arena_bytes
        for b, (first_b, last_b) in lives.items():
            if a < b and first_a <= last_b and first_b <= last_a:
                start_b, stop_b = plan.offsets[b], plan.offsets[b] + p.temporaries[b]
                assert stop_a + memory.SLACK <= start_b or stop_b + memory.SLACK <= start_a


@settings(max_examples=100, deadline=None)
@given(programs())
def test_arena_lies_between_lower_bound_and_sum(p: Program) -> None:
    plan = memory.plan(p)
    total = sum(memory.padded(p.temporaries[n]) for n in plan.offsets)
    assert plan.lower_bound <= plan.arena_bytes <= memory.LEAD + total


def test_chain_needs_two_buffers() -> None:
    names = [f"t{i}" for i in range(20)]
    steps = [[a, b] for a, b in pairwise(names)]
    plan = memory.plan(program(steps, dict.fromkeys(names, 1000)))
    assert plan.arena_bytes == plan.lower_bound == memory.LEAD + 2 * memory.padded(1000)


def test_lifetime_covers_every_use() -> None:
    p = program([["a"], ["b"], ["a", "b"], ["c"]], {"a": 64, "b": 64, "c": 64, "unused": 64})
    assert memory.lifetimes(p.runs(), p.steps, p.temporaries) == {
        "a": (0, 2),
        "b": (1, 2),
        "c": (3, 3),
    }


def test_smallest_gap_that_fits_is_taken() -> None:
    assert memory._best_gap([(256, 320), (384, 448), (1024, 1088)], 64) == 320
    assert memory._best_gap([(256, 320), (384, 448)], 4096) == 448
    assert memory._best_gap([], 64) == 0


def test_steps_of_one_chain_never_share_memory() -> None:
    p = program([["a"], ["b"], ["c"]], dict.fromkeys("abc", 64))
    assert memory.plan(p).arena_bytes == memory.LEAD + memory.padded(64)
    p.chains = [2, 1]
    plan = memory.plan(p)
    assert plan.offsets["a"] != plan.offsets["b"]
    assert plan.arena_bytes == plan.lower_bound == memory.LEAD + 2 * memory.padded(64)


def test_panels_lie_before_the_scratch_of_their_chain() -> None:
    steps = [
        Step(Nothing(), (Ref("p"), Scratch(10)), 1),
        Step(Nothing(), (Ref("p"), Ref("q")), 1),
        Step(Nothing(), (Ref("q"), Ref("r")), 1),
        Step(Nothing(), (Scratch(70),), 1),
    ]
    p = Program((), (), steps, panels={"p": 100, "q": 200, "r": 100}, chains=[3, 1])
    plan = memory.plan(p)
    assert plan.panels["p"] == plan.panels["r"], "r is written after p is read last"
    assert abs(plan.panels["p"] - plan.panels["q"]) >= memory.padded(100)
    panels = memory.padded(100) + memory.padded(200)
    assert plan.scratch_starts == (panels, panels, panels, 0)
    assert plan.scratch_bytes == panels + memory.padded(10)
    assert plan.arena_bytes == 0


def test_scratch_is_the_largest_step() -> None:
    steps = [
        Step(Nothing(), (Scratch(100), Scratch(1)), 1),
        Step(Nothing(), (Scratch(10),), 1),
    ]
    plan = memory.plan(Program((), (), steps))
    assert plan.scratch_bytes == memory.padded(100) + memory.padded(1)
    assert plan.arena_bytes == plan.lower_bound == 0
