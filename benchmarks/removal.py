"""A random share of every group of a model cut out, against the same model masked."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from benchmarks import lettering, ordered
from sparsegraph import double
from sparsegraph.shrink import n_parameters
from sparsegraph.sigmoid import disagreement
from sparsegraph.structure import cut, mask
from sparsegraph.structure.groups import Group, groups
from sparsegraph.structure.ties import Analysis, Policy, analyse
from sparsegraph.verify import Feed, Outputs, Session, compare, feeds_for

SHARE = 0.3
DRAWS = 10
BOUND = 1e-5  # of the largest output; no constant is folded when masks are cut
READERS = ("ppocr_v4_det", "ppocr_v6_det", "ppocr_v4_rec", "ppocr_v6_rec")


@dataclass(frozen=True)
class Draw:
    """One random choice of units on one feed; distances are max|a-b| / max|b|."""

    error: float
    """Cut against masked, float32 in ONNX Runtime; Sigmoids precise where above BOUND without."""
    exact: float
    """Cut against masked, both in float64: what the surgery itself changes."""
    rounding: float
    """Masked in float32 against itself in float64: what float32 loses without any surgery."""
    rounding_left: float
    """The same of the cut model."""
    ordered: float
    """`error` with float32 sums in the order of the channels; only where it is above BOUND."""
    is_exact: bool
    """Run in float64: else the three in between are 0."""


@dataclass(frozen=True)
class Masked:
    """Random 30 % of every group removed, against the same units masked; the worst of all draws.

    A draw is one random choice of units. Each is run on noise, and for what reads text on a page of
    it as well. Whole, these models find and read its words. Without a random third of every group
    they do not, and two things come out of rounding:

    - Detectors see nothing (logits of -5 to -17), and ONNX Runtime's Sigmoid is right to 1e-7 of
      one, not of its value. `first` then says how few digits such a probability has. All others
      are therefore taken with Sigmoids as 1 / (1 + exp(-x)) where they would be above the bar, in
      float32 and by ONNX Runtime as well.
    - Recognisers may end in a Softmax over logits of thousands, where neighbouring float32 numbers
      are 1e-3 apart. ONNX Runtime sums in blocks, whose borders move when channels go. `ordered`
      sums one by one: exact zeros then change no bit, so it is 0 if and only if nothing but the
      order of sums tells the two models apart.
    """

    model: str
    policy: str
    n_groups: int
    n_units: int
    n_removed: int
    analysis_s: float
    parameters: int
    parameters_left: int
    first: float
    """Cut against masked, the first draw on noise, as ONNX Runtime computes it."""
    error: float
    exact: float
    rounding: float
    rounding_left: float | None
    """None in rows from before it was measured."""
    ordered: float
    n_above: int
    """Of `n_draws`, those whose `error` is above BOUND."""
    n_draws: int
    """Choices of units times feeds."""
    n_exact: int
    """Those that were run in float64 too, the ones above BOUND among them."""
    commit: str = ""


def cut_against_mask(name: str, model: ir.Model, policy: Policy, n_exact: int = DRAWS) -> Masked:
    """Remove a random share of every group and compare with the masked model.

    The first `n_exact` choices of units, and any that float32 does not tell apart, run in float64.
    """
    start = time.process_time()
    analysis = analyse(model, policy)
    found = groups(analysis)
    took = time.process_time() - start
    units = [random_units(analysis, found, seed) for seed in range(DRAWS)]
    smaller, hidden = pair(model, policy, units[0])
    seen = feeds(name, model)
    draws = [
        one for at, gone in enumerate(units)
        for one in drawn(model, policy, gone, seen, at < n_exact)
    ]  # fmt: skip
    columns = zip(*(astuple(one)[:5] for one in draws))
    error, exact, rounding, rounding_left, in_order = (float(max(column)) for column in columns)
    return Masked(
        name, policy.grouped, len(found), sum(len(g.roots) for g in found),
        int(units[0].sum()), took, n_parameters(model), n_parameters(smaller),
        compare(Session(smaller).run(seen[0]), Session(hidden).run(seen[0])),
        error, exact, rounding, rounding_left, in_order,
        sum(one.error > BOUND for one in draws), len(draws), sum(one.is_exact for one in draws),
    )  # fmt: skip


def drawn(
    model: ir.Model, policy: Policy, gone: NDArray[np.bool_], seen: Sequence[Feed], is_exact: bool
) -> list[Draw]:
    """One choice of units on every feed."""
    smaller, hidden = pair(model, policy, gone)
    one, other = Session(smaller), Session(hidden)
    found = []
    for feed in seen:
        got, want = one.run(feed), other.run(feed)
        error = disagreement(feed, BOUND, smaller, hidden, compare(got, want))
        ordinary = error <= BOUND
        if ordinary and not is_exact:
            found.append(Draw(error, 0.0, 0.0, 0.0, 0.0, False))
            continue
        true_got, true_want = double.run(smaller, feed), double.run(hidden, feed)
        found.append(Draw(
            error, compare(true_got, true_want),
            rounded(hidden, feed, want, true_want), rounded(smaller, feed, got, true_got),
            0.0 if ordinary else compare(ordered.run(smaller, feed), ordered.run(hidden, feed)),
            True,
        ))  # fmt: skip
    return found


def rounded(model: ir.Model, feed: Feed, found: Outputs, truth: Outputs) -> float:
    """Distance of float32 outputs from those in float64, with precise Sigmoids above BOUND."""
    error = compare({k: v.astype(truth[k].dtype) for k, v in found.items()}, truth)
    narrow = {k: v.astype(found[k].dtype) for k, v in truth.items()}
    return disagreement(feed, BOUND, lambda _: narrow, model, error)


def pair(model: ir.Model, policy: Policy, gone: NDArray[np.bool_]) -> tuple[ir.Model, ir.Model]:
    """The model without these units, and with them masked."""
    smaller, hidden = model.clone(), model.clone()
    cut.apply(analyse(smaller, policy), gone)
    mask.apply(analyse(hidden, policy), gone)
    onnx.checker.check_model(ir.to_proto(smaller), full_check=True)
    return smaller, hidden


def feeds(name: str, model: ir.Model) -> list[Feed]:
    """Noise; for those that read text a page as well."""
    noise = feeds_for(model, 2)[1]
    if name not in READERS:
        return [noise]
    ((key, array),) = noise.items()
    return [noise, {key: lettering.page(*array.shape[2:])}]


def random_units(analysis: Analysis, found: Sequence[Group], seed: int) -> NDArray[np.bool_]:
    """Marks on a random share of the units of every group, at least one."""
    rng = np.random.default_rng(seed)
    gone = np.zeros(analysis.ties.forest.n, np.bool_)
    for group in found:
        n = max(1, int(SHARE * len(group.roots)))
        gone[rng.permutation(group.roots)[:n]] = True
    return cut.fill_empty(analysis, gone)
