"""Small graphs with the wiring that channel removal has to follow; sizes are kept tiny."""

from collections.abc import Callable

import numpy as np
import onnx

from benchmarks.zoo.builder import Builder


def vgg() -> onnx.ModelProto:
    """Convolutions and pools in a row, then three products behind a Flatten."""
    b = Builder("vgg")
    x = b.input("x", (1, 3, 16, 16))
    width = 3
    for number, wider in enumerate((8, 16)):
        for part in range(2):
            x = b.relu(b.conv(x, f"conv{number}{part}", width, wider, 3, bias=True))
            width = wider
        x = b.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = b.op("Flatten", x, axis=1)
    for number, (n_in, n_out) in enumerate(((256, 32), (32, 24), (24, 10))):
        x = b.gemm(x, f"fc{number}", n_in, n_out)
        x = b.relu(x) if number < 2 else x
    b.output(x, "y")
    return b.finish()


def unet() -> onnx.ModelProto:
    """Skips by Concat, one step up by ConvTranspose, one by Resize."""
    b = Builder("unet")
    x = b.input("x", (1, 3, 16, 16))
    high = b.relu(b.batch_norm(b.conv(x, "down0", 3, 8, 3), "bn0", 8))
    mid = b.relu(b.conv(b.op("MaxPool", high, kernel_shape=[2, 2], strides=[2, 2]), "d1", 8, 16, 3))
    low = b.relu(b.conv(b.op("MaxPool", mid, kernel_shape=[2, 2], strides=[2, 2]), "d2", 16, 24, 3))
    up = b.op(
        "ConvTranspose", low, b.normal("up1", (24, 12, 2, 2), 0.2), b.normal("up1.b", (12,), 0.1),
        strides=[2, 2], kernel_shape=[2, 2],
    )  # fmt: skip
    x = b.relu(b.conv(b.op("Concat", up, mid, axis=1), "merge1", 28, 16, 3, bias=True))
    sizes = b.ints(1, 16, 16, 16)
    x = b.op("Resize", x, "", "", sizes, mode="nearest")
    x = b.relu(b.conv(b.op("Concat", x, high, axis=1), "merge0", 24, 8, 3, bias=True))
    b.output(b.conv(x, "head", 8, 2, 1, bias=True), "y")
    return b.finish()


def densenet() -> onnx.ModelProto:
    """Every layer reads all layers before it, through its own norm."""
    b = Builder("densenet")
    x = b.conv(b.input("x", (1, 3, 8, 8)), "stem", 3, 8, 3)
    width = 8
    for number in range(4):
        y = b.relu(b.batch_norm(x, f"bn{number}", width))
        y = b.conv(y, f"conv{number}", width, 6, 3)
        x = b.op("Concat", x, y, axis=1)
        width += 6
    x = b.op("GlobalAveragePool", b.relu(b.batch_norm(x, "bn", width)))
    b.output(b.gemm(b.reshape(x, 1, -1), "fc", width, 10), "y")
    return b.finish()


def inception() -> onnx.ModelProto:
    """Four branches of one input joined by Concat, and a fire module."""
    b = Builder("inception")
    x = b.relu(b.conv(b.input("x", (1, 3, 8, 8)), "stem", 3, 12, 3, bias=True))
    one = b.relu(b.conv(x, "one", 12, 6, 1, bias=True))
    three = b.relu(b.conv(x, "three_reduce", 12, 4, 1, bias=True))
    three = b.relu(b.conv(three, "three", 4, 8, 3, bias=True))
    five = b.relu(b.conv(x, "five_reduce", 12, 4, 1, bias=True))
    five = b.relu(b.conv(five, "five", 4, 6, 5, bias=True))
    pool = b.op("MaxPool", x, kernel_shape=[3, 3], strides=[1, 1], pads=[1, 1, 1, 1])
    pool = b.relu(b.conv(pool, "pool", 12, 4, 1, bias=True))
    x = b.op("LRN", b.op("Concat", one, three, five, pool, axis=1), size=3)
    squeeze = b.relu(b.conv(x, "squeeze", 24, 6, 1, bias=True))
    left = b.relu(b.conv(squeeze, "left", 6, 8, 1, bias=True))
    right = b.relu(b.conv(squeeze, "right", 6, 8, 3, bias=True))
    x = b.op("GlobalAveragePool", b.op("Concat", left, right, axis=1))
    b.output(b.conv(x, "head", 16, 10, 1, bias=True), "y")
    return b.finish()


