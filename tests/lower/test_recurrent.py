"""LSTM and GRU in kernels of ours: what exporters write, and what is left to ONNX Runtime."""

import numpy as np
import onnx_ir as ir
import pytest
from sparsegraph.targets.kernels.recurrent import Recurrent

from sparsegraph import targets
from sparsegraph.compile import Compiled, compile
from sparsegraph.lower.recurrent import _kernel
from sparsegraph.verify import run_onnx
from tests.passes.check import parse, rng

STEPS, IMAGES, INPUTS, UNITS = 7, 2, 12, 10
GATES = {"LSTM": 4, "GRU": 3}
LINEAR = {"LSTM": "", "GRU": ", linear_before_reset=1"}


def small(*shape: int) -> np.ndarray:
    return (rng().standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)


def network(
    op: str, body: str, outputs: str, directions: int = 1, units: int = UNITS, images: int = IMAGES,
    given: str = "", **more: np.ndarray,
) -> ir.Model:  # fmt: skip
    """`body` with constants w, r, b, h, c of a recurrence."""
    n = GATES[op] * units
    text = f"g (float[{STEPS},{images},{INPUTS}] x{given}) => ({outputs}) {{ {body} }}"
    return parse(
        text, w=small(directions, n, INPUTS), r=small(directions, n, units),
        b=small(directions, 2 * n), p=small(directions, 3 * units),
        h=small(directions, images, units), c=small(directions, images, units), **more,
    )  # fmt: skip


def compiled(model: ir.Model) -> Compiled:
    made = compile(ir.to_proto(model), keep_native=True)
    assert made.manifest.verification["max_rel_error"] <= 1e-5
    return made


@pytest.mark.parametrize(
    ("op", "how"), [("LSTM", ""), ("GRU", ", linear_before_reset=1"), ("GRU", "")]
)
@pytest.mark.parametrize(
    ("direction", "directions", "inputs"),
    [
        ("forward", 1, "x, w, r"), ("reverse", 1, "x, w, r, b"),
        ("bidirectional", 2, "x, w, r, b, , h"),
    ],
)  # fmt: skip
def test_every_direction(op: str, how: str, direction: str, directions: int, inputs: str) -> None:
    attributes = f'hidden_size={UNITS}, direction="{direction}"{how}'
    model = network(
        op, f"y = {op}<{attributes}>({inputs})",
        f"float[{STEPS},{directions},{IMAGES},{UNITS}] y", directions,
    )  # fmt: skip
    made = compiled(model)
    assert not made.fallback_nodes
    x = np.random.default_rng(1).standard_normal((STEPS, IMAGES, INPUTS)).astype(np.float32) * 3
    want = run_onnx(model, {"x": x})["y"]
    np.testing.assert_allclose(made.run(None, {"x": x})[0], want, atol=2e-6)


STATE = f"float[1,{IMAGES},{UNITS}]"
WHOLE = f"float[{STEPS},1,{IMAGES},{UNITS}] y"


@pytest.mark.parametrize(
    ("outputs", "op", "states", "declared"),
    [
        ("y, a, e", "LSTM", "h, c", f"{WHOLE}, {STATE} a, {STATE} e"),
        (", a", "LSTM", "g, c", f"{STATE} a"),
        (", , e", "LSTM", ", g", f"{STATE} e"),
        ("y, a", "GRU", "g", f"{WHOLE}, {STATE} a"),
    ],
)
def test_states_that_are_given_and_read(outputs: str, op: str, states: str, declared: str) -> None:
    """`a` and `e` are the last states, `g` comes from outside."""
    body = f"{outputs} = {op}<hidden_size={UNITS}{LINEAR[op]}>(x, w, r, b, , {states})"
    assert not compiled(network(op, body, declared, given=f", {STATE} g")).fallback_nodes


def test_the_next_layer_reads_the_sequence() -> None:
    body = f"s = LSTM<hidden_size={UNITS}>(x, w, r, b)  f = Reshape(s, flat)  y = MatMul(f, v)"
    model = network(
        "LSTM", body, f"float[{STEPS * IMAGES},5] y", flat=np.array([-1, UNITS]), v=small(UNITS, 5)
    )
    assert not compiled(model).fallback_nodes


