"""ScatterND at places that are computed: every depth, repeated places, caches of a decoder."""

import numpy as np
import onnx_ir as ir
import pytest
import torch

from sparsegraph.compile import compile
from sparsegraph.verify import run_onnx
from tests.passes.check import parse, rng


@pytest.mark.parametrize("reduction", ["none", "add", "mul"])
@pytest.mark.parametrize(
    ("shape", "places"),
    [
        ((7,), [[3], [-7], [6]]),
        ((7, 40), [[-1], [2]]),
        ((3, 5, 19), [[0, 1], [2, -1], [-3, 0]]),
        ((3, 5, 2), [[[0, 1, 1], [2, 4, 0]], [[-1, -1, -1], [0, 0, 0]]]),
        ((3, 5, 2), [[[1]], [[-1]]]),
    ],
)
def test_every_depth(shape: tuple[int, ...], places: list[object], reduction: str) -> None:
    at = np.array(places)
    updates = rng().standard_normal((*at.shape[:-1], *shape[at.shape[-1] :])).astype(np.float32)
    if reduction != "none":  # of several for one place ONNX Runtime takes any
        at, updates = np.concatenate([at, at[:1]]), np.concatenate([updates, updates[:1]])
    x = rng().standard_normal(shape).astype(np.float32)
    sizes = [",".join(map(str, a.shape)) for a in (x, at, updates)]
    model = parse(
        f'''g (float[{sizes[0]}] x, int64[{sizes[1]}] i, float[{sizes[2]}] u)
            => (float[{sizes[0]}] y) {{
        s = ScatterND<reduction="{reduction}">(x, i, u)
        y = Add(s, x) }}'''
    )  # fmt: skip
    made = compile(ir.to_proto(model), keep_native=True)
    assert made.fallback_nodes == []
    feed = {"x": x, "i": at, "u": updates}
    np.testing.assert_array_equal(made.run(None, feed)[0], run_onnx(model, feed)["y"])


def test_additions_at_constant_places() -> None:
    x, updates = rng().standard_normal((4, 9)), rng().standard_normal((3, 9))
    model = parse(
        """g (float[4,9] x, float[3,9] u) => (float[4,9] y) {
        y = ScatterND<reduction="add">(x, i, u) }""",
        i=np.array([[1], [-1], [1]]),
    )
    made = compile(ir.to_proto(model), keep_native=True)
    assert made.fallback_nodes == []
    feed = {"x": x.astype(np.float32), "u": updates.astype(np.float32)}
    np.testing.assert_array_equal(made.run(None, feed)[0], run_onnx(model, feed)["y"])


@pytest.mark.parametrize("reduction", ["max", "min"])
def test_what_is_left(reduction: str) -> None:
    model = parse(
        f'''g (float[4,2] x, int64[3,1] i, float[3,2] u) => (float[4,2] y) {{
        y = ScatterND<reduction="{reduction}">(x, i, u) }}'''
    )  # fmt: skip
    made = compile(ir.to_proto(model), keep_native=True)
    (segment,) = made.manifest.segments
    assert f"reduction '{reduction}' of float32" in segment.reason


class Cache(torch.nn.Module):
    """Writes one position of a cache of fixed size, and reads all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.key = torch.nn.Linear(32, 32)

    def forward(
        self, x: torch.Tensor, cache: torch.Tensor, position: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        key = self.key(x).reshape(1, 1, 4, 8).transpose(1, 2)
        cache = cache.index_copy(2, position, key)
        return cache, torch.softmax(key @ cache.transpose(2, 3), -1)


def test_a_cache_of_fixed_size() -> None:
    torch.manual_seed(0)
    x, cache = torch.randn(1, 1, 32), torch.randn(1, 4, 16, 8)
    model = Cache().eval()
    made = compile(model, example_inputs=(x, cache, torch.tensor([5])), keep_native=True)
    assert made.fallback_nodes == []
    names = [i.name for i in made.session.get_inputs()]
    for position in (0, 5, 15):
        given = (x, cache, torch.tensor([position]))
        with torch.no_grad():
            want = model(*given)
        found = made.run(None, {n: t.numpy() for n, t in zip(names, given)})
        for a, b in zip(found, want):
            np.testing.assert_allclose(a, b.numpy(), atol=1e-6)
