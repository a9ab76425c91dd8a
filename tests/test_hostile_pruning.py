"""Calibration, recipes and graphs that nobody should give: one clear error, or right masks."""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsegraph.budget.within import prune_within
from sparsegraph.errors import UsageError
from sparsegraph.layers import weighted
from sparsegraph.prune import Pruned, prune
from sparsegraph.recipe import Recipe, select
from sparsegraph.sensitivity import scan
from tests.passes.check import parse, weight

RECIPES = ("magnitude:0.5", "wanda:0.5", "admm:0.5", "sparsegpt:2:4", "fisher:0.5",
           "wanda:0.5,allocate=ecoflap", "wanda:0.5,swap=yes,refit=yes")  # fmt: skip
METHODS = ("magnitude", "random", "spectrum", "wanda", "sparsegpt", "admm", "projected", "lasso")


def numbers(*shape: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def mlp() -> ir.Model:
    text = "g (float[4,24] x) => (float[4,8] y) { h = MatMul(x, a)  r = Relu(h)  y = MatMul(r, b) }"
    return parse(text, a=weight(24, 32), b=weight(32, 8))


def good(n: int = 3) -> list[dict[str, np.ndarray]]:
    return [{"x": numbers(4, 24, seed=i)} for i in range(n)]


def spoilt(value: float) -> list[dict[str, np.ndarray]]:
    feeds = good()
    feeds[1]["x"][0, 3] = value
    return feeds


BAD = [
    (spoilt(np.nan), r"'x': found NaN, infinite or huge values in feed 1 \(its input x has NaN\),"),
    (spoilt(np.inf), "'x': found NaN, infinite or huge values in feed 1,"),
    (spoilt(3e38), "'x': found NaN, infinite or huge values"),
    ([{"x": numbers(4, 25)}], r"'x': found shape \[4, 25\], need \[4, 24\].*feed 0"),
    ([{"x": numbers(24)}], r"'x': found shape \[24\]"),
    ([{"x": numbers(4)}], r"'x': found shape \[4\]"),
    ([*good(), {"x": numbers(7, 24)}], r"found shape \[7, 24\].*feed 3"),
    ([{"x": numbers(4, 24).astype(np.float64)}], r"found float64, need float32.*astype\(float32\)"),
    ([{"x": np.ones((4, 24), int)}], "found int64, need float32"),
    ([{"x": np.full((4, 24), "a")}], "need float32"),
    ([{"x": np.full((4, 24), None)}], "found object, need float32"),
    ([{"x": [[1.0] * 24] * 4}], "found a list, need a NumPy array"),
    ([{"z": numbers(4, 24)}], "'x': found no array"),
    ([{}], "'x': found no array"),
    ([{"x": numbers(4, 24), "z": numbers(1)}], "'z': found an input that the model has not"),
    ([numbers(4, 24)], "'feed 0': found a ndarray"),
    ({"x": numbers(4, 24)}, "found one mapping"),
]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("feeds", "found"), BAD)
def test_feeds_that_do_not_fit_are_named(recipe: str, feeds: object, found: str) -> None:
    with pytest.raises(UsageError, match=found):
        prune(mlp(), recipe, feeds)  # type: ignore[arg-type]


@pytest.mark.parametrize(("feeds", "found"), BAD[3:])
def test_scans_and_budgets_say_it_too(feeds: object, found: str) -> None:
    with pytest.raises(UsageError, match=found):
        scan(mlp(), "wanda:0.5", feeds)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=found):
        prune_within(mlp(), "wanda:0.5", feeds, {"flops": "0.5x"})  # type: ignore[arg-type]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    "x",
    [
        numbers(1, 4, 24),
        np.zeros((3, 4, 24), np.float32),
        np.full((3, 4, 24), 3, np.float32),
        numbers(6, 4, 24) * (np.arange(24) != 5),
        numbers(6, 4, 24) * np.float32(1e-20),
    ],
    ids=["one sample", "zeros", "constant", "a dead feature", "tiny"],
)
def test_poor_feeds_give_exact_masks_and_finite_weights(recipe: str, x: np.ndarray) -> None:
    feeds = [{"x": part.astype(np.float32)} for part in x]
    exact(prune(mlp(), recipe, feeds), mlp())


