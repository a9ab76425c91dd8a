import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparsegraph import repair
from sparsegraph.criteria.known import Known, dampened, output_error
from sparsegraph.criteria.structure import Structure, keep_mask
from sparsegraph.criteria.table import CRITERIA
from sparsegraph.demo_model import onnx_runner
from sparsegraph.errors import UsageError
from sparsegraph.layers import weighted
from sparsegraph.pipeline import optimize
from sparsegraph.prune import prune
from sparsegraph.recipe import Recipe
from sparsegraph.walk import _evened
from tests.passes.check import parse, weight

SEED = 5
sparsegpt = CRITERIA["sparsegpt"].prune


def correlated(n: int, columns: int, seed: int = SEED) -> np.ndarray:
    """Inputs with strong correlations and unequal scales, as real activations have."""
    generator = np.random.default_rng(seed)
    mix = generator.normal(size=(columns // 3, columns))
    x = generator.normal(size=(n, columns // 3)) @ mix + 0.3 * generator.normal(size=(n, columns))
    return x * generator.lognormal(sigma=0.7, size=columns)


def encoder(tokens: int = 12, features: int = 48) -> ir.Model:
    """A residual MLP: x + W2 relu(W1 x + b1) + b2, then a head whose bias is shared with b2."""
    generator = np.random.default_rng(SEED)

    def weight(*shape: int) -> np.ndarray:
        return (generator.normal(size=shape) / np.sqrt(shape[0])).astype(np.float32)

    arrays = {
        "mlp.up.weight": weight(features, 96),
        "mlp.up.bias": weight(96),
        "mlp.down.weight": weight(96, features),
        "shared.bias": weight(features),
        "head.weight": weight(features, features),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "mlp.up.weight"], ["h0"], "up"),
        helper.make_node("Add", ["h0", "mlp.up.bias"], ["h1"], "up.add"),
        helper.make_node("Relu", ["h1"], ["h2"], "relu"),
        helper.make_node("MatMul", ["h2", "mlp.down.weight"], ["h3"], "down"),
        helper.make_node("Add", ["h3", "shared.bias"], ["h4"], "down.add"),
        helper.make_node("Add", ["h4", "x"], ["h5"], "residual"),
        helper.make_node("MatMul", ["h5", "head.weight"], ["h6"], "head"),
        helper.make_node("Add", ["h6", "shared.bias"], ["y"], "head.add"),
    ]
    shape = [1, tokens, features]
    graph = helper.make_graph(
        nodes,
        "encoder",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(a, name) for name, a in arrays.items()],
        value_info=[
            helper.make_tensor_value_info(k, TensorProto.FLOAT, shape) for k in ("h4", "h5")
        ],
    )
    opset = [helper.make_opsetid("", 18)]
    return ir.from_proto(helper.make_model(graph, opset_imports=opset, ir_version=9))


def feeds(n: int = 40, seed: int = 1) -> list[dict[str, np.ndarray]]:
    """Rows of one distribution; `seed` chooses which of them."""
    x = correlated(12 * 200, 48).astype(np.float32).reshape(200, 1, 12, 48)
    chosen = np.random.default_rng(seed).permutation(200)
    return [{"x": x[i]} for i in chosen[:n]]


def change(model: ir.Model, pruned: ir.Model) -> float:
    """Relative squared change of the output on feeds that calibration did not see."""
    unseen = feeds(200)[40:80]
    before, after = onnx_runner(model, threads=1), onnx_runner(pruned, threads=1)
    y0, y1 = (np.stack([run(f) for f in unseen]) for run in (before, after))
    return float(((y0 - y1) ** 2).mean() / y0.var())


# ---- masks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.5, 0.9, 0.99])
def test_counts_are_exact(sparsity: float) -> None:
    score = np.random.default_rng(SEED).random((24, 40))
    assert (~keep_mask(score, Structure(sparsity))).sum() == round(sparsity * 960)
    by_row = ~keep_mask(score, Structure(sparsity, per_row=True))
    assert set(by_row.sum(axis=1)) == {round(sparsity * 40)}


def test_counts_are_exact_with_ties() -> None:
    assert keep_mask(np.ones((10, 10)), Structure(0.37)).sum() == 63


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (5, 16)])
def test_n_of_m_keeps_the_n_largest_of_every_group(n: int, m: int) -> None:
    score = np.random.default_rng(SEED).random((8, 4 * m))
    keep = keep_mask(score, Structure(n=n, m=m)).reshape(8, 4, m)
    assert (keep.sum(axis=2) == n).all()
    groups = score.reshape(8, 4, m)
    assert np.where(keep, groups, np.inf).min(axis=2).min() > 0
    assert (np.where(keep, groups, np.inf).min(2) > np.where(keep, -1, groups).max(2)).all()


