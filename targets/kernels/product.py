"""Products of a constant weight matrix with a feature-major activation: MatMul, Gemm, Conv.

    y[n, p] = epilogue(bias[n] + sum_k w[n, k] * x[k, p], operands[n, p] ...)

Scheme: for one tile of points and one tile of columns, the activation panel lies in the level 1
cache; a group of rows keeps its accumulators in registers and shares every activation load. The
partial sums of earlier column tiles wait in y. `coded` weights (sparsegraph.formats) run one loop
per code, so the work is proportional to the non-zero values. Convolutions gather the panel of each
column tile (im2col of one tile, never of the whole map): targets/kernels/gather.py.

Every kernel is generic in all sizes and strides; the spec fixes only what changes the code.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from sparsegraph.targets import emit
from sparsegraph.targets.emit import Cell, Expr, as_int, bind, const, load, loop, splat, store
from sparsegraph.targets.kernels import expression, gather
from sparsegraph.targets.target import Target

_CHEAP = {"arg", "const", "Relu", "Clip", "Add", "Sub", "Mul", "Min", "Max", "LeakyRelu"}


@dataclass(frozen=True)
class Product:
    """Spec of one product kernel.

    Attributes:
        weight: `dense` or `coded`.
        group: rows that share activation loads (1 to 4).
        split: vectors per pass over the tile; their sum is the tile's width in vectors.
        lanes: float32 values in a vector.
        gather: None for a matrix product; of a convolution how it gathers (`gather.Gather.step`).
        epilogue: expression over (accumulated value, operand 0, operand 1 ...), or None.
        operands: per operand `same` (feature-major like y) or `feature` (one value per row).
    """

    weight: str
    group: int
    split: tuple[int, ...]
    lanes: int
    gather: int | None = None
    epilogue: expression.Tree | None = None
    operands: tuple[str, ...] = ()

    @property
    def vectors(self) -> int:
        return sum(self.split)

    @property
    def block(self) -> int:
        """Points in one tile."""
        return self.vectors * self.lanes

    @property
    def panel_row(self) -> int:
        """Elements between rows of the gathered panel: one spare vector, whole cache lines.

        The kernel takes it as an argument: with a constant here LLVM spills accumulators.
        """
        return -(-(self.block + self.lanes) // 16) * 16

    @property
    def name(self) -> str:
        kind = "spmm" if self.weight == "coded" else "gemm"
        shape = f"r{self.group}_v" + "x".join(map(str, self.split)) + f"_l{self.lanes}"
        source = "" if self.gather is None else f"_gather{self.gather}"
        tail = "" if self.epilogue is None else f"_{expression.label(self.epilogue)}"
        kinds = "".join(k[0] for k in self.operands)
        return f"{kind}_f32_{self.weight}_{shape}{source}{tail}{'_' + kinds if kinds else ''}"

    @property
    def params(self) -> emit.Signature:
        text = (
            "y:float32* y_image:int32 y_tile:int32 y_row:int32 "
            "x:float32* x_image:int32 x_tile:int32 x_row:int32 images:int32 tiles:int32 "
            "columns:int32 column_tile:int32 bias:float32* values:float32* "
            "rows:int32* chunks:int32* "
        )
        if self.weight == "coded":
            text += "column_index:uint16* counts:uint16* "
        if self.gather is not None:
            text += gather.PARAMS[self.gather == gather.FLAT]
        for i, kind in enumerate(self.operands):
            text += f"o{i}:float32* "
            if kind == "same":
                text += f"o{i}_image:int32 o{i}_tile:int32 o{i}_row:int32 "
        return emit.signature(text)

    def body(self, target: Target) -> Any:
        return lambda **args: _Emitter(self, args).run()

    def panel_bytes(self, column_tile: int) -> int:
        """Scratch for the gathered panel."""
        return 4 * self.panel_row * column_tile if self.gather is not None else 0


class _Emitter:
    """Loops of one product kernel, outermost first."""

    def __init__(self, spec: Product, args: dict[str, Expr]) -> None:
        self.spec = spec
        self.a = args

    def run(self) -> None:
        a = self.a
        self.cursors = {n: Cell("int32") for n in ("value", "column", "count")}
        per_chunk = bind(a["images"] * a["tiles"])
        n_tiles = bind(emit.divide(a["columns"] + a["column_tile"] - 1, a["column_tile"]))
        with loop(a["begin"], a["end"]) as item:
            chunk = bind(emit.divide(item, per_chunk))
            point = bind(emit.modulo(item, per_chunk))
            self.image = bind(emit.divide(point, a["tiles"]))
            self.tile = bind(emit.modulo(point, a["tiles"]))
            for i, cursor in enumerate(self.cursors.values()):
                cursor.set(load(a["chunks"], chunk * 5 + i))
            first = bind(load(a["chunks"], chunk * 5 + 3))
            groups = bind(load(a["chunks"], chunk * 5 + 4))
            with loop(0, n_tiles) as t:
                self.column_tile(t, n_tiles, first, groups)

    def column_tile(self, t: Expr, n_tiles: Expr, first: Expr, groups: Expr) -> None:
        a, spec = self.a, self.spec
        start = bind(t * a["column_tile"])
        width = bind(emit.minimum(a["column_tile"], a["columns"] - start))
        if spec.gather is None:
            self.panel, self.panel_row = a["x"], a["x_row"]
            base = self.image * a["x_image"] + self.tile * a["x_tile"] + start * a["x_row"]
            self.panel_base = bind(base)
        else:
            panel = gather.Gather(a, spec.gather, spec.vectors, spec.lanes)
            panel.fill(self.image, self.tile, start, width)
            self.panel, self.panel_row = a["panel"], a["panel_row"]
            self.panel_base = const(0, "int32")
        of_tile = {name: bind(cursor.get()) for name, cursor in self.cursors.items()}
        self.value_of_tile = of_tile["value"]
        offset = 0
        for vectors in spec.split:
            for name, cursor in self.cursors.items():  # every pass reads the same weights
                cursor.set(of_tile[name])
            with loop(0, groups) as g:
                self.group(t, n_tiles, (first + g) * spec.group, g, width, offset, vectors)
            offset += vectors * spec.lanes
        if spec.weight == "dense":
            self.cursors["value"].set(self.value_of_tile + groups * width * spec.group)

    def group(
        self, t: Expr, n_tiles: Expr, slot: Expr, g: Expr, width: Expr, offset: int, vectors: int
    ) -> None:
        """One group of rows: load partial sums, add the products of this column tile, store."""
        a, spec, lanes = self.a, self.spec, self.spec.lanes
        slots, spans = range(spec.group), range(vectors)
        row = [bind(load(a["rows"], slot + r)) for r in slots]
        base = self.image * a["y_image"] + self.tile * a["y_tile"] + offset
        at = [bind(base + row[r] * a["y_row"]) for r in slots]
        acc = [[Cell("float32", lanes) for _ in spans] for _ in slots]
        with emit.choose(t == 0) as (then, otherwise):
            with then:
                for r in slots:
                    b = bind(splat(load(a["bias"], row[r]), lanes))
                    for v in spans:
                        acc[r][v].set(b)
            with otherwise:
                for r in slots:
                    for v in spans:
                        acc[r][v].set(load(a["y"], at[r] + v * lanes, lanes))
        if spec.weight == "dense":
            self.dense(acc, self.value_of_tile + g * width * spec.group, width, offset)
        else:
            self.coded(acc, offset)
        if spec.epilogue is None:
            self.store(acc, at)
            return
        with emit.choose(t == n_tiles - 1) as (then, otherwise):
            with then:
                self.finish(acc, at, row, offset)
            with otherwise:
                self.store(acc, at)

    def dense(self, acc: Sequence[Sequence[Cell]], first: Expr, width: Expr, offset: int) -> None:
        value, panel = bind(first), bind(self.panel_base + offset)
        with loop(0, width) as k:
            weights = [value + k * self.spec.group + r for r in range(self.spec.group)]
            self.multiply(acc, list(acc), weights, panel + k * self.panel_row)

    def coded(self, acc: Sequence[Sequence[Cell]], offset: int) -> None:
        a, panel = self.a, bind(self.panel_base + offset)
        for code in range(1, 1 << self.spec.group):
            live = [acc[r] for r in range(self.spec.group) if code >> r & 1]
            n = bind(as_int(load(a["counts"], self.cursors["count"].get())))
            self.cursors["count"].set(self.cursors["count"].get() + 1)
            value = bind(self.cursors["value"].get())
            column = bind(self.cursors["column"].get())
            with loop(0, n) as j:
                k = as_int(load(a["column_index"], column + j))
                weights = [value + j * len(live) + i for i in range(len(live))]
                self.multiply(acc, live, weights, panel + k * self.panel_row)
            self.cursors["value"].set(value + n * len(live))
            self.cursors["column"].set(column + n)

    def multiply(
        self,
        acc: Sequence[Sequence[Cell]],
        live: Sequence[Sequence[Cell]],
        weights: Sequence[Expr],
        panel: Expr,
    ) -> None:
        """acc[r][v] += w[r] * x[v] for the live rows of one column."""
        lanes, at = self.spec.lanes, bind(panel)
        w = [bind(splat(load(self.a["values"], i), lanes)) for i in weights]
        for v in range(len(acc[0])):
            x = bind(load(self.panel, at + v * lanes, lanes))
            for cells, factor in zip(live, w):
                cells[v].set(cells[v].get() + factor * x)

    def store(self, acc: Sequence[Sequence[Cell]], at: Sequence[Expr]) -> None:
        for r in reversed(range(len(acc))):  # a repeated row is stored before the real one
            for v, cell in enumerate(acc[r]):
                store(self.a["y"], cell.get(), at[r] + v * self.spec.lanes, self.spec.lanes)

    def finish(
        self,
        acc: Sequence[Sequence[Cell]],
        at: Sequence[Expr],
        row: Sequence[Expr],
        offset: int,
    ) -> None:
        """Epilogue. Costly expressions run in a loop over what was just stored: less code."""
        lanes, tree = self.spec.lanes, self.spec.epilogue
        assert tree is not None
        cheap = _operators(tree) <= _CHEAP
        for r in reversed(range(len(acc))):  # as in `store`, repeated rows come first
            operands = self.operand_loads(row[r], offset)
            if cheap:
                for v, cell in enumerate(acc[r]):
                    values = [cell.get(), *(o(v * lanes) for o in operands)]
                    result = expression.emit(tree, values, lanes)
                    store(self.a["y"], result, at[r] + v * lanes, lanes)
                continue
            for v, cell in enumerate(acc[r]):
                store(self.a["y"], cell.get(), at[r] + v * lanes, lanes)
            with loop(0, len(acc[r])) as v:
                value = load(self.a["y"], at[r] + v * lanes, lanes)
                values = [bind(value), *(o(v * lanes) for o in operands)]
                result = expression.emit(tree, values, lanes)
                store(self.a["y"], result, at[r] + v * lanes, lanes)

    def operand_loads(self, row: Expr, offset: int) -> list[Any]:
        """Per operand a function from the point offset in the pass to its vector."""
        a, lanes = self.a, self.spec.lanes
        loads: list[Any] = []
        for i, kind in enumerate(self.spec.operands):
            if kind == "feature":
                value = bind(splat(load(a[f"o{i}"], row), lanes))
                loads.append(partial(_constant, value))
                continue
            base = self.image * a[f"o{i}_image"] + self.tile * a[f"o{i}_tile"]
            base = bind(base + row * a[f"o{i}_row"] + offset)
            loads.append(partial(_load_from, a[f"o{i}"], base, lanes))
        return loads


def _constant(value: Expr, at: int) -> Expr:
    return value


def _load_from(pointer: Expr, base: Expr, lanes: int, at: int) -> Expr:
    return load(pointer, base + at, lanes)


def _operators(tree: expression.Tree) -> set[str]:
    """All node types of an expression."""
    below = (_operators(c) for c in tree[1:] if isinstance(c, tuple))
    return {tree[0]}.union(*below)


def reference(
    weight: np.ndarray, x: np.ndarray, bias: np.ndarray, epilogue: Any = None, *operands: Any
) -> np.ndarray:
    """The meaning: weight [rows, columns], x [columns, points] -> [rows, points], float64."""
    y = bias.astype(np.float64)[:, None] + weight.astype(np.float64) @ x.astype(np.float64)
    return y if epilogue is None else expression.evaluate(epilogue, [y, *operands])
