"""The compiler's graph half as one list, and the driver that runs and proves it."""

import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from sparsegraph import debug
from sparsegraph.errors import PassError, UsageError, VerifyError, message
from sparsegraph.graph import fill_shapes, has_subgraph, is_random
from sparsegraph.passes.classify_masks import ClassifyMasks
from sparsegraph.passes.dedupe import Dedupe
from sparsegraph.passes.expand_einsum import ExpandEinsum
from sparsegraph.passes.expand_linear import ExpandLinear
from sparsegraph.passes.expand_rare import ExpandRare
from sparsegraph.passes.expand_sequences import ExpandSequences
from sparsegraph.passes.expand_volumes import ExpandVolumes
from sparsegraph.passes.fold_batch_norm import FoldBatchNorm
from sparsegraph.passes.fold_constants import FoldConstants
from sparsegraph.passes.fold_conv_bias import FoldConvBias
from sparsegraph.passes.fold_scale import FoldScale
from sparsegraph.passes.fold_shapes import FoldShapes
from sparsegraph.passes.fuse_attention import FuseAttention
from sparsegraph.passes.fuse_gelu import FuseGelu
from sparsegraph.passes.fuse_group_norm import FuseGroupNorm
from sparsegraph.passes.fuse_layer_norm import FuseLayerNorm
from sparsegraph.passes.fuse_rms_norm import FuseRmsNorm
from sparsegraph.passes.inline_if import InlineIf
from sparsegraph.passes.merge_masks import MergeMasks
from sparsegraph.passes.merge_reshapes import MergeReshapes
from sparsegraph.passes.merge_transposes import MergeTransposes
from sparsegraph.passes.remove_dead_channels import RemoveDeadChannels
from sparsegraph.passes.remove_identity import RemoveIdentity
from sparsegraph.passes.remove_unused import RemoveUnused
from sparsegraph.passes.slice_packed_heads import SlicePackedHeads
from sparsegraph.passes.snap_near_zeros import SnapNearZeros
from sparsegraph.passes.split_batch_norm import SplitBatchNorm
from sparsegraph.passes.unflatten_add import UnflattenAdd
from sparsegraph.passes.unflatten_softmax import UnflattenSoftmax
from sparsegraph.rewrite import Decline, Fuel, Pass
from sparsegraph.sigmoid import disagreement
from sparsegraph.verify import (
    Feed,
    Outputs,
    Session,
    chooses,
    compare,
    feeds_for,
    is_wide,
    sensitivity,
    tells,
    tolerance,
)

PASSES: tuple[Pass, ...] = (
    # understand: only what depends on the input stays a node
    RemoveUnused(),
    Dedupe(),  # first, or equal masks would be folded once per layer
    FoldShapes(),  # shapes are static, so Shape and Size are numbers
    FoldConstants(),  # masks, merges, transposed weights: every input-independent subgraph
    InlineIf(),  # what constants decide is decided
    ExpandEinsum(),
    ExpandSequences(),
    ExpandRare(),
    ExpandLinear(),  # what a resize makes of unit vectors is folded next
    FoldShapes(),
    FoldConstants(),  # inside the branches
    RemoveIdentity(),
    MergeReshapes(),
    MergeTransposes(),
    UnflattenSoftmax(),
    UnflattenAdd(),
    MergeMasks(),
    Dedupe(),
    # recognise: decomposed forms become the op that they mean
    FuseGelu(),
    FuseLayerNorm(),
    FuseRmsNorm(),
    FuseGroupNorm(),
    SlicePackedHeads(),
    FuseAttention(),
    # shrink: arithmetic on constants moves into the weights
    FoldConvBias(),
    FoldBatchNorm(),
    FoldConvBias(),  # what stood behind a norm
    FoldScale(),
    SplitBatchNorm(),  # what is left of batch norm is a multiply and an add
    RemoveDeadChannels(),  # what no output notices
    ExpandVolumes(),
    # clean: what the steps above left behind
    FoldConstants(),
    RemoveIdentity(),
    FuseAttention(),  # where a mask over heads stood
    MergeReshapes(),
    MergeTransposes(),
    MergeReshapes(),
    Dedupe(),
    RemoveUnused(),
    ClassifyMasks(),  # annotates, changes nothing
)