def test_row_groups_share_their_columns() -> None:
    keep = keep_mask(np.random.default_rng(SEED).random((16, 40)), Structure(0.75, rows=8))
    assert (keep.reshape(2, 8, 40) == keep[::8][:, None]).all()
    assert keep.mean() == 0.25


# ---- solvers ------------------------------------------------------------------------------------


def errors_of_methods(structure: Structure) -> list[float]:
    """Held-out output error of magnitude, wanda, sparsegpt, admm on correlated inputs."""
    x = correlated(4000, 96)
    w = np.random.default_rng(9).normal(size=(64, 96))
    seen, unseen = (part.T @ part / len(part) for part in (x[:2000], x[2000:]))
    norm = np.sqrt(np.diag(seen))
    known = Known(norm, seen)
    names = ("magnitude", "wanda", "sparsegpt", "admm")
    found = [CRITERIA[name].prune(w, known, structure, None) for name in names]
    return [output_error(f - w, w, unseen) for f in found]


@pytest.mark.parametrize(
    "structure", [Structure(0.5, per_row=True), Structure(0.8, per_row=True), Structure(n=2, m=4)]
)
def test_methods_rank_as_published(structure: Structure) -> None:
    by_magnitude, by_wanda, by_sparsegpt, by_admm = errors_of_methods(structure)
    assert by_admm < by_sparsegpt < by_wanda < by_magnitude


def test_sparsegpt_without_pruning_changes_nothing() -> None:
    x, w = correlated(500, 30), np.random.default_rng(1).normal(size=(7, 30))
    np.testing.assert_array_equal(sparsegpt(w, Known(second=x.T @ x / 500), Structure(0.0)), w)


def test_sparsegpt_of_uncorrelated_inputs_moves_nothing() -> None:
    """With a diagonal second moment no weight can stand in for another: SparseGPT is Wanda."""
    scale = np.random.default_rng(2).random(64) + 0.5
    w = np.random.default_rng(1).normal(size=(16, 64))
    found = sparsegpt(w, Known(second=np.diag(scale**2)), Structure(0.5, per_row=True))
    assert set(np.unique((found == 0).sum(axis=1))) == {32}
    np.testing.assert_allclose(found[found != 0], w[found != 0], rtol=1e-12)


def test_sparsegpt_matches_the_exact_solution_for_one_weight() -> None:
    """Optimal brain surgeon in closed form: w - w_q / C_qq * C_q with C the inverse of H."""
    x, w = correlated(500, 6, seed=3), np.random.default_rng(4).normal(size=(1, 6))
    second = x.T @ x / 500
    keep = sparsegpt(w, Known(second=second), Structure(1 / 6))
    (gone,) = np.flatnonzero(keep[0] == 0)
    inverse = np.linalg.inv(dampened(second))
    later = inverse[gone:, gone:] if gone == 0 else np.linalg.inv(dampened(second)[gone:, gone:])
    want = w[0].copy()
    want[gone:] -= w[0, gone] / later[0, 0] * later[0]
    np.testing.assert_allclose(keep[0], want, atol=1e-9)


