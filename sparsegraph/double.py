"""A model in double precision: what its float32 outputs would be without rounding.

ONNX's own reference evaluator runs the graph with every float constant and input widened, which is
slow and exact to 1e-16 per operation. Convolutions and pools are written here over kernel taps: the
evaluator's own take minutes on a map of 320 x 320. So is what it gets wrong (onnx 1.23.2): LRN
normalises as many channels as the batch has samples, Erf and so Gelu round to float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from sparsegraph.errors import UnsupportedError, message
from sparsegraph.verify import Feed, Outputs, compare

Array = NDArray[np.float64]
_ROUNDINGS = 8  # each model rounds in its own way; of ten draws of PP-OCR recognisers at most 3.1
LARGEST = 5e-2  # distance that rounding may explain
_FLOATS, _DOUBLE = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16), onnx.TensorProto.DOUBLE


def run(model: ir.Model, feed: Feed) -> Outputs:
    """Outputs in float64. Raises UnsupportedError where the evaluator lacks an operator."""
    given = {k: v.astype(np.float64) if v.dtype.kind == "f" else v for k, v in feed.items()}
    return evaluate(widened(ir.to_proto(model)), given, OPERATORS)


@dataclass(frozen=True)
class Look:
    """Two models in float64, where float32 does not tell whether they are the same."""

    exact: float
    """Their distance, max|a-b| / max|b|."""
    rounding: float
    """Of the second, between float32 and float64."""

    def explains(self, error: float) -> bool:
        """True when a distance in float32 is no more than what rounding does to two models."""
        return error <= min(_ROUNDINGS * self.rounding, LARGEST)


def look(a: ir.Model, b: ir.Model, feed: Feed, found: Outputs) -> Look | None:
    """Both models in float64; `found` is what `b` gives in float32. None where it cannot be."""
    try:
        want = run(b, feed)
        exact = compare(run(a, feed), want)
    except UnsupportedError:
        return None
    wide = {k: v.astype(want[k].dtype) for k, v in found.items()}
    return Look(exact, compare(wide, want))


def evaluate(model: onnx.ModelProto, feed: Feed, operators: Sequence[type[OpRun]]) -> Outputs:
    """Outputs by name, with these operators in place of the evaluator's own."""
    try:
        evaluator = ReferenceEvaluator(model, new_ops=list(operators))
        with np.errstate(all="ignore"):  # its Sigmoid computes both of two forms
            results = evaluator.run(None, feed)
    except Exception as error:
        found = f"{type(error).__name__}: {error}".splitlines()[0]
        need = "operators of ONNX's reference evaluator"
        raise UnsupportedError(
            message("model", model.graph.name, found, need, "compare in float32")
        ) from error
    return dict(zip([o.name for o in model.graph.output], results))


