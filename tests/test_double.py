"""Models in float64, and how they decide what float32 cannot."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from scipy import special

from sparsegraph import double
from sparsegraph.compile import compile
from sparsegraph.errors import UnsupportedError, VerifyError
from sparsegraph.pipeline import Judge, optimize, run_pass
from sparsegraph.rewrite import Fuel
from sparsegraph.shrink import shrink
from sparsegraph.structure import cut
from sparsegraph.verify import Session, feeds_for
from tests.passes.check import parse, weight
from tests.test_pipeline import Wrong


@pytest.mark.parametrize(
    "body",
    [
        "y = Conv<pads=[1,0,2,1], strides=[2,1], dilations=[1,2], group=2>(x, w)",
        'y = Conv<auto_pad="SAME_UPPER", strides=[2,2], group=2>(x, w)',
        'y = Conv<auto_pad="SAME_LOWER", strides=[2,2], group=2>(x, w)',
        "y = MaxPool<kernel_shape=[3,2], strides=[2,2], pads=[1,0,1,0], ceil_mode=1>(x)",
        "y = Erf(x)",
        "y = AveragePool<kernel_shape=[3,2], strides=[2,2], pads=[1,0,1,1], ceil_mode=1>(x)",
        "y = AveragePool<kernel_shape=[3,2], pads=[1,0,1,1], count_include_pad=1>(x)",
        "y = LRN<size=3, alpha=0.5>(x)",
        "y = LRN<size=5, alpha=0.5>(x)",
        'y = Resize<coordinate_transformation_mode="asymmetric">(x, , scales)',
        """y = Resize<coordinate_transformation_mode="asymmetric",
            nearest_mode="floor">(x, , scales)""",
        "y = Resize(x, , scales)",
        "y = Cast<to=1>(x)",
    ],
)
def test_double_precision_agrees_with_onnx_runtime(body: str) -> None:
    arrays = {"w": weight(6, 2, 3, 3), "scales": np.array([1, 1, 2, 3], np.float32)}
    used = {name: array for name, array in arrays.items() if f"{name})" in body}
    model = parse(f"g (float[2,4,7,8] x) => (float[n,c,h,w2] y) {{ {body} }}", **used)
    feed = feeds_for(model, 2)[1]
    (want,), (got,) = Session(model).run(feed).values(), double.run(model, feed).values()
    assert got.dtype == np.float64
    assert np.abs(got - want).max() <= 1e-6 * np.abs(want).max()


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("y = Erf(x)", lambda x, y: y - special.erf(x)),
        ("y = Gelu(x)", lambda x, y: y - x * special.ndtr(x)),
        (
            'y = Gelu<approximate="tanh">(x)',
            lambda x, y: y - x * special.expit((x + 0.044715 * x**3) * np.sqrt(8 / np.pi)),
        ),
    ],
)
def test_double_precision_of_what_the_evaluator_rounds(
    body: str, error: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> None:
    model = parse(f"g (float[4,7] x) => (float[4,7] y) {{ {body} }}")
    feed = feeds_for(model, 2)[1]
    assert np.abs(error(feed["x"].astype(np.float64), double.run(model, feed)["y"])).max() <= 1e-15


def test_double_precision_refuses_what_it_does_not_know() -> None:
    text = 'g (float[1,4,8,8] x) => (float[1,4,12,12] y) { y = Resize<mode="cubic">(x, , scales) }'
    model = parse(text, scales=np.array([1, 1, 1.5, 1.5], np.float32))
    with pytest.raises(UnsupportedError, match="cubic"):
        double.run(model, feeds_for(model, 2)[1])


STEEP = """g (float[2048,48] x) => (float[2048,8] y) {
    h = MatMul(x, w)  r = Relu(h)  z = MatMul(r, v)  y = Softmax(z) }"""


def steep() -> ir.Model:
    """Logits of thousands before a Softmax: float32 moves its outputs by more than 1e-4."""
    return parse(STEEP, w=weight(48, 600), v=weight(600, 8) * 100)


def test_what_float32_cannot_tell_is_proved_in_float64() -> None:
    done = shrink(steep(), 0.7)
    assert done.proof is not None
    assert done.proof.error > 1e-4
    assert done.proof.exact is not None
    assert done.proof.exact <= 1e-10
    assert done.facts()["error_in_float64"] == done.proof.exact
    assert "in float64" in done.summary()


def test_a_wrong_cut_below_the_rounding_of_float32_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = cut.apply

    def wrong(analysis: object, gone: np.ndarray) -> None:
        right(analysis, gone)  # type: ignore[arg-type]
        value = analysis.graph.initializers["v"]  # type: ignore[attr-defined]
        value.const_value = ir.tensor(value.const_value.numpy() * np.float32(1 + 3e-5), name="v")

    monkeypatch.setattr(cut, "apply", wrong)
    with pytest.raises(VerifyError, match=r"in float64, need at most 1\.0e-05"):
        shrink(steep(), 0.7)


def test_without_an_evaluator_the_bound_of_float32_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(model: ir.Model, feed: object) -> None:
        raise UnsupportedError("no such operator")

    monkeypatch.setattr(double, "run", missing)
    done = shrink(steep(), 0.7)
    assert done.proof is not None
    assert done.proof.exact is None
    assert done.proof.error > 1e-4
    assert "float64" not in done.summary()


N, N_DEAD = 600, 200
BALANCED = """g (float[64,48] x) => (float[64,8] y) {
    m = MatMul(x, w)  h = Add(m, c)  r = Relu(h)  y = MatMul(r, v) }"""


def balanced(share: float = 0.0) -> ir.Model:
    """Sums of 400 numbers around 1e4 that cancel: no nudge of x tells how much they round.

    So do those of the others, of which a share is read.
    """
    v = weight(N, 8)
    for part in (v[:N_DEAD], v[N_DEAD:]):
        part -= part.mean(0)
    v[:N_DEAD] *= share
    return parse(BALANCED, w=weight(48, N), c=1e4 + weight(64, N), v=v)


def test_what_no_nudge_of_the_inputs_tells_is_decided_in_float64() -> None:
    model = balanced(share=1.0)
    (group,) = shrink(model, 1.0).groups
    proof = shrink(model, {group.name: range(N_DEAD, N)}).proof
    assert proof is not None
    assert proof.error > 3e-4
    assert proof.exact is not None
    assert proof.exact <= 1e-10


def test_a_right_pass_is_kept_where_float32_rounds_more_than_the_tolerance() -> None:
    done = optimize(balanced())
    (record,) = [one for one in done.records if one.name == "remove_dead_channels"]
    assert record.max_rel_error is not None
    assert record.max_rel_error > 3e-4
    (value,) = [v for v in done.model.graph.initializers.values() if v.shape == (N - N_DEAD, 8)]
    assert value.name == "v"


def test_a_wrong_pass_is_refused_there() -> None:
    model = balanced()
    judge = Judge(model)
    del judge._cases[1:]  # on zeros rounding alone is ten times what is wrong
    with pytest.raises(VerifyError, match="wrong"):
        run_pass(Wrong(3e-4), model, Fuel(), judge)


def test_a_refused_artefact_says_whose_rounding_it_is() -> None:
    proto = ir.to_proto(balanced())
    with pytest.raises(VerifyError, match=r"off float64 on this feed\): prune less"):
        compile(proto, keep_native=True)
    assert compile(proto, keep_native=True, check=False)
