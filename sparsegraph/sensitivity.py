"""Which layers kill a model: every layer pruned alone, and what that does to the outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from sparsegraph.calibrate import Feed
from sparsegraph.criteria.structure import Structure
from sparsegraph.divergence import Divergence
from sparsegraph.errors import UsageError, message
from sparsegraph.feeds import checked
from sparsegraph.layers import Layer
from sparsegraph.probe import slopes
from sparsegraph.recipe import Recipe, select
from sparsegraph.solve import Solved, solve
from sparsegraph.walk import Measured, Walk

Array = np.ndarray[Any, Any]
Loss = Callable[[ir.Model], float]
Progress = Callable[[int, int, str], None]

N_PROBES = 8  # feeds that outputs are compared on


@dataclass(frozen=True)
class LayerDrop:
    """One layer pruned alone. `output_error` is the layer's own, `loss` the model's: 0 for none."""

    layer: str
    shape: tuple[int, ...]
    structure: Structure
    output_error: float | None
    loss: float


def scan(
    model: ir.Model,
    recipe: str | Recipe,
    calibration: Iterable[Feed],
    *,
    loss: Loss | None = None,
    progress: Progress | None = None,
) -> tuple[LayerDrop, ...]:
    """Prune every layer alone, with the repairs of the recipe; the worst come first.

    `loss(model)` is 0 for the dense model and grows as quality falls; by default the divergence of
    the outputs on the first 8 feeds. Raises UsageError without feeds.
    """
    recipe = Recipe.parse(recipe) if isinstance(recipe, str) else recipe
    feeds = checked(model, calibration)
    alone = Alone(model, recipe, feeds, loss)
    known = slopes(model, recipe, select(model, recipe)[0], feeds, None)
    rows = []
    for layer, measured in alone:
        slope = known.get(layer.name)
        solved = solve(layer, recipe, recipe.structure, measured, slope=slope)
        shape = tuple(layer.array().shape)
        found = alone.loss(layer, solved)
        rows.append(LayerDrop(layer.name, shape, recipe.structure, solved.error, found))
        if progress is not None:
            progress(len(rows), alone.n_layers, layer.name)
    return tuple(sorted(rows, key=lambda row: -row.loss))


class Alone:
    """Iterates over the layers of a model with dense statistics; one of them can be tried out."""

    def __init__(
        self, model: ir.Model, recipe: Recipe, feeds: Sequence[Feed], loss: Loss | None = None
    ) -> None:
        if not feeds:
            fix = "pass calibration (--calibration FILE.npz)"
            raise UsageError(message("calibration", str(recipe), "no feeds", "at least one", fix))
        self._model, self._copy, self._feeds = model, model.clone(), feeds
        self._recipe = replace(recipe, sequential=False, compensate=False)
        self._chosen = select(self._copy, recipe)[0]
        self._loss = loss or Divergence(model, feeds[:N_PROBES])

    @property
    def n_layers(self) -> int:
        return len(self._chosen)

    def __iter__(self) -> Iterator[tuple[Layer, Measured]]:
        walk = Walk(self._model, self._copy, self._recipe, self._feeds)
        return walk.measured(self._chosen)

    def loss(self, layer: Layer, solved: Solved) -> float:
        """The model's loss when this layer alone is pruned."""
        with _tried(self._copy, layer, solved, corrects=self._recipe.correct_bias):
            return self._loss(self._copy)


@contextmanager
def _tried(model: ir.Model, layer: Layer, solved: Solved, *, corrects: bool) -> Iterator[None]:
    """Weight and bias of one layer replaced, and put back on leaving."""
    bias, weight = layer.bias() if corrects else None, layer.value.const_value
    node = layer.node if bias is None else bias.node
    inputs, names = tuple(node.inputs), set(model.graph.initializers)
    held = None if bias is None or bias.value is None else bias.value.const_value
    try:
        array = layer.from_product(solved.product)
        layer.value.const_value = ir.tensor(array, name=layer.value.name)
        if bias is not None and solved.bias_change is not None:
            bias.add(solved.bias_change, f"{layer.value.name}.bias", model.graph)
        yield
    finally:
        layer.value.const_value = weight
        if bias is not None and bias.value is not None:
            bias.value.const_value = held
        node.resize_inputs(len(inputs))
        for at, value in enumerate(inputs):
            if node.inputs[at] is not value:
                node.replace_input_with(at, value)
        for name in set(model.graph.initializers) - names:
            del model.graph.initializers[name]
