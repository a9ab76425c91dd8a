"""The JSON that every benchmark writes: what was measured, where, by which command."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

SCHEMA = 1

PACKAGES = ("sparsegraph", "onnxruntime", "onnx", "onnx-ir", "apache-tvm", "numpy", "torch")

FLAGS = (
    "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_tile",
    "asimd", "asimddp", "sve",
)  # fmt: skip
"""CPU features that decide which kernels run."""


@dataclass(frozen=True)
class Row:
    """One engine on one workload, beside ONNX Runtime in the same process."""

    kind: str
    """`layers` or `models`."""
    workload: str
    density: float
    """Kept fraction of the pruned layers."""
    pattern: str
    engine: str
    threads: int
    version: str = ""
    median_ms: float | None = None
    min_ms: float | None = None
    reference_ms: float | None = None
    """Median of ONNX Runtime dense, interleaved with this engine."""
    reference_min_ms: float | None = None
    n_samples: int = 0
    n_dropped: int = 0
    is_noisy: bool = False
    max_rel_error: float | None = None
    prepare_s: float | None = None
    weight_bytes: int | None = None
    dense_weight_bytes: int | None = None
    gmacs: float | None = None
    error: str | None = None
    """Why there are no times."""

    @property
    def ratio(self) -> float | None:
        """Times faster than ONNX Runtime: reference median / own median."""
        if self.median_ms is None or self.reference_ms is None:
            return None
        return self.reference_ms / self.median_ms

    @property
    def zeros_percent(self) -> float:
        """How the issue and the papers write the density."""
        return round(100 * (1 - self.density), 2)


@dataclass(frozen=True)
class Cost:
    """What compiling one model took, in a process of its own."""

    workload: str
    density: float
    compile_s: float | None = None
    peak_memory_bytes: int | None = None
    weight_bytes: int | None = None
    """Of all weights in the artefact."""
    dense_weight_bytes: int | None = None
    """Of the pruned layers before pruning."""
    other_weight_bytes: int | None = None
    """Of everything that is not pruned: embeddings, stem, depthwise, biases."""
    error: str | None = None

    @property
    def weight_ratio(self) -> float | None:
        """Stored bytes of the pruned layers over their dense bytes."""
        if self.weight_bytes is None or self.other_weight_bytes is None:
            return None
        if not self.dense_weight_bytes:
            return None
        return (self.weight_bytes - self.other_weight_bytes) / self.dense_weight_bytes


@dataclass(frozen=True)
class Results:
    """All rows of one command on one machine."""

    command: str
    commit: str
    created: str
    machine: dict[str, object]
    versions: dict[str, str]
    rows: list[Row] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    roof: dict[str, float] = field(default_factory=dict)
    """Limits of one core: see `benchmarks.roofline`."""

    def save(self, path: Path) -> None:
        """Write JSON; the old file stays until the new one is complete."""
        text = json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1, allow_nan=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(text + "\n")
        temporary.replace(path)


def begin(arguments: Sequence[str]) -> Results:
    """Empty results that describe this machine and this command."""
    return Results(
        command=" ".join(["python", "-m", *arguments]),
        commit=commit(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=machine(),
        versions=versions(),
    )


def load(path: Path) -> Results:
    """Read results back; raises ValueError for another schema or unknown fields."""
    data = json.loads(path.read_text())
    found = data.pop("schema", None)
    if found != SCHEMA:
        raise ValueError(f"cannot read '{path.name}': found schema {found}, need {SCHEMA}")
    unknown = set(data) - {f.name for f in fields(Results)}
    if unknown:
        raise ValueError(f"cannot read '{path.name}': found unknown fields {sorted(unknown)}")
    data["rows"] = [Row(**row) for row in data["rows"]]
    data["costs"] = [Cost(**cost) for cost in data["costs"]]
    return Results(**data)


def merge(parts: Sequence[Results]) -> Results:
    """The rows and costs of several files; the description is the last file's.

    Raises ValueError when they come from different machines: their figures do not compare.
    """
    last = parts[-1]
    for part in parts:
        if part.machine.get("cpu") != last.machine.get("cpu"):
            raise ValueError(
                f"cannot merge results: found {part.machine.get('cpu')}, "
                f"need {last.machine.get('cpu')}"
            )
    rows = [row for part in parts for row in part.rows]
    costs = [cost for part in parts for cost in part.costs]
    commits = ", ".join(dict.fromkeys(part.commit for part in parts))
    return replace(last, rows=rows, costs=costs, commit=commits)


def machine() -> dict[str, object]:
    """CPU model, the features that matter, cores and memory."""
    model, flags = _cpu()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": model or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "features": [flag for flag in FLAGS if flag in flags],
        "cores": cores,
        "memory_gib": _memory_gib(),
        "system": platform.system(),
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """Installed versions of the packages that can change a figure."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Git commit of this checkout, `-dirty` when files differ from it, or `unknown`."""
    root = Path(__file__).resolve().parent.parent
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return run.stdout.strip()


def _cpu() -> tuple[str, set[str]]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "", set()
    pairs = [line.split(":", 1) for line in text.splitlines() if ":" in line]
    facts = {key.strip(): value.strip() for key, value in reversed(pairs)}
    return facts.get("model name", ""), set(facts.get("flags", facts.get("Features", "")).split())


def _memory_gib() -> float | None:
    if sys.platform == "win32":
        return None
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
