"""How a weight matrix [rows, columns] is stored for the product kernels. NumPy only.

Columns are cut into column tiles, so that the activation panel of one tile stays in the level 1
cache. Rows are computed in groups that keep their sums in registers.

`dense`: values in the order [column tile][group][column][row of group].

`coded`: only the non-zero values, in quads, since four values and four indices are one load each.
A pair of rows has `both` quads (two columns that both rows have: one activation load serves two
rows) and `single` quads (two columns of each row); a group of one row has single quads of four
columns. Rows of a tile are paired anew in each column tile: rows of equal counts that share many
columns. Groups of four are neighbours that have all columns in common, a value quad per column.
Groups of equal counts follow each other, so that the trip counts of the loops repeat and branches
are predicted. Counts are made equal and whole quads by taking a few columns of the next tile
(`reach`), at the end of a row by values of 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

QUAD = 4  # values that are loaded at once
GROUPS_AHEAD = 3  # how far the kernel looks ahead in `slots` of `coded`
QUADS_AHEAD = 8  # and in `column_index`
ALIKE = 4  # rows of a group whose columns are all shared
MOST = 1 << 16  # a column index is less
_BLOCK = 512  # rows that are paired among each other; their sums stay in the level 2 cache
_SHARED_STEP = 4  # the shared columns of a pair are a multiple of this: fewer different counts


@dataclass(frozen=True)
class Packed:
    """A weight matrix in the order in which a product kernel reads it.

    Attributes:
        rows, columns: logical extents.
        tile: columns per column tile (the last tile may have fewer).
        group: rows that are computed together.
        slots: int32, output rows in the order of the groups. `dense`: [groups, group], once for all
            column tiles. `coded`: [groups, 4] per block and tile: first and last row, `both` quads
            and `single` quads; `GROUPS_AHEAD` more at the end, which the kernel looks ahead to. A
            row that fills up a group is the group's first; the kernel stores the rows of a group in
            reverse, so the real row wins.
        chunks: int32 [chunks, 5]: first value, first quad of columns, first entry of `counts`,
            first slot (`dense`) or group (`coded`), and number of groups (`dense`) or blocks of
            rows (`coded`) of each part of the rows that can be computed on its own.
        values: float32; `coded` has one spare quad at the end, which the kernel loads ahead.
        column_index: int64, four uint16 columns of the tile each, `QUADS_AHEAD` more at the end,
            which the kernel looks ahead to; empty for `dense`.
        counts: int32: groups per block and tile; empty for `dense`.
        step: what `column_index` counts for one column.
    """

    rows: int
    columns: int
    tile: int
    group: int
    slots: np.ndarray
    chunks: np.ndarray
    values: np.ndarray
    column_index: np.ndarray
    counts: np.ndarray
    step: int = 1

    @property
    def n_tiles(self) -> int:
        return -(-self.columns // self.tile)

    @property
    def n_bytes(self) -> int:
        arrays = (self.slots, self.chunks, self.values, self.column_index, self.counts)
        return sum(a.nbytes for a in arrays)


def shared_rows(weight: np.ndarray, sizes: Sequence[int] = (4, 2)) -> int:
    """How many neighbouring rows of `weight` [rows, ...] have nearly the same zeros: 4, 2 or 1.

    Or the first of `sizes`, the largest one first.
    """
    kept = weight.reshape(len(weight), -1) != 0
    for n in sizes:
        groups = kept[: len(kept) // n * n].reshape(-1, n, kept.shape[1])
        if n * groups.all(1).sum() > 0.95 * groups.sum():
            return n
    return 1


def pack_dense(weight: np.ndarray, group: int, tile: int, chunks: int = 1) -> Packed:
    """Pack every value of `weight` [rows, columns]."""
    values: list[np.ndarray] = []
    starts = []
    size = first = 0
    slots = _slots(np.arange(len(weight)), group).reshape(-1, group)
    for groups in np.array_split(slots, min(chunks, len(slots))):
        starts.append((size, 0, 0, first * group, len(groups)))
        first += len(groups)
        for column in range(0, weight.shape[1], tile):
            part = weight[:, column : column + tile][groups]
            values.append(np.ascontiguousarray(part.transpose(0, 2, 1)).ravel())
            size += part.size
    return Packed(
        len(weight), weight.shape[1], tile, group, slots.ravel(), np.array(starts, np.int32),
        np.concatenate(values).astype(np.float32, copy=False),
        np.empty(0, np.int64), np.empty(0, np.int32),
    )  # fmt: skip


def pack_coded(
    weight: np.ndarray, group: int, tile: int, chunks: int = 1, *, reach: int = 0, step: int = 1
) -> Packed:
    """Pack the non-zero values of `weight` [rows, columns].

    Args:
        weight: [rows, columns].
        group: 1, 2 or 4 rows; of 4, a divisor of the rows, each row takes all columns of its group.
        tile: columns per column tile; `step * (tile + reach)` is at most `MOST`.
        chunks: parts of the rows that can be computed on their own.
        reach: columns past the end of its tile that a row may take. The kernel must find them
            behind the panel (0 where the panel is gathered).
        step: distance of two columns in the kernel's unit of addresses.
    """
    streams = _Streams(step)
    starts = []
    whole = np.arange(len(weight)).reshape(-1, group if group == ALIKE else 1)
    for part in np.array_split(whole, min(chunks, -(-len(weight) // group))):
        parts = np.array_split(part, -(-part.size // _BLOCK) if reach else 1)
        blocks = [rows.ravel() for rows in parts]
        starts.append((*streams.sizes(), len(blocks)))
        for block in blocks:
            _pack_block(weight, block, group, tile, reach, streams)
    records, values, columns, counts = streams.joined()
    records = np.concatenate([records, np.repeat(records[-1:], GROUPS_AHEAD, 0)])
    columns = np.concatenate([columns, np.zeros(QUADS_AHEAD, np.int64)])
    spare = np.zeros(QUAD, np.float32)
    return Packed(
        len(weight), weight.shape[1], tile, group, records.ravel(), np.array(starts, np.int32),
        np.concatenate([values, spare]), columns, counts, step,
    )  # fmt: skip


_Piece = tuple[np.ndarray, np.ndarray, np.ndarray]  # arguments of _Streams.add


class _Streams:
    """The streams of `coded`, in pieces."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.records: list[np.ndarray] = []
        self.values: list[np.ndarray] = []
        self.columns: list[np.ndarray] = []
        self.counts: list[int] = []

    def add(self, values: np.ndarray, columns: np.ndarray, records: np.ndarray) -> None:
        """Append groups; `columns` [quads, 4], `records` [groups, 4]."""
        words = columns.reshape(-1, QUAD).astype(np.int64) * self.step
        words = words[:, 0] | words[:, 1] << 16 | words[:, 2] << 32 | words[:, 3] << 48
        self.values.append(values.astype(np.float32).ravel())
        self.columns.append(words)
        self.records.append(records.astype(np.int32))

    def sizes(self) -> tuple[int, int, int, int]:
        """Entries so far: values, quads of columns, counts, groups."""
        values, columns, groups = (
            sum(map(len, pieces)) for pieces in (self.values, self.columns, self.records)
        )
        return values, columns, len(self.counts), groups

    def joined(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """records, values, columns, counts."""
        return (
            np.concatenate(self.records), np.concatenate(self.values),
            np.concatenate(self.columns), np.array(self.counts, np.int32),
        )  # fmt: skip


def _pack_block(
    weight: np.ndarray, rows: np.ndarray, group: int, tile: int, reach: int, streams: _Streams
) -> None:
    """Append the rows `rows` of `weight`, tile by tile."""
    part = weight[rows[0] : rows[-1] + 1]
    done = np.zeros(len(rows), np.int64)  # columns of each row before this one are stored
    for first in range(0, weight.shape[1], tile):
        panel = part[:, first : first + tile + reach]
        width = min(tile, weight.shape[1] - first)
        column = np.arange(panel.shape[1])
        kept = panel != 0
        if group == ALIKE:
            kept = kept.reshape(-1, group, len(column)).any(1).repeat(group, 0)
        live = kept & (column >= (done - first)[:, None])
        counts = _counts(live, width, group)
        taken = live & (live.cumsum(1) <= counts[:, None])
        last = panel.shape[1] - taken[:, ::-1].argmax(1)
        done = np.maximum(done, first + np.where(taken.any(1), last, width))
        pieces: list[_Piece] = []
        for at in range(0, len(rows), _BLOCK):
            window = slice(at, at + _BLOCK)
            make = _neighbours if group == ALIKE else _groups
            groups, n, shared = make(taken[window], counts[window], group)
            pieces += _runs(panel[window], taken[window], groups, n, shared, rows[window])
        streams.counts.append(sum(len(records) for *_, records in pieces))
        for piece in pieces:
            streams.add(*piece)


def _counts(live: np.ndarray, width: int, group: int) -> np.ndarray:
    """Values that each row stores in this tile: those below `width`, filled up to whole steps."""
    step = QUAD // group if group < ALIKE else QUAD
    need, available = live[:, :width].sum(1), live.sum(1)
    even = -(-need // 8) * 8
    rest = -(-np.minimum(even, available) // step) * step
    counts: np.ndarray = np.where(available >= even, even, rest)
    return counts


def _groups(
    taken: np.ndarray, counts: np.ndarray, group: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which rows are computed together.

    Returns:
        [groups, group] indices of rows (equal ones fill up a pair), values per row of each group,
        shared columns of each group; sorted by the latter two.
    """
    order = np.argsort(counts, kind="stable")
    if group == 1:
        return order[:, None], counts[order], np.zeros(len(order), np.int64)
    ones = taken.astype(np.float32)
    overlap = (ones @ ones.T).astype(np.int32)
    np.fill_diagonal(overlap, 0)
    overlap //= _SHARED_STEP
    pairs: list[tuple[int, int]] = []
    left = -1
    for count in np.unique(counts):
        members = np.flatnonzero(counts == count)
        if left >= 0:
            members = np.concatenate([[left], members])
        left = _match(members, overlap, pairs)
    if left >= 0:
        pairs.append((left, left))
    groups = np.array(pairs)
    n = counts[groups].max(1)
    shared = overlap[groups[:, 0], groups[:, 1]].astype(np.int64) * _SHARED_STEP
    order = np.lexsort((groups[:, 0], shared, n))
    return groups[order], n[order], shared[order]


def _neighbours(
    taken: np.ndarray, counts: np.ndarray, group: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `_groups`, of neighbours that share all columns."""
    groups = np.arange(len(taken)).reshape(-1, group)
    groups = groups[np.argsort(counts[groups[:, 0]], kind="stable")]
    n = counts[groups[:, 0]].astype(np.int64)
    return groups, n, n


def _match(members: np.ndarray, overlap: np.ndarray, pairs: list[tuple[int, int]]) -> int:
    """Pair rows that share most; returns the row that is left over, or -1."""
    score = overlap[np.ix_(members, members)]
    np.fill_diagonal(score, -1)
    free = np.ones(len(members), bool)
    for i in range(len(members)):
        if not free[i]:
            continue
        free[i] = False
        row = np.where(free, score[i], -1)
        j = int(row.argmax())
        if row[j] < 0:
            return int(members[i])
        free[j] = False
        pairs.append((int(members[i]), int(members[j])))
    return -1


def _runs(
    panel: np.ndarray, taken: np.ndarray, groups: np.ndarray, n: np.ndarray, shared: np.ndarray,
    rows: np.ndarray,
) -> list[_Piece]:  # fmt: skip
    """Arguments of _Streams.add for every run of groups with equal counts."""
    change = np.flatnonzero((np.diff(n) != 0) | (np.diff(shared) != 0)) + 1
    pieces: list[_Piece] = []
    for part in np.split(np.arange(len(groups)), change):
        g, count, both = groups[part], int(n[part[0]]), int(shared[part[0]])
        mask = taken[g].copy()
        if g.shape[1] == 2:
            mask[g[:, 0] == g[:, 1], 1] = False
        common = mask.all(1) if both else np.zeros_like(mask[:, 0])
        common &= common.cumsum(1) <= both
        at, values = _pick(panel, g, common[:, None] & mask, both)
        single_at, single = _pick(panel, g, mask & ~common[:, None], count - both)
        size = len(part)
        quads = np.concatenate([at[:, 0].reshape(size, -1), _turn(single_at)], 1)
        stored = np.concatenate([_turn(values), _turn(single)], 1)
        records = np.empty((size, 4), np.int64)
        records[:, :2] = rows[g][:, [0, -1]]
        records[:, 2:] = both // QUAD, (count - both) * g.shape[1] // QUAD
        pieces.append((stored, quads, records))
    return pieces


def _pick(
    panel: np.ndarray, groups: np.ndarray, mask: np.ndarray, n: int
) -> tuple[np.ndarray, np.ndarray]:
    """Columns and values [groups, group, n] where `mask` [groups, group, columns]; rest 0."""
    columns = np.argsort(~mask, axis=2, kind="stable")[:, :, :n]
    if columns.shape[2] < n:
        columns = np.pad(columns, ((0, 0), (0, 0), (0, n - columns.shape[2])))
    valid = np.arange(n) < mask.sum(2)[:, :, None]
    columns = np.where(valid, columns, 0)
    return columns, np.where(valid, panel[groups[:, :, None], columns], 0)


def _turn(array: np.ndarray) -> np.ndarray:
    """[groups, group, n] -> [groups, n * group], the rows of a column side by side."""
    return array.transpose(0, 2, 1).reshape(len(array), -1)


def unpack(packed: Packed) -> np.ndarray:
    """The weight matrix [rows, columns] that `packed` holds."""
    weight = np.zeros((packed.rows, packed.columns), np.float32)
    read = _unpack_coded if packed.counts.size else _unpack_dense
    for start in packed.chunks.tolist():
        read(packed, start, weight)
    return weight


def _unpack_dense(p: Packed, start: list[int], weight: np.ndarray) -> None:
    at, _, _, slot, n_groups = start
    groups = p.slots[slot : slot + n_groups * p.group].reshape(n_groups, p.group)
    for first in range(0, p.columns, p.tile):
        columns = np.arange(first, min(first + p.tile, p.columns))
        shape = (n_groups, len(columns), p.group)
        size = int(np.prod(shape))
        part = p.values[at : at + size].reshape(shape).transpose(0, 2, 1)
        weight[groups[:, :, None], columns] = part
        at += size


def _unpack_coded(p: Packed, start: list[int], weight: np.ndarray) -> None:
    v, c, part, s, n_blocks = start
    index = p.column_index.view(np.uint64)[:, None] >> np.arange(0, 64, 16, dtype=np.uint64)
    listed = (index & np.uint64(0xFFFF)).astype(np.int64) // p.step
    records = p.slots.reshape(-1, 4)
    for _ in range(n_blocks):
        for first in range(0, p.columns, p.tile):
            for *rows, both, single in records[s : s + p.counts[part]].tolist():
                columns = listed[c : c + both].repeat(p.group).ravel()
                columns = np.concatenate([columns, listed[c + both : c + both + single].ravel()])
                values = p.values[v : v + len(columns)]
                listed_rows = range(rows[0], rows[1] + 1) if p.group == ALIKE else rows[: p.group]
                row = np.tile(listed_rows, len(columns) // p.group)
                np.add.at(weight, (row, first + columns), values)
                c, v = c + both + single, v + len(columns)
            s, part = s + int(p.counts[part]), part + 1


def _slots(rows: np.ndarray, group: int) -> np.ndarray:
    """`rows` filled up to whole groups by the first row of the last group."""
    rest = -len(rows) % group
    last = rows[-(len(rows) % group)] if rest else 0
    return np.concatenate([rows, np.full(rest, last)]).astype(np.int32)
