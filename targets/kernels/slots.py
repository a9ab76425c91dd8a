"""A constant matrix with many zeros times a vector: a classifier, a recurrent weight and its state.

The matrix is cut into panels of rows, at most a vector of them. A slot is a column of a panel that
holds any non-zero value: its values, one for each row, and its number. So a panel of one row stores
non-zeros alone; where rows share their zeros (16x1 blocks, as in sparse vocoders: Kalchbrenner et
al. 2018, arXiv:1802.08435), every value that is stored counts.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from sparsegraph.targets import emit
from sparsegraph.targets.emit import Cell, Expr, bind, const, load, loop, splat
from sparsegraph.targets.target import Target

UNROLLED = 4  # slots per turn
MOST_COLUMNS = 1 << 16
ROWS = (1, 4, 8, 16)
"""Rows of a panel, as far as a vector holds them."""
PARAMS = "values:float32* columns:uint16* starts:int32* order:int32* "
"""The arrays of `Slots`."""


def add_slots(
    a: Mapping[str, Expr], panel: Expr, x: Expr, start: Expr, rows: int, target: Target,
    step: Expr | int = 1,
) -> Expr:  # fmt: skip
    """The sums of one panel times the vector whose elements lie `step` apart from x[start] on.

    `a` holds `values`, `columns` and `starts` of `Slots`. Several sums hide the latency of a
    product.
    """

    def wide(number: Expr) -> Expr:
        return emit.T.cast(number, "int64" if "64" in target.arch else "int32")

    first, stop = (bind(wide(load(a["starts"], panel + i))) for i in (0, 1))
    sums = [Cell("float32", rows) for _ in range(UNROLLED)]
    for cell in sums:
        cell.set(splat(const(0.0), rows))
    begin, step = bind(wide(start)), step if step == 1 else bind(wide(step))
    with loop(first, stop) as turn:
        for i, cell in enumerate(sums):
            slot = turn * UNROLLED + i
            at = begin + wide(load(a["columns"], slot)) * step
            value = bind(splat(load(x, at), rows))
            cell.set(cell.get() + load(a["values"], slot * rows, rows) * value)
    pairs = [bind(sums[i].get() + sums[i + 1].get()) for i in range(0, UNROLLED, 2)]
    return bind(sum(pairs[1:], pairs[0]))


class Slots(NamedTuple):
    """A matrix in slots, `UNROLLED` to a turn.

    Attributes:
        values: float32 [slots, rows].
        columns: uint16 [slots]; what fills the last turn of a panel is zeros of column 0.
        starts: int32 [panels + 1], in turns.
        order: int32 [panels], which of the matrix each panel is: those of equal length follow each
            other, so that the end of a loop is foreseen.
    """

    values: np.ndarray
    columns: np.ndarray
    starts: np.ndarray
    order: np.ndarray


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


def panels_of(weight: np.ndarray, rows: int) -> np.ndarray:
    """[n, columns] -> [panels, rows, columns]; the last panel is filled with rows of zeros."""
    full = np.zeros((-(-len(weight) // rows) * rows, weight.shape[1]), np.float32)
    full[: len(weight)] = weight
    return full.reshape(-1, rows, weight.shape[1])
