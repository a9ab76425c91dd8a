"""Gathered panels: convolutions against float64 over odd geometries, and where the copies read."""

import ctypes
import dataclasses
import math
import mmap
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sparsegraph.targets import host
from sparsegraph.targets.kernels import convert
from sparsegraph.targets.kernels.gather import FLAT, SLACK
from sparsegraph.targets.kernels.product import Product, joined
from sparsegraph.targets.layout import FeatureMajor, blocked, planar, planes
from sparsegraph.targets.target import Target

from sparsegraph import formats, targets
from sparsegraph.lower.builder import SLACK_BYTES
from sparsegraph.lower.gather import flat, segments, tables
from sparsegraph.lower.products import _columns_by_tile
from sparsegraph.lower.windows import Depth, Window, step_of
from tests.targets.test_product import SPARING, bound, library, sparse

TARGET = targets.native()
SCALAR = dataclasses.replace(SPARING, lanes=1, joined=1, segment=16)
GEOMETRIES = [  # size, kernel, stride, dilation, pads
    ((14, 14), (3, 3), (1, 1), (1, 1), (1, 1, 1, 1)),
    ((7, 9), (3, 3), (1, 1), (1, 1), (1, 1, 1, 1)),
    ((3, 2), (5, 5), (1, 1), (1, 1), (2, 2, 2, 2)),
    ((20, 40), (3, 3), (1, 1), (2, 2), (2, 2, 2, 2)),
    ((12, 11), (2, 4), (1, 1), (1, 1), (0, 3, 2, 0)),
    ((1, 50), (1, 5), (1, 1), (1, 1), (0, 2, 0, 2)),
    ((9, 1), (3, 3), (1, 1), (1, 1), (1, 1, 1, 1)),
    ((17, 23), (5, 3), (2, 2), (1, 1), (2, 1, 2, 1)),
    ((56, 13), (1, 1), (2, 2), (1, 1), (0, 0, 0, 0)),
    ((32, 32), (4, 4), (4, 4), (1, 1), (0, 0, 0, 0)),
    ((9, 70), (2, 7), (1, 3), (1, 1), (0, 3, 1, 2)),
    ((10, 12), (3, 3), (1, 1), (1, 1), (0, 0, 0, 0)),
    ((7, 9), (3, 3), (1, 1), (1, 1), (1, 1, 1, 1), False, Depth(5, 3, 1, 1, 1, 1)),
    ((6, 5), (1, 1), (1, 1), (1, 1), (0, 0, 0, 0), False, Depth(7, 3, 1, 2, 1, 3)),
    ((8, 9), (3, 3), (1, 1), (1, 1), (0, 1, 1, 1), False, Depth(4, 4)),
    ((8, 9), (3, 3), (1, 1), (1, 1), (0, 1, 1, 1), False, Depth(5, 2)),
    ((9, 11), (3, 5), (1, 2), (2, 1), (1, 2, 2, 2), False, Depth(6, 2, 2, 3, 1, 1)),
]


def convolve(weight: np.ndarray, x: np.ndarray, window: Window) -> np.ndarray:
    """Direct convolution in float64: weight [O, C, *taps], x [C, *axes] -> [O, points]."""
    top, left, bottom, right = window.pads
    pads = ((0, 0), (window.depth.before, window.depth.after), (top, bottom), (left, right))
    volume = x.astype(np.float64).reshape(len(x), window.depth.size, *window.size)
    padded = np.pad(volume, pads)
    steps, extents = (window.depth.stride, *window.stride), window.extents
    taps = weight.reshape(*weight.shape[:2], *window.taps)
    out = np.zeros((len(weight), *extents))
    for at in np.ndindex(*window.taps):
        firsts = np.multiply(at, (window.depth.dilation, *window.dilation))
        cut = tuple(slice(f, f + (n - 1) * s + 1, s) for f, n, s in zip(firsts, extents, steps))
        out += np.einsum("oc,cdhw->odhw", taps[:, :, *at], padded[:, *cut])
    return out.reshape(len(weight), -1)


