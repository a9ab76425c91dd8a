import itertools

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common
import pytest

from sparsegraph.budget.forward import densities as forward_densities
from sparsegraph.budget.forward import importance
from sparsegraph.budget.knapsack import choose
from sparsegraph.budget.plan import Budget, Plan, described, pareto, plan
from sparsegraph.budget.search import knee, within_drop
from sparsegraph.budget.table import LayerOptions, Option, Table, tabulate
from sparsegraph.divergence import Divergence
from sparsegraph.errors import BudgetError, UsageError
from sparsegraph.layers import weighted
from sparsegraph.prune import prune
from sparsegraph.sensitivity import scan
from tests.test_prune import change, convolutions, feeds, pictures
from tests.test_prune import encoder as bare_encoder

SEED = 6
MS = {"up": 3.0, "down": 3.0, "head": 1.0, "relu": 0.5}
V3 = "x86-64-v3"


def problem(n_layers: int, n_options: int, seed: int) -> tuple[list, list]:
    generator = np.random.default_rng(seed)
    return tuple(
        [np.sort(generator.random(n_options))[::sign] for _ in range(n_layers)] for sign in (-1, 1)
    )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_the_knapsack_is_as_good_as_trying_everything(seed: int, share: float) -> None:
    costs, losses = problem(4, 5, seed)
    least, most = (sum(float(f(c)) for c in costs) for f in (min, max))
    limit = least + share * (most - least)
    best = min(
        sum(float(loss[i]) for i, loss in zip(picks, losses))
        for picks in itertools.product(range(5), repeat=4)
        if sum(float(c[i]) for i, c in zip(picks, costs)) <= limit + 1e-12
    )
    found = choose(costs, losses, limit)
    assert found is not None
    assert sum(float(c[i]) for i, c in zip(found, costs)) <= limit + 1e-9
    assert sum(float(loss[i]) for i, loss in zip(found, losses)) == pytest.approx(best, abs=2e-3)


def test_a_knapsack_without_room_has_no_answer() -> None:
    costs, losses = problem(3, 4, 0)
    assert choose(costs, losses, sum(float(c.min()) for c in costs) - 1e-6) is None


def test_rounding_is_no_reason_to_refuse() -> None:
    """The least reachable sum is feasible in whatever order it was added."""
    costs, losses = problem(60, 6, 1)
    least = float(sum(float(c.min()) for c in reversed(costs)))
    for limit in (np.nextafter(least, 0), least, np.nextafter(least, 9e9)):
        assert choose(costs, losses, float(limit)) == [5] * 60


def by_hand() -> Table:
    """Two layers of equal cost; pruning the second hurts ten times as much."""
    layers = []
    for name, weight in [("easy", 1.0), ("hard", 10.0)]:
        options = [
            Option(d, weight * (1 - d) ** 2, 4 * d, 400 * d, 100 * d) for d in (1.0, 0.5, 0.25)
        ]
        layers.append(LayerOptions(name, 100, tuple(options)))
    return Table(tuple(layers), rest_ms=2.0, rest_bytes=100, rest_macs=0)


def test_a_plan_spares_the_layer_that_matters() -> None:
    found = plan(by_hand(), Budget.parse("latency", "7.1ms"))
    assert found.densities == {"easy": 0.25, "hard": 1.0}
    assert (found.ms, found.loss, found.density) == (7.0, 0.75**2, 0.625)
    found = plan(by_hand(), Budget.parse("latency", "0.5x"))
    assert (found.densities, found.ms) == ({"easy": 0.25, "hard": 0.5}, 5.0)


@pytest.mark.parametrize(
    ("kind", "text", "found"),
    [
        ("latency", "3ms", "4 ms"),
        ("size", "200B", "found 0.2 kB, need at least 0.3 kB"),
        ("flops", "0.2x", "0.25x of"),
    ],
)
def test_an_infeasible_budget_says_what_is_reachable(kind: str, text: str, found: str) -> None:
    with pytest.raises(BudgetError, match=found) as caught:
        plan(by_hand(), Budget.parse(kind, text))
    assert caught.value.exit_code == 5


def test_budgets_read_their_units() -> None:
    assert Budget.parse("latency", "250us").limit == 0.25
    assert Budget.parse("size", "4MiB").limit == 4 << 20
    assert Budget.parse("flops", "2G").limit == 1e9
    assert Budget.parse("size", ".5x") == Budget("size", 0.5, True)
    for text in ("5", "5 parsec", "x", "-1ms"):
        with pytest.raises(UsageError, match="another form"):
            Budget.parse("latency", text)


