"""Attention whose queries, keys or values are constants: learnt queries, prototypes."""

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from sparsegraph.targets import get

from sparsegraph.compile import compile
from sparsegraph.lower.builder import Builder
from sparsegraph.program import Program

BATCH, FEATURES = 2, 24
TOKENS = {"q": 4, "k": 6, "v": 6}


def attention(constants: str) -> ModelProto:
    rng, given, arrays = np.random.default_rng(0), [], []
    for name, tokens in TOKENS.items():
        shape = (BATCH, tokens, FEATURES)
        if name in constants:
            array = rng.standard_normal(shape).astype(np.float32)
            arrays.append(numpy_helper.from_array(array, name))
        else:
            given.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, (BATCH, TOKENS["q"], FEATURES))
    node = helper.make_node("Attention", list(TOKENS), ["y"], q_num_heads=3, kv_num_heads=3)
    graph = helper.make_graph([node], "g", given, [out], arrays)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


@pytest.mark.parametrize("constants", ["", "q", "k", "v", "qk", "kv"])
def test_constants_of_several_images(constants: str) -> None:
    compiled = compile(attention(constants), keep_native=True, fallback=False)
    assert compiled.manifest.verification["max_rel_error"] <= 1e-5


def test_a_name_stands_for_one_place() -> None:
    """An address is found by its name; a weight and workspace once had the same one."""
    b = Builder(Program((), ()), get("native"), 1)
    array = np.zeros(3, np.float32)
    places = [b.weight("a", array), b.temporary("a", 8), b.weight("a", array.copy())]
    places += [b.temporary("a", 8)]
    assert len({place.buffer for place in places}) == 4
    assert b.weight("a", array) == places[0]
