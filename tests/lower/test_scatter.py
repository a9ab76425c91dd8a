"""Scatters to computed places: every depth and axis, repeated places, graphs, caches."""

import re

import numpy as np
import onnx_ir as ir
import pytest
import torch
from sparsegraph.targets.kernels.scatter import REDUCTIONS

from sparsegraph import targets
from sparsegraph.compile import Compiled, compile
from sparsegraph.lower import partition
from sparsegraph.program import Fallback
from sparsegraph.verify import run_onnx
from tests.passes.check import parse, rng


@pytest.mark.parametrize("reduction", REDUCTIONS)
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


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    ("shape", "given", "axis"),
    [
        ((9,), (4,), 0), ((7, 5), (3, 5), 0), ((7, 5), (3, 2), 0), ((6, 7, 5), (4, 3, 5), 1),
        ((6, 7, 5), (6, 9, 3), -2), ((6, 7), (2, 4), 1), ((3, 4, 5, 2), (2, 4, 7, 2), 2),
    ],
)  # fmt: skip
def test_elements(
    shape: tuple[int, ...], given: tuple[int, ...], axis: int, reduction: str
) -> None:
    """Negative places, and several for one place; then ONNX Runtime lets any of them stay."""
    n, size = shape[axis], list(given)
    if reduction == "none":
        size[axis] = min(size[axis], n)
    order = np.argsort(rng().random((*shape[: axis % len(shape)], n, *shape[axis:][1:])), axis)
    places = np.concatenate([order] * 2, axis)[tuple(map(slice, size))]
    places = places - n * (np.arange(places.size).reshape(size) % 2)
    updates = rng().standard_normal(size).astype(np.float32)
    x = rng().standard_normal(shape).astype(np.float32)
    kept, taken = ",".join(map(str, shape)), ",".join(map(str, size))
    model = parse(
        f'''g (float[{kept}] x, int64[{taken}] i, float[{taken}] u) => (float[{kept}] y) {{
        s = ScatterElements<axis={axis}, reduction="{reduction}">(x, i, u)
        y = Add(s, x) }}'''
    )  # fmt: skip
    made = compile(ir.to_proto(model), keep_native=True)
    assert made.fallback_nodes == []
    feed = {"x": x, "i": places, "u": updates}
    np.testing.assert_allclose(made.run(None, feed)[0], run_onnx(model, feed)["y"], rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "source", "whole", "kernel"),
    [
        ((7, 3, 5), (4, 1, 1), (4, 3, 5), "scatter_rows"),
        ((7, 3, 5), (4, 1, 1), (4, 2, 5), "scatter_elements"),
        ((7, 3, 5), (4, 1, 5), (4, 3, 5), "scatter_elements"),
        ((7, 3, 5), (1, 1, 1), (4, 3, 5), "scatter_elements"),
    ],
)
def test_repeated_indices(
    shape: tuple[int, ...], source: tuple[int, ...], whole: tuple[int, ...], kernel: str
) -> None:
    """What is the same behind the axis is a scatter of rows."""
    kept, few, taken = (",".join(map(str, one)) for one in (shape, source, whole))
    model = parse(
        f"""g (float[{kept}] x, int64[{few}] k, float[{taken}] u) => (float[{kept}] y) {{
        i = Expand(k, s)  t = ScatterElements<axis=0, reduction="add">(x, i, u)
        y = Relu(t) }}""",
        s=np.array(whole),
    )
    made = compile(ir.to_proto(model), keep_native=True)
    feed = {"x": rng().standard_normal(shape), "u": rng().standard_normal(whole)}
    feed = {name: array.astype(np.float32) for name, array in feed.items()}
    feed["k"] = rng().integers(0, 7, source)
    steps = [step.kernel for step in made.session.profile(feed)]
    assert any(step.startswith(kernel) for step in steps)
    np.testing.assert_allclose(made.run(None, feed)[0], run_onnx(model, feed)["y"], rtol=1e-6)


