"""Random graphs (tests/lower/random_graphs.py) compute natively what ONNX Runtime computes."""

import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsegraph import chain, double, verify
from sparsegraph.compile import compile
from tests.lower import random_graphs

pytestmark = pytest.mark.usefixtures("workspaces_of_nan")


MANY = {
    "deadline": None, "derandomize": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.large_base_example,
                              HealthCheck.data_too_large],
}  # fmt: skip


def assert_equal(data: st.DataObject, n_nodes: int) -> None:
    model, feed = random_graphs.build(lambda n: data.draw(st.integers(0, n - 1)), n_nodes)
    expected = verify.run_onnx(model, feed)
    compiled = compile(model, keep_native=True, check=False)
    names = [o.name for o in compiled.session.get_outputs()]
    got = dict(zip(names, compiled.run(None, feed)))
    far = [n for n in expected if verify.compare({n: got[n]}, {n: expected[n]}) > 1e-4]
    if far:  # ONNX Runtime itself may be: of equal features its layer norm gives 8e-5, not 0
        exact = double.run(ir.from_proto(model), feed)
        far = [n for n in far if verify.compare({n: got[n].astype(float)}, {n: exact[n]}) > 1e-4]
    assert not far


@given(st.data(), st.integers(4, 24))
@settings(max_examples=20, **MANY)
def test_a_random_graph_equals_onnx_runtime(data: st.DataObject, n_nodes: int) -> None:
    assert_equal(data, n_nodes)


@given(st.data(), st.integers(8, 24))
@settings(max_examples=12, **MANY)
def test_a_random_graph_tile_by_tile(data: st.DataObject, n_nodes: int) -> None:
    """Every chain that is legal is formed, however small its values."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chain, "_saves", lambda *_: True)
        assert_equal(data, n_nodes)


def test_packed_heads_with_the_batch_inside() -> None:
    """[T, B, E] sliced by a Gather of one index per part, as torch's MultiheadAttention does."""
    g = random_graphs.Graph(lambda n: 0)
    x = g.input((65, 2, 33))
    packed = g.op("MatMul", [x, g.numbers(33, 99)], (65, 2, 99))
    parted = g.op("Reshape", [packed, g.ints(65, 2, 3, 33)], (65, 2, 3, 33))
    turned = g.op("Transpose", [parted], (3, 65, 2, 33), perm=[2, 0, 1, 3])
    heads = []
    for i in range(3):
        part = g.op("Gather", [turned, g.scalar(i)], (65, 2, 33), axis=0)
        split = g.op("Reshape", [part, g.ints(65, 6, 11)], (65, 6, 11))
        turn = g.op("Transpose", [split], (6, 65, 11), perm=[1, 0, 2])
        heads.append(g.op("Reshape", [turn, g.ints(2, 3, 65, 11)], (2, 3, 65, 11)))
    y = g.op("Attention", heads, (2, 3, 65, 11))
    merged = g.op("Transpose", [y], (65, 2, 3, 11), perm=[2, 0, 1, 3])
    flat = g.op("Reshape", [merged, g.ints(130, 33)], (130, 33))
    g.op("MatMul", [flat, g.numbers(33, 33)], (130, 33))
    model, feed = g.finish()
    compiled = compile(model, check=False, keep_native=True, fallback=False)
    (expected,) = verify.run_onnx(model, feed).values()
    assert verify.compare(compiled.run(None, feed)[0], expected) <= 1e-5
