"""Movement kernels are exact: every case against NumPy or ONNX Runtime (Pad, Resize)."""

import itertools

import numpy as np
import onnx
import onnxruntime
import pytest
from sparsegraph.targets import emit, host, layout
from sparsegraph.targets.kernel import prim_func
from sparsegraph.targets.kernels import convert, movement
from sparsegraph.targets.kernels.movement import Axis, Call, GatherElements, GatherRows

from sparsegraph import targets

TARGET = targets.get("native")
RNG = np.random.default_rng(5)


def sample(shape: tuple[int, ...], dtype: str = "float32") -> np.ndarray:
    return RNG.integers(0, 2 if dtype == "bool" else 1000, shape).astype(dtype)


def depth(x: np.ndarray, b: int, mode: str) -> np.ndarray:
    n, c, h, w = x.shape
    if mode == "DCR":
        t = x.reshape(n, b, b, c // b**2, h, w).transpose(0, 3, 4, 1, 5, 2)
    else:
        t = x.reshape(n, c // b**2, b, b, h, w).transpose(0, 1, 4, 2, 5, 3)
    return t.reshape(n, c // b**2, h * b, w * b)


def space(x: np.ndarray, b: int) -> np.ndarray:
    n, c, h, w = x.shape
    t = x.reshape(n, c, h // b, b, w // b, b).transpose(0, 3, 5, 1, 2, 4)
    return t.reshape(n, c * b * b, h // b, w // b)


X3, X4 = sample((5, 9, 33)), sample((2, 12, 6, 10))
TURNED = [(17, 23), (8, 8), (64, 100), (3, 40), (40, 3)]
REFLECT = [None, movement.pad_table(9, 2, 1, "reflect"), movement.pad_table(33, 1, 3, "edge")]
CASES: list[tuple[str, np.ndarray, Call, np.ndarray]] = [
    *(
        (f"perm{p}", X4, movement.transpose("float32", X4.shape, p), X4.transpose(p))
        for p in itertools.permutations(range(4))
    ),
    *(
        (f"turn{s}", x, movement.transpose("float32", s, (1, 0)), x.T)
        for s in TURNED
        for x in [sample(s)]
    ),
    *(
        (f"{d}-turn", x, movement.transpose(d, (17, 23), (1, 0)), x.T)
        for d in ("int64", "bool", "int32")
        for x in [sample((17, 23), d)]
    ),
    (
        "slice", X3,
        movement.region("float32", (2, 9, 11), (0, 0, 0), X3.shape, (4, 8, 1), (2, 9, 11),
                        (-3, -1, 3)),
        X3[4:0:-3, ::-1, 1:33:3],
    ),
    ("expand", X3[:, :1], movement.expand("float32", (5, 1, 33), (2, 5, 7, 33)),
     np.broadcast_to(X3[:, :1], (2, 5, 7, 33))),
    ("expand-last", X3[:, :, :1], movement.expand("float32", (5, 9, 1), (5, 9, 20)),
     np.broadcast_to(X3[:, :, :1], (5, 9, 20))),
    ("fill", X3[:1, :1, :1], movement.expand("float32", (), (4, 50)),
     np.full((4, 50), X3[0, 0, 0])),
    ("tile", X3, movement.tile("float32", X3.shape, (2, 1, 3)), np.tile(X3, (2, 1, 3))),
    ("gather", X3, movement.take("float32", X3.shape, [None, [3, -1, 3, 0], None]),
     X3[:, [3, -1, 3, 0]]),
    ("gather-last", X3, movement.take("float32", X3.shape, [None, None, [32, 0, 5]]),
     X3[:, :, [32, 0, 5]]),
    ("gather-one", X3, movement.take("float32", X3.shape, [[3], None, None]), X3[[3]]),
    ("gather-one-of-each", X3, movement.take("float32", X3.shape, [[-1], [2], [5]]),
     X3[[-1], [2], [5]]),
    ("gather-two", X3, movement.take("float32", X3.shape, [[4, 0], [1, 2, 1], None]),
     X3[[4, 0]][:, [1, 2, 1]]),
    ("pad", X3, movement.take("float32", X3.shape, REFLECT), X3[:, REFLECT[1]][:, :, REFLECT[2]]),
    *(
        (f"depth-{m}", X4, movement.depth_to_space("float32", X4.shape, 2, m), depth(X4, 2, m))
        for m in ("DCR", "CRD")
    ),
    ("space", X4, movement.space_to_depth("float32", X4.shape, 2), space(X4, 2)),
    ("one", X3[:1, :1, :1], movement.transpose("float32", (1, 1), (1, 0)), X3[0, 0, :1]),
]  # fmt: skip
JOINED = [sample((3, n, 7)) for n in (1, 4, 2)]
CONCAT = movement.concat("float32", [x.shape for x in JOINED], 1)
SPLIT = movement.split("float32", (3, 7, 7), -2, (1, 4, 2))
PADS = [(0, 1, 2, 0, 3, 1), (0, -1, 2, 0, -2, -3)]
PADDED = [call for pads in PADS for call in movement.pad_constant("float32", X3.shape, pads)]
LAYOUTS = [
    make(2, features, points, 1, TARGET)
    for make in (layout.planar, layout.blocked)
    for features, points in ((3, 130), (9, 49), (5, 3))
]
COPIES = [
    call
    for where in LAYOUTS
    for order in ("planes", "tokens")
    for to in (True, False)
    for call in movement.feature_axes(where, order, to)
]


@pytest.fixture(scope="module")
def library() -> host.Library:
    planned = [c[2] for c in CASES] + CONCAT + SPLIT + PADDED + COPIES
    return host.Library([*(c.kernel for c in planned), *movement.KERNELS], TARGET)


def run(library: host.Library, call: Call, y: np.ndarray, x: np.ndarray) -> None:
    half = call.items // 2
    for begin, end in ((0, half), (half, call.items)):
        library.call(
            call.kernel, y[call.y_offset :], host.aligned(x)[call.x_offset :],
            *call.tables, *call.scalars, begin=begin, end=end,
        )  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda c: c[0])
def test_move(case: tuple, library: host.Library) -> None:
    _, x, call, expected = case
    y = host.empty(expected.size + 16, x.dtype)
    y[expected.size :] = 1
    run(library, call, y, x)
    np.testing.assert_array_equal(y[: expected.size].reshape(expected.shape), expected)
    assert (y[expected.size :] == 1).all(), "wrote past the end"


def test_concat_and_split(library: host.Library) -> None:
    y = host.empty(3 * 7 * 7)
    for call, x in zip(CONCAT, JOINED):
        run(library, call, y, x)
    np.testing.assert_array_equal(y.reshape(3, 7, 7), np.concatenate(JOINED, 1))
    for call, x in zip(SPLIT, JOINED):
        part = host.empty(x.size)
        run(library, call, part, y.copy())
        np.testing.assert_array_equal(part.reshape(x.shape), x)


@pytest.mark.parametrize("i", range(len(PADS)))
def test_pad_constant(i: int, library: host.Library) -> None:
    node = onnx.helper.make_node("Pad", ["x", "p", "v"], ["y"])
    expected = by_runtime(node, x=X3, p=np.array(PADS[i]), v=np.array(-3, np.float32))
    fill, inside = PADDED[2 * i : 2 * i + 2]
    y = host.empty(expected.size)
    run(library, fill, y, np.full(1, -3, np.float32))
    run(library, inside, y, X3)
    np.testing.assert_array_equal(y.reshape(expected.shape), expected)


def by_runtime(node: onnx.NodeProto, **feeds: np.ndarray) -> np.ndarray:
    """The value of one node by ONNX Runtime."""
    infos = [
        onnx.helper.make_tensor_value_info(
            k, onnx.helper.np_dtype_to_tensor_dtype(v.dtype), v.shape
        )
        for k, v in feeds.items()
    ]
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    graph = onnx.helper.make_graph([node], "g", infos, [out])
    opset = [onnx.helper.make_opsetid("", 19)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=9)
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, feeds)[0]


@pytest.mark.parametrize("where", LAYOUTS, ids=str)
@pytest.mark.parametrize("order", ["planes", "tokens"])
def test_layouts(where: layout.FeatureMajor, order: str, library: host.Library) -> None:
    planes = sample((2, where.features, where.points))
    x = planes if order == "planes" else np.ascontiguousarray(planes.transpose(0, 2, 1))
    memory = host.empty(where.size)
    for call in movement.feature_axes(where, order, True):
        run(library, call, memory, x)
    np.testing.assert_array_equal(convert.unpack(memory, where), planes)
    back = host.empty(x.size)
    for call in movement.feature_axes(where, order, False):
        run(library, call, back, memory)
    np.testing.assert_array_equal(back.reshape(x.shape), x)


@pytest.mark.parametrize("n_out", [(4, 8), (4, 10), (7, 3), (5, 5), (5, 1)], ids=str)
@pytest.mark.parametrize(
    "coordinate", ["half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners"]
)
@pytest.mark.parametrize("rounding", ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"])
def test_nearest_table(n_out: tuple[int, int], coordinate: str, rounding: str) -> None:
    n, out = n_out
    x = np.arange(n, dtype=np.float32)
    node = onnx.helper.make_node(
        "Resize", ["x", "", "s"], ["y"], mode="nearest", nearest_mode=rounding,
        coordinate_transformation_mode=coordinate,
    )  # fmt: skip
    scale = np.array([out / n], np.float32)
    expected = by_runtime(node, x=x, s=scale)
    if len(expected) != out:
        pytest.skip("the scale rounds to another extent")
    assert movement.nearest_table(n, out, float(scale[0]), coordinate, rounding) == list(expected)


@pytest.mark.parametrize("index", ["int32", "int64"])
@pytest.mark.parametrize("dtype", ["float32", "int64"])
@pytest.mark.parametrize("inner", [1, 3, 40])
def test_gather_rows(index: str, dtype: str, inner: int, library: host.Library) -> None:
    x = sample((3, 7, inner), dtype)
    indices = np.array([0, 6, -1, -7, 3], index)
    y = host.empty(3 * 5 * inner, dtype)
    sizes = (inner, 5, 7 * inner, 0, 7, inner)
    library.call(GatherRows(dtype, index), y, host.aligned(x), indices, *sizes, end=15)
    np.testing.assert_array_equal(y.reshape(3, 5, inner), x[:, indices])


def test_gather_clamps_wrong_indices(library: host.Library) -> None:
    x = sample((7, 2))
    indices = np.array([7, 10**12, -8, -(10**12)], np.int64)
    y = host.empty(8)
    library.call(GatherRows("float32"), y, host.aligned(x), indices, 2, 4, 14, 0, 7, 2, end=4)
    np.testing.assert_array_equal(y.reshape(4, 2), x[[6, 6, 0, 0]])


def test_gather_tuples(library: host.Library) -> None:
    x = sample((2, 3, 4, 5))
    indices = np.array([[[0, 1], [-1, 3]], [[2, -1], [1, 0]]], np.int64)
    y = host.empty(2 * 2 * 5)
    sizes = (5, 2, 60, 4, 3, 20, 4, 5)
    kernel = GatherRows("float32", "int64", 2)
    library.call(kernel, y, host.aligned(x), host.aligned(indices), *sizes, end=4)
    expected = np.stack([[x[b][tuple(m)] for m in indices[b]] for b in range(2)])
    np.testing.assert_array_equal(y.reshape(2, 2, 5), expected)


@pytest.mark.parametrize("inner", [1, 6])
def test_gather_elements(inner: int, library: host.Library) -> None:
    x = sample((3, 7, inner))
    indices = RNG.integers(-7, 7, (3, 4, inner))
    y = host.empty(indices.size)
    library.call(
        GatherElements("float32"), y, host.aligned(x), host.aligned(indices), 7, 4, inner, end=12
    )
    expected = np.take_along_axis(x, indices % 7, 1)
    np.testing.assert_array_equal(y.reshape(3, 4, inner), expected)


def test_axes_merge_and_turn() -> None:
    flat = movement.move("float32", [Axis(4, 15, 15), Axis(3, 5, 5), Axis(5, 1, 1)])
    assert flat.scalars == (1, 0, 0, 60, 1, 1)
    assert movement.transpose("float32", (2, 64, 300), (0, 2, 1)).kernel.inner == "turn"
    assert movement.transpose("int64", (2, 64, 300), (0, 2, 1)).kernel.inner == "stride"
    assert movement.transpose("float32", (2, 8, 12, 32), (0, 2, 1, 3)).kernel.inner == "run"


@pytest.mark.parametrize("name", ["aarch64", "x86-64-v4"])
def test_other_machines_compile(name: str, tmp_path) -> None:
    other = targets.get(name)
    kernels = movement.KERNELS[::3] + movement.KERNELS[9:10]
    emit.write_object({k.name: prim_func(k, other) for k in kernels}, other, tmp_path / "k.o")
    assert (tmp_path / "k.o").stat().st_size > 1000
