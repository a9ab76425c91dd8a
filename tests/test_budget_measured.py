"""Latency budgets against a clock that disagrees with the cost model."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from sparsegraph.budget.measured import (
    FEW_RUNS,
    MOST_RUNS,
    Seen,
    Settled,
    Timer,
    Timing,
    _next_goal,
    settle,
)
from sparsegraph.budget.plan import LATENCY, Budget, Plan, least, plan, total
from sparsegraph.budget.table import LayerOptions, Option, Table
from sparsegraph.budget.within import prune_within
from sparsegraph.errors import BudgetError, UsageError
from sparsegraph.recipe import Recipe
from tests.test_budget import encoder
from tests.test_prune import feeds

RECIPE = Recipe.parse("wanda:0.5")
LAYERS = ("up", "down", "head")
FIXED_MS, REST_MS, DENSE_MS = 0.3, 1.0, 12.0
DENSITIES = [d / 50 for d in range(50, 2, -1)]


def by_model() -> Table:
    """What a cost model may say: proportional to the density, losses of different sizes."""
    rows = [
        LayerOptions(
            name, 48 * 96, tuple(Option(d, lost * (1 - d) ** 2, 3 * d, d, d) for d in DENSITIES)
        )
        for name, lost in zip(LAYERS, (1.0, 2.0, 4.0))
    ]
    return Table(tuple(rows), 0.2, 0.0, 0.0)


def clock(factor: Callable[[float], float]) -> Timer:
    """Layers that take a fixed time and `factor` of what the model says, and a slow rest."""

    def time(model: ir.Model) -> Timing:
        steps: list[tuple[tuple[str, ...], float]] = [(("norm",), REST_MS)]
        for name in LAYERS:
            node = next(n for n in model.graph if n.name == name)
            weights = [v for v in node.inputs if v is not None and v.const_value is not None]
            array = max((v.const_value.numpy() for v in weights), key=np.size)
            density = float(np.count_nonzero(array) / array.size)
            steps.append(((name, f"{name}.gelu"), FIXED_MS + factor(density) * 3 * density))
        return Timing(sum(ms for _, ms in steps), DENSE_MS, tuple(steps))

    return time


def settled(text: str, time: Timer) -> Settled:
    return settle(encoder(), RECIPE, by_model(), Budget.parse("latency", text), time)


@pytest.mark.parametrize("factor", [lambda d: 1.5, lambda d: 0.7, lambda d: 1.6 - d])
@pytest.mark.parametrize("text", ["0.5x", "5ms"])
def test_a_budget_holds_although_the_model_is_wrong(
    factor: Callable[[float], float], text: str
) -> None:
    limit = 6.0 if text == "0.5x" else 5.0
    found = settled(text, clock(factor))
    if max(d for d in found.plan.densities.values()) < 1:
        assert 0.95 * limit <= found.ms
    assert found.ms <= limit
    assert found.plan.ms == found.ms
    assert 1 < found.n_runs <= FEW_RUNS


def test_a_model_that_sees_no_gain_learns_it_from_timings() -> None:
    """All densities cost the same there: the dense plan is too slow, so sparse ones are tried."""
    options = by_model()
    flat = tuple(
        replace(row, options=tuple(replace(o, ms=3.0) for o in row.options))
        for row in options.layers
    )
    table = replace(options, layers=flat)
    found = settle(encoder(), RECIPE, table, Budget.parse("latency", "0.5x"), clock(lambda d: 1.0))
    assert 0.75 * 6.0 < found.ms <= 6.0


@pytest.mark.parametrize(("power", "share"), [(4.0, 0.2), (0.5, 0.7)])
def test_more_runs_are_made_until_one_is_near(power: float, share: float) -> None:
    """The time in place is the one that the model has, raised to a power."""
    limit, most = share * DENSE_MS, clock(lambda d: 1.0)(encoder()).ms

    def time(model: ir.Model) -> Timing:
        ms = most * (clock(lambda d: 1.0)(model).ms / most) ** power
        return Timing(ms, DENSE_MS, ((tuple(LAYERS), ms),))

    found = settled(f"{share}x", time)
    assert 0.9 * limit <= found.ms <= limit
    assert FEW_RUNS < found.n_runs <= MOST_RUNS


def test_layers_that_are_dear_in_place_get_sparser() -> None:
    """Twice the time in `head` alone moves zeros to it."""
    slow = clock(lambda d: 1.5)

    def time(model: ir.Model) -> Timing:
        steps = slow(model).steps
        steps = tuple((n, 3 * ms if n[0] == "head" else ms) for n, ms in steps)
        return Timing(sum(ms for _, ms in steps), DENSE_MS, steps)

    even, uneven = settled("8ms", slow).plan.densities, settled("8ms", time).plan.densities
    assert uneven["head"] < even["head"]


def test_corrected_times_add_up_to_the_run() -> None:
    options = by_model()
    chosen = plan(options, Budget(LATENCY, 4.0))
    seen = Seen(options)
    steps = ((("up", "down"), 2.0), (("norm",), 1.0))
    seen.add(chosen, Timing(6.0, 10.0, steps))
    found = seen.table()
    taken = [
        next(o for o in x.options if o.density == chosen.densities[x.layer]) for x in found.layers
    ]
    assert total(found, LATENCY, taken) == pytest.approx(6.0)
    assert taken[0].ms + taken[1].ms == pytest.approx(4.0)  # kernel calls fill 3 of the 6 ms


def test_densities_between_timed_ones_are_interpolated() -> None:
    options = by_model()
    seen = Seen(options)
    for density, factor in ((0.8, 2.0), (0.2, 4.0)):
        chosen = Plan(dict.fromkeys(LAYERS, density), 0, 0, 0, 0, density)
        steps = tuple(((name,), factor * 3 * density) for name in LAYERS)
        seen.add(chosen, Timing(sum(ms for _, ms in steps), 10.0, steps))
    ms = {o.density: o.ms for o in seen.table().layers[0].options}
    assert ms[1.0] == pytest.approx(2.0 * 3)
    assert ms[0.5] == pytest.approx(3.0 * 1.5)
    assert ms[0.1] == pytest.approx(4.0 * 0.3)


def test_what_no_density_reaches_is_said_after_a_timing() -> None:
    with pytest.raises(BudgetError, match=r"found 0\.5 ms, need at least 2\.7"):
        settled("0.5ms", clock(lambda d: 1.5))


def test_a_dense_model_that_is_fast_enough_stays_dense() -> None:
    found = settled("50ms", clock(lambda d: 1.0))
    assert set(found.plan.densities.values()) == {1.0}
    assert found.n_runs == 1


def test_the_fastest_plan() -> None:
    assert set(least(by_model()).densities.values()) == {DENSITIES[-1]}


def test_a_budget_in_time_is_timed_on_this_machine() -> None:
    """Everything real: the trial is compiled and run."""
    found = prune_within(encoder(), "wanda:0.5", feeds(), {"latency": "100ms"})
    assert found.settled is not None
    assert 0 < found.settled.ms < 100
    assert "measured" in found.summary()


def test_a_time_that_the_cost_model_holds_for_out_of_reach_is_tried() -> None:
    def time(model: ir.Model) -> Timing:
        plain = clock(lambda d: 1.0)(model)
        steps = tuple((names, 1e-6 * ms) for names, ms in plain.steps)
        return Timing(1e-6 * plain.ms, DENSE_MS, steps)

    limits = {"latency": "0.000008ms"}  # with the same prices wherever the test runs
    target = "x86-64-v3"
    found = prune_within(encoder(), "wanda:0.5", feeds(), limits, target=target, time=time)
    assert found.settled is not None
    assert 0.95 * 8e-6 <= found.settled.ms <= 8e-6  # the next density of a layer adds 4 %


def test_an_allowed_drop_is_spent_where_it_is_measured_to_pay() -> None:
    """Zeros go where the clock says that time is, not where the cost model says."""
    found = {}
    for slow in ("up", "head"):

        def time(model: ir.Model, slow: str = slow) -> Timing:
            plain = clock(lambda d: 1.0)(model)
            steps = tuple((n, 50 * ms if n[0] == slow else ms) for n, ms in plain.steps)
            return Timing(sum(ms for _, ms in steps), DENSE_MS, steps)

        found[slow] = prune_within(encoder(), "wanda:0.5", feeds(), {"max-drop": "0.05"}, time=time)
        settled, wanted = found[slow].settled, found[slow].plan.densities
        assert settled is not None
        assert (settled.n_runs, settled.ms) == (3, found[slow].plan.ms)
        assert settled.ms == pytest.approx(time(found[slow].pruned.model).ms)
        assert found[slow].layer_ms()[slow] > 10 * found[slow].layer_ms()["down"]
        assert "measured" in found[slow].summary()
        assert wanted[slow] < 1
    assert found["up"].plan.densities["up"] < found["head"].plan.densities["up"]
    assert found["head"].plan.densities["head"] < found["up"].plan.densities["head"]


def test_progress_says_what_takes_the_time() -> None:
    seen: dict[str, list[tuple[int, int]]] = {}

    def progress(what: str, done: int, n: int) -> None:
        seen.setdefault(what, []).append((done, n))

    time = clock(lambda d: 1.0)
    prune_within(encoder(), "wanda:0.5", feeds(), {"max-drop": "0.2"}, time=time, progress=progress)
    assert seen == {
        "measure layers": [(i, 3) for i in (1, 2, 3)],
        "compile and time": [(1, 2), (2, 2)],
        "prune and compare": [(i, 5) for i in (1, 2, 3, 4, 5)],
    }
    seen.clear()
    prune_within(encoder(), "wanda:0.5", feeds(), {"flops": "0.5x"}, progress=progress)
    assert list(seen) == ["measure layers", "compare plans", "prune"]
    assert all(found[-1][0] == found[-1][1] for found in seen.values())


def test_other_budgets_and_machines_are_predicted() -> None:
    for limits, target in (
        ({"flops": "0.5x"}, "native"),
        ({"latency": "2x"}, "cortex-a53"),
        ({"max-drop": "0.2"}, "cortex-a53"),
    ):
        found = prune_within(encoder(), "wanda:0.5", feeds(), limits, target=target)
        assert found.settled is None
        assert found.summary().endswith("predicted")
        assert f"{found.plan.n_bytes / 1e6:.3g} MB" in found.summary()


def test_a_time_on_another_machine_is_refused_before_anything_runs() -> None:
    with pytest.raises(UsageError, match=r"'1ms': found a time on cortex-m55.*Fix: write 0.5x"):
        prune_within(encoder(), "wanda", feeds(), {"latency": "1ms"}, target="cortex-m55")


def test_a_budget_needs_no_share_of_zeros() -> None:
    limits = {"flops": "0.5x"}
    plans = [
        prune_within(encoder(), recipe, feeds(), limits).plan.densities
        for recipe in ("wanda", "wanda:0.9", "wanda,ignore=head", Recipe.parse("wanda:0.2"))
    ]
    assert plans[0] == plans[1] == plans[3]
    assert "head" not in plans[2]
    with pytest.raises(UsageError, match="a fixed density"):
        prune_within(encoder(), "masks", feeds(), limits)


def test_the_next_goal_lies_between_what_was_seen() -> None:
    assert _next_goal([(10.0, 10.0)], 5.0) == 5.0
    assert _next_goal([(10.0, 10.0), (5.0, 8.0)], 4.0) == 2.5
    assert _next_goal([(10.0, 10.0), (5.0, 4.0)], 7.0) == 7.5
    assert _next_goal([(10.0, 10.0), (5.0, 4.0), (7.5, 8.0)], 6.0) == 6.25
