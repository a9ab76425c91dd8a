"""LSTM and GRU over a sequence, after the product of inputs and weights.

    LSTM   z = gates[t] + R h;        c = sig(f) c + sig(i) tanh(g);   h = sig(o) tanh(c)
    GRU    n = tanh(gates_n[t] + sig(r) (R_n h + bias));               h = (1 - sig(z)) n + sig(z) h

`gates` holds what the inputs give to every gate of every step, biases included (for the GRU's n
that of the input). Recurrent weights are packed as in vector_product: lanes are rows of R, the
state is broadcast. They are read once per step and should fit in the level 2 cache. All is
row-major; one item is one sequence in one direction.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from sparsegraph.targets import emit
from sparsegraph.targets.emit import Cell, Expr, bind, const, load, loop, splat, store
from sparsegraph.targets.kernels import vector_product
from sparsegraph.targets.kernels.math import hold, like, sigmoid, tanh
from sparsegraph.targets.kernels.vectors import each_vector
from sparsegraph.targets.target import Target

GATES = {"lstm": 4, "gru": 3}
"""Order as in ONNX: input, output, forget, cell; update, reset, new."""


@dataclass(frozen=True)
class Recurrent:
    """Spec of one kernel.

    Arguments: y [steps, directions, images, units]; gates [steps, images, directions, gates *
    units]; states h and c and what they start with [directions, images, units] (the GRU has no c);
    weights from `pack`; bias [directions, units] of the GRU; directions from `reverse` on run
    backwards; scratch for all gates of one step.

    Attributes:
        kind: `lstm` or `gru` (reset after the product).
        lanes: float32 values in a vector.
        vectors: vectors of rows in a panel of weights.
    """

    kind: str
    lanes: int
    vectors: int

    def __post_init__(self) -> None:
        assert self.kind in GATES, self.kind

    @property
    def rows(self) -> int:
        """Rows of a panel."""
        return self.lanes * self.vectors

    @property
    def name(self) -> str:
        return f"{self.kind}_f32_v{self.vectors}_l{self.lanes}"

    @property
    def params(self) -> emit.Signature:
        own = "c:float32* c0:float32*" if self.kind == "lstm" else "bias:float32*"
        return emit.signature(
            f"y:float32* gates:float32* h:float32* h0:float32* {own} weights:float32* "
            "z:float32* steps:int32 directions:int32 images:int32 units:int32 panels:int32 "
            "reverse:int32"
        )

    def scratch_bytes(self, units: int) -> int:
        """For the sums of one step, padded to whole panels."""
        return 4 * self.rows * self.panels(units)

    def panels(self, units: int) -> int:
        """Panels of recurrent weights in one direction."""
        return -(-GATES[self.kind] * units // self.rows)

    def body(self, target: Target) -> Any:
        return lambda **args: _Emitter(self, args).run()


class _Emitter:
    def __init__(self, spec: Recurrent, args: dict[str, Expr]) -> None:
        self.spec, self.a = spec, args

    def run(self) -> None:
        a, spec = self.a, self.spec
        with loop(a["begin"], a["end"]) as item:
            direction = bind(emit.divide(item, a["images"]))
            image = bind(emit.modulo(item, a["images"]))
            self.state = bind(item * a["units"])
            width = bind(a["units"] * GATES[spec.kind])
            self.matrix = bind(direction * a["panels"] * a["units"] * spec.rows)
            self.bias = bind(direction * a["units"])
            each_vector(a["units"], spec.lanes, self.start)
            backwards = bind(emit.select(direction < a["reverse"], const(0, "int32"),
                                         const(1, "int32")))  # fmt: skip
            with loop(0, a["steps"]) as step:
                time = bind(step + backwards * (a["steps"] - 1 - 2 * step))
                self.gates = bind(
                    ((time * a["images"] + image) * a["directions"] + direction) * width
                )
                self.y = bind(
                    ((time * a["directions"] + direction) * a["images"] + image) * a["units"]
                )
                with loop(0, a["panels"]) as panel:
                    self.products(panel)
                each_vector(a["units"], spec.lanes, self.lstm if "c" in a else self.gru)

    def start(self, at: Expr, lanes: int) -> None:
        for to in ("h", "c") if self.spec.kind == "lstm" else ("h",):
            at_state = self.state + at
            store(self.a[to], load(self.a[f"{to}0"], at_state, lanes), at_state, lanes)

    def products(self, panel: Expr) -> None:
        """Some rows of R h, into scratch."""
        a, spec = self.a, self.spec
        cells = [Cell("float32", spec.lanes) for _ in range(spec.vectors)]
        for cell in cells:
            cell.set(splat(const(0.0), spec.lanes))
        first = bind(self.matrix + panel * a["units"] * spec.rows)
        with loop(0, a["units"]) as k:
            value = bind(splat(load(a["h"], self.state + k), spec.lanes))
            at = bind(first + k * spec.rows)
            for v, cell in enumerate(cells):
                cell.set(cell.get() + load(a["weights"], at + v * spec.lanes, spec.lanes) * value)
        for v, cell in enumerate(cells):
            store(a["z"], cell.get(), panel * spec.rows + v * spec.lanes, spec.lanes)

    def gate(self, number: int, at: Expr, lanes: int) -> tuple[Expr, Expr]:
        """What the inputs and what the state give to one gate."""
        offset = self.a["units"] * number + at
        return (
            hold(load(self.a["gates"], self.gates + offset, lanes)),
            hold(load(self.a["z"], offset, lanes)),
        )

    def lstm(self, at: Expr, lanes: int) -> None:
        a = self.a
        into, out, keep, new = (hold(x + r) for x, r in (self.gate(g, at, lanes) for g in range(4)))
        kept = hold(hold(sigmoid(keep)) * load(a["c"], self.state + at, lanes))
        cell = hold(kept + hold(sigmoid(into)) * hold(tanh(new)))
        store(a["c"], cell, self.state + at, lanes)
        self.finish(hold(hold(sigmoid(out)) * hold(tanh(cell))), at, lanes)

    def gru(self, at: Expr, lanes: int) -> None:
        a = self.a
        update, reset = (
            hold(sigmoid(hold(x + r))) for x, r in (self.gate(g, at, lanes) for g in range(2))
        )
        x, r = self.gate(2, at, lanes)
        shifted = hold(r + load(a["bias"], self.bias + at, lanes))
        new = hold(tanh(hold(x + reset * shifted)))
        old = hold(load(a["h"], self.state + at, lanes))
        self.finish(hold(hold(like(1.0, update) - update) * new + update * old), at, lanes)

    def finish(self, value: Expr, at: Expr, lanes: int) -> None:
        store(self.a["h"], value, self.state + at, lanes)
        store(self.a["y"], value, self.y + at, lanes)


def pack(weights: np.ndarray, kernel: Recurrent) -> np.ndarray:
    """[directions, gates * units, units] -> the panels of every direction."""
    return np.stack([vector_product.pack(one, kernel.rows) for one in weights])


def reference(
    kind: str, gates: np.ndarray, weights: np.ndarray, h: np.ndarray, c: np.ndarray,
    bias: np.ndarray, is_reverse: list[bool],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Float64 meaning, with arrays as `Recurrent` takes them: y and the last states."""
    gates, weights = gates.astype(np.float64), weights.astype(np.float64)
    h, c = h.astype(np.float64), c.astype(np.float64)
    steps, images, directions, _ = gates.shape
    y = np.zeros((steps, directions, images, h.shape[2]))
    for d in range(directions):
        for t in reversed(range(steps)) if is_reverse[d] else range(steps):
            x = np.split(gates[t, :, d], GATES[kind], 1)
            r = np.split(h[d] @ weights[d].T, GATES[kind], 1)
            if kind == "lstm":
                into, out, keep = (_sigmoid(x[g] + r[g]) for g in range(3))
                c[d] = keep * c[d] + into * np.tanh(x[3] + r[3])
                h[d] = out * np.tanh(c[d])
            else:
                update, reset = (_sigmoid(x[g] + r[g]) for g in range(2))
                new = np.tanh(x[2] + reset * (r[2] + bias[d]))
                h[d] = (1 - update) * new + update * h[d]
            y[t, d] = h[d]
    return y, h, c


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-x)))


def kernels(lanes: int) -> list[Recurrent]:
    """Representative variants for vectors of `lanes` values."""
    return [Recurrent(kind, lanes, 8) for kind in GATES]
