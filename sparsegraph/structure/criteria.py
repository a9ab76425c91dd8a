"""Scores of removable units: the smaller, the sooner a unit goes. A new criterion is one entry."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sparsegraph.errors import UsageError, message
from sparsegraph.graph import constant, is_constant, is_op
from sparsegraph.structure.ties import Analysis
from sparsegraph.verify import Feed, Session, tapped

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Evidence:
    """What a criterion may look at: the analysed model and calibration feeds."""

    model: ir.Model
    analysis: Analysis
    feeds: Sequence[Feed] = field(default_factory=tuple)


Criterion = Callable[[Evidence], Scores]


def norm(seen: Evidence) -> Scores:
    """Euclidean norm of all weights of the unit, in matrices and convolutions (not vectors)."""
    total = np.zeros(seen.analysis.ties.forest.n)
    for (node, at), axes in seen.analysis.ties.constants.items():
        array = constant(node.inputs[at])
        if array is None or array.ndim < 2 or array.dtype.kind != "f":
            continue
        for number, axis in enumerate(axes):
            if axis is not None:
                rows = np.moveaxis(array, number, 0).reshape(len(axis), -1)
                squares = np.einsum("ij,ij->i", rows, rows, dtype=np.float64)
                np.add.at(total, seen.analysis.roots[axis], squares)
    return np.sqrt(total)


def scale(seen: Evidence) -> Scores:
    """Largest magnitude of the unit's scales in batch norms; the norm where it passes none."""
    largest = np.full(seen.analysis.ties.forest.n, -1.0)
    for (node, at), axes in seen.analysis.ties.constants.items():
        array = constant(node.inputs[at])
        if at == 1 and is_op(node, "BatchNormalization") and axes[0] is not None:
            assert array is not None
            np.maximum.at(largest, seen.analysis.roots[axes[0]], np.abs(array.astype(np.float64)))
    return np.where(largest >= 0, largest, norm(seen))


def activation(seen: Evidence) -> Scores:
    """Root mean square of what the sums read, times the norm of the weights that it meets.

    The change of a sum's output when one input goes, for inputs of mean zero that are uncorrelated
    (the score of Sun et al. 2023, "A Simple and Effective Pruning Approach", summed over a unit).
    """
    if not seen.feeds:
        raise UsageError(message("criterion", "activation", "no calibration", "feeds", "give some"))
    analysis = seen.analysis
    sinks = [s for s in analysis.ties.sinks if not is_constant(s.node.inputs[s.at])]
    values = list(dict.fromkeys(v for s in sinks if (v := s.node.inputs[s.at]) is not None))
    names = [str(v.name) for v in values]
    with tapped(seen.model, values):
        session = Session(seen.model)
        runs = [session.run(feed, names) for feed in seen.feeds]
    total = np.zeros(analysis.ties.forest.n)
    for sink in sinks:
        name = str(sink.node.inputs[sink.at].name)  # type: ignore[union-attr]
        rows = [np.moveaxis(run[name].astype(np.float64), sink.axis, 0) for run in runs]
        energy = np.mean([(r.reshape(len(r), -1) ** 2).mean(axis=1) for r in rows], axis=0)
        np.add.at(total, analysis.roots[sink.labels], energy * _weight_energy(analysis, sink.node))
    return np.sqrt(total)


def _weight_energy(analysis: Analysis, node: ir.Node) -> Scores | float:
    """Squares of the weight per summed position; one where the other operand is computed."""
    axes = analysis.ties.constants.get((node, 1))
    array = constant(node.inputs[1])
    at = {"MatMul": -2, "Conv": 1, "ConvTranspose": 0}.get(node.op_type)
    if node.op_type == "Gemm":
        at = 1 if node.attributes.get_int("transB", 0) else 0
    if array is None or axes is None or at is None or array.ndim < 2:
        return 1.0
    if node.op_type in ("Conv", "ConvTranspose") and node.attributes.get_int("group", 1) > 1:
        return 1.0
    rows = np.moveaxis(array, at, 0).reshape(array.shape[at], -1)
    energy: Scores = np.einsum("ij,ij->i", rows, rows, dtype=np.float64)
    return energy


def prefix(seen: Evidence) -> Scores:
    """The first units stay: for networks trained so that a prefix works alone."""
    return -np.arange(seen.analysis.ties.forest.n, dtype=np.float64)


CRITERIA: dict[str, Criterion] = {
    "norm": norm,
    "scale": scale,
    "activation": activation,
    "prefix": prefix,
}


def criterion(name: str) -> Criterion:
    """A criterion by name. Raises UsageError for an unknown one."""
    if name not in CRITERIA:
        need = ", ".join(CRITERIA)
        raise UsageError(message("criterion", name, "no such criterion", need, "use one of these"))
    return CRITERIA[name]
