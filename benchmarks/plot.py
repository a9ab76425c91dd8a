"""Plots of time against zeros as self-contained SVG text, one per workload."""

from collections.abc import Iterable, Sequence
from html import escape

from benchmarks.results import Row

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 64, 150, 40, 48
COLOURS = ("#444444", "#0a7d4b", "#c2410c", "#1d4ed8", "#9333ea", "#a16207")
N_TICKS = 5
LABEL = 32  # width of a label

Point = tuple[float, float]
"""Zeros in per cent, time in ms."""


def plots(rows: Iterable[Row]) -> dict[str, str]:
    """Workload and pattern -> SVG, for those measured at two densities or more."""
    series: dict[str, dict[str, list[Point]]] = {}
    for row in rows:
        if row.median_ms is not None:
            is_plain = row.pattern in ("dense", "unstructured")
            name = row.workload if is_plain else f"{row.workload} {row.pattern}"
            lines = series.setdefault(name, {})
            lines.setdefault(row.engine, []).append((row.zeros_percent, row.median_ms))
    return {
        name: svg(name, lines)
        for name, lines in series.items()
        if len({x for points in lines.values() for x, _ in points}) > 1
    }


def svg(title: str, lines: dict[str, list[Point]]) -> str:
    """One plot: linear axes from zero, a line and a legend entry per engine."""
    top_ms = 1.08 * max(y for points in lines.values() for _, y in points)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="24" font-size="15">{escape(title)}: ms against zeros</text>',
        *_axes(top_ms, sorted({x for points in lines.values() for x, _ in points})),
    ]
    for i, (engine, points) in enumerate(lines.items()):
        parts += _line(sorted(points), top_ms, COLOURS[i % len(COLOURS)])
        parts.append(_legend(engine, i))
    return "\n".join([*parts, "</svg>", ""])


def _axes(top_ms: float, zeros: Sequence[float]) -> list[str]:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for i in range(N_TICKS):
        ms = top_ms * i / (N_TICKS - 1)
        y = _y(ms, top_ms)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{right}" stroke="#dddddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{ms:.3g}</text>')
    for x in _apart(zeros):
        parts.append(f'<text x="{_x(x):.1f}" y="{bottom + 20}" text-anchor="middle">{x:g} %</text>')
    return parts


def _apart(zeros: Sequence[float]) -> list[float]:
    """Those of sorted `zeros` whose labels have room, from the right."""
    kept: list[float] = []
    for x in reversed(zeros):
        if not kept or _x(kept[-1]) - _x(x) >= LABEL:
            kept.append(x)
    return kept


def _line(points: Sequence[Point], top_ms: float, colour: str) -> list[str]:
    places = [(_x(x), _y(y, top_ms)) for x, y in points]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    return [
        f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>',
        *(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places),
    ]


def _legend(engine: str, index: int) -> str:
    y = TOP + 20 * index + 10
    colour = COLOURS[index % len(COLOURS)]
    return f'<text x="{WIDTH - RIGHT + 12}" y="{y}" fill="{colour}">{escape(engine)}</text>'


def _x(zeros: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * zeros / 100


def _y(ms: float, top_ms: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * ms / top_ms