def widened(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with float64 where it had float32 or float16."""
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    graph = wide.graph
    del graph.value_info[:]
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type in _FLOATS:
            value.type.tensor_type.elem_type = _DOUBLE
    for tensor in graph.initializer:
        _widen(tensor)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                _widen(attribute.t)
            elif attribute.name in ("to", "dtype") and attribute.i in _FLOATS:
                attribute.i = _DOUBLE
    return wide


def _widen(tensor: onnx.TensorProto) -> None:
    if tensor.data_type in _FLOATS:
        array = numpy_helper.to_array(tensor).astype(np.float64)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


class Conv(OpRun):
    """Any convolution over maps or lines: one product per kernel tap."""

    op_domain = ""

    @staticmethod
    def product(taps: Any, parts: Any) -> Any:
        """Products of matrices, [..., m, k] times [..., k, n]."""
        return taps @ parts

    def _run(self, x: Array, w: Array, b: Array | None = None, **given: Any) -> tuple[Array]:
        windows = _windows(x, w.shape[2:], given, 0.0)
        group, n_out = given.get("group") or 1, w.shape[0]
        taps = np.moveaxis(w.reshape(group, n_out // group, w.shape[1], -1), -1, 0)
        total: Any = 0.0
        for tap, window in zip(taps, windows):
            parts = window.reshape(len(x), group, x.shape[1] // group, -1)
            total = total + self.product(tap, parts)
        size = windows[0].shape[2:]
        y = total.reshape(len(x), n_out, *size)
        return (y if b is None else y + b.reshape(-1, *[1] * len(size)),)


class Erf(OpRun):
    """The error function."""

    op_domain = ""

    def _run(self, x: Array) -> tuple[Array]:
        from scipy.special import erf

        return (erf(x),)


class Gelu(OpRun):
    """x times the share of a normal distribution below x, or the approximation of that."""

    op_domain = ""

    def _run(self, x: Array, approximate: str = "none") -> tuple[Array]:
        from scipy.special import expit, ndtr

        if approximate == "tanh":
            return (x * expit((x + 0.044715 * x**3) * np.sqrt(8 / np.pi)),)
        return (x * ndtr(x),)


class LRN(OpRun):
    """A norm over neighbouring channels."""

    op_domain = ""

    def _run(
        self, x: Array, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0, size: int = 1
    ) -> tuple[Array]:
        wide = np.pad(x**2, [(0, 0), ((size - 1) // 2, size // 2), *[(0, 0)] * (x.ndim - 2)])
        total = sum(wide[:, at : at + x.shape[1]] for at in range(size))
        return (x / (bias + alpha / size * total) ** beta,)


class AveragePool(OpRun):
    """The mean of every window, padding counted if told so."""

    op_domain = ""

    def _run(self, x: Array, count_include_pad: int = 0, **given: Any) -> tuple[Array]:
        windows = _windows(x, given["kernel_shape"], given, 0.0)
        total: Any = sum(windows)
        if not count_include_pad:
            inside = _windows(np.ones_like(x[:1, :1]), given["kernel_shape"], given, 0.0)
            return (total / sum(inside),)
        if given.get("ceil_mode"):
            raise NotImplementedError("AveragePool that counts padding, rounded up")
        return (total / len(windows),)


class MaxPool(OpRun):
    """The largest of every window."""

    op_domain = ""

    def _run(self, x: Array, **given: Any) -> tuple[Array]:
        windows = _windows(x, given["kernel_shape"], given, -np.inf)
        return (np.max(windows, axis=0),)


class Resize(OpRun):
    """Nearest neighbours; anything else is refused."""

    op_domain = ""

    def _run(
        self, x: Array, roi: Array | None = None, scales: Array | None = None,
        sizes: Array | None = None, **given: Any,
    ) -> tuple[Array]:  # fmt: skip
        modes = ("mode", "coordinate_transformation_mode", "nearest_mode")
        how = " ".join(str(given.get(name)) for name in modes)
        if how not in _SHIFTS or given.get("axes"):
            raise NotImplementedError(f"Resize: {how}")
        half, down = _SHIFTS[how]
        factors = scales if scales is not None and scales.size else sizes / np.array(x.shape)
        for axis, factor in enumerate(factors):
            place = (np.arange(int(x.shape[axis] * factor)) + half) / factor - half
            at = np.floor(place) if down else np.ceil(place - 0.5)
            x = np.take(x, np.clip(at, 0, x.shape[axis] - 1).astype(int), axis)
        return (x,)


OPERATORS: tuple[type[OpRun], ...] = (AveragePool, Conv, Erf, Gelu, LRN, MaxPool, Resize)

_SHIFTS = {
    "nearest asymmetric floor": (0.0, True),
    "nearest asymmetric round_prefer_floor": (0.0, False),
    "nearest half_pixel round_prefer_floor": (0.5, False),
}
"""Where the middle of a pixel lies, and whether places between pixels round down."""


def _windows(
    x: Array, kernel: tuple[int, ...], given: Mapping[str, Any], fill: float
) -> list[Array]:
    """For every kernel tap what it meets, [batch, channels, *out]."""
    rank = len(kernel)
    strides, dilations = (given.get(k) or [1] * rank for k in ("strides", "dilations"))
    before, after = _pads(x.shape[2:], kernel, strides, dilations, given)
    ceil = given.get("ceil_mode") or 0
    room = [s if ceil else 0 for s in strides]
    width = [(0, 0), (0, 0), *zip(before, [a + r for a, r in zip(after, room)])]
    wide = np.pad(x, width, constant_values=fill)
    sizes = []
    for n, b, a, k, s, d in zip(x.shape[2:], before, after, kernel, strides, dilations):
        left = n + b + a - d * (k - 1) - 1
        size = (-(-left // s) if ceil else left // s) + 1
        sizes.append(size - (ceil and (size - 1) * s >= n + b))  # none starts behind the map
    found = []
    for at in product(*map(range, kernel)):
        starts = [i * d for i, d in zip(at, dilations)]
        cuts = [slice(b, b + s * n, s) for b, s, n in zip(starts, strides, sizes)]
        found.append(wide[(slice(None), slice(None), *cuts)])
    return found


def _pads(
    size: tuple[int, ...], kernel: tuple[int, ...], strides: list[int], dilations: list[int],
    given: Mapping[str, Any],
) -> tuple[list[int], list[int]]:  # fmt: skip
    auto = given.get("auto_pad") or "NOTSET"
    rank = len(kernel)
    if not auto.startswith("SAME"):
        pads = list(given.get("pads") or [0] * 2 * rank)
        return pads[:rank], pads[rank:]
    need = [
        max(0, (-(-n // s) - 1) * s + d * (k - 1) + 1 - n)
        for n, k, s, d in zip(size, kernel, strides, dilations)
    ]
    small = [n // 2 for n in need]
    large = [n - s for n, s in zip(need, small)]
    return (small, large) if auto == "SAME_UPPER" else (large, small)
