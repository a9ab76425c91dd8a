"""Attention kernels against float64: odd sizes, grouped heads, every kind of mask."""

from functools import cache

import numpy as np
import pytest
from sparsegraph.targets import host
from sparsegraph.targets.kernels import convert
from sparsegraph.targets.kernels.attention import Attention, reference, shape_for
from sparsegraph.targets.layout import FeatureMajor, blocked

from sparsegraph import targets

TARGET = targets.native()
CASES = [  # images, heads, key heads, queries, keys, depth, value depth
    (1, 2, 2, 49, 49, 8, 8),
    (2, 4, 2, 33, 70, 5, 9),
    (1, 1, 1, 1, 3, 4, 4),
    (1, 3, 3, 128, 128, 32, 32),
    (1, 2, 1, 197, 130, 16, 16),
]


@cache
def library(kernel: Attention) -> host.Library:
    return host.Library([kernel], TARGET)


def pack(values: np.ndarray) -> tuple[np.ndarray, FeatureMajor]:
    """[images, heads, points, depth] -> heads side by side as features."""
    images, heads, points, depth = values.shape
    layout = blocked(images, heads * depth, points, 2, TARGET)
    planes = values.transpose(0, 1, 3, 2).reshape(images, heads * depth, points)
    return host.aligned(convert.pack(planes, layout, fill=0.5)), layout


def attend(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, mask: np.ndarray | None = None
) -> np.ndarray:
    """The kernel on [images, heads, points, depth]; a mask per key or, with queries, in full."""
    images, heads, queries, depth = q.shape
    key_heads, keys, value_depth = v.shape[1:]
    (qf, ql), (kf, kl), (vf, vl) = pack(q), pack(k), pack(v)
    yl = blocked(images, heads * value_depth, queries, 2, TARGET)
    y = host.empty(yl.size)
    vectors = ql.block // TARGET.lanes
    kind, mask_args = "none", ()
    if mask is not None and mask.shape[2] == 1:
        kind, mask_args = "key", (host.aligned(mask.astype(np.float32)), keys)
    elif mask is not None:
        planes = mask.reshape(heads, queries, keys).transpose(0, 2, 1).astype(np.float32)
        layout = blocked(heads, keys, queries, 2, TARGET)
        flat = host.aligned(convert.pack(planes, layout))
        kind, mask_args = "full", (flat, 0, layout.image, layout.tile, layout.row)
    kernel = Attention(vectors, TARGET.lanes, *shape_for(vectors, TARGET), kl.block, kind)
    sides = []
    for flat, fm, d in ((y, yl, value_depth), (qf, ql, depth), (kf, kl, depth),
                        (vf, vl, value_depth)):  # fmt: skip
        sides += [flat, fm.image, d * fm.row, fm.tile, fm.row]
    scratch = host.empty(kernel.scratch_bytes(depth) // 4)
    library(kernel).call(
        kernel, *sides, scratch, scale, heads, heads // key_heads, ql.tiles, keys, depth,
        value_depth, *mask_args, end=images * heads * ql.tiles,
    )  # fmt: skip
    return convert.unpack(y, yl).reshape(images, heads, value_depth, queries).swapaxes(2, 3)


@pytest.mark.parametrize("mask_kind", ["none", "key", "full"])
@pytest.mark.parametrize("case", CASES)
def test_attention_equals_the_reference(case: tuple[int, ...], mask_kind: str) -> None:
    images, heads, key_heads, queries, keys, depth, value_depth = case
    rng = np.random.default_rng(hash(case) % 1000)
    q = rng.standard_normal((images, heads, queries, depth)).astype(np.float32)
    k = rng.standard_normal((images, key_heads, keys, depth)).astype(np.float32)
    v = rng.standard_normal((images, key_heads, keys, value_depth)).astype(np.float32)
    mask = None
    if mask_kind == "key":
        mask = np.where(rng.random((images, 1, 1, keys)) < 0.3, -1e4, 0)
        mask[..., 0] = 0
    if mask_kind == "full":
        mask = np.where(rng.random((1, heads, queries, keys)) < 0.3, -np.inf, 0.25)
        mask[..., 0] = 0
        mask[:, 0, 0] = -np.inf  # a row without any key gives zeros
    scale = 1 / np.sqrt(depth)
    got = attend(q, k, v, scale, mask)
    share = np.arange(heads) // (heads // key_heads)
    expected = reference(q, k[:, share], v[:, share], scale, mask)
    bound = 1e-6 * np.abs(v).max() * np.sqrt(keys) + 1e-6
    assert np.abs(got - expected).max() <= bound


@pytest.mark.parametrize("shift", [-500, 500])
def test_the_largest_score_may_be_anywhere(shift: int) -> None:
    """Each query has one key far above the others, and all scores lie far from zero."""
    queries, keys = 49, 130
    at = np.random.default_rng(3).permutation(keys)[:queries]
    q = np.concatenate([np.eye(queries), np.ones((queries, 1))], 1)[None, None]
    k = np.full((keys, queries + 1), -300.0)
    k[at, np.arange(queries)] = 300
    k[:, -1] = shift
    v = np.random.default_rng(4).standard_normal((1, 1, keys, 8)).astype(np.float32)
    got = attend(q.astype(np.float32), k[None, None].astype(np.float32), v, 1.0)
    np.testing.assert_allclose(got[0, 0], v[0, 0, at], rtol=1e-5)
