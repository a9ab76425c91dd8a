"""A sequence tagger: embedding, two LSTM layers in both directions, one linear layer."""

import onnx
from onnx import TensorProto

from benchmarks.zoo.builder import Builder

GATES = 4


def tagger(
    tokens: int = 32, *, width: int = 128, hidden: int = 256, tags: int = 32, seed: int = 0
) -> onnx.ModelProto:
    """Token ids in, one row of scores per token out."""
    b = Builder("tagger", seed=seed)
    ids = b.input("ids", (tokens, 1), TensorProto.INT64)
    x = b.op("Gather", b.normal("embedding", (10_000, width), 1.0), ids, axis=0)
    for number in range(2):
        name, rows = f"lstm.{number}", GATES * hidden
        (y,) = b.op_n(
            1, "LSTM", x,
            b.normal(f"{name}.w", (2, rows, width), width**-0.5),
            b.normal(f"{name}.r", (2, rows, hidden), hidden**-0.5),
            b.normal(f"{name}.b", (2, 2 * rows), 0.1),
            hidden_size=hidden, direction="bidirectional",
        )  # fmt: skip
        width = 2 * hidden
        x = b.reshape(b.transpose(y, 0, 2, 1, 3), tokens, 1, width)
    b.output(b.gemm(b.reshape(x, tokens, width), "head", width, tags), "scores")
    return b.finish()
