"""MiniLM-L6 (a BERT encoder, Wang et al. 2020) and DeiT (Touvron et al. 2021).

Nodes are the ones that exporters emit from the public model code: linear layers as MatMul + Add,
attention as plain matrix products, exact GELU in five nodes, the mask as an additive bias.
"""

import math

import numpy as np
import onnx
from onnx import TensorProto

from benchmarks.zoo.builder import Builder

MASKED_BIAS = -10000.0
"""What BERT's code adds to a masked score: finite, so a fully masked row attends evenly."""

MINILM_VOCABULARY = 30522
MINILM_POSITIONS = 512


def minilm(
    sequence: int = 128,
    *,
    batch: int = 1,
    layers: int = 6,
    token_types: bool = True,
    seed: int = 0,
) -> onnx.ModelProto:
    """BERT encoder of width 384 with 12 heads: token ids and mask in, last hidden state out."""
    b = Builder("minilm", seed=seed)
    width, heads = 384, 12
    shape = (batch, sequence)
    ids = b.input("input_ids", shape, TensorProto.INT64)
    mask = b.input("attention_mask", shape, TensorProto.INT64)
    types = b.input("token_type_ids", shape, TensorProto.INT64) if token_types else None
    x = _embed(b, ids, types, sequence, width)
    bias = _mask_bias(b, mask)
    for i in range(layers):
        x = _bert_layer(b, x, bias, f"encoder.layer.{i}", (batch, sequence, heads, width))
    b.output(x, "last_hidden_state")
    return b.finish()


def deit_tiny(
    size: int = 224, *, batch: int = 1, classes: int = 1000, seed: int = 0
) -> onnx.ModelProto:
    """DeiT-Tiny: width 192, 3 heads."""
    return _deit("deit_tiny", 192, 3, size, batch, classes, seed)


def deit_small(
    size: int = 224, *, batch: int = 1, classes: int = 1000, seed: int = 0
) -> onnx.ModelProto:
    """DeiT-Small: width 384, 6 heads."""
    return _deit("deit_small", 384, 6, size, batch, classes, seed)


def _embed(b: Builder, ids: str, types: str | None, sequence: int, width: int) -> str:
    words = b.normal("embeddings.word_embeddings.weight", (MINILM_VOCABULARY, width), 1.0)
    places = b.normal("embeddings.position_embeddings.weight", (MINILM_POSITIONS, width), 0.3)
    kinds = b.normal("embeddings.token_type_embeddings.weight", (2, width), 0.3)
    kind_ids = types or b.constant(np.zeros((1, sequence)), np.int64)
    x = b.op("Add", b.op("Gather", words, ids), b.op("Gather", kinds, kind_ids))
    position_ids = b.constant(np.arange(sequence)[None], np.int64)
    x = b.op("Add", x, b.op("Gather", places, position_ids))
    return b.layer_norm(x, "embeddings.LayerNorm", width, epsilon=1e-12)


def _mask_bias(b: Builder, mask: str) -> str:
    wide = b.op("Cast", b.op("Unsqueeze", mask, b.ints(1, 2)), to=TensorProto.FLOAT)
    return b.op("Mul", b.op("Sub", b.constant(1.0), wide), b.constant(MASKED_BIAS))


def _bert_layer(b: Builder, x: str, bias: str, name: str, sizes: tuple[int, int, int, int]) -> str:
    batch, sequence, heads, width = sizes
    depth = width // heads
    own = f"{name}.attention.self"
    q, k, v = (
        b.reshape(b.linear(x, f"{own}.{part}", width, width), batch, sequence, heads, depth)
        for part in ("query", "key", "value")
    )
    scores = b.op("MatMul", b.transpose(q, 0, 2, 1, 3), b.transpose(k, 0, 2, 3, 1))
    scores = b.op("Add", b.op("Div", scores, b.constant(math.sqrt(depth))), bias)
    mixed = b.op("MatMul", b.op("Softmax", scores, axis=-1), b.transpose(v, 0, 2, 1, 3))
    mixed = b.reshape(b.transpose(mixed, 0, 2, 1, 3), batch, sequence, width)
    y = b.linear(mixed, f"{name}.attention.output.dense", width, width)
    x = b.layer_norm(b.op("Add", y, x), f"{name}.attention.output.LayerNorm", width, epsilon=1e-12)
    y = b.gelu(b.linear(x, f"{name}.intermediate.dense", width, 4 * width))
    y = b.linear(y, f"{name}.output.dense", 4 * width, width)
    return b.layer_norm(b.op("Add", y, x), f"{name}.output.LayerNorm", width, epsilon=1e-12)


def _deit(
    name: str, width: int, heads: int, size: int, batch: int, classes: int, seed: int
) -> onnx.ModelProto:
    b = Builder(name, seed=seed)
    n_patches = (size // 16) ** 2
    x = b.input("input", (batch, 3, size, size))
    x = b.conv(
        x, "patch_embed.proj", 3, width, 16, stride=16, bias=True, gain=1.0, pads=[0, 0, 0, 0]
    )
    x = b.transpose(b.reshape(x, batch, width, n_patches), 0, 2, 1)
    cls = b.normal("cls_token", (1, 1, width), 1.0)
    if batch > 1:
        cls = b.op("Expand", cls, b.ints(batch, 1, width))
    x = b.op("Concat", cls, x, axis=1)
    x = b.op("Add", x, b.normal("pos_embed", (1, n_patches + 1, width), 0.3))
    for i in range(12):
        x = _vit_block(b, x, f"blocks.{i}", (batch, n_patches + 1, heads, width))
    x = b.layer_norm(x, "norm", width, epsilon=1e-6)
    x = b.op("Gather", x, b.constant(0, np.int64), axis=1)
    b.output(b.gemm(x, "head", width, classes), "output")
    return b.finish()


def _vit_block(b: Builder, x: str, name: str, sizes: tuple[int, int, int, int]) -> str:
    batch, tokens, heads, width = sizes
    depth = width // heads
    y = b.layer_norm(x, f"{name}.norm1", width, epsilon=1e-6)
    y = b.linear(y, f"{name}.attn.qkv", width, 3 * width)
    y = b.transpose(b.reshape(y, batch, tokens, 3, heads, depth), 2, 0, 3, 1, 4)
    q, k, v = (b.op("Gather", y, b.constant(i, np.int64), axis=0) for i in range(3))
    q = b.op("Mul", q, b.constant(depth**-0.5))
    scores = b.op("MatMul", q, b.transpose(k, 0, 1, 3, 2))
    mixed = b.op("MatMul", b.op("Softmax", scores, axis=-1), v)
    mixed = b.reshape(b.transpose(mixed, 0, 2, 1, 3), batch, tokens, width)
    x = b.op("Add", x, b.linear(mixed, f"{name}.attn.proj", width, width))
    y = b.layer_norm(x, f"{name}.norm2", width, epsilon=1e-6)
    y = b.gelu(b.linear(y, f"{name}.mlp.fc1", width, 4 * width))
    return b.op("Add", x, b.linear(y, f"{name}.mlp.fc2", 4 * width, width))
