"""One page of HTML from result files: every figure and plot on it is drawn from their JSON.

python -m benchmarks.page results.json ... -o page.html
"""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from benchmarks import plot, report, results
from benchmarks.results import Results, Row

STYLE = (
    "body{font:14px/1.5 system-ui,sans-serif;max-width:1400px;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;font-variant-numeric:tabular-nums}"
    "td,th{padding:.15rem .6rem;border-bottom:1px solid #ddd;text-align:left;white-space:nowrap}"
    ".plots{display:flex;flex-wrap:wrap;gap:1rem}.plots svg{width:640px;max-width:100%}"
    ".best{font-weight:bold;color:#0a7d4b}.facts{color:#666;font-size:12px}"
)
KINDS = {"layers": "Single layers", "models": "Whole models"}

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 640, 420, 60, 50, 40, 20
_FLOPS_PER_BYTE = (0.25, 256.0)
_GFLOPS = (1.0, 256.0)


def main(arguments: list[str] | None = None) -> int:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.page")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    found = [results.load(file) for file in options.files]
    options.output.write_text(page(found))
    return 0


def page(found: Sequence[Results]) -> str:
    """The whole page; `found` may come from different commands on one machine."""
    merged = results.merge(found)
    parts = [
        '<!DOCTYPE html><html lang="en"><meta charset="utf-8">',
        f"<title>sparsegraph: benchmarks</title><style>{STYLE}</style>",
        "<h1>Times faster than ONNX Runtime on the dense model</h1>",
        "<p>Medians; both engines take turns in one pinned process. Bold: the fastest.</p>",
    ]
    for kind, title in KINDS.items():
        rows = [row for row in merged.rows if row.kind == kind]
        if rows:
            parts += [f"<h2>{title}</h2>", _ratios(rows), _plots(rows)]
    roof = next((part.roof for part in reversed(found) if part.roof), {})
    points = _operations(merged.rows)
    if roof and points:
        parts += ["<h2>Roofline</h2>", _ROOFLINE_TEXT, _roofline(roof, points)]
    facts = "".join(f"<li>{escape(report.heading(part))}</li>" for part in found)
    parts.append(f'<h2>Where and how</h2><ul class="facts">{facts}</ul></html>')
    return "\n".join(parts)


def _ratios(rows: Sequence[Row]) -> str:
    """A line per workload, zeros and pattern; a column per engine."""
    engines = list(dict.fromkeys(r.engine for r in rows if r.engine != "ort"))
    lines: dict[tuple[str, float, str, int], dict[str, Row]] = {}
    for row in rows:
        key = (row.workload, row.zeros_percent, row.pattern, row.threads)
        lines.setdefault(key, {})[row.engine] = row
    head = "".join(f"<th>{escape(e)}</th>" for e in engines)
    body = [
        "<tr><th>workload</th><th>zeros</th><th>pattern</th><th>threads</th>"
        f"<th>ONNX Runtime ms</th>{head}</tr>"
    ]
    for (workload, zeros, pattern, threads), by_engine in lines.items():
        reference = next((r.reference_ms for r in by_engine.values() if r.reference_ms), None)
        best = max((r.ratio or 0 for e, r in by_engine.items() if e != "ort"), default=0)
        cells = "".join(_cell(by_engine.get(engine), best) for engine in engines)
        ms = "" if reference is None else f"{reference:.2f}"
        body.append(
            f"<tr><td>{escape(workload)}</td><td>{zeros:g} %</td><td>{escape(pattern)}</td>"
            f"<td>{threads}</td><td>{ms}</td>{cells}</tr>"
        )
    return f"<table>{''.join(body)}</table>"


def _cell(row: Row | None, best: float) -> str:
    if row is None:
        return "<td></td>"
    if row.ratio is None:
        return f'<td title="{escape(row.error or "")}">failed</td>'
    mark = ' class="best"' if row.ratio == best else ""
    return f"<td{mark}>{row.ratio:.2f}</td>"


