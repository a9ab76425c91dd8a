"""Models of half precision compute in float32; weights go back to halves where a model stays ONNX.

So does ONNX Runtime on CPUs; see the pass `widen_half`. bfloat16, which ONNX Runtime cannot run, is
float32 from `capture` on.
"""

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from sparsegraph.errors import SparsegraphError, one_line
from sparsegraph.graph import constant, is_random
from sparsegraph.passes.expand_contrib import ExpandContrib
from sparsegraph.passes.widen_half import WidenHalf, halves
from sparsegraph.pipeline import Judge, Optimized, run_pass
from sparsegraph.rewrite import Decline, Fuel
from sparsegraph.verify import TOLERANCE_HALF, Session, compare, feeds_for

_LARGEST = 65504.0  # in float16


def widened(model: ir.Model, *, verify: bool = True) -> Optimized:
    """The model that kernels compute: float32 inside, where it has float16.

    Proved against the model where that gives finite numbers; what follows is proved against the
    result. A model that moves by more than fp16 rounds stays as it is, with the reason.
    """
    if not halves(model.graph, ir.DataType.FLOAT16):
        return Optimized(model, ())
    wide, record = run_pass(WidenHalf(), model, Fuel())
    if not record.n_applied:
        return Optimized(model, (record,) if record.declined else ())
    if verify:
        reason, error = _move(wide, model)
        record = replace(record, max_rel_error=error)
        if reason:
            record = replace(record, n_applied=0, declined=(Decline("the model", reason),))
            return Optimized(model, (record,))
    plain, expanded = run_pass(ExpandContrib(), wide, Fuel(), Judge(wide) if verify else None)
    return Optimized(plain, (record, expanded) if expanded.n_applied else (record,))


def _move(wide: ir.Model, model: ir.Model) -> tuple[str, float | None]:
    """Why `wide` cannot take the place of a model in float16, if so, and how far outputs move."""
    if any(is_random(node) for node in model.graph.all_nodes()):
        return "", None
    worst = 0.0
    try:
        one, other = Session(wide), Session(model)
        for feed in feeds_for(model):
            found = one.run(feed)
            for name, want in other.run(feed).items():
                worst = max(worst, _distance(found[name], want))
    except SparsegraphError as error:
        return one_line(error), None
    if not worst <= TOLERANCE_HALF:
        moved = f"move by {worst:.0e}" if np.isfinite(worst) else "are others"
        return f"in float32 outputs {moved}, allowed is {TOLERANCE_HALF:.0e}", None
    return "", worst


def _distance(found: np.ndarray, want: np.ndarray) -> float:
    """As `compare`, where `want` is finite: float16 overflows earlier."""
    if found.shape != want.shape or want.dtype.kind != "f":
        return compare(found, want)
    finite = np.isfinite(want)
    return compare(found[finite], want[finite])


def narrowed(wide: ir.Model, like: ir.Model) -> ir.Model:
    """The model `like`, of half precision, with the constants of `wide`, which was made of it.

    Zeros stay zeros, other weights are rounded. Constants that `wide` has in addition (corrected
    biases) are added; where their node is not one of `like`'s, `wide` itself is the result.
    """
    copy = like.clone()
    known, nodes = copy.graph.initializers, {node.name: node for node in copy.graph}
    for name, held in known.items():
        old, new = constant(held), constant(wide.graph.initializers.get(name))
        if old is not None and new is not None and old.dtype.kind == "f":
            held.const_value = ir.tensor(_rounded(new, old.dtype), name=name)
    for node in wide.graph:
        for at, value in enumerate(node.inputs):
            array = None if value is None else constant(value)
            if value is None or array is None or value.name in like.graph.initializers:
                continue
            twin = nodes.get(node.name)
            if twin is None or twin.outputs[0].dtype is None:
                return wide
            if value.name not in known:
                tensor = ir.tensor(_rounded(array, twin.outputs[0].dtype.numpy()), name=value.name)
                copy.graph.register_initializer(ir.val(str(value.name), const_value=tensor))
            fresh = known[str(value.name)]
            twin.resize_inputs(max(at + 1, len(twin.inputs)))
            twin.replace_input_with(at, fresh)
    return copy


def _rounded(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if dtype == np.float16:
        array = np.clip(array, -_LARGEST, _LARGEST)
    return array.astype(dtype)
