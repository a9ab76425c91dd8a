"""Layers: nodes that multiply by a constant weight, with how weight, input and bias lie.

One reading serves inspection, calibration and pruning: the weight as [out, in(, kh, kw)], the
input as rows of columns, the bias as one number per output.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from sparsegraph.calibrate import Rows

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Layer:
    """A MatMul, Gemm, Conv or ConvTranspose with a constant weight.

    `value` is the weight's initializer (behind a DequantizeLinear if `quantised`), `data` the value
    that it multiplies; `transposed`: stored [in, out]. `weight_at` is the node input it feeds.
    """

    node: ir.Node
    value: ir.Value
    data: ir.Value
    transposed: bool
    weight_at: int = 1
    quantised: bool = False
    zero_point: ir.Value | None = None
    zero_axis: int = 0

    @property
    def name(self) -> str:
        """The node's name."""
        return self.node.name or ""

    @property
    def group(self) -> int:
        """Convolution groups; 1 for products."""
        return self.node.attributes.get_int("group", 1)

    @property
    def is_convolution(self) -> bool:
        return self.node.op_type in ("Conv", "ConvTranspose")

    def array(self) -> Array:
        """The stored array."""
        assert self.value.const_value is not None
        return self.value.const_value.numpy()

    def matrix(self) -> Array:
        """The weight as [out, in(, kh, kw)]; with groups [out, in / group, kh, kw]."""
        return self._turn(self.array())

    def stored(self, matrix: Array) -> Array:
        """The inverse of `matrix`: an array in the stored shape, order and dtype."""
        stored, shape = self.array(), self.array().shape
        if self.node.op_type == "ConvTranspose":
            cube = matrix.reshape(self.group, shape[1], -1, *shape[2:]).swapaxes(1, 2)
            matrix = cube.reshape(shape)
        elif self.transposed and not self.is_convolution:
            matrix = matrix.reshape(*shape[:-2], shape[-1], shape[-2]).swapaxes(-1, -2)
        return np.ascontiguousarray(matrix.reshape(shape), dtype=stored.dtype)

    def zero(self) -> Array | int:
        """The stored number that means zero, broadcastable against `matrix()`."""
        if self.zero_point is None or self.zero_point.const_value is None:
            return 0
        points = self.zero_point.const_value.numpy()
        if points.size == 1:
            return points.reshape(())
        shape = [1] * self.array().ndim
        shape[self.zero_axis] = points.size
        return self._turn(np.broadcast_to(points.reshape(shape), self.array().shape))

    def _turn(self, array: Array) -> Array:
        if self.node.op_type == "ConvTranspose":
            shape = array.shape
            cube = array.reshape(self.group, shape[0] // self.group, *shape[1:]).swapaxes(1, 2)
            return cube.reshape(self.group * shape[1], shape[0] // self.group, *shape[2:])
        if self.node.op_type == "Conv":
            return array
        turned = array.swapaxes(-1, -2) if self.transposed else array
        return turned.reshape(-1, turned.shape[-1])

    def macs(self) -> int | None:
        """Multiply-accumulates of one dense run, or None when a shape is unknown."""
        out, inner, *kernel = self.matrix().shape
        if self.node.op_type == "ConvTranspose":  # every input pixel meets out / group kernels
            n_points, per_point = _size(self.data), out // self.group
        else:
            n_points, per_point = _size(self.node.outputs[0]), inner
        return None if n_points is None else n_points * per_point * math.prod(kernel)

    def rows(self) -> Rows:
        """How the layer's input becomes rows whose columns its weight multiplies."""
        node = self.node
        if node.op_type == "ConvTranspose":
            return Rows(feature_axis=1, group=self.group)
        if node.op_type == "Conv":
            rank = self.array().ndim - 2
            ints = node.attributes.get_ints
            return Rows(
                kernel=self.array().shape[2:],
                strides=tuple(ints("strides", (1,) * rank)),
                dilations=tuple(ints("dilations", (1,) * rank)),
                pads=tuple(ints("pads", (0,) * (2 * rank))),
                auto_pad=node.attributes.get_string("auto_pad", "NOTSET"),
                group=self.group,
            )
        if node.op_type == "Gemm":
            flag = "transA" if self.weight_at == 1 else "transB"
            flipped = node.attributes.get_int(flag, 0) == 1
            return Rows(feature_axis=1 if (self.weight_at == 1) != flipped else 0)
        return Rows(feature_axis=-1 if self.weight_at == 1 else -2)

    def product(self, array: Array | None = None) -> Array:
        """The weight as [group, out, columns], columns in the order of `rows()`.

        With `array`, that array of the stored shape in its place.
        """
        matrix = self._turn(self.array() if array is None else array)
        out, inner = matrix.shape[:2]
        if self.node.op_type == "ConvTranspose":  # one linear map from pixel to kernel footprint
            matrix = matrix.reshape(out, inner, -1).swapaxes(1, 2)
            return matrix.reshape(self.group, -1, inner)
        return matrix.reshape(self.group, out // self.group, -1)

    def from_product(self, product: Array) -> Array:
        """The inverse of `product`, as a stored array."""
        shape = self.matrix().shape
        if self.node.op_type == "ConvTranspose":
            cube = product.reshape(shape[0], -1, shape[1]).swapaxes(1, 2)
            return self.stored(cube.reshape(shape))
        return self.stored(product.reshape(shape))

    def bias(self) -> Bias | None:
        """Where a constant per output is added, or None where there is no such place."""
        node = self.node
        if node.op_type == "Conv" or (node.op_type == "Gemm" and self.weight_at == 1):
            given = node.inputs[2] if len(node.inputs) > 2 else None
            if given is not None and not _is_constant(given):
                return None
            scale = node.attributes.get_float("beta", 1.0) / node.attributes.get_float("alpha", 1.0)
            return Bias(node, 2, given, scale) if scale else None
        if node.op_type != "MatMul" or self.weight_at != 1:
            return None
        add = _only_user(node.outputs[0], "Add")
        if add is None:
            return None
        at = 1 if add.inputs[0] is node.outputs[0] else 0
        given, n_out = add.inputs[at], self.array().shape[-1]
        if given is None or not _is_constant(given) or _size(given) != n_out:
            return None
        return Bias(add, at, given, 1.0) if (given.shape or (0,))[-1] == n_out else None

    def residual(self) -> ir.Value | None:
        """The value that the next Add joins to this layer's output, when it has the same shape."""
        out = self.node.outputs[0]
        bias = self.bias()
        if bias is not None and bias.node is not self.node:
            out = bias.node.outputs[0]
        add = _only_user(out, "Add")
        if add is None:
            return None
        other = add.inputs[1] if add.inputs[0] is out else add.inputs[0]
        same = other is not None and other is not out and other.shape == out.shape
        return other if same and other is not None and not _is_constant(other) else None


@dataclass(frozen=True)
class Bias:
    """A constant added per output: input `at` of `node`, `scale` times its stored value."""

    node: ir.Node
    at: int
    value: ir.Value | None
    scale: float

    def add(self, change: Array, name: str, graph: ir.Graph) -> None:
        """Add `change` [out]; a shared constant is copied first, a missing one is created."""
        result = self.node.outputs[0].dtype
        dtype: Any = np.float32 if result is None else result.numpy()
        current: Array = np.zeros(change.shape)
        if self.value is not None and self.value.const_value is not None:
            current = self.value.const_value.numpy()
            dtype = current.dtype
        target = np.asarray(np.broadcast_to(current, _wider(current, change)))
        moved = (target + (change / self.scale).reshape(_tail(target, change))).astype(dtype)
        if (
            self.value is not None
            and len(self.value.uses()) == 1
            and self.value.shape == moved.shape
        ):
            self.value.const_value = ir.tensor(moved, name=self.value.name)
            return
        name = self.value.name if self.value is not None and self.value.name else name
        while name in graph.initializers:
            name += ".corrected"
        fresh = ir.val(name, const_value=ir.tensor(moved, name=name))
        graph.register_initializer(fresh)
        if self.at == len(self.node.inputs):
            self.node.resize_inputs(self.at + 1)
        self.node.replace_input_with(self.at, fresh)


def _wider(current: Array, change: Array) -> tuple[int, ...]:
    return np.broadcast_shapes(current.shape, _tail(current, change))


def _tail(current: Array, change: Array) -> tuple[int, ...]:
    return (1,) * max(current.ndim - 1, 0) + (change.size,)


def weighted(model: ir.Model) -> list[Layer]:
    """Every layer of the main graph, in execution order."""
    return [layer for node in model.graph if (layer := _layer(node)) is not None]


def unfolded(model: ir.Model) -> list[str]:
    """Names of products whose weight is still computed from constants, as in raw captures.

    Linear layers of 3-D inputs come with a Transpose of their weight, which `optimize` folds.
    """
    held = _constants(model)
    kinds = ("MatMul", "Gemm", "Conv", "ConvTranspose")
    products = [node for node in model.graph if node.op_type in kinds and _layer(node) is None]
    return [node.name or "" for node in products if held.intersection(node.inputs[:2])]


def recurrent(model: ir.Model) -> list[str]:
    """Names of recurrent nodes with constant weights: products that are no layers here."""
    kinds, held = ("LSTM", "GRU", "RNN"), _constants(model)
    found = [node for node in model.graph if node.op_type in kinds and node.domain == ""]
    weights = [(node, node.inputs[1]) for node in found]
    return [n.name or "" for n, w in weights if w is not None and (w in held or _is_constant(w))]


def _constants(model: ir.Model) -> set[ir.Value]:
    """Outputs of nodes that read constants alone."""
    held: set[ir.Value] = set()
    for node in model.graph:
        inputs = [v for v in node.inputs if v is not None]
        if inputs and all(_is_constant(v) or v in held for v in inputs):
            held.update(node.outputs)
    return held


def _layer(node: ir.Node) -> Layer | None:
    if node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type in ("Conv", "ConvTranspose"):
        return _bind(node, 1, 0, node.op_type == "ConvTranspose")
    if node.op_type == "Gemm":
        right = _bind(node, 1, 0, node.attributes.get_int("transB", 0) == 0)
        return right or _bind(node, 0, 1, node.attributes.get_int("transA", 0) == 1)
    if node.op_type == "MatMul":
        return _bind(node, 1, 0, True) or _bind(node, 0, 1, False)
    return None


def _bind(node: ir.Node, at: int, other: int, transposed: bool) -> Layer | None:
    """The layer whose weight is input `at`, directly or behind a DequantizeLinear."""
    value, data = node.inputs[at], node.inputs[other]
    if value is None or data is None or _is_constant(data):
        return None
    source, zero_point, axis = value, None, 1
    producer = value.producer()
    quantised = producer is not None and producer.op_type == "DequantizeLinear"
    if producer is not None and quantised and producer.inputs[0] is not None:
        source, axis = producer.inputs[0], producer.attributes.get_int("axis", 1)
        zero_point = producer.inputs[2] if len(producer.inputs) > 2 else None
    if not _is_constant(source) or len(source.const_value.shape) < 2:  # type: ignore[union-attr]
        return None
    return Layer(node, source, data, transposed, at, quantised, zero_point, axis)


def _is_constant(value: ir.Value) -> bool:
    return value.const_value is not None and value.is_initializer()


def _only_user(value: ir.Value, op_type: str) -> ir.Node | None:
    """The one node that reads `value`, if it is an `op_type` and the value is no output."""
    uses = value.uses()
    if len(uses) != 1 or value.is_graph_output():
        return None
    node = next(iter(uses)).node
    return node if node.op_type == op_type else None


def _size(value: ir.Value) -> int | None:
    if value.const_value is not None:
        return math.prod(int(d) for d in value.const_value.shape.numpy())
    dims = None if value.shape is None else value.shape.dims
    if dims is None or not all(isinstance(d, int) for d in dims):
        return None
    return math.prod(d for d in dims if isinstance(d, int))
