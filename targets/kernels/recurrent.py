"""LSTM and GRU over a sequence, after the product of inputs and weights.

    LSTM   z = gates[t] + R h;        c = sig(f) c + sig(i) tanh(g);   h = sig(o) tanh(c)
    GRU    n = tanh(gates_n[t] + sig(r) (R_n h + bias));               h = (1 - sig(z)) n + sig(z) h
    reset  n = tanh(gates_n[t] + R_n (sig(r) h));                      h as in the GRU

`gates` holds what the inputs give to every gate of every step, biases included (for the GRU's n
that of the input). The third is a GRU whose reset comes before the product, so there are two
products in a row. Recurrent weights are packed as in vector_product, or coded as in slots: lanes
are rows of R, the state is broadcast. They are read once per step and should fit in the level 2
cache. All is row-major; one item is one sequence in one direction.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from sparsegraph.targets import emit
from sparsegraph.targets.emit import Cell, Expr, bind, const, load, loop, splat, store
from sparsegraph.targets.kernels import slots, vector_product
from sparsegraph.targets.kernels.math import hold, like, sigmoid, tanh
from sparsegraph.targets.kernels.slots import Slots, add_slots, pack_slots
from sparsegraph.targets.kernels.vector_product import add_column
from sparsegraph.targets.kernels.vectors import each_vector
from sparsegraph.targets.target import Target

GATES = {"lstm": 4, "gru": 3, "reset": 3}
"""Order as in ONNX: input, output, forget, cell; update, reset, new."""
_OWN = {"lstm": "c:float32* c0:float32*", "gru": "bias:float32*", "reset": ""}


@dataclass(frozen=True)
class Recurrent:
    """Spec of one kernel.

    Arguments: y [steps, directions, images, units]; gates [steps, images, directions, gates *
    units]; states h and c and what they start with [directions, images, units] (the GRU has no c);
    weights from `pack` or `pack_coded`; bias [directions, units] of `gru`; directions from
    `reverse` on run backwards; scratch for all gates of one step.

    Attributes:
        kind: `lstm`, `gru` (reset after the product) or `reset` (before it).
        lanes: float32 values in a vector.
        rows: rows in a panel of weights.
        coded: weights are in slots.
    """

    kind: str
    lanes: int
    rows: int
    coded: bool = False

    def __post_init__(self) -> None:
        assert self.kind in GATES, self.kind

    @property
    def name(self) -> str:
        return f"{self.kind}_f32_r{self.rows}_l{self.lanes}" + "_coded" * self.coded

    @property
    def params(self) -> emit.Signature:
        return emit.signature(
            "y:float32* gates:float32* h:float32* h0:float32* "
            f"{_OWN[self.kind]} {slots.PARAMS if self.coded else 'weights:float32*'} "
            "z:float32* steps:int32 directions:int32 images:int32 units:int32 panels:int32 "
            "reverse:int32"
        )

    def scratch_bytes(self, units: int) -> int:
        """For the sums of one step, padded to whole panels, and for a state that is reset."""
        state = units if self.kind == "reset" else 0
        return 4 * (self.rows * self.panels(units) + state)

    def panels(self, units: int) -> int:
        """Panels of recurrent weights in one direction."""
        return sum(-(-gates * units // self.rows) for gates in self.products)

    @property
    def products(self) -> tuple[int, ...]:
        """Gates of each product in a step."""
        return (2, 1) if self.kind == "reset" else (GATES[self.kind],)

    def body(self, target: Target) -> Any:
        return lambda **args: _Emitter(self, args, target).run()


class _Emitter:
    def __init__(self, spec: Recurrent, args: dict[str, Expr], target: Target) -> None:
        self.spec, self.a, self.target = spec, args, target

    def run(self) -> None:
        a, spec = self.a, self.spec
        with loop(a["begin"], a["end"]) as item:
            direction = bind(emit.divide(item, a["images"]))
            image = bind(emit.modulo(item, a["images"]))
            self.state = bind(item * a["units"])
            width = bind(a["units"] * GATES[spec.kind])
            self.first = bind(direction * a["panels"])
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
                if spec.kind == "reset":
                    self.reset()
                else:
                    self.products(const(0, "int32"), a["panels"], "h", self.state)
                    self.lstm() if spec.kind == "lstm" else self.gru()

    def start(self, at: Expr, lanes: int) -> None:
        for to in ("h", "c") if self.spec.kind == "lstm" else ("h",):
            at_state = self.state + at
            store(self.a[to], load(self.a[f"{to}0"], at_state, lanes), at_state, lanes)

    def products(self, first: Expr, end: Expr, state: str, at: Expr) -> None:
        """The rows of some panels times a state, into scratch."""
        multiply = self.coded if self.spec.coded else self.dense
        with loop(0, end - first) as i:
            multiply(bind(self.first + first + i), bind(first), i, state, at)

    def dense(self, panel: Expr, first: Expr, i: Expr, state: str, at: Expr) -> None:
        """Panel `panel` of all is number i of a product whose sums begin with panel `first`."""
        a, rows, lanes = self.a, self.spec.rows, self.spec.lanes
        cells = [Cell("float32", lanes) for _ in range(rows // lanes)]
        for cell in cells:
            cell.set(splat(const(0.0), lanes))
        start = bind(panel * a["units"] * rows)
        with loop(0, a["units"]) as k:
            value = load(a[state], at + k)
            add_column([cells], a["weights"], start + k * rows, [value], lanes)
        for v, cell in enumerate(cells):
            store(a["z"], cell.get(), (first + i) * rows + v * lanes, lanes)

    def coded(self, panel: Expr, first: Expr, _: Expr, state: str, at: Expr) -> None:
        """The same of slots; the product's panels are in another order."""
        a, rows = self.a, self.spec.rows
        total = add_slots(a, panel, a[state], at, rows, self.target)
        store(a["z"], total, (first + load(a["order"], panel)) * rows, rows)

    def reset(self) -> None:
        """A GRU's step with the reset before the product."""
        a, spec = self.a, self.spec
        new = bind(emit.divide(a["units"] * 2 + (spec.rows - 1), spec.rows))
        self.kept = bind(a["panels"] * spec.rows)
        self.new = bind(new * spec.rows)
        self.products(const(0, "int32"), new, "h", self.state)
        self.activate(0, 2, sigmoid)
        self.each_unit(self.keep)
        self.products(new, a["panels"], "z", self.kept)
        self.each_unit(self.renew)

    def each_unit(self, visit: Callable[[Expr, int], None]) -> None:
        each_vector(self.a["units"], self.spec.lanes, visit)

    def activate(self, first: int, end: int, function: Callable[[Expr], Expr]) -> None:
        """Some gates in place of their sums. A function has so many constants that two of them in
        one loop do not fit in 16 registers."""
        a = self.a
        start = bind(a["units"] * first)

        def visit(at: Expr, lanes: int) -> None:
            x = hold(load(a["gates"], self.gates + start + at, lanes))
            total = hold(x + load(a["z"], start + at, lanes))
            store(a["z"], function(total), start + at, lanes)

        each_vector(bind(a["units"] * (end - first)), self.spec.lanes, visit)

    def gate(self, number: int, at: Expr, lanes: int) -> Expr:
        """What scratch holds of one gate."""
        return hold(load(self.a["z"], self.a["units"] * number + at, lanes))

    def keep(self, at: Expr, lanes: int) -> None:
        """The state that is left of the reset."""
        h = load(self.a["h"], self.state + at, lanes)
        store(self.a["z"], hold(self.gate(1, at, lanes) * h), self.kept + at, lanes)

    def renew(self, at: Expr, lanes: int) -> None:
        x = load(self.a["gates"], self.gates + self.a["units"] * 2 + at, lanes)
        new = hold(tanh(hold(x + load(self.a["z"], self.new + at, lanes))))
        self.mix(new, at, lanes)

    def lstm(self) -> None:
        self.activate(0, 3, sigmoid)
        self.activate(3, 4, tanh)
        self.each_unit(self.cell)

    def cell(self, at: Expr, lanes: int) -> None:
        c = self.a["c"]
        into, out, keep, new = (self.gate(g, at, lanes) for g in range(4))
        kept = hold(keep * load(c, self.state + at, lanes))
        cell = hold(kept + into * new)
        store(c, cell, self.state + at, lanes)
        self.finish(hold(out * hold(tanh(cell))), at, lanes)

    def gru(self) -> None:
        self.activate(0, 2, sigmoid)
        self.each_unit(self.refresh)

    def refresh(self, at: Expr, lanes: int) -> None:
        a = self.a
        bias = load(a["bias"], self.bias + at, lanes)
        shifted = hold(self.gate(2, at, lanes) + bias)
        x = load(a["gates"], self.gates + a["units"] * 2 + at, lanes)
        self.mix(hold(tanh(hold(x + self.gate(1, at, lanes) * shifted))), at, lanes)

    def mix(self, new: Expr, at: Expr, lanes: int) -> None:
        update, old = self.gate(0, at, lanes), load(self.a["h"], self.state + at, lanes)
        self.finish(hold(hold(like(1.0, update) - update) * new + update * hold(old)), at, lanes)

    def finish(self, value: Expr, at: Expr, lanes: int) -> None:
        store(self.a["h"], value, self.state + at, lanes)
        store(self.a["y"], value, self.y + at, lanes)