def test_the_trade_off_is_monotone_and_ends_at_both_ends() -> None:
    points = pareto(by_hand(), n=7)
    assert [p.ms for p in points] == sorted((p.ms for p in points), reverse=True)
    assert [p.loss for p in points] == sorted(p.loss for p in points)
    assert (points[0].ms, points[0].loss, points[-1].ms) == (10.0, 0.0, 4.0)


def encoder() -> ir.Model:
    """The residual MLP with inferred shapes."""
    return ir.passes.common.ShapeInferencePass()(bare_encoder()).model


def table(model: ir.Model, recipe: str = "admm:0.5", **options: object) -> Table:
    return tabulate(model, recipe, feeds(), target=V3, dense_ms=MS, **options)


def test_forward_importance_finds_the_layer_that_counts() -> None:
    """`head` times ten moves the outputs ten times as far as before; `up` hardly changes."""
    model = encoder()
    given = model.graph.initializers["head.weight"]
    given.const_value = ir.tensor(given.const_value.numpy() * 10, name="head.weight")
    up, down, head = importance(model, weighted(model), feeds(4))
    assert head > 2 * max(up, down)
    assert importance(model, weighted(model), feeds(4)) == [up, down, head]


def test_forward_densities_spend_the_budget_within_limits() -> None:
    model = encoder()
    found = forward_densities(model, weighted(model), feeds(4), 0.7, 0.05)
    sizes = {x.name: x.array().size for x in weighted(model)}
    kept = sum(found[name] * n for name, n in sizes.items())
    assert kept == pytest.approx(0.3 * sum(sizes.values()), rel=1e-6)
    assert 0.2 < min(found.values()) < max(found.values()) <= 1
    raw = np.sqrt(importance(model, weighted(model), feeds(4)))
    extra = np.array(list(found.values())) - 0.2
    np.testing.assert_allclose(extra / extra.sum(), raw / raw.sum(), rtol=1e-6)
    pruned = prune(model, "wanda:0.7,allocate=ecoflap", feeds())
    assert pruned.density == pytest.approx(0.3, abs=0.01)
    by_layer = {row.node: row.pattern.density for row in pruned.table}
    assert by_layer == pytest.approx(found, abs=0.02)
    with pytest.raises(UsageError, match="no feeds"):
        prune(model, "magnitude:0.7,allocate=ecoflap")


@pytest.mark.parametrize(("share", "floor"), [(0.0, 0.0), (0.05, 0.0), (0.95, 0.3), (0.5, 0.999)])
def test_forward_densities_stay_shares(share: float, floor: float) -> None:
    model = encoder()
    found = forward_densities(model, weighted(model), feeds(2), share, floor)
    assert max(floor, 0.9 - share) - 1e-9 <= min(found.values())
    assert max(found.values()) <= 1
    sizes = {x.name: x.array().size for x in weighted(model)}
    kept = sum(found[name] * n for name, n in sizes.items()) / sum(sizes.values())
    assert kept == pytest.approx(max(1 - share, floor))


def test_a_table_of_a_model() -> None:
    model = encoder()
    found = table(model)
    assert [x.layer for x in found.layers] == ["up", "down", "head"]
    assert (found.rest_ms, found.rest_macs) == (0.5, 0.0)
    for row in found.layers:
        losses, ms = [o.loss for o in row.options], [o.ms for o in row.options]
        assert losses == sorted(losses)
        assert losses[0] == pytest.approx(0, abs=1e-9)
        assert losses[-1] > 0
        assert ms == sorted(ms, reverse=True)
    assert found.layers[2].options[0].macs == 12 * 48 * 48
    assert found.layers[2].options[-1].n_bytes == pytest.approx(6 * 0.05 * 48 * 48)


def test_the_floor_of_the_recipe_holds() -> None:
    found = table(encoder(), "admm:0.5,floor=0.2")
    assert {min(o.density for o in x.options) for x in found.layers} == {0.2}


def test_measured_times_replace_the_model() -> None:
    found = table(encoder(), measured_ms={"head": {0.5: 0.123}})
    at = {o.density: o.ms for o in found.layers[2].options}
    assert at[0.5] == 0.123
    assert at[0.4] != 0.123


def test_tabulating_does_not_change_the_model() -> None:
    model = encoder()
    before = {k: v.const_value.numpy().copy() for k, v in model.graph.initializers.items()}
    table(model)
    assert list(model.graph.initializers) == list(before)
    for name, array in before.items():
        np.testing.assert_array_equal(model.graph.initializers[name].const_value.numpy(), array)


