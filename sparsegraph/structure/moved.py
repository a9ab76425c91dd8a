"""How far a cut moves the outputs of a model: the norm of the difference over the norm."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from sparsegraph.verify import Feed, Session, feeds_for

_N_FEEDS = 4


class Moved:
    """Distance of any model from `base` on calibration feeds, or on two random ones without."""

    def __init__(self, base: ir.Model, calibration: Sequence[Feed]) -> None:
        self.feeds = list(calibration[:_N_FEEDS]) or feeds_for(base, 4)[1::2]
        session = Session(base)
        self.wanted = [session.run(feed) for feed in self.feeds]

    def __call__(self, model: ir.Model) -> float:
        """0 for equal outputs, 1 for outputs of nothing."""
        session = Session(model)
        off, whole = 0.0, 0.0
        for feed, want in zip(self.feeds, self.wanted, strict=True):
            got = session.run(feed)
            for name, value in want.items():
                if value.dtype.kind == "f":
                    exact = value.astype(np.float64)
                    off += float(np.square(got[name] - exact).sum())
                    whole += float(np.square(exact).sum())
        return float(np.sqrt(off / whole)) if whole else off
