"""LSTM and GRU kernels against float64: sizes off every multiple, both directions, long runs."""

from functools import cache

import numpy as np
import pytest
from sparsegraph.targets import host
from sparsegraph.targets.kernels import recurrent, slots
from sparsegraph.targets.kernels.recurrent import GATES, Recurrent

from sparsegraph import targets

TARGET = targets.native()
LANES = TARGET.lanes
REVERSE = {0: [True, True], 1: [False, True], 2: [False, False]}


@cache
def library(kernel: Recurrent) -> host.Library:
    return host.Library([kernel], TARGET)


def streams(kernel: Recurrent, weights: np.ndarray) -> list[np.ndarray]:
    packed = (
        recurrent.pack_coded(weights, kernel) if kernel.coded else [recurrent.pack(weights, kernel)]
    )
    return [host.aligned(array) for array in packed]


@pytest.mark.parametrize("kernel", [*recurrent.kernels(LANES), Recurrent("lstm", LANES, 1, True)])
@pytest.mark.parametrize(
    ("steps", "images", "units"), [(1, 1, 1), (3, 2, 5), (7, 1, 67), (90, 3, 32)]
)
@pytest.mark.parametrize("reverse", REVERSE)
def test_a_sequence_equals_the_reference(
    kernel: Recurrent, steps: int, images: int, units: int, reverse: int
) -> None:
    rng = np.random.default_rng(units)
    n = GATES[kernel.kind] * units
    gates = rng.standard_normal((steps, images, 2, n)).astype(np.float32) * 2
    weights = (rng.standard_normal((2, n, units)) / np.sqrt(units)).astype(np.float32)
    if kernel.coded:
        weights[rng.random(weights.shape) < 0.7] = 0
    h0, c0 = rng.standard_normal((2, 2, images, units)).astype(np.float32)
    bias = rng.standard_normal((2, units)).astype(np.float32)
    y, h, c = (host.empty(size) for size in (steps * h0.size, h0.size, h0.size))
    scratch = host.empty(kernel.scratch_bytes(units) // 4)
    own = {"lstm": [c, host.aligned(c0)], "gru": [host.aligned(bias)], "reset": []}[kernel.kind]
    library(kernel).call(
        kernel, y, host.aligned(gates), h, host.aligned(h0), *own,
        *streams(kernel, weights), scratch, steps, 2, images, units,
        kernel.panels(units), reverse, end=2 * images,
    )  # fmt: skip
    want = recurrent.reference(kernel.kind, gates, weights, h0, c0, bias, REVERSE[reverse])
    np.testing.assert_allclose(y.reshape(want[0].shape), want[0], atol=3e-6)
    np.testing.assert_allclose(h.reshape(h0.shape), want[1], atol=3e-6)
    if kernel.kind == "lstm":
        np.testing.assert_allclose(c.reshape(h0.shape), want[2], atol=1e-5)


@pytest.mark.parametrize("kernel", recurrent.kernels(LANES))
def test_not_a_number_stays_in_its_sequence(kernel: Recurrent) -> None:
    n, units = GATES[kernel.kind] * 9, 9
    gates = np.zeros((2, 2, 1, n), np.float32)
    gates[0, 1] = np.nan
    zeros = np.zeros((1, 2, units), np.float32)
    y, h, c = (host.empty(size) for size in (2 * zeros.size, zeros.size, zeros.size))
    shift = host.aligned(zeros[0, :1])
    own = {"lstm": [c, host.aligned(zeros)], "gru": [shift], "reset": []}[kernel.kind]
    weights = streams(kernel, np.zeros((1, n, units), np.float32))
    library(kernel).call(
        kernel, y, host.aligned(gates), h, host.aligned(zeros), *own, *weights,
        host.empty(kernel.scratch_bytes(units) // 4), 2, 1, 2, units, kernel.panels(units), 1,
        end=2,
    )  # fmt: skip
    found = y.reshape(2, 2, units)
    assert np.isnan(found[:, 1]).all()
    assert not found[:, 0].any()


@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize("kept", [0.0, 0.1, 1.0])
def test_slots_hold_every_value_once(rows: int, kept: float) -> None:
    rng = np.random.default_rng(rows)
    weight = rng.standard_normal((37, 50)).astype(np.float32)
    weight[rng.random(weight.shape) >= kept] = 0
    packed = slots.pack_slots(weight, rows)
    found = np.zeros((-(-37 // rows) * rows, 50), np.float32)
    for i, panel in enumerate(packed.order):
        for slot in range(*(4 * packed.starts[i : i + 2])):
            found[panel * rows :][:rows, packed.columns[slot]] += packed.values[slot]
    np.testing.assert_array_equal(found[:37], weight)
    assert not found[37:].any()
    assert (np.diff(packed.starts) >= 0).all()
    assert sorted(packed.order) == list(range(len(packed.order)))
    assert len(packed.values) - slots.n_slots(weight, rows) < 4 * len(packed.order)
    assert (np.diff(np.diff(packed.starts)) >= 0).all(), "panels of a length lie together"
