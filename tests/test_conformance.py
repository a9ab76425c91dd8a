"""ONNX's own node tests: a choice of them here, all with `python -m benchmarks.conformance`."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from benchmarks import conformance
from benchmarks.conformance import DECLINED, LEFT, NATIVE, SKIPPED, UNEQUAL
from sparsegraph import targets
from tests.targets import cross

NAMES = {  # test -> outcome as it is, and with constants
    "test_attention_3d": (NATIVE, NATIVE),
    "test_averagepool_3d_dilations_small": (NATIVE, NATIVE),
    "test_clip_example": (NATIVE, NATIVE),
    "test_constant_pad": (LEFT, NATIVE),
    "test_convtranspose": (LEFT, NATIVE),
    "test_gather_negative_indices": (NATIVE, NATIVE),
    "test_gru_seq_length": (LEFT, NATIVE),
    "test_lstm_defaults": (LEFT, NATIVE),
    "test_maxpool_2d_dilations": (NATIVE, NATIVE),
    "test_mod_mixed_sign_float32": (NATIVE, NATIVE),
    "test_reduce_max_bool_inputs": (LEFT, LEFT),
    "test_rms_normalization_2d_axis1": (LEFT, NATIVE),
    "test_resize_upsample_sizes_nearest": (LEFT, NATIVE),
    "test_sequence_insert_at_back": (SKIPPED, SKIPPED),
    "test_slice_negative_axes": (LEFT, NATIVE),
    "test_softmax_axis_1": (NATIVE, NATIVE),
}


ELSEWHERE = {  # with constants, in a bundle; the last has no input that is read
    "test_clip_default_int8_max": NATIVE,
    "test_maxpool_3d_default": NATIVE,
    "test_mod_uint8": NATIVE,
    "test_constant_pad": NATIVE,
    "test_acos": DECLINED,
    "test_shape_clip_start": NATIVE,
}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return {case.name: case for case in conformance.cases([*NAMES, *ELSEWHERE])}


@pytest.mark.parametrize("constants", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_outcomes(name: str, constants: bool, found: dict[str, Any]) -> None:
    outcome = conformance.attempt(found[name], constants=constants)
    assert outcome.kind == NAMES[name][constants], outcome.note


@pytest.mark.parametrize("target", ["c11", "armv7", "wasm"])
@pytest.mark.parametrize("name", ELSEWHERE)
def test_outcomes_on_other_machines(name: str, target: str, found: dict[str, Any]) -> None:
    cross.require_for(targets.get(target))
    outcome = conformance.attempt(found[name], constants=True, target=targets.get(target))
    assert outcome.kind == ELSEWHERE[name], outcome.note


def test_other_values_are_unequal(found: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    case = found["test_softmax_axis_1"]
    ((given, (wanted,)),) = case.data_sets
    wrong = dataclasses.replace(case, data_sets=[(given, [wanted + 1])])
    assert conformance.attempt(wrong).kind == NATIVE  # ONNX Runtime says what we say
    monkeypatch.setattr(conformance, "_agrees", lambda *_: False)
    assert conformance.attempt(wrong).kind == UNEQUAL
    assert conformance.attempt(case).kind == NATIVE


def test_types_and_shapes_count() -> None:
    one = np.ones(3, np.float32)
    assert conformance.is_equal([one], [one + 1e-5])
    assert conformance.is_equal([one * np.nan], [one * np.nan])
    for other in (one + 1e-2, one[:2], one.astype("f8"), one * np.nan):
        assert not conformance.is_equal([one], [other])
    assert not conformance.is_equal([one], [])
