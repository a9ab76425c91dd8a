"""A constant matrix with many zeros times a vector, such as a recurrent weight times its state.

The matrix is cut into panels of rows, at most a vector of them. A slot is a column of a panel that
holds any non-zero value: its values, one for each row, and its number. So a panel of one row stores
non-zeros alone; where rows share their zeros (16x1 blocks, as in sparse vocoders: Kalchbrenner et
al. 2018, arXiv:1802.08435), every value that is stored counts.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from sparsegraph.targets import emit
from sparsegraph.targets.emit import Cell, Expr, bind, const, load, loop, splat
from sparsegraph.targets.kernels.vector_product import panels_of
from sparsegraph.targets.target import Target

UNROLLED = 4  # slots per turn


def add_slots(
    a: Mapping[str, Expr], turns: Sequence[Expr], x: Expr, start: Expr, rows: int, target: Target
) -> Expr:
    """The sums of one panel times the vector at x[start].

    `turns` are the panel's first and the one behind its last; `a` holds `values` and `columns` of
    `Slots`. Several sums hide the latency of a product.
    """

    def wide(number: Expr) -> Expr:
        return emit.T.cast(number, "int64" if "64" in target.arch else "int32")

    first, stop = turns
    sums = [Cell("float32", rows) for _ in range(UNROLLED)]
    for cell in sums:
        cell.set(splat(const(0.0), rows))
    begin = bind(wide(start))
    with loop(bind(wide(first)), bind(wide(stop))) as turn:
        for i, cell in enumerate(sums):
            slot = turn * UNROLLED + i
            value = bind(splat(load(x, begin + wide(load(a["columns"], slot))), rows))
            cell.set(cell.get() + load(a["values"], slot * rows, rows) * value)
    pairs = [bind(sums[i].get() + sums[i + 1].get()) for i in range(0, UNROLLED, 2)]
    return bind(sum(pairs[1:], pairs[0]))


class Slots(NamedTuple):
    """A matrix in slots, `UNROLLED` to a turn.

    Attributes:
        values: float32 [slots, rows].
        columns: uint16 [slots]; what fills the last turn of a panel is zeros of column 0.
        starts: int32 [panels + 1], in turns.
        panels: int32 [panels], which rows each panel has: those of equal length follow each other,
            so that the end of a loop is foreseen.
    """

    values: np.ndarray
    columns: np.ndarray
    starts: np.ndarray
    panels: np.ndarray


def n_slots(weight: np.ndarray, rows: int) -> int:
    """Slots of a weight in panels of `rows` rows, without what fills turns."""
    return int(np.count_nonzero(panels_of(weight, rows).any(axis=1)))


def pack_slots(weight: np.ndarray, rows: int) -> Slots:
    """[n, columns] in panels of `rows` rows, the last padded with rows of zeros."""
    panels = panels_of(weight, rows)
    turns = -(-np.count_nonzero(panels.any(axis=1), axis=1) // UNROLLED)
    order = np.argsort(turns, kind="stable")
    values, columns = [], []
    for i in order:
        used = np.flatnonzero(panels[i].any(axis=0))
        spare = -len(used) % UNROLLED
        values.append(np.pad(panels[i][:, used].T, ((0, spare), (0, 0))))
        columns.append(np.pad(used, (0, spare)))
    return Slots(
        np.concatenate(values), np.concatenate(columns).astype(np.uint16),
        np.concatenate([[0], turns[order].cumsum()]).astype(np.int32), order.astype(np.int32),
    )  # fmt: skip
