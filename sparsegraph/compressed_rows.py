"""Compressed sparse rows: what a matrix holds beside zeros, row by row. NumPy only."""

from typing import Any, NamedTuple

import numpy as np


class Rows(NamedTuple):
    """Row i holds values[n] at columns[n] for n in [starts[i], starts[i + 1])."""

    values: np.ndarray
    columns: np.ndarray
    starts: np.ndarray

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self)


def pack(matrix: np.ndarray, index: Any) -> Rows:
    """The non-zeros of [rows, columns] as float32, columns of type `index`, starts as int32."""
    rows, columns = np.nonzero(matrix)
    starts = np.searchsorted(rows, np.arange(len(matrix) + 1)).astype(np.int32)
    return Rows(matrix[rows, columns].astype(np.float32), columns.astype(index), starts)


def unpack(rows: Rows, n_columns: int) -> np.ndarray:
    """The matrix of `pack`."""
    matrix = np.zeros((len(rows.starts) - 1, n_columns), np.float32)
    matrix[np.repeat(np.arange(len(matrix)), np.diff(rows.starts)), rows.columns] = rows.values
    return matrix
