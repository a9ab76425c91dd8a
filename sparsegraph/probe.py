"""What a model does when a layer's outputs are disturbed: gradients without a backward pass.

Every layer gets a constant added to its outputs; random signs of it are tried, and what they do to
the model's outputs is correlated with the signs (simultaneous perturbation: Spall 1992; one session
and forward runs only, as ECoFLaP does for whole layers, arXiv:2310.02998).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from sparsegraph.calibrate import Feed, session_of
from sparsegraph.criteria.table import GRADIENTS, SENSITIVITY
from sparsegraph.errors import UsageError, message
from sparsegraph.gradients import Gradient
from sparsegraph.layers import Layer
from sparsegraph.recipe import Recipe
from sparsegraph.rewrite import FROM

Array = np.ndarray[Any, Any]

N_PROBES, N_FEEDS = 32, 4
_SIZE = 1e-2  # of a disturbance, over the root mean square of the layer's outputs
_NEEDED = {  # what a criterion reads of a `Gradient`, and in words
    "taylor": ("square", "gradients of a loss"),
    "fisher": ("square", "gradients"),
    "relevance": ("relevance", "relevance"),
}
_LEAST = 1e-2  # of the mean: below it an estimate is its own noise


@dataclass(frozen=True)
class Slope:
    """Mean squared gradients of a layer's weight [group, out, columns], or of its outputs
    [group, out]; or the relevance of the weight."""

    square: Array | None = None
    outputs: Array | None = None
    relevance: Array | None = None


def slopes(
    model: ir.Model,
    recipe: Recipe,
    chosen: Sequence[Layer],
    feeds: Sequence[Feed],
    gradients: Mapping[str, Gradient] | None,
) -> dict[str, Slope]:
    """What the recipe's criterion needs to know about gradients, by layer name; empty if nothing.

    Raises UsageError where only a module could tell, and for gradients of another shape.
    """
    needs = "" if recipe.criterion is None else recipe.criterion.needs
    if needs not in (GRADIENTS, SENSITIVITY):
        return {}
    if gradients is not None:
        return {layer.name: _given(layer, recipe.method, gradients) for layer in chosen}
    if needs == GRADIENTS:
        need = _NEEDED[recipe.method][1]
        fix = "pass gradients=, or use fisher"
        raise UsageError(message("recipe", recipe.method, "no gradients", need, fix))
    found = output_slopes(model, chosen, feeds[:N_FEEDS], seed=recipe.seed)
    return {name: Slope(outputs=array) for name, array in found.items()}


def _given(layer: Layer, method: str, gradients: Mapping[str, Gradient]) -> Slope:
    name = str(layer.value.name)
    found, (field, words) = gradients.get(name), _NEEDED[method]
    array = None if found is None else getattr(found, field)
    if found is None or array is None or (method == "taylor" and not found.of_loss):
        need, fix = f"{words} of '{name}'", "take them of the module that was captured"
        raise UsageError(message("gradients", name, "none", need, fix))
    return Slope(**{field: layer.product(_stored(layer, array, found.parameter))})


def _stored(layer: Layer, array: Array, parameter: Array | None) -> Array:
    """In the shape of the stored weight; a linear layer's may have been turned on export."""
    stored = layer.array()
    fix = "take gradients of the module that was captured"
    if array.shape != stored.shape and array.T.shape == stored.shape:
        return array.T
    if array.shape != stored.shape:
        found = list(array.shape)
        raise UsageError(message("gradients", layer.name, found, list(stored.shape), fix))
    if array.ndim != 2 or array.T.shape != array.shape:
        return array
    if parameter is None and FROM in layer.value.metadata_props:
        need = "the parameter too: a square weight may have been turned"
        raise UsageError(message("gradients", layer.name, "gradients alone", need, fix))
    if parameter is None:
        return array
    plain, turned = (abs(float(np.vdot(stored, p))) for p in (parameter, parameter.T))
    return array if plain >= turned else array.T


