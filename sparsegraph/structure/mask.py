"""The masked model: removed positions are zero wherever a sum reads them. What a cut must equal."""

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sparsegraph.graph import FLOAT_DTYPES, all_names, constant, is_constant
from sparsegraph.rewrite import Builder
from sparsegraph.structure.ties import Analysis, Sink, shape_of


def apply(analysis: Analysis, gone: NDArray[np.bool_]) -> None:
    """Multiply every summed operand of the analysed graph by a mask of what stays."""
    graph = analysis.graph
    build = Builder(graph, all_names(graph), "mask")
    for sink in analysis.ties.sinks:
        dead = gone[analysis.roots[sink.labels]]
        if dead.any():
            _mask(graph, build, sink, ~dead)
    for value in build.constants:
        graph.register_initializer(value)
    graph.sort()


def _mask(graph: ir.Graph, build: Builder, sink: Sink, keep: NDArray[np.bool_]) -> None:
    value = sink.node.inputs[sink.at]
    assert value is not None
    assert value.dtype in FLOAT_DTYPES, f"{value.name} is summed and no float"
    shape = [1] * len(shape_of(value))
    shape[sink.axis] = len(keep)
    mask = keep.astype(value.dtype.numpy()).reshape(shape)
    if is_constant(value):
        array = constant(value)
        assert array is not None
        masked = build.constant(array * mask, f"{value.name}_masked", value)
    else:
        masked = build.op("Mul", [value, build.constant(mask, f"{value.name}_mask")], like=value)
        graph.insert_before(sink.node, build.nodes[-1])
    sink.node.replace_input_with(sink.at, masked)
