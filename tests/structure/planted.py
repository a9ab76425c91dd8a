"""Random graphs with dead structure planted in known places.

A trunk of random operators carries blocks with a hidden axis; each block may have dead units of one
kind. The plan says how many hidden units every block may keep, and which must be declined.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir

from benchmarks.zoo.builder import Builder

KINDS = ("producer", "consumer", "bias", "mask", "norm", "none")
ZERO_STAYS = ("Relu", "Gelu", "HardSwish", "Tanh", "Elu", "LeakyRelu")


@dataclass
class Site:
    """A block: the weight that makes its hidden axis, the units it has and may keep."""

    weight: str
    axis: int
    n: int
    n_kept: int
    declined: bool = False


@dataclass
class Plan:
    """A graph in the making, the current value and its channels."""

    rng: np.random.Generator
    build: Builder = field(default_factory=lambda: Builder("planted", opset=20))
    sites: list[Site] = field(default_factory=list)
    at: str = ""
    channels: int = 0
    side: int = 8
    n: int = 0

    def name(self, what: str) -> str:
        self.n += 1
        return f"{what}{self.n}"

    def array(self, what: str, *shape: int) -> np.ndarray:
        fan_in = int(np.prod(shape[1:])) or 1
        return self.rng.normal(0, 1.4 / np.sqrt(fan_in), shape).astype(np.float32)

    def put(self, what: str, array: object) -> str:
        return self.build.weight(self.name(what), np.asarray(array))

    def dead(self, n: int) -> np.ndarray:
        """Between one unit and all but one."""
        return self.rng.permutation(n)[: self.rng.integers(1, n)]


def conv(p: Plan, x: str, w: np.ndarray, b: np.ndarray, pad: bool, name: str = "") -> str:
    k = w.shape[2]
    weight = p.build.weight(name or p.name("w"), w)
    return p.build.op(
        "Conv", x, weight, p.put("b", b), kernel_shape=[k, k], pads=[k // 2 if pad else 0] * 4
    )


def bottleneck(p: Plan) -> None:
    """x + conv(act(norm(conv(x)))), with dead hidden channels of a random kind."""
    rng, hidden, c = p.rng, int(p.rng.integers(3, 9)), p.channels
    kind = KINDS[rng.integers(len(KINDS))]
    act = ZERO_STAYS[rng.integers(len(ZERO_STAYS))]
    k1, k2 = (int(rng.choice([1, 3])) for _ in range(2))
    w1, b1 = p.array("w", hidden, c, k1, k1), p.array("b", hidden)
    w2, b2 = p.array("w", c, hidden, k2, k2), p.array("b", c)
    dead = p.dead(hidden)
    scale, shift = 1 + 0.2 * p.array("s", hidden), p.array("t", hidden)
    if kind == "producer":
        w1[dead], b1[dead], shift[dead] = 0, 0, 0
    elif kind == "bias":
        w1[dead] = 0
    elif kind == "consumer":
        w2[:, dead] = 0
    elif kind == "norm":
        scale[dead] = 0
    site = p.name("site")
    h = conv(p, p.at, w1, b1, True, site)
    if kind == "norm" or (kind != "bias" and rng.random() < 0.3):
        spread = [np.zeros(hidden, np.float32), np.ones(hidden, np.float32)]
        h = p.build.op("BatchNormalization", h, *[p.put("n", v) for v in (scale, shift, *spread)])
    h = p.build.op(act, h)
    if rng.random() < 0.3:
        h = conv_depthwise(p, h, hidden, kind)
    if kind == "mask":
        mask = np.ones((1, hidden, 1, 1), np.float32)
        mask[0, dead] = 0
        h = p.build.op("Mul", h, p.put("mask", mask))
    y = conv(p, h, w2, b2, True)
    carried = kind in ("bias", "norm") and k2 > 1  # one constant stays for all under padding
    kept = hidden - (0 if kind == "none" else len(dead)) + carried
    p.sites.append(Site(site, 0, hidden, kept, carried and len(dead) == 1))
    p.at = p.build.op("Add", p.at, y) if rng.random() < 0.7 else y


def conv_depthwise(p: Plan, x: str, n: int, kind: str) -> str:
    """1x1, since a padded one would make a constant vary at the border."""
    w = p.array("w", n, 1, 1, 1) + 0.5
    b = p.array("b", n) * (kind not in ("producer",))
    return p.build.op("Conv", x, p.put("w", w), p.put("b", b.astype(np.float32)), group=n)


def dead_branch(p: Plan) -> None:
    """x + 0: the whole branch goes, with all its hidden units."""
    c = p.channels
    hidden = p.build.relu(conv(p, p.at, p.array("w", 5, c, 3, 3), p.array("b", 5), True))
    site = p.name("branch")
    zero = np.zeros((c, 5, 1, 1), np.float32)
    y = conv(p, hidden, zero, np.zeros(c, np.float32), True, site)
    p.sites.append(Site(site, 0, c, 0))
    p.at = p.build.op("Add", p.at, y)


def heads(p: Plan) -> None:
    """Attention over the points with dead heads: zero values, or nobody reads them."""
    rng, b, c, area = p.rng, p.build, p.channels, p.side**2
    n, d = int(rng.integers(2, 5)), 4
    site = p.name("value")
    w = {name: p.array("w", n * d, c).T for name in ("q", "k", "v")}
    out = p.array("w", c, n * d).T
    dead = p.dead(n)
    columns = (dead[:, None] * d + np.arange(d)).reshape(-1)
    kind = str(rng.choice(["value", "output", "none"]))
    if kind == "value":
        w["v"][:, columns] = 0
    elif kind == "output":
        out[columns] = 0
    tokens = b.op("Transpose", b.op("Reshape", p.at, p.put("i", [1, c, area])), perm=[0, 2, 1])
    parts = {}
    for name, array in w.items():
        weight = b.weight(site, array.copy()) if name == "v" else p.put("w", array.copy())
        split = b.op("Reshape", b.op("MatMul", tokens, weight), p.put("i", [1, area, n, d]))
        parts[name] = b.op("Transpose", split, perm=[0, 2, 3, 1] if name == "k" else [0, 2, 1, 3])
    scores = b.op("Softmax", b.op("MatMul", parts["q"], parts["k"]), axis=-1)
    y = b.op("Transpose", b.op("MatMul", scores, parts["v"]), perm=[0, 2, 1, 3])
    y = b.op("MatMul", b.op("Reshape", y, p.put("i", [1, area, n * d])), p.put("w", out.copy()))
    y = b.op("Reshape", b.op("Transpose", y, perm=[0, 2, 1]), p.put("i", [1, c, p.side, p.side]))
    p.sites.append(Site(site, 1, n * d, n * d - (0 if kind == "none" else len(dead) * d)))
    p.at = b.op("Add", p.at, y)


def gated(p: Plan) -> None:
    """A gated MLP over channels as 1x1 convolutions: zero gate or zero value rows are dead."""
    c, hidden = p.channels, int(p.rng.integers(3, 9))
    value, gate = p.array("w", hidden, c, 1, 1), p.array("w", hidden, c, 1, 1)
    zeros = np.zeros(hidden, np.float32)
    dead = p.dead(hidden)
    value[dead] = 0
    site = p.name("gated")
    h = conv(p, p.at, value, zeros, True, site)
    g = p.build.op("Sigmoid", conv(p, p.at, gate, p.array("b", hidden), True))
    y = conv(p, p.build.op("Mul", g, h), p.array("w", c, hidden, 3, 3), p.array("b", c), True)
    p.sites.append(Site(site, 0, hidden, hidden - len(dead)))
    p.at = p.build.op("Add", p.at, y)


def grouped(p: Plan) -> None:
    """Whole dead groups of a grouped convolution."""
    c, group, k = p.channels, 3, 2
    w = p.array("w", group * k, k, 3, 3)
    dead = p.dead(group)
    rows = (dead[:, None] * k + np.arange(k)).reshape(-1)
    w[rows] = 0
    bias = p.array("b", group * k)
    bias[rows] = 0
    h = p.build.relu(conv(p, p.at, p.array("w", group * k, c, 1, 1), p.array("b", group * k), True))
    site = p.name("grouped")
    h = p.build.op("Conv", h, p.build.weight(site, w), p.put("b", bias), group=group, pads=[1] * 4)
    y = conv(p, h, p.array("w", c, group * k, 3, 3), p.array("b", c), True)
    p.sites.append(Site(site, 0, group * k, group * k - len(rows)))
    p.at = p.build.op("Add", p.at, y)


def widen(p: Plan) -> None:
    """A plain convolution to another width."""
    wider = int(p.rng.integers(2, 5)) * 2
    w = p.array("w", wider, p.channels, 3, 3)
    p.at = p.build.relu(conv(p, p.at, w, p.array("b", wider), True))
    p.channels = wider


def fork(p: Plan) -> None:
    """Concat of two activations of the trunk."""
    other = p.build.op("Sigmoid" if p.rng.random() < 0.5 else "Abs", p.at)
    p.at = p.build.op("Concat", p.at, other, axis=1)
    p.channels *= 2


def halve(p: Plan) -> None:
    """Keep one half of the channels, by Split or Slice."""
    half = p.channels // 2
    if half < 2:
        return
    sizes = [half, p.channels - half]
    if p.rng.random() < 0.5:
        left, right = p.build.op_n(2, "Split", p.at, p.put("i", sizes), axis=1)
        p.at = p.build.op("Mul", left, right) if sizes[0] == sizes[1] else left
    else:
        ends = [p.put("i", [v]) for v in (0, half, 1)]
        p.at = p.build.op("Slice", p.at, *ends)
    p.channels = half


def resample(p: Plan) -> None:
    """A pool, a resize, or padding that is cut off again."""
    kind = p.rng.integers(3)
    if kind == 0:
        p.at = p.build.op("MaxPool", p.at, kernel_shape=[3, 3], pads=[1] * 4, strides=[1, 1])
    elif kind == 1:
        p.at = p.build.op("AveragePool", p.at, kernel_shape=[3, 3], pads=[1] * 4, strides=[1, 1])
    else:
        pads = p.put("i", [0, 0, 1, 1, 0, 0, 1, 1])
        x = p.build.op("Pad", p.at, pads, p.put("f", np.float32(0)))
        bounds = [p.put("i", v) for v in ([1, 1], [p.side + 1] * 2, [2, 3])]
        p.at = p.build.op("Slice", x, *bounds)


def shuffle(p: Plan) -> None:
    """Pixels to channels and back, or a channel shuffle."""
    c, side = p.channels, p.side
    if p.rng.random() < 0.5 or c % 2:
        deep = p.build.op("SpaceToDepth", p.at, blocksize=2)
        p.at = p.build.op("DepthToSpace", deep, blocksize=2)
        return
    split = p.build.op("Reshape", p.at, p.put("i", [1, 2, c // 2, side, side]))
    turned = p.build.op("Transpose", split, perm=[0, 2, 1, 3, 4])
    p.at = p.build.op("Reshape", turned, p.put("i", [1, c, side, side]))


PARTS: tuple[Callable[[Plan], None], ...] = (
    bottleneck, bottleneck, bottleneck, dead_branch, heads, gated, grouped, widen, fork, halve,
    resample, shuffle,
)  # fmt: skip


def planted(seed: int, parts: list[int]) -> tuple[ir.Model, list[Site]]:
    """The graph of these parts (indices into PARTS) and its sites."""
    p = Plan(np.random.default_rng(seed))
    p.at, p.channels = p.build.input("x", (1, 4, 8, 8)), 4
    widen(p)
    for part in parts:
        PARTS[part](p)
    head = p.build.conv(p.at, "head", p.channels, 3, 1, bias=True)
    p.build.output(head, "y")
    return ir.from_proto(p.build.finish()), p.sites


def kept(model: ir.Model, site: Site) -> int:
    """How much of the site's axis is left; nothing when its weight is gone."""
    value = model.graph.initializers.get(site.weight)
    return 0 if value is None or value.shape is None else int(value.shape[site.axis])


def proto(model: ir.Model) -> onnx.ModelProto:
    """The model as a proto."""
    return ir.to_proto(model)
