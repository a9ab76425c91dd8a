"""Magnitude pruning of a ModelProto, per layer, in the patterns that kernels are measured on.

For timing only: quality is the business of `sparsegraph.prune`. Patterns are written
`unstructured`, `2:4` (at most N of every M inputs of one output), `4x1` (4 neighbouring outputs
share every index) and `32x32` (blocks of outputs x inputs).
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]

OUTPUT_AXIS = {"Conv": 0, "ConvTranspose": 1, "Gemm": -1, "MatMul": -1, "LSTM": 1, "GRU": 1}
"""Which axis of an op's weight counts outputs; Gemm with transB has them first, recurrences behind
their directions."""
RECURRENT = ("LSTM", "GRU")
TABLE = "Gather"


@dataclass(frozen=True)
class Layer:
    """A product with a constant weight, or rows of a constant table (an embedding)."""

    index: int
    """Position among the layers of the model."""
    node: str
    op: str
    weight: str
    shape: tuple[int, ...]
    output_axis: int
    """Axis of the weight that counts outputs."""
    groups: int = 1

    @property
    def is_pointwise(self) -> bool:
        """A 1x1 convolution over all channels."""
        return self.op == "Conv" and self.groups == 1 and self.shape[2:] == (1, 1)


Selector = Callable[[Layer], bool]


def everything(layer: Layer) -> bool:
    """Depthwise convolutions, embeddings and the stem too."""
    return True


def all_layers(layer: Layer) -> bool:
    """Every product but grouped convolutions."""
    return layer.groups == 1 and layer.op != TABLE


def all_but_the_stem(layer: Layer) -> bool:
    """Every product but the first and grouped convolutions."""
    return layer.index > 0 and all_layers(layer)


def detector_convolutions(layer: Layer) -> bool:
    """Every convolution but the stem and the fixed sum over box-side bins."""
    return all_but_the_stem(layer) and layer.shape[0] > 1


def pointwise(layer: Layer) -> bool:
    """1x1 convolutions: what MobileNets are pruned in."""
    return layer.is_pointwise


def encoder_linears(layer: Layer) -> bool:
    """The linear layers of transformer blocks: no patch embedding, no classifier."""
    return bool(re.match(r"(encoder\.layer|blocks)\.\d+\.", layer.weight))


SELECTORS: dict[str, Selector] = {
    "resnet18": all_but_the_stem,
    "resnet50": all_but_the_stem,
    "mobilenet_v1": pointwise,
    "mobilenet_v2": pointwise,
    "efficientnet_lite0": pointwise,
    "yolov8n": detector_convolutions,
    "minilm": encoder_linears,
    "deit_tiny": encoder_linears,
    "deit_small": encoder_linears,
}
"""Which layers of a zoo model are pruned; models not named here are pruned everywhere."""


def selector_for(model: str) -> Selector:
    """The selector that published figures of `model` use."""
    return SELECTORS.get(model, all_layers)


def layers(model: onnx.ModelProto) -> Iterator[Layer]:
    """Constant weights of rank 2 or more of the nodes of `OUTPUT_AXIS`, in graph order.

    The second input; of recurrences the third too. Then the tables of Gather.
    """
    constants = _constants(model)
    shapes = {name: tuple(tensor.dims) for name, tensor in constants.items()}
    index = 0
    for node in model.graph.node:
        if node.op_type not in OUTPUT_AXIS:
            continue
        attributes = {a.name: a.i for a in node.attribute}
        axis = 0 if attributes.get("transB") else OUTPUT_AXIS[node.op_type]
        for weight in node.input[1 : 3 if node.op_type in RECURRENT else 2]:
            if len(shapes.get(weight, ())) >= 2:
                groups = attributes.get("group", 1)
                yield Layer(index, node.name, node.op_type, weight, shapes[weight], axis, groups)
                index += 1
    for node in model.graph.node:
        table = node.input[0] if node.op_type == TABLE else ""
        if len(shapes.get(table, ())) == 2 and constants[table].data_type == onnx.TensorProto.FLOAT:
            yield Layer(index, node.name, TABLE, table, shapes[table], 0)
            index += 1


def magnitude(
    model: onnx.ModelProto,
    density: float,
    *,
    layers: Selector | None = None,
    pattern: str = "unstructured",
) -> onnx.ModelProto:
    """A copy of `model` whose selected weights keep the fraction `density` of their entries.

    `density` is exact to one group per layer; a `N:M` pattern has density N/M and ignores it.
    Raises ValueError for an unknown pattern or a density outside [0, 1].
    """
    if not 0 <= density <= 1:
        raise ValueError(f"cannot prune '{model.graph.name}': found density {density}, need 0 to 1")
    keep = _pattern(pattern, density)
    pruned = onnx.ModelProto()
    pruned.CopyFrom(model)
    if density == 1:
        return pruned
    chosen = {layer.weight: layer for layer in selected(model, layers)}
    for name, tensor in _constants(pruned).items():
        if name in chosen:
            weight = _zeroed(numpy_helper.to_array(tensor), chosen[name], keep)
            tensor.CopyFrom(numpy_helper.from_array(weight, tensor.name))
    return pruned


def selected(model: onnx.ModelProto, selector: Selector | None = None) -> list[Layer]:
    """The layers that `selector` takes; without one, the model's published choice."""
    selector = selector or selector_for(model.graph.name)
    return [layer for layer in layers(model) if selector(layer)]


