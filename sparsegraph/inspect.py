"""What a model's zeros are worth on a machine: per layer the pattern, the gain, and why not more.

Nothing is compiled or measured: times come from the cost model of `sparsegraph.lower.cost`, or from
a tuning file, so the total is an estimate for the layers alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from sparsegraph import explain, targets
from sparsegraph.errors import UsageError, message
from sparsegraph.graph import static_shape
from sparsegraph.layers import Layer, weighted
from sparsegraph.lower import cost, problem
from sparsegraph.lower.builder import split_points
from sparsegraph.lower.choose import Decide, choose
from sparsegraph.lower.problem import Choice, Operands
from sparsegraph.lower.single_point import suits
from sparsegraph.lower.tiling import tiled_for
from sparsegraph.lower.windows import window_of
from sparsegraph.passes.classify_masks import classify
from sparsegraph.sparsity import analyze
from sparsegraph.targets.layout import blocked, planar
from sparsegraph.targets.target import Target
from sparsegraph.tuning import Tuning

_GRID = (16, 32)  # cells of a picture


@dataclass(frozen=True)
class LayerRow:
    """One layer.

    Attributes:
        node, op, weight: names in the model; `shape` is the stored weight's.
        pattern: the pattern of its zeros, in words.
        density: share of non-zero weights.
        macs: multiply-adds of one dense run, None when a shape is unknown.
        format: what the plan would choose, such as `dense` or `coded` (see `Choice.weight`).
        break_even: density below which zeros are left out on the target.
        speedup: time in ONNX Runtime / time here; below 1 where a dense kernel of ours is the
            slower one.
        reason: why it stays dense, empty if it does not.
        ms: time of one run on one thread, None where no product kernel applies or the shape is
            unknown; `is_measured`: from a tuning file, else predicted.
        dense_ms: predicted time in ONNX Runtime.
        what_if_speedup, what_if_reason: the same after `impose`.
        grid: a picture: share of non-zeros in each cell of the weight [outputs, inputs].
    """

    node: str
    op: str
    weight: str
    shape: tuple[int, ...]
    pattern: str
    density: float
    n_zero: int
    macs: int | None
    format: str
    break_even: float
    speedup: float
    reason: str
    ms: float | None = None
    dense_ms: float | None = None
    is_measured: bool = False
    what_if_speedup: float | None = None
    what_if_reason: str = ""
    grid: tuple[tuple[float, ...], ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class MaskRow:
    """One activation or attention mask, or a gate that could be one: see `classify_masks`."""

    node: str
    value: str
    kind: str
    detail: str


@dataclass(frozen=True)
class Inspection:
    """The answer of `inspect`. `speedup` is of all layers together."""

    target: str
    layers: tuple[LayerRow, ...]
    masks: tuple[MaskRow, ...]
    imposed: float | None = None

    @property
    def n_weights(self) -> int:
        return sum(_size(row.shape) for row in self.layers)

    @property
    def n_zero(self) -> int:
        return sum(row.n_zero for row in self.layers)

    @property
    def macs(self) -> int:
        return sum(row.macs or 0 for row in self.layers)

    @property
    def n_faster(self) -> int:
        return sum(row.format != "dense" and row.speedup > 1 for row in self.layers)

    @property
    def speedup(self) -> float:
        return _total(self.layers, [row.speedup for row in self.layers])

    @property
    def what_if_speedup(self) -> float | None:
        if self.imposed is None:
            return None
        return _total(self.layers, [row.what_if_speedup or 1.0 for row in self.layers])

    def to_json(self) -> dict[str, Any]:
        """Everything above as plain data, without pictures."""
        bare = replace(self, layers=tuple(replace(row, grid=()) for row in self.layers))
        return {
            **asdict(bare),
            "n_weights": self.n_weights,
            "n_zero": self.n_zero,
            "macs": self.macs,
            "n_faster": self.n_faster,
            "speedup": self.speedup,
            "what_if_speedup": self.what_if_speedup,
        }

    def table(self) -> tuple[list[str], list[list[object]]]:
        """(columns, rows): one row per layer; milliseconds are predicted or measured."""
        predicted = explain.prediction(self.target)
        what_if = ["what-if"] if self.imposed is not None else []
        columns = [
            "layer",
            "op",
            "weight",
            "zeros",
            "density",
            "M MAC",
            "format",
            "ms",
            "from",
            "speedup",
        ]
        rows: list[list[object]] = [
            [
                row.node,
                row.op,
                "x".join(map(str, row.shape)),
                row.pattern,
                row.density,
                None if row.macs is None else row.macs / 1e6,
                row.format,
                row.ms,
                "" if row.ms is None else "measured" if row.is_measured else predicted,
                row.speedup,
                *([row.what_if_speedup] if what_if else []),
                row.reason or row.what_if_reason,
            ]
            for row in self.layers
        ]
        return [*columns, *what_if, "stays dense"], rows

    def summary(self) -> str:
        """Two or three lines that answer the question."""
        share = self.n_zero / max(self.n_weights, 1)
        lines = [
            f"{self.n_zero:,} of {self.n_weights:,} weights are zero ({share:.1%}), in "
            f"{sum(row.n_zero > 0 for row in self.layers)} of {len(self.layers)} layers.",
            f"On {self.target} {self.n_faster} layers get faster; all layers together "
            f"{self.speedup:.2f} times ({self._source()}).",
        ]
        if self.imposed is not None:
            lines.append(
                f"With {self.imposed:.0%} zeros in every layer that can be pruned: "
                f"{self.what_if_speedup:.2f} times."
            )
        return "\n".join(lines)

    def _source(self) -> str:
        n, predicted = sum(row.is_measured for row in self.layers), explain.prediction(self.target)
        basis = cost.basis(targets.get(self.target))
        text = f"{n} layers measured, the rest {predicted}" if n else predicted
        return text + (f": {basis}" if basis else "")

    def __str__(self) -> str:
        return self.summary()


def inspect(
    model: ir.Model,
    target: Target | str = "native",
    *,
    impose: float | None = None,
    tuning: str | Path | None = None,
) -> Inspection:
    """Inspect a captured model for one machine.

    Args:
        model: what `load` or `capture` returned. Masks are folded into weights on a copy.
        impose: what-if: the share of zeros, in [0, 1), that every prunable layer would have.
        tuning: a file of `compile --tune`; its measured times are taken where it has them.

    Raises:
        UsageError: `impose` is no share, or `tuning` no file for this target.
        UnsupportedError: an unknown target.
    """
    from sparsegraph import half, pipeline, targets

    if impose is not None and not 0 <= impose < 1:
        fix = "write 0.9 for 90 % zeros"
        raise UsageError(message("option", "impose", impose, "0 <= share < 1", fix))
    machine = targets.get(target) if isinstance(target, str) else target
    wide = half.widened(model, verify=False).model
    optimized = pipeline.optimize(wide, verify=False).model
    skipped = _unprunable(optimized) if impose is not None else {}
    decide: Decide = lambda case, _, target: choose(case, target)  # noqa: E731
    if tuning is not None:
        decide = Tuning.read(Path(tuning), machine).choice
    layers = weighted(optimized)
    tiled = tiled_for(layers, machine)
    rows = [_row(layer, tiled, decide, impose, skipped) for layer in layers]
    records, declined = classify(optimized)
    masks = [MaskRow(r.node, r.value, r.kind, r.detail) for r in records]
    masks += [MaskRow(d.node, "", "unknown", d.reason) for d in declined]
    return Inspection(str(machine), tuple(rows), tuple(masks), impose)


def always_dense(layer: Layer) -> str:
    """Why no sparse kernel exists for a layer, whatever its zeros; empty if one does."""
    if layer.quantised:
        return "quantised weight: sparse kernels compute in fp32"
    if layer.array().dtype.name != "float32":
        return f"{layer.array().dtype.name} weight: sparse kernels compute in fp32"
    if layer.node.op_type == "ConvTranspose":
        return "transposed convolution: no sparse kernel"
    if layer.is_convolution and layer.group > 1 and layer.matrix().shape[1] == 1:
        return "depthwise: each output reads one input, its kernel is dense"
    if not layer.is_convolution and layer.array().ndim > 2:
        return "one weight per batch entry"
    return ""


def _row(
    layer: Layer,
    target: Target,
    decide: Decide,
    impose: float | None,
    skipped: dict[str, str],
) -> LayerRow:
    pattern = analyze(layer.matrix(), zero=layer.zero())
    never = always_dense(layer)
    case = None if never else operands(layer, target)
    choice = (
        None if case is None else _all_groups(decide(problem.of(case, target), case, target), layer)
    )
    what_if, why = None, ""
    if impose is not None:
        why = never or skipped.get(layer.name, "")
        density = pattern.density if why else min(pattern.density, 1 - impose)
        is_same = density == pattern.density
        found = choice if is_same or never else gain(layer, density, target)
        what_if = found.speedup if found else 1.0
    return LayerRow(
        node=layer.name,
        op=layer.node.op_type,
        weight=layer.value.name or "",
        shape=tuple(layer.array().shape),
        pattern=str(pattern),
        density=pattern.density,
        n_zero=pattern.n_zero,
        macs=layer.macs(),
        format=choice.format if choice else "dense",
        break_even=choice.break_even if choice else 0.0,
        speedup=choice.speedup if choice else 1.0,
        reason=never or _why_dense(choice, pattern.density),
        ms=choice.ms if choice else None,
        dense_ms=choice.dense_ms if choice else None,
        is_measured=choice.is_measured if choice else False,
        what_if_speedup=what_if,
        what_if_reason=why,
        grid=_grid(layer),
    )


def _grid(layer: Layer) -> tuple[tuple[float, ...], ...]:
    """The weight [outputs, inputs] as at most 16 x 32 cells, each its share of non-zeros."""
    matrix = layer.matrix()
    kept = (matrix != layer.zero()).reshape(matrix.shape[0], -1)
    rows, columns = (
        np.linspace(0, extent, min(extent, most), endpoint=False, dtype=np.int64)
        for extent, most in zip(kept.shape, _GRID)
    )
    sums = np.add.reduceat(np.add.reduceat(kept, rows, axis=0, dtype=np.int64), columns, axis=1)
    sizes = np.outer(np.diff(rows, append=len(kept)), np.diff(columns, append=kept.shape[1]))
    return tuple(tuple(row) for row in (sums / sizes).round(3).tolist())


def gain(layer: Layer, density: float, target: Target) -> Choice | None:
    """What the model says of a layer at another density, None if its shape is unknown."""
    case = operands(layer, target, density)
    if case is None:
        return None
    other = replace(problem.of(case, target), density=density, shared=1)
    return _all_groups(choose(other, target), layer)


def operands(layer: Layer, target: Target, density: float | None = None) -> Operands | None:
    """The product of a layer (of its first group) as lowering would lay it out.

    At another `density` than its own few points may lie in another way. Maps lie in planes where
    the layer reads neighbours. None if a shape is unknown.
    """
    x, y = static_shape(layer.data), static_shape(layer.node.outputs[0])
    if x is None or y is None or len(y) < 2:
        return None
    weight, window = layer.matrix(), None
    if not layer.is_convolution:
        axis = len(x) - 1
        images, points = split_points(y, len(y) - 1, together=True)
        if layer.weight_at == 0:
            images, points = int(np.prod(y[:-2])), y[-1]
        elif images == 1 and suits(weight, points, target, density):
            images, points = points, 1
        source = points
    else:
        if len(y) > 5 or (len(y) == 5 and layer.group == weight.shape[0]):
            return None
        window = window_of(layer.node, x, weight.shape)
        weight = weight[: len(weight) // layer.group]
        weight = weight.reshape(*weight.shape[:2], *window.weight_taps)
        images, points, axis, source = y[0], _size(y[2:]), 1, _size(x[2:])
        if window.is_patches and layer.group == 1:
            weight, source = weight.reshape(len(weight), -1), points
            window = None
    make = planar if window is not None and window.n_taps > 1 else blocked
    from_ = make(images, weight.shape[1], source, axis, target)
    to = blocked(images, len(weight), points, axis, target)
    return Operands(np.asarray(weight), from_, to, window)


def _all_groups(choice: Choice, layer: Layer) -> Choice:
    n = layer.group
    return replace(choice, ms=choice.ms * n, dense_ms=choice.dense_ms * n) if n > 1 else choice


def _why_dense(choice: Choice | None, density: float) -> str:
    if choice is None:
        return "its shape depends on run-time data"
    facts = {"format": choice.weight, "density": density, "break_even": choice.break_even}
    return explain.why_dense(facts)


def _unprunable(model: ir.Model) -> dict[str, str]:
    """Layers that pruning leaves alone, with reasons."""
    from sparsegraph.recipe import Recipe, select

    try:
        return dict(select(model, Recipe.parse("magnitude:0.5"))[1])
    except UsageError:  # not one layer can be pruned
        return {layer.name: "cannot be pruned" for layer in weighted(model)}


def _total(rows: Sequence[LayerRow], speedups: Sequence[float]) -> float:
    """Speedup of all layers together; what would lose runs in ONNX Runtime.

    Layers without a predicted dense time count by their multiply-adds, at the rate of the others.
    """
    known = [(row.dense_ms, row.macs or 0) for row in rows if row.dense_ms is not None]
    rate = sum(ms for ms, _ in known) / max(1, sum(macs for _, macs in known)) or 1.0
    times = [(row.macs or 0) * rate if row.dense_ms is None else row.dense_ms for row in rows]
    left = sum(ms / speedup for ms, speedup in zip(times, speedups))
    return max(1.0, sum(times) / left) if left else 1.0


def _size(shape: Sequence[int]) -> int:
    product = 1
    for extent in shape:
        product *= extent
    return product
