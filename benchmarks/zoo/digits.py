"""A small CNN for 8x8 grey images, the size of scikit-learn's digits: compiles in no time."""

import onnx

from benchmarks.zoo.builder import Builder


def digits_cnn(
    size: int = 8, *, batch: int = 1, classes: int = 10, seed: int = 0
) -> onnx.ModelProto:
    """Two 3x3 convolutions with batch normalisation, a max-pool, two linear layers."""
    b = Builder("digits_cnn", seed=seed)
    x = b.input("input", (batch, 1, size, size))
    x = b.relu(b.batch_norm(b.conv(x, "conv1", 1, 16, 3), "bn1", 16))
    x = b.relu(b.batch_norm(b.conv(x, "conv2", 16, 32, 3), "bn2", 32))
    x = b.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = b.op("Flatten", x, axis=1)
    x = b.relu(b.gemm(x, "fc1", 32 * (size // 2) ** 2, 64, gain=2**0.5))
    b.output(b.gemm(x, "fc2", 64, classes), "output")
    return b.finish()