def exact(pruned: Pruned, model: ir.Model) -> None:
    """Half of all weights are zero, and nothing is NaN."""
    assert pruned.density == pytest.approx(0.5, abs=0.01)
    assert all(np.isfinite(array).all() for array in arrays(pruned.model))
    assert len(pruned.table) == len(weighted(model))


def arrays(model: ir.Model) -> Iterator[np.ndarray]:
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        yield value.const_value.numpy()


def test_feeds_of_padding_alone_are_refused() -> None:
    text = """g (float[1,4,24] x, int64[1,4] attention_mask) => (float[1,4,24] y) {
        f = Cast<to=1>(attention_mask)  n = Constant<value = int64[1] {2}>()  u = Unsqueeze(f, n)
        h = MatMul(x, a)  y = Mul(h, u) }"""
    model = parse(text, a=weight(24, 24))
    feed = {"x": numbers(1, 4, 24), "attention_mask": np.zeros((1, 4), np.int64)}
    with pytest.raises(UsageError, match="'x': found no rows"):
        prune(model, "wanda:0.5", [feed])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("magnitude:1", "found 1.0, need 0 <= share < 1"),
        ("magnitude:nan", "amount 'nan'"),
        ("magnitude", "found no amount, need a share or N:M"),
        ("magnitude:-0.5", "amount '-0.5'"),
        ("magnitude:1:99999999999", "found 99999999999, need groups"),
        ("magnitude:0.5:1x99999999999", "found 99999999999, need groups"),
        ("wanda:0.5,layers=a,layers=b", "layers twice"),
        ("lamp:0.5,allocate=erk", "allocate twice"),
        ("magnitude:0.5:32x32", r"'MatMul_0': no larger than one block"),
        ("magnitude:0.5,layers=nothing", "'MatMul_0': not selected by layers="),
    ],
)
def test_nonsense_recipes_are_refused(text: str, found: str) -> None:
    with pytest.raises(UsageError, match=found):
        prune(mlp(), text, good())


def test_recurrent_nodes_are_named_among_what_is_left_alone() -> None:
    text = """g (float[5,1,24] x) => (float[5,1,16] y) {
        w = Identity(v)  h, last = RNN<hidden_size = 16>(x, w, r)  f = Squeeze(h)
        n = Constant<value = int64[1] {1}>()  u = Unsqueeze(f, n)  y = MatMul(u, a) }"""
    model = parse(text, v=weight(1, 16, 24), r=weight(1, 16, 16), a=weight(16, 16))
    pruned = prune(model, "magnitude:0.5")
    assert pruned.skipped == (("RNN_1", "recurrent: only the recipe masks prunes it"),)


def test_one_way_to_say_lamp_is_no_contradiction() -> None:
    assert Recipe.parse("lamp:0.5,allocate=lamp") == Recipe.parse("lamp:0.5")


def test_layers_with_broken_weights_are_left_alone() -> None:
    model = mlp()
    broken = model.graph.initializers["a"]
    assert broken.const_value is not None
    array = broken.const_value.numpy().copy()
    array[3, 4] = np.nan
    broken.const_value = ir.tensor(array, name="a")
    chosen, skipped = select(model, Recipe.parse("magnitude:0.5"))
    assert [layer.value.name for layer in chosen] == ["b"]
    assert [why for _, why in skipped] == ["weight has NaN or infinite values"]


@pytest.mark.parametrize(
    ("text", "shape", "weights", "reason"),
    [
        ("(float[4,24] x) => (float[4,24] y) { h = MatMul(x, a) y = MatMul(h, a) }",
         (4, 24), {"a": (24, 24)}, "shared with another node"),
        ("(float[4,24] x) => (float[4,20] y) { w = Transpose<perm=[1,0]>(a) y = MatMul(x, w) }",
         (4, 24), {"a": (20, 24)}, "1 compute their weights"),
        ("(float[2,4,24] x) => (float[2,4,20] y) { y = MatMul(x, a) }",
         (2, 4, 24), {"a": (2, 24, 20)}, "one weight per batch entry"),
        ("(float[4,3] x) => (float[4,5] y) { y = MatMul(x, a) }",
         (4, 3), {"a": (3, 5)}, "fewer than 16 inputs"),
    ],
)  # fmt: skip
def test_what_cannot_be_pruned_says_why(
    text: str, shape: tuple[int, ...], weights: dict[str, tuple[int, ...]], reason: str
) -> None:
    model = parse(f"g {text}", **{n: weight(*size) for n, size in weights.items()})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=reason):
        prune(model, "admm:0.5", [{"x": numbers(*shape)}])


