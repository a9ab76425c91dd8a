"""Phases are exact, and convolutions over them equal ONNX Runtime over odd geometries."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from onnx import helper, numpy_helper
from sparsegraph.targets import host, runs_here
from sparsegraph.targets.kernels.phases import PHASES, Phases, reference

from sparsegraph import targets, verify
from sparsegraph.compile import Compiled, compile, load

NATIVE = targets.native()
MACHINES = [name for name in ("native", "x86-64-v3", "x86-64-v2") if runs_here(targets.get(name))]
pytestmark = pytest.mark.usefixtures("workspaces_of_nan")


@pytest.mark.parametrize("is_joined", [False, True])
@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_every_phase_holds_its_rows_and_columns(lanes: int, is_joined: bool) -> None:
    if lanes > NATIVE.lanes:
        pytest.skip(f"vectors of {lanes} values; this machine has {NATIVE.lanes}")
    kernel = Phases(lanes)
    machine = dataclasses.replace(NATIVE, joined=2 if is_joined else 1)
    library = host.Library([kernel], machine)
    rng = np.random.default_rng(3)
    for height, width in [(1, 1), (2, 2), (1, 9), (9, 1), (5, 8), (8, 5), (31, 33), (3, 64)]:
        images, channels, size, plane = 2, 3, height * width, kernel.plane(height, width)
        assert plane % 16 == 0
        row, gap = size + 5, 7  # between channels and between images
        x = np.full(images * (channels * row + gap) + 4 * lanes, np.nan, np.float32)
        maps = rng.standard_normal((images, channels, height, width)).astype(np.float32)
        for n, c in np.ndindex(images, channels):
            at = n * (channels * row + gap) + c * row
            x[at : at + size] = maps[n, c].ravel()
        y = np.full(images * channels * PHASES * plane + 16, 7.0, np.float32)
        strides = channels * PHASES * plane, PHASES * plane
        arguments = y, *strides, x, channels * row + gap, row, plane, height, width, channels
        library.call(kernel, *arguments, end=images * channels)
        assert (y[-16:] == 7).all(), "nothing is written behind the last plane"
        expected = reference(maps)
        down, across = expected.shape[-2:]
        got = y[:-16].reshape(images, channels, PHASES, plane)[..., : down * across]
        got = got.reshape(expected.shape)
        for odd_row, odd_column in np.ndindex(2, 2):
            rows, columns = (height + 1 - odd_row) // 2, (width + 1 - odd_column) // 2
            cut = (..., 2 * odd_row + odd_column, slice(rows), slice(columns))
            assert np.array_equal(got[cut], expected[cut])
            assert np.array_equal(got[cut], maps[..., odd_row::2, odd_column::2])


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(
    ("size", "taps", "pads", "dilation", "is_apart"),
    [
        ((56, 56), 3, (1, 1, 1, 1), 1, True),
        ((13, 41), 3, (1, 1, 1, 1), 1, True),
        ((40, 33), 7, (3, 3, 3, 3), 1, True),
        ((9, 64), 5, (0, 2, 0, 2), 1, True),  # the result has fewer rows than a phase
        ((20, 24), 5, (4, 2, 3, 1), 1, True),  # and more
        ((21, 17), 2, (0, 0, 1, 1), 1, True),
        ((16, 18), 3, (2, 2, 2, 2), 2, True),
        ((16, 18), 3, (0, 0, 0, 0), 1, False),  # its rows are shorter
        ((16, 18), 3, (1, 3, 1, 3), 1, False),  # and longer
        ((16, 18), 1, (0, 0, 0, 0), 1, False),
    ],
)
def test_strided_convolutions_read_phases(
    size: tuple[int, int], taps: int, pads: tuple[int, ...], dilation: int, is_apart: bool,
    machine: str,
) -> None:  # fmt: skip
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((20, 5, taps, taps)).astype(np.float32)
    weight[rng.random(weight.shape) >= 0.3] = 0
    x = rng.standard_normal((2, 5, *size)).astype(np.float32)
    compiled = convolution(weight, x, pads=pads, dilations=[dilation] * 2, target=machine)
    kernels = {s.kernel for s in compiled.session.profile({"x": x})}
    has_phases = any("phases" in name for name in kernels)
    assert has_phases == (is_apart and targets.get(machine).lanes >= 8)


def test_dilated_windows_do_not_tile_the_map() -> None:
    rng = np.random.default_rng(2)
    weight, x = rng.standard_normal((20, 5, 2, 2)), rng.standard_normal((2, 5, 8, 8))
    for dilation in (1, 2):
        convolution(weight.astype(np.float32), x.astype(np.float32), dilations=[dilation] * 2)


def convolution(
    weight: np.ndarray, x: np.ndarray, *, target: str = "native", **attributes: Any
) -> Compiled:
    """A compiled Relu and convolution of stride 2, compared with ONNX Runtime."""
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("Conv", ["r", "w"], ["y"], strides=[2, 2], **attributes),
    ]
    ends = (
        helper.make_tensor_value_info("x", 1, x.shape),
        helper.make_tensor_value_info("y", 1, None),
    )
    graph = helper.make_graph(
        nodes, "g", [ends[0]], [ends[1]], [numpy_helper.from_array(weight, "w")]
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    compiled = compile(proto, check=False, keep_native=True, fallback=False, target=target)
    expected = verify.run_onnx(load(proto), {"x": x})
    assert verify.compare({"y": compiled.run(None, {"x": x})[0]}, expected) <= 1e-5
    return compiled