@pytest.mark.parametrize(
    ("given", "axis", "type_", "why"),
    [
        ((4, 3, 4), 0, "float", r"indices \(4, 3, 4\) of data \(4, 6, 5\)"),
        ((4, 3, 2), 2, "float", r"indices \(4, 3, 2\) of data \(4, 6, 5\)"),
        ((4, 6, 5), 0, "bool", "reduction 'max' of bool"),
    ],
)
def test_what_is_left(given: tuple[int, ...], axis: int, type_: str, why: str) -> None:
    kept, taken = "4,6,5", ",".join(map(str, given))
    reduction = "max" if type_ == "bool" else "none"
    model = parse(
        f'''g ({type_}[{kept}] x, int64[{taken}] i, {type_}[{taken}] u) => ({type_}[{kept}] y) {{
        y = ScatterElements<axis={axis}, reduction="{reduction}">(x, i, u) }}'''
    )  # fmt: skip
    (segment,) = partition.plan(model, targets.get("native")).segments
    assert isinstance(segment, Fallback)
    assert re.search(why, segment.reason)


class Edges(torch.nn.Module):
    """Messages of the edges of a graph, at their ends."""

    def __init__(self, reduce: str, is_included: bool) -> None:
        super().__init__()
        self.reduce, self.is_included = reduce, is_included
        self.message, self.out = torch.nn.Linear(16, 24), torch.nn.Linear(24, 4)

    def forward(self, x: torch.Tensor, source: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
        index, y = to[:, None].expand(-1, 24), torch.full((20, 24), 0.3)
        messages = self.message(x)[source]
        y = y.scatter_reduce(0, index, messages, self.reduce, include_self=self.is_included)
        return self.out(y)


@pytest.mark.parametrize("is_included", [True, False])
@pytest.mark.parametrize("reduce", ["sum", "prod", "mean", "amax", "amin"])
def test_messages_of_a_graph(reduce: str, is_included: bool) -> None:
    torch.manual_seed(0)
    model = Edges(reduce, is_included).eval()
    inputs = torch.randn(20, 16), torch.randint(0, 20, (60,)), torch.randint(0, 12, (60,))
    made = compile(model, example_inputs=inputs, keep_native=True)
    assert made.fallback_nodes == []
    steps = [step.kernel for step in made.session.profile(feed_of(made, inputs))]
    assert any(kernel.startswith("scatter_rows") for kernel in steps)
    with torch.no_grad():
        want = model(*inputs).numpy()
    (found,) = made.run(None, feed_of(made, inputs))
    np.testing.assert_allclose(found, want, atol=1e-5)


class Counts(torch.nn.Module):
    """The same of whole numbers."""

    def __init__(self, reduce: str) -> None:
        super().__init__()
        self.reduce = reduce

    def forward(self, x: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
        y = torch.full((9, 5), 7)
        index = to[:, None].expand(-1, 5)
        return y.scatter_reduce(0, index, x, self.reduce, include_self=False) * 2


@pytest.mark.parametrize("reduce", ["sum", "prod", "amax", "amin"])
def test_whole_numbers(reduce: str) -> None:
    inputs = torch.randint(-90, 90, (12, 5)), torch.randint(0, 6, (12,))
    made = compile(Counts(reduce), example_inputs=inputs, keep_native=True)
    (found,) = made.run(None, feed_of(made, inputs))
    np.testing.assert_array_equal(found, Counts(reduce)(*inputs).numpy())


def feed_of(made: Compiled, inputs: tuple[torch.Tensor, ...]) -> dict[str, np.ndarray]:
    names = [i.name for i in made.session.get_inputs()]
    return {n: x.numpy() for n, x in zip(names, inputs)}


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
    for position in (0, 5, 15):
        given = (x, cache, torch.tensor([position]))
        with torch.no_grad():
            want = model(*given)
        found = made.run(None, feed_of(made, given))
        for a, b in zip(found, want):
            np.testing.assert_allclose(a, b.numpy(), atol=1e-6)