@pytest.mark.parametrize("solve", [sparsegpt, CRITERIA["admm"].prune, CRITERIA["projected"].prune])
def test_frozen_zeros_stay(solve) -> None:
    x, w = correlated(500, 48), np.random.default_rng(1).normal(size=(16, 48))
    frozen = np.random.default_rng(2).random(w.shape) < 0.3
    found = solve(
        np.where(frozen, 0, w), Known(second=x.T @ x / 500), Structure(0.5, per_row=True), frozen
    )
    assert not found[frozen].any()
    assert (found == 0).mean() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("solve", [sparsegpt, CRITERIA["admm"].prune, CRITERIA["projected"].prune])
def test_singular_second_moment_is_survived(solve) -> None:
    w = np.random.default_rng(1).normal(size=(8, 32))
    for second in (np.zeros((32, 32)), np.ones((32, 32))):
        found = solve(w, Known(second=second), Structure(0.5), None)
        assert np.isfinite(found).all()


def test_retarget_recovers_the_original_output() -> None:
    """If the changed inputs are an invertible map of the original ones, nothing is lost."""
    generator = np.random.default_rng(8)
    x0, turn = generator.normal(size=(4000, 12)), np.eye(12) + 0.2 * generator.normal(size=(12, 12))
    x, w = x0 @ turn, generator.normal(size=(5, 12))
    found = repair.retarget(w, x0.T @ x / 4000, x.T @ x / 4000)
    before = np.square(x0 @ w.T - x @ w.T).mean()
    assert np.square(x0 @ w.T - x @ found.T).mean() < 0.01 * before


# ---- recipes ------------------------------------------------------------------------------------


def test_recipe_text() -> None:
    assert Recipe.parse("magnitude:0.7") == Recipe("magnitude", Structure(0.7))
    assert Recipe.parse("sparsegpt:2:4").structure == Structure(n=2, m=4, per_row=True)
    assert Recipe.parse("wanda:.8:8x1").structure == Structure(0.8, rows=8, per_row=True)
    assert Recipe.parse("lamp:0.9") == Recipe("magnitude", Structure(0.9), allocate="lamp")
    outputs = Recipe.parse("magnitude:2:4:4x2,axis=outputs").structure
    assert outputs == Structure(n=2, m=4, rows=4, columns=2, axis="outputs")
    parsed = Recipe.parse("admm:0.7,ignore=head|pooler,sequential=no")
    assert (parsed.ignore, parsed.sequential, parsed.compensate) == ("head|pooler", False, False)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("magic:0.7", "method 'magic'"),
        ("wanda", "no amount"),
        ("wanda:70%", "amount '70%'"),
        ("wanda:1.0", "found 1.0"),
        ("wanda:4:4", "found 4:4"),
        ("wanda:0.5,colour=red", "option 'colour=red'"),
        ("wanda:0.5,sequential=maybe", "sequential=maybe"),
        ("wanda:0.5,ignore=(", r"ignore=\("),
        ("admm:0.5,sequential=no,compensate=yes", "compensate=yes with"),
        ("wanda:0.5:0x1", "0x1"),
        ("wanda:0.5,axis=outputs", "axis=outputs with a share"),
        ("wanda:0.5,axis=sideways", "axis=sideways"),
        ("wanda:2:4,allocate=lamp", "allocate=lamp with a fixed density"),
        ("wanda:0.5,allocate=fair", "allocate=fair"),
        ("wanda:0.5,floor=2", "floor=2"),
        ("masks:0.5", "amount '0.5'"),
        ("masks,swap=yes", "swap=yes with masks"),
    ],
)
def test_wrong_recipe_is_named(text: str, found: str) -> None:
    with pytest.raises(UsageError, match=found):
        Recipe.parse(text)


def test_missing_calibration_and_empty_selection() -> None:
    with pytest.raises(UsageError, match="no calibration"):
        prune(encoder(), "wanda:0.5")
    with pytest.raises(UsageError, match="no layer to prune among 3"):
        prune(encoder(), "magnitude:0.5,layers=nothing")


# ---- models -------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["magnitude:0.75", "wanda:0.75", "sparsegpt:0.75", "admm:0.75"])
def test_densities_and_determinism(recipe: str) -> None:
    first, second = (prune(encoder(), recipe, feeds()) for _ in range(2))
    assert [row.weight for row in first.table] == [
        "mlp.up.weight",
        "mlp.down.weight",
        "head.weight",
    ]
    assert first.density == pytest.approx(0.25, abs=1e-9)
    for name, value in first.model.graph.initializers.items():
        np.testing.assert_array_equal(
            value.const_value.numpy(), second.model.graph.initializers[name].const_value.numpy()
        )


