"""Every operator that the structure analysis understands: a new one is one entry here."""

from sparsegraph.structure import attention as at
from sparsegraph.structure import movement as mv
from sparsegraph.structure import pointwise as pw
from sparsegraph.structure import pooling as pool
from sparsegraph.structure import products as pr
from sparsegraph.structure import recurrent as rec
from sparsegraph.structure import reshape as rs
from sparsegraph.structure.rule import Rule

_POINTWISE = Rule(pw.tie_pointwise, pw.known_pointwise)
_OVER_AXIS = Rule(pw.tie_over_axis)
_CONV = Rule(
    pr.tie_conv, pr.known_conv, pr.cut_conv, pr.silent_conv, pr.fold_conv, pr.shelf_conv
)  # fmt: skip
_POOL = Rule(pool.tie_map, pool.known_pool)
_REDUCE = Rule(pool.tie_reduce, pool.known_reduce, pool.cut_reduce)
_FEATURE_NORM = Rule(pw.tie_feature_norm, pw.known_feature_norm, pw.cut_feature_norm)
_RECURRENT = Rule(
    rec.tie_recurrent, rec.known_recurrent, rec.cut_recurrent, rec.silent_recurrent,
    shelf=rec.shelf_recurrent,
)  # fmt: skip
_VIEW = Rule(rs.tie_reshape, rs.known_reshape)
_CHANNEL_SCALE = pw.known_channel_scale

_POINTWISE_OPS = (
    "Abs", "Acos", "Acosh", "Add", "And", "Asin", "Asinh", "Atan", "Atanh", "BitShift",
    "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "Cast", "CastLike", "Ceil", "Celu",
    "Clip", "Cos", "Cosh", "Div", "Dropout", "Elu", "Equal", "Erf", "Exp", "Floor", "Gelu",
    "Greater", "GreaterOrEqual", "HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN",
    "LeakyRelu", "Less", "LessOrEqual", "Log", "Max", "Mean", "Min", "Mish", "Mod", "Mul",
    "Neg", "Not", "Or", "PRelu", "Pow", "Reciprocal", "Relu", "Round", "Selu", "Shrink",
    "Sigmoid", "Sign", "Sin", "Sinh", "Softplus", "Softsign", "Sqrt", "Sub", "Sum", "Swish",
    "Tan", "Tanh", "ThresholdedRelu", "Where", "Xor",
)  # fmt: skip

TABLE: dict[str, Rule] = {
    **dict.fromkeys(_POINTWISE_OPS, _POINTWISE),
    "Conv": _CONV,
    "ConvTranspose": _CONV,
    "MatMul": Rule(pr.tie_matmul, pr.known_matmul, None, pr.silent_product, pr.fold_product),
    "Gemm": Rule(pr.tie_gemm, pr.known_gemm, None, pr.silent_product, pr.fold_product),
    "Einsum": Rule(pr.tie_einsum),
    "BatchNormalization": Rule(pw.tie_channel_norm, pw.known_batch_norm),
    "InstanceNormalization": Rule(pw.tie_channel_norm, _CHANNEL_SCALE),
    "GroupNormalization": Rule(pw.tie_group_norm, _CHANNEL_SCALE, pw.cut_group_norm),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), _FEATURE_NORM),
    **dict.fromkeys(
        ("Softmax", "LogSoftmax", "Hardmax", "LpNormalization", "LRN", "CumSum", "TopK"),
        _OVER_AXIS,
    ),
    "Transpose": Rule(mv.tie_transpose, mv.known_transpose),
    "Concat": Rule(mv.tie_concat, mv.known_concat),
    "Split": Rule(mv.tie_split, mv.known_split, mv.cut_split),
    "Slice": Rule(mv.tie_slice, mv.known_slice, mv.cut_slice),
    "Gather": Rule(mv.tie_gather, mv.known_gather, mv.cut_gather),
    "Pad": Rule(mv.tie_pad, mv.known_pad, mv.cut_pad),
    "Expand": Rule(mv.tie_expand, mv.known_expand, mv.cut_expand),
    "Tile": Rule(mv.tie_tile, mv.known_tile),
    "Reshape": Rule(rs.tie_reshape, rs.known_reshape, mv.cut_reshape),
    **dict.fromkeys(("Flatten", "Squeeze", "Unsqueeze"), _VIEW),
    **dict.fromkeys(
        ("AveragePool", "MaxPool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"),
        _POOL,
    ),
    "Resize": Rule(pool.tie_resize, pool.known_resize, pool.cut_resize),
    **dict.fromkeys(
        (
            "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2",
            "ReduceSumSquare", "ReduceProd", "ReduceLogSum", "ReduceLogSumExp",
        ),
        _REDUCE,
    ),
    "DepthToSpace": Rule(pool.tie_depth_to_space, pool.known_depth_to_space),
    "SpaceToDepth": Rule(pool.tie_space_to_depth, pool.known_space_to_depth),
    "Attention": Rule(at.tie_attention, at.known_attention, at.cut_attention),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), _RECURRENT),
}  # fmt: skip
