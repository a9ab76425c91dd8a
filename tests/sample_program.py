"""Small kernels and a model made of them, for tests of what happens after lowering."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import TensorProto, helper
from sparsegraph.targets import emit
from sparsegraph.targets.emit import Expr, load, loop, store
from sparsegraph.targets.target import Target

from sparsegraph.program import Fallback, Plan, Program, Ref, Scratch, Step, Tensor

ROWS, WIDTH = 13, 24
SCALE = 0.1
NODES = ("a", 'b "quoted" \\ é')  # of the first step


@dataclass(frozen=True)
class Affine:
    """y[i, j] = x[i, j] * scale + w[j]; an item is a row."""

    width: int

    @property
    def name(self) -> str:
        return f"affine_{self.width}"

    @property
    def params(self) -> emit.Signature:
        return emit.signature("y:float32* x:float32* w:float32* scale:float32")

    def body(self, target: Target) -> Any:
        def emit_body(y: Expr, x: Expr, w: Expr, scale: Expr, begin: Expr, end: Expr) -> None:
            with loop(begin, end) as i, loop(0, self.width) as j:
                at = i * self.width + j
                store(y, load(x, at) * scale + load(w, j), at)

        return emit_body


@dataclass(frozen=True)
class Mirror:
    """y[i, j] = x[i, width-1-j] + id[i], through scratch; an item is a row."""

    width: int

    @property
    def name(self) -> str:
        return f"mirror_{self.width}"

    @property
    def params(self) -> emit.Signature:
        return emit.signature("y:float32* x:float32* id:int64* scratch:float32* shift:int32")

    def body(self, target: Target) -> Any:
        def emit_body(
            y: Expr, x: Expr, id: Expr, scratch: Expr, shift: Expr, begin: Expr, end: Expr
        ) -> None:
            with loop(begin, end) as i:
                with loop(0, self.width) as j:
                    store(scratch, load(x, i * self.width + j), self.width - 1 - j)
                with loop(0, self.width) as j:
                    number = emit.T.cast(load(id, i) + shift, "float32")
                    store(y, load(scratch, j) + number, i * self.width + j)

        return emit_body


def matrix(name: str) -> Tensor:
    return Tensor(name, "float32", (ROWS, WIDTH))


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    values = np.random.default_rng(seed).standard_normal((2, WIDTH)).astype(np.float32)
    return {"first": values[0], "second": values[1], "copy of first": values[0].copy()}


def native(name_in: str, name_out: str, seed: int = 0) -> Program:
    """x, ids -> affine, mirror, affine -> y, and the value in the middle as a second output."""
    affine, mirror = Affine(WIDTH), Mirror(WIDTH)
    t0, t1, middle = Ref("t0"), Ref("t1"), Ref(name_out + "_middle")
    steps = [
        Step(affine, (t0, Ref(name_in), Ref("first"), 2.0), ROWS, NODES, "dense"),
        Step(affine, (t1, t0, Ref("second"), SCALE), ROWS, ("c",)),
        Step(mirror, (middle, t1, Ref("ids"), Scratch(4 * WIDTH), 3), ROWS, ("d",)),
        Step(affine, (Ref(name_out), middle, Ref("copy of first"), -1.0), ROWS - 1, ("e",)),
        # the last row alone: one item, addressed by an offset
        Step(
            affine,
            (
                Ref(name_out, (ROWS - 1) * WIDTH),
                Ref(middle.buffer, (ROWS - 1) * WIDTH),
                Ref("copy of first"),
                -1.0,
            ),
            1,
            ("e",),
        ),
    ]  # fmt: skip
    inputs = (matrix(name_in), Tensor("ids", "int64", (ROWS,)))
    sizes = {"t0": ROWS * WIDTH * 4, "t1": ROWS * WIDTH * 4}
    outputs = (matrix(name_out), matrix(name_out + "_middle"))
    return Program(inputs, outputs, steps, weights(seed), sizes)


def reference(x: np.ndarray, ids: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """What `native` computes, in float64."""
    w = {k: v.astype(np.float64) for k, v in weights(seed).items()}
    y = (x * 2.0 + w["first"]) * np.float64(np.float32(SCALE)) + w["second"]
    middle = y[:, ::-1] + ids[:, None] + 3
    return -middle + w["first"], middle


def plan() -> Plan:
    """A model of one native segment."""
    program = native("x", "y")
    return Plan(program.inputs, program.outputs, [program], [{"name": "a", "density": 0.5}])


def mixed_plan() -> Plan:
    """Native, ONNX Runtime (z = Relu(y)), native."""
    first, second = native("x", "y"), native("z", "out", seed=1)
    nodes = [helper.make_node("Relu", ["y"], ["z"])]
    border = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, [ROWS, WIDTH]) for n in ("y", "z")
    ]
    graph = helper.make_graph(nodes, "relu", border[:1], border[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    fallback = Fallback(
        (matrix("y"),), (matrix("z"),), model.SerializeToString(), ("relu",), "a test"
    )
    outputs = (matrix("out"), matrix("y"))
    return Plan(first.inputs, outputs, [first, fallback, second])


def feed(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((ROWS, WIDTH)).astype(np.float32)
    return {"x": x, "ids": rng.integers(-9, 9, ROWS)}


META = {"model_sha256": "ab" * 32, "passes": [{"name": "fold"}], "verification": {"error": 1e-6}}
