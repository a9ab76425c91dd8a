"""A decoder of the Llama family: RMS norm, rotary positions, grouped queries, gated MLP.

RMS norm and rotation are written in single operators, as exporters do below opset 23.
"""

import numpy as np
import onnx
from onnx import TensorProto

from benchmarks.zoo.builder import Builder


def decoder(
    tokens: int = 64, *, width: int = 512, heads: int = 8, kv_heads: int = 2, layers: int = 2,
    vocabulary: int = 8000, tied: bool = False, seed: int = 0,
) -> onnx.ModelProto:  # fmt: skip
    """Token ids in, logits out. `tied`: the output matrix is the embedding's transpose."""
    b = Builder("decoder", seed=seed)
    ids = b.input("ids", (1, tokens), TensorProto.INT64)
    table = b.normal("embedding", (vocabulary, width), 1.0)
    x = b.op("Gather", table, ids)
    for i in range(layers):
        x = _layer(b, x, f"layers.{i}", (tokens, width, heads, kv_heads))
    x = _norm(b, x, "norm", width)
    head = b.transpose(table, 1, 0) if tied else b.normal("head", (width, vocabulary), width**-0.5)
    b.output(b.op("MatMul", x, head), "logits")
    return b.finish()


def _norm(b: Builder, x: str, name: str, width: int) -> str:
    mean = b.op("ReduceMean", b.op("Pow", x, b.constant(2.0)), axes=[-1], keepdims=1)
    root = b.op("Sqrt", b.op("Add", mean, b.constant(1e-6)))
    return b.op("Mul", b.op("Div", x, root), b.uniform(f"{name}.weight", (width,), 0.8, 1.2))


def _linear(b: Builder, x: str, name: str, n_in: int, n_out: int, gain: float = 1.0) -> str:
    return b.op("MatMul", x, b.normal(f"{name}.weight", (n_in, n_out), gain * n_in**-0.5))


def _rotate(b: Builder, x: str, tokens: int, size: int) -> str:
    angles = np.arange(tokens)[:, None] * 1e4 ** (-np.arange(size // 2) / (size // 2))
    both = np.concatenate([angles, angles], axis=1).astype(np.float32)
    low = b.op("Slice", x, b.ints(0), b.ints(size // 2), b.ints(3))
    high = b.op("Slice", x, b.ints(size // 2), b.ints(size), b.ints(3))
    turned = b.op("Concat", b.op("Neg", high), low, axis=3)
    straight = b.op("Mul", x, b.constant(np.cos(both)))
    return b.op("Add", straight, b.op("Mul", turned, b.constant(np.sin(both))))


def _layer(b: Builder, x: str, name: str, sizes: tuple[int, int, int, int]) -> str:
    tokens, width, heads, kv_heads = sizes
    size = width // heads

    def split(part: str, n: int) -> str:
        y = _linear(b, h, f"{name}.{part}", width, n * size)
        return b.transpose(b.reshape(y, 1, tokens, n, size), 0, 2, 1, 3)

    def repeat(v: str) -> str:
        v = b.op("Unsqueeze", v, b.ints(2))
        v = b.op("Expand", v, b.ints(1, kv_heads, heads // kv_heads, tokens, size))
        return b.reshape(v, 1, heads, tokens, size)

    h = _norm(b, x, f"{name}.norm1", width)
    q, k, v = split("q", heads), split("k", kv_heads), split("v", kv_heads)
    q, k = _rotate(b, q, tokens, size), repeat(_rotate(b, k, tokens, size))
    scores = b.op("MatMul", q, b.transpose(k, 0, 1, 3, 2))
    causal = np.triu(np.full((tokens, tokens), -1e9, np.float32), 1)
    scores = b.op("Add", b.op("Mul", scores, b.constant(size**-0.5)), b.constant(causal))
    y = b.op("MatMul", b.op("Softmax", scores, axis=-1), repeat(v))
    y = b.reshape(b.transpose(y, 0, 2, 1, 3), 1, tokens, heads * size)
    x = b.op("Add", x, _linear(b, y, f"{name}.o", heads * size, width, 0.5))
    h, hidden = _norm(b, x, f"{name}.norm2", width), 4 * width
    gate = _linear(b, h, f"{name}.gate", width, hidden)
    gate = b.op("Mul", gate, b.op("Sigmoid", gate))
    h = b.op("Mul", gate, _linear(b, h, f"{name}.up", width, hidden))
    return b.op("Add", x, _linear(b, h, f"{name}.down", hidden, width, 0.5))