def test_the_given_model_is_not_changed() -> None:
    model = encoder()
    before = {k: v.const_value.numpy().copy() for k, v in model.graph.initializers.items()}
    prune(model, "admm:0.9", feeds())
    assert list(model.graph.initializers) == list(before)
    for name, array in before.items():
        np.testing.assert_array_equal(model.graph.initializers[name].const_value.numpy(), array)


def test_magnitude_without_feeds_keeps_values() -> None:
    pruned = prune(encoder(), "magnitude:0.5")
    w0 = encoder().graph.initializers["head.weight"].const_value.numpy()
    w = pruned.model.graph.initializers["head.weight"].const_value.numpy()
    np.testing.assert_array_equal(w[w != 0], w0[w != 0])
    assert np.abs(w0[w == 0]).max() <= np.abs(w0[w != 0]).min()


def test_better_methods_keep_the_output_better() -> None:
    model = encoder()
    recipes = ["magnitude:0.7,correct_bias=no", "wanda:0.7", "sparsegpt:0.7", "admm:0.7"]
    found = [change(model, prune(model, r, feeds()).model) for r in recipes]
    assert found == sorted(found, reverse=True)


def test_compensation_and_bias_correction_help() -> None:
    model = encoder()

    def loss(recipe: str) -> float:
        return change(model, prune(model, recipe, feeds()).model)

    assert loss("admm:0.8") < loss("admm:0.8,compensate=no")
    assert loss("wanda:0.8") < loss("wanda:0.8,correct_bias=no")


def test_bias_correction_keeps_the_mean_output() -> None:
    model = encoder()
    pruned = prune(model, "admm:0.9", feeds())
    y0, y1 = (
        np.concatenate([onnx_runner(m, threads=1)(f)[0] for f in feeds()]).mean(axis=0)
        for m in (model, pruned.model)
    )
    np.testing.assert_allclose(y1, y0, atol=2e-4 * np.abs(y0).max())


def test_a_shared_bias_is_not_changed_for_its_other_reader() -> None:
    model = encoder()
    pruned = prune(model, "wanda:0.9,layers=mlp.down", feeds()).model
    readers = {n.name: n.inputs[1].name for n in pruned.graph if n.op_type == "Add"}
    assert readers["head.add"] == "shared.bias"
    assert readers["down.add"] != "shared.bias"
    np.testing.assert_array_equal(
        pruned.graph.initializers["shared.bias"].const_value.numpy(),
        model.graph.initializers["shared.bias"].const_value.numpy(),
    )


def test_pattern_recipes_arrive_as_patterns() -> None:
    nm = prune(encoder(), "admm:2:4", feeds())
    assert {str(row.pattern) for row in nm.table} == {"2:4 along inputs"}
    grouped = prune(encoder(), "sparsegpt:0.75:8x1", feeds())
    assert {row.pattern.block for row in grouped.table} == {(8, 1)}


def test_existing_zeros_stay_zero() -> None:
    model = encoder()
    value = model.graph.initializers["head.weight"]
    w = value.const_value.numpy().copy()
    w[:, ::3] = 0.0
    value.const_value = ir.tensor(w, name=value.name)
    pruned = prune(model, "admm:0.6", feeds()).model
    assert not pruned.graph.initializers["head.weight"].const_value.numpy()[:, ::3].any()


def test_selection_reports_what_is_left_alone() -> None:
    pruned = prune(encoder(), "magnitude:0.5,ignore=head")
    assert pruned.skipped == (("head", "selected by ignore="),)
    assert [row.node for row in pruned.table] == ["up", "down"]


def test_progress_names_every_layer() -> None:
    seen = []
    prune(encoder(), "wanda:0.5", feeds(2), progress=lambda *now: seen.append(now))
    assert seen == [(1, 3, "up"), (2, 3, "down"), (3, 3, "head")]


