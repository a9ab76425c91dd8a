"""A detector with the topology of YOLOv8n: C2f blocks, SPPF, a two-way pyramid, a decoupled head.

Written from the published configuration (depth 0.33, width 0.25); normalisation is folded into the
convolutions, as the reference exporter does, and boxes are decoded in the graph.
"""

import numpy as np
import onnx
from numpy.typing import NDArray

from benchmarks.zoo.builder import Builder

SILU_GAIN = 1.68
"""1 / sqrt(E[silu(z)^2]) for standard normal z."""

STRIDES = (8, 16, 32)
N_BINS = 16
"""Bins of the distribution that each box side is read from."""

BOX_WIDTH = 64
Level = tuple[str, int]
"""A feature map and its channel count."""


def yolov8n(
    size: int = 640, *, batch: int = 1, classes: int = 80, seed: int = 0
) -> onnx.ModelProto:
    """The detector for square images whose side is a multiple of 32; out: [batch, 4+classes, n]."""
    b = Builder("yolov8n", seed=seed)
    x = b.input("images", (batch, 3, size, size))
    levels = _pyramid(b, *_backbone(b, x))
    maps = [
        b.reshape(_head(b, level, i, classes), batch, 4 * N_BINS + classes, -1)
        for i, level in enumerate(levels)
    ]
    both = b.op("Concat", *maps, axis=2)
    sides, scores = b.op_n(2, "Split", both, b.ints(4 * N_BINS, classes), axis=1)
    boxes = _decode(b, sides, size, batch)
    b.output(b.op("Concat", boxes, b.op("Sigmoid", scores), axis=1), "output0")
    return b.finish()


def _backbone(b: Builder, x: str) -> tuple[Level, Level, Level]:
    x = _conv(b, x, "model.0", 3, 16, 3, stride=2)
    x = _conv(b, x, "model.1", 16, 32, 3, stride=2)
    x = _c2f(b, x, "model.2", 32, 32, 1, shortcut=True)
    x = _conv(b, x, "model.3", 32, 64, 3, stride=2)
    p3 = x = _c2f(b, x, "model.4", 64, 64, 2, shortcut=True)
    x = _conv(b, x, "model.5", 64, 128, 3, stride=2)
    p4 = x = _c2f(b, x, "model.6", 128, 128, 2, shortcut=True)
    x = _conv(b, x, "model.7", 128, 256, 3, stride=2)
    x = _c2f(b, x, "model.8", 256, 256, 1, shortcut=True)
    return (p3, 64), (p4, 128), (_sppf(b, x, "model.9", 256), 256)


def _pyramid(b: Builder, p3: Level, p4: Level, p5: Level) -> tuple[Level, Level, Level]:
    up = b.op("Concat", _upsample(b, p5[0]), p4[0], axis=1)
    mid = _c2f(b, up, "model.12", 384, 128, 1, shortcut=False)
    up = b.op("Concat", _upsample(b, mid), p3[0], axis=1)
    small = _c2f(b, up, "model.15", 192, 64, 1, shortcut=False)
    down = b.op("Concat", _conv(b, small, "model.16", 64, 64, 3, stride=2), mid, axis=1)
    mid = _c2f(b, down, "model.18", 192, 128, 1, shortcut=False)
    down = b.op("Concat", _conv(b, mid, "model.19", 128, 128, 3, stride=2), p5[0], axis=1)
    large = _c2f(b, down, "model.21", 384, 256, 1, shortcut=False)
    return (small, 64), (mid, 128), (large, 256)


def _head(b: Builder, level: Level, index: int, classes: int) -> str:
    x, c_in = level
    towers = []
    for branch, width, c_out in (
        ("cv2", BOX_WIDTH, 4 * N_BINS),
        ("cv3", max(64, classes), classes),
    ):
        name = f"model.22.{branch}.{index}"
        y = _conv(b, x, f"{name}.0", c_in, width, 3)
        y = _conv(b, y, f"{name}.1", width, width, 3)
        towers.append(b.conv(y, f"{name}.2", width, c_out, 1, bias=True, gain=SILU_GAIN))
    return b.op("Concat", *towers, axis=1)


def _decode(b: Builder, sides: str, size: int, batch: int) -> str:
    """Distances to four sides -> centre and size in pixels."""
    centres, strides = _anchors(size)
    x = b.transpose(b.reshape(sides, batch, 4, N_BINS, -1), 0, 2, 1, 3)
    bins = np.arange(N_BINS, dtype=np.float32).reshape(1, N_BINS, 1, 1)
    weight = b.weight("model.22.dfl.conv.weight", bins)
    x = b.op("Conv", b.op("Softmax", x, axis=1), weight, kernel_shape=[1, 1])
    x = b.reshape(x, batch, 4, -1)
    near = b.op("Slice", x, b.ints(0), b.ints(2), b.ints(1))
    far = b.op("Slice", x, b.ints(2), b.ints(4), b.ints(1))
    low = b.op("Sub", b.constant(centres), near)
    high = b.op("Add", b.constant(centres), far)
    middle = b.op("Div", b.op("Add", low, high), b.constant(2.0))
    boxes = b.op("Concat", middle, b.op("Sub", high, low), axis=1)
    return b.op("Mul", boxes, b.constant(strides))


def _anchors(size: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cell centres [1, 2, n] and strides [1, n] of all levels, in cells and pixels."""
    centres, strides = [], []
    for stride in STRIDES:
        n = size // stride
        y, x = np.mgrid[0:n, 0:n] + 0.5
        centres.append(np.stack([x.ravel(), y.ravel()]))
        strides.append(np.full(n * n, stride))
    return (
        np.concatenate(centres, axis=1)[None].astype(np.float32),
        np.concatenate(strides)[None].astype(np.float32),
    )


def _conv(
    b: Builder, x: str, name: str, c_in: int, c_out: int, kernel: int, stride: int = 1
) -> str:
    y = b.conv(x, f"{name}.conv", c_in, c_out, kernel, stride=stride, bias=True, gain=SILU_GAIN)
    return b.op("Mul", y, b.op("Sigmoid", y))


def _c2f(
    b: Builder, x: str, name: str, c_in: int, c_out: int, repeats: int, *, shortcut: bool
) -> str:
    half = c_out // 2
    y = _conv(b, x, f"{name}.cv1", c_in, c_out, 1)
    parts = b.op_n(2, "Split", y, b.ints(half, half), axis=1)
    for i in range(repeats):
        z = _conv(b, parts[-1], f"{name}.m.{i}.cv1", half, half, 3)
        z = _conv(b, z, f"{name}.m.{i}.cv2", half, half, 3)
        parts.append(b.op("Add", parts[-1], z) if shortcut else z)
    merged = b.op("Concat", *parts, axis=1)
    return _conv(b, merged, f"{name}.cv2", half * len(parts), c_out, 1)


def _sppf(b: Builder, x: str, name: str, channels: int) -> str:
    parts = [_conv(b, x, f"{name}.cv1", channels, channels // 2, 1)]
    for _ in range(3):
        parts.append(
            b.op("MaxPool", parts[-1], kernel_shape=[5, 5], strides=[1, 1], pads=[2, 2, 2, 2])
        )
    merged = b.op("Concat", *parts, axis=1)
    return _conv(b, merged, f"{name}.cv2", 2 * channels, channels, 1)


def _upsample(b: Builder, x: str) -> str:
    return b.op(
        "Resize",
        x,
        "",
        b.constant([1.0, 1.0, 2.0, 2.0]),
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )
