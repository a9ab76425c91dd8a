"""Low-rank branches beside products: merged into the weight, kept, or removed.

A LoRA branch y = W x + s B (A x) (Hu et al. 2021, arXiv:2106.09685) is merged where W loses hardly
any zeros by it. A sparse W would fill up: there the branch stays (SLoPe: Mozaffari et al. 2024,
arXiv:2405.16325), and its sum is computed in the epilogue of a product. A branch that is all zero
goes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from sparsegraph.graph import (
    constant,
    has_one_use,
    input_at,
    is_op,
    remove_dead,
    remove_unused_initializers,
    scalar,
    static_shape,
)
from sparsegraph.layers import Layer, weighted

Array = np.ndarray[Any, Any]

MERGED, KEPT, REMOVED = "merged", "kept", "removed"
FEW = 0.03
"""Share of a weight in zeros that may be lost: below it no kernel gains from them."""
_SAME_WINDOW = ("strides", "pads", "dilations", "auto_pad", "kernel_shape")


@dataclass(frozen=True)
class Branch:
    """A low-rank branch: what became of it, and the non-zeros that are multiplied either way."""

    node: str
    weight: str
    rank: int
    fate: str
    n_apart: int
    n_merged: int
    density_before: float
    density_merged: float


def settle(model: ir.Model, *, few: float = FEW) -> tuple[ir.Model, tuple[Branch, ...]]:
    """A copy in which every low-rank branch beside a product is merged, kept or removed.

    The branch is two products (MatMul, Gemm, or convolutions of which the second is pointwise) in a
    row on the same input, times a number or not, added to the product or to its sum with a bias.
    Its pieces must have no other readers. Merged if at most the share `few` of the weight turns
    from zero to something else; 1 merges all.
    """
    copy = model.clone()
    layers = {layer.node: layer for layer in weighted(copy)}
    rows = []
    for add in [node for node in copy.graph if is_op(node, "Add")]:
        found = _match(add, 0, layers) or _match(add, 1, layers)
        if found is not None:
            rows.append(found.settle(few))
    remove_dead(copy.graph)
    remove_unused_initializers(copy.graph)
    return copy, tuple(rows)


@dataclass(frozen=True)
class _Match:
    """`low_rank` is [out, in(, kh, kw)], in units of the stored weight."""

    add: ir.Node
    main: ir.Value
    layer: Layer
    low_rank: Array
    n_low_rank: int
    rank: int

    def settle(self, few: float) -> Branch:
        matrix = self.layer.matrix()
        merged = (matrix.astype(np.float64) + self.low_rank).astype(matrix.dtype)
        n_filled = np.count_nonzero((matrix == 0) & (merged != 0))
        fate = MERGED if n_filled <= few * matrix.size else KEPT
        if not self.low_rank.any():
            fate = REMOVED
        name = str(self.layer.value.name)
        if fate == MERGED:
            self.layer.value.const_value = ir.tensor(self.layer.stored(merged), name=name)
        if fate != KEPT:
            self._bypass()
        n_before, n_merged = np.count_nonzero(matrix), np.count_nonzero(merged)
        return Branch(
            str(self.add.name), name, self.rank, fate, int(n_before + self.n_low_rank),
            int(n_merged), float(n_before / matrix.size), float(n_merged / matrix.size),
        )  # fmt: skip

    def _bypass(self) -> None:
        """The product's value in place of the sum, under the sum's name where that is an output."""
        total = self.add.outputs[0]
        total.replace_all_uses_with(self.main, replace_graph_outputs=True)
        if self.main.is_graph_output():
            total.name, self.main.name = self.main.name, total.name


def _match(add: ir.Node, at: int, layers: dict[ir.Node, Layer]) -> _Match | None:
    """The branch at one input of an Add whose other input is the product beside it."""
    main, (tip, scale) = add.inputs[1 - at], _unscaled(add.inputs[at])
    up = _layer(tip, layers)
    down = None if up is None else _layer(up.data, layers)
    layer = None if main is None else _layer(_without_bias(main), layers)
    if up is None or down is None or layer is None or main is None or not has_one_use(main):
        return None
    if down.data is not layer.data or len(layer.value.uses()) > 1:
        return None
    shape = static_shape(main)
    if shape is None or shape != static_shape(add.inputs[at]):
        return None
    if _has_bias(up) or _has_bias(down) or _alpha(layer) == 0 or not _fit(layer, down, up):
        return None
    b, a = (x.matrix().astype(np.float64).reshape(len(x.matrix()), -1) for x in (up, down))
    low_rank = scale * _alpha(up) * _alpha(down) / _alpha(layer) * (b @ a)
    if low_rank.size != layer.matrix().size:
        return None
    n_low_rank = int(np.count_nonzero(a) + np.count_nonzero(b))
    shaped = low_rank.reshape(layer.matrix().shape)
    return _Match(add, main, layer, shaped, n_low_rank, len(a))


def _unscaled(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """A value and the number that it is multiplied by."""
    node = None if value is None else value.producer()
    if value is None or node is None or not is_op(node, "Mul", "Div") or not has_one_use(value):
        return value, 1.0
    for at in (0, 1) if is_op(node, "Mul") else (1,):
        number = scalar(node.inputs[at])
        if number is not None and is_op(node, "Mul"):
            return node.inputs[1 - at], number
        if number:
            return node.inputs[1 - at], 1 / number
    return value, 1.0


def _without_bias(value: ir.Value) -> ir.Value:
    """What a constant is added to, if one is."""
    node = value.producer()
    if node is None or not is_op(node, "Add"):
        return value
    for at in (0, 1):
        inner = node.inputs[1 - at]
        if constant(node.inputs[at]) is not None and inner is not None:
            return inner
    return value


def _layer(value: ir.Value | None, layers: dict[ir.Node, Layer]) -> Layer | None:
    """The floating-point layer that makes a value for one reader, if it multiplies from the right.

    Convolutions must not be in groups.
    """
    node = None if value is None else value.producer()
    layer = None if node is None else layers.get(node)
    if value is None or layer is None or not has_one_use(value):
        return None
    is_plain = layer.weight_at == 1 and not layer.quantised and layer.group == 1
    is_plain &= layer.is_convolution or layer.array().ndim == 2
    is_plain &= layer.node.op_type != "ConvTranspose"
    is_plain &= layer.node.attributes.get_int("transA", 0) == 0 and layer.array().dtype.kind == "f"
    return layer if is_plain and not layer.value.is_graph_input() else None


def _fit(layer: Layer, down: Layer, up: Layer) -> bool:
    """Whether the three products see the same points, given that they make as many.

    A second convolution without pads then has no strides.
    """
    if len({x.is_convolution for x in (layer, down, up)}) > 1:
        return False
    same = all(_setting(layer, key) == _setting(down, key) for key in _SAME_WINDOW)
    is_pointwise = up.matrix()[0, 0].size == 1 and not any(_setting(up, "pads") or ())
    return same and is_pointwise and layer.array().shape[2:] == down.array().shape[2:]


def _setting(layer: Layer, key: str) -> Any:
    found = layer.node.attributes.get(key)
    value = None if found is None else found.value
    is_plain = value in ("NOTSET", None) or (key == "kernel_shape" and value is not None)
    return None if is_plain else value


def _has_bias(layer: Layer) -> bool:
    """Whether the node itself adds something that is not zero."""
    bias = input_at(layer.node, 2)
    array = constant(bias)
    return bias is not None and (array is None or bool(array.any()))


def _alpha(layer: Layer) -> float:
    return layer.node.attributes.get_float("alpha", 1.0)