def test_too_wide_inputs_fall_back_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsegraph.calibrate.LARGEST_MOMENT_BYTES", 8 * 48 * 48)
    table = {row.node: row for row in prune(encoder(), "admm:0.5", feeds()).table}
    assert (table["up"].method, table["down"].method) == ("admm", "wanda")
    assert table["down"].note == "input too wide for second moments"
    assert table["down"].pattern.density == 0.5


def convolutions() -> ir.Model:
    """Stem 3 -> 16, grouped 3x3, residual 1x1, transposed 2x2: every convolution that is pruned."""
    generator = np.random.default_rng(SEED)
    shapes = {
        "stem": (16, 3, 3, 3),
        "grouped": (16, 8, 3, 3),
        "point": (16, 16, 1, 1),
        "up": (16, 24, 2, 2),
    }
    arrays = {
        f"{k}.weight": (generator.normal(size=s) / np.sqrt(np.prod(s[1:]))).astype(np.float32)
        for k, s in shapes.items()
    }
    arrays["point.bias"] = generator.normal(size=16).astype(np.float32)
    pads = {"pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Conv", ["x", "stem.weight"], ["a"], "stem", **pads),
        helper.make_node("Relu", ["a"], ["b"], "relu"),
        helper.make_node("Conv", ["b", "grouped.weight"], ["c"], "grouped", group=2, **pads),
        helper.make_node("Relu", ["c"], ["d"], "relu2"),
        helper.make_node("Conv", ["d", "point.weight", "point.bias"], ["e"], "point"),
        helper.make_node("Add", ["e", "b"], ["f"], "residual"),
        helper.make_node("ConvTranspose", ["f", "up.weight"], ["y"], "up", strides=[2, 2]),
    ]
    inner = [1, 16, 12, 12]
    graph = helper.make_graph(
        nodes,
        "convolutions",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 12, 12])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 24, 24, 24])],
        [numpy_helper.from_array(a, name) for name, a in arrays.items()],
        value_info=[helper.make_tensor_value_info(k, TensorProto.FLOAT, inner) for k in "bef"],
    )
    opset = [helper.make_opsetid("", 18)]
    return ir.from_proto(helper.make_model(graph, opset_imports=opset, ir_version=9))


def pictures(n: int, seed: int) -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(seed)
    coarse = generator.normal(size=(n, 1, 3, 4, 4)).astype(np.float32)
    fine = np.repeat(np.repeat(coarse, 3, axis=3), 3, axis=4)
    return [{"x": x + 0.1 * generator.normal(size=x.shape).astype(np.float32)} for x in fine]


def test_convolutions_of_every_kind() -> None:
    model = convolutions()
    losses = []
    for recipe in ("magnitude:0.5,correct_bias=no", "wanda:0.5", "admm:0.5"):
        pruned = prune(model, recipe, pictures(24, 1))
        assert pruned.skipped == (("stem", "reads the image"),)
        assert [row.node for row in pruned.table] == ["grouped", "point", "up"]
        assert pruned.density == pytest.approx(0.5, abs=1e-9)
        before, after = onnx_runner(model, threads=1), onnx_runner(pruned.model, threads=1)
        y0, y1 = (np.stack([run(f) for f in pictures(8, 2)]) for run in (before, after))
        losses.append(float(((y0 - y1) ** 2).mean() / y0.var()))
    assert losses == sorted(losses, reverse=True)


def test_n_of_m_of_a_convolution_lies_along_input_channels() -> None:
    pruned = prune(convolutions(), "admm:2:4,layers=grouped", pictures(8, 1))
    w = pruned.model.graph.initializers["grouped.weight"].const_value.numpy()
    kept = (w.transpose(0, 2, 3, 1).reshape(-1, 4) != 0).sum(axis=1)
    assert kept.max() == 2


# ---- masks from outside, repairs, densities -----------------------------------------------------


def outside_masks() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(3)
    shapes = {"mlp.up.weight": (48, 96), "head.weight": (48, 48)}
    return {name: generator.random(shape) < 0.4 for name, shape in shapes.items()}


