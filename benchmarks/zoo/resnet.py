"""ResNet-18 and ResNet-50 (He et al. 2015), with the stride in the 3x3 as torchvision has it."""

from collections.abc import Callable

import onnx

from benchmarks.zoo.builder import Builder

BRANCH_GAIN = 0.25
"""Scale of the last normalisation of a residual branch: sixteen additions stay of order one."""

Block = Callable[[Builder, str, str, int, int, int], str]
"""(builder, input, name, input channels, width, stride) -> output."""


def resnet18(
    size: int = 224, *, batch: int = 1, classes: int = 1000, seed: int = 0
) -> onnx.ModelProto:
    """ResNet-18: two 3x3 convolutions per block."""
    return _resnet("resnet18", _basic, 1, (2, 2, 2, 2), size, batch, classes, seed)


def resnet50(
    size: int = 224, *, batch: int = 1, classes: int = 1000, seed: int = 0
) -> onnx.ModelProto:
    """ResNet-50: 1x1, 3x3, 1x1 bottlenecks."""
    return _resnet("resnet50", _bottleneck, 4, (3, 4, 6, 3), size, batch, classes, seed)


def _resnet(
    name: str,
    block: Block,
    expansion: int,
    depths: tuple[int, ...],
    size: int,
    batch: int,
    classes: int,
    seed: int,
) -> onnx.ModelProto:
    b = Builder(name, seed=seed)
    x = b.input("input", (batch, 3, size, size))
    x = b.conv(x, "conv1", 3, 64, 7, stride=2)
    x = b.relu(b.batch_norm(x, "bn1", 64))
    x = b.op("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    c_in = 64
    for stage, depth in enumerate(depths):
        width = 64 << stage
        for i in range(depth):
            stride = 2 if stage and not i else 1
            x = block(b, x, f"layer{stage + 1}.{i}", c_in, width, stride)
            c_in = width * expansion
    x = b.op("Flatten", b.op("GlobalAveragePool", x), axis=1)
    b.output(b.gemm(x, "fc", c_in, classes), "output")
    return b.finish()


def _basic(b: Builder, x: str, name: str, c_in: int, width: int, stride: int) -> str:
    y = b.conv(x, f"{name}.conv1", c_in, width, 3, stride=stride)
    y = b.relu(b.batch_norm(y, f"{name}.bn1", width))
    y = b.conv(y, f"{name}.conv2", width, width, 3)
    y = b.batch_norm(y, f"{name}.bn2", width, gain=BRANCH_GAIN)
    return b.relu(b.op("Add", y, _shortcut(b, x, name, c_in, width, stride)))


def _bottleneck(b: Builder, x: str, name: str, c_in: int, width: int, stride: int) -> str:
    y = b.relu(b.batch_norm(b.conv(x, f"{name}.conv1", c_in, width, 1), f"{name}.bn1", width))
    y = b.conv(y, f"{name}.conv2", width, width, 3, stride=stride)
    y = b.relu(b.batch_norm(y, f"{name}.bn2", width))
    y = b.conv(y, f"{name}.conv3", width, 4 * width, 1)
    y = b.batch_norm(y, f"{name}.bn3", 4 * width, gain=BRANCH_GAIN)
    return b.relu(b.op("Add", y, _shortcut(b, x, name, c_in, 4 * width, stride)))


def _shortcut(b: Builder, x: str, name: str, c_in: int, c_out: int, stride: int) -> str:
    if c_in == c_out and stride == 1:
        return x
    y = b.conv(x, f"{name}.downsample.0", c_in, c_out, 1, stride=stride, gain=1.0)
    return b.batch_norm(y, f"{name}.downsample.1", c_out)
