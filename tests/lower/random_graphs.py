"""Random ONNX graphs whose shapes are odd and whose batch is larger than one.

`build(choose)` makes a graph from a function that picks a number below n, so that hypothesis, a
seeded generator or a recorded list can drive it. Every intermediate that nobody reads, and now and
then one that somebody does read, is an output.
"""

from collections.abc import Callable, Sequence

import numpy as np
from onnx import ModelProto, helper, numpy_helper

Choose = Callable[[int], int]
Shape = tuple[int, ...]
Feed = dict[str, np.ndarray]
EXTENTS = (1, 2, 3, 5, 8, 9, 11, 16, 17, 24, 33, 70, 165)
MOST_ELEMENTS = 24_000
UNARY = ("Relu", "Tanh", "Sigmoid", "Neg", "Abs", "HardSwish", "Erf")


class Graph:
    """A graph under construction: values by name with their shapes."""

    def __init__(self, choose: Choose) -> None:
        self.choose = choose
        self.rng = np.random.default_rng(1)
        self.nodes: list = []
        self.weights: list = []
        self.inputs: list[tuple[str, Shape]] = []
        self.shapes: dict[str, Shape] = {}
        self.used: set[str] = set()

    def pick(self, options: Sequence):
        return options[self.choose(len(options))]

    def value(self, wanted: Callable[[Shape], bool] = lambda s: True) -> str | None:
        """One of the youngest values whose shape is `wanted`."""
        names = [n for n, s in self.shapes.items() if wanted(s)][-5:]
        return self.pick(names) if names else None

    def weight(self, array: np.ndarray) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def numbers(self, *shape: int) -> str:
        """A constant, half of its rows sparse."""
        array = self.rng.standard_normal(shape).astype(np.float32)
        fan = int(np.prod(shape[1:])) or 1
        if self.choose(2):
            array[self.rng.random(shape) < 0.7] = 0
        return self.weight(array / np.float32(np.sqrt(fan)))

    def ints(self, *values: int) -> str:
        return self.weight(np.array(values, np.int64))

    def op(self, kind: str, inputs: Sequence[str], *shapes: Shape, **attributes) -> str | None:
        """Append a node; nothing if a result would be too large."""
        if any(int(np.prod(s)) > MOST_ELEMENTS or len(s) > 6 for s in shapes):
            return None
        outputs = [f"v{len(self.shapes) + i}" for i in range(len(shapes))]
        name = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, outputs, name, **attributes))
        self.used |= set(inputs)
        self.shapes |= dict(zip(outputs, shapes))
        return outputs[-1]

    def scalar(self, value: int) -> str:
        return self.weight(np.array(value, np.int64))

    def finish(self) -> tuple[ModelProto, Feed]:
        """The model and a feed for it."""
        made = [n for n in self.shapes if n.startswith("v")]
        if not made:
            made = [str(self.op("Relu", ["x0"], self.shapes["x0"]))]
        outputs = [n for n in made if n not in self.used or self.choose(6) == 1]
        info = helper.make_tensor_value_info
        graph = helper.make_graph(
            self.nodes, "random", [info(n, 1, s) for n, s in self.inputs],
            [info(n, 1, self.shapes[n]) for n in outputs], self.weights,
        )  # fmt: skip
        opset = [helper.make_opsetid("", 23)]
        rng = np.random.default_rng(2)
        feed = {n: rng.standard_normal(s).astype(np.float32) for n, s in self.inputs}
        return helper.make_model(graph, opset_imports=opset, ir_version=10), feed

    def input(self, shape: Shape) -> str:
        name = f"x{len(self.inputs)}"
        self.inputs.append((name, shape))
        self.shapes[name] = shape
        return name


# ---------------------------------------------------------------- one function per kind of node


def transpose(g: Graph, x: str) -> None:
    rest = list(range(len(g.shapes[x])))
    perm = [rest.pop(g.choose(len(rest))) for _ in range(len(rest))]
    g.op("Transpose", [x], tuple(g.shapes[x][p] for p in perm), perm=perm)


