"""Layer-wise relevance: by hand, conserved, and as a criterion."""

import numpy as np
import pytest

from sparsegraph import capture
from sparsegraph.errors import UsageError
from sparsegraph.layers import weighted
from sparsegraph.prune import prune
from sparsegraph.relevance import _rules, of_module

torch = pytest.importorskip("torch")
nn = torch.nn

TINY = 1e-9  # an epsilon that absorbs nothing


def test_a_net_by_hand() -> None:
    """x = (1, 2), hidden z = (-1, 5), ReLU, y = 15; all of it came through the second unit."""
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        net[0].weight[:] = torch.tensor([[1.0, -1.0], [1.0, 2.0]])
        net[2].weight[:] = torch.tensor([[7.0, 3.0]])
    x = torch.tensor([[1.0, 2.0]])
    found = of_module(net, [(x,)], lambda y, i: y.sum(), epsilon=TINY)
    np.testing.assert_allclose(found["2.weight"].relevance, [[0, 15]])
    np.testing.assert_allclose(found["0.weight"].relevance, [[0, 0], [3, 12]], rtol=1e-5)
    half = of_module(net, [(x,)], lambda y, i: y.sum(), epsilon=1.0)
    # the last sum is 15, its root mean square too: half of it is absorbed; then of z = (-1, 5)
    # with root mean square sqrt(13) the second keeps 5 / (5 + sqrt(13))
    np.testing.assert_allclose(half["2.weight"].relevance, [[0, 7.5]], rtol=1e-5)
    kept = 7.5 * 5 / (5 + np.sqrt(13))
    np.testing.assert_allclose(half["0.weight"].relevance, [[0, 0], [0.2 * kept, 0.8 * kept]])


class Residual(nn.Module):
    """Convolutions with a residual, a norm, GELU, attention of the points, and a linear head."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=bias)
        self.inner = nn.Conv2d(8, 8, 3, padding=1, bias=bias)
        self.norm = nn.LayerNorm(8, bias=bias)
        self.value = nn.Linear(8, 8, bias=bias)
        self.head = nn.Linear(8, 4, bias=bias)
        if bias:
            for parameter in self.parameters():
                nn.init.normal_(parameter, std=0.3)

    def forward(self, x: object) -> object:
        x = torch.relu(self.stem(x))
        x = x + nn.functional.relu(self.inner(x))
        x = self.norm(x.flatten(2).transpose(1, 2))
        x = nn.functional.gelu(self.value(x))
        return self.head(x.mean(dim=1))


def shares(net: object, x: object, epsilon: float) -> tuple[float, dict[str, float]]:
    """What is explained, and what the input and each parameter get of it, with signs."""
    held = x.clone().requires_grad_()
    with _rules(epsilon):
        y = net(held).sum()
    named = dict(net.named_parameters()) | {"input": held}
    found = torch.autograd.grad(y, list(named.values()))
    return y.item(), {n: (v * g).sum().item() for (n, v), g in zip(named.items(), found)}


@pytest.mark.parametrize("bias", [False, True])
def test_relevance_is_conserved(bias: bool) -> None:
    """Each full layer hands on what it gets; the input and the biases together get all of it."""
    torch.manual_seed(0)
    net, x = Residual(bias=bias).double(), torch.randn(2, 3, 5, 5).double()
    y, found = shares(net, x, TINY)
    assert y == pytest.approx(float(net(x).sum()), rel=1e-9)  # the rules change no value
    biases = sum(share for name, share in found.items() if name.endswith("bias"))
    assert found["input"] + biases == pytest.approx(y, rel=1e-6)
    if not bias:
        for name in ("head.weight", "value.weight", "norm.weight", "stem.weight"):
            assert found[name] == pytest.approx(y, rel=1e-6), name
        assert 0 < abs(found["inner.weight"]) < abs(y)  # the rest went past it


def test_epsilon_absorbs() -> None:
    torch.manual_seed(0)
    net, x = Residual(bias=False), torch.randn(2, 3, 5, 5)
    y, found = shares(net, x, 1.0)
    _, whole = shares(net, x, TINY)
    assert y == pytest.approx(float(net(x).sum()), rel=1e-4)
    assert abs(found["head.weight"]) < 0.8 * abs(whole["head.weight"])


def test_products_of_activations_give_half_to_each() -> None:
    a, b = (torch.tensor([[v]], requires_grad=True) for v in (2.0, 3.0))
    for product in (torch.matmul, lambda x, y: x @ y, torch.mul, lambda x, y: x * y):
        with _rules(TINY):
            y = product(a * 1.0, b * 1.0)
        found = torch.autograd.grad(y, (a, b))
        assert float(y) == 6
        assert [float(v * g) for v, g in zip((a, b), found)] == [3, 3]
    with _rules(TINY):
        (found,) = torch.autograd.grad((a * 1.0) / (a.detach() * a), a)
    assert float(a * found) == 0.5  # the divisor is a scale


def test_pruning_by_relevance_finds_the_units_that_count() -> None:
    """Large weights into units that nothing reads: magnitude keeps them, relevance does not."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 6))
    with torch.no_grad():
        net[0].weight[::2] *= 4
        net[2].weight[:, ::2] *= 0.01
    items = [(torch.randn(1, 24),) for _ in range(32)]
    model = capture(net, items[0])
    found = of_module(net, items)
    kept = {}
    for method, given in (("relevance", found), ("magnitude", None)):
        pruned = prune(model, f"{method}:0.5,layers=0.weight", gradients=given).model
        layer = next(x for x in weighted(pruned) if x.value.name == "0.weight")
        kept[method] = (layer.matrix() != 0).mean(axis=1)[::2].mean()
    assert kept["relevance"] < 0.1 < 0.7 < kept["magnitude"]
    with pytest.raises(UsageError, match="at least one"):
        of_module(net, [])


def test_a_parameter_in_a_product_is_a_weight() -> None:
    """It gets the whole share, as the input does; sums over it are stabilised, scales are not."""
    w = nn.Parameter(torch.tensor([[3.0]]))
    x = torch.tensor([[2.0]], requires_grad=True)
    for product, share in ((torch.matmul, 3.0), (torch.mul, 6.0)):
        with _rules(1.0):  # a lone sum is its own root mean square: half of it is absorbed
            y = product(x * 1.0, w)
        assert y.item() == 6
        found = torch.autograd.grad(y, (x, w))
        assert [(v * g).item() for v, g in zip((x, w), found)] == [share, share]


def test_an_activation_of_zero_keeps_its_value() -> None:
    x = torch.tensor([0.0, 2.0], requires_grad=True)
    with _rules(TINY):
        y = torch.sigmoid(x)
    torch.testing.assert_close(y, torch.sigmoid(x))
    (found,) = torch.autograd.grad(y.sum(), x)
    assert (x * found).tolist() == [0, y[1].item()]
