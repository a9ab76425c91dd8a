"""How a weight matrix [rows, columns] is stored for the product kernels. NumPy only.

Columns are cut into column tiles, so that the activation panel of one tile stays in the level 1
cache; rows are cut into groups that are computed together and share every activation load.

`dense`: values in the order [column tile][group][column][row of group].

`coded`: for every column of a group, the code says which of its rows are non-zero (bit r for row
r). Per (tile, group): for each code 1 .. 2**rows-1 the number of columns that have it (`counts`),
then these columns in turn: their index in the tile (`columns`) and the non-zero values of the
group's rows (`values`). A zero column vanishes, nothing is padded, the kernel has one loop per code
and no test per value. One row per group is CSR with column tiles.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packed:
    """A weight matrix in the order in which a product kernel reads it.

    Attributes:
        rows, columns: logical extents.
        tile: columns per column tile (the last tile may have fewer).
        row_index: int32 [groups, group], output row of each slot. Slots past the last row repeat
            it; the kernel stores the slots of a group in reverse, so the real row wins.
        chunks: int32 [chunks, 5]: first value, first column index, first count, first group and
            number of groups of each part of the rows that can be computed on its own.
        values: float32. column_index, counts: uint16, empty for `dense`.
    """

    rows: int
    columns: int
    tile: int
    row_index: np.ndarray
    chunks: np.ndarray
    values: np.ndarray
    column_index: np.ndarray
    counts: np.ndarray

    @property
    def group(self) -> int:
        """Rows per group."""
        return int(self.row_index.shape[1])

    @property
    def n_tiles(self) -> int:
        return -(-self.columns // self.tile)

    @property
    def n_bytes(self) -> int:
        arrays = (self.row_index, self.chunks, self.values, self.column_index, self.counts)
        return sum(a.nbytes for a in arrays)


def pack_dense(weight: np.ndarray, group: int, tile: int, chunks: int = 1) -> Packed:
    """Pack every value of `weight` [rows, columns]."""
    values: list[np.ndarray] = []
    starts = []
    size = first = 0
    row_index = _row_index(len(weight), group)
    for groups in np.array_split(row_index, min(chunks, len(row_index))):
        starts.append((size, 0, 0, first, len(groups)))
        first += len(groups)
        for part in _tiles(weight, groups, tile):
            values.append(np.ascontiguousarray(part.transpose(0, 2, 1)).ravel())
            size += part.size
    none = np.empty(0, np.uint16)
    packed = np.concatenate(values).astype(np.float32, copy=False)
    return Packed(
        len(weight),
        weight.shape[1],
        tile,
        row_index,
        np.array(starts, np.int32),
        packed,
        none,
        none,
    )


def pack_coded(weight: np.ndarray, group: int, tile: int, chunks: int = 1) -> Packed:
    """Pack the non-zero values of `weight` [rows, columns]; `tile` is at most 65,535."""
    bits = (1 << np.arange(group)).astype(np.int32)
    values: list[np.ndarray] = []
    columns: list[np.ndarray] = []
    counts: list[np.ndarray] = []
    starts = []
    sizes = np.zeros(3, np.int64)
    first = 0
    row_index = _row_index(len(weight), group)
    for groups in np.array_split(row_index, min(chunks, len(row_index))):
        starts.append((*sizes, first, len(groups)))
        first += len(groups)
        repeats = np.zeros(groups.shape, bool)
        repeats[:, 1:] = groups[:, 1:] == groups[:, :-1]
        for part in _tiles(weight, groups, tile):
            live = (part != 0) & ~repeats[:, :, None]
            code = np.einsum("grc,r->gc", live, bits)
            counts.append(np.stack([(code == c).sum(1) for c in range(1, 1 << group)], 1))
            g, column = np.nonzero(code)
            order = np.argsort(g * (1 << group) + code[g, column], kind="stable")
            g, column = g[order], column[order]
            values.append(part[g, :, column][live[g, :, column]])
            columns.append(column)
            sizes += (values[-1].size, columns[-1].size, counts[-1].size)
    return Packed(
        len(weight),
        weight.shape[1],
        tile,
        row_index,
        np.array(starts, np.int32),
        np.concatenate(values).astype(np.float32, copy=False),
        np.concatenate(columns).astype(np.uint16),
        np.concatenate([c.ravel() for c in counts]).astype(np.uint16),
    )


def unpack(packed: Packed) -> np.ndarray:
    """The weight matrix [rows, columns] that `packed` holds."""
    weight = np.zeros((packed.rows, packed.columns), np.float32)
    read = _unpack_coded if packed.counts.size else _unpack_dense
    for *start, first, n_groups in packed.chunks.tolist():
        read(packed, packed.row_index[first : first + n_groups], start, weight)
    return weight


def _unpack_dense(p: Packed, groups: np.ndarray, start: list[int], weight: np.ndarray) -> None:
    at = start[0]
    for first in range(0, p.columns, p.tile):
        columns = np.arange(first, min(first + p.tile, p.columns))
        shape = (len(groups), len(columns), p.group)
        size = int(np.prod(shape))
        part = p.values[at : at + size].reshape(shape).transpose(0, 2, 1)
        weight[groups[:, :, None], columns] = part
        at += size


def _unpack_coded(p: Packed, groups: np.ndarray, start: list[int], weight: np.ndarray) -> None:
    v, i, c = start
    for first in range(0, p.columns, p.tile):
        for rows in groups:
            for code in range(1, 1 << p.group):
                live = [r for r in range(p.group) if code >> r & 1]
                n = int(p.counts[c])
                columns = p.column_index[i : i + n].astype(np.int64) + first
                part = p.values[v : v + n * len(live)].reshape(n, len(live))
                for slot, r in enumerate(live):
                    weight[rows[r], columns] = part[:, slot]
                v, i, c = v + n * len(live), i + n, c + 1


def _row_index(rows: int, group: int) -> np.ndarray:
    slots = np.arange(-(-rows // group) * group, dtype=np.int32).reshape(-1, group)
    return np.minimum(slots, np.int32(rows - 1))


def _tiles(weight: np.ndarray, groups: np.ndarray, tile: int) -> list[np.ndarray]:
    """The column tiles of the rows of `groups`, each [groups, group, columns of the tile]."""
    n = weight.shape[1]
    return [weight[:, first : first + tile][groups] for first in range(0, n, tile)]
