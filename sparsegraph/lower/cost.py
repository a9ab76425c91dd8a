"""How long a product takes: what its kernels do, counted, times fitted nanoseconds for each.

The counts are vector operations and cache lines of the loops in `targets/kernels/product.py` and
`winograd.py`; their prices are fitted to measurements by non-negative least squares on relative
error. `python -m benchmarks.product_cost` measures, fits, writes `costs.json` and tells the error
on layers that the fit never saw. Machines without prices of their own take those of `_DEFAULT`:
counts follow from their vector length, registers and caches. Where `costs.json` holds an estimate
of their inner loops (`python -m benchmarks.estimate_cost`), these prices are scaled by it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from sparsegraph.lower.problem import Choice, Problem
from sparsegraph.lower.windows import FLAT, strip_of
from sparsegraph.targets.kernels.panel_product import most_points
from sparsegraph.targets.kernels.product import computed_points
from sparsegraph.targets.kernels.winograd import patches
from sparsegraph.targets.layout import point_block
from sparsegraph.targets.target import Target

Counts = dict[str, float]
Prices = dict[str, dict[str, float]]

FILE = Path(__file__).with_name("costs.json")
_DEFAULT = "x86-64-v3"
_LOOP = ("fma", "load", "value", "mac", "tail", "transform2", "transform4")  # not memory
_LINE = 16  # float32 values in a cache line
_ANOTHER_IMAGE = 0.25  # of what a vector of weights costs with the first, loading it included
_CODED_BYTES = 6  # value and column of one non-zero weight
_UNDER_WAY = 8.0  # multiply-adds that start while one is under way; fewer sums wait for it
_TURN = 4  # multiply-adds that turning a vector of sums takes
_UNFOLD_NS = 0.2  # ONNX Runtime copies a volume's windows, per element: 0.12 to 0.27 on Zen 5


def prices(target: Target) -> Prices:
    """Nanoseconds per operation, by kernel and operation."""
    table = _table()
    return table.get(target.name, table[_DEFAULT])


def basis(target: Target) -> str:
    """Where the prices of a target come from; empty if they were measured on such a machine."""
    entry = _entries().get(target.name, {})
    if "prices" in entry:
        return ""
    if "core" in entry:
        return f"{_DEFAULT}'s prices, inner loops as llvm-mca models {entry['core']}"
    return f"{_DEFAULT}'s prices"


@cache
def _entries() -> dict[str, dict[str, Any]]:
    return dict(json.loads(FILE.read_text()))


@cache
def _table() -> dict[str, Prices]:
    entries = _entries()
    measured: dict[str, Prices] = {n: e["prices"] for n, e in entries.items() if "prices" in e}
    return {n: measured.get(n) or _scaled(measured[_DEFAULT], e) for n, e in entries.items()}


def _scaled(prices: Prices, estimate: dict[str, Any]) -> Prices:
    """The prices of `_DEFAULT` with the arithmetic of each kernel times its estimated factor."""
    factor = {kernel: float(estimate.get(kernel, estimate["dense"])) for kernel in prices}
    return {
        kernel: {n: p * factor[kernel] if n in _LOOP else p for n, p in table.items()}
        for kernel, table in prices.items()
    }


def save(name: str, entry: dict[str, Any]) -> None:
    """Store what is known of a target: `prices`, or `core` and factors; prices stay."""
    table = json.loads(FILE.read_text())
    if "prices" in entry or "prices" not in table.get(name, {}):
        table[name] = entry
    FILE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    _entries.cache_clear()
    _table.cache_clear()


def ours_ms(problem: Problem, choice: Choice, target: Target, table: Prices | None = None) -> float:
    """Predicted milliseconds of the kernels of a choice, on one thread."""
    table = table or prices(target)
    return sum(_price(table[kernel], n) for kernel, n in counts(problem, choice, target)) / 1e6


def weight_bytes(problem: Problem, choice: Choice) -> float:
    """Bytes of the weight as a choice stores it, without what it counts per group of rows."""
    if choice.patch:
        kept = problem.filter.phases * problem.filter.size(choice.patch) ** 2
        return 4.0 * problem.rows * problem.channels * kept
    if choice.weight == "slots":
        return n_slots(problem, choice.group) * (4.0 * choice.group + 2)
    per_weight = _CODED_BYTES * problem.density if choice.weight == "coded" else 4.0
    return per_weight * problem.rows * problem.columns


def dense_ms(problem: Problem, target: Target, table: Prices | None = None) -> float:
    """Predicted milliseconds of ONNX Runtime's dense kernel, on one thread."""
    kernel, n = reference_counts(problem, target)
    elements = problem.columns * problem.images * problem.points if problem.is_unfolded else 0
    return (_price((table or prices(target))[kernel], n) + _UNFOLD_NS * elements) / 1e6


