"""Remove channels, heads and hidden units on request: a smaller model of the same operators.

Every shrunk model is proved against the masked one (removed units zero wherever they are read), so
what remains to be judged is the choice of units, never the surgery.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sparsegraph import pipeline
from sparsegraph.errors import UsageError, VerifyError, message
from sparsegraph.graph import is_op
from sparsegraph.layers import weighted
from sparsegraph.passes.remove_dead_channels import RemoveDeadChannels
from sparsegraph.rewrite import Fuel
from sparsegraph.structure import cut, edges, mask
from sparsegraph.structure.balance import MULTIPLES, Search, Space, search
from sparsegraph.structure.criteria import Evidence, criterion
from sparsegraph.structure.cut import View
from sparsegraph.structure.edges import Gathered
from sparsegraph.structure.groups import Group, groups
from sparsegraph.structure.moved import Moved
from sparsegraph.structure.multiples import MEASURED, fastest
from sparsegraph.structure.proof import FOLDED, Distance, prove
from sparsegraph.structure.ties import Analysis, Policy, analyse
from sparsegraph.verify import Feed, Session, compare, feeds_for

Keep = float | Sequence[int]
Multiple = int | Literal["measured"]
_BAR = 20


@dataclass(frozen=True)
class Row:
    """One group before and after."""

    group: str
    n_before: int
    n_after: int
    n_operators: int

    @property
    def picture(self) -> str:
        """What stays, as a bar."""
        full = round(_BAR * self.n_after / self.n_before)
        return "█" * full + "·" * (_BAR - full)


@dataclass(frozen=True)
class Shrunk:
    """A smaller model. `proof`: against the masked model; `change`: against the given one."""

    model: ir.Model
    table: tuple[Row, ...]
    groups: tuple[Group, ...]
    parameters: tuple[int, int]
    macs: tuple[int, int]
    proof: Distance | None
    change: float
    multiple: int = 1
    multiples_ms: Mapping[int, float] = field(default_factory=dict)
    """ONNX Runtime's latency with counts at multiples of each of these, where it was measured."""
    searched: Search | None = None
    """The cuts of as many operations that were timed against the even one."""
    gathered: Gathered | None = None
    """Consumers that read only some of their input channels."""

    @property
    def error(self) -> float | None:
        """Distance from the masked model in float32; None where there is none to compare with."""
        return None if self.proof is None else self.proof.error

    def facts(self) -> dict[str, object]:
        """The numbers beside the table."""
        (weights, weights_left), (macs, macs_left) = self.parameters, self.macs
        return {
            "parameters_before": weights, "parameters_after": weights_left,
            "macs_before": macs, "macs_after": macs_left,
            "error_against_masked": self.error,
            "error_in_float64": None if self.proof is None else self.proof.exact,
            "change_of_outputs": self.change,
            "multiple": self.multiple, "multiples_ms": dict(self.multiples_ms),
            "balance": self._searched(),
            "inputs": [list(row) for row in self.gathered.rows] if self.gathered else [],
        }  # fmt: skip

    def _searched(self) -> list[dict[str, object]]:
        if self.searched is None:
            return []
        chosen = self.searched.chosen
        return [{**asdict(cut), "chosen": cut is chosen} for cut in self.searched.tried]

    def summary(self) -> str:
        """Two lines under the table."""
        (weights, weights_left), (macs, macs_left) = self.parameters, self.macs
        times = ", ".join(f"{n}: {ms:.3g} ms" for n, ms in self.multiples_ms.items())
        counts = f"\ncounts at multiples of {self.multiple} (measured: {times})" if times else ""
        if self.searched is not None:
            counts += f"\n{self.searched}"
        if self.gathered is not None:
            counts += f"\n{self.gathered}"
        proof = "not compared" if self.proof is None else self.proof
        return (
            f"{weights:,} -> {weights_left:,} parameters ({1 - weights_left / weights:.1%} gone), "
            f"{macs / 1e6:,.1f} -> {macs_left / 1e6:,.1f} million multiply-accumulates\n"
            f"outputs moved by {self.change:.1e} of their range; {proof}{counts}"
        )


