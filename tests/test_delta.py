"""Sparse deltas, their files, and averages of models with one mask."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from sparsegraph.delta import average, difference, fold, read, write
from sparsegraph.errors import UsageError
from tests.test_branches import TEXT, network


def test_deltas_add_up_and_may_cancel() -> None:
    model = network(0.5)
    w = model.graph.initializers["w"].const_value.numpy()
    one, two = np.zeros_like(w), np.zeros_like(w)
    one[0, :4], two[0, 2:6] = 1, -1
    wipe = {"w": -w * (np.arange(24) < 12)}
    found, (row,) = fold(model, [{"w": one}, {"w": two}, wipe])
    after = found.graph.initializers["w"].const_value.numpy()
    np.testing.assert_allclose(after, w + one + two + wipe["w"], atol=1e-6)
    assert (after[1:, :12] == 0).all()
    assert row.density_after == np.count_nonzero(after) / after.size < row.density_before
    assert (model.graph.initializers["w"].const_value.numpy() == w).all()


@pytest.mark.parametrize(
    ("name", "shape", "text"), [("v", (16, 24), "no such weight"), ("w", (24, 16), r"need a flo")]
)
def test_deltas_of_another_model(name: str, shape: tuple[int, int], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        fold(network(1.0), [{name: np.zeros(shape)}])


def test_masks_apply_after_what_is_added() -> None:
    model = network(0.5)
    w = model.graph.initializers["w"].const_value.numpy()
    keep = np.arange(24) < 12
    mask = np.broadcast_to(keep, w.shape)
    found, (row,) = fold(model, [{"w": mask}, {"w": np.ones_like(w)}])
    after = found.graph.initializers["w"].const_value.numpy()
    np.testing.assert_array_equal(after, np.where(keep, w + 1, 0))
    assert row.density_after == 0.5


def other_values(model: ir.Model, seed: int) -> ir.Model:
    """The same zeros, other numbers."""
    generator, copy = np.random.default_rng(seed), model.clone()
    for name, value in copy.graph.initializers.items():
        array = value.const_value.numpy()
        noise = generator.normal(size=array.shape).astype(array.dtype)
        value.const_value = ir.tensor(np.where(array != 0, array + noise, array), name=name)
    return copy


@pytest.mark.parametrize("share", [0.01, 0.9])
def test_a_difference_written_and_read_gives_the_tuned_model(tmp_path: Path, share: float) -> None:
    model = network(0.4)
    w = model.graph.initializers["w"].const_value.numpy()
    chosen = np.random.default_rng(1).random(w.shape) < share
    tuned = model.clone()
    value = tuned.graph.initializers["w"]
    value.const_value = ir.tensor(np.where(chosen, w / 3 + 1e-3, w), name="w")
    found = difference(model, tuned)
    assert list(found) == ["w"]
    write(tmp_path / "d.npz", found)
    names = np.load(tmp_path / "d.npz").files
    assert ("w:positions" in names) == (share < 0.5)
    again = fold(model, [read(tmp_path / "d.npz")])[0]
    after = again.graph.initializers["w"].const_value.numpy()
    np.testing.assert_array_equal(after, value.const_value.numpy())
    assert difference(tuned, again) == {}


def test_float32_is_enough_where_it_is_exact(tmp_path: Path) -> None:
    write(tmp_path / "d.npz", {"w": np.array([0.0, 0.5, 0, 0]), "v": np.array([0, 1 / 3, 0, 0])})
    held = np.load(tmp_path / "d.npz")
    assert (held["w:values"].dtype, held["v:values"].dtype) == (np.float32, np.float64)
    write(tmp_path / "m.npz", {"w": np.array([True, False])})
    assert read(tmp_path / "m.npz")["w"].dtype == np.bool_


@pytest.mark.parametrize(
    "change",
    [
        {"w:positions": np.array([0, 99], np.uint32)},
        {"w:positions": np.array([0], np.uint32)},
        {"w:positions": np.array([0, -1], np.int64)},
        {"w:shape": np.array([-2, -5])},
        {"w:values": None},
        {"w:shape": None},
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, change: dict[str, np.ndarray | None]) -> None:
    write(tmp_path / "d.npz", {"w": np.eye(5)[:2]})
    arrays = dict(np.load(tmp_path / "d.npz")) | change
    np.savez(tmp_path / "bad.npz", **{k: v for k, v in arrays.items() if v is not None})
    with pytest.raises(UsageError, match="a damaged 'w'"):
        read(tmp_path / "bad.npz")


def test_a_file_without_deltas(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz")
    with pytest.raises(UsageError, match="no arrays"):
        read(tmp_path / "d.npz")


def test_an_average_keeps_the_zeros() -> None:
    first = network(0.3)
    models = [first, *(other_values(first, seed) for seed in (1, 2))]
    found, rows = average(models, [2, 1, 1])
    w = [m.graph.initializers["w"].const_value.numpy() for m in models]
    after = found.graph.initializers["w"].const_value.numpy()
    np.testing.assert_allclose(after, (2 * w[0] + w[1] + w[2]) / 4, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(after == 0, w[0] == 0)
    assert {r.weight: r.density for r in rows}["w"] == (w[0] != 0).mean()
    assert (first.graph.initializers["w"].const_value.numpy() == w[0]).all()


def test_an_average_of_other_masks_is_refused_with_what_it_would_be() -> None:
    models = [network(0.3), network(0.3)]
    value = models[1].graph.initializers["w"]
    w = value.const_value.numpy()
    value.const_value = ir.tensor(np.ascontiguousarray(w[::-1]), name="w")
    union = ((w != 0) | (w[::-1] != 0)).mean()
    with pytest.raises(UsageError, match=rf"1 of 3 weights; .* have {union:.1%} .*one mask"):
        average(models)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (("Relu(q)", "Neg(q)"), r"Neg\(q\)  -> y in place of Relu"),
        (("16, 2] a, float[2,", "16, 3] a, float[3,"), r"constant 'a' float32 \[16, 3\] in place"),
    ],
)
def test_only_one_architecture_has_an_average_or_a_difference(
    change: tuple[str, str], text: str
) -> None:
    models = [network(1.0), network(1.0, text=TEXT.replace(*change))]
    for job in (lambda: average(models), lambda: difference(*models)):
        with pytest.raises(UsageError, match=text):
            job()


def test_a_longer_model_is_another_architecture() -> None:
    """One graph is the beginning of the other."""
    short = network(1.0, text=TEXT.replace("y = Relu(q)", "y = Relu(q) z = Neg(y)"))
    with pytest.raises(UsageError, match=r"found Neg\(y\)  -> z in place of constant"):
        difference(network(1.0), short)


def test_a_constant_more_is_another_architecture() -> None:
    """Nothing reads it, but one list of constants is the beginning of the other."""
    base, other = network(1.0), network(1.0)
    extra = ir.val("z", const_value=ir.tensor(np.ones(2, np.float32), name="z"))
    other.graph.register_initializer(extra)
    for pair in ((base, other), (other, base)):
        with pytest.raises(UsageError, match="constant 'z'"):
            difference(*pair)


def test_integer_constants_must_agree() -> None:
    text = TEXT.replace("y = Relu(q)", "y = Reshape(q, to)")
    text = text.replace("<float s = {0.5}>", "<float s = {0.5}, int64[2] to = {3, 24}>")
    models = [network(1.0, text=t) for t in (text, text.replace("{3, 24}", "{-1, 24}"))]
    with pytest.raises(UsageError, match="other values of the int64 constant 'to'"):
        average(models)


@pytest.mark.parametrize("shares", [[1], [1, -1], [0.5, float("nan")]])
def test_shares_are_one_per_model(shares: list[float]) -> None:
    with pytest.raises(UsageError, match="numbers with a positive sum"):
        average([network(0.3)] * 2, shares)
    with pytest.raises(UsageError, match="at least two"):
        average([network(0.3)])