def reshape(g: Graph, x: str) -> None:
    shape = list(g.shapes[x])
    for _ in range(1 + g.choose(2)):
        axis, how = g.choose(len(shape)), g.choose(3)
        if how == 0 and len(shape) > 1 and axis + 1 < len(shape):
            shape[axis : axis + 2] = [shape[axis] * shape[axis + 1]]
        elif how == 1 and len(shape) < 5:
            divisors = [d for d in range(1, shape[axis] + 1) if shape[axis] % d == 0]
            d = g.pick(divisors)
            shape[axis : axis + 1] = [d, shape[axis] // d]
        elif len(shape) < 5:
            shape.insert(axis, 1)
    g.op("Reshape", [x, g.ints(*shape)], tuple(shape))


def linear(g: Graph, x: str) -> None:
    shape = g.shapes[x]
    if len(shape) < 2:
        return
    n = g.pick(EXTENTS)
    if len(shape) == 2 and g.choose(2):
        g.op("Gemm", [x, g.numbers(n, shape[1]), g.numbers(n)], (shape[0], n), transB=1)
        return
    y = g.op("MatMul", [x, g.numbers(shape[-1], n)], (*shape[:-1], n))
    if y and g.choose(2):
        g.op("Add", [y, g.numbers(n)], (*shape[:-1], n))


def unary(g: Graph, x: str) -> None:
    g.op(g.pick(UNARY), [x], g.shapes[x])


def binary(g: Graph, x: str) -> None:
    shape = g.shapes[x]
    how = g.choose(4)
    if how == 0:
        other = g.value(lambda s: s == shape) or x
    elif how == 1:
        ones = [d if g.choose(2) else 1 for d in shape]
        other = g.numbers(*ones[g.choose(len(ones)) :])
    elif how == 2:
        axis = g.choose(len(shape))
        other = g.numbers(*(d if i == axis else 1 for i, d in enumerate(shape)))
    else:
        fits = [
            n for n, s in g.shapes.items()
            if len(s) <= len(shape) and all(a in (1, b) for a, b in zip(s[::-1], shape[::-1]))
        ]  # fmt: skip
        other = g.pick(fits[-6:])
    pair = [x, other] if g.choose(3) else [other, x]
    g.op(g.pick(("Add", "Mul", "Sub", "Max")), pair, shape)


def concat(g: Graph, x: str) -> None:
    shape = g.shapes[x]
    axis = g.choose(len(shape))

    def fits(s: Shape) -> bool:
        same = (a == b for i, (a, b) in enumerate(zip(s, shape)) if i != axis)
        return len(s) == len(shape) and all(same)

    parts = [x, *(g.value(fits) or x for _ in range(1 + g.choose(2)))]
    total = sum(g.shapes[p][axis] for p in parts)
    g.op("Concat", parts, tuple(total if i == axis else d for i, d in enumerate(shape)), axis=axis)


def split(g: Graph, x: str) -> None:
    shape = g.shapes[x]
    axis = g.choose(len(shape))
    if shape[axis] < 2:
        return
    first = 1 + g.choose(shape[axis] - 1)
    sizes = (first, shape[axis] - first)
    parts = [tuple(n if i == axis else d for i, d in enumerate(shape)) for n in sizes]
    g.op("Split", [x, g.ints(*sizes)], *parts, axis=axis)


def slice_(g: Graph, x: str) -> None:
    shape = g.shapes[x]
    axis = g.choose(len(shape))
    n = shape[axis]
    start, step = g.choose(n), 1 + g.choose(2)
    out = tuple(len(range(start, n, step)) if i == axis else d for i, d in enumerate(shape))
    g.op("Slice", [x, g.ints(start), g.ints(n), g.ints(axis), g.ints(step)], out)


def gather(g: Graph, x: str) -> None:
    shape = g.shapes[x]
    axis = g.choose(len(shape))
    if len(shape) > 1 and g.choose(2):
        index = g.scalar(g.choose(shape[axis]))
        out = (*shape[:axis], *shape[axis + 1 :])
    else:
        index = g.ints(*(g.choose(shape[axis]) for _ in range(1 + g.choose(4))))
        out = (*shape[:axis], numpy_helper.to_array(g.weights[-1]).size, *shape[axis + 1 :])
    g.op("Gather", [x, index], out, axis=axis)


def softmax(g: Graph, x: str) -> None:
    axis = g.choose(len(g.shapes[x]))
    g.op(g.pick(("Softmax", "LogSoftmax")), [x], g.shapes[x], axis=axis)


def norm(g: Graph, x: str) -> None:
    n = g.shapes[x][-1]
    if n > 1:
        g.op("LayerNormalization", [x, g.numbers(n), g.numbers(n)], g.shapes[x], axis=-1)


def reduce(g: Graph, x: str) -> None:
    shape, axis = g.shapes[x], g.choose(len(g.shapes[x]))
    keep = g.choose(2)
    if len(shape) == 1 and not keep:
        return
    kept = (1,) if keep else ()
    kind = g.pick(("ReduceMean", "ReduceSum", "ReduceMax"))
    out = (*shape[:axis], *kept, *shape[axis + 1 :])
    g.op(kind, [x, g.ints(axis)], out, keepdims=keep)


def attention(g: Graph, x: str) -> None:
    shape = g.shapes[x]
    if len(shape) == 4:
        batch, heads, points, _ = shape
        key = g.value(lambda s: len(s) == 4 and s[:2] == shape[:2] and s[3] == shape[3]) or x
        keys = g.shapes[key][2]
        value = g.value(lambda s: len(s) == 4 and s[:3] == (batch, heads, keys)) or key
        out = (batch, heads, points, g.shapes[value][3])
        g.op("Attention", [x, key, value], out)
    if len(shape) != 3:
        return
    batch, points, width = shape
    heads = g.pick([h for h in (1, 2, 3, 4) if width % h == 0])
    rows = [g.op("MatMul", [x, g.numbers(width, width)], shape) for _ in range(3)]
    if g.choose(2):
        g.op("Attention", rows, shape, q_num_heads=heads, kv_num_heads=heads)
        return
    whole = (batch, points, heads, width // heads)
    parts = []
    for row in rows:
        parted = g.op("Reshape", [row, g.ints(*whole)], whole)
        out = (batch, heads, points, width // heads)
        parts.append(g.op("Transpose", [parted], out, perm=[0, 2, 1, 3]))
    y = g.op("Attention", parts, out)
    z = g.op("Transpose", [y], whole, perm=[0, 2, 1, 3])
    g.op("Reshape", [z, g.ints(*shape)], shape)


def convolution(g: Graph, x: str) -> None:
    shape = g.shapes[x]
    if len(shape) not in (3, 4, 5):
        return
    batch, channels, *size = shape
    k = [g.pick((1, 3)) for _ in size]
    stride = [1 + g.choose(2) for _ in size]
    pads = [n // 2 for n in k]
    out = [(n + 2 * p - w) // s + 1 for n, p, w, s in zip(size, pads, k, stride)]
    rows = g.pick((1, 3, 8, 11))
    groups = 1
    if g.choose(3) == 0:
        rows = groups = channels
    weight = g.numbers(rows, channels // groups, *k)
    attributes = {"pads": pads * 2, "strides": stride, "kernel_shape": k, "group": groups}
    g.op("Conv", [x, weight, g.numbers(rows)], (batch, rows, *out), **attributes)


def pool(g: Graph, x: str) -> None:
    shape = g.shapes[x]
    n_axes = len(shape) - 2
    if n_axes not in (2, 3):
        return
    if g.choose(3) == 0:
        g.op("GlobalAveragePool", [x], (*shape[:2], *[1] * n_axes))
        return
    stride = 1 + g.choose(2)
    out = tuple((n + 2 - 3) // stride + 1 for n in shape[2:])
    window = {"kernel_shape": [3] * n_axes, "strides": [stride] * n_axes}
    attributes = {**window, "pads": [1] * 2 * n_axes}
    g.op(g.pick(("MaxPool", "AveragePool")), [x], (*shape[:2], *out), **attributes)


def pad(g: Graph, x: str) -> None:
    shape = g.shapes[x]
    widths = [g.choose(3) for _ in range(2 * len(shape))]
    before, after = widths[: len(shape)], widths[len(shape) :]
    out = tuple(n + a + b for n, a, b in zip(shape, before, after))
    g.op("Pad", [x, g.ints(*widths)], out, mode="constant")


def expand(g: Graph, x: str) -> None:
    shape = g.shapes[x]
    out = tuple(g.pick((2, 3)) if d == 1 else d for d in shape)
    g.op("Expand", [x, g.ints(*out)], out)


def resize(g: Graph, x: str) -> None:
    shape = g.shapes[x]
    if len(shape) == 4:
        scales = g.weight(np.array([1, 1, 2, 2], np.float32))
        mode = g.pick(("nearest", "linear"))
        out = (*shape[:2], 2 * shape[2], 2 * shape[3])
        g.op("Resize", [x, "", scales], out, mode=mode, nearest_mode="floor")


MAKERS = (
    transpose, transpose, reshape, reshape, linear, linear, linear, unary, binary, binary, concat,
    split, slice_, gather, softmax, norm, reduce, attention, attention, convolution, pool, pad,
    expand, resize,
)  # fmt: skip


def build(choose: Choose, n_nodes: int) -> tuple[ModelProto, Feed]:
    """A model from `n_nodes` attempts and a feed for it."""
    g = Graph(choose)
    for _ in range(2):
        shape: Shape = ()
        for _ in range(1 + g.choose(5)):
            most = MOST_ELEMENTS // int(np.prod(shape))
            shape = (*shape, g.pick([n for n in EXTENTS if n <= most]))
        g.input(shape)
    for _ in range(n_nodes):
        x = g.value()
        assert x is not None
        g.pick(MAKERS)(g, x)
    return g.finish()
