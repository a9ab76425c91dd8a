"""Every criterion by name, with what it needs and whether it moves the weights that stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sparsegraph.criteria import (
    admm,
    fisher,
    lasso,
    magnitude,
    projected,
    random,
    relevance,
    sparsegpt,
    spectrum,
    taylor,
    wanda,
)
from sparsegraph.criteria.known import Array, Known
from sparsegraph.criteria.structure import Structure

NOTHING, NORMS, SECOND_MOMENTS = "nothing", "norms", "second moments"
GRADIENTS, SENSITIVITY = "gradients", "gradients or probes"
Prune = Callable[[Array, Known, Structure, Array | None], Array]


@dataclass(frozen=True)
class Criterion:
    """`prune(w [out, columns], known, structure, frozen)` returns w with exact zeros.

    `needs` names the statistics that it reads; `per_row`: a share is counted in every row alone.
    """

    prune: Prune
    needs: str = NOTHING
    per_row: bool = False

    @property
    def moves_weights(self) -> bool:
        """Whether kept weights aim at an output, so that another target than W makes sense."""
        return self.needs == SECOND_MOMENTS


CRITERIA: dict[str, Criterion] = {
    "random": Criterion(random.prune),
    "magnitude": Criterion(magnitude.prune),
    "wanda": Criterion(wanda.prune, NORMS, per_row=True),
    "sparsegpt": Criterion(sparsegpt.prune, SECOND_MOMENTS, per_row=True),
    "admm": Criterion(admm.prune, SECOND_MOMENTS, per_row=True),
    "projected": Criterion(projected.prune, SECOND_MOMENTS, per_row=True),
    "lasso": Criterion(lasso.prune, SECOND_MOMENTS, per_row=True),
    "spectrum": Criterion(spectrum.prune),
    "taylor": Criterion(taylor.prune, GRADIENTS),
    "fisher": Criterion(fisher.prune, SENSITIVITY),
    "relevance": Criterion(relevance.prune, GRADIENTS),
}
