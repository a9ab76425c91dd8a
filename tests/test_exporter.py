"""What PyTorch's exporter refuses, captured all the same; programs are afterwards as they were."""

from typing import Any

import pytest

from sparsegraph import decompositions
from sparsegraph.capture import capture
from sparsegraph.errors import CaptureError, VerifyError
from sparsegraph.verify import compare, run_onnx

torch = pytest.importorskip("torch")
nn = torch.nn
attention = nn.functional.scaled_dot_product_attention


def assert_captured(source: Any, module: Any, *inputs: Any) -> None:
    model = capture(source, inputs)
    feed = dict(zip([str(v.name) for v in model.graph.inputs], (x.numpy() for x in inputs)))
    (found,) = run_onnx(model, feed).values()
    with torch.no_grad():
        assert compare(found, module(*inputs).numpy()) < 1e-6


class Attention(nn.Module):
    def __init__(self, is_causal: bool, is_last: bool) -> None:
        super().__init__()
        self.is_causal, self.is_last = is_causal, is_last

    def forward(self, q: Any, k: Any, v: Any, mask: Any = None) -> Any:
        y = attention(q, k, v, mask, is_causal=self.is_causal, scale=0.3)
        return y if self.is_last else torch.tanh(y)


@pytest.mark.parametrize(
    ("heads", "of_keys", "mask", "is_causal"),
    [
        ((), (), None, False), ((3,), (3,), None, False), ((3,), (1,), (5, 7), False),
        ((2, 4), (2, 1), None, True), ((2, 4), (1, 4), (1, 1, 5, 7), False),
        ((2, 4), (2, 4), (2, 1, 1, 7), False), ((2, 3, 4), (2, 3, 4), (1, 7), False),
        ((2, 3, 4), (2, 1, 1), (3, 1, 5, 7), True), ((2, 2, 3, 4), (2, 2, 3, 4), (4, 5, 7), False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("is_last", [False, True])
def test_attention_of_any_rank(
    heads: tuple[int, ...], of_keys: tuple[int, ...], mask: tuple[int, ...] | None,
    is_causal: bool, is_last: bool,
) -> None:  # fmt: skip
    """Twins and Hiera have five dimensions, Falcon and MobileNetV4 one head of keys."""
    torch.manual_seed(0)
    is_causal = is_causal and mask is None
    keys = 5 if is_causal else 7
    inputs = [torch.randn(*heads, 5, 8), torch.randn(*of_keys, keys, 8)]
    inputs += [torch.randn(*of_keys, keys, 6)] + ([torch.randn(mask)] if mask else [])
    net = Attention(is_causal, is_last)
    assert_captured(net, net, *inputs)
    program = torch.export.export(net, tuple(inputs))
    before = str(program.graph)
    assert_captured(program, net, *inputs)
    assert str(program.graph) == before
    torch.testing.assert_close(program.module()(*inputs), net(*inputs))


class Heads(nn.Module):
    """Attention between transposed values and views as in T5, BEiT and Swin; LayoutLM's mask."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.o = nn.Linear(32, 32), nn.Linear(32, 32)
        self.register_buffer("places", torch.arange(20)[None])
        self.position = nn.Embedding(20, 32)
        self.table = nn.Parameter(torch.randn(17, 4))
        steps = torch.arange(9)
        self.register_buffer("distances", steps[:, None] - steps + 8)

    def forward(self, x: Any, kept: Any) -> Any:
        q = self.q(self.position(self.places[:, :9])).view(1, 9, -1, 8).transpose(1, 2)
        hidden = (1 - kept[:, None, None, :]) * torch.finfo(torch.float32).min
        y = attention(q, q, q, hidden).transpose(1, 2).contiguous().view(1, 9, -1)
        q = self.q(self.o(y) + x).view(1, 9, -1, 8).transpose(1, 2)
        bias = self.table[self.distances].permute(2, 0, 1)[None]
        return attention(q, q, q, bias).transpose(1, 2).contiguous().view(1, 9, -1)


def test_views_of_attention() -> None:
    net, kept = Heads().eval(), torch.ones(1, 9)
    kept[:, 5:] = 0
    assert_captured(net, net, torch.randn(1, 9, 32), kept)


@pytest.mark.parametrize("bias", [False, True])
def test_convolution_of_three_axes(bias: bool) -> None:
    net = nn.Conv3d(4, 6, (3, 2, 1), (1, 2, 1), (1, 0, 2), (1, 1, 2), groups=2, bias=bias)
    assert_captured(net, net, torch.randn(1, 4, 5, 6, 7))


class Encoder(nn.Module):
    """Called by name, as the modules of transformers are."""

    def forward(self, ids: Any = None, scale: Any = None, mask: Any = None) -> Any:
        x = ids.float() * (1 if scale is None else scale)
        return x if mask is None else x * mask


def test_inputs_by_name() -> None:
    ids, mask = torch.arange(6)[None], torch.rand(1, 6)
    model = capture(Encoder(), {"ids": ids, "mask": mask})
    assert [v.name for v in model.graph.inputs] == ["ids", "mask"]
    (found,) = run_onnx(model, {"ids": ids.numpy(), "mask": mask.numpy()}).values()
    assert compare(found, (ids * mask).numpy()) < 1e-6


class Named(nn.Module):
    def forward(self, x: Any) -> Any:
        return {"none": None, "last state": x + 1, "layers": [x * 2, x * 3]}


def test_outputs_are_called_as_their_keys() -> None:
    x = torch.rand(2, 3)
    for source in (Named(), torch.export.export(Named(), (x,))):
        model = capture(source, (x,))
        found = run_onnx(model, {"x": x.numpy()})
        assert list(found) == ["last_state", "layers_0", "layers_1"]
        assert compare(found["layers_1"], (x * 3).numpy()) == 0


def test_outputs_of_a_tuple_keep_the_names_of_the_exporter() -> None:
    class Two(nn.Module):
        def forward(self, x: Any) -> Any:
            return x + 1, torch.tanh(x)

    assert [v.name for v in capture(Two(), (torch.rand(3),)).graph.outputs] == ["add", "tanh"]


class Again(nn.Module):
    """Outputs that are another one, an input, a constant, or called as an input is."""

    def __init__(self, keys: str) -> None:
        super().__init__()
        self.keys = keys
        self.register_buffer("constant", torch.ones(3))

    def forward(self, x: Any) -> Any:
        y = x + 1
        values = (y, y, x, self.constant)
        return dict(zip(self.keys, values)) if self.keys else values


@pytest.mark.parametrize(
    ("keys", "names"),
    [("abcd", ["a", "b", "c", "d"]), ("xyzu", ["x_1", "y", "z", "u"]),
     ("", ["add", "add_1", "x_1", "constant_1"])],
)  # fmt: skip
def test_outputs_that_are_something_else_too(keys: str, names: list[str]) -> None:
    x = torch.rand(3)
    model = capture(Again(keys), (x,))
    assert [v.name for v in model.graph.inputs] == ["x"]
    found = run_onnx(model, {"x": x.numpy()})
    assert list(found) == names
    for value, wanted in zip(found.values(), (x + 1, x + 1, x, torch.ones(3))):
        assert compare(value, wanted.numpy()) < 1e-6


def test_a_tensor_alone_is_the_only_input() -> None:
    model = capture(nn.Linear(4, 3), torch.rand(2, 4))
    assert [tuple(v.shape) for v in model.graph.inputs] == [(2, 4)]


class Branch(nn.Module):
    def forward(self, x: Any) -> Any:
        return x + 1 if x.sum() > 0 else x - 1


def test_a_failure_is_one_message(capfd: pytest.CaptureFixture[str]) -> None:
    """torch.export prints the whole graph where a branch depends on data."""
    with pytest.raises(CaptureError, match=r"'Branch'.*data-dependent.*Fix: choose"):
        capture(Branch(), (torch.randn(3),))
    assert capfd.readouterr() == ("", "")


class Mean(nn.Module):
    """The exporter takes a mean for a replacement."""

    def forward(self, x: Any, index: Any) -> Any:
        y = torch.zeros_like(x).scatter_reduce(0, index, x, "mean", include_self=False)
        return torch.tanh(y)


def test_a_wrong_graph_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = torch.randn(3, 4), torch.zeros(3, 4, dtype=torch.int64)
    assert capture(Mean(), inputs)
    monkeypatch.setattr(decompositions, "TABLE", {})
    at = r"Mean.*differ by .*PyTorch's, first at node '.*' \(ScatterElements\), need <= 1e-04"
    with pytest.raises(VerifyError, match=at):
        capture(Mean(), inputs)
    assert capture(Mean(), inputs, check=False)


class Far(nn.Module):
    """Computes something else when it is exported."""

    def forward(self, x: Any) -> Any:
        return x * (2 if torch.compiler.is_exporting() else 1)


def test_a_program_of_other_outputs_is_refused() -> None:
    with pytest.raises(VerifyError, match=r"Far.*as they do in the program that torch\.export"):
        capture(Far(), (torch.randn(2, 3),))


class Tracing(nn.Module):
    """Runs only where it is exported."""

    def forward(self, x: Any) -> Any:
        return x + 1 if torch.compiler.is_exporting() else x + self.missing


def test_a_module_that_does_not_run() -> None:
    with pytest.raises(CaptureError, match=r"Tracing.*no attribute 'missing'.*runs on its example"):
        capture(Tracing(), (torch.randn(2, 3),))


class Kept(nn.Module):
    """Counts its calls in a buffer, takes its inputs by name, and clears one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))
        self.dropout = nn.Dropout(0.5)

    def forward(self, a: Any, b: Any) -> Any:
        self.calls += 1
        y = self.dropout(a - b) / self.calls.clamp(max=1)
        a.zero_()
        return y


def test_nothing_changes_by_the_comparison() -> None:
    net, inputs = Kept().train(), {"b": torch.rand(3), "a": torch.rand(3) + 2}
    before = {name: x.clone() for name, x in inputs.items()}
    model = capture(net, inputs)
    assert net.calls == 0
    assert net.dropout.training
    for name, x in inputs.items():
        assert torch.equal(x, before[name])
    feed = {name: x.numpy() for name, x in inputs.items()}
    found = next(
        iter(run_onnx(model, {str(v.name): feed[str(v.name)] for v in model.graph.inputs}).values())
    )
    assert compare(found, feed["a"] - feed["b"]) < 1e-6


class Best(nn.Module):
    """The places of the best of values that are nearly all equal."""

    def forward(self, x: Any) -> Any:
        return torch.topk((x * 1e-9 + 1.0).round(), 3).indices + 1


class Noise(nn.Module):
    def forward(self, x: Any) -> Any:
        return x + torch.rand_like(x)


class Rounding(nn.Module):
    """What two orders of one sum round to."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(50, 8))

    def forward(self, x: Any) -> Any:
        return x @ self.w - x.flip(-1) @ self.w.flip(0)


@pytest.mark.parametrize("net", [Best(), Noise(), Rounding()])
def test_what_cannot_be_compared_is_captured(net: Any) -> None:
    x = torch.randn(2, 50)
    assert capture(net, (x,))
    in_training = nn.Sequential(nn.Linear(50, 8), nn.Dropout(0.5)).train()
    assert capture(torch.export.export(in_training, (x,)), ())


def test_coarse_numbers_are_compared_as_such() -> None:
    x = torch.randn(4, 64)
    for dtype in (torch.float16, torch.bfloat16):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)).to(dtype)
        assert capture(net, (x.to(dtype),))
        with pytest.raises(VerifyError):
            capture(Far(), (x.to(dtype),))


def test_a_program_of_any_size_is_compared_at_the_bound_one() -> None:
    size = torch.export.Dim("n", min=2, max=64)
    program = torch.export.export(
        nn.Sequential(nn.Linear(4, 8), nn.ReLU()), (torch.rand(3, 4),), dynamic_shapes=({0: size},)
    )
    free = next(iter(program.range_constraints))
    model = capture(program, (), shapes={str(free): 7})
    assert tuple(model.graph.outputs[0].shape) == (7, 8)


def test_a_wrong_graph_of_another_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    size = torch.export.Dim("n", min=2, max=64)
    inputs = torch.randn(3, 4), torch.zeros(3, 4, dtype=torch.int64)
    program = torch.export.export(Mean(), inputs, dynamic_shapes=({0: size}, {0: size}))
    free = str(next(iter(program.range_constraints)))
    monkeypatch.setattr(decompositions, "TABLE", {})
    with pytest.raises(VerifyError, match="ScatterElements"):
        capture(program, (), shapes={free: 7})