def _price(table: dict[str, float], n: Counts) -> float:
    return sum(table.get(name, 0.0) * count for name, count in n.items())


def counts(problem: Problem, choice: Choice, target: Target) -> Iterator[tuple[str, Counts]]:
    """What each kernel call of a choice does: (kernel, counts)."""
    if choice.patch:
        yield from _winograd(problem, choice, target)
    elif choice.weight == "slots":
        yield "slots", _slots(problem, choice, target)
    elif choice.weight == "dense" and problem.single:
        n_bytes = 4.0 * problem.rows * problem.columns
        vectors = n_bytes / 4 / target.lanes * (1 + _ANOTHER_IMAGE * (problem.images - 1))
        yield "vector", {"fma": vectors, "far": n_bytes / 64 * _beyond(n_bytes, target)}
    elif choice.weight == "panels":
        yield "dense", _panels(problem, choice, target)
    else:
        yield choice.weight, _product(problem, choice, target)


def _product(p: Problem, c: Choice, target: Target) -> Counts:
    """Counts of one `Product` call."""
    p = replace(p, vectors=sum(c.split))  # tiles that were joined
    tiles, passes = p.tiles(target.lanes), len(c.split)
    panels = math.ceil(p.columns / c.tile)
    groups = math.ceil(p.rows / c.group)
    points = _vectors(p, target)
    is_dense = c.weight == "dense"
    values = float(groups * c.group * p.columns) if is_dense else p.rows * p.columns * p.density
    shared = (c.group - 1) / c.group * (1 if is_dense or p.shared > 1 else p.density)
    loads = points * values * (1 - shared)
    stream = values * (4 if is_dense else _CODED_BYTES) * (p.images if p.images > tiles else 1)
    missing = _beyond(4.0 * c.tile * p.row_of_pass(c.split), target, level=1)
    if p.shared > 1 and c.group == 1:  # the next row reads what this one did
        missing /= 2
    partial = float(points * p.rows * (panels - 1))
    y_bytes = 4.0 * p.rows * p.row
    activations = 4.0 * p.images * (p.source * p.channels + p.points * p.rows)
    read = tiles * p.vectors * target.lanes / _LINE * p.channels
    n = {
        "call": 1.0,
        "item": float(tiles),
        "fma": points * values,
        "load": loads,
        "l2_load": loads * missing,
        "value": tiles * passes * values,
        "group": float(tiles * passes * panels * groups),
        "panel": float(tiles * passes * panels),
        "store": float(points * p.rows),
        "partial": partial,
        "partial_far": partial * _beyond(y_bytes, target),
        "stream": tiles * stream / 64,
        "stream_far": tiles * stream / 64 * _beyond(stream, target),
        "read_far": read * _beyond(activations, target),
    }
    if not is_dense:
        n["run"] = tiles * passes * panels * _runs(p, c, groups)
    if p.gather is not None:
        kind = "flat" if p.gather == FLAT else f"step{min(p.gather, 2)}"
        n[f"{kind}_vector"] = float(points * p.columns)
        n[f"{kind}_row"] = float(tiles * p.columns)
        if p.gather == FLAT and p.source > 2 * p.points:  # even and odd points apart first
            n["flat_vector"] += p.images * p.channels * p.source / target.lanes
    return n


def _panels(p: Problem, c: Choice, target: Target) -> Counts:
    """Counts of one `PanelProduct` call."""
    panels, points = math.ceil(p.rows / c.group), float(p.images * p.points)
    passes = p.tiles(target.lanes) * math.ceil(points / p.tiles(target.lanes) / most_points(target))
    vectors = panels * c.group / target.lanes
    sums = max(points * vectors, passes * panels * _UNDER_WAY)
    stream = 4.0 * panels * c.group * p.columns * p.tiles(target.lanes)
    activations = 4.0 * p.images * (p.source * p.channels + p.points * p.rows)
    return {
        "call": 1.0,
        "fma": sums * p.columns + points * vectors * _TURN,
        "load": passes * vectors * p.columns,
        "value": points * panels * p.columns,
        "group": float(passes * panels),
        "store": points * vectors,
        "stream": stream / 64,
        "stream_far": stream / 64 * _beyond(stream, target),
        "read_far": points / _LINE * p.channels * _beyond(activations, target),
    }