def shufflenet_v1() -> onnx.ModelProto:
    """Grouped 1x1 convolutions with a channel shuffle between them."""
    b = Builder("shufflenet_v1")
    x = b.relu(b.conv(b.input("x", (1, 3, 8, 8)), "stem", 3, 36, 3))
    for number in range(2):
        y = b.relu(b.batch_norm(b.conv(x, f"a{number}", 36, 36, 1, groups=3), f"na{number}", 36))
        y = b.reshape(b.transpose(b.reshape(y, 1, 3, 12, 8, 8), 0, 2, 1, 3, 4), 1, 36, 8, 8)
        y = b.conv(y, f"b{number}", 36, 36, 3, groups=36, gain=1.0)
        y = b.conv(y, f"c{number}", 36, 36, 1, groups=3)
        x = b.relu(b.op("Add", x, y))
    b.output(b.conv(b.op("GlobalAveragePool", x), "head", 36, 10, 1, bias=True), "y")
    return b.finish()


def shufflenet_v2() -> onnx.ModelProto:
    """Halves split, one transformed, joined and shuffled."""
    b = Builder("shufflenet_v2")
    x = b.relu(b.conv(b.input("x", (1, 3, 8, 8)), "stem", 3, 24, 3))
    for number in range(2):
        keep, y = b.op_n(2, "Split", x, b.ints(12, 12), axis=1)
        y = b.relu(b.conv(y, f"a{number}", 12, 12, 1, bias=True))
        y = b.conv(y, f"b{number}", 12, 12, 3, groups=12, gain=1.0)
        y = b.relu(b.conv(y, f"c{number}", 12, 12, 1, bias=True))
        x = b.op("Concat", keep, y, axis=1)
        x = b.reshape(b.transpose(b.reshape(x, 1, 2, 12, 8, 8), 0, 2, 1, 3, 4), 1, 24, 8, 8)
    b.output(b.conv(b.op("GlobalAveragePool", x), "head", 24, 10, 1, bias=True), "y")
    return b.finish()


