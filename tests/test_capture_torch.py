"""Masked weights in every form that exporters emit, through real PyTorch exports."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from sparsegraph.capture import capture
from sparsegraph.compile import compile
from sparsegraph.errors import CaptureError
from sparsegraph.graph import constant
from sparsegraph.pipeline import optimize
from sparsegraph.rewrite import FROM
from sparsegraph.verify import compare, run_onnx

torch = pytest.importorskip("torch")
nn = torch.nn
functional = torch.nn.functional

N_IN, N_OUT = 160, 96  # above 8192 weights: the exporter's own folder gives up there
KEPT = 0.3


def optimized(module: Any, *inputs: Any) -> ir.Model:
    """Capture and optimise; outputs must equal those of the module itself.

    Channels that the masks kill stay, so that the masks can be recognised.
    """
    module.eval()
    result = optimize(capture(module, inputs), skip=("remove_dead_channels",)).model
    names = [str(v.name) for v in result.graph.inputs]
    feed = {n: x.numpy() for n, x in zip(names, inputs, strict=True)}
    (got,) = run_onnx(result, feed).values()
    with torch.no_grad():
        want = module(*inputs).numpy()
    assert compare(got, want) < 1e-4
    return result


def keep_mask(*shape: int) -> Any:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) < KEPT


class Masked(nn.Module):
    """A linear layer whose weight a function computes from parameters and a mask."""

    def __init__(self, weight: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(N_OUT, N_IN))
        self.register_buffer("mask", keep_mask(N_OUT, N_IN))
        self.compute = weight

    def forward(self, x: Any) -> Any:
        return functional.linear(x, self.compute(self.weight, self.mask))


def supermask_top_k(w: Any, m: Any) -> Any:
    score = w.abs().reshape(-1)
    threshold = torch.topk(score, int(score.numel() * KEPT)).values[-1]
    return w * (w.abs() >= threshold).float()


def straight_through(w: Any, m: Any) -> Any:
    soft = torch.sigmoid(w * 4)
    hard = (soft > 0.7).float()
    return w * ((hard - soft).detach() + soft)


WEIGHTS = {
    "float mask": lambda w, m: w * m.float(),
    "mask first": lambda w, m: m.float() * w,
    "bool cast": lambda w, m: m.to(w.dtype) * w,
    "where": lambda w, m: torch.where(m, w, torch.zeros_like(w)),
    "masked_fill": lambda w, m: w.masked_fill(~m, 0.0),
    "threshold": lambda w, m: w * (w.abs() > 1.0).float(),
    "top-k": supermask_top_k,
    "straight-through": straight_through,
    "hard concrete": lambda w, m: w * torch.clamp(torch.sigmoid(w) * 1.2 - 0.7, 0, 1),
}


@pytest.mark.parametrize("form", WEIGHTS)
def test_masked_weight_arrives_as_one_initializer(form: str) -> None:
    module = Masked(WEIGHTS[form])
    model = optimized(module, torch.randn(4, N_IN))
    assert [n.op_type for n in model.graph] in (["Gemm"], ["MatMul"])
    value = model.graph.node(0).inputs[1]
    got = constant(value)
    assert got is not None
    want = module.compute(module.weight, module.mask).detach().numpy()
    got = got if got.shape == want.shape else got.T
    np.testing.assert_array_equal(got == 0, want == 0)
    assert 0.5 < (got == 0).mean() < 0.9
    assert value is not None
    assert "weight" in (str(value.name), *value.metadata_props[FROM].split(","))


def test_torch_prune_and_parametrization_on_three_dimensions() -> None:
    from torch.nn.utils import parametrize, prune

    class Mask(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", keep_mask(N_IN, N_OUT).float())

        def forward(self, w: Any) -> Any:
            return w * self.mask

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(N_IN, N_OUT), nn.ReLU(), nn.Linear(N_OUT, N_IN))
    prune.l1_unstructured(net[0], "weight", 0.8)
    prune.ln_structured(net[0], "weight", 0.25, n=2, dim=0)
    parametrize.register_parametrization(net[2], "weight", Mask())
    model = optimized(net, torch.randn(1, 7, N_IN))
    assert [n.op_type for n in model.graph] == ["MatMul", "Add", "Relu", "MatMul", "Add"]
    first, second = (constant(model.graph.node(i).inputs[1]) for i in (0, 3))
    assert first is not None
    assert second is not None
    assert (first == 0).mean() >= 0.8
    assert (first == 0).all(axis=0).mean() == pytest.approx(0.25)
    np.testing.assert_array_equal(second.T != 0, keep_mask(N_IN, N_OUT).numpy())


def test_masked_convolution_with_batch_norm() -> None:
    from torch.nn.utils import prune

    torch.manual_seed(0)
    conv = nn.Conv2d(16, 64, 3, padding=1, bias=False)
    prune.random_unstructured(conv, "weight", 0.7)
    norm = nn.BatchNorm2d(64)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    model = optimized(nn.Sequential(conv, norm, nn.ReLU()), torch.randn(1, 16, 8, 8))
    assert [n.op_type for n in model.graph] == ["Conv", "Relu"]
    folded = constant(model.graph.node(0).inputs[1])
    assert folded is not None
    assert (folded == 0).mean() == pytest.approx(0.7, abs=0.001)


class Merged(nn.Module):
    """A masked base weight with a low-rank update, merged in the graph, then masked again."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(N_OUT, N_IN))
        self.up, self.down = nn.Parameter(torch.randn(N_OUT, 4)), nn.Parameter(torch.randn(4, N_IN))
        self.register_buffer("mask", keep_mask(N_OUT, N_IN))

    def forward(self, x: Any) -> Any:
        return functional.linear(x, (self.weight + 0.5 * self.up @ self.down) * self.mask)