@dataclass(frozen=True)
class Job:
    """An optimised model, its groups and the scores of its units."""

    base: ir.Model
    policy: Policy
    analysis: Analysis
    found: Sequence[Group]
    scores: NDArray[np.float64]

    def marks(self, keep: float | Mapping[str, Keep], multiple: int = 1) -> NDArray[np.bool_]:
        """What goes, by root."""
        shares = _shares(self.found, keep)
        gone = np.zeros(self.analysis.ties.forest.n, np.bool_)
        for group in self.found:
            gone[_chosen(group, shares.get(group.name, 1.0), self.scores, multiple)] = True
        return cut.fill_empty(self.analysis, gone)

    def cut(self, gone: NDArray[np.bool_]) -> tuple[ir.Model, dict[str, View]]:
        """The smaller model, and which of its constants are parts of the base's."""
        smaller = self.base.clone()
        return smaller, cut.apply(analyse(smaller, self.policy), gone)

    def proof(self, smaller: ir.Model, gone: NDArray[np.bool_]) -> Distance | None:
        """Distance from the masked model; None where there is none to compare with."""
        if _moves_statistics(self.analysis, gone):
            return None
        return _proof(self.base, smaller, self.policy, gone)


def prepare(model: ir.Model, policy: Policy, by: str, calibration: Sequence[Feed]) -> Job:
    """Optimise, analyse, score."""
    base = pipeline.optimize(model).model
    analysis = analyse(base, policy)
    scores = criterion(by)(Evidence(base, analysis, calibration))
    return Job(base, policy, analysis, groups(analysis), scores)


def shrink(
    model: ir.Model,
    keep: float | Mapping[str, Keep] = 0.5,
    by: str = "norm",
    *,
    calibration: Sequence[Feed] = (),
    multiple: Multiple = 1,
    grouped: Literal["whole", "within"] = "whole",
    through_norm: bool = False,
    carry_mean: bool = False,
    inputs: float | None = None,
    balance: bool = False,
) -> Shrunk:
    """Keep a share of the units of every group, those with the highest scores of criterion `by`.

    `keep` is a share in (0, 1], or per group name (see `Shrunk.groups`) a share or the indices of
    the units that stay; groups that are not named stay whole. Channel counts are rounded up to
    `multiple`; "measured" takes the largest that costs ONNX Runtime on this machine no time.
    `inputs` is the share of input channels, by weight norm, that every consumer keeps for itself;
    where others need the rest, a Gather leaves them out, if that is measured to be faster.
    `balance` may cut elsewhere at no more operations than the even cut: at multiples that ONNX
    Runtime likes (unless `multiple` names one), and fewer of the units that one operator reads in
    place of those that several read. It does where that is measured to be 5 % faster and the
    outputs, on `calibration` or random feeds, move no further; it needs one share for all.
    `through_norm` also cuts features that a norm runs over. In a mean of squares removed features
    count as zeros; a layer norm's mean and variance change, and then there is no masked model to
    compare with. `carry_mean` cuts them as well, but plain operators that count the removed
    features as zeros take the layer norm's place: exact, and slower per feature. The model is
    optimised first, which already removes what is dead. Raises UsageError for a wrong option and
    VerifyError when the shrunk model is not the masked one.
    """
    if multiple != MEASURED and multiple < 1:
        raise UsageError(message("option", "multiple", multiple, "at least 1", "leave it out"))
    if inputs is not None and not 0 < inputs <= 1:
        raise UsageError(message("option", "inputs", inputs, "above 0, at most 1", "give 0.5"))
    if through_norm and carry_mean:
        found_both, need_one = "with carry_mean", "one of the two"
        raise UsageError(message("option", "through_norm", found_both, need_one, "leave one out"))
    if balance and isinstance(keep, Mapping):
        found_keep, need_keep = "shares by group", "one share for all"
        raise UsageError(message("option", "balance", found_keep, need_keep, "give keep=0.5"))
    policy = Policy(grouped, through_norm, through_norm or carry_mean, carry_mean)
    job = prepare(model, policy, by, calibration)
    base, found = job.base, job.found
    times: dict[int, float] = {}
    if multiple == MEASURED:
        multiple, times = fastest(lambda n: job.cut(job.marks(keep, n))[0])
    searched = None
    if balance and not isinstance(keep, Mapping) and keep < 1:
        multiples = (1, *MULTIPLES) if multiple == 1 else (multiple,)
        space = Space(
            found, lambda k, n: job.cut(job.marks(k, n))[0], n_macs, Moved(base, calibration)
        )
        searched = search(space, keep, multiples)
    try:
        smaller, gone, proof = _proved(job, keep, multiple, searched)
    except VerifyError as refused:
        if searched is None or searched.chosen is searched.tried[0]:
            raise
        searched = replace(searched, chosen=searched.tried[0], refused=str(refused))
        smaller, gone, proof = _proved(job, keep, multiple, searched)
    gathered = None
    if inputs is not None:
        smaller, gathered, off = _choose_inputs(smaller, inputs)
        proof = None if proof is None else proof.worst(off)
    return Shrunk(
        smaller,
        tuple(_row(group, gone) for group in found),
        tuple(found),
        (n_parameters(base), n_parameters(smaller)),
        (n_macs(base), n_macs(smaller)),
        proof,
        _change(smaller, model),
        multiple if searched is None else searched.chosen.multiple,
        times,
        searched,
        gathered,
    )


