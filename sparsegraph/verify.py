"""Run a model in ONNX Runtime and measure how far two models are apart.

ONNX Runtime was written by nobody here, which makes it the judge of every pass. Weights are handed
over by reference (no copy, no 2 GB limit).
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from sparsegraph.errors import UnsupportedError, VerifyError, message, one_line
from sparsegraph.graph import int_attribute, is_op, is_used, made_by, scalar, static_shape

Feed = dict[str, np.ndarray]
Outputs = dict[str, np.ndarray]

TOLERANCE = 1e-4  # max|a-b| / max|b| for fp32, the project's bar
TOLERANCE_HALF = 2e-2  # fp16: 11 significant bits, some ten roundings in a row
TOLERANCE_ROUNDED = 1.2e-3  # fp32 rounded to fp16 in the end: one step of 2^-10
CHOICES = ("TopK", "ArgMax", "ArgMin")  # operators that take the best of several values
LARGE = 30.0  # standard deviation of the large-value feed
_N_NUDGES = 4  # where a model jumps between two outputs, one draw in two shows nothing
_BY_REFERENCE_BYTES = 1024
_MASK_NAME = re.compile(r"mask", re.IGNORECASE)
_INTEGER_LIMIT = 4  # integers without a known table: small, since they may be counts or axes
_PASS_THROUGH = ("Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Transpose",
                 "Slice", "Expand", "Concat", "Clip")  # fmt: skip


class Session:
    """An ONNX Runtime session over an in-memory model; optimisation off unless asked."""

    def __init__(
        self, model: ir.Model | onnx.ModelProto | bytes, *, optimize: bool = False, threads: int = 0
    ) -> None:
        import onnxruntime as ort

        ort.set_default_logger_severity(4)
        options = ort.SessionOptions()
        options.log_severity_level = 4
        if threads:
            options.intra_op_num_threads = threads
        if not optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if isinstance(model, ir.Model):
            model, self._held = _by_reference(model)
            values = [ort.OrtValue.ortvalue_from_numpy(a) for a in self._held.values()]
            options.add_external_initializers(list(self._held), values)
        elif isinstance(model, onnx.ModelProto):
            model = model.SerializeToString()
        try:
            self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise UnsupportedError(
                message("model", "onnxruntime", one_line(error), "a runnable model", "see the node")
            ) from error
        self.output_names = [o.name for o in self._session.get_outputs()]

    def run(self, feed: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None) -> Outputs:
        """Outputs by name. Raises VerifyError when ONNX Runtime fails on this feed."""
        wanted = list(outputs) if outputs is not None else self.output_names
        try:
            results = self._session.run(wanted, dict(feed))
        except Exception as error:
            raise VerifyError(
                message("run", "onnxruntime", one_line(error), "a valid feed", "check the feed")
            ) from error
        return dict(zip(wanted, results, strict=True))


@contextmanager
def tapped(model: ir.Model, values: Iterable[ir.Value]) -> Iterator[ir.Model]:
    """The same model with these values as additional outputs, for the duration of the block."""
    outputs = model.graph.outputs
    n_before = len(outputs)
    present = {id(v) for v in outputs}
    outputs.extend(v for v in values if id(v) not in present)
    try:
        yield model
    finally:
        while len(outputs) > n_before:
            outputs.pop()


def run_onnx(
    model: ir.Model | onnx.ModelProto | bytes,
    feed: Mapping[str, np.ndarray],
    outputs: Sequence[str] | None = None,
) -> Outputs:
    """Run a model once. `outputs` may name inner values of an `ir.Model`."""
    if isinstance(model, ir.Model) and outputs is not None:
        by_name = {v.name: v for n in model.graph for v in n.outputs}
        with tapped(model, [by_name[name] for name in outputs if name in by_name]):
            return Session(model).run(feed, outputs)
    return Session(model).run(feed, outputs)


def compare(
    a: Mapping[str, Any] | Sequence[Any] | np.ndarray,
    b: Mapping[str, Any] | Sequence[Any] | np.ndarray,
) -> float:
    """max|a-b| / max|b| over the worst output; `b` is the reference.

    Infinite when names, shapes, dtypes, NaN positions or signed infinities differ. Integers, bools
    and strings must be equal: any difference is infinite. An all-zero reference counts as scale 1.
    """
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return _distance(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        if a.keys() != b.keys():
            return np.inf
        return max((compare(a[k], b[k]) for k in b), default=0.0)
    if len(a) != len(b):
        return np.inf
    return max((compare(x, y) for x, y in zip(a, b, strict=True)), default=0.0)


def tolerance(outputs: Mapping[str, np.ndarray], *, is_wide: bool = False) -> float:
    """The bound that fits the coarsest float dtype among the outputs.

    `is_wide`: of a model that computes in float32 and gives halves as casts of that.
    """
    halves = any(getattr(v, "dtype", None) == np.float16 for v in outputs.values())
    if not halves:
        return TOLERANCE
    return TOLERANCE_ROUNDED if is_wide else TOLERANCE_HALF


def is_wide(model: ir.Model) -> bool:
    """True if nothing but casts has numbers of half precision."""
    return not any(
        value is not None and value.dtype == ir.DataType.FLOAT16
        for node in model.graph.all_nodes()
        if not is_op(node, "Cast")
        for value in (*node.inputs, *node.outputs)
    )


def feeds_for(
    model: ir.Model, n: int = 3, seed: int = 0, *, session: Session | None = None
) -> list[Feed]:
    """`n` feeds: zeros (masks: all masked), normal (masks: all ones), large values, then normals.

    Integer inputs that index a table stay inside it; masks are 0/1, from the third feed on with a
    random kept prefix per row (padding). Shapes must be static. With a `session` of the model, the
    large values are such that it can be judged by them: see `steadied`.
    """
    rng = np.random.default_rng(seed)
    kinds = ["zeros", "normal", "large"] + ["normal"] * max(0, n - 3)
    inputs = [v for v in model.graph.inputs if v.name not in model.graph.initializers]
    feeds = [
        {str(v.name): _sample(v, kind, step, rng) for v in inputs}
        for step, kind in enumerate(kinds[:n])
    ]
    if session is not None and n > kinds.index("large"):
        feeds[kinds.index("large")] = steadied(feeds[kinds.index("large")], session, is_wide(model))
    return feeds


def steadied(feed: Feed, session: Session, is_wide: bool) -> Feed:
    """The feed, or a third of it, a ninth .. down to 1 / LARGE, on which the model tells anything.

    Where last bits of the inputs move outputs by more than the tolerance (a saturated softmax whose
    two largest logits are close), two right models differ by as much, and a wrong one goes unseen.
    """
    smaller, shrunk = feed, 1.0
    if all(array.dtype.kind != "f" for array in feed.values()):
        return feed  # of tokens: no last bits, nothing to shrink
    while True:
        try:
            want = session.run(smaller)
            moved = sensitivity(session, smaller, want, is_wide, _N_NUDGES)
            if moved <= tolerance(want, is_wide=is_wide):
                return smaller
        except VerifyError:
            return feed  # whoever runs it will say why
        if shrunk * LARGE <= 1.0:
            return feed
        shrunk = max(shrunk / 3, 1.0 / LARGE)
        smaller = {k: _scaled(v, shrunk) for k, v in feed.items()}


def sensitivity(
    session: Session, feed: Feed, want: Outputs, is_wide: bool, n_draws: int = 1
) -> float:
    """How far changes in the last bit of every input move the outputs, as `compare` tells it.

    `is_wide` as in `tolerance`: inputs of half precision stay, their last bits are no measure then.
    """
    rng = np.random.default_rng(1)
    worst = 0.0
    for _ in range(n_draws):
        nudged = {
            name: array if is_wide and array.dtype == np.float16 else _nudge(array, rng)
            for name, array in feed.items()
        }
        worst = max(worst, compare(session.run(nudged), want))
    return worst


def tells(model: ir.Model, feed: Feed, want: Outputs, limit: float) -> bool:
    """False where last bits of the weights alone move the outputs by more than the limit.

    On such a feed two right models differ as much: the best of equal queries of a detector, a norm
    over what should be zeros.
    """
    for seed in range(_N_NUDGES):
        moved = compare(Session(_with_nudged_weights(model, seed)).run(feed), want)
        if moved > limit:
            return False
    return True


def chooses(model: ir.Model) -> bool:
    """True for outputs that depend on which of several values is the largest."""
    return any(is_op(node, *CHOICES) for node in model.graph.all_nodes())


def _with_nudged_weights(model: ir.Model, seed: int) -> ir.Model:
    """Scalars stay, which something may be compared with, and the scales of a Resize."""
    rng, nudged = np.random.default_rng(seed), model.clone()
    for value in nudged.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or not tensor.shape or tensor.dtype != ir.DataType.FLOAT:
            continue
        if not any(is_op(node, "Resize", "Upsample") for node, _ in value.uses()):
            value.const_value = ir.tensor(_nudge(tensor.numpy(), rng), name=value.name)
    return nudged


def is_mask_input(value: ir.Value) -> bool:
    """True for a bool input, one named so, or an integer one that ends in a comparison or 1 - x."""
    if value.dtype is None:
        return False
    if value.dtype == ir.DataType.BOOL or _MASK_NAME.search(value.name or ""):
        return True
    return value.dtype.is_integer() and any(_reads_as_mask(*use) for use in _users(value))


def index_bound(value: ir.Value) -> int | None:
    """The smallest table that an integer input indexes (Gather and relatives), or None."""
    bounds: list[int] = []
    for node, position in _users(value):
        shape = static_shape(node.inputs[0])
        if position != 1 or shape is None or not shape:
            continue
        if is_op(node, "Gather", "GatherElements", "ScatterElements"):
            axis = node.attributes.get("axis")
            bounds.append(shape[axis.as_int() if axis else 0])
        elif is_op(node, "GatherND", "ScatterND"):
            places, first = static_shape(value), int_attribute(node, "batch_dims", 0)
            n_axes = places[-1] if places else 1
            bounds += shape[first : first + n_axes]
    return min(bounds, default=None)


def _by_reference(model: ir.Model) -> tuple[bytes, dict[str, np.ndarray]]:
    """Serialise with large initializers left out; returns them by name."""
    held: dict[str, np.ndarray] = {}
    kept: list[tuple[ir.Value, ir.TensorProtocol]] = []
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.nbytes <= _BY_REFERENCE_BYTES or not is_used(value):
            continue  # ONNX Runtime drops what nothing reads, then misses it
        array = tensor.numpy()
        if array.dtype.kind not in "fiub" or np.dtype(array.dtype.str).isbuiltin != 1:
            continue  # bf16, fp8, int4: ONNX Runtime takes no NumPy view of them
        held[name] = np.ascontiguousarray(array)
        kept.append((value, tensor))
    try:
        for value, tensor in kept:
            value.const_value = ir.ExternalTensor(
                "memory",
                0,
                tensor.nbytes,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=str(value.name),
            )
        return ir.to_proto(model).SerializeToString(), held
    finally:
        for value, tensor in kept:
            value.const_value = tensor


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    if a.shape != b.shape or a.dtype != b.dtype:
        return np.inf
    if b.dtype.kind not in "fc":
        return 0.0 if np.array_equal(a, b) else np.inf
    if b.size == 0:
        return 0.0
    x, y = a.astype(np.float64), b.astype(np.float64)
    finite = np.isfinite(y)
    if not np.array_equal(np.isfinite(x), finite):
        return np.inf
    if not finite.all() and not np.array_equal(x[~finite], y[~finite], equal_nan=True):
        return np.inf
    x, y = x[finite], y[finite]
    if y.size == 0:
        return 0.0
    scale = float(np.abs(y).max())
    return float(np.abs(x - y).max()) / (scale or 1.0)


def _nudge(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    if array.dtype.kind != "f":
        return array
    away = rng.integers(0, 2, array.shape) * 2 - 1
    nudged = array * (1 + away * np.finfo(array.dtype).eps)
    return np.asarray(nudged, array.dtype)  # NumPy makes numbers of arrays without axes


def _scaled(array: np.ndarray, factor: float) -> np.ndarray:
    return np.asarray(array * factor, array.dtype) if array.dtype.kind == "f" else array


def _sample(value: ir.Value, kind: str, step: int, rng: np.random.Generator) -> np.ndarray:
    shape = static_shape(value)
    if shape is None or value.dtype is None:
        raise VerifyError(
            message("input", str(value.name), value.shape, "a static shape", "bind it with shapes=")
        )
    if value.dtype == ir.DataType.STRING:
        return np.full(shape, "a", dtype=object)
    dtype = value.dtype.numpy()
    if is_mask_input(value):
        return _mask(shape, step, rng).astype(dtype)
    if value.dtype.is_integer():
        bound = index_bound(value) or _INTEGER_LIMIT
        if kind == "zeros":
            return np.zeros(shape, dtype)
        if kind == "large":
            return np.full(shape, bound - 1, dtype)
        return rng.integers(0, bound, shape).astype(dtype)
    scale = {"zeros": 0.0, "normal": 1.0, "large": LARGE}[kind]
    return np.asarray(rng.standard_normal(shape) * scale).astype(dtype)


def _mask(shape: tuple[int, ...], step: int, rng: np.random.Generator) -> np.ndarray:
    if step < 2 or not shape:
        return np.full(shape, float(step > 0))
    kept = rng.integers(1, shape[-1] + 1, (*shape[:-1], 1)) if shape[-1] else 0
    return (np.arange(shape[-1]) < kept).astype(np.float64)


def _users(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """Nodes that read the value, through casts and reshapes, with the input position."""
    seen: set[int] = set()
    work = [value]
    while work:
        current = work.pop()
        for node, position in current.uses():
            if is_op(node, *_PASS_THROUGH) and id(node) not in seen:
                seen.add(id(node))
                work.extend(node.outputs)
            yield node, position


def _reads_as_mask(node: ir.Node, position: int) -> bool:
    if is_op(node, "Where"):
        return position == 0
    if is_op(node, "Cast"):
        return node.attributes["to"].as_int() == ir.DataType.BOOL
    if is_op(node, "Sub"):
        return position == 1 and scalar(node.inputs[0]) == 1.0
    return is_op(node, "Not", "And") and made_by(node.inputs[0], "Cast") is not None