def test_low_rank_update_is_merged() -> None:
    model = optimized(Merged(), torch.randn(4, N_IN))
    assert len(model.graph) == 1
    value = model.graph.node(0).inputs[1]
    assert value is not None
    sources = value.metadata_props[FROM].split(",")
    assert {"weight", "up", "down", "mask"} <= set(sources)


@pytest.mark.parametrize("epsilon", [1e-7, 1e-8, 1e-12])
def test_epsilon_of_a_masked_mean_survives(epsilon: float) -> None:
    class Mean(nn.Module):
        def forward(self, x: Any, mask: Any) -> Any:
            return (x * mask).sum(1) / (mask.sum(1) + epsilon)

    model = optimized(Mean(), torch.randn(2, 5), torch.zeros(2, 5))
    assert "Add" in [n.op_type for n in model.graph]


class Encoder(nn.Module):
    """Self-attention as torch writes it, with an optional bool mask."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(64, 192)

    def forward(self, x: Any, keep: Any) -> Any:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, 4, 16).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=keep)
        return y.transpose(1, 2).reshape(batch, tokens, 64)


@pytest.mark.parametrize("opset", [18, 23])
def test_attention_arrives_as_one_node(opset: int) -> None:
    x, keep = torch.randn(2, 10, 64), torch.rand(2, 1, 10, 10) < 0.7
    keep[..., 0] = True
    module = Encoder().eval()
    if opset == 23:
        model = capture(module, (x, keep))
    else:
        from sparsegraph.capture import load

        program = torch.onnx.export(
            module, (x, keep), dynamo=True, optimize=False, opset_version=opset, verbose=False
        )
        model = load(program.model_proto)
    result = optimize(model).model
    assert [n.op_type for n in result.graph].count("Attention") == 1
    assert "Softmax" not in [n.op_type for n in result.graph]


def test_exported_program_and_training_state() -> None:
    module = nn.Sequential(nn.Linear(8, 4), nn.Dropout(0.5)).train()
    module[0].eval()
    model = capture(module, (torch.randn(2, 8),))
    assert [part.training for part in module.modules()] == [True, False, True]
    assert "Dropout" not in [n.op_type for n in optimize(model).model.graph]
    program = torch.export.export(module.eval(), (torch.randn(2, 8),))
    assert len(capture(program, ()).graph.inputs) == 1


def test_a_module_that_cannot_be_exported() -> None:
    class Branch(nn.Module):
        def forward(self, x: Any) -> Any:
            return x if x.sum().item() > 0 else -x

    with pytest.raises(CaptureError, match=r"Branch.*Fix: "):
        capture(Branch(), (torch.randn(2),))


def test_no_source_paths_of_this_machine_remain() -> None:
    model = capture(nn.Linear(4, 4), (torch.randn(1, 4),))
    text = str(ir.to_proto(model))
    assert ".py" not in text


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")  # PyTorch: in beta state
@pytest.mark.parametrize("layout", ["csr", "csc", "coo", "bsr"])
def test_weights_of_sparse_layouts(layout: str) -> None:
    """The module is as it was afterwards, and its products are sparse kernels."""

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            mask = torch.rand(16, 1, 32, 1) < 0.2
            blocks = (torch.randn(16, 4, 32, 4) * mask).reshape(64, 128)
            made = {
                "csr": blocks.to_sparse_csr, "csc": blocks.to_sparse_csc, "coo": blocks.to_sparse,
                "bsr": lambda: blocks.to_sparse_bsr((4, 4)),
            }  # fmt: skip
            self.weight = torch.nn.Parameter(made[layout](), requires_grad=False)
            self.register_buffer("again", made[layout]())
            self.plain = blocks.to_sparse_csr()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.sparse.mm(self.plain, x)
            if layout in ("csr", "coo"):
                y = y + torch.sparse.mm(self.again, x)
            return y + self.weight @ x

    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(128, 32)
    with torch.no_grad():
        wanted = net(x).numpy()
    compiled = compile(net, example_inputs=(x,), keep_native=True)
    assert compiled.fallback_nodes == []
    assert {layer["format"] for layer in compiled.manifest.layers} == {"coded"}
    np.testing.assert_allclose(compiled(x.numpy()), wanted, rtol=1e-4, atol=1e-4)
    assert net.weight.layout == net.again.layout != torch.strided
    assert isinstance(net.weight, torch.nn.Parameter)
    assert net.plain.layout == torch.sparse_csr


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
def test_sparse_tensors_of_an_exported_program() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            w = torch.randn(64, 128) * (torch.rand(64, 128) < 0.1)
            self.weight = torch.nn.Parameter(w.to_sparse_csr(), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, self.weight)

    net, x = Net().eval(), torch.randn(32, 128)
    program = torch.export.export(net, (x,))
    compiled = compile(program, example_inputs=(x,), keep_native=True)
    np.testing.assert_allclose(compiled(x.numpy()), net(x).numpy(), rtol=1e-4, atol=1e-5)
    assert program.state_dict["weight"].layout == torch.sparse_csr
