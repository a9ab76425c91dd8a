"""The bars that releases are held to, as a table, and what a results file reaches of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.results import Results, Row

OURS = "sparsegraph"
GIB = 2**30

Point = tuple[float, str]
"""Density and pattern."""


@dataclass(frozen=True)
class Bar:
    """One figure that must be reached: at least `required`, or at most where `is_limit`."""

    workload: str
    density: float
    metric: str
    required: float
    is_limit: bool = False
    pattern: str = "unstructured"


@dataclass(frozen=True)
class Verdict:
    """A bar and the figure measured for it; None where nothing was measured."""

    bar: Bar
    reached: float | None
    note: str = ""

    @property
    def passes(self) -> bool:
        """Whether the figure is there and good enough."""
        if self.reached is None:
            return False
        if self.bar.is_limit:
            return self.reached <= self.bar.required
        return self.reached >= self.bar.required


def _speedups(
    workload: str, required: dict[float, float], pattern: str = "unstructured"
) -> list[Bar]:
    return [Bar(workload, d, "speedup", value, pattern=pattern) for d, value in required.items()]


def _dense(*workloads: str) -> list[Bar]:
    return [Bar(workload, 1.0, "speedup", 0.97) for workload in workloads]


def _limit(metric: str, required: float, *workloads: str) -> list[Bar]:
    return [Bar(workload, 0.1, metric, required, is_limit=True) for workload in workloads]


def _scaling(*workloads: str) -> list[Bar]:
    return [Bar(workload, 0.1, "two threads", 1.75) for workload in workloads]


GEMM = "gemm-384x768x3072"
CONV = "conv-3x3-14-256-256"
LAYERS = (
    GEMM, "gemm-128x384x1536", "gemm-49x1024x1024", "conv-1x1-56-64-256", "conv-1x1-14-1024-256",
    "conv-3x3-28-128-128", CONV, "conv-3x3-7-512-512",
)  # fmt: skip

FOUNDATION = (
    *_speedups("resnet50", {1.0: 0.85, 0.2: 1.5, 0.1: 2.4, 0.05: 3.0}),
    *_speedups("mobilenet_v1", {0.1: 1.8}),
    *_speedups("minilm-128", {1.0: 0.85, 0.2: 2.2, 0.1: 3.2, 0.05: 4.2}),
    *_speedups(GEMM, {0.2: 2.8, 0.1: 5.5, 0.05: 9.5, 0.02: 18.0}),
    *_speedups(CONV, {0.1: 5.0}),
    *_dense("resnet50", "mobilenet_v1", "minilm-128", GEMM, CONV),
)
"""What the compiler has to reach to be worth using."""

FRONTIER = (
    *_speedups(GEMM, {0.5: 1.9, 0.3: 3.0, 0.2: 4.2, 0.1: 7.0, 0.05: 12.0, 0.02: 24.0}),
    *_speedups(
        "gemm-128x384x1536", {0.5: 1.9, 0.3: 3.0, 0.2: 4.2, 0.1: 7.2, 0.05: 12.5, 0.02: 27.0}
    ),
    *_speedups("gemm-49x1024x1024", {0.2: 3.8, 0.1: 6.5, 0.05: 11.5}),
    *_speedups(GEMM, {0.2: 4.6, 0.1: 8.5, 0.05: 14.0}, "4x1"),
    *_speedups("conv-1x1-56-64-256", {0.1: 5.0}),
    *_speedups("conv-1x1-14-1024-256", {0.1: 6.5}),
    *_speedups("conv-3x3-28-128-128", {0.1: 6.0}),
    *_speedups(CONV, {0.1: 7.0}),
    *_speedups("conv-3x3-7-512-512", {0.1: 5.0}),
    *_dense(*LAYERS),
    *_speedups("resnet50", {1.0: 0.97, 0.2: 2.5, 0.1: 4.0, 0.05: 5.5}),
    *_speedups("mobilenet_v1", {1.0: 1.0, 0.25: 2.0, 0.1: 3.2}),
    *_speedups("mobilenet_v2", {1.0: 1.0, 0.25: 1.6, 0.1: 2.4}),
    *_speedups("minilm-128", {1.0: 1.1, 0.2: 3.2, 0.1: 5.0, 0.05: 7.0}),
    *_speedups("minilm-384", {1.0: 1.1, 0.2: 2.8, 0.1: 3.8, 0.05: 4.6}),
    *_speedups("deit_small", {1.0: 1.05, 0.2: 2.5, 0.1: 3.6, 0.05: 4.6}),
    *_scaling("resnet50", "minilm-384"),
)
"""What no engine reaches: ahead of every peer, at every density."""

SETS = {"foundation": FOUNDATION, "frontier": FRONTIER}

COST = (
    *_limit("compile_s", 60.0, "resnet50"),
    *_limit("compile_s", 15.0, "mobilenet_v1"),
    *_limit("compile_s", 30.0, "minilm-128"),
    *_limit("peak_memory_gib", 3.0, "resnet50", "mobilenet_v1", "minilm-128"),
    *_limit("weight_ratio", 0.25, "resnet50", "minilm-128"),
)

COST_METRICS = frozenset(bar.metric for bar in COST)

MAX_REL_ERROR = 1e-4
"""fp32 outputs against ONNX Runtime, on every row."""


def points(bars: Sequence[Bar]) -> dict[str, list[Point]]:
    """Workload -> densities with patterns that must be measured on one thread for `bars`."""
    found: dict[str, list[Point]] = {}
    for bar in bars:
        of_workload = found.setdefault(bar.workload, [])
        if (bar.density, bar.pattern) not in of_workload:
            of_workload.append((bar.density, bar.pattern))
    return found


def judge(results: Results, speed: Sequence[Bar]) -> list[Verdict]:
    """Every bar beside what `results` reaches, then the error of every row of ours."""
    ours = [row for row in results.rows if row.engine == OURS]
    rows = {(r.workload, r.density, r.pattern, r.threads): r for r in ours}
    errors = [
        Verdict(
            Bar(row.workload, row.density, "max_rel_error", MAX_REL_ERROR, True, row.pattern),
            row.max_rel_error,
            row.error or "",
        )
        for row in rows.values()
    ]
    verdicts = [_judge_speed(bar, rows) for bar in speed]
    return verdicts + [_judge_cost(bar, results) for bar in COST] + errors


def _judge_speed(bar: Bar, rows: Mapping[tuple[str, float, str, int], Row]) -> Verdict:
    pattern = bar.pattern if bar.density < 1 else "dense"
    row = rows.get((bar.workload, bar.density, pattern, 1))
    if row is None:
        return Verdict(bar, None, "not measured")
    note = row.error or ("noisy" if row.is_noisy else "")
    if bar.metric == "speedup":
        return Verdict(bar, row.ratio, note)
    both = rows.get((bar.workload, bar.density, pattern, 2))
    if both is None or not both.median_ms or not row.median_ms:
        return Verdict(bar, None, note or "not measured on two threads")
    return Verdict(bar, row.median_ms / both.median_ms, note)


def _judge_cost(bar: Bar, results: Results) -> Verdict:
    for cost in reversed(results.costs):
        if (cost.workload, cost.density) != (bar.workload, bar.density):
            continue
        figures = {
            "compile_s": cost.compile_s,
            "peak_memory_gib": cost.peak_memory_bytes and cost.peak_memory_bytes / GIB,
            "weight_ratio": cost.weight_ratio,
        }
        return Verdict(bar, figures[bar.metric], cost.error or "")
    return Verdict(bar, None, "not measured")