def _proved(
    job: Job, keep: float | Mapping[str, Keep], multiple: int, searched: Search | None
) -> tuple[ir.Model, NDArray[np.bool_], Distance | None]:
    """The smaller model, what went, and the distance from the masked model."""
    if searched is not None:
        keep, multiple = searched.chosen.shares, searched.chosen.multiple
    gone = job.marks(keep, multiple)
    smaller, _ = job.cut(gone)
    return smaller, gone, job.proof(smaller, gone)


def n_parameters(model: ir.Model) -> int:
    """Numbers in all constants."""
    return sum(v.const_value.size for v in model.graph.initializers.values() if v.const_value)


def n_macs(model: ir.Model) -> int:
    """Multiply-accumulates of all layers with a constant weight."""
    return sum(layer.macs() or 0 for layer in weighted(model))


def _shares(found: Sequence[Group], keep: float | Mapping[str, Keep]) -> dict[str, Keep]:
    names = [group.name for group in found]
    shares: dict[str, Keep] = {}
    shares.update(keep if isinstance(keep, Mapping) else dict.fromkeys(names, keep))
    for name, share in shares.items():
        if name not in names:
            need = ", ".join(names[:8]) or "a model with groups"
            raise UsageError(message("group", name, "no such group", need, "see --groups"))
        if isinstance(share, float | int) and not 0 < share <= 1:
            raise UsageError(message("option", "keep", share, "above 0, at most 1", "give 0.5"))
    return shares


def _chosen(
    group: Group, share: Keep, scores: NDArray[np.float64], multiple: int
) -> NDArray[np.int64]:
    """The roots of a group that go."""
    n = len(group.roots)
    if not isinstance(share, float | int):
        if not share or min(share) < 0 or max(share) >= n:
            found, need = list(share)[:8], f"indices from 0 to {n - 1}"
            raise UsageError(message("group", group.name, found, need, "name the units that stay"))
        return np.delete(group.roots, list(share))
    step = multiple // math.gcd(multiple, _width(group))
    n_keep = min(n, math.ceil(max(1, round(share * n)) / step) * step)
    order = np.argsort(-scores[group.roots], kind="stable")
    return group.roots[order[n_keep:]]


def _choose_inputs(model: ir.Model, share: float) -> tuple[ir.Model, Gathered, Distance]:
    """Zero input channels, remove what nobody reads now, gather the rest; proved against zeros."""
    zeroed = model.clone()
    edges.zero_inputs(zeroed.graph, share)
    smaller = zeroed.clone()
    RemoveDeadChannels().run(smaller, Fuel())
    gathered = edges.gather(smaller)
    return smaller, gathered, prove(smaller, zeroed, model, FOLDED)


def _moves_statistics(analysis: Analysis, gone: NDArray[np.bool_]) -> bool:
    """True when a layer norm loses features that it does not count as zeros."""
    for node in analysis.graph if analysis.ties.policy.through_norm else ():
        if is_op(node, "LayerNormalization"):
            axes = analysis.ties.input(node, 0)
            first = node.attributes.get_int("axis", -1) % len(axes)
            if any(axis is not None and gone[analysis.roots[axis]].any() for axis in axes[first:]):
                return True
    return False


def _width(group: Group) -> int:
    """Positions of one unit on the axes that its weights make: the features of a head, else one."""
    made = [line.n_positions // len(group.roots) for line in group.lines if line.role == "makes"]
    return math.gcd(*made) or 1


def _proof(base: ir.Model, smaller: ir.Model, policy: Policy, gone: NDArray[np.bool_]) -> Distance:
    """The largest distance of the shrunk model from the masked one."""
    masked = base.clone()
    mask.apply(analyse(masked, policy), gone)
    return prove(smaller, masked, base)


def _change(smaller: ir.Model, model: ir.Model) -> float:
    feed = feeds_for(model, 2)[1]
    return compare(Session(smaller).run(feed), Session(model).run(feed))


def _row(group: Group, gone: NDArray[np.bool_]) -> Row:
    n = len(group.roots)
    operators = {line.node for line in group.lines}
    return Row(group.name, n, n - int(gone[group.roots].sum()), len(operators))
