"""PyTorch operators that its exporter refuses, or gets wrong, in terms of others.

Written against torch 2.13: products along an axis find no function, bags of an embedding become a
loop that ONNX's checker refuses, and `scatter_reduce` has no mean and never leaves its input out.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

_ATEN = torch.ops.aten
_SUM, _MEAN, _MAX = range(3)  # modes of a bag


def decomposed(program: Any) -> Any:
    """The program, or another without the operators of `TABLE` if it has any."""
    parts = (m for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule))
    used = {node.target for part in parts for node in part.graph.nodes}
    table = {operator: rule for operator, rule in TABLE.items() if operator in used}
    return program.run_decompositions(table) if table else program


def _cumprod(x: Any, dim: int, *, dtype: Any = None) -> Any:
    """Products of twice as many neighbours in each step (Hillis and Steele, 1986)."""
    if dtype is None and not (x.dtype.is_floating_point or x.dtype.is_complex):
        dtype = torch.int64
    x = x if dtype is None else x.to(dtype)
    size = x.shape[dim] if x.dim() else 1
    shift = 1
    while shift < size:
        first, rest = x.narrow(dim, 0, shift), x.narrow(dim, shift, size - shift)
        x = torch.cat([first, rest * x.narrow(dim, 0, size - shift)], dim)
        shift *= 2
    return x


def _embedding_bag(
    weight: Any, indices: Any, offsets: Any, scale_grad_by_freq: bool = False, mode: int = _SUM,
    sparse: bool = False, per_sample_weights: Any = None, include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:  # fmt: skip
    """Rows of the table, joined bag by bag; an empty bag is zero. What else it returns is not read.

    Positions belong to the last bag that begins at or before them.
    """
    n_bags = offsets.shape[0] - int(include_last_offset)
    rows = weight[indices]
    if per_sample_weights is not None:
        rows = rows * per_sample_weights[:, None]
    kept = torch.ones_like(indices, dtype=weight.dtype)
    if padding_idx is not None:
        kept = (indices != padding_idx).to(weight.dtype)
        lost = kept[:, None] == 0
        rows = torch.where(lost, -math.inf, rows) if mode == _MAX else rows * kept[:, None]
    position = torch.arange(indices.shape[0], device=indices.device)
    bag = (position[:, None] >= offsets[None, :n_bags]).sum(1) - 1
    start = weight.new_zeros(n_bags, weight.shape[1])
    if mode == _MAX:
        index = bag[:, None].expand(-1, weight.shape[1])
        y = (start - math.inf).scatter_reduce(0, index, rows, "amax")
        y = torch.where(y == -math.inf, 0.0, y)
    else:
        y = start.index_add(0, bag, rows)
        if mode == _MEAN:
            counts = weight.new_zeros(n_bags).index_add(0, bag, kept)
            y = y / counts.clamp(min=1)[:, None]
    unread = offsets.new_zeros(n_bags)
    return y, unread, unread, unread


def _scatter_reduce(
    x: Any, dim: int, index: Any, src: Any, reduce: str, *, include_self: bool = True
) -> Any:
    """Neutral values where something arrives, or a mean as sum over count."""
    if reduce == "mean" and not x.dtype.is_floating_point:
        return NotImplemented
    if reduce != "mean" and include_self:
        return NotImplemented
    if not include_self:
        x = x.scatter(dim, index, _neutral(reduce, x.dtype))
    if reduce != "mean":
        return x.scatter_reduce(dim, index, src, reduce)
    counts = torch.ones_like(x)
    if not include_self:
        counts = counts.scatter(dim, index, 0.0)
    counts = counts.scatter_add(dim, index, torch.ones_like(src))
    return x.scatter_add(dim, index, src) / counts


def _neutral(reduce: str, dtype: Any) -> float:
    """What changes nothing that it is joined with."""
    if reduce in ("amax", "amin"):
        is_float = dtype.is_floating_point
        ends = (
            (-math.inf, math.inf) if is_float else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
        )
        return ends[reduce == "amin"]
    return 1 if reduce == "prod" else 0


TABLE: dict[Any, Callable[..., Any]] = {
    _ATEN.cumprod.default: _cumprod,
    _ATEN.embedding_bag.padding_idx: _embedding_bag,
    _ATEN.scatter_reduce.two: _scatter_reduce,
}
