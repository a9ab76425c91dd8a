"""ONNX Runtime's own norms and activations become plain operators, and kernels of ours."""

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparsegraph import capture
from sparsegraph.capture import load
from sparsegraph.compile import compile
from sparsegraph.errors import CaptureError
from sparsegraph.pipeline import optimize
from sparsegraph.verify import compare, feeds_for, run_onnx
from tests.passes.check import weight

TOKENS, WIDTH = 6, 24
OWN = "com.microsoft"
CASES = {
    "simplified": ("SimplifiedLayerNormalization", "h g", "z", "RMSNormalization"),
    "skip_simplified": ("SkipSimplifiedLayerNormalization", "h k g", "z", "RMSNormalization"),
    "skip_simplified_bias": (
        "SkipSimplifiedLayerNormalization", "h k g b", "z   s", "RMSNormalization"),
    "skip": ("SkipLayerNormalization", "h k g", "z", "LayerNormalization"),
    "skip_beta": ("SkipLayerNormalization", "h k g c", "z   s", "LayerNormalization"),
    "skip_bias": ("SkipLayerNormalization", "h k g c b", "z", "LayerNormalization"),
    "gelu": ("Gelu", "h", "z", "Gelu"),
    "bias_gelu": ("BiasGelu", "h b", "z", "Gelu"),
    "fast_gelu": ("FastGelu", "h", "z", "Gelu"),
    "fast_gelu_bias": ("FastGelu", "h b", "z", "Gelu"),
}  # fmt: skip


def network(
    op: str, inputs: str, outputs: str, opset: int = 23, half: bool = False, **attributes: object
) -> onnx.ModelProto:
    """Two products, `op` on them, a product."""
    own = "" if op.startswith("Simplified") else OWN
    names = outputs.split(" ")
    node = helper.make_node(op, inputs.split(), names, domain=own, **attributes)
    read = [name for name in names if name]
    rest = [helper.make_node("Add", ["z", "s"], ["t"])] if "s" in names else []
    tensors = {
        "w": weight(16, WIDTH), "u": weight(16, WIDTH)[::-1], "v": weight(WIDTH, 5),
        "g": 1 + weight(WIDTH) / 4, "b": weight(WIDTH), "c": weight(WIDTH)[::-1],
    }  # fmt: skip
    kind = np.float16 if half else np.float32
    given = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            helper.make_node("MatMul", ["x", "u"], ["k"]),
            node, *rest,
            helper.make_node("MatMul", ["t" if rest else "z", "v"], ["y"]),
            *(helper.make_node("Identity", [n], [f"{n}_out"]) for n in read if n in ("m", "i")),
        ],
        "own",
        [helper.make_tensor_value_info("x", given, [TOKENS, 16])],
        [
            helper.make_tensor_value_info("y", given, [TOKENS, 5]),
            *(helper.make_tensor_value_info(f"{n}_out", TensorProto.FLOAT, [TOKENS, 1])
              for n in read if n in ("m", "i")),
        ],
        [numpy_helper.from_array(a.astype(kind), n) for n, a in tensors.items()],
    )  # fmt: skip
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(OWN, 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in optimize(model, verify=False).model.graph)


@pytest.mark.parametrize(("name", "opset"), [*zip(CASES, [18, 14, 23, 14, 23, 18, 23, 14, 23, 23])])
def test_is_read_as_what_it_means(name: str, opset: int) -> None:
    op, inputs, outputs, becomes = CASES[name]
    proto = network(op, inputs, outputs, opset)
    model = load(proto)
    found = operators(model)
    assert found[becomes] == 1
    assert found[op] == (op == becomes)
    feed = feeds_for(model, 2)[1]
    assert compare(run_onnx(model, feed), run_onnx(proto, feed)) <= 1e-6


@pytest.mark.parametrize("name", ["simplified", "skip_simplified_bias", "skip_beta"])
def test_epsilon_is_taken(name: str) -> None:
    """Also where there is none: then it is another one for each."""
    op, inputs, outputs, _ = CASES[name]
    for attributes in ({}, {"epsilon": 0.5}):
        proto = network(op, inputs, outputs, **attributes)
        model = load(proto)
        small = {"x": feeds_for(model, 2)[1]["x"] * np.float32(1e-3)}
        assert compare(run_onnx(model, small), run_onnx(proto, small)) <= 1e-6


def test_kernels_of_ours_run_it_all() -> None:
    op, inputs, outputs, _ = CASES["skip_simplified_bias"]
    made = compile(network(op, inputs, outputs), keep_native=True)
    assert not made.fallback_nodes


def test_halves_are_normalised_in_float32() -> None:
    op, inputs, outputs, _ = CASES["skip_simplified_bias"]
    proto = network(op, inputs, outputs, half=True)
    model = load(proto)
    assert operators(model)[op] == 0
    feed = {"x": feeds_for(model, 2)[1]["x"] * np.float16(100)}  # squares overflow
    want = run_onnx(proto, feed)
    assert np.isfinite(want["y"]).all()
    assert compare(run_onnx(model, feed), want) <= 5e-3


@pytest.mark.parametrize(
    ("op", "inputs", "outputs", "options"),
    [
        ("SkipLayerNormalization", "h k g", "z m", {}),
        ("SkipSimplifiedLayerNormalization", "h k g", "z  i", {}),
        ("Gelu", "h", "z", {"half": True}),
        ("BiasGelu", "h b", "z", {"opset": 8}),
    ],
)
def test_near_misses_stay(op: str, inputs: str, outputs: str, options: dict[str, int]) -> None:
    proto = network(op, inputs, outputs, **options)  # type: ignore[arg-type]
    assert [n.op_type for n in load(proto).graph].count(op) == 1


def test_a_norm_over_more_axes_is_not_read_as_one() -> None:
    proto = network("SimplifiedLayerNormalization", "h g", "z", axis=0)
    with pytest.raises(CaptureError, match="SimplifiedLayerNormalization"):
        load(proto)


def test_another_meaning_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsegraph.passes.expand_contrib._SKIP_EPSILON", 0.1)
    with pytest.raises(CaptureError, match="its own nodes"):
        capture.load(network("SkipSimplifiedLayerNormalization", "h k g", "z"))
