"""The bars that releases are held to, as a table, and what a results file reaches of them."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.results import Results, Row

OURS = "sparsegraph"
GIB = 2**30
PATTERNS = ("dense", "unstructured")


@dataclass(frozen=True)
class Bar:
    """One figure that must be reached: at least `required`, or at most where `is_limit`."""

    workload: str
    density: float
    metric: str
    required: float
    is_limit: bool = False


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


def _speedups(workload: str, required: dict[float, float]) -> list[Bar]:
    return [Bar(workload, density, "speedup", value) for density, value in required.items()]


def _dense(*workloads: str) -> list[Bar]:
    return [Bar(workload, 1.0, "speedup", 0.97) for workload in workloads]


def _limit(metric: str, required: float, *workloads: str) -> list[Bar]:
    return [Bar(workload, 0.1, metric, required, is_limit=True) for workload in workloads]


GEMM = "gemm-384x768x3072"
CONV = "conv-3x3-14-256-256"
SPEED = (
    *_speedups("resnet50", {1.0: 0.85, 0.2: 1.5, 0.1: 2.4, 0.05: 3.0}),
    *_speedups("mobilenet_v1", {0.1: 1.8}),
    *_speedups("minilm-128", {1.0: 0.85, 0.2: 2.2, 0.1: 3.2, 0.05: 4.2}),
    *_speedups(GEMM, {0.2: 2.8, 0.1: 5.5, 0.05: 9.5, 0.02: 18.0}),
    *_speedups(CONV, {0.1: 5.0}),
    *_dense("resnet50", "mobilenet_v1", "minilm-128", GEMM, CONV),
)

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


def points(bars: Sequence[Bar] = SPEED) -> dict[str, list[float]]:
    """Workload -> densities that must be measured for `bars`."""
    found: dict[str, list[float]] = {}
    for bar in bars:
        densities = found.setdefault(bar.workload, [])
        if bar.density not in densities:
            densities.append(bar.density)
    return found


def judge(results: Results) -> list[Verdict]:
    """Every bar beside what `results` reaches, then the error of every row of ours."""
    rows = {(r.workload, r.density): r for r in results.rows if _is_ours(r)}
    speed = [_judge_row(bar, rows.get((bar.workload, bar.density))) for bar in SPEED]
    errors = [
        Verdict(
            Bar(row.workload, row.density, "max_rel_error", MAX_REL_ERROR, is_limit=True),
            row.max_rel_error,
            row.error or "",
        )
        for row in rows.values()
    ]
    return speed + [_judge_cost(bar, results) for bar in COST] + errors


def _is_ours(row: Row) -> bool:
    return row.engine == OURS and row.pattern in PATTERNS and row.threads == 1


def _judge_row(bar: Bar, row: Row | None) -> Verdict:
    if row is None:
        return Verdict(bar, None, "not measured")
    return Verdict(bar, row.ratio, row.error or ("noisy" if row.is_noisy else ""))


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