def run(
    weight_format: str, window: Window, weight: np.ndarray, x: np.ndarray, bias: np.ndarray,
    xl: FeatureMajor, target: Target = TARGET, memory: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """The convolution of planes x [images, channels, points] that lie as `xl` says.

    All memory that is not part of x is NaN: before it, between planes, behind it.
    """
    memory = host.empty(xl.size + 2 * 256) if memory is None else memory
    images, channels = x.shape[:2]
    points, taps = math.prod(window.extents), window.n_taps
    yl = blocked(images, len(weight), points, 1, target)
    lanes = target.lanes
    split = (yl.block // lanes,)
    step, n = step_of(window, xl, target), joined(split, target)
    kernel = Product(weight_format, 2, split, lanes, step, joined=n, line=target.panel_line)
    tile = 4 * taps  # 11 channels in tiles of 4: the last tile is narrow
    packer = formats.pack_coded if weight_format == "coded" else formats.pack_dense
    packed = packer(_columns_by_tile(weight, 4), 2, tile)
    gathered = tables(window, xl, yl, kernel.gather_lanes, target)
    memory[:] = np.nan
    memory[256 : 256 + xl.size] = convert.pack(x, xl, fill=np.nan)
    y = host.empty(yl.size + 64)
    args: list[Any] = [
        y, yl.image, yl.tile, yl.row, memory[256:], xl.image, xl.tile, xl.row, images, yl.tiles,
        channels * taps, tile, host.aligned(bias),
        *(host.aligned(array) for _, array in kernel.streams(packed)),
    ]  # fmt: skip
    panel = host.empty(kernel.panel_bytes(tile) // 4 + 64)
    args += [panel, kernel.panel_row, taps, *map(host.aligned, gathered)]
    library(kernel, target).call(kernel, *args, end=images * yl.tiles)
    return convert.unpack(y, yl)


@pytest.mark.parametrize(
    ("source", "target"),
    [(blocked, TARGET), (planar, TARGET), (planar, SPARING), (planar, SCALAR)],
    ids=["blocked", "planar", "planar, few instructions", "planar, scalar"],
)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("weight_format", ["dense", "coded"])
def test_convolution_gathers_its_panel(
    weight_format: str, geometry: Any, source: Any, target: Target
) -> None:
    window = Window(*geometry)
    rng = np.random.default_rng(5)
    channels, rows, images = 11, 6, 2
    weight = sparse((rows, channels, *window.weight_taps), 0.4, 5)
    x = rng.standard_normal((images, channels, window.depth.size, *window.size)).astype(np.float32)
    bias = rng.standard_normal(rows).astype(np.float32)
    xl = source(images, channels, math.prod(x.shape[2:]), 1, target)
    got = run(weight_format, window, weight, x.reshape(images, channels, -1), bias, xl, target)
    flat_weight = weight.reshape(rows, -1)
    limit = bound(flat_weight, np.full((flat_weight.shape[1], 1), np.abs(x).max()))
    for i in range(images):
        expected = convolve(weight, x[i], window) + bias[:, None]
        assert np.abs(got[i] - expected).max() <= limit


def ends_at_a_guard(size: int) -> np.ndarray:
    """Float32 values behind which any access faults."""
    page = mmap.PAGESIZE
    n_pages = -(-4 * size // page)
    raw = mmap.mmap(-1, (n_pages + 1) * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(raw))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(start + n_pages * page), page, 0) == 0
    return np.frombuffer(raw, np.float32)[: n_pages * page // 4][-size:]


def test_the_guard_faults() -> None:
    room = ends_at_a_guard(100)
    assert not faults(lambda: ctypes.string_at(room.ctypes.data, 400))
    assert faults(lambda: ctypes.string_at(room.ctypes.data, 401))


def faults(function: Callable[[], object]) -> bool:
    """True if the call ends a process of its own."""
    child = os.fork()
    if child == 0:
        os._exit(0 if function() is not None else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0


@pytest.mark.parametrize("lanes", [1, 8, 16])
@pytest.mark.parametrize(
    ("size", "stride"),
    [
        ((16, 16), (2, 2)),
        ((5, 37), (2, 2)),
        ((1, 450), (1, 70)),
        ((1, 500), (1, 30)),
        ((3, 70), (1, 20)),
        ((9, 9), (1, 1)),
    ],
)
def test_nothing_is_read_further_behind_than_temporaries_have_room(
    size: Any, stride: Any, lanes: int
) -> None:
    window = Window(size, (1, 3), stride, (1, 1), (0, 0, 0, 0))
    target = dataclasses.replace(TARGET, lanes=lanes, joined=1)
    rng = np.random.default_rng(0)
    weight = sparse((6, 11, 1, 3), 0.4, 5)
    x = rng.standard_normal((1, 11, *size)).astype(np.float32)
    xl = planes(1, 11, size[0] * size[1], 1, target)
    room = ends_at_a_guard(256 + xl.size + SLACK_BYTES // 4)
    call = partial(run, "coded", window, weight, x.reshape(1, 11, -1), np.zeros(6, np.float32), xl)
    got = call(target)
    assert np.abs(got[0] - convolve(weight, x[0], window)).max() <= 1e-5
    assert not faults(lambda: call(target, room))
    assert SLACK_BYTES == 4 * SLACK


def test_the_kind_of_copy_follows_the_geometry() -> None:
    def step(geometry: Any, source: Any) -> int:
        window = Window(*geometry)
        return step_of(window, source(1, 3, window.size[0] * window.size[1], 1, TARGET), TARGET)

    assert step(GEOMETRIES[0], planar) == FLAT
    assert step(GEOMETRIES[0], blocked) == 1 or blocked(1, 3, 196, 1, TARGET).is_planar
    assert step(GEOMETRIES[7], planar) == 2
    assert step(GEOMETRIES[11], planar) == 1  # the result is narrower


@st.composite
def flat_windows(draw: st.DrawFn) -> Window:
    """Stride 1, as wide as the source, any height; of volumes as high as the source, any depth."""
    depth = draw(st.integers(1, 6)) if draw(st.booleans()) else 1
    most = 40 if depth == 1 else 12
    size = draw(st.integers(1, most)), draw(st.integers(1, most))
    kernel = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    dilation = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    reach, span = ((k - 1) * d for k, d in zip(kernel, dilation))
    left = draw(st.integers(0, span))
    top = draw(st.integers(0, reach))
    if depth == 1:
        bottom = draw(st.integers(max(0, reach - top - size[0] + 1), reach))
        return Window(size, kernel, (1, 1), dilation, (top, left, bottom, span - left))
    n, step = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    before = draw(st.integers(0, (n - 1) * step))
    least = max(0, (n - 1) * step + 1 - depth - before)
    after = draw(st.integers(least, max(least, (n - 1) * step)))
    pads = (top, left, reach - top, span - left)
    return Window(
        size, kernel, (1, 1), dilation, pads, False, Depth(depth, n, 1, step, before, after)
    )


@settings(max_examples=150, deadline=None)
@given(window=flat_windows(), lanes=st.sampled_from([1, 4, 8, 16]))
def test_runs_copy_exactly_the_window_and_stay_near_the_source(window: Window, lanes: int) -> None:
    points = math.prod(window.extents)
    block = lanes * min(6, -(-points // lanes))
    y = FeatureMajor(1, 1, points, block, 0, 0, 0, 1)
    places, runs, masks = flat(window, y, lanes)
    size = window.depth.size * math.prod(window.size)
    for tap in range(window.n_taps):
        expected = np.full(y.tiles * block, -1)
        expected[:points] = window.sources(tap)
        for tile in range(y.tiles):
            kind, place = places[tile].tolist()
            source, mask, lead, first, stop = runs[kind + tap].tolist()
            source += place
            got = np.full(block + lanes, -1)
            spans = [(lead, block)] if lead >= 0 else []
            spans += [(v * lanes, v * lanes) for v in range(first, stop)]
            for at, bits in spans:
                reads = source + np.arange(at, at + lanes)
                assert reads[0] >= 0
                assert reads[0] < size
                keep = masks.ravel()[mask + bits : mask + bits + lanes] != 0
                got[at : at + lanes] = np.where(keep, reads, -1)
            got[stop * lanes :] = -1
            assert np.array_equal(got[:block], expected[tile * block :][:block])


def test_segments_of_a_strided_window() -> None:
    window = Window((4, 4), (1, 1), (2, 2), (1, 1), (0, 0, 0, 0))
    layout = FeatureMajor(1, 1, 16, 16, 0, 16, 16, 1)
    places, starts, rows = segments(window, layout, FeatureMajor(1, 1, 4, 8, 0, 8, 8, 1), 8, 4)
    assert rows.tolist() == [[0, 0, 1], [2, 8, 1]]
    assert starts.tolist() == [0, 2]
    assert places.tolist() == [[0, 0]]


def test_tiles_that_gather_alike_share_their_tables() -> None:
    """Above, inside and below, at the left, in the middle and at the right: nine kinds."""
    window = Window((32, 40), (3, 3), (2, 2), (1, 1), (1, 1, 1, 1))
    x = FeatureMajor(1, 1, 32 * 40, 4, 4, 4, 4, 1)
    x = dataclasses.replace(x, block=32 * 40)
    y = FeatureMajor(1, 1, 16 * 20, 4, 0, 4, 4, 1)
    places, starts, rows = segments(window, x, y, 1, 4)
    assert len(places) == 80
    assert len(set(places[:, 0].tolist())) == 4
    assert len(starts) == 4 * 9 + 1
    assert len(rows) == starts[-1]
    wide = Window((16, 20), (3, 3), (1, 1), (1, 1), (1, 1, 1, 1))
    places, runs, _ = flat(wide, y, 1)
    assert len(set(places[:, 0].tolist())) == 9
    assert len(runs) == 81
