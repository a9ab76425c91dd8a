import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparsegraph.sparsity import analyze, layers

SHAPE = (128, 192)


def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def random_zeros(density: float, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return rng().normal(size=shape) * (rng().random(shape) < density)


def n_of_m(n: int, m: int, shape: tuple[int, int] = SHAPE) -> np.ndarray:
    w = rng().normal(size=shape)
    groups = w.reshape(shape[0], -1, m)
    smallest = np.argsort(np.abs(groups), axis=2)[:, :, : m - n]
    np.put_along_axis(groups, smallest, 0.0, axis=2)
    return groups.reshape(shape)


def blocks(r: int, c: int, density: float, shape: tuple[int, int] = SHAPE) -> np.ndarray:
    kept = rng().random((shape[0] // r, shape[1] // c)) < density
    return rng().normal(size=shape) * np.kron(kept, np.ones((r, c)))


@pytest.mark.parametrize("density", [0.01, 0.1, 0.3, 0.5, 0.7, 0.9])
def test_random_zeros_are_unstructured(density: float) -> None:
    found = analyze(random_zeros(density))
    assert found.pattern == "unstructured"
    assert found.density == pytest.approx(np.count_nonzero(random_zeros(density)) / 24576)


def test_chance_alone_is_rarely_taken_for_structure() -> None:
    """200 small random weights of every density: a false alarm has a chance below 1e-6 each."""
    generator = np.random.default_rng(11)
    for _ in range(200):
        shape = (int(generator.integers(4, 40)), int(generator.integers(4, 40)))
        w = generator.random(shape) * (generator.random(shape) < generator.random())
        assert analyze(w).pattern in ("unstructured", "dense", "all zero", "dead channels"), shape


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (3, 8), (8, 16), (1, 32), (30, 32)])
def test_n_of_m_along_inputs(n: int, m: int) -> None:
    found = analyze(n_of_m(n, m))
    assert (found.pattern, found.n, found.m, found.axis) == ("N:M", n, m, "inputs")


def test_n_of_m_along_outputs() -> None:
    found = analyze(n_of_m(2, 4).T)
    assert (found.pattern, found.n, found.m, found.axis) == ("N:M", 2, 4, "outputs")


def test_n_of_m_of_a_convolution_counts_input_channels() -> None:
    w = n_of_m(2, 4, (32 * 9, 64)).reshape(32, 9, 64).transpose(0, 2, 1).reshape(32, 64, 3, 3)
    assert str(analyze(w)) == "2:4 along inputs"


def test_one_wrong_group_is_not_2_of_4() -> None:
    w = n_of_m(2, 4)
    w[5, :4] = 1.0
    found = analyze(w)
    assert (found.n, found.m) != (2, 4)


def test_dead_columns_are_not_taken_for_n_of_m() -> None:
    w = rng().normal(size=SHAPE)
    w[:, 2::4] = w[:, 3::4] = 0.0
    found = analyze(w)
    assert found.pattern == "dead channels"
    assert str(found) == "50.0 % zeros, 96 of 192 inputs dead"
    assert found.dead_columns[:3] == (2, 3, 6)


@pytest.mark.parametrize("rows", [2, 4, 8, 16])
@pytest.mark.parametrize("density", [0.1, 0.5])
def test_row_groups(rows: int, density: float) -> None:
    found = analyze(blocks(rows, 1, density))
    assert (found.pattern, found.block) == ("row-grouped", (rows, 1))


@pytest.mark.parametrize("block", [(1, 4), (4, 4), (8, 8), (16, 16), (8, 16), (32, 32)])
def test_blocks(block: tuple[int, int]) -> None:
    found = analyze(blocks(*block, density=0.4))
    assert (found.pattern, found.block) == ("blocks", block)


def test_blocks_that_store_many_zeros_do_not_count() -> None:
    w = blocks(4, 1, 0.1) * (np.random.default_rng(3).random(SHAPE) < 0.8)
    assert analyze(w).pattern != "row-grouped"


def test_row_groups_beside_dead_rows() -> None:
    w = blocks(4, 1, 0.2)
    w[:33] = 0.0
    found = analyze(w)
    assert found.block == (4, 1)
    assert found.dead_rows == tuple(range(33))


def test_whole_kernels() -> None:
    kept = rng().random((64, 64, 1, 1)) < 0.3
    assert analyze(rng().normal(size=(64, 64, 3, 3)) * kept).pattern == "kernels"


def test_dense_and_all_zero() -> None:
    assert str(analyze(np.ones((8, 8)))) == "dense"
    assert str(analyze(np.zeros((8, 8)))) == "100.0 % zeros, all zero"


def test_negative_zero_is_zero_and_small_is_not() -> None:
    w = np.full((4, 4), -0.0)
    w[0, 0] = 1e-30
    assert analyze(w).n_zero == 15


def test_zero_point_per_output() -> None:
    w = np.array([[3, 3, 9, 3], [0, 0, 3, 0]], dtype=np.uint8)
    assert analyze(w, zero=np.array([[3], [0]], dtype=np.uint8)).n_zero == 6
    assert analyze(w).n_zero == 3


def model_of(nodes, inputs, output, **arrays) -> ir.Model:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(k, TensorProto.FLOAT, v) for k, v in inputs.items()],
        [helper.make_tensor_value_info(k, TensorProto.FLOAT, v) for k, v in output.items()],
        [numpy_helper.from_array(a, name) for name, a in arrays.items()],
    )
    return ir.from_proto(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    )


