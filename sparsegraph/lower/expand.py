"""A pointwise product whose only reader is a depthwise convolution: both become one kernel.

Channel by channel the kernel computes one plane from the few planes that have a weight, and
convolves it while it lies in the inner caches (`targets/kernels/depthwise_masked.py`). A product of
its own shares loads between rows and keeps its activations in the level 1 cache, but it writes the
wide map and the depthwise kernel reads it again.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from sparsegraph import compressed_rows
from sparsegraph.graph import int_attribute, static_shape
from sparsegraph.lower import problem
from sparsegraph.lower.builder import Builder, Stored, name_of
from sparsegraph.lower.choose import choose
from sparsegraph.lower.regions import Region
from sparsegraph.lower.windows import Window
from sparsegraph.program import Arg
from sparsegraph.targets.kernels.depthwise_masked import Expand
from sparsegraph.targets.layout import planar

_MOST = 12.0  # values per row; MobileNetV2 at 90 %: 3.75 ms at 0, 3.46 at 5, 3.39 at 12, 3.50 at 20


@dataclass(frozen=True)
class Expansion:
    """A product that waits for its reader.

    Attributes:
        nodes: the nodes that it computes.
        z: its activations.
        weight: [rows, columns].
        bias: one value per row.
        region: the element-wise nodes behind it, without operands.
    """

    nodes: tuple[ir.Node, ...]
    z: Stored
    weight: np.ndarray
    bias: np.ndarray
    region: Region

    @property
    def macs(self) -> int:
        return int(self.weight.size * self.z.fm.images * self.z.fm.points)

    @property
    def density(self) -> float:
        return float(np.count_nonzero(self.weight)) / max(1, self.weight.size)

    def kernel(self, lanes: int) -> Expand:
        return Expand(self.z.fm.block // lanes, self.region.tree if self.region.nodes else None)

    def args(self, b: Builder) -> list[Arg]:
        """Arguments of the kernel, from `z` to `expand_bias`."""
        name, fm = self.nodes[0].name or name_of(self.nodes[0].outputs[0]), self.z.fm
        rows = compressed_rows.pack(self.weight, np.int32)
        return [
            self.z.address, fm.image, fm.tile, fm.tiles,
            b.weight(f"{name}.starts", rows.starts),
            b.weight(f"{name}.columns", rows.columns * np.int32(fm.row)),
            b.weight(f"{name}.values", rows.values),
            b.weight(f"{name}.bias", self.bias),
        ]  # fmt: skip

    def describe(self, b: Builder) -> None:
        """Note the layer for the report; the estimate is that of a product of its own."""
        fm = self.z.fm
        y = planar(fm.images, len(self.weight), fm.points, fm.axis, b.target)
        layer = problem.of(problem.Operands(self.weight, fm, y, None), b.target)
        choice = replace(choose(layer, b.target), weight="csr" if self.density < 1 else "dense")
        b.describe(self.nodes[0], self.weight.shape, self.density, choice, self.macs)


def wait(
    b: Builder, nodes: list[ir.Node], x: Stored, weight: np.ndarray, bias: np.ndarray | None,
    region: Region, window: Window | None, make: Callable[[], None],
) -> bool:  # fmt: skip
    """Put the product off until the depthwise convolution behind it is lowered, if that pays.

    `make` computes the product on its own; it is called if somebody else asks for the result.
    """
    if window is None or not window.is_pointwise or region.operands:
        return False
    if not _feeds_depthwise(region.result) or np.count_nonzero(weight) > _MOST * len(weight):
        return False
    flat = weight.reshape(len(weight), -1)
    full = np.zeros(len(weight), np.float32) if bias is None else bias.astype(np.float32)
    b.expansions[name_of(region.result)] = Expansion(tuple(nodes), x, flat, full, region)
    b.defer(region.result, make)
    b.done.update(nodes)
    return True


def _feeds_depthwise(value: ir.Value) -> bool:
    """True if one depthwise convolution, and nothing else, reads the value."""
    if value.is_graph_output() or len(value.consumers()) != 1:
        return False
    node = value.consumers()[0]
    if node.op_type != "Conv" or node.inputs[0] is not value:
        return False
    weight, x = static_shape(node.inputs[1]), static_shape(value)
    if weight is None or x is None or len(x) not in (3, 4):
        return False
    return weight[1] == 1 and weight[0] == x[1] == int_attribute(node, "group", 1) > 1