def test_a_plan_beats_uniform_density_at_the_same_size() -> None:
    """The head's inputs are the model's outputs: it is the layer to spare."""
    model = encoder()
    found = plan(table(model), Budget.parse("flops", "0.3x"))
    planned = prune(model, "admm:0.5", feeds(), densities=found.densities)
    uniform = prune(model, f"admm:{1 - found.density}", feeds())
    assert planned.density <= uniform.density + 0.01
    assert change(model, planned.model) < change(model, uniform.model)


def test_fixed_densities_have_no_budget() -> None:
    for recipe in ("admm:2:4", "masks"):
        with pytest.raises(UsageError, match="a fixed density"):
            table(encoder(), recipe)


def test_unknown_shapes_are_refused() -> None:
    with pytest.raises(UsageError, match="'up': found an unknown shape"):
        table(bare_encoder())


# ---- loss -------------------------------------------------------------------------------------


def test_divergence_is_0_for_itself_and_1_for_the_mean() -> None:
    model = encoder()
    measure = Divergence(model, feeds(6))
    assert measure(model) == 0.0
    losses = [measure(prune(model, f"magnitude:{s}").model) for s in (0.2, 0.5, 0.8)]
    assert losses == sorted(losses)
    assert 0 < losses[0] < losses[-1] < 2


def test_divergence_of_a_broken_model_is_infinite() -> None:
    model, broken = encoder(), encoder()
    value = broken.graph.initializers["head.weight"]
    value.const_value = ir.tensor(value.const_value.numpy() * np.float32("nan"), name=value.name)
    assert Divergence(model, feeds(3))(broken) == float("inf")


def test_the_scan_finds_the_layer_that_kills() -> None:
    model = encoder()
    value = model.graph.initializers["head.weight"]
    generator = np.random.default_rng(SEED)
    spiky = value.const_value.numpy() * generator.choice([0.05, 5.0], size=(48, 48), p=[0.8, 0.2])
    value.const_value = ir.tensor(spiky.astype(np.float32), name=value.name)
    rows = scan(model, "magnitude:0.7", feeds(8))
    assert [row.layer for row in rows][-1] == "head"
    assert rows[0].loss > 3 * rows[-1].loss


def test_the_scan_matches_pruning_one_layer() -> None:
    """Conv bias made, shared MatMul bias copied, ConvTranspose without bias: all are put back."""
    for model, given in [(encoder(), feeds(8)), (convolutions(), pictures(8, 1))]:
        rows = {row.layer: row.loss for row in scan(model, "wanda:0.6", given)}
        measure = Divergence(model, given[:8])
        for name, loss in rows.items():
            alone = prune(model, f"wanda:0.6,sequential=no,layers=^{name}(\\.|$)", given).model
            assert loss == pytest.approx(measure(alone), rel=1e-4), name


def test_a_scan_needs_feeds() -> None:
    with pytest.raises(UsageError, match="no feeds"):
        scan(encoder(), "magnitude:0.5", [])


def test_the_search_stops_before_the_allowed_loss() -> None:
    model = encoder()
    options, attempts = table(model, "wanda:0.5"), []
    found = within_drop(
        model, "wanda:0.5", feeds(), options, 0.05, on_attempt=lambda *a: attempts.append(a)
    )
    assert found.loss <= 0.05
    assert found.pruned.density < 1
    assert found.tried == tuple(attempts)
    assert min(ms for ms, lost in attempts if lost <= 0.05) == found.plan.ms
    with pytest.raises(BudgetError, match="need at least"):
        within_drop(model, "wanda:0.5", feeds(), options, 1e-12)


def test_the_search_takes_a_metric_of_the_user() -> None:
    model = encoder()
    with pytest.raises(BudgetError, match="at least 7"):
        within_drop(model, "magnitude:0.5", feeds(), table(model), 1.0, loss=lambda m: 7.0)


def test_the_knee() -> None:
    assert knee([(10, 0.0), (8, 0.01), (6, 0.03), (5, 0.4), (4, 1.0)]) == (6.0, 0.03)


def test_a_described_choice_adds_up() -> None:
    options = by_hand()
    found = described(options, [x.options[1] for x in options.layers])
    assert found == Plan({"easy": 0.5, "hard": 0.5}, 2.75, 6.0, 500.0, 100.0, 0.5)
