"""What an artefact must pass on this machine: equal to ONNX Runtime and, partly quantised, faster.

ONNX Runtime with its default options is the reference of a quantised model, node by node of others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from sparsegraph import quantised, verify
from sparsegraph.artefact import Check
from sparsegraph.bench import bench
from sparsegraph.errors import UnsupportedError, VerifyError, message
from sparsegraph.program import Plan, Program
from sparsegraph.runtime import InferenceSession
from sparsegraph.sigmoid import disagreement

TOLERANCE = 1e-4  # largest |a - b| / max |b| between the artefact and ONNX Runtime, fp32
_MARGIN = 4  # from where on rounding of the reference may be the reason for a refusal
_REPORT = "report this model; nothing was written"
FASTER = 1.05  # measured speed that own kernels must reach in a model that is partly quantised


class Lost(Exception):
    """Own kernels are no gain in this model; says why."""


def prove(
    models: Sequence[ir.Model], folder: Path, threads: int, task: str | None = None
) -> dict[str, Any]:
    """Compare the artefact, or one task of it, with ONNX Runtime on every captured model.

    ONNX Runtime computes node by node, but quantised models as it does by default. A feed on
    which outputs differ does not count if the model itself cannot tell (`verify.tells`), and makes
    choices or cannot be judged in float64.

    Raises:
        VerifyError: names the feed, the figure and the limit.
    """
    session = InferenceSession(folder, threads=threads, task=task)
    names = [o.name for o in session.get_outputs()]
    worst, n_feeds = 0.0, 0

    def own(feed: verify.Feed) -> verify.Outputs:
        return dict(zip(names, session.run(None, feed)))

    for model in models:
        is_int8 = quantised.has_quantised(model)
        reference = verify.Session(model, optimize=is_int8, threads=threads if is_int8 else 0)
        is_wide = verify.is_wide(model)
        steady = None if is_int8 else reference
        for i, feed in enumerate(verify.feeds_for(model, session=steady)):
            expected = reference.run(feed)
            limit = max(TOLERANCE, verify.tolerance(expected, is_wide=is_wide))
            error, fix = verify.compare(own(feed), expected), _REPORT
            if not is_int8:
                error = disagreement(feed, limit, own, model, error)
            is_right = error <= limit
            if not is_right and not is_int8:
                exact = _in_double(model, feed, own(feed), expected, error, limit)
                if exact is not None:
                    error, is_right, fix = exact
                is_doubtful = exact is None or verify.chooses(model)
                if not is_right and is_doubtful and not verify.tells(model, feed, expected, limit):
                    continue
            worst, n_feeds = max(worst, error), n_feeds + 1
            if not is_right:
                found = f"max|a-b|/max|b| = {error:.2e} on feed {i}"
                need = f"<= {limit:.0e}"
                raise VerifyError(message("artefact", str(folder.name), found, need, fix))
    if not n_feeds:
        found = "outputs that rounding decides, on every feed"
        need, fix = "one feed that tells right from wrong", "check=False writes it unproved"
        raise VerifyError(message("artefact", str(folder.name), found, need, fix))
    return {"checked": True, "feeds": n_feeds, "max_rel_error": float(f"{worst:.2e}")}


def _in_double(
    model: ir.Model, feed: verify.Feed, own: verify.Outputs, found: verify.Outputs, error: float,
    limit: float,
) -> tuple[float, bool, str] | None:  # fmt: skip
    """How far outputs are off, judged in float64; if they are right; if not, why.

    Outputs that are no further from the exact ones than ONNX Runtime's `found` are right, if those
    are: on a feed of zeros a norm may divide what a rounded mean leaves by the root of its epsilon.
    """
    from sparsegraph import double

    try:
        exact = double.run(model, feed)
    except UnsupportedError:
        return None
    ours, theirs = (
        verify.compare({k: v.astype(exact[k].dtype) for k, v in outputs.items()}, exact)
        for outputs in (own, found)
    )
    if ours <= limit or ours <= theirs <= double.LARGEST:
        return ours, True, ""
    if _MARGIN * theirs < limit:
        return error, False, _REPORT
    return error, False, (
        f"the model amplifies rounding (ONNX Runtime is {theirs:.0e} off float64 on this "
        "feed): prune less or fine-tune it; check=False writes it unproved"
    )  # fmt: skip


def is_mixed(models: Sequence[ir.Model], plans: Sequence[Sequence[Plan]]) -> bool:
    """True for quantised models that have kernels of ours as well."""
    segments = (s for made in plans for plan in made for s in plan.segments)
    native = any(isinstance(s, Program) for s in segments)
    return native and any(map(quantised.has_quantised, models))


def race(
    models: Sequence[ir.Model], threads: int, checked: Check, folder: Path
) -> Mapping[str, Any]:
    """The proof of a mixed model, if it is right and faster than ONNX Runtime on all of it.

    Raises:
        Lost: it is not. Values that differ in the last bit may round to other int8 numbers.
    """
    what = f"{quantised.REASON}; with own kernels for the other layers"
    try:
        record = checked(folder)
    except VerifyError as error:
        raise Lost(f"{what} outputs differ: last bits turn into steps of int8") from error
    session = InferenceSession(folder, threads=threads)
    rows = [bench(session, model, threads=threads, rounds=5, block_ms=60) for model in models]
    ratio = sum(row.dense_ms for row in rows) / sum(row.ours_ms for row in rows)
    if ratio < FASTER:
        raise Lost(f"{what} it ran at {ratio:.1f} of ONNX Runtime's speed")
    return record