@pytest.mark.parametrize(
    ("op", "attributes", "inputs", "reason"),
    [
        ("LSTM", ', activations=["Tanh","Tanh","Tanh"]', "x, w, r", "activations tanh"),
        ("LSTM", ", clip=1.0", "x, w, r", "clip is given"),
        ("LSTM", ", input_forget=1", "x, w, r", "input_forget is 1"),
        ("LSTM", "", "x, w, r, b, n", "lengths of their own"),
        ("LSTM", "", "x, w, r, b, , , , p", "peepholes"),
        ("LSTM", "", "x, v, r", "not constant"),
        ("GRU", ', linear_before_reset=1, activations=["Sigmoid","Relu"]', "x, w, r", "relu"),
    ],
)
def test_near_misses(op: str, attributes: str, inputs: str, reason: str) -> None:
    given = f", int32[{IMAGES}] n" if " n" in inputs else ""
    given += f", float[1,{GATES[op] * UNITS},{INPUTS}] v" if " v" in inputs else ""
    model = network(
        op, f"y = {op}<hidden_size={UNITS}{attributes}>({inputs})",
        f"float[{STEPS},1,{IMAGES},{UNITS}] y", given=given,
    )  # fmt: skip
    made = compile(ir.to_proto(model), keep_native=True, check=" n" not in inputs)
    assert made.fallback_nodes
    assert reason in " ".join(s.reason for s in made.manifest.segments if s.kind != "native")


def test_usual_activations_may_be_spelled_out() -> None:
    attributes = 'hidden_size=10, activations=["Sigmoid", "Tanh", "Tanh"]'
    model = network("LSTM", f"y = LSTM<{attributes}>(x, w, r)", "float[7,1,2,10] y")
    assert not compiled(model).fallback_nodes


@pytest.mark.parametrize(("images", "is_left"), [(2, False), (3, True)])
def test_many_sequences_with_large_weights_are_left(images: int, is_left: bool) -> None:
    units = 600  # 5.8 MB
    model = network(
        "LSTM", f"y = LSTM<hidden_size={units}>(x, w, r)", f"float[{STEPS},1,{images},{units}] y",
        units=units, images=images,
    )  # fmt: skip
    assert bool(compiled(model).fallback_nodes) == is_left


def pruned(array: np.ndarray, kept: float, rows: int) -> np.ndarray:
    """Groups of neighbouring rows lose the same columns."""
    directions, n, columns = array.shape
    mask = np.random.default_rng(2).random((directions, n // rows, columns)) < kept
    return np.where(np.repeat(mask, rows, axis=1), array, 0).astype(np.float32)


@pytest.mark.parametrize("op", ["LSTM", "GRU", "reset"])
@pytest.mark.parametrize(("kept", "rows"), [(0.05, 1), (0.1, 8), (0.5, 1)])
def test_recurrent_weights_without_their_zeros(op: str, kept: float, rows: int) -> None:
    op, how = ("GRU", "") if op == "reset" else (op, LINEAR[op])
    units = 96
    weights = pruned(small(2, GATES[op] * units, units), kept, rows)
    body = f'y = {op}<hidden_size={units}, direction="bidirectional"{how}>(x, w, m)'
    outputs = f"float[{STEPS},2,{IMAGES},{units}] y"
    dense, sparse = (
        compiled(network(op, body, outputs, 2, units, m=m))
        for m in (small(2, GATES[op] * units, units), weights)
    )
    is_coded = kept < 0.5
    x = np.random.default_rng(1).standard_normal((STEPS, IMAGES, INPUTS)).astype(np.float32)
    kernels = [s.kernel for s in sparse.session.profile({"x": x})]
    (kernel,) = (k for k in kernels if k.startswith(("lstm", "gru", "reset")))
    assert kernel.endswith("_coded") == is_coded
    sizes = [c.manifest.members["weights.bin"].n_bytes for c in (dense, sparse)]
    assert (sizes[1] < 0.5 * sizes[0]) == is_coded


@pytest.mark.parametrize(
    ("name", "rows"), [("x86-64-v4", 4), ("aarch64", 4), ("riscv64", 1), ("c11", 1)]
)
def test_panels_follow_the_machine(name: str, rows: int) -> None:
    target = targets.get(name)
    weights = pruned(small(1, 1024, 256), 0.1, 1)
    assert _kernel("lstm", weights, target) == Recurrent("lstm", target.lanes, rows, coded=True)
    together = _kernel("lstm", pruned(weights * 0 + 1, 0.1, 16), target)
    assert together == Recurrent("lstm", target.lanes, min(16, target.lanes), coded=True)
    assert not _kernel("lstm", weights * 0 + 1, target).coded
