"""Single layers: a linear layer and a convolution, the units of the kernel benchmarks."""

import onnx

from benchmarks.zoo.builder import Builder


def gemm(m: int = 384, k: int = 768, n: int = 3072, *, seed: int = 0) -> onnx.ModelProto:
    """y[m, n] = x[m, k] W^T + b."""
    b = Builder(f"gemm_{m}x{k}x{n}", seed=seed)
    x = b.input("input", (m, k))
    b.output(b.gemm(x, "linear", k, n), "output")
    return b.finish()


def conv(
    c_in: int = 256,
    c_out: int = 256,
    kernel: int = 3,
    size: int = 14,
    *,
    stride: int = 1,
    groups: int = 1,
    batch: int = 1,
    seed: int = 0,
) -> onnx.ModelProto:
    """One convolution with bias over a [batch, c_in, size, size] map."""
    b = Builder(f"conv_{kernel}x{kernel}_{size}_{c_in}_{c_out}", seed=seed)
    x = b.input("input", (batch, c_in, size, size))
    y = b.conv(x, "conv", c_in, c_out, kernel, stride=stride, groups=groups, bias=True)
    b.output(y, "output")
    return b.finish()
