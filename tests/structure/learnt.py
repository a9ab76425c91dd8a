"""A small transformer and a small residual network with learnt masks, as trainers leave them."""

import numpy as np
import onnx

from benchmarks.zoo.builder import Builder

TOKENS, WIDTH, HEADS, HIDDEN = 8, 32, 4, 64
SIZE = WIDTH // HEADS


def masked(
    b: Builder, x: str, name: str, shape: tuple[int, ...], axis: int, dead: list[int]
) -> str:
    """x times ones with zeros at `dead` positions of `axis`."""
    mask = np.ones(shape, np.float32)
    mask[(slice(None),) * axis + (dead,)] = 0
    return b.op("Mul", x, b.weight(name, mask))


def encoder(where: str) -> onnx.ModelProto:
    """Attention and an MLP; `where` says what is masked (see the branches)."""
    b = Builder("encoder")
    x = b.input("x", (1, TOKENS, WIDTH))
    x = _joined(b, x, _attention(b, x, where), where)
    h = b.layer_norm(x, "norm", WIDTH, epsilon=1e-5)
    h = b.gelu(b.linear(h, "up", WIDTH, HIDDEN))
    if where == "neurons":
        h = masked(b, h, "mask", (HIDDEN,), 0, list(range(20)))
    x = b.op("Add", x, b.linear(h, "down", HIDDEN, WIDTH))
    b.output(b.linear(x, "head", WIDTH, 6), "y")
    return b.finish()


def _attention(b: Builder, x: str, where: str) -> str:
    q, k, v = (
        b.transpose(b.reshape(b.linear(x, n, WIDTH, WIDTH), 1, TOKENS, HEADS, SIZE), 0, 2, 1, 3)
        for n in "qkv"
    )
    scores = b.op("MatMul", q, b.transpose(k, 0, 1, 3, 2))
    weights = b.op("Softmax", b.op("Mul", scores, b.constant(SIZE**-0.5)), axis=-1)
    if where == "head weights":
        weights = masked(b, weights, "mask", (1, HEADS, 1, 1), 1, [1, 2])
    y = b.op("MatMul", weights, v)
    if where == "head outputs":
        y = masked(b, y, "mask", (HEADS, 1, 1), 0, [1, 2])
    y = b.reshape(b.transpose(y, 0, 2, 1, 3), 1, TOKENS, WIDTH)
    if where == "head features":
        y = masked(b, y, "mask", (WIDTH,), 0, list(range(SIZE, 3 * SIZE)))
    if where == "part of a head":
        y = masked(b, y, "mask", (WIDTH,), 0, [SIZE, SIZE + 1])
    return b.linear(y, "o", WIDTH, WIDTH)


def _joined(b: Builder, x: str, y: str, where: str) -> str:
    """The residual sum, with a gate over the whole branch."""
    if where == "layer":
        y = b.op("Mul", y, b.weight("gate", np.zeros((1,), np.float32)))
    elif where in ("layer mixed out", "layer mixed in"):
        gate = b.weight("gate", np.full((1,), float(where.endswith("in")), np.float32))
        x = b.op("Mul", x, b.op("Sub", b.constant(1.0), gate))
        y = b.op("Mul", y, gate)
    elif where == "layer below a threshold":
        keep = b.op(
            "Greater", b.weight("scores", np.array([0.1, 0.9], np.float32)), b.constant(0.5)
        )
        gate = b.op(
            "Gather", b.op("Cast", keep, to=onnx.TensorProto.FLOAT), b.constant(0, np.int64)
        )
        y = b.op("Mul", y, gate)
    elif where == "layer chosen":
        keep = b.op("Greater", b.weight("score", np.array(0.1, np.float32)), b.constant(0.5))
        return b.op("Where", keep, b.op("Add", x, y), x)
    elif where == "soft gate":
        y = b.op("Mul", y, b.weight("gate", np.full((1,), 0.1, np.float32)))
    elif where == "computed gate":
        gate = b.op("Sigmoid", b.op("ReduceMean", x, axes=[1], keepdims=1))
        y = b.op("Mul", y, gate)
    elif where == "converged gate":
        y = b.op("Mul", y, b.op("Sigmoid", b.weight("gate", np.full((1,), -14.0, np.float32))))
    return b.op("Add", x, y)


def residual(norm: str) -> onnx.ModelProto:
    """One mask on the residual stream, for all blocks. `norm`: none, layer, rms, square or RMS."""
    b = Builder("residual", opset=23 if norm == "RMS" else 17)
    dead = [1, 5, 9]
    mask = np.ones((WIDTH,), np.float32)
    mask[dead] = 0
    name = b.weight("mask", mask)
    x = b.op("Mul", b.linear(b.input("x", (1, TOKENS, 6)), "embed", 6, WIDTH), name)
    for i in range(2):
        h = _norm(b, x, f"norm{i}", norm)
        h = b.linear(b.gelu(b.linear(h, f"up{i}", WIDTH, HIDDEN)), f"down{i}", HIDDEN, WIDTH)
        x = b.op("Add", x, b.op("Mul", h, name))
    b.output(b.linear(x, "head", WIDTH, 6), "y")
    return b.finish()


def _norm(b: Builder, x: str, name: str, norm: str) -> str:
    if norm == "none":
        return x
    if norm == "layer":
        return b.layer_norm(x, name, WIDTH, epsilon=1e-5)
    scale = b.uniform(name, (WIDTH,), 0.8, 1.2)
    if norm == "RMS":
        return b.op("RMSNormalization", x, scale, axis=-1, epsilon=1e-2)
    axes = {"axes": [-1]}
    square = b.op("Mul", x, x) if norm == "square" else b.op("Pow", x, b.constant(2.0))
    root = b.op(
        "Sqrt", b.op("Add", b.op("ReduceMean", square, keepdims=1, **axes), b.constant(1e-2))
    )
    return b.op("Mul", b.op("Div", x, root), scale)
