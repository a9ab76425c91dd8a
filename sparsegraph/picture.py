"""Inline SVG: heat maps of weights, bar charts of times."""

from collections import defaultdict
from collections.abc import Sequence
from html import escape

_CELL = 6  # pixels of one cell of a heat map
_LEVELS = 8
_BAR, _GAP, _LABEL, _PLOT = 16, 6, 300, 420
_LONGEST_LABEL = 46  # characters
DENSE_COLOUR, OURS_COLOUR = "#8a8f98", "#0a7d4b"


def heat_map(grid: Sequence[Sequence[float]]) -> str:
    """Cells [outputs, inputs] with values in [0, 1]: empty is white, full is dark."""
    height, width = len(grid) * _CELL, len(grid[0]) * _CELL if grid else 0
    cells: dict[int, list[str]] = defaultdict(list)
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            level = min(_LEVELS, -int(-value * _LEVELS // 1))  # only an empty cell is level 0
            if level:
                cells[level].append(f"M{x * _CELL} {y * _CELL}h{_CELL}v{_CELL}h-{_CELL}z")
    paths = "".join(
        f'<path d="{"".join(parts)}" fill-opacity="{level / _LEVELS:.3g}"/>'
        for level, parts in sorted(cells.items())
    )
    return (
        f'<svg class="map" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img"><rect width="{width}" height="{height}" fill="#fff"/>'
        f'<g fill="{OURS_COLOUR}">{paths}</g></svg>'
    )


def bars(rows: Sequence[tuple[str, float]]) -> str:
    """One bar per (label, value); the first is the reference and grey."""
    coloured = [
        (label, value, OURS_COLOUR if i else DENSE_COLOUR) for i, (label, value) in enumerate(rows)
    ]
    return _chart([coloured])


def pairs(rows: Sequence[tuple[str, float | None, float]]) -> str:
    """Two bars per (label, dense, ours): grey above green; no grey one where dense is None."""
    groups = []
    for label, dense, ours in rows:
        group = [] if dense is None else [(label, dense, DENSE_COLOUR)]
        groups.append([*group, ("" if group else label, ours, OURS_COLOUR)])
    return _chart(groups)


def _chart(groups: Sequence[Sequence[tuple[str, float, str]]]) -> str:
    longest = max((value for group in groups for _, value, _ in group), default=0.0) or 1.0
    parts, y = [], 0
    for group in groups:
        for label, value, colour in group:
            width = _PLOT * value / longest
            middle = y + _BAR * 0.75
            parts.append(
                f'<text x="{_LABEL - 8}" y="{middle}" text-anchor="end">{_short(label)}</text>'
                f'<rect x="{_LABEL}" y="{y}" width="{width:.1f}" height="{_BAR - 1}" '
                f'fill="{colour}"/>'
                f'<text x="{_LABEL + width + 6:.1f}" y="{middle}">{value:.3g}</text>'
            )
            y += _BAR
        y += _GAP
    total = _LABEL + _PLOT + 60
    return (
        f'<svg class="chart" viewBox="0 0 {total} {y}" width="{total}" height="{y}" role="img" '
        f'font-size="12" fill="currentColor">{"".join(parts)}</svg>'
    )


def _short(label: str) -> str:
    """The end of a long name: that is where names differ."""
    return escape(label if len(label) <= _LONGEST_LABEL else "…" + label[-_LONGEST_LABEL + 1 :])