@pytest.mark.parametrize("recipe", ["masks", "masks,refit=yes"])
def test_masks_are_taken_as_they_are(recipe: str) -> None:
    masks = outside_masks()
    for calibration in [feeds(), None] if recipe == "masks" else [feeds()]:
        pruned = prune(encoder(), recipe, calibration, masks=masks)
        for name, mask in masks.items():
            w = pruned.model.graph.initializers[name].const_value.numpy()
            np.testing.assert_array_equal(w != 0, mask)
        assert pruned.skipped == (("down", "no mask given"),)
        assert {row.weight for row in pruned.table} == set(masks)


def test_repairs_of_outside_masks_help_in_turn() -> None:
    model, masks = encoder(), outside_masks()
    recipes = ["masks,correct_bias=no", "masks", "masks,refit=yes"]
    found = [change(model, prune(model, r, feeds(), masks=masks).model) for r in recipes]
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize(
    ("name", "shape", "found"),
    [("nowhere", (48, 48), "no such weight"), ("head.weight", (48, 47), r"\[48, 47\]")],
)
def test_a_mask_that_fits_nothing_is_named(name: str, shape: tuple[int, int], found: str) -> None:
    with pytest.raises(UsageError, match=found):
        prune(encoder(), "masks", masks={name: np.ones(shape, dtype=bool)})


def test_masks_and_the_recipe_must_agree() -> None:
    with pytest.raises(UsageError, match="found no masks"):
        prune(encoder(), "masks")
    with pytest.raises(UsageError, match="found masks"):
        prune(encoder(), "magnitude:0.5", masks=outside_masks())


def test_swap_and_refit_help_wanda() -> None:
    model = encoder()

    def loss(recipe: str) -> float:
        return change(model, prune(model, recipe, feeds()).model)

    plain, swapped = loss("wanda:0.7,compensate=no"), loss("wanda:0.7,compensate=no,swap=yes")
    assert loss("wanda:0.7,swap=yes,refit=yes") < swapped < plain


def test_densities_by_layer() -> None:
    pruned = prune(encoder(), "wanda:0.5", feeds(4), densities={"up": 0.25, "head": 1.0})
    assert {row.node: row.pattern.density for row in pruned.table} == {"up": 0.25, "down": 0.5}
    assert pruned.skipped == (("head", "its budget is full density"),)
    with pytest.raises(UsageError, match="density of nowhere"):
        prune(encoder(), "magnitude:0.5", densities={"nowhere": 0.5})
    with pytest.raises(UsageError, match="2:4"):
        prune(encoder(), "magnitude:2:4", densities={"up": 0.5})


@pytest.mark.parametrize(
    "recipe", ["lamp:0.8", "magnitude:0.8,allocate=global", "random:0.8,allocate=erk"]
)
def test_allocations_reach_the_model(recipe: str) -> None:
    pruned = prune(encoder(), recipe)
    assert pruned.density == pytest.approx(0.2, abs=1e-3)
    assert len({round(row.pattern.density, 3) for row in pruned.table}) > 1
    assert min(row.pattern.density for row in pruned.table) >= 0.049


def test_a_random_mask_is_the_seed_s() -> None:
    def head(recipe: str) -> np.ndarray:
        return prune(encoder(), recipe).model.graph.initializers["head.weight"].const_value.numpy()

    np.testing.assert_array_equal(head("random:0.5,seed=3"), head("random:0.5,seed=3"))
    assert (head("random:0.5,seed=3") != head("random:0.5,seed=4")).any()


def test_values_on_disk_give_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    want = prune(encoder(), "admm:0.7", feeds(8)).model.graph.initializers["head.weight"]
    monkeypatch.setattr("sparsegraph.calibrate.LARGEST_STATE_BYTES", 4000)
    found = prune(encoder(), "admm:0.7", feeds(8)).model.graph.initializers["head.weight"]
    np.testing.assert_array_equal(found.const_value.numpy(), want.const_value.numpy())