KINDS = {
    "gemm": ("(float[4,24] x) => (float[4,20] y) { y = Gemm<alpha=0.5,beta=2.0>(x, a, c) }",
             (4, 24), (24, 20)),
    "gemm B^T": ("(float[4,24] x) => (float[4,20] y) { y = Gemm<transB=1>(x, a, c) }",
                 (4, 24), (20, 24)),
    "gemm A^T B^T": ("(float[24,4] x) => (float[4,20] y) { y = Gemm<transA=1,transB=1>(x, a, c) }",
                     (24, 4), (20, 24)),
    "gemm left": ("(float[24,20] x) => (float[20,20] y) { y = Gemm(a, x, c) }",
                  (24, 20), (20, 24)),
    "conv 1-D": ("(float[1,16,9] x) => (float[1,20,9] y) { y = Conv<pads=[1,1]>(x, a, c) }",
                 (1, 16, 9), (20, 16, 3)),
    "conv 3-D": ("(float[1,8,4,4,4] x) => (float[1,20,2,2,2] y) { y = Conv(x, a, c) }",
                 (1, 8, 4, 4, 4), (20, 8, 3, 3, 3)),
    "conv in groups": ("(float[1,16,5,5] x) => (float[1,20,3,3] y) { y = Conv<group=4>(x, a, c) }",
                       (1, 16, 5, 5), (20, 4, 3, 3)),
    "transposed": ("(float[1,16,5,5] x) => (float[1,20,10,10] y) "
                   "{ y = ConvTranspose<strides=[2,2]>(x, a, c) }",
                   (1, 16, 5, 5), (16, 20, 2, 2)),
    "column": ("(float[4,24] x) => (float[4,20] y) { h = MatMul(x, a) y = Add(h, c) }",
               (4, 24), (24, 1)),
}  # fmt: skip


@given(
    kind=st.sampled_from(sorted(KINDS)),
    method=st.sampled_from(METHODS),
    share=st.floats(0, 0.99),
    pattern=st.sampled_from(["", "2:4", "1:2"]),
    sparse=st.booleans(),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_counts_hold_in_layers_of_every_kind(
    kind: str, method: str, share: float, pattern: str, sparse: bool
) -> None:
    """Zeros are as many as asked for, old zeros stay, and the result is finite."""
    text, shape, stored = KINDS[kind]
    a = numbers(*stored)
    if sparse:
        a = a * (numbers(*stored, seed=4) > 0)
    model = parse(f"g {text}", a=a, c=numbers(20))
    feeds = [{"x": numbers(*shape, seed=i)} for i in range(3)]
    (layer,) = weighted(model)
    recipe = f"{method}:{pattern or round(share, 3)}"
    pruned = prune(model, recipe, feeds)
    found = next(x for x in weighted(pruned.model) if x.value.name == "a")
    assert np.isfinite(found.array()).all()
    assert not found.array()[a == 0].any()
    rows = found.product().reshape(-1, found.product().shape[2])
    if pattern and not layer.is_convolution:
        n, m = map(int, pattern.split(":"))
        padded = np.pad(rows != 0, ((0, 0), (0, -rows.shape[1] % m)))
        assert padded.reshape(len(rows), -1, m).sum(axis=2).max() <= n
    if not pattern:
        criterion = Recipe.parse(recipe).criterion
        assert criterion is not None
        least = round(round(share, 3) * rows.shape[1]) * len(rows) if criterion.per_row else 0
        n_zero = int((rows == 0).sum())
        assert n_zero >= max(least, int((a == 0).sum()))
        if not sparse:
            assert n_zero == pytest.approx(round(share, 3) * rows.size, abs=len(rows) / 2 + 1)