def dead_row(shape: tuple[int, ...], axis: int) -> np.ndarray:
    """A dense weight whose index 1 along `axis` is zero."""
    w = np.ones(shape, np.float32)
    w[(slice(None),) * axis + (1,)] = 0.0
    return w


@pytest.mark.parametrize(
    ("node", "shape", "axis", "data", "out", "macs"),
    [
        (("MatMul", ["x", "w"], {}), (6, 4), 1, [3, 6], [3, 4], 72),
        (("MatMul", ["w", "x"], {}), (4, 6), 0, [6, 3], [4, 3], 72),
        (("Gemm", ["x", "w"], {}), (6, 4), 1, [3, 6], [3, 4], 72),
        (("Gemm", ["x", "w"], {"transB": 1}), (4, 6), 0, [3, 6], [3, 4], 72),
        (("Gemm", ["w", "x"], {"transA": 1}), (6, 4), 1, [6, 3], [4, 3], 72),
        (("Conv", ["x", "w"], {}), (4, 6, 3, 3), 0, [1, 6, 5, 5], [1, 4, 3, 3], 1944),
        (("Conv", ["x", "w"], {"group": 2}), (4, 3, 1, 1), 0, [1, 6, 5, 5], [1, 4, 5, 5], 300),
        (("ConvTranspose", ["x", "w"], {}), (6, 4, 2, 2), 1, [1, 6, 5, 5], [1, 4, 6, 6], 2400),
    ],
)
def test_orientation_and_macs_of_every_layer_kind(node, shape, axis, data, out, macs) -> None:
    op, names, attributes = node
    made = helper.make_node(op, names, ["y"], "layer", **attributes)
    (row,) = layers(model_of([made], {"x": data}, {"y": out}, w=dead_row(shape, axis)))
    assert (row.node_name, row.op, row.weight_name, row.shape) == ("layer", op, "w", shape)
    assert (row.pattern.dead_rows, row.pattern.dead_columns) == ((1,), ())
    assert row.macs == macs


def test_quantised_weight_counts_its_zero_point() -> None:
    stored = np.full((6, 4), 128, np.uint8)
    stored[0, 0] = 3
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["wf"], axis=1),
        helper.make_node("MatMul", ["x", "wf"], ["y"], "layer"),
    ]
    scale, point = np.ones(4, np.float32), np.full(4, 128, np.uint8)
    (row,) = layers(model_of(nodes, {"x": [3, 6]}, {"y": [3, 4]}, w=stored, s=scale, z=point))
    assert row.pattern.n_zero == 23
    assert row.weight_name == "w"


def test_two_moving_operands_are_no_layer() -> None:
    nodes = [helper.make_node("MatMul", ["x", "y"], ["z"], "attention")]
    model = model_of(nodes, {"x": [3, 6], "y": [6, 2]}, {"z": [3, 2]})
    assert layers(model) == []
    onnx.checker.check_model(ir.to_proto(model))
