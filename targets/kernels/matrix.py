"""Products of two activations, row-major: y[b, m, n] = sum over k of a[b, m, k] * w[b, k, n].

Lanes run over n. One item computes up to `span` rows of one panel of columns: the panel of `w` is
copied into scratch, padded with zeros, so that its rows follow each other and there is no tail to
treat; then a block of rows times vectors of the result stays in registers over all of k.
Items: batches * panels * ceil(m / span).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sparsegraph.targets import emit
from sparsegraph.targets.emit import Cell, Expr, bind, const, load, loop, splat, store
from sparsegraph.targets.kernels.attention import multiply_add
from sparsegraph.targets.kernels.vectors import in_groups
from sparsegraph.targets.target import Target


@dataclass(frozen=True)
class Matrix:
    """Spec of one kernel.

    Attributes:
        rows: of the result that are computed together.
        vectors: of columns that are computed together: one panel.
        lanes: float32 values in a vector.
    """

    rows: int
    vectors: int
    lanes: int

    @property
    def name(self) -> str:
        return f"matrix_f32_r{self.rows}_v{self.vectors}_l{self.lanes}"

    @property
    def params(self) -> emit.Signature:
        return emit.signature(
            "y:float32* a:float32* a_batch:int32 w:float32* w_batch:int32 scratch:float32* "
            "m:int32 k:int32 n:int32 panels:int32 span:int32"
        )

    @property
    def width(self) -> int:
        """Columns of one panel."""
        return self.vectors * self.lanes

    def scratch_bytes(self, k: int) -> int:
        """One panel, and the end of a row of the result."""
        return 4 * self.width * (k + 1)

    def body(self, target: Target) -> Any:
        return lambda **args: _Emitter(self, args).run()


class _Emitter:
    def __init__(self, spec: Matrix, args: dict[str, Expr]) -> None:
        self.spec, self.a = spec, args

    def run(self) -> None:
        a, spec = self.a, self.spec
        parts = bind(emit.divide(a["m"] + a["span"] - 1, a["span"]))
        per_batch = bind(a["panels"] * parts)
        with loop(a["begin"], a["end"]) as item:
            batch, rest = bind(emit.divide(item, per_batch)), bind(emit.modulo(item, per_batch))
            column = bind(emit.divide(rest, parts) * spec.width)
            first = bind(emit.modulo(rest, parts) * a["span"])
            n_rows = bind(emit.minimum(a["span"], a["m"] - first))
            self.left = bind(emit.minimum(const(spec.width, "int32"), a["n"] - column))
            self.pack(bind(batch * a["w_batch"] + column))
            source = bind(batch * a["a_batch"] + first * a["k"])
            to = bind((batch * a["m"] + first) * a["n"] + column)

            def block(row: Expr, rows: int) -> None:
                self.block(bind(source + row * a["k"]), bind(to + row * a["n"]), rows)

            in_groups(n_rows, spec.rows, block)

    def each_vector(self, visit: Callable[[int], None]) -> None:
        for v in range(self.spec.vectors):
            visit(v * self.spec.lanes)

    def pack(self, source: Expr) -> None:
        """scratch[k, :] = the columns of this panel; then zeros: what lay there may be denormal."""
        a, lanes = self.a, self.spec.lanes
        with loop(0, a["k"]) as k:
            at, to = bind(source + k * a["n"]), bind(k * self.spec.width)
            with emit.choose(self.left < self.spec.width) as (partly, wholly):
                with partly:
                    zero = splat(const(0.0), lanes)
                    self.each_vector(lambda v: store(a["scratch"], zero, to + v, lanes))
                    with loop(0, self.left) as i:
                        store(a["scratch"], load(a["w"], at + i), to + i)
                with wholly:
                    self.each_vector(
                        lambda v: store(a["scratch"], load(a["w"], at + v, lanes), to + v, lanes)
                    )

    def block(self, source: Expr, to: Expr, n_rows: int) -> None:
        """Some rows of the panel."""
        a, spec = self.a, self.spec
        rows = [bind(source + r * a["k"]) for r in range(n_rows)]
        acc = [[Cell("float32", spec.lanes) for _ in range(spec.vectors)] for _ in rows]
        for cells in acc:
            for cell in cells:
                cell.set(splat(const(0.0), spec.lanes))
        with loop(0, a["k"]) as k:
            panel = bind(k * spec.width)
            multiply_add(
                acc,
                lambda r: splat(load(a["a"], rows[r] + k), spec.lanes),
                lambda v: load(a["scratch"], panel + v * spec.lanes, spec.lanes),
            )
        for r, cells in enumerate(acc):
            self.write(cells, bind(to + r * a["n"]))

    def write(self, cells: Sequence[Cell], to: Expr) -> None:
        a, lanes = self.a, self.spec.lanes
        with emit.choose(self.left < self.spec.width) as (partly, wholly):
            with partly:
                end = bind(a["k"] * self.spec.width)
                for v, cell in enumerate(cells):
                    store(a["scratch"], cell.get(), end + v * lanes, lanes)
                with loop(0, self.left) as i:
                    store(a["y"], load(a["scratch"], end + i), to + i)
            with wholly:
                for v, cell in enumerate(cells):
                    store(a["y"], cell.get(), to + v * lanes, lanes)


def kernel_for(n: int, target: Target) -> Matrix:
    """Accumulators, a vector each and one factor fill the registers; panels are even."""
    rows, most = (4, 3) if target.n_registers <= 16 else (6, 4)
    vectors = -(-n // target.lanes)
    panels = -(-vectors // most)
    return Matrix(rows, -(-vectors // panels), target.lanes)


def reference(a: np.ndarray, w: np.ndarray) -> np.ndarray:
    """[.., m, k] and [.., k, n] in float64."""
    return np.asarray(a.astype(np.float64) @ w.astype(np.float64))
