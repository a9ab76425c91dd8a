"""Depthwise convolution, pooling, resize."""

import numpy as np
import onnx_ir as ir

from sparsegraph.lower.builder import Builder, Declined


def lower_depthwise(
    b: Builder,
    node: ir.Node,
    x: ir.Value,
    weight: np.ndarray,
    bias: np.ndarray | None,
    window: object,
) -> None:
    raise Declined("depthwise not yet")
