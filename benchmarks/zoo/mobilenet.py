"""MobileNetV1 (Howard et al. 2017), MobileNetV2 (Sandler et al. 2018), EfficientNet-lite0."""

import onnx

from benchmarks.zoo.builder import Builder

Stage = tuple[int, int, int, int, int]
"""(expansion, channels, repeats, first stride, kernel)."""

V1_BLOCKS = (
    (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2),
    (512, 1), (512, 1), (512, 1), (512, 1), (512, 1), (1024, 2), (1024, 1),
)  # fmt: skip
"""(output channels, stride) of the thirteen separable blocks: table 1 of the paper."""

V2_STAGES = (
    (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 32, 3, 2, 3), (6, 64, 4, 2, 3),
    (6, 96, 3, 1, 3), (6, 160, 3, 2, 3), (6, 320, 1, 1, 3),
)  # fmt: skip
"""Table 2 of the paper."""

LITE0_STAGES = (
    (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5), (6, 192, 4, 2, 5), (6, 320, 1, 1, 3),
)  # fmt: skip
"""EfficientNet-B0's stages without squeeze-and-excitation: the lite variant's definition."""

BRANCH_GAIN = 0.5


def mobilenet_v1(
    size: int = 224, *, batch: int = 1, classes: int = 1000, seed: int = 0
) -> onnx.ModelProto:
    """MobileNetV1 of width 1 with ReLU."""
    b = Builder("mobilenet_v1", seed=seed)
    x = b.conv(b.input("input", (batch, 3, size, size)), "stem.conv", 3, 32, 3, stride=2)
    x = b.relu(b.batch_norm(x, "stem.bn", 32))
    c_in = 32
    for i, (c_out, stride) in enumerate(V1_BLOCKS):
        name = f"blocks.{i}"
        x = b.conv(x, f"{name}.depthwise", c_in, c_in, 3, stride=stride, groups=c_in)
        x = b.relu(b.batch_norm(x, f"{name}.bn1", c_in))
        x = b.conv(x, f"{name}.pointwise", c_in, c_out, 1)
        x = b.relu(b.batch_norm(x, f"{name}.bn2", c_out))
        c_in = c_out
    return _classify(b, x, c_in, classes)


def mobilenet_v2(
    size: int = 224, *, batch: int = 1, classes: int = 1000, seed: int = 0
) -> onnx.ModelProto:
    """MobileNetV2 of width 1 with symmetric padding, as torch exports it."""
    return _inverted("mobilenet_v2", V2_STAGES, size, batch, classes, seed, tensorflow=False)


def efficientnet_lite0(
    size: int = 224, *, batch: int = 1, classes: int = 1000, seed: int = 0
) -> onnx.ModelProto:
    """EfficientNet-lite0 with TensorFlow's padding: uneven where the stride is 2."""
    return _inverted(
        "efficientnet_lite0", LITE0_STAGES, size, batch, classes, seed, tensorflow=True
    )


def _inverted(
    name: str,
    stages: tuple[Stage, ...],
    size: int,
    batch: int,
    classes: int,
    seed: int,
    *,
    tensorflow: bool,
) -> onnx.ModelProto:
    b = Builder(name, seed=seed)
    x = b.input("input", (batch, 3, size, size))
    x = b.conv(x, "stem.conv", 3, 32, 3, stride=2, pads=_pads(3, 2, tensorflow))
    x = b.relu6(b.batch_norm(x, "stem.bn", 32))
    c_in = 32
    for stage, (expansion, c_out, repeats, first_stride, kernel) in enumerate(stages):
        for i in range(repeats):
            stride = 1 if i else first_stride
            pads = _pads(kernel, stride, tensorflow)
            block = f"blocks.{stage}.{i}"
            x = _inverted_block(b, x, block, (c_in, c_out), expansion, kernel, stride, pads)
            c_in = c_out
    x = b.relu6(b.batch_norm(b.conv(x, "head.conv", c_in, 1280, 1), "head.bn", 1280))
    return _classify(b, x, 1280, classes)


def _inverted_block(
    b: Builder,
    x: str,
    name: str,
    channels: tuple[int, int],
    expansion: int,
    kernel: int,
    stride: int,
    pads: list[int],
) -> str:
    c_in, c_out = channels
    hidden = c_in * expansion
    y = x
    if expansion > 1:
        y = b.conv(y, f"{name}.expand", c_in, hidden, 1)
        y = b.relu6(b.batch_norm(y, f"{name}.bn1", hidden))
    y = b.conv(
        y, f"{name}.depthwise", hidden, hidden, kernel, stride=stride, groups=hidden, pads=pads
    )
    y = b.relu6(b.batch_norm(y, f"{name}.bn2", hidden))
    y = b.conv(y, f"{name}.project", hidden, c_out, 1, gain=1.0)
    if stride > 1 or c_in != c_out:
        return b.batch_norm(y, f"{name}.bn3", c_out)
    return b.op("Add", x, b.batch_norm(y, f"{name}.bn3", c_out, gain=BRANCH_GAIN))


def _pads(kernel: int, stride: int, tensorflow: bool) -> list[int]:
    """ONNX pads [top, left, bottom, right] for maps of even size."""
    total = kernel - stride if tensorflow else kernel - 1
    before = total // 2
    return [before, before, total - before, total - before]


def _classify(b: Builder, x: str, c_in: int, classes: int) -> onnx.ModelProto:
    x = b.op("Flatten", b.op("GlobalAveragePool", x), axis=1)
    b.output(b.gemm(x, "classifier", c_in, classes), "output")
    return b.finish()
