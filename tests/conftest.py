"""Fixtures that several test files share."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

BATCH, INPUTS, HIDDEN, OUTPUTS = 64, 32, 64, 16
UP_DENSITY = 0.1
GUARD, UNTOUCHED = 4096, 0xA5  # bytes beside a workspace, and what they hold


def perceptron() -> onnx.ModelProto:
    """x [batch, 32] -> 64 units with 90 % zero weights, Relu -> 16 outputs with dense weights."""
    rng = np.random.default_rng(7)
    up = rng.standard_normal((INPUTS, HIDDEN), np.float32) / 8
    up[rng.random(up.shape) >= UP_DENSITY] = 0
    down = rng.standard_normal((HIDDEN, OUTPUTS), np.float32) / 8
    nodes = [
        helper.make_node("MatMul", ["x", "up.weight"], ["hidden"], "up"),
        helper.make_node("Relu", ["hidden"], ["active"], "act"),
        helper.make_node("MatMul", ["active", "down.weight"], ["y"], "down"),
    ]
    graph = helper.make_graph(
        nodes,
        "perceptron",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", INPUTS])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", OUTPUTS])],
        [numpy_helper.from_array(up, "up.weight"), numpy_helper.from_array(down, "down.weight")],
    )
    opset = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, opset_imports=opset, ir_version=9)


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`perceptron` as a file, with its batch dimension free."""
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    onnx.save(perceptron(), path)
    return path


@pytest.fixture(scope="session")
def artefact(model_file: Path) -> Path:
    """`perceptron` compiled for this machine with a batch of 64, beside its ONNX file."""
    from sparsegraph.compile import compile

    path = model_file.with_suffix(".sg")
    compile(model_file, shapes={"batch": BATCH}, output=path)
    return path


@pytest.fixture(scope="session", autouse=True)
def every_kernel_compiles() -> None:
    """A kernel that the code generator fails at fails the test; nobody quietly goes without it."""
    module = importlib.import_module("sparsegraph.compile")
    module.LEAVE_REFUSED = False


def guarded_workspace(n_bytes: int, content: int = 0) -> tuple[np.ndarray, int]:
    """Bytes of one value between two stretches of another, and their address."""
    whole = np.full(n_bytes + 2 * GUARD, UNTOUCHED, np.uint8)
    inner = whole[GUARD:-GUARD]
    inner[:] = content
    return inner, inner.ctypes.data


@pytest.fixture(scope="session", autouse=True)
def no_run_writes_beside_its_workspace() -> Iterator[None]:
    """Every run of every test; what it overwrites would else be found much later, or never."""
    from sparsegraph.segments import Native

    begin, call = Native.__init__, Native.call

    def begin_guarded(self: Native, *args: Any) -> None:
        begin(self, *args)
        self.free.append(guarded_workspace(self.workspace_bytes))

    def call_guarded(self: Native, *args: Any) -> None:
        call(self, *args)
        for whole in (w.base for w, _ in self.free if w.base is not None):
            assert (whole[:GUARD] == UNTOUCHED).all(), "a run wrote before its workspace"
            assert (whole[-GUARD:] == UNTOUCHED).all(), "a run wrote behind its workspace"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Native, "__init__", begin_guarded)
        patch.setattr(Native, "call", call_guarded)
        yield


@pytest.fixture(scope="module")
def workspaces_of_nan() -> Iterator[None]:
    """Models run first in a workspace full of NaN: a caller's memory may hold anything."""
    from sparsegraph.segments import Native

    begin = Native.__init__

    def begin_with_nan(self: Native, *args: Any) -> None:
        begin(self, *args)
        self.free.append(guarded_workspace(self.workspace_bytes, 0xFF))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Native, "__init__", begin_with_nan)
        yield
