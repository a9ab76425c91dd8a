"""Lowering as a table: ONNX operator -> function that appends kernel calls."""

from collections.abc import Callable

import onnx_ir as ir

from sparsegraph.lower.attention import lower_attention
from sparsegraph.lower.builder import Builder
from sparsegraph.lower.elementwise import lower_elementwise
from sparsegraph.lower.normalize import lower_norm
from sparsegraph.lower.products import lower_conv, lower_gemm, lower_matmul
from sparsegraph.lower.regions import ELEMENTWISE
from sparsegraph.lower.views import lower_reshape, lower_transpose

HANDLERS: dict[str, Callable[[Builder, ir.Node], None]] = {
    "MatMul": lower_matmul,
    "Gemm": lower_gemm,
    "Conv": lower_conv,
    "Attention": lower_attention,
    "LayerNormalization": lower_norm,
    "RMSNormalization": lower_norm,
    "Reshape": lower_reshape,
    "Flatten": lower_reshape,
    "Squeeze": lower_reshape,
    "Unsqueeze": lower_reshape,
    "Identity": lower_reshape,
    "Transpose": lower_transpose,
    **{op: lower_elementwise for op in sorted(ELEMENTWISE)},
}
