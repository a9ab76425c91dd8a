"""Rows of a constant table without its zeros, picked by indices that are known at run time.

    y[m, :] = table[indices[m], :]

`coded` tables hold values[n] at columns[n] of row i for n in [starts[i], starts[i + 1]): a row of y
is cleared, then filled in. Others leave out whole rows of zeros: row i is number places[i] of
those that are kept, or zero if that is negative. Wrong indices are taken as in `GatherRows`.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from sparsegraph.targets import emit
from sparsegraph.targets.emit import Expr, bind, const, load, loop, splat, store
from sparsegraph.targets.kernels.movement import wrapped
from sparsegraph.targets.kernels.vectors import each_vector
from sparsegraph.targets.target import Target

MOST_COLUMNS = 1 << 16  # of a `coded` table


@dataclass(frozen=True)
class Embedding:
    """Spec of one kernel.

    Arguments: y, values, then columns and starts or places, indices, columns of the table, rows of
    the table. Items: indices.

    Attributes:
        index: element type of the indices (int32 or int64).
        coded: zeros are left out one by one, not by rows.
    """

    index: str = "int64"
    coded: bool = False

    @property
    def name(self) -> str:
        return f"embedding_f32_{self.index}" + "_coded" * self.coded

    @property
    def params(self) -> emit.Signature:
        kept = "columns:uint16* starts:int32*" if self.coded else "places:int32*"
        return emit.signature(
            f"y:float32* values:float32* {kept} indices:{self.index}* inner:int32 n:int32"
        )

    def body(self, target: Target) -> Any:
        return lambda **args: self._emit(args, target.lanes)

    def _emit(self, a: dict[str, Expr], lanes: int) -> None:
        fill = self._fill if self.coded else self._copy
        with loop(a["begin"], a["end"]) as item:
            row = bind(wrapped(load(a["indices"], item), a["n"]))
            fill(a, row, bind(item * a["inner"]), lanes)

    def _fill(self, a: dict[str, Expr], row: Expr, to: Expr, lanes: int) -> None:
        _clear(a, to, lanes)
        with loop(load(a["starts"], row), load(a["starts"], row + 1)) as k:
            column = emit.T.cast(load(a["columns"], k), "int32")
            store(a["y"], load(a["values"], k), to + column)

    def _copy(self, a: dict[str, Expr], row: Expr, to: Expr, lanes: int) -> None:
        place = bind(load(a["places"], row))
        source = bind(place * a["inner"])

        def copy(i: Expr, width: int) -> None:
            store(a["y"], load(a["values"], source + i, width), to + i, width)

        with emit.choose(place < 0) as (is_zero, is_kept):
            with is_zero:
                _clear(a, to, lanes)
            with is_kept:
                each_vector(a["inner"], lanes, copy)


def _clear(a: dict[str, Expr], to: Expr, lanes: int) -> None:
    def clear(i: Expr, width: int) -> None:
        store(a["y"], splat(const(0.0), width), to + i, width)

    each_vector(a["inner"], lanes, clear)


class Kept(NamedTuple):
    """The rows of a table that are not zero, and for each row of the table its place or -1."""

    values: np.ndarray
    places: np.ndarray


def keep_rows(table: np.ndarray) -> Kept:
    """[rows, columns] without rows of zeros, as float32; places are int32."""
    kept = table.any(axis=1)
    places = np.where(kept, np.cumsum(kept) - 1, -1).astype(np.int32)
    return Kept(np.ascontiguousarray(table[kept], np.float32), places)


KERNELS = tuple(Embedding(i, c) for i in ("int32", "int64") for c in (False, True))
