"""A cut model against the masked one: in float32, and where rounding is coarse in float64 too.

Behind a Softmax over logits of thousands float32 itself moves outputs by 1e-3, and the bound on the
distance is wider there. How far the models then are from each other in float64 says what the bound
cannot: the surgery changes nothing (1e-12), or it does.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from sparsegraph import pipeline
from sparsegraph.errors import VerifyError, message
from sparsegraph.graph import opset
from sparsegraph.sigmoid import disagreement
from sparsegraph.verify import TOLERANCE, Feed, Outputs, Session, compare, feeds_for, tolerance

EXACT = 1e-5
"""Largest distance in float64. Rounding gives 1e-12 where it gives 1e-3 in float32; a constant that
is folded is rounded to float32 once, which gives 1e-6 there: `FOLDED` is for what folds some."""
FOLDED = TOLERANCE


@dataclass(frozen=True)
class Distance:
    """Of a cut model from the masked one, max|a-b| / max|b| of the worst feed."""

    error: float
    exact: float | None = None
    """In float64, of the feeds where `error` is above the tolerance; None where none is."""

    def worst(self, other: Distance) -> Distance:
        """The larger of each."""
        exact = [one for one in (self.exact, other.exact) if one is not None]
        return Distance(max(self.error, other.error), max(exact, default=None))

    def __str__(self) -> str:
        text = f"{self.error:.0e} from the masked model"
        if self.exact is None:
            return text
        return f"{text} in float32, which rounds this one so coarsely; {self.exact:.0e} in float64"


def prove(smaller: ir.Model, masked: ir.Model, base: ir.Model, limit: float = EXACT) -> Distance:
    """The largest distance on two feeds of `base`, in float64 at most `limit`.

    Raises:
        VerifyError: it is beyond what rounding does to the masked model.
    """
    one, other = Session(smaller), Session(masked)
    worst = Distance(0.0)
    for feed in feeds_for(base, 2):
        want = other.run(feed)
        bound = pipeline.error_bound(other, feed, want)
        error = disagreement(feed, bound, smaller, masked, compare(one.run(feed), want))
        exact = None
        if error > tolerance(want):
            exact = _in_float64(smaller, masked, feed, want, error)
        if exact is None:
            _check(base, "", error, bound)
        else:
            _check(base, " in float64", exact, limit)
        worst = worst.worst(Distance(error, exact))
    return worst


def _in_float64(
    smaller: ir.Model, masked: ir.Model, feed: Feed, want: Outputs, error: float
) -> float | None:
    """The distance; None where rounding does not explain that in float32, or none can be told."""
    from sparsegraph import double

    look = double.look(smaller, masked, feed, want)
    return look.exact if look is not None and look.explains(error) else None


def _check(base: ir.Model, how: str, error: float, bound: float) -> None:
    if not error <= bound:
        found, need = f"outputs off by {error:.1e}{how}", f"at most {bound:.1e}, what rounding does"
        name = base.graph.name or f"opset {opset(base)}"
        fix = "report it; until it is mended, leave groups whole that the masked model needs"
        raise VerifyError(message("shrunk model", name, found, need, fix))
