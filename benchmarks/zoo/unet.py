"""U-Net (Ronneberger et al. 2015) with batch norm and padded convolutions, as commonly used."""

import onnx

from benchmarks.zoo.builder import Builder


def unet(size: int = 256, *, width: int = 64, classes: int = 2, seed: int = 0) -> onnx.ModelProto:
    """Four steps down by pooling, four up by ConvTranspose, skips joined by Concat."""
    b = Builder("unet", seed=seed)
    x, channels = b.input("input", (1, 3, size, size)), 3
    skips = []
    for level in range(5):
        if level:
            x = b.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
        x = _twice(b, x, f"down{level}", channels, width << level)
        channels = width << level
        skips.append(x)
    for level in reversed(range(4)):
        half = channels // 2
        weight = b.normal(f"up{level}.weight", (channels, half, 2, 2), channels**-0.5)
        bias = b.normal(f"up{level}.bias", (half,), 0.1)
        x = b.op("ConvTranspose", x, weight, bias, strides=[2, 2], kernel_shape=[2, 2])
        x = _twice(b, b.op("Concat", skips[level], x, axis=1), f"merge{level}", channels, half)
        channels = half
    b.output(b.conv(x, "head", channels, classes, 1, bias=True), "output")
    return b.finish()


def _twice(b: Builder, x: str, name: str, c_in: int, c_out: int) -> str:
    for number, channels in enumerate((c_in, c_out)):
        x = b.conv(x, f"{name}.conv{number}", channels, c_out, 3)
        x = b.relu(b.batch_norm(x, f"{name}.bn{number}", c_out))
    return x
