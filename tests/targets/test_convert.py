"""Layout changes move every value, write zeros as padding and nothing outside row-major values."""

import numpy as np
import pytest
from sparsegraph.targets import emit, host
from sparsegraph.targets.kernel import prim_func
from sparsegraph.targets.kernels import convert
from sparsegraph.targets.kernels.convert import Copy, Transpose
from sparsegraph.targets.layout import FeatureMajor, blocked, planar
from sparsegraph.targets.target import Target

from sparsegraph import targets

SIZES = [(1, 1, 1), (1, 3, 224), (2, 5, 7), (1, 17, 49), (3, 8, 8), (2, 33, 197), (1, 64, 130)]
CANARY = 7.5e8
GUARD = 64


@pytest.fixture(scope="module")
def machine() -> Target:
    return targets.native()


@pytest.fixture(scope="module")
def library(machine: Target) -> host.Library:
    kernels: list[Copy | Transpose] = convert.kernels(machine.lanes)
    whole = {blocked(*size, 1, machine).block // machine.lanes for size in SIZES}
    kernels += [Copy(e, machine.lanes, n) for e in ("source", "result") for n in sorted(whole)]
    return host.Library(kernels, machine)


def guarded(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A flat copy between canaries, and the whole memory."""
    memory = host.empty(values.size + 2 * GUARD)
    memory[:] = CANARY
    middle = memory[GUARD : GUARD + values.size]
    middle[:] = values.ravel()
    return middle, memory


def unharmed(memory: np.ndarray) -> bool:
    return bool((memory[:GUARD] == CANARY).all() and (memory[-GUARD:] == CANARY).all())


def layouts(size: tuple[int, int, int], machine: Target) -> list[FeatureMajor]:
    wide = blocked(size[0], size[1] + 3, size[2], 1, machine)
    return [make(*size, 1, machine) for make in (blocked, planar)] + [wide.slice(2, size[1])]


def is_padded_with_zeros(flat: np.ndarray, layout: FeatureMajor) -> bool:
    """True if the pad points of every tile of every feature are 0."""
    points = layout.tiles * layout.block
    padded = FeatureMajor(**{**layout.__dict__, "points": points})
    return bool((convert.unpack(flat, padded)[:, :, layout.points :] == 0).all())


def strides(layout: FeatureMajor) -> tuple[int, int, int]:
    return layout.image, layout.tile, layout.row


@pytest.mark.parametrize("is_whole", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_planes_round_trip(
    library: host.Library, machine: Target, size: tuple[int, int, int], is_whole: bool
) -> None:
    images, features, points = size
    values = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    for layout in layouts(size, machine):
        source, memory = guarded(values)
        flat = host.aligned(np.full(layout.offset + images * layout.image + GUARD, np.nan, "f4"))
        rest = (layout.tiles, features, points, layout.block)
        row_major = (features * points, layout.block, points)
        items = images * layout.tiles
        view = flat[layout.offset :]
        vectors = layout.block // machine.lanes if is_whole else 0
        library.call(
            Copy("source", machine.lanes, vectors), view, *strides(layout), source, *row_major,
            *rest, end=items,
        )  # fmt: skip
        np.testing.assert_array_equal(convert.unpack(flat, layout), values)
        assert is_padded_with_zeros(flat, layout)
        result, memory = guarded(np.zeros_like(values))
        library.call(
            Copy("result", machine.lanes, vectors), result, *row_major, view, *strides(layout),
            *rest, end=items,
        )  # fmt: skip
        np.testing.assert_array_equal(result.reshape(size), values)
        assert unharmed(memory)


@pytest.mark.parametrize("size", SIZES)
def test_tokens_round_trip(
    library: host.Library, machine: Target, size: tuple[int, int, int]
) -> None:
    images, features, points = size
    values = np.random.default_rng(1).standard_normal((images, points, features)).astype("f4")
    for layout in layouts(size, machine):
        source, memory = guarded(values)
        flat = host.aligned(np.full(layout.offset + images * layout.image + GUARD, np.nan, "f4"))
        view = flat[layout.offset :]
        rest = (layout.tiles, features, points, layout.block)
        tokens = (points * features, features)
        items = images * layout.tiles
        library.call(
            Transpose("feature", machine.lanes), view, *strides(layout), source, *tokens, *rest,
            end=items,
        )  # fmt: skip
        np.testing.assert_array_equal(convert.unpack(flat, layout), values.transpose(0, 2, 1))
        assert is_padded_with_zeros(flat, layout)
        result, memory = guarded(np.zeros_like(values))
        library.call(
            Transpose("tokens", machine.lanes), result, *tokens, view, *strides(layout), *rest,
            end=items,
        )  # fmt: skip
        np.testing.assert_array_equal(result.reshape(values.shape), values)
        assert unharmed(memory)


@pytest.mark.parametrize("size", SIZES)
def test_restride(library: host.Library, machine: Target, size: tuple[int, int, int]) -> None:
    values = np.random.default_rng(2).standard_normal(size).astype(np.float32)
    for source in layouts(size, machine):
        for target in layouts(size, machine):
            x = host.aligned(convert.pack(values, source))
            y = host.empty(target.offset + size[0] * target.image + GUARD)
            library.call(
                Copy("neither", machine.lanes), y[target.offset :], *strides(target),
                x[source.offset :], *strides(source), source.tiles, size[1], size[2],
                source.block, end=size[0] * source.tiles,
            )  # fmt: skip
            np.testing.assert_array_equal(convert.unpack(y, target), values)


def test_part_of_the_items_leaves_the_rest(library: host.Library, machine: Target) -> None:
    layout = blocked(1, 4, 300, 1, machine)
    values = np.ones((1, 4, 300), np.float32)
    y = host.empty(layout.size)
    library.call(
        Copy("source", machine.lanes), y, *strides(layout), host.aligned(values), 1200,
        layout.block, 300, layout.tiles, 4, 300, layout.block, begin=1, end=2,
    )  # fmt: skip
    done = convert.unpack(y, layout)[0, 0]
    np.testing.assert_array_equal(np.flatnonzero(done), np.arange(layout.block, 2 * layout.block))


@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_pack_is_the_inverse_of_unpack(lanes: int) -> None:
    layout = FeatureMajor(2, 3, 37, 2 * lanes, 3000, 3 * 40, 40, 1, offset=5)
    values = np.random.default_rng(3).standard_normal((2, 3, 37)).astype(np.float32)
    np.testing.assert_array_equal(convert.unpack(convert.pack(values, layout), layout), values)


@pytest.mark.parametrize("name", ["aarch64", "x86-64-v4"])
def test_compiles_for_other_machines(name: str) -> None:
    machine = targets.get(name)
    functions = {k.name: prim_func(k, machine) for k in convert.kernels(machine.lanes)}
    text = emit.assembly(functions, machine)
    assert all(f"{name}:" in text for name in functions)
