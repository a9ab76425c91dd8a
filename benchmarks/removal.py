"""A random share of every group of a model cut out, against the same model masked."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from benchmarks import double, lettering
from sparsegraph.shrink import n_parameters
from sparsegraph.sigmoid import disagreement
from sparsegraph.structure import cut, mask
from sparsegraph.structure.groups import Group, groups
from sparsegraph.structure.ties import Analysis, Policy, analyse
from sparsegraph.verify import Feed, Session, compare, feeds_for

SHARE = 0.3
DRAWS = 10
BOUND = 1e-5  # of the largest output; no constant is folded when masks are cut
READERS = ("ppocr_v4_det", "ppocr_v6_det", "ppocr_v4_rec", "ppocr_v6_rec")


Case = tuple[float, ir.Model, Feed]
"""An error, the masked model and the feed."""


@dataclass(frozen=True)
class Masked:
    """Random 30 % of every group removed; errors are max|a-b| / max|b| against the masked model.

    `error`, `exact` and `rounding` are of the first draw of units on noise, `worst` is of all draws
    on all feeds: noise, and for what reads text a page of it. Whole, these models find and read its
    words. Without a random third of every group they do not, and two things come out of rounding:

    - Detectors see nothing (logits of -5 to -17), and ONNX Runtime's Sigmoid is right to 1e-7 of
      one, not of its value. `error` then says how few digits such a probability has. `worst` is
      therefore taken with Sigmoids as 1 / (1 + exp(-x)) where it would be above the bar, in float32
      and by ONNX Runtime as well.
    - Recognisers may end in a Softmax over logits of thousands, where neighbouring float32 numbers
      are 1e-3 apart. `limit` is how far the masked model of the worst draw is from its own result
      in float64, where that draw is above the bar.
    """

    model: str
    policy: str
    n_groups: int
    n_units: int
    n_removed: int
    analysis_s: float
    parameters: int
    parameters_left: int
    error: float
    exact: float
    """The same distance with both models in float64: what the surgery itself changes."""
    rounding: float
    """The masked model in float32 against itself in float64: how well it is conditioned."""
    worst: float
    """The largest error of all draws and feeds, Sigmoids precise."""
    draws: int
    limit: float
    """`rounding` of the worst draw and feed, where `worst` is above the bar."""
    commit: str = ""


def cut_against_mask(name: str, model: ir.Model, policy: Policy) -> Masked:
    """Remove a random share of every group and compare with the masked model."""
    start = time.process_time()
    analysis = analyse(model, policy)
    found = groups(analysis)
    took = time.process_time() - start
    draws = [random_units(analysis, found, seed) for seed in range(DRAWS)]
    smaller, hidden = pair(model, policy, draws[0])
    seen = feeds(name, model)
    noise = seen[0]
    cases = (case for gone in draws for case in apart(*pair(model, policy, gone), seen))
    worst, masked, feed = max(cases, key=lambda case: case[0])
    return Masked(
        name, policy.grouped, len(found), sum(len(g.roots) for g in found),
        int(draws[0].sum()), took, n_parameters(model), n_parameters(smaller),
        compare(Session(smaller).run(noise), Session(hidden).run(noise)),
        compare(double.run(smaller, noise), double.run(hidden, noise)), rounding(hidden, noise),
        worst, DRAWS, rounding(masked, feed) if worst > BOUND else 0.0,
    )  # fmt: skip


def rounding(model: ir.Model, feed: Feed) -> float:
    """Distance of a model in float32 from itself in float64."""
    truth = double.run(model, feed)
    found = Session(model).run(feed)
    return compare({k: v.astype(truth[k].dtype) for k, v in found.items()}, truth)


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


def apart(smaller: ir.Model, hidden: ir.Model, seen: Sequence[Feed]) -> Iterator[Case]:
    """The error on every feed, with precise Sigmoids where it would be above the bar."""
    one, other = Session(smaller), Session(hidden)
    for feed in seen:
        error = compare(one.run(feed), other.run(feed))
        yield disagreement(feed, BOUND, smaller, hidden, error), hidden, feed


def random_units(analysis: Analysis, found: Sequence[Group], seed: int) -> NDArray[np.bool_]:
    """Marks on a random share of the units of every group, at least one."""
    rng = np.random.default_rng(seed)
    gone = np.zeros(analysis.ties.forest.n, np.bool_)
    for group in found:
        n = max(1, int(SHARE * len(group.roots)))
        gone[rng.permutation(group.roots)[:n]] = True
    return cut.fill_empty(analysis, gone)