def pack(weights: np.ndarray, kernel: Recurrent) -> np.ndarray:
    """[directions, gates * units, units] -> the panels of every direction."""
    parts = _products(weights, kernel)
    return np.concatenate([vector_product.pack(part, kernel.rows) for part in parts])


def pack_coded(weights: np.ndarray, kernel: Recurrent) -> Slots:
    """The same without columns of panels that are zero."""
    parts = [pack_slots(part, kernel.rows) for part in _products(weights, kernel)]
    before = np.cumsum([0, *(part.starts[-1] for part in parts)])
    starts = [part.starts[:-1] + n for part, n in zip(parts, before)]
    return Slots(
        np.concatenate([part.values for part in parts]),
        np.concatenate([part.columns for part in parts]),
        np.concatenate([*starts, before[-1:]]).astype(np.int32),
        np.concatenate([part.order for part in parts]),
    )


def _products(weights: np.ndarray, kernel: Recurrent) -> list[np.ndarray]:
    """The matrices of all products in their order; each begins a panel."""
    ends = np.cumsum(kernel.products)[:-1] * weights.shape[2]
    return [part for one in weights for part in np.split(one, ends)]


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
                shifted = reset * (r[2] + bias[d])
                if kind == "reset":
                    shifted = (reset * h[d]) @ weights[d, -h.shape[2] :].T
                new = np.tanh(x[2] + shifted)
                h[d] = (1 - update) * new + update * h[d]
            y[t, d] = h[d]
    return y, h, c


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-x)))


def kernels(lanes: int) -> list[Recurrent]:
    """Representative variants for vectors of `lanes` values."""
    dense = [Recurrent(kind, lanes, 8 * lanes) for kind in GATES]
    return [*dense, *(Recurrent(kind, lanes, min(4, lanes), coded=True) for kind in GATES)]