def _plots(rows: Sequence[Row]) -> str:
    drawn = plot.plots([r for r in rows if r.threads == 1])
    return f'<div class="plots">{"".join(drawn.values())}</div>'


_ROOFLINE_TEXT = (
    "<p>Non-zero multiply-adds per second against non-zero operations per byte of weights that a "
    "layer stores, for our kernels. Lines: what this core does from registers, and what each level "
    "of memory can deliver. Activations are read from the level 1 and 2 caches again and again, so "
    "sparse layers stay under the lines of those: one load per multiply-add is the limit of a row "
    "that shares nothing.</p>"
)


def _operations(rows: Sequence[Row]) -> list[tuple[str, float, float]]:
    """Per layer of ours: label, operations per byte of weights, GF/s of non-zero operations."""
    found = []
    for row in rows:
        is_ours = row.kind == "layers" and row.engine == "sparsegraph" and row.threads == 1
        if is_ours and row.gmacs and row.median_ms and row.weight_bytes:
            flops = 2e9 * row.gmacs * row.density
            label = f"{row.workload} {row.zeros_percent:g} % {row.pattern}"
            found.append((label, flops / row.weight_bytes, 1e-6 * flops / row.median_ms))
    return found


def _roofline(roof: Mapping[str, float], points: Sequence[tuple[str, float, float]]) -> str:
    """Log-log plot as SVG; every point tells its layer when pointed at."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'width="{_WIDTH}" font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="24" font-size="15">GF/s against operations per byte</text>',
    ]
    for value in (0.25, 1, 4, 16, 64, 256):
        x = _x(value)
        parts.append(f'<path d="M{x:.1f} {_TOP}V{_HEIGHT - _BOTTOM}" stroke="#ddd"/>')
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 30}" text-anchor="middle">{value:g}</text>')
    for value in (1, 4, 16, 64, 256):
        y = _y(value)
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    peak = roof["gflops"]
    levels = {"registers": (math.inf, peak), **{k: (v, peak) for k, v in roof.items()}}
    levels.pop("gflops")
    for i, (name, (bandwidth, most)) in enumerate(levels.items()):
        start = max(_FLOPS_PER_BYTE[0], _GFLOPS[0] / bandwidth) if bandwidth < math.inf else 0.25
        bend = max(start, min(_FLOPS_PER_BYTE[1], most / bandwidth))
        path = [(start, min(most, start * bandwidth)), (bend, min(most, bend * bandwidth))]
        path.append((_FLOPS_PER_BYTE[1], most))
        text = "L".join(f"{_x(a):.1f} {_y(b):.1f}" for a, b in path)
        colour = plot.COLOURS[i % len(plot.COLOURS)]
        limit = f"{most:g} GF/s" if bandwidth == math.inf else f"{bandwidth:g} GB/s"
        parts.append(f'<path d="M{text}" fill="none" stroke="{colour}"/>')
        y = _HEIGHT - _BOTTOM - 90 + 16 * i
        parts.append(f'<text x="{_WIDTH - 190}" y="{y}" fill="{colour}">{name}: {limit}</text>')
    for label, x, y in points:
        parts.append(
            f'<circle cx="{_x(x):.1f}" cy="{_y(y):.1f}" r="4" fill="#0a7d4b" fill-opacity=".6">'
            f"<title>{escape(label)}: {y:.1f} GF/s</title></circle>"
        )
    return "\n".join([*parts, "</svg>"])


def _x(value: float) -> float:
    low, high = _FLOPS_PER_BYTE
    share = math.log(min(max(value, low), high) / low) / math.log(high / low)
    return _LEFT + (_WIDTH - _LEFT - _RIGHT) * share


def _y(value: float) -> float:
    low, high = _GFLOPS
    share = math.log(min(max(value, low), high) / low) / math.log(high / low)
    return _HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - _TOP) * share


if __name__ == "__main__":
    sys.exit(main())
