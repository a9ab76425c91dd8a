"""Batch norms after pruning."""

import numpy as np
import onnx_ir as ir
import pytest

from sparsegraph.batch_norm import reestimate
from sparsegraph.divergence import Divergence
from sparsegraph.errors import UsageError
from sparsegraph.prune import prune
from tests.test_permute import filled

SEED = 9
TEXT = """<ir_version: 9, opset_import: ["" : 18]>
net (float[2, 8, 6, 6] x, float[24, 8, 3, 3] a, float[24] g, float[24] h, float[24] mean,
     float[24] var, float[16, 24, 1, 1] b, float[16] g2, float[16] h2, float[16] mean2,
     float[16] var2
) => (float[2, 16, 6, 6] y)
{
  s = Conv<pads = [1, 1, 1, 1]>(x, a)
  t = BatchNormalization(s, g, h, mean, var)
  u = Relu(t)
  v = Conv(u, b)
  y = BatchNormalization(v, g2, h2, mean2, var2)
}"""


def feeds(n: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng((SEED, seed))
    return [{"x": generator.normal(size=(2, 8, 6, 6)).astype(np.float32) + 1} for _ in range(n)]


def network() -> ir.Model:
    """Statistics of the batch norms are near those of the data, as after training."""
    generator = np.random.default_rng(SEED)

    def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name in "ab":
            return generator.normal(size=shape) / np.sqrt(np.prod(shape[1:]))
        return np.ones(shape) if name[0] in "gv" else np.zeros(shape)

    return filled(TEXT, weight)


def statistics(model: ir.Model) -> list[np.ndarray]:
    names = ("mean", "var", "mean2", "var2")
    return [model.graph.initializers[name].const_value.numpy() for name in names]


def test_shared_statistics_stay() -> None:
    """One variance cannot suit two batch norms: both are left alone."""
    text = TEXT.replace("float[16, 24, 1, 1] b", "float[24, 24, 1, 1] b").replace("16, 6", "24, 6")
    text = text.replace("[16]", "[24]").replace("mean2, var2)", "mean2, var)")
    generator = np.random.default_rng(SEED)
    model = filled(text, lambda _, shape: np.abs(generator.normal(size=shape)) + 0.1)
    mended = prune(model, "magnitude:0.5,batch_norm=yes,correct_bias=no", feeds(2)).model
    shared = [x.graph.initializers["var"].const_value.numpy() for x in (model, mended)]
    np.testing.assert_array_equal(*shared)


@pytest.mark.parametrize("n_layers", [2, 12])
def test_statistics_taken_anew_bring_the_outputs_nearer(n_layers: int) -> None:
    """Against nothing; a bias correction alone does the same in nets that are not deep."""
    model, calibration = stack(n_layers), feeds(8)
    loss = Divergence(model, feeds(8, seed=1))
    recipe = "magnitude:0.5,correct_bias=no"
    plain, mended = (
        loss(prune(model, f"{recipe}{x}", calibration).model) for x in ("", ",batch_norm=yes")
    )
    assert mended < 0.7 * plain


def stack(n_layers: int) -> ir.Model:
    """Convolution, batch norm and ReLU, over and over, the statistics those of the data."""
    lines, head, value = [], [], "x"
    for i in range(n_layers):
        weights = ", ".join(f"float[8] {name}{i}" for name in "ghmv")
        head.append(f"float[8, 8, 3, 3] a{i}, {weights}")
        lines.append(f"s{i} = Conv<pads = [1, 1, 1, 1]>({value}, a{i})")
        lines.append(f"t{i} = BatchNormalization(s{i}, g{i}, h{i}, m{i}, v{i})")
        value = "y" if i == n_layers - 1 else f"r{i}"
        lines.append(f"{value} = Relu(t{i})")
    inputs, body = ", ".join(["float[2, 8, 6, 6] x", *head]), "\n".join(lines)
    form = '<ir_version: 9, opset_import: ["" : 18]> net ({}) => (float[2, 8, 6, 6] y) {{{}}}'
    text = form.format(inputs, body)
    generator = np.random.default_rng(SEED)

    def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name[0] == "a":
            return generator.normal(size=shape) / np.sqrt(np.prod(shape[1:]))
        return np.ones(shape) if name[0] in "gv" else np.zeros(shape)

    return filled(text, weight)


def test_a_dense_model_keeps_its_statistics() -> None:
    model = network()
    copy = model.clone()
    assert reestimate(model, copy, feeds(2)) == 2
    for before, after in zip(statistics(model), statistics(copy)):
        np.testing.assert_allclose(after, before, rtol=1e-6)


def test_variances_follow_the_pruned_weights() -> None:
    model = network()
    copy = model.clone()
    value = copy.graph.initializers["a"]
    value.const_value = ir.tensor(value.const_value.numpy() / 2, name="a")
    reestimate(model, copy, feeds(4))
    np.testing.assert_allclose(statistics(copy)[1], statistics(model)[1] / 4, rtol=1e-4)
    np.testing.assert_allclose(statistics(copy)[3], statistics(model)[3], rtol=1e-3)  # repaired


def test_feeds_are_needed() -> None:
    with pytest.raises(UsageError, match="no calibration"):
        prune(network(), "magnitude:0.5,batch_norm=yes")


def changed(factor: float, *, text: str = TEXT, **constants: float) -> list[np.ndarray]:
    """Statistics of the first norm before and after its convolution's weights are multiplied."""
    model = filled(text, lambda name, shape: np.full(shape, constants[name])
                   if name in constants else default(name, shape))  # fmt: skip
    copy = model.clone()
    value = copy.graph.initializers["a"]
    value.const_value = ir.tensor(value.const_value.numpy() * np.float32(factor), name="a")
    reestimate(model, copy, feeds(4))
    return [statistics(x)[1] for x in (model, copy)]


def default(name: str, shape: tuple[int, ...]) -> np.ndarray:
    return network().graph.initializers[name].const_value.numpy()


@pytest.mark.parametrize(("factor", "ratio"), [(10.0, 16.0), (0.01, 1 / 16), (3.0, 9.0)])
def test_a_ratio_of_variances_is_bounded(factor: float, ratio: float) -> None:
    before, after = changed(factor)
    np.testing.assert_allclose(after, before * ratio, rtol=1e-3)


def test_epsilon_is_part_of_a_variance() -> None:
    text = TEXT.replace("BatchNormalization(s,", "BatchNormalization<epsilon = 0.1>(s,")
    _, after = changed(0.5, text=text)
    np.testing.assert_allclose(after, 1.1 / 4 - 0.1, rtol=1e-3)
    _, after = changed(0.5, text=text, var=0.05)
    np.testing.assert_array_equal(after, np.zeros(24))  # 0.15 / 4 - 0.1 is no variance


def test_a_channel_that_never_varied_keeps_its_variance() -> None:
    before, after = changed(0.5, a=0.0)
    np.testing.assert_array_equal(before, after)


def test_a_norm_in_training_mode_has_no_statistics_to_correct() -> None:
    text = TEXT.replace("t = BatchNormalization(s,", "t, m, v0 = BatchNormalization<training_mode "
                        "= 1>(s,")  # fmt: skip
    before, after = changed(0.5, text=text)
    np.testing.assert_array_equal(before, after)