def output_slopes(
    model: ir.Model, chosen: Sequence[Layer], feeds: Sequence[Feed], *, seed: int = 0
) -> dict[str, Array]:
    """How far every output of every layer moves the model's outputs, [group, out] per layer.

    Mean squared gradients, up to one factor for the whole model; ones where a layer's output is the
    model's. 32 runs per layer and feed. Raises UsageError without feeds.
    """
    if not feeds:
        raise UsageError(message("fisher", "calibration", "no feeds", "feeds", "pass some"))
    copy = model.clone()
    names = [name for layer in chosen if (name := _disturb(copy, layer)) is not None]
    found = {}
    with session_of(copy) as session:
        outputs = [v.name for v, kind in zip(copy.graph.outputs, session.get_outputs())
                   if "float" in kind.type]  # fmt: skip
        run = _Runs(session, outputs, names, feeds, {i.name: i.shape for i in session.get_inputs()})
        for layer in chosen:
            shape = layer.product().shape[:2]
            n_taps = shape[0] * shape[1] // _n_outputs(layer)
            if _input_name(layer) not in names:
                found[layer.name] = np.ones(shape)
                continue
            key = (seed, zlib.crc32(layer.name.encode()))
            energy = run.energy(_input_name(layer), _n_outputs(layer), key)
            found[layer.name] = np.repeat(energy, n_taps).reshape(shape)
    return found


def _n_outputs(layer: Layer) -> int:
    return int(layer.matrix().shape[0])


def _input_name(layer: Layer) -> str:
    return f"{layer.name}.disturbance"


def _disturb(model: ir.Model, layer: Layer) -> str | None:
    """Add a new graph input to the outputs of a layer; None where that is an output's name."""
    node = next(n for n in model.graph if n.name == layer.name)
    out = node.outputs[0]
    if out.is_graph_output() or out.dtype is None:
        return None
    stored = layer.array().shape
    dims = [_n_outputs(layer)]
    if layer.is_convolution:
        dims += [1] * (len(stored) - 2)
    elif len(stored) > 2:  # a stack of weights, each with outputs of its own
        dims = [*stored[:-2], 1, stored[-1]]
    if not layer.is_convolution and layer.weight_at == 0:
        dims = [*stored[:-1], 1] if len(stored) > 2 else [*dims, 1]
    name, shape = _input_name(layer), ir.Shape(dims)
    given = ir.val(name, dtype=out.dtype, shape=shape)
    users = list(out.uses())
    add = ir.node("Add", [out, given], name=f"{layer.name}.disturbed")
    add.outputs[0].name, add.outputs[0].dtype, add.outputs[0].shape = (
        f"{out.name}.disturbed", out.dtype, out.shape,
    )  # fmt: skip
    model.graph.insert_after(node, add)
    for user, at in users:
        user.replace_input_with(at, add.outputs[0])
    model.graph.inputs.append(given)
    return name


@dataclass(frozen=True)
class _Runs:
    session: Any
    outputs: Sequence[str | None]
    names: Sequence[str]
    feeds: Sequence[Feed]
    shapes: Mapping[str, Sequence[int]]

    def energy(self, name: str, n: int, seed: tuple[int, ...]) -> Array:
        """Mean squared gradients of the outputs that `name` disturbs, [n]."""
        generator = np.random.default_rng(seed)
        total = np.zeros(n)
        for feed in self.feeds:
            plain = self._run(feed, name, np.zeros(n))
            size = _SIZE * max(float(np.sqrt(np.mean(np.square(plain)))), 1e-6)
            moved = np.zeros((n, len(plain)))
            for signs in _signs(generator, n):
                moved += np.outer(signs, self._run(feed, name, size * signs) - plain)
            total += np.square(moved / (N_PROBES * size)).sum(axis=1)
        # every estimate holds 1 / N_PROBES of all the others' energy
        total -= total.sum() / (N_PROBES + n - 1)
        least = _LEAST * np.maximum(total, 0).mean() + np.finfo(float).tiny
        return np.asarray(np.maximum(total, least))

    def _run(self, feed: Feed, name: str, values: Array) -> Array:
        off = {k: np.zeros(self.shapes[k], np.float32) for k in self.names if k != name}
        mine = np.asarray(values, np.float32).reshape(self.shapes[name])
        found = self.session.run(self.outputs, {**feed, **off, name: mine})
        return np.concatenate([np.ravel(x) for x in found]).astype(np.float64)


def _signs(generator: np.random.Generator, n: int) -> Iterator[Array]:
    for _ in range(N_PROBES):
        yield generator.choice((-1.0, 1.0), size=n)
