"""What a model's zeros are worth on a machine: per layer the pattern, the gain, and why not more.

Nothing is compiled. Gains come from the cost model of `sparsegraph.lower.choose`; a layer's part
in the model's time is its part of the multiply-adds, so the total is an estimate for the layers
alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from sparsegraph.errors import UsageError, message
from sparsegraph.graph import static_shape
from sparsegraph.layers import Layer, weighted
from sparsegraph.lower.choose import choose
from sparsegraph.passes.classify_masks import classify
from sparsegraph.sparsity import WeightPattern, analyze
from sparsegraph.targets.layout import point_block
from sparsegraph.targets.target import Target

_GRID = (16, 32)  # cells of a picture


@dataclass(frozen=True)
class LayerRow:
    """One layer.

    Attributes:
        node, op, weight: names in the model; `shape` is the stored weight's.
        pattern: the pattern of its zeros, in words.
        density: share of non-zero weights.
        macs: multiply-adds of one dense run, None when a shape is unknown.
        format: what the plan would choose, `dense` or `coded`.
        break_even: density below which the coded kernel is faster on the target.
        speedup: estimated time in ONNX Runtime / time here; below 1 where a dense kernel of ours
            is the slower one.
        reason: why it stays dense, empty if it does not.
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
    """The answer of `inspect`. `speedup` is of all layers together, weighted by multiply-adds."""

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
        """(columns, rows): one row per layer; speedups are estimates."""
        what_if = ["what-if"] if self.imposed is not None else []
        columns = ["layer", "op", "weight", "zeros", "density", "M MAC", "format", "speedup"]
        rows: list[list[object]] = [
            [
                row.node,
                row.op,
                "x".join(map(str, row.shape)),
                row.pattern,
                row.density,
                None if row.macs is None else row.macs / 1e6,
                row.format,
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
            f"{self.speedup:.2f} times (estimated, by multiply-adds).",
        ]
        if self.imposed is not None:
            lines.append(
                f"With {self.imposed:.0%} zeros in every layer that can be pruned: "
                f"{self.what_if_speedup:.2f} times."
            )
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.summary()


def inspect(
    model: ir.Model, target: Target | str = "native", *, impose: float | None = None
) -> Inspection:
    """Inspect a captured model for one machine.

    Args:
        model: what `load` or `capture` returned. Masks are folded into weights on a copy.
        impose: what-if: the share of zeros, in [0, 1), that every prunable layer would have.

    Raises:
        UsageError: `impose` is no share.
        UnsupportedError: an unknown target.
    """
    from sparsegraph import pipeline, targets

    if impose is not None and not 0 <= impose < 1:
        fix = "write 0.9 for 90 % zeros"
        raise UsageError(message("option", "impose", impose, "0 <= share < 1", fix))
    machine = targets.get(target) if isinstance(target, str) else target
    optimized = pipeline.optimize(model, verify=False).model
    skipped = _unprunable(optimized) if impose is not None else {}
    rows = [_row(layer, machine, impose, skipped) for layer in weighted(optimized)]
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
    if layer.weight_at != 1:
        return "the weight is the left operand"
    return ""


def _row(layer: Layer, target: Target, impose: float | None, skipped: dict[str, str]) -> LayerRow:
    pattern = analyze(layer.matrix(), zero=layer.zero())
    never = always_dense(layer)
    form, break_even, speedup = gain(layer, pattern.density, target)
    reason = never or (_why_dense(pattern, break_even) if form == "dense" else "")
    what_if, why = None, ""
    if impose is not None:
        why = never or skipped.get(layer.name, "")
        density = pattern.density if why else min(pattern.density, 1 - impose)
        what_if = 1.0 if never else gain(layer, density, target)[2]
    return LayerRow(
        node=layer.name,
        op=layer.node.op_type,
        weight=layer.value.name or "",
        shape=tuple(layer.array().shape),
        pattern=str(pattern),
        density=pattern.density,
        n_zero=pattern.n_zero,
        macs=layer.macs(),
        format="dense" if never else form,
        break_even=break_even,
        speedup=1.0 if never else speedup,
        reason=reason,
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


def gain(layer: Layer, density: float, target: Target) -> tuple[str, float, float]:
    """(format, break-even density, estimated speedup) of a layer at a density."""
    out, inner, *kernel = layer.matrix().shape
    taps = _size(kernel)
    choice = choose(
        density,
        point_block(_points(layer), target) // target.lanes,
        inner * taps,
        target,
        taps=taps,
        rows=out,
        is_gathered=_is_gathered(layer),
    )
    return choice.weight, choice.break_even, 1 / max(choice.cost, 1e-3)


def _points(layer: Layer) -> int:
    """Points of one image (pixels, tokens, rows) that the layer computes; 1 if unknown."""
    shape = static_shape(layer.node.outputs[0])
    if shape is None:
        return 1
    if layer.is_convolution:
        return _size(shape[2:])
    return _size(shape[1:-1]) if len(shape) > 2 else _size(shape[:-1])


def _is_gathered(layer: Layer) -> bool:
    """True unless the output map is the input map, point by point."""
    attributes = layer.node.attributes
    moves = (*attributes.get_ints("strides", ()), *layer.matrix().shape[2:])
    pads = attributes.get_ints("pads", ())
    return layer.is_convolution and (any(d != 1 for d in moves) or any(pads))


def _why_dense(pattern: WeightPattern, break_even: float) -> str:
    if pattern.n_zero == 0:
        return "no zeros"
    return f"density {pattern.density:.2f} is above break-even {break_even:.2f}"


def _unprunable(model: ir.Model) -> dict[str, str]:
    """Layers that pruning leaves alone, with reasons."""
    from sparsegraph.recipe import Recipe, select

    try:
        return dict(select(model, Recipe.parse("magnitude:0.5"))[1])
    except UsageError:  # not one layer can be pruned
        return {layer.name: "cannot be pruned" for layer in weighted(model)}


def _total(rows: Sequence[LayerRow], speedups: Sequence[float]) -> float:
    """Speedup of all layers together, by multiply-adds; what would lose runs in ONNX Runtime."""
    dense = sum(row.macs or 0 for row in rows)
    left = sum((row.macs or 0) / speedup for row, speedup in zip(rows, speedups))
    return max(1.0, dense / left) if left else 1.0


def _size(shape: Sequence[int]) -> int:
    product = 1
    for extent in shape:
        product *= extent
    return product
