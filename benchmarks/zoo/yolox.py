"""A detector with the topology of YOLOX (Ge et al. 2021): focus stem, CSP blocks, decoupled head.

Written from the published configuration; normalisation is folded, as the reference exporter does.
"""

import onnx

from benchmarks.zoo.builder import Builder
from benchmarks.zoo.yolo import SILU_GAIN

Level = tuple[str, int]


def yolox(
    size: int = 416, *, width: int = 24, depth: int = 1, classes: int = 80, seed: int = 0
) -> onnx.ModelProto:
    """YOLOX-Tiny by default: stem of 24 channels; out: [1, boxes, 5 + classes], not decoded."""
    b = Builder("yolox", seed=seed)
    x = b.input("images", (1, 3, size, size))
    levels = _pyramid(b, _backbone(b, x, size, width, depth), depth)
    maps = [_head(b, level, i, 4 * width, classes) for i, level in enumerate(levels)]
    b.output(b.transpose(b.op("Concat", *maps, axis=2), 0, 2, 1), "output")
    return b.finish()


def _backbone(b: Builder, x: str, size: int, width: int, depth: int) -> list[Level]:
    corners = [
        b.op("Slice", x, b.ints(i, j), b.ints(size, size), b.ints(2, 3), b.ints(2, 2))
        for j in (0, 1)
        for i in (0, 1)
    ]
    x = _conv(b, b.op("Concat", *corners, axis=1), "backbone.stem", 12, width, 3)
    levels = []
    for stage, repeats in enumerate((1, 3, 3, 1)):
        name = f"backbone.dark{stage + 2}"
        c_in, c_out = width << stage, width << stage + 1
        x = _conv(b, x, f"{name}.0", c_in, c_out, 3, stride=2)
        if stage == 3:
            x = _spp(b, x, f"{name}.spp", c_out)
        x = _csp(b, x, f"{name}.csp", c_out, c_out, repeats * depth, shortcut=stage < 3)
        levels.append((x, c_out))
    return levels[1:]


def _spp(b: Builder, x: str, name: str, channels: int) -> str:
    x = _conv(b, x, f"{name}.conv1", channels, channels // 2, 1)
    pools = [
        b.op("MaxPool", x, kernel_shape=[k, k], strides=[1, 1], pads=[k // 2] * 4)
        for k in (5, 9, 13)
    ]
    return _conv(b, b.op("Concat", x, *pools, axis=1), f"{name}.conv2", 2 * channels, channels, 1)


def _pyramid(b: Builder, levels: list[Level], depth: int) -> list[Level]:
    (p3, c3), (p4, c4), (p5, c5) = levels
    top = _conv(b, p5, "neck.lateral", c5, c4, 1)
    mid = _csp(b, b.op("Concat", _up(b, top), p4, axis=1), "neck.p4", 2 * c4, c4, depth)
    side = _conv(b, mid, "neck.reduce", c4, c3, 1)
    low = _csp(b, b.op("Concat", _up(b, side), p3, axis=1), "neck.p3", 2 * c3, c3, depth)
    down = _conv(b, low, "neck.bu2", c3, c3, 3, stride=2)
    mid = _csp(b, b.op("Concat", down, side, axis=1), "neck.n3", 2 * c3, c4, depth)
    down = _conv(b, mid, "neck.bu1", c4, c4, 3, stride=2)
    high = _csp(b, b.op("Concat", down, top, axis=1), "neck.n4", 2 * c4, c5, depth)
    return [(low, c3), (mid, c4), (high, c5)]


def _head(b: Builder, level: Level, index: int, width: int, classes: int) -> str:
    x, c_in = level
    name = f"head.{index}"
    x = _conv(b, x, f"{name}.stem", c_in, width, 1)
    towers = []
    for part in ("cls", "reg"):
        y = _conv(b, x, f"{name}.{part}.0", width, width, 3)
        towers.append(_conv(b, y, f"{name}.{part}.1", width, width, 3))
    scores = b.conv(towers[0], f"{name}.cls_pred", width, classes, 1, bias=True, gain=1.0)
    boxes = b.conv(towers[1], f"{name}.reg_pred", width, 4, 1, bias=True, gain=1.0)
    sure = b.conv(towers[1], f"{name}.obj_pred", width, 1, 1, bias=True, gain=1.0)
    y = b.op("Concat", boxes, b.op("Sigmoid", sure), b.op("Sigmoid", scores), axis=1)
    return b.reshape(y, 1, 5 + classes, -1)


def _csp(
    b: Builder, x: str, name: str, c_in: int, c_out: int, repeats: int, *, shortcut: bool = False
) -> str:
    half = c_out // 2
    left = _conv(b, x, f"{name}.conv1", c_in, half, 1)
    right = _conv(b, x, f"{name}.conv2", c_in, half, 1)
    for i in range(repeats):
        y = _conv(b, left, f"{name}.m.{i}.conv1", half, half, 1)
        y = _conv(b, y, f"{name}.m.{i}.conv2", half, half, 3, gain=1.0 if shortcut else SILU_GAIN)
        left = b.op("Add", y, left) if shortcut else y
    return _conv(b, b.op("Concat", left, right, axis=1), f"{name}.conv3", c_out, c_out, 1)


def _conv(
    b: Builder, x: str, name: str, c_in: int, c_out: int, kernel: int, *, stride: int = 1,
    gain: float = SILU_GAIN,
) -> str:  # fmt: skip
    y = b.conv(x, name, c_in, c_out, kernel, stride=stride, bias=True, gain=gain)
    return b.op("Mul", y, b.op("Sigmoid", y))


def _up(b: Builder, x: str) -> str:
    return b.op(
        "Resize", x, "", b.constant([1.0, 1.0, 2.0, 2.0]), mode="nearest",
        coordinate_transformation_mode="asymmetric", nearest_mode="floor",
    )  # fmt: skip
