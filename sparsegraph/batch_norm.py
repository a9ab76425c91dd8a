"""Let batch norms know what pruning did to their inputs: new means and variances, no training.

Statistics are taken anew from calibration data (Li et al. 2020, EagleEye, arXiv:2007.02491), but
so that every channel leaves with the mean and variance that it has in the dense model on the same
feeds. So few feeds do no harm, and a model that was not pruned stays as it is. Worth it where
variances collapse over many layers; a shallow net that is judged by squared error may lose by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from sparsegraph.calibrate import Feed, Moments, Rows, Stream

Array = np.ndarray[Any, Any]

_MEAN, _VARIANCE = 3, 4
_MOST_RATIO = 16.0  # of variances: beyond it, a channel that hardly varied says nothing


def reestimate(original: ir.Model, pruned: ir.Model, feeds: Sequence[Feed]) -> int:
    """Correct every batch norm of `pruned` in place, in execution order; returns how many.

    The two models must be node by node alike. A batch norm whose statistics are computed, or shared
    with another node, is left alone.
    """
    then, now = Stream(original, feeds), Stream(pruned, feeds)
    n = 0
    for dense, node in zip(original.graph, pruned.graph, strict=True):
        if not _is_settled(node):
            continue
        before, after = _moments(then, dense.inputs[0]), _moments(now, node.inputs[0])
        ratio = _ratio(_variance(after), _variance(before))
        mean, variance = _array(node, _MEAN), _array(node, _VARIANCE)
        epsilon = node.attributes.get_float("epsilon", 1e-5)
        _store(node, _MEAN, after.mean[0] - (before.mean[0] - mean) * np.sqrt(ratio))
        _store(node, _VARIANCE, np.maximum((variance + epsilon) * ratio - epsilon, 0.0))
        n += 1
    return n


def _is_settled(node: ir.Node) -> bool:
    if node.op_type != "BatchNormalization" or node.attributes.get_int("training_mode", 0) != 0:
        return False
    values = [node.inputs[at] for at in (_MEAN, _VARIANCE)]
    return all(v is not None and v.const_value is not None and len(v.uses()) == 1 for v in values)


def _moments(stream: Stream, value: ir.Value | None) -> Moments:
    """Per channel, over all feeds and positions."""
    assert value is not None
    stream.advance(value)
    found = Moments()
    for feed in range(len(stream)):
        found.add(Rows(feature_axis=1).of(stream.value(feed, value)))
    return found


def _variance(moments: Moments) -> Array:
    return np.asarray(np.maximum(np.square(moments.norm[0]) - np.square(moments.mean[0]), 0.0))


def _ratio(after: Array, before: Array) -> Array:
    ratio = np.divide(after, before, out=np.ones_like(after), where=before > 0)
    return np.asarray(np.clip(ratio, 1 / _MOST_RATIO, _MOST_RATIO))


def _array(node: ir.Node, at: int) -> Array:
    value = node.inputs[at]
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy().astype(np.float64)


def _store(node: ir.Node, at: int, array: Array) -> None:
    value = node.inputs[at]
    assert value is not None
    assert value.const_value is not None
    dtype = value.const_value.numpy().dtype
    value.const_value = ir.tensor(array.astype(dtype), name=value.name)