_SENSITIVITY_FACTOR = 32.0  # allowed multiple of the change that a last-bit change of inputs causes
_LOOSEST = 5e-2


def snapping(threshold: float) -> tuple[Pass, ...]:
    """The passes, with near-zeros set to zero once everything constant is folded."""
    at = next(i for i, step in enumerate(PASSES) if isinstance(step, RemoveIdentity))
    return (*PASSES[:at], SnapNearZeros(threshold), *PASSES[at:])


@dataclass(frozen=True)
class PassRecord:
    """One run of one pass. `max_rel_error` is None when nothing had to be verified."""

    name: str
    n_applied: int
    declined: tuple[Decline, ...]
    nodes_before: int
    nodes_after: int
    ms: float
    max_rel_error: float | None


@dataclass(frozen=True)
class Optimized:
    """The optimised model and what each pass did to it, in order."""

    model: ir.Model
    records: tuple[PassRecord, ...]


def optimize(
    model: ir.Model,
    *,
    verify: bool = True,
    skip: Collection[str] = (),
    stop_after: str | None = None,
    fuel: int | None = None,
    dump: str | Path | None = None,
    on_pass: Callable[[PassRecord], None] | None = None,
    passes: Sequence[Pass] = PASSES,
) -> Optimized:
    """Run the passes on a copy of a captured model.

    `fuel` bounds the number of rewrites over all passes. `dump` keeps every stage as a model (also
    SPARSEGRAPH_DUMP). Raises VerifyError when a pass changes the outputs (the pass is undone and
    named, a reproducer written), UsageError for an unknown pass name, PassError for a broken pass.
    """
    _check_names(passes, skip, stop_after)
    folder = Path(dump) if dump is not None else debug.dump_folder()
    judge = Judge(model) if verify else None
    current = model.clone()
    tank = Fuel(fuel)
    records: list[PassRecord] = []
    if folder is not None:
        debug.dump(current, folder, 0, "capture")
    for step in passes:
        if step.name in skip:
            continue
        after, record = run_pass(step, current, tank, judge, folder)
        debug.show(record, current, after)
        current = after
        records.append(record)
        if folder is not None and record.n_applied:
            debug.dump(current, folder, len(records), step.name)
        if on_pass is not None:
            on_pass(record)
        if step.name == stop_after:
            break
    return Optimized(current, tuple(records))


def run_pass(
    step: Pass,
    model: ir.Model,
    fuel: Fuel,
    judge: "Judge | None" = None,
    folder: Path | None = None,
) -> tuple[ir.Model, PassRecord]:
    """Run one pass on a copy; `model` stays as it was, whatever happens."""
    start = time.perf_counter()
    after = model.clone()
    try:
        outcome = step.run(after, fuel)
        if outcome.n_applied:
            fill_shapes(after)
    except (PassError, VerifyError):
        raise
    except Exception as error:
        found, fix = f"{type(error).__name__}: {error}", f"skip it with --skip {step.name}"
        raise PassError(message("pass", step.name, found, "no failure", fix)) from error
    error_size = None
    if judge is not None and outcome.n_applied and not _computes_the_same(model, after):
        error_size = judge.check(step, model, after, folder)
    ms = (time.perf_counter() - start) * 1e3
    before_after = (len(model.graph), len(after.graph))
    return after, PassRecord(
        step.name, outcome.n_applied, outcome.declined, *before_after, ms, error_size
    )


