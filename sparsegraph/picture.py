"""Inline SVG: heat maps of weights, bar charts of times, trade-offs."""

from collections import defaultdict
from collections.abc import Sequence
from html import escape

_CELL = 6  # pixels of one cell of a heat map
_LEVELS = 8
_BAR, _GAP, _LABEL, _PLOT = 16, 6, 300, 420
_LONGEST_LABEL = 46  # characters
_LEFT, _UNDER, _HIGH, _WIDE = 60, 40, 260, 480  # of a trade-off, pixels
_N_TICKS = 5
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


def curve(
    points: Sequence[tuple[float, float]],
    chosen: tuple[float, float] | None,
    labels: tuple[str, str],
) -> str:
    """A trade-off as a line through (x, y), axes from zero; a large dot where the choice lies.

    Values may not be negative.
    """
    drawn = [*points, *([chosen] if chosen else [])]
    most_x, most_y = (max((p[i] for p in drawn), default=0.0) or 1.0 for i in (0, 1))

    def place(x: float, y: float) -> tuple[float, float]:
        return _LEFT + _WIDE * x / most_x, 10 + _HIGH * (1 - y / most_y)

    parts = []
    for i in range(_N_TICKS):
        share = i / (_N_TICKS - 1)
        x, y = place(share * most_x, share * most_y)
        bottom = 10 + _HIGH
        parts.append(
            f'<path d="M{_LEFT} {y:.1f}H{_LEFT + _WIDE}" stroke="#8884"/>'
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{share * most_y:.3g}</text>'
            f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{share * most_x:.3g}</text>'
        )
    line = "L".join("{:.1f} {:.1f}".format(*place(*p)) for p in sorted(points))
    parts.append(f'<path d="M{line}" fill="none" stroke="{OURS_COLOUR}" stroke-width="2"/>')
    dots = [(p, 3) for p in points] + ([(chosen, 7)] if chosen else [])
    for p, radius in dots:
        x, y = place(*p)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{OURS_COLOUR}"/>')
    right, low = _LEFT + _WIDE, 10 + _HIGH + 34
    parts.append(f'<text x="{right}" y="{low}" text-anchor="end">{escape(labels[0])}</text>')
    parts.append(f'<text x="{_LEFT + 8}" y="22">{escape(labels[1])}</text>')
    total, height = right + 20, 10 + _HIGH + _UNDER
    return (
        f'<svg class="chart" viewBox="0 0 {total} {height}" width="{total}" height="{height}" '
        f'role="img" font-size="12" fill="currentColor">{"".join(parts)}</svg>'
    )


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
