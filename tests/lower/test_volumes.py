"""Networks over volumes run natively and agree with PyTorch."""

from typing import Any

import pytest

torch = pytest.importorskip("torch")
from sparsegraph import verify  # noqa: E402
from sparsegraph.compile import Compiled, compile  # noqa: E402

nn = torch.nn


def compiled(module: nn.Module, x: Any, density: float = 1.0, target: str = "native") -> Compiled:
    """Pruned at random, compiled and compared; nothing is left to ONNX Runtime."""
    torch.manual_seed(0)
    module.eval()
    with torch.no_grad():
        for p in module.parameters():
            p *= torch.rand_like(p) < density if p.ndim > 1 else 1
        want = module(x).numpy()
    result = compile(module, target, example_inputs=(x,), keep_native=True)
    assert not result.fallback_nodes
    (name,) = (i.name for i in result.session.get_inputs())
    found = result.run(None, {name: x.numpy()})[0]
    assert verify.compare(found, want) < 1e-5
    return result


CONVOLUTIONS = [  # channels, features, kernel, stride, padding, dilation, groups, axes
    (3, 8, 3, 1, 1, 1, 1, (5, 9, 7)),
    (3, 8, (3, 7, 7), (1, 2, 2), (1, 3, 3), 1, 1, (4, 20, 20)),
    (16, 32, 3, 2, 1, 1, 1, (4, 9, 10)),
    (16, 32, (3, 1, 1), 1, (1, 0, 0), 1, 1, (5, 7, 7)),
    (16, 32, (1, 3, 3), 1, (0, 1, 1), 1, 1, (5, 7, 7)),
    (8, 12, (2, 3, 4), (1, 2, 1), (0, 1, 2), (2, 1, 2), 4, (6, 11, 9)),
    (3, 24, (2, 4, 4), (2, 4, 4), 0, 1, 1, (4, 16, 12)),
    (3, 24, (4, 1, 1), (4, 1, 1), 0, 1, 1, (8, 3, 5)),
    (16, 16, 1, 1, 0, 1, 1, (4, 5, 6)),
    (16, 16, (4, 3, 3), 1, (0, 1, 1), 1, 1, (4, 5, 6)),
    (16, 16, 3, 1, 1, 1, 1, (1, 5, 6)),
    (12, 12, 3, 1, 1, 1, 12, (4, 6, 9)),
    (12, 12, (5, 3, 3), (1, 2, 2), (2, 1, 1), 1, 12, (4, 6, 9)),
]


@pytest.mark.parametrize(("density", "batch"), [(1.0, 2), (0.2, 1)])
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_convolutions(case: tuple, density: float, batch: int) -> None:
    *options, axes = case
    compiled(nn.Conv3d(*options), torch.randn(batch, case[0], *axes), density)


@pytest.mark.parametrize("target", ["x86-64-v2", "x86-64-v3"])
def test_convolutions_for_other_machines(target: str) -> None:
    net = nn.Sequential(nn.Conv3d(5, 9, 3, padding=1), nn.ReLU(), nn.Conv3d(9, 6, 3, 2))
    compiled(net, torch.randn(2, 5, 4, 9, 11), 0.3, target)


class Unet(nn.Module):
    """Two levels of a U-Net over volumes, as for medical images."""

    def __init__(self, norm: Any, up: nn.Module) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv3d(2, 16, 3, padding=1), norm(16), nn.LeakyReLU(0.1))
        self.down = nn.Sequential(
            nn.Conv3d(16, 24, 3, 2, 1), norm(24), nn.ReLU(), nn.Conv3d(24, 24, 3, 1, 1), nn.ReLU()
        )
        self.up = up
        self.last = nn.Sequential(nn.LazyConv3d(16, 3, padding=1), nn.ReLU(), nn.Conv3d(16, 4, 1))

    def forward(self, x: Any) -> Any:
        x = self.first(x)
        y = torch.cat([x, self.up(self.down(x))], dim=1)
        return self.last(nn.functional.max_pool3d(y, 2)).softmax(1)


@pytest.mark.parametrize(
    ("norm", "up"),
    [
        (nn.BatchNorm3d, nn.ConvTranspose3d(24, 16, 2, 2)),
        (lambda n: nn.GroupNorm(4, n), nn.Upsample(scale_factor=2, mode="trilinear")),
        (lambda n: nn.InstanceNorm3d(n, affine=True), nn.Upsample(scale_factor=2, mode="nearest")),
    ],
    ids=["batch", "group", "instance"],
)
def test_unets(norm: Any, up: nn.Module) -> None:
    x = torch.randn(1, 2, 8, 12, 14)
    net = Unet(norm, up)
    net(x)
    compiled(net, x, 0.3)


class Block(nn.Module):
    """A block of X3D: expansion, depthwise with a squeeze, projection, residual."""

    def __init__(self) -> None:
        super().__init__()
        self.open = nn.Sequential(nn.Conv3d(12, 27, 1), nn.BatchNorm3d(27), nn.ReLU())
        self.wide = nn.Sequential(
            nn.Conv3d(27, 27, 3, 1, 1, groups=27, bias=False), nn.BatchNorm3d(27)
        )
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool3d(1),
            nn.Conv3d(27, 8, 1),
            nn.ReLU(),
            nn.Conv3d(8, 27, 1),
            nn.Sigmoid(),
        )
        self.close = nn.Sequential(nn.SiLU(), nn.Conv3d(27, 12, 1), nn.BatchNorm3d(12))

    def forward(self, x: Any) -> Any:
        y = self.wide(self.open(x))
        return torch.relu(x + self.close(y * self.squeeze(y)))


def test_inverted_residuals() -> None:
    net = nn.Sequential(Block(), nn.AvgPool3d((2, 3, 3), (1, 2, 2), (0, 1, 1)), Block())
    compiled(net, torch.randn(1, 12, 4, 10, 9), 0.3)
    compiled(net, torch.randn(2, 12, 4, 10, 9), 0.3)


def test_sparse_weights_skip_their_zeros() -> None:
    """A tenth of the weights is computed with, as the manifest says."""
    result = compiled(nn.Conv3d(64, 64, 3, padding=1), torch.randn(1, 64, 4, 14, 14), 0.1)
    (segment,) = result.manifest.segments
    (step,) = (s for s in segment.steps if s.dense_flops)
    assert 0.08 < step.flops / step.dense_flops < 0.12
