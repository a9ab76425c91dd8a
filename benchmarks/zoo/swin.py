"""Swin Transformer (Liu et al. 2021): attention in shifted windows, patches merged between stages.

Windows are cut by Reshape and Transpose, shifts are Slice and Concat, as exporters write them.
"""

import numpy as np
import onnx
from numpy.typing import NDArray

from benchmarks.zoo.builder import Builder

WINDOW = 7
MASKED = -100.0
"""What the reference code adds to scores across the border of a shifted map."""


def swin_tiny(
    size: int = 224, *, classes: int = 1000, depths: tuple[int, ...] = (2, 2, 6, 2), seed: int = 0
) -> onnx.ModelProto:
    """Swin-T: width 96 and 3 heads, doubled at every stage."""
    b = Builder("swin_tiny", seed=seed)
    width, heads, side = 96, 3, size // 4
    x = b.input("input", (1, 3, size, size))
    x = b.conv(x, "patch_embed", 3, width, 4, stride=4, bias=True, gain=1.0, pads=[0] * 4)
    x = b.transpose(x, 0, 2, 3, 1)
    x = b.layer_norm(x, "patch_norm", width, epsilon=1e-5)
    for stage, depth in enumerate(depths):
        if stage:
            x = _merge(b, x, f"merge{stage}", side, width)
            side, width, heads = side // 2, 2 * width, 2 * heads
        for i in range(depth):
            shift = WINDOW // 2 if i % 2 and side > WINDOW else 0
            x = _block(b, x, f"stage{stage}.{i}", (side, width, heads, shift))
    x = b.layer_norm(x, "norm", width, epsilon=1e-5)
    x = b.op("ReduceMean", x, axes=[1, 2], keepdims=0)
    b.output(b.gemm(x, "head", width, classes), "output")
    return b.finish()


def _block(b: Builder, x: str, name: str, sizes: tuple[int, int, int, int]) -> str:
    side, width, heads, shift = sizes
    depth, area, n = width // heads, WINDOW * WINDOW, side // WINDOW
    h = _roll(b, b.layer_norm(x, f"{name}.norm1", width, epsilon=1e-5), shift)
    h = b.transpose(b.reshape(h, 1, n, WINDOW, n, WINDOW, width), 0, 1, 3, 2, 4, 5)
    h = b.linear(b.reshape(h, n * n, area, width), f"{name}.qkv", width, 3 * width)
    h = b.transpose(b.reshape(h, n * n, area, 3, heads, depth), 2, 0, 3, 1, 4)
    q, k, v = (b.op("Gather", h, b.constant(i, np.int64), axis=0) for i in range(3))
    scores = b.op("MatMul", b.op("Mul", q, b.constant(depth**-0.5)), b.transpose(k, 0, 1, 3, 2))
    scores = b.op("Add", scores, b.normal(f"{name}.relative", (1, heads, area, area), 0.5))
    if shift:
        scores = b.op("Add", scores, b.constant(_border(side, shift)))
    y = b.transpose(b.op("MatMul", b.op("Softmax", scores, axis=-1), v), 0, 2, 1, 3)
    y = b.linear(b.reshape(y, n * n, area, width), f"{name}.proj", width, width, gain=0.5)
    y = b.transpose(b.reshape(y, 1, n, n, WINDOW, WINDOW, width), 0, 1, 3, 2, 4, 5)
    x = b.op("Add", x, _roll(b, b.reshape(y, 1, side, side, width), -shift))
    h = b.layer_norm(x, f"{name}.norm2", width, epsilon=1e-5)
    h = b.gelu(b.linear(h, f"{name}.fc1", width, 4 * width))
    return b.op("Add", x, b.linear(h, f"{name}.fc2", 4 * width, width, gain=0.5))


def _roll(b: Builder, x: str, shift: int) -> str:
    """[1, side, side, width] turned around by `shift` along both map axes."""
    end = np.iinfo(np.int64).max
    for axis in (1, 2) if shift else ():
        after = b.op("Slice", x, b.ints(shift), b.ints(end), b.ints(axis))
        before = b.op("Slice", x, b.ints(0), b.ints(shift), b.ints(axis))
        x = b.op("Concat", after, before, axis=axis)
    return x


def _merge(b: Builder, x: str, name: str, side: int, width: int) -> str:
    """Every 2x2 patch becomes one of twice the width."""
    corners = [
        b.op("Slice", x, b.ints(i, j), b.ints(side, side), b.ints(1, 2), b.ints(2, 2))
        for j in (0, 1)
        for i in (0, 1)
    ]
    x = b.layer_norm(b.op("Concat", *corners, axis=3), f"{name}.norm", 4 * width, epsilon=1e-5)
    weight = b.normal(f"{name}.weight", (4 * width, 2 * width), (4 * width) ** -0.5)
    return b.op("MatMul", x, weight)


def _border(side: int, shift: int) -> NDArray[np.float32]:
    """[windows, 1, area, area]: points that came from opposite sides do not see each other."""
    region = np.zeros((side, side), np.int64)
    stretches = (slice(0, -WINDOW), slice(-WINDOW, -shift), slice(-shift, None))
    for number, (rows, columns) in enumerate((r, c) for r in stretches for c in stretches):
        region[rows, columns] = number
    n = side // WINDOW
    windows = region.reshape(n, WINDOW, n, WINDOW).swapaxes(1, 2).reshape(n * n, WINDOW**2)
    apart = windows[:, :, None] != windows[:, None, :]
    return np.where(apart, np.float32(MASKED), np.float32(0))[:, None]