def yolox() -> onnx.ModelProto:
    """Focus (four strided slices), SiLU, CSP halves, decoupled heads joined over the map."""
    b = Builder("yolox")
    x = b.input("x", (1, 3, 16, 16))

    def silu(v: str) -> str:
        return b.op("Mul", v, b.op("Sigmoid", v))

    corners = [
        b.op("Slice", x, b.ints(i, j), b.ints(16, 16), b.ints(2, 3), b.ints(2, 2))
        for j in (0, 1)
        for i in (0, 1)
    ]
    x = silu(b.conv(b.op("Concat", *corners, axis=1), "stem", 12, 16, 3, bias=True))
    left = silu(b.conv(x, "left", 16, 8, 1, bias=True))
    right = silu(b.conv(x, "right", 16, 8, 1, bias=True))
    left = b.op("Add", left, silu(b.conv(left, "inner", 8, 8, 3, bias=True)))
    pools = [
        b.op("MaxPool", left, kernel_shape=[k, k], strides=[1, 1], pads=[k // 2] * 4)
        for k in (3, 5)
    ]
    x = silu(b.conv(b.op("Concat", left, right, *pools, axis=1), "out", 32, 16, 1, bias=True))
    boxes = b.conv(silu(b.conv(x, "box", 16, 12, 3, bias=True)), "box_out", 12, 4, 1, bias=True)
    score = b.conv(silu(b.conv(x, "cls", 16, 12, 3, bias=True)), "cls_out", 12, 3, 1, bias=True)
    heads = b.op("Concat", boxes, b.op("Sigmoid", score), axis=1)
    b.output(b.transpose(b.reshape(heads, 1, 7, 64), 0, 2, 1), "y")
    return b.finish()


def squeeze_excite() -> onnx.ModelProto:
    """An inverted bottleneck with a gate per channel."""
    b = Builder("squeeze_excite")
    x = b.conv(b.input("x", (1, 3, 8, 8)), "stem", 3, 8, 3, bias=True)
    y = b.relu6(b.conv(x, "expand", 8, 24, 1, bias=True))
    y = b.relu6(b.conv(y, "depthwise", 24, 24, 3, groups=24, bias=True))
    gate = b.op("GlobalAveragePool", y)
    gate = b.relu(b.conv(gate, "reduce", 24, 6, 1, bias=True))
    gate = b.op("HardSigmoid", b.conv(gate, "excite", 6, 24, 1, bias=True))
    y = b.conv(b.op("Mul", y, gate), "project", 24, 8, 1, bias=True)
    x = b.op("GlobalAveragePool", b.op("Add", x, y))
    b.output(b.conv(x, "head", 8, 10, 1, bias=True), "y")
    return b.finish()


def super_resolution(mode: str = "CRD") -> onnx.ModelProto:
    """Residual convolutions and a pixel shuffle."""
    b = Builder("super_resolution")
    x = b.relu(b.conv(b.input("x", (1, 3, 8, 8)), "stem", 3, 8, 3, bias=True))
    y = b.op("PRelu", b.conv(x, "a", 8, 16, 3, bias=True), b.uniform("slope", (16, 1, 1), 0.1, 0.3))
    x = b.op("Add", x, b.conv(y, "b", 16, 8, 3, bias=True))
    x = b.op("DepthToSpace", b.conv(x, "up", 8, 48, 3, bias=True), blocksize=2, mode=mode)
    x = b.relu(b.conv(x, "c", 12, 8, 3, bias=True))
    b.output(b.conv(x, "head", 8, 3, 3, bias=True), "y")
    return b.finish()


def gqa() -> onnx.ModelProto:
    """A decoder block: RMS norm, four query heads on two key heads, rotary halves, gated MLP."""
    b = Builder("gqa", opset=20)
    width, heads, kv, size, tokens = 32, 4, 2, 8, 6
    x = b.input("x", (1, tokens, width))

    def norm(v: str, name: str) -> str:
        mean = b.op("ReduceMean", b.op("Mul", v, v), b.ints(-1), keepdims=1)
        scaled = b.op("Div", v, b.op("Sqrt", b.op("Add", mean, b.constant(1e-6))))
        return b.op("Mul", scaled, b.uniform(name, (width,), 0.8, 1.2))

    def linear(v: str, name: str, n_in: int, n_out: int) -> str:
        return b.op("MatMul", v, b.normal(name, (n_in, n_out), n_in**-0.5))

    def rotate(v: str) -> str:
        low = b.op("Slice", v, b.ints(0), b.ints(size // 2), b.ints(3))
        high = b.op("Slice", v, b.ints(size // 2), b.ints(size), b.ints(3))
        turned = b.op("Concat", b.op("Neg", high), low, axis=3)
        cosine = b.normal(f"cos{v}", (tokens, size), 1.0)
        sine = b.normal(f"sin{v}", (tokens, size), 1.0)
        return b.op("Add", b.op("Mul", v, cosine), b.op("Mul", turned, sine))

    def repeat(v: str) -> str:
        v = b.op("Unsqueeze", v, b.ints(2))
        v = b.op("Expand", v, b.ints(1, kv, heads // kv, tokens, size))
        return b.reshape(v, 1, heads, tokens, size)

    h = norm(x, "norm1")
    q = b.transpose(
        b.reshape(linear(h, "q", width, heads * size), 1, tokens, heads, size), 0, 2, 1, 3
    )
    k = b.transpose(b.reshape(linear(h, "k", width, kv * size), 1, tokens, kv, size), 0, 2, 1, 3)
    v = b.transpose(b.reshape(linear(h, "v", width, kv * size), 1, tokens, kv, size), 0, 2, 1, 3)
    q, k, v = rotate(q), repeat(rotate(k)), repeat(v)
    scores = b.op("MatMul", q, b.transpose(k, 0, 1, 3, 2))
    scores = b.op("Mul", scores, b.constant(size**-0.5))
    causal = np.triu(np.full((tokens, tokens), -1e9, np.float32), 1)
    weights = b.op("Softmax", b.op("Add", scores, b.constant(causal)), axis=-1)
    y = b.reshape(b.transpose(b.op("MatMul", weights, v), 0, 2, 1, 3), 1, tokens, heads * size)
    x = b.op("Add", x, linear(y, "o", heads * size, width))
    h = norm(x, "norm2")
    gate = linear(h, "gate", width, 48)
    h = b.op("Mul", b.op("Mul", gate, b.op("Sigmoid", gate)), linear(h, "up", width, 48))
    b.output(b.op("Add", x, linear(h, "down", 48, width)), "y")
    return b.finish()


def windows() -> onnx.ModelProto:
    """Attention in shifted 4x4 windows with packed qkv and a bias per head, as in Swin."""
    b = Builder("windows")
    width, heads, side, window = 24, 3, 8, 4
    size, area, n = width // heads, window * window, (side // window) ** 2
    x = b.input("x", (1, side, side, width))
    h = b.layer_norm(x, "norm1", width, epsilon=1e-5)
    h = b.op("Concat", b.op("Slice", h, b.ints(2), b.ints(8), b.ints(1)),
             b.op("Slice", h, b.ints(0), b.ints(2), b.ints(1)), axis=1)  # fmt: skip
    h = b.transpose(b.reshape(h, 1, 2, window, 2, window, width), 0, 1, 3, 2, 4, 5)
    h = b.reshape(h, n, area, width)
    qkv = b.reshape(b.linear(h, "qkv", width, 3 * width), n, area, 3, heads, size)
    qkv = b.transpose(qkv, 2, 0, 3, 1, 4)
    q, k, v = (b.op("Gather", qkv, b.constant(i, np.int64), axis=0) for i in range(3))
    scores = b.op("MatMul", b.op("Mul", q, b.constant(size**-0.5)), b.transpose(k, 0, 1, 3, 2))
    scores = b.op("Add", scores, b.normal("relative", (heads, area, area), 0.5))
    y = b.op("MatMul", b.op("Softmax", scores, axis=-1), v)
    y = b.linear(b.reshape(b.transpose(y, 0, 2, 1, 3), n, area, width), "proj", width, width)
    y = b.transpose(b.reshape(y, 1, 2, 2, window, window, width), 0, 1, 3, 2, 4, 5)
    x = b.op("Add", x, b.reshape(y, 1, side, side, width))
    h = b.gelu(b.linear(b.layer_norm(x, "norm2", width, epsilon=1e-5), "fc1", width, 48))
    b.output(b.op("Add", x, b.linear(h, "fc2", 48, width)), "y")
    return b.finish()


def recurrent(op: str = "LSTM") -> onnx.ModelProto:
    """Embedding, two stacked recurrent layers (the first in both directions), a product."""
    gates = {"LSTM": 4, "GRU": 3}[op]
    b = Builder("recurrent")
    ids = b.input("ids", (6, 1), onnx.TensorProto.INT64)
    x = b.op("Gather", b.normal("table", (20, 12), 1.0), ids, axis=0)
    width = 12
    for number, directions in enumerate((2, 1)):
        hidden = 10
        flags: dict[str, object] = {"linear_before_reset": 1} if op == "GRU" else {}
        flags["direction"] = "bidirectional" if directions == 2 else "forward"
        (y,) = b.op_n(
            1, op, x,
            b.normal(f"w{number}", (directions, gates * hidden, width), 0.3),
            b.normal(f"r{number}", (directions, gates * hidden, hidden), 0.3),
            b.normal(f"b{number}", (directions, 2 * gates * hidden), 0.1),
            hidden_size=hidden, **flags,
        )  # fmt: skip
        width = directions * hidden
        x = b.reshape(b.transpose(y, 0, 2, 1, 3), 6, 1, width)
    x = b.reshape(x, 6, width)
    b.output(b.gemm(x, "head", width, 8), "y")
    return b.finish()


ALL: dict[str, Callable[[], onnx.ModelProto]] = {
    "vgg": vgg,
    "unet": unet,
    "densenet": densenet,
    "inception": inception,
    "shufflenet_v1": shufflenet_v1,
    "shufflenet_v2": shufflenet_v2,
    "yolox": yolox,
    "squeeze_excite": squeeze_excite,
    "pixel_shuffle_crd": super_resolution,
    "pixel_shuffle_dcr": lambda: super_resolution("DCR"),
    "gqa": gqa,
    "windows": windows,
    "lstm": recurrent,
    "gru": lambda: recurrent("GRU"),
}
