"""Lowering as a table: ONNX operator -> function that appends kernel calls."""

from collections.abc import Callable

import onnx_ir as ir

from sparsegraph.lower.attention import lower_attention
from sparsegraph.lower.builder import Builder
from sparsegraph.lower.elementwise import lower_elementwise
from sparsegraph.lower.group_norm import lower_group_norm
from sparsegraph.lower.movement import (
    lower_concat,
    lower_depth_space,
    lower_expand,
    lower_gather,
    lower_gather_elements,
    lower_pad,
    lower_slice,
    lower_split,
    lower_tile,
)
from sparsegraph.lower.normalize import lower_norm
from sparsegraph.lower.pooling import lower_global_pool, lower_pool, lower_spatial_reduce
from sparsegraph.lower.products import lower_conv, lower_gemm, lower_matmul
from sparsegraph.lower.recurrent import lower_recurrent
from sparsegraph.lower.reduce import lower_arg, lower_reduce, lower_softmax
from sparsegraph.lower.regions import ELEMENTWISE
from sparsegraph.lower.resize import lower_resize
from sparsegraph.lower.sample import lower_grid_sample
from sparsegraph.lower.scan import lower_cumsum, lower_top_k
from sparsegraph.lower.scatter import lower_scatter, lower_scatter_elements
from sparsegraph.lower.transposed import lower_conv_transpose, lower_depth_to_space
from sparsegraph.lower.views import lower_reshape, lower_transpose
from sparsegraph.targets.kernels.reduce import REDUCTIONS

HANDLERS: dict[str, Callable[[Builder, ir.Node], None]] = {
    "MatMul": lower_matmul,
    "Gemm": lower_gemm,
    "Conv": lower_conv,
    "Attention": lower_attention,
    "LayerNormalization": lower_norm,
    "RMSNormalization": lower_norm,
    "InstanceNormalization": lower_group_norm,
    "GroupNormalization": lower_group_norm,
    "LSTM": lower_recurrent,
    "GRU": lower_recurrent,
    "Softmax": lower_softmax,
    "LogSoftmax": lower_softmax,
    "ArgMax": lower_arg,
    "ArgMin": lower_arg,
    **{f"Reduce{op}": lower_reduce for op in REDUCTIONS},
    **{f"Reduce{op}": lower_spatial_reduce for op in ("Mean", "Sum", "Max", "Min")},
    "CumSum": lower_cumsum,
    "TopK": lower_top_k,
    "MaxPool": lower_pool,
    "AveragePool": lower_pool,
    "GlobalAveragePool": lower_global_pool,
    "GlobalMaxPool": lower_global_pool,
    "Resize": lower_resize,
    "Upsample": lower_resize,
    "ConvTranspose": lower_conv_transpose,
    "Reshape": lower_reshape,
    "Flatten": lower_reshape,
    "Squeeze": lower_reshape,
    "Unsqueeze": lower_reshape,
    "Identity": lower_reshape,
    "Transpose": lower_transpose,
    "Slice": lower_slice,
    "Split": lower_split,
    "Concat": lower_concat,
    "Gather": lower_gather,
    "GatherElements": lower_gather_elements,
    "GridSample": lower_grid_sample,
    "ScatterND": lower_scatter,
    "ScatterElements": lower_scatter_elements,
    "Pad": lower_pad,
    "Expand": lower_expand,
    "Tile": lower_tile,
    "DepthToSpace": lower_depth_to_space,
    "SpaceToDepth": lower_depth_space,
    **{op: lower_elementwise for op in sorted(ELEMENTWISE)},
}