def test_groups_that_would_straddle_kernel_positions_are_declined() -> None:
    pruned = prune(convolutions(), "magnitude:2:6")
    assert ("grouped", "8 inputs per kernel position are no multiple of 6") in pruned.skipped
    pruned = prune(convolutions(), "magnitude:0.5:4x1")
    reason = "outputs and kernel positions alternate: no groups of outputs"
    assert ("up", reason) in pruned.skipped


@pytest.mark.parametrize("method", ["lasso", "wanda", "admm"])
def test_whole_input_channels_go(method: str) -> None:
    model = convolutions()
    pruned = prune(model, f"{method}:0.5:channels", pictures(4, 0))
    shares = {}
    for layer in weighted(pruned.model):
        if layer.name in {row.node for row in pruned.table}:
            product = layer.product()
            n_taps = layer.matrix()[0, 0].size if layer.node.op_type == "Conv" else 1
            dead = (product == 0).all(axis=1).reshape(len(product), -1, n_taps)
            assert (dead.all(axis=2) == dead.any(axis=2)).all()
            shares[layer.name] = dead.all(axis=2).mean()
    assert shares
    assert all(share == pytest.approx(0.5, abs=0.1) for share in shares.values())


def raw(*, is_linear: bool) -> ir.Model:
    """As exporters write linear layers of 3-D inputs: the weight is transposed in the graph."""
    text = """g (float[2,5,24] x) => (float[2,5,32] y) {
        t = Transpose<perm = [1, 0]>(w)  u = Mul(t, s)  h = MatMul(x, u)  y = Add(h, b) }"""
    if is_linear:
        text = text.replace("h = MatMul(x, u)", "z = MatMul(x, v)  h = MatMul(z, u)")
    return parse(text, w=weight(32, 24), s=weight(24, 32), b=weight(32), v=weight(24, 24))


def test_a_raw_capture_says_what_to_run() -> None:
    with pytest.raises(
        UsageError, match=r"among 1, of which 1 compute .*Fix: optimise first: `spa"
    ):
        prune(raw(is_linear=False), "magnitude:0.5")
    (left,) = prune(raw(is_linear=True), "magnitude:0.5").skipped
    assert left[1].startswith("its weight is computed: optimise first")
    folded = optimize(raw(is_linear=False)).model
    assert prune(folded, "magnitude:0.5").density == 0.5
    with pytest.raises(
        UsageError, match=r"among 1 .*not selected.*, need at least one\. Fix: widen"
    ):
        prune(folded, "magnitude:0.5,layers=none")


def test_a_balanced_feed_counts_like_any_other() -> None:
    """One text of 8 tokens, one of 2: told apart by the inputs that they use."""
    model = parse("g (float[1,8,32] x, int64[1,8] attention_mask) => (float[1,8,16] y) {"
                  " y = MatMul(x, w) }", w=np.ones((32, 16), np.float32))  # fmt: skip
    long, short = np.zeros((2, 1, 8, 32), np.float32)
    long[..., :16], short[..., 16:] = 1.0, 1.5
    masks = [np.ones((1, 8), np.int64), np.array([[1, 1, 0, 0, 0, 0, 0, 0]])]
    given = [{"x": x, "attention_mask": m} for x, m in zip((long, short), masks)]
    kept = {}
    for option in ("no", "yes"):
        pruned = prune(model, f"wanda:0.5,balance={option}", given).model
        weight = pruned.graph.initializers["w"].const_value.numpy()
        kept[option] = (weight[:16] != 0).mean(), (weight[16:] != 0).mean()
    assert kept == {"no": (1, 0), "yes": (0, 1)}  # 8 * 1 > 2 * 1.5^2, and 1 < 1.5^2


def test_balanced_rows_are_even_and_empty_feeds_are_none() -> None:
    rows = np.arange(100)[:, None, None]
    assert [len(_evened(rows[:n])) for n in (0, 1, 3, 100)] == [0, 64, 64, 64]
    assert np.bincount(_evened(rows[:3]).ravel()).tolist() == [22, 21, 21]
    assert len(np.unique(_evened(rows))) == 64
    assert str(Recipe.parse("admm:0.5,balance=yes")) == "admm:0.5,balance=yes"
