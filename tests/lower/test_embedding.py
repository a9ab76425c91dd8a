"""Embeddings of which rows or single values are zero take less memory and give the same."""

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from sparsegraph.compile import Compiled, compile

ROWS, COLUMNS = 200, 24
FORMS = {  # share of rows that are zero, density of the others -> kernel, share of the bytes
    "dense": (0.0, 1.0, "gather_rows", 1.0),
    "few zero rows": (0.05, 1.0, "gather_rows", 1.0),
    "zero rows": (0.5, 1.0, "embedding_f32_int64", 0.55),
    "zero rows of a thin table": (0.5, 0.6, "embedding_f32_int64_coded", 0.5),
    "a thin table": (0.0, 0.2, "embedding_f32_int64_coded", 0.35),
    "half the values": (0.0, 0.5, "gather_rows", 1.0),
    "zeros alone": (1.0, 1.0, "embedding_f32_int64", 0.05),
}


def model(form: str) -> ModelProto:
    zero, density, _, _ = FORMS[form]
    rng = np.random.default_rng(0)
    table = rng.standard_normal((ROWS, COLUMNS)).astype("f4")
    table[rng.random(table.shape) >= density] = 0
    table[rng.permutation(ROWS)[: round(zero * ROWS)]] = 0
    given = helper.make_tensor_value_info("i", TensorProto.INT64, [2, 30])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 30, COLUMNS])
    node = helper.make_node("Gather", ["table", "i"], ["y"], "words")
    graph = helper.make_graph(
        [node], "g", [given], [out], [numpy_helper.from_array(table, "table")]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def compiled(form: str, target: str = "native") -> Compiled:
    return compile(model(form), target, keep_native=True, fallback=False)


@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str) -> None:
    *_, kernel, share = FORMS[form]
    found = compiled(form)
    (segment,) = found.manifest.segments
    (step,) = segment.steps
    assert step.kernel.startswith(kernel)
    assert step.kernel.endswith("coded") == kernel.endswith("coded")
    assert found.weight_bytes <= share * 4 * ROWS * COLUMNS + 64 * 4
    indices = np.random.default_rng(1).integers(0, ROWS, (2, 30))
    (y,) = found.run(None, {"i": indices})
    table = numpy_helper.to_array(model(form).graph.initializer[0])
    np.testing.assert_array_equal(y, table[indices])