class Judge:
    """Compares every stage with the outputs of the captured model on fixed feeds."""

    def __init__(self, model: ir.Model) -> None:
        self._reference = model
        self._cases = _reference_cases(model)

    def check(
        self, step: Pass, before: ir.Model, after: ir.Model, folder: Path | None = None
    ) -> float | None:
        """The largest error over the feeds, as a fraction of the reference's largest value.

        None for a model with random ops: no two runs of it agree.

        Raises VerifyError, after writing a reproducer, when an exact pass exceeds the bound.
        """
        if not self._cases:
            return None
        worst = 0.0
        session = Session(after)
        for feed, want, bound in self._cases:
            limit = bound if step.exact else np.inf
            error = compare(session.run(feed), want)
            error = disagreement(feed, limit, after, self._reference, error)
            if error > limit or (not step.exact and np.isinf(error)):
                self._decide(step, before, after, feed, want, error, bound, folder)
            worst = max(worst, error)
        if not step.exact:
            self._reference = after
            self._cases = [(f, session.run(f), b) for f, _, b in self._cases]
        return worst

    def _decide(
        self, step: Pass, before: ir.Model, after: ir.Model, feed: Feed, want: Outputs,
        error: float, bound: float, folder: Path | None,
    ) -> None:  # fmt: skip
        """Raise VerifyError unless the tolerance holds in float64 and float32 explains the rest.

        Or unless the model, which makes choices or has no float64, cannot tell on this feed.

        The nudge behind a bound cannot tell how a model rounds where its inputs are zeros.
        """
        from sparsegraph import double

        look = double.look(after, self._reference, feed, want) if step.exact else None
        limit = tolerance(want, is_wide=is_wide(self._reference))
        if look is not None and look.exact <= limit and look.explains(error):
            return
        is_doubtful = step.exact and (look is None or chooses(self._reference))
        if not is_doubtful or tells(self._reference, feed, want, limit):
            _fail(step, before, feed, error, bound, folder)


def _reference_cases(model: ir.Model) -> list[tuple[Feed, Outputs, float]]:
    """Feeds, reference outputs and error bounds, without feeds that the model itself refuses."""
    if any(is_random(node) for node in model.graph.all_nodes()):
        return []
    session, wide = Session(model), is_wide(model)
    cases: list[tuple[Feed, Outputs, float]] = []
    refused: VerifyError | None = None
    for feed in feeds_for(model, session=session):
        try:
            want = session.run(feed)
        except VerifyError as error:
            refused = error
            continue
        cases.append((feed, want, error_bound(session, feed, want, is_wide=wide)))
    if not cases and refused is not None:
        raise refused
    return cases


def error_bound(session: Session, feed: Feed, want: Outputs, *, is_wide: bool = False) -> float:
    """The tolerance, wider where the model itself amplifies last-bit changes of its inputs.

    Saturated softmax on large values does: reordering a sum then moves outputs by more than 1e-4
    although nothing is wrong. `is_wide` as in `tolerance`: last bits of halves are no measure then.
    """
    base = tolerance(want, is_wide=is_wide)
    moved = sensitivity(session, feed, want, is_wide)
    if not np.isfinite(moved):
        return base
    return min(max(base, _SENSITIVITY_FACTOR * moved), max(base, _LOOSEST))


def _fail(
    step: Pass, before: ir.Model, feed: Feed, error: float, bound: float, folder: Path | None
) -> None:
    place = folder or Path(tempfile.mkdtemp(prefix="sparsegraph-"))
    path = debug.reproducer(before, feed, place, step.name)
    found, need = f"outputs off by {error:.1e}", f"at most {bound:.1e}"
    fix = f"skip it with --skip {step.name} and report {path}"
    raise VerifyError(message("pass", step.name, found, need, fix))


def _computes_the_same(a: ir.Model, b: ir.Model) -> bool:
    """True when nodes, wiring and constants are identical: only annotations or dead parts moved."""
    return _wiring(a) == _wiring(b)


def _wiring(model: ir.Model) -> list[object]:
    lines: list[object] = [[v.name for v in (*model.graph.inputs, *model.graph.outputs)]]
    for node in model.graph:
        constants = [id(v.const_value) for v in node.inputs if v is not None and v.const_value]
        if has_subgraph(node):
            constants.append(id(node))
        names = [None if v is None else v.name for v in (*node.inputs, *node.outputs)]
        attributes = sorted((a.name, repr(a.value)) for a in node.attributes.values())
        lines.append((node.domain, node.op_type, names, constants, attributes))
    return lines


def _check_names(passes: Sequence[Pass], skip: Collection[str], stop_after: str | None) -> None:
    known = [p.name for p in passes]
    for name in (*skip, *([stop_after] if stop_after else [])):
        if name not in known:
            need = ", ".join(dict.fromkeys(known))
            raise UsageError(message("pass", name, "no such pass", need, "use one of these"))
