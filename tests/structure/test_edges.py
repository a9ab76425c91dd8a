"""Input channels of single consumers: what is gathered, what is left, and what the outputs do."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import sparsegraph as sg
from benchmarks import zoo
from sparsegraph.errors import UsageError
from sparsegraph.shrink import shrink
from sparsegraph.structure import edges
from sparsegraph.verify import Session, compare, feeds_for
from tests.passes.check import parse, weight

BOUND = 1e-5
TWO = """g (float[1,3,8,8] x) => (float[1,4,8,8] y, float[1,5,8,8] z) {
    c = Conv(x, w)  r = Relu(c)  y = Conv(r, u)  z = Conv(r, v) }"""


def always(before: ir.Model, after: ir.Model) -> bool:
    """A judge that likes every Gather."""
    return True


def distance(after: ir.Model, model: ir.Model) -> float:
    """On a normal feed."""
    feed = feeds_for(model, 2)[1]
    return compare(Session(after).run(feed), Session(model).run(feed))


def check(model: ir.Model, judge: edges.Faster = always) -> tuple[ir.Model, edges.Gathered]:
    """Gather, and compare with what was."""
    after = model.clone()
    done = edges.gather(after, judge)
    onnx.checker.check_model(ir.to_proto(after), full_check=True)
    assert distance(after, model) <= BOUND
    assert not edges.gather(after.clone(), judge).rows, "a second run must change nothing"
    return after, done


def two(dead: list[int]) -> ir.Model:
    """Two readers of one map; the second ignores these channels."""
    v = weight(5, 6, 1, 1)
    v[:, dead] = 0
    return parse(TWO, w=weight(6, 3, 1, 1), u=weight(4, 6, 1, 1), v=v)


def test_one_reader_gets_what_it_reads() -> None:
    after, done = check(two([1, 4]))
    assert done.rows == (("Conv_3", 6, 4),)
    assert [n.op_type for n in after.graph] == ["Conv", "Relu", "Conv", "Gather", "Conv"]
    (gather,) = [n for n in after.graph if n.op_type == "Gather"]
    assert gather.inputs[1].const_value.numpy().tolist() == [0, 2, 3, 5]  # type: ignore[union-attr]
    assert after.graph.initializers["v"].shape == (5, 4, 1, 1)
    assert after.graph.initializers["u"].shape == (4, 6, 1, 1)


def test_equal_choices_share_one_gather() -> None:
    model = two([1, 4])
    u = model.graph.initializers["u"]
    array = u.const_value.numpy().copy()  # type: ignore[union-attr]
    array[:, [1, 4]] = 0
    u.const_value = ir.tensor(array, name="u")
    after, done = check(model)
    assert len(done.rows) == 2
    assert [n.op_type for n in after.graph].count("Gather") == 1


@pytest.mark.parametrize(
    ("body", "shape"),
    [
        ("y = MatMul(h, v)", (4, 5)),
        ("a = Reshape(h, rows)  y = Gemm(a, v)", (4, 5)),
        ("a = Reshape(h, rows)  y = Gemm<transB=1>(a, v)", (5, 4)),
        ("t = Transpose<perm=[0,2,1]>(h)  y = ConvTranspose(t, v)", (4, 5, 1)),
    ],
)
def test_every_kind_of_consumer(body: str, shape: tuple[int, ...]) -> None:
    axis = shape.index(4)
    v = weight(*[6 if n == 4 else n for n in shape])
    v[(slice(None),) * axis + ([0, 5],)] = 0
    out = "float[1,5,7] y" if "ConvTranspose" in body else "float[1,7,5] y"
    out = "float[7,5] y" if "Gemm" in body else out
    arrays = {"v": v, "w": weight(3, 6)} | ({"rows": np.array([7, 6])} if "rows" in body else {})
    after, done = check(
        parse(f"g (float[1,7,3] x) => ({out}) {{ h = MatMul(x, w)  {body} }}", **arrays)
    )
    assert len(done.rows) == 1
    assert after.graph.initializers["v"].shape == shape


def test_a_shared_weight_stays_for_the_other() -> None:
    v = weight(6, 6, 1, 1)
    v[:, [0, 3]] = 0
    text = """g (float[1,6,8,8] x) => (float[1,6,8,8] y) { a = Conv(x, v)  r = Relu(a)
        y = Conv(r, v) }"""
    seen: list[int] = []

    def first_only(before: ir.Model, after: ir.Model) -> bool:
        seen.append(len(after.graph))
        return len(seen) != 2

    model = parse(text, v=v)
    after = model.clone()
    done = edges.gather(after, first_only)
    assert distance(after, model) <= BOUND
    assert done.rows == (("Conv_0", 6, 4),)
    assert after.graph.initializers["v"].shape == (6, 6, 1, 1)


@pytest.mark.parametrize(
    "body",
    [
        "y = Conv<group=2>(x, w)",  # within groups
        "y = MatMul(x, x)",  # no weight
        "y = Conv(x, all)",  # nothing ignored
        "y = Conv(x, none)",  # everything ignored
    ],
)
def test_what_is_left_alone(body: str) -> None:
    v = weight(6, 3, 1, 1)
    v[:, 1] = 0
    arrays = {"w": v, "all": weight(6, 6, 1, 1), "none": np.zeros((6, 6, 1, 1), np.float32)}
    used = {name: array for name, array in arrays.items() if f"{name})" in body}
    _, done = check(parse(f"g (float[1,6,8,8] x) => (float[1,6,8,8] y) {{ {body} }}", **used))
    assert not done.rows
    assert not done.declined


def test_what_does_not_pay_has_a_reason() -> None:
    _, done = check(two([1, 4]), lambda before, after: False)
    assert [d.reason for d in done.declined] == ["copying its inputs costs more than it saves"]
    _, done = check(two([1, 4]), lambda before, after: len(before.graph) == 1)
    assert [d.reason for d in done.declined] == ["faster by itself, but not in the whole model"]


def test_the_measured_judge_sees_a_large_saving() -> None:
    v = weight(512, 512, 3, 3)
    v[:, 16:] = 0
    text = "g (float[1,512,14,14] x) => (float[1,512,14,14] y) { y = Conv<pads=[1,1,1,1]>(x, v) }"
    model = parse(text, v=v)
    assert len(edges.gather(model).rows) == 1


def test_the_smallest_norms_are_chosen() -> None:
    model = two([])
    v = model.graph.initializers["v"].const_value.numpy()  # type: ignore[union-attr]
    order = np.argsort((v.astype(np.float64) ** 2).sum(axis=(0, 2, 3)))
    assert edges.zero_inputs(model.graph, 0.5) == 3 + 3 + 1
    after = model.graph.initializers["v"].const_value.numpy()  # type: ignore[union-attr]
    assert sorted(np.flatnonzero(~after.any(axis=(0, 2, 3)))) == sorted(order[:3])


def test_shrink_inputs_on_a_residual_network() -> None:
    model = sg.load(zoo.build("resnet18", size=64))
    done = shrink(model, 1.0, inputs=0.5)
    assert done.error is not None
    assert done.error <= 1e-4
    assert done.gathered is not None
    assert done.macs[1] < done.macs[0]
    assert len(done.gathered.rows) + len(done.gathered.declined) > 0
    assert "by Gather" in done.summary()
    assert all(after < before for _, before, after in done.gathered.rows)


def test_a_wrong_share() -> None:
    with pytest.raises(UsageError, match="inputs"):
        shrink(two([]), inputs=0.0)
