"""What `inspect` says about layers, masks and what-ifs."""

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparsegraph.capture import load
from sparsegraph.errors import UnsupportedError, UsageError
from sparsegraph.inspect import Inspection, inspect
from tests.conftest import BATCH, perceptron

V3 = "x86-64-v3"


def inspected(
    weights: dict[str, np.ndarray],
    nodes: list[onnx.NodeProto],
    shape: list[int],
    impose: float | None = None,
) -> Inspection:
    """The inspection of a graph from `x` of this shape to `y`."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opset = [helper.make_opsetid("", 18)]
    return inspect(
        load(helper.make_model(graph, opset_imports=opset, ir_version=9)), V3, impose=impose
    )


def sparse(shape: tuple[int, ...], density: float) -> np.ndarray:
    rng = np.random.default_rng(3)
    weight = rng.standard_normal(shape).astype(np.float32)
    weight[rng.random(shape) >= density] = 0
    return weight


def test_counts_and_gains() -> None:
    found = inspect(load(perceptron(), {"batch": BATCH}), V3)
    up, down = found.layers
    assert up.shape[0] == 32
    assert up.shape[1] < 64, "hidden units without a weight are gone"
    assert up.n_zero == round((1 - up.density) * 32 * up.shape[1])
    assert up.macs == BATCH * 32 * up.shape[1]
    assert up.speedup > 2
    assert (down.format, down.reason) == ("dense", "no zeros")
    for row in (up, down):
        assert row.ms is not None
        assert row.dense_ms is not None
        assert row.speedup == pytest.approx(row.dense_ms / row.ms)
        assert not row.is_measured
    assert found.n_zero == up.n_zero
    assert 1 < found.speedup < up.speedup
    assert "1 layers get faster" in str(found)


def test_a_layer_above_break_even_says_so() -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "layer")
    (row,) = inspected({"w": sparse((64, 64), 0.95)}, [node], [64, 64]).layers
    assert row.format == "dense"
    assert row.reason == f"density {row.density:.2f} is above break-even {row.break_even:.2f}"


def test_a_mask_outside_the_weight_counts() -> None:
    mask = (np.arange(64 * 64).reshape(64, 64) % 10 == 0).astype(np.float32)
    nodes = [
        helper.make_node("Mul", ["w", "mask"], ["masked"], "apply"),
        helper.make_node("MatMul", ["x", "masked"], ["y"], "layer"),
    ]
    weight = np.ones((64, 64), np.float32)
    (row,) = inspected({"w": weight, "mask": mask}, nodes, [8, 64]).layers
    assert row.node == "layer"
    assert row.density == pytest.approx(0.1, abs=0.01)
    assert row.format == "coded"


def test_depthwise_stays_dense_whatever_its_zeros() -> None:
    node = helper.make_node("Conv", ["x", "w"], ["y"], "dw", group=8, pads=[1, 1, 1, 1])
    found = inspected({"w": sparse((8, 1, 3, 3), 0.1)}, [node], [1, 8, 6, 6], impose=0.9)
    (row,) = found.layers
    assert row.format == "dense"
    assert "depthwise" in row.reason
    assert row.what_if_speedup == 1.0


def test_a_convolution_that_gathers_takes_more_time_for_the_same_work() -> None:
    weight = {"w": sparse((32, 32, 1, 1), 0.1)}
    each = []
    for strides in ([1, 1], [2, 2]):
        node = helper.make_node("Conv", ["x", "w"], ["y"], "conv", strides=strides)
        (row,) = inspected(weight, [node], [1, 32, 16, 16]).layers
        assert row.ms is not None
        assert row.macs is not None
        each.append(row.ms / row.macs)
    assert each[1] > each[0]


def test_a_model_that_would_lose_runs_in_onnx_runtime() -> None:
    node = helper.make_node("Conv", ["x", "w"], ["y"], "conv", pads=[2, 2, 2, 2], strides=[2, 2])
    found = inspected({"w": sparse((32, 32, 5, 5), 1.0)}, [node], [1, 32, 16, 16])
    assert found.layers[0].speedup < 1
    assert (found.n_faster, found.speedup) == (0, 1.0)


def test_a_dense_3x3_convolution_goes_by_winograd_and_few_weights_do_not() -> None:
    node = helper.make_node("Conv", ["x", "w"], ["y"], "conv", pads=[1, 1, 1, 1])
    (dense,) = inspected({"w": sparse((64, 64, 3, 3), 1.0)}, [node], [1, 64, 56, 56]).layers
    assert dense.format == "winograd-4"
    assert dense.reason == "no zeros; Winograd F(4,3), weights 4.0 times as large"
    (half,) = inspected({"w": sparse((64, 64, 3, 3), 0.7)}, [node], [1, 64, 56, 56]).layers
    assert half.format == "winograd-4"
    assert f"above break-even {half.break_even:.2f}; Winograd" in half.reason
    (few,) = inspected({"w": sparse((64, 64, 3, 3), 0.1)}, [node], [1, 64, 56, 56]).layers
    assert (few.format, few.reason) == ("coded", "")
    assert few.speedup > dense.speedup > 1


def test_shared_zeros_gain_more() -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "layer")
    alone = sparse((256, 256), 0.1)
    shared = np.where(np.repeat(alone[:, ::4] != 0, 4, axis=1), np.float32(1), np.float32(0))
    rows = [inspected({"w": w}, [node], [128, 256]).layers[0] for w in (alone, shared)]
    assert rows[0].density == pytest.approx(rows[1].density, abs=0.01)
    assert rows[1].speedup > rows[0].speedup
    assert rows[1].break_even > rows[0].break_even


def test_an_unknown_shape_is_not_guessed() -> None:
    graph = helper.make_graph(
        [helper.make_node("NonZero", ["x"], ["at"], "nz"),
         helper.make_node("Cast", ["at"], ["f"], "cast", to=TensorProto.FLOAT),
         helper.make_node("Transpose", ["f"], ["t"], "turn"),
         helper.make_node("MatMul", ["t", "w"], ["y"], "layer")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(sparse((2, 64), 0.5), "w")],
    )  # fmt: skip
    opset = [helper.make_opsetid("", 18)]
    found = inspect(load(helper.make_model(graph, opset_imports=opset, ir_version=9)), V3)
    (row,) = found.layers
    assert (row.ms, row.speedup) == (None, 1.0)
    assert row.reason == "its shape depends on run-time data"


def test_imposing_zeros_never_takes_any_away() -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "layer")
    (row,) = inspected({"w": sparse((64, 64), 0.05)}, [node], [8, 64], impose=0.5).layers
    assert row.what_if_speedup == row.speedup


def test_activation_masks_are_listed() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["gate"], "relu"),
        helper.make_node("Mul", ["gate", "x"], ["y"], "masked"),
    ]
    found = inspected({}, nodes, [4, 8])
    assert [(m.node, m.value, m.kind) for m in found.masks] == [("masked", "gate", "value")]
    assert found.speedup == 1.0


def test_pictures_count_the_weights_of_each_cell() -> None:
    weight = np.zeros((64, 32), np.float32)  # [in, out]
    weight[:32, :16] = 1
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "layer")
    found = inspected({"w": weight}, [node], [8, 64])
    grid = np.array(found.layers[0].grid)
    assert grid.shape == (16, 32)
    assert (grid[:8, :16] == 1).all()
    assert grid.sum() == 8 * 16
    assert "grid" not in json.dumps(found.to_json()).replace('"grid": []', "")


@pytest.mark.parametrize("share", [-0.1, 1.0, 90.0])
def test_impossible_shares(share: float) -> None:
    with pytest.raises(UsageError, match="0 <= share < 1"):
        inspect(load(perceptron(), {"batch": BATCH}), V3, impose=share)


def test_unknown_target() -> None:
    with pytest.raises(UnsupportedError, match="z80"):
        inspect(load(perceptron(), {"batch": BATCH}), "z80")


def test_few_points_become_a_tile_where_there_are_zeros() -> None:
    """What another density would give is what it gives, although dense points lie in rows."""
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    (dense,), (pruned,) = (
        inspected({"w": sparse((256, 1024), kept)}, [node], [4, 256], impose=0.9).layers
        for kept in (1.0, 0.1)
    )
    assert dense.what_if_speedup == pytest.approx(pruned.speedup, rel=0.1)
    assert dense.what_if_speedup > 1.5 * dense.speedup
