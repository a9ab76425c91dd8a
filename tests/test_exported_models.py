"""Norms, rotary attention and recurrences as torch.onnx.export(dynamo=True) writes them."""

import io
import warnings
from collections import Counter
from typing import Any

import onnx
import pytest

from sparsegraph.capture import load
from sparsegraph.compile import compile
from sparsegraph.pipeline import optimize

torch = pytest.importorskip("torch")
nn = torch.nn


class Reader(nn.Module):
    """A text recogniser: maps, then a sequence."""

    def __init__(self, recurrence: Any) -> None:
        super().__init__()
        self.maps = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.SiLU(), nn.MaxPool2d((4, 2))
        )
        self.sequence = recurrence(32, 24, bidirectional=True, batch_first=True)
        self.head = nn.Linear(48, 10)
        nn.init.normal_(self.maps[1].weight)

    def forward(self, x: Any) -> Any:
        y = self.maps(x)
        n, c, h, w = y.shape
        return self.head(self.sequence(y.permute(0, 3, 1, 2).reshape(n, w, c * h))[0])


class Decoder(nn.Module):
    """One block of a decoder: root mean squares, rotated queries and keys, shared heads."""

    def __init__(self, width: int = 32, heads: int = 4, shared: int = 2) -> None:
        super().__init__()
        self.heads, self.shared, self.size = heads, shared, width // heads
        self.gain = nn.Parameter(torch.rand(width) + 0.5)
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * shared * self.size, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def norm(self, x: Any) -> Any:
        return self.gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    def rotated(self, x: Any) -> Any:
        places = torch.arange(x.shape[2]).float()
        speeds = 100 ** (-torch.arange(0, self.size, 2).float() / self.size)
        angle = torch.cat([places[:, None] * speeds] * 2, -1)
        a, b = x.chunk(2, -1)
        return x * angle.cos() + torch.cat((-b, a), -1) * angle.sin()

    def forward(self, x: Any) -> Any:
        n, t, _ = x.shape
        y = self.norm(x)
        q = self.q(y).view(n, t, self.heads, self.size).transpose(1, 2)
        k, v = self.kv(y).view(n, t, 2 * self.shared, self.size).transpose(1, 2).chunk(2, 1)
        k, v = (z.repeat_interleave(self.heads // self.shared, 1) for z in (self.rotated(k), v))
        mask = torch.full((t, t), float("-inf")).triu(1)
        scores = self.rotated(q) @ k.transpose(2, 3) * self.size**-0.5 + mask
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(n, t, -1)
        return self.norm(x + self.out(y))


def exported(module: Any, x: Any) -> onnx.ModelProto:
    """As a user gets it, four fifths of the weights zero."""
    chance = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            parameter.data *= torch.rand(parameter.shape, generator=chance) > 0.8
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(module.eval(), (x,), dynamo=True, verbose=False)
    file = io.BytesIO()
    program.save(file)
    return onnx.load_model_from_string(file.getvalue())


@pytest.mark.parametrize(
    ("make", "shape", "ops"),
    [
        (lambda: Reader(nn.LSTM), (1, 1, 8, 40), {"GroupNormalization": 1, "LSTM": 1}),
        (lambda: Reader(nn.GRU), (2, 1, 8, 40), {"GroupNormalization": 1, "GRU": 1}),
        (Decoder, (1, 12, 32), {"RMSNormalization": 2, "Attention": 1, "ReduceMean": 0}),
    ],
)
def test_nothing_is_left_to_onnx_runtime(make: Any, shape: Any, ops: dict[str, int]) -> None:
    torch.manual_seed(0)
    proto = exported(make(), torch.randn(shape))
    found = Counter(node.op_type for node in optimize(load(proto)).model.graph)
    assert {op: found[op] for op in ops} == ops
    made = compile(proto, keep_native=True, fallback=False)
    assert made.manifest.verification["max_rel_error"] <= 1e-5
