"""Depthwise convolution: every channel has its own window, one input channel per output channel.

    y[m, oy, ox] = epilogue(bias[m] + sum over taps of w[m, ky, kx] * x[m // multiplier, iy, ix])
    iy = oy * stride_y + ky * dilation_y - pad_top, ix alike; x is 0 outside the plane

Loops, padding and layouts: window.py. Taps are a loop: written out, 256@56 with 5x5 and stride 4
takes 650 us instead of 400 (AVX-512). Items are images * channels (output channels). Strides up to
2 are for `depthwise_masked`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from sparsegraph.targets import emit
from sparsegraph.targets.emit import Expr, bind, load, splat
from sparsegraph.targets.kernels import expression
from sparsegraph.targets.kernels.window import PARAMS, Sweep, Window, operand_params
from sparsegraph.targets.target import Target


@dataclass(frozen=True)
class Depthwise:
    """Spec of one depthwise kernel.

    Attributes:
        window: kernel, stride, dilation, rows at a time, lanes.
        direct: y is planar, at least `lanes` wide and `rows` high, no operand is feature-major.
        epilogue: expression over (accumulated value, operand 0, operand 1 ...), or None.
        operands: per operand `same` (feature-major like y) or `feature` (one value per channel).
    """

    window: Window
    direct: bool = False
    epilogue: expression.Tree | None = None
    operands: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert not (self.direct and "same" in self.operands)

    @property
    def name(self) -> str:
        tail = "" if self.epilogue is None else f"_{expression.label(self.epilogue)}"
        kinds = "".join(k[0] for k in self.operands)
        kinds = "_" + kinds if kinds else ""
        return f"depthwise_f32_{self.window.name}{'_direct' * self.direct}{tail}{kinds}"

    @property
    def params(self) -> emit.Signature:
        text = PARAMS + "weights:float32* bias:float32* multiplier:int32 "
        return emit.signature(text + operand_params(self.operands))

    def body(self, target: Target) -> Any:
        return lambda **args: _Emitter(self, args).run()


class _Emitter(Sweep):
    def __init__(self, spec: Depthwise, args: dict[str, Expr]) -> None:
        super().__init__(
            spec.window, args, direct=spec.direct, epilogue=spec.epilogue, operands=spec.operands
        )

    def source(self, channel: Expr) -> Expr:
        return emit.divide(channel, self.a["multiplier"])

    def prepare(self, channel: Expr) -> None:
        kh, kw = self.window.kernel
        self.first_weight = bind(channel * (kh * kw))
        self.bias = bind(splat(load(self.a["bias"], channel), self.lanes))

    def compute(self, at: Expr, oy: Expr, ox: Expr) -> list[Expr]:
        acc = self.cells(self.bias)

        def add(tap: Expr, r: int, x: Expr) -> None:
            weight = bind(splat(load(self.a["weights"], self.first_weight + tap), self.lanes))
            acc[r].set(acc[r].get() + weight * x)

        self.each_tap(at, add)
        return [c.get() for c in acc]


def reference(
    x: np.ndarray, weights: np.ndarray, bias: np.ndarray, window: Window,
    pads: tuple[int, int, int, int],
) -> np.ndarray:  # fmt: skip
    """Float64 meaning: x [images, channels, h, w], weights [out channels, kh, kw].

    `pads` is (top, left, bottom, right).
    """
    top, left, bottom, right = pads
    x = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (top, bottom), (left, right)))
    x = np.repeat(x, weights.shape[0] // x.shape[1], axis=1)
    (kh, kw), (sy, sx), (dy, dx) = window.kernel, window.stride, window.dilation
    height = (x.shape[2] - (kh - 1) * dy - 1) // sy + 1
    width = (x.shape[3] - (kw - 1) * dx - 1) // sx + 1
    y = np.zeros((x.shape[0], x.shape[1], height, width)) + bias[:, None, None]
    for i in range(kh):
        for j in range(kw):
            rows = slice(i * dy, i * dy + (height - 1) * sy + 1, sy)
            columns = slice(j * dx, j * dx + (width - 1) * sx + 1, sx)
            y += weights[:, i, j, None, None].astype(np.float64) * x[:, :, rows, columns]
    return np.asarray(y)


def kernels(lanes: int) -> list[Depthwise]:
    """Representative variants for vectors of `lanes` values."""
    relu = ("Relu", ("arg", 0))
    residual = ("Relu", ("Add", ("Mul", ("arg", 0), ("arg", 2)), ("arg", 1)))
    one, two = (1, 1), (2, 2)
    return [
        Depthwise(Window((3, 3), one, one, 4, lanes), direct=True, epilogue=relu),
        Depthwise(Window((3, 3), one, one, 5, lanes), epilogue=residual,
                  operands=("same", "feature")),
        Depthwise(Window((3, 3), two, one, 4, lanes)),
        Depthwise(Window((5, 5), two, one, 3, lanes), direct=True),
        Depthwise(Window((3, 3), (1, 2), two, 4, lanes)),
        Depthwise(Window((2, 3), (3, 3), (1, 2), 2, lanes)),
        Depthwise(Window((9, 7), one, one, 2, lanes), direct=True),
        Depthwise(Window((1, 9), (2, 1), one, 1, lanes)),
    ]  # fmt: skip