def _vectors(p: Problem, target: Target) -> float:
    """Vectors of points that are computed; a short one counts half."""
    points = computed_points(p.points, p.vectors * target.lanes, target)
    last = math.ceil(2 * points[-1] / target.lanes) / 2 if points else p.vectors
    return p.tiles(target.lanes) * p.vectors - p.images * (p.vectors - last)


def _slots(p: Problem, c: Choice, target: Target) -> Counts:
    """Counts of one `VectorProduct` call whose weights are in slots of `c.group` rows."""
    slots, n_bytes = n_slots(p, c.group), weight_bytes(p, c)
    return {
        "call": 1.0,
        "value": slots * p.images,
        "l2_load": slots * p.images * _beyond(4.0 * p.columns * p.row, target, level=1),
        "panel": math.ceil(p.rows / c.group) * float(p.images),
        "stream": n_bytes / 64 * _beyond(n_bytes, target, level=1),
        "far": n_bytes / 64 * _beyond(n_bytes, target),
    }


def n_slots(p: Problem, rows: int) -> float:
    """Columns in which any of `rows` neighbouring rows holds something, over all panels."""
    different = -(-rows // p.shared)  # of which each has zeros of its own
    return math.ceil(p.rows / rows) * p.columns * (1 - (1 - p.density) ** different)


def _runs(p: Problem, c: Choice, groups: int) -> float:
    """Runs of groups with equal trip counts per panel: each ends in mispredicted branches.

    Rows have binomial counts in steps of 8 (`formats`), pairs share columns in steps of 4.
    """
    spread = math.sqrt(c.tile * p.density * (1 - p.density))
    counts = 1 + 4 * spread / 8
    both = 1.0
    if c.group == 2 and p.shared == 1:
        both += math.sqrt(c.tile) * p.density
    return min(float(groups), counts * both)


def _winograd(p: Problem, c: Choice, target: Target) -> Iterator[tuple[str, Counts]]:
    m, lanes = c.patch, target.lanes
    places = p.filter.size(m) ** 2
    size = places / (m + 2) ** 2  # of a transform, relative to what its price was fitted to
    grid = patches(p.out, m)
    inner = inner_problem(p, m, target)
    strips = math.prod(grid) / inner.points
    vectors = inner.tiles(lanes) * inner.vectors // places
    channels = p.channels * p.filter.phases
    for kernel, features in (("winograd_input", channels), ("winograd_output", p.rows)):
        n_bytes = 4.0 * places * vectors * lanes * features
        yield (
            kernel,
            {
                f"transform{m}": strips * vectors * features * size,
                f"line{m}": float(p.images * features * grid[0]),
                "feature": float(strips * p.images * features),
                "far": strips * n_bytes / 64 * _beyond(n_bytes, target),
            },
        )
    yield "dense", {name: strips * n for name, n in _product(inner, c, target).items()}


def inner_problem(p: Problem, m: int, target: Target) -> Problem:
    """The products between Winograd's transforms: one per place of a patch, patches as points.

    Of one strip of them (`windows.strip_of`).
    """
    rows = strip_of(p.out, m, p.filter, (p.channels, p.rows), p.vectors * target.lanes, target)
    n = rows * patches(p.out, m)[1]
    block = point_block(n, target)
    row = -(-block // _LINE) * _LINE if block > _LINE else block
    channels, places = p.channels * p.filter.phases, p.filter.size(m) ** 2
    return Problem(
        p.rows, channels, 1, p.images * places, n, block // target.lanes, row,
        None, 1.0, 1, n, (1, n),
    )  # fmt: skip


def reference_counts(p: Problem, target: Target) -> tuple[str, Counts]:
    """What ONNX Runtime's kernel does: (kernel, counts)."""
    weights = 4.0 * p.rows * p.columns
    y = float(p.images * p.points * p.rows)
    n = {
        "call": 1.0,
        "mac": p.macs / target.lanes,
        "write": y,
        "read": float(p.images * p.source * p.channels),
        "far": weights / 64 * _beyond(weights, target),
    }
    height, width = p.out
    if height == 1:
        padded = -(-p.images * p.points // 6) * 6 / (p.images * p.points)
        return "ort_product", n | {"tail": n["mac"] * (padded - 1), "weight": weights / 64}
    tail = -(-width // 6) * 6 / width - 1
    kernel = "ort_pointwise" if p.taps == 1 else "ort_convolution"
    return kernel, n | {"tail": n["mac"] * tail, "strided": n["mac"] * (p.source > p.points)}


def _beyond(n_bytes: float, target: Target, level: int = 2) -> float:
    """Share of `n_bytes` that a cache cannot hold."""
    size = target.l1_bytes if level == 1 else target.l2_bytes
    return max(0.0, 1 - size / n_bytes) if n_bytes else 0.0
