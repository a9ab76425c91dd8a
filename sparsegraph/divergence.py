"""How far a model's outputs are from another's: the quality metric that needs no labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from sparsegraph.calibrate import session_of

Array = np.ndarray[Any, Any]
Feed = Mapping[str, Array]


class Divergence:
    """Mean squared change of the outputs over their variance, averaged over outputs.

    0 for the same model, 1 for one that always says the mean. The reference runs once, when this is
    made; its floating-point outputs are held in memory.
    """

    def __init__(self, model: ir.Model, feeds: Sequence[Feed]) -> None:
        self._feeds = feeds
        self._reference = _outputs(model, feeds)
        self._spread = [_spread(arrays) for arrays in self._reference]

    def __call__(self, model: ir.Model) -> float:
        """The divergence of `model`, which takes the same feeds; infinite for NaN."""
        shares = [
            sum(float(np.square(x - y, dtype=np.float64).sum()) for x, y in zip(now, then)) / spread
            for now, then, spread in zip(
                _outputs(model, self._feeds), self._reference, self._spread
            )
            if spread > 0
        ]
        found = float(np.mean(shares)) if shares else 0.0
        return found if np.isfinite(found) else float("inf")


def _outputs(model: ir.Model, feeds: Sequence[Feed]) -> list[list[Array]]:
    """Floating-point outputs, one list of arrays over the feeds for each."""
    with session_of(model) as session:
        runs = [session.run(None, dict(feed)) for feed in feeds]
    found = [list(arrays) for arrays in zip(*runs)]
    return [arrays for arrays in found if arrays[0].dtype.kind == "f"]


def _spread(arrays: Sequence[Array]) -> float:
    """Sum of squares around the mean over feeds, or around the mean of all values for one feed."""
    same = len({a.shape for a in arrays}) == 1 and len(arrays) > 1
    if same:
        stacked = np.stack(arrays).astype(np.float64)
        return float(np.square(stacked - stacked.mean(axis=0)).sum())
    flat = np.concatenate([a.ravel() for a in arrays]).astype(np.float64)
    return float(np.square(flat - flat.mean()).sum())