def densities(model: onnx.ModelProto, chosen: Iterable[Layer]) -> dict[str, float]:
    """Fraction of non-zeros of every chosen weight."""
    wanted = {layer.weight for layer in chosen}
    arrays = {
        name: numpy_helper.to_array(tensor)
        for name, tensor in _constants(model).items()
        if name in wanted
    }
    return {name: float(np.count_nonzero(a) / a.size) for name, a in arrays.items()}


def _constants(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Tensor of every initializer and of every Constant node, by value name, for editing."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            tensors[node.output[0]] = node.attribute[0].t
    return tensors


def _zeroed(weight: Array, layer: Layer, keep: Callable[[Array], Mask]) -> Array:
    """`weight` with zeros where `keep` says so of its [outputs, inputs] matrix, inputs innermost.

    For a kernel larger than 1x1 the innermost axis is input channels, so that groups of inputs
    never mix kernel positions. The rows of a recurrence's directions lie one below the other.
    """
    if layer.op in RECURRENT:
        flat = weight.reshape(-1, weight.shape[-1])
        return np.where(keep(np.abs(flat)), flat, np.float32(0)).reshape(weight.shape)
    moved = np.moveaxis(np.moveaxis(weight, layer.output_axis, 0), 1, -1)
    mask = keep(np.abs(moved).reshape(moved.shape[0], -1)).reshape(moved.shape)
    restored = np.moveaxis(np.moveaxis(mask, -1, 1), 0, layer.output_axis)
    return np.where(restored, weight, np.float32(0))


def _pattern(text: str, density: float) -> Callable[[Array], Mask]:
    if text == "unstructured":
        return lambda score: _keep_blocks(score, 1, 1, density)
    if found := re.fullmatch(r"(\d+):(\d+)", text):
        n, m = map(int, found.groups())
        if n < m:
            return lambda score: _keep_n_of_m(score, n, m)
    if found := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text):
        rows, columns = map(int, found.groups())
        return lambda score: _keep_blocks(score, rows, columns, density)
    raise ValueError(
        f"unknown pattern '{text}': need unstructured, N:M with N < M, or ROWSxCOLUMNS"
    )


def _keep_blocks(score: Array, rows: int, columns: int, density: float) -> Mask:
    """The round(density * n) blocks of largest mean magnitude; edge blocks may be smaller."""
    n_out, n_in = score.shape
    down, across = -(-n_out // rows), -(-n_in // columns)
    padded = np.zeros((down * rows, across * columns), np.float64)
    padded[:n_out, :n_in] = score
    sums = padded.reshape(down, rows, across, columns).sum(axis=(1, 3)).ravel()
    kept = np.zeros(sums.size, bool)
    n_kept = round(density * sums.size)
    if n_kept:
        kept[np.argpartition(-sums, n_kept - 1)[:n_kept]] = True
    grid = kept.reshape(down, across)
    return np.repeat(np.repeat(grid, rows, axis=0), columns, axis=1)[:n_out, :n_in]


def _keep_n_of_m(score: Array, n: int, m: int) -> Mask:
    """The n largest of every m neighbouring inputs; a shorter last group keeps at most n."""
    n_out, n_in = score.shape
    n_groups = -(-n_in // m)
    padded = np.full((n_out, n_groups * m), -1.0)
    padded[:, :n_in] = score
    groups = padded.reshape(n_out, n_groups, m)
    order = np.argsort(-groups, axis=2, kind="stable")
    kept = np.zeros(groups.shape, bool)
    np.put_along_axis(kept, order[:, :, :n], True, axis=2)
    return kept.reshape(n_out, -1)[:, :n_in]
