"""What PyTorch's exporter refuses or gets wrong is captured in other operators, and native."""

from typing import Any

import pytest

from sparsegraph.compile import compile
from sparsegraph.verify import compare

torch = pytest.importorskip("torch")
nn = torch.nn


def assert_native(net: Any, *inputs: Any) -> None:
    net.eval()
    made = compile(net, example_inputs=inputs, keep_native=True)
    assert made.fallback_nodes == []
    names = [i.name for i in made.session.get_inputs()]
    (found,) = made.run(None, {n: x.numpy() for n, x in zip(names, inputs)})
    with torch.no_grad():
        assert compare(found, net(*inputs).numpy()) < 1e-5


class Bags(nn.Module):
    """An embedding bag, its indices by rows or from offsets on, and a product."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.bag, self.out = nn.EmbeddingBag(30, 16, **options), nn.Linear(16, 4)
        nn.init.uniform_(self.bag.weight, -1, 1)  # the row of the padding, too

    def forward(self, *inputs: Any) -> Any:
        weights = inputs[1] if len(inputs) > 1 and inputs[1].is_floating_point() else None
        return self.out(self.bag(*inputs[:1] if weights is not None else inputs,
                                 per_sample_weights=weights))  # fmt: skip


@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags(mode: str, padding: int | None) -> None:
    torch.manual_seed(0)
    net, indices = Bags(mode=mode, padding_idx=padding), torch.randint(0, 30, (4, 5))
    indices[0] = indices[1, 2] = 3
    assert_native(net, indices)
    assert_native(net, indices.ravel(), torch.tensor([0, 3, 3, 11]))  # the second bag is empty
    ends = Bags(mode=mode, padding_idx=padding, include_last_offset=True)
    assert_native(ends, indices.ravel(), torch.tensor([0, 3, 11, 20]))


def test_bags_with_weights() -> None:
    assert_native(Bags(mode="sum"), torch.randint(0, 30, (4, 5)), torch.randn(4, 5))


class Products(nn.Module):
    def __init__(self, dim: int, dtype: Any) -> None:
        super().__init__()
        self.dim, self.dtype, self.out = dim, dtype, nn.Linear(6, 4)

    def forward(self, x: Any) -> Any:
        if self.dtype is not None:
            x = (x * 3).to(torch.int32)
        return self.out(torch.cumprod(x, self.dim, dtype=self.dtype))


@pytest.mark.parametrize(("dim", "dtype"), [(0, None), (1, torch.float32), (-1, None)])
def test_products_along_an_axis(dim: int, dtype: Any) -> None:
    torch.manual_seed(0)
    assert_native(Products(dim, dtype), torch.rand(1, 13, 6) + 0.5)


def test_products_of_whole_numbers() -> None:
    class Net(nn.Module):
        def forward(self, x: Any) -> Any:
            return torch.cumprod(x, 1) * 2

    assert_native(Net(), torch.randint(-2, 3, (3, 9), dtype=torch.int32))


def test_a_program_stays_as_it_was() -> None:
    net, x = Products(1, None).eval(), torch.rand(2, 5, 6)
    program = torch.export.export(net, (x,))
    before = str(program.graph)
    compile(program, example_inputs=(x,), check=False)
    assert str(program.graph) == before
