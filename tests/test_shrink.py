"""Removal on request: keep-ratios, keep-lists, criteria, the proof, and the command."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from typer.testing import CliRunner

import sparsegraph as sg
from sparsegraph.cli import app
from sparsegraph.errors import UsageError, VerifyError
from sparsegraph.graph import weight_bytes
from sparsegraph.shrink import n_macs, shrink
from sparsegraph.structure import balance, cut, multiples
from sparsegraph.structure.criteria import CRITERIA, Evidence, criterion
from sparsegraph.structure.groups import groups
from sparsegraph.structure.moved import Moved
from sparsegraph.structure.multiples import MULTIPLES, fastest
from sparsegraph.structure.ties import Policy, analyse
from sparsegraph.verify import feeds_for, run_onnx
from tests.passes.check import parse, weight
from tests.structure.learnt import encoder, residual
from tests.structure.topologies import ALL

CHAIN = """g (float[1,4,6,6] x) => (float[1,3,6,6] y) {
    c = Conv<pads=[1,1,1,1]>(x, w, b)  r = Relu(c)  y = Conv(r, v)  }"""


def chain(sizes: tuple[float, ...] = (1, 4, 2, 3, 6, 5, 8, 7)) -> ir.Model:
    """Eight hidden channels whose norms have this order."""
    unit = np.ones((8, 4, 3, 3), np.float32) / 6
    signs = np.sign(weight(8, 4, 3, 3))
    w = unit * signs * np.array(sizes, np.float32).reshape(8, 1, 1, 1)
    return parse(CHAIN, w=w, b=weight(8), v=weight(3, 8, 1, 1) * 0.01)


def hidden(model: ir.Model) -> int:
    return int(next(iter(model.graph)).outputs[0].shape[1])  # type: ignore[index]


def test_the_largest_norms_stay() -> None:
    model = chain()
    before = model.graph.initializers["w"].const_value.numpy()  # type: ignore[union-attr]
    done = shrink(model, 0.5)
    after = done.model.graph.initializers["w"].const_value.numpy()  # type: ignore[union-attr]
    assert np.array_equal(after, before[[4, 5, 6, 7]])
    assert done.error is not None
    assert done.error <= 1e-6
    assert done.change > 0.01
    (row,) = done.table
    assert (row.n_before, row.n_after) == (8, 4)
    assert row.picture.count("█") == 10


def test_the_given_model_stays_as_it_was() -> None:
    model = chain()
    text = str(ir.to_proto(model))
    shrink(model, 0.25)
    assert str(ir.to_proto(model)) == text


def test_a_list_names_the_units_that_stay() -> None:
    model = chain()
    name = shrink(model, 1.0).groups[0].name
    before = model.graph.initializers["w"].const_value.numpy()  # type: ignore[union-attr]
    done = shrink(model, {name: [0, 2]})
    after = done.model.graph.initializers["w"].const_value.numpy()  # type: ignore[union-attr]
    assert np.array_equal(after, before[[0, 2]])


@pytest.mark.parametrize(
    ("keep", "multiple", "left"), [(0.5, 1, 4), (0.4, 4, 4), (0.6, 4, 8), (0.01, 1, 1), (1.0, 1, 8)]
)
def test_counts_and_multiples(keep: float, multiple: int, left: int) -> None:
    assert hidden(shrink(chain(), keep, multiple=multiple).model) == left


def test_unnamed_groups_stay_whole() -> None:
    model = sg.load(ALL["unet"]())
    names = [group.name for group in shrink(model, 1.0).groups]
    done = shrink(model, {names[0]: 0.5})
    assert [r.group for r in done.table if r.n_after < r.n_before] == names[:1]
    assert done.parameters[1] < done.parameters[0]
    assert done.macs[1] < done.macs[0]


@pytest.mark.parametrize("by", CRITERIA)
def test_every_criterion_gives_a_proved_model(by: str) -> None:
    model = sg.load(ALL["squeeze_excite"]())
    done = shrink(model, 0.5, by, calibration=feeds_for(model, 2)[1:])
    assert done.error is not None
    assert done.error <= 1e-5
    assert all(r.n_after == (r.n_before + 1) // 2 for r in done.table)


def test_activation_sees_inputs_that_are_small() -> None:
    model = chain((8, 8, 8, 8, 1, 1, 1, 1))
    analysis = analyse(model)
    (group,) = groups(analysis)
    feeds = feeds_for(model, 2)[1:]
    scores = criterion("activation")(Evidence(model, analysis, feeds))[group.roots]
    run = run_onnx(model, feeds[0], [str(list(model.graph)[1].outputs[0].name)])
    (read,) = run.values()
    energy = (read[0].astype(np.float64) ** 2).mean(axis=(1, 2))
    v = model.graph.initializers["v"].const_value.numpy().astype(np.float64)  # type: ignore[union-attr]
    assert np.allclose(scores, np.sqrt(energy * (v**2).sum(axis=(0, 2, 3))), rtol=1e-5)


def test_norm_scale_reads_batch_norm() -> None:
    text = """g (float[1,4,6,6] x) => (float[1,3,6,6] y) {
        c = Conv(x, w)  n = BatchNormalization(c, gamma, beta, mean, var)
        r = Relu(n)  y = Conv(r, v)  }"""
    gamma = np.array([0.1, 3, 0.2, 2, 0.3, 4, 0.4, 5], np.float32)
    model = parse(
        text, w=weight(8, 4, 1, 1), v=weight(3, 8, 1, 1), gamma=gamma, beta=weight(8),
        mean=weight(8), var=weight(8) ** 2 + 0.5,
    )  # fmt: skip
    analysis = analyse(model)
    (group,) = groups(analysis)
    scores = criterion("scale")(Evidence(model, analysis))[group.roots]
    assert np.allclose(scores, gamma)


def test_features_under_a_norm_only_when_allowed() -> None:
    model = sg.load(residual("layer"))
    strict, loose = shrink(model, 0.5), shrink(model, 0.5, through_norm=True)
    assert len(loose.groups) == len(strict.groups) + 1
    assert strict.error is not None
    assert loose.error is None, "nothing to compare with: mean and variance are others"


def test_norms_that_lose_nothing_leave_a_proof() -> None:
    done = shrink(sg.load(ALL["windows"]()), 0.5, through_norm=True)
    assert done.error is not None


def test_multiples_count_channels_not_heads() -> None:
    done = shrink(sg.load(encoder("none")), 0.5, multiple=8)
    heads, hidden = sorted(done.table, key=lambda row: row.n_before)
    assert (heads.n_before, heads.n_after) == (4, 2), "a head has eight features already"
    assert (hidden.n_before, hidden.n_after) == (64, 32)


def test_the_largest_multiple_that_costs_nothing() -> None:
    asked: list[int] = []

    def cut_to(n: int) -> ir.Model:
        asked.append(n)
        return chain()

    best, times = fastest(cut_to, lambda models: [1.0, 1.01, 1.01, 1.2])
    assert best == 8
    assert list(times) == asked == list(MULTIPLES)
    assert fastest(cut_to, lambda models: [1.0, 1.1, 1.1, 1.2])[0] == 1


def test_measured_multiples(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    def timer(models: list[ir.Model]) -> list[float]:
        counts.extend(hidden(model) for model in models)
        return [2.0, 1.0, 1.0, 3.0]

    monkeypatch.setattr(multiples, "latencies", timer)
    done = shrink(chain(), 0.3, multiple="measured")
    assert counts == [2, 4, 8, 8]
    assert (done.multiple, hidden(done.model)) == (8, 8)
    assert "measured: 1: 2 ms, 4: 1 ms" in done.summary()
    assert done.facts()["multiples_ms"] == {1: 2.0, 4: 1.0, 8: 1.0, 16: 3.0}


def test_latencies_are_measured_in_turn() -> None:
    small, large = multiples.latencies([chain(), sg.load(ALL["yolox"]())])
    assert 0 < small < large


def test_grouped_convolutions_have_two_policies() -> None:
    model = sg.load(ALL["shufflenet_v1"]())
    assert not shrink(model, 0.5).groups
    within = shrink(model, 0.5, grouped="within")
    assert within.parameters[1] < within.parameters[0]
    counts = [n.attributes.get_int("group", 1) for n in within.model.graph if n.op_type == "Conv"]
    assert set(counts) == {1, 3, 18}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"keep": 0.0}, "above 0"),
        ({"keep": 1.5}, "at most 1"),
        ({"keep": {"nothing": 0.5}}, "no such group"),
        ({"by": "taste"}, "no such criterion"),
        ({"by": "activation"}, "no calibration"),
        ({"multiple": 0}, "at least 1"),
        ({"balance": True, "keep": {"a": 0.5}}, "one share for all"),
        ({"through_norm": True, "carry_mean": True}, "one of the two"),
    ],
)
def test_wrong_options(options: dict[str, object], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        shrink(chain(), **options)  # type: ignore[arg-type]


def test_a_wrong_cut_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cut.apply

    def wrong(analysis: object, gone: np.ndarray) -> None:
        right(analysis, gone)  # type: ignore[arg-type]
        graph = analysis.graph  # type: ignore[attr-defined]
        value = graph.initializers["v"]
        value.const_value = ir.tensor(value.const_value.numpy() + 0.01, name="v")

    monkeypatch.setattr(cut, "apply", wrong)
    with pytest.raises(VerifyError, match="shrunk model"):
        shrink(chain(), 0.5)


def test_a_group_prints_how_its_units_hang_together() -> None:
    text = str(shrink(sg.load(ALL["gqa"]()), 1.0).groups[0])
    assert "2 units" in text
    assert "makes" in text
    assert "reads" in text
    assert "16 positions" in text


def test_command(tmp_path: Path) -> None:
    source, to, table = tmp_path / "m.onnx", tmp_path / "s.onnx", tmp_path / "t.json"
    onnx.save(ALL["vgg"](), source)
    arguments = [
        "shrink",
        str(source),
        "-o",
        str(to),
        "--keep",
        "0.5",
        "--groups",
        "--inputs",
        "0.9",
        "--no-balance",
    ]
    result = CliRunner().invoke(app, [*arguments, "--json", str(table)])
    assert result.exit_code == 0, result.output
    assert "parameters" in result.output
    facts = json.loads(table.read_text())
    assert facts["parameters_after"] < facts["parameters_before"]
    assert facts["error_against_masked"] <= 1e-5
    assert all(row["n_after"] < row["n_before"] for row in facts["groups"])
    assert facts["balance"] == []
    onnx.checker.check_model(onnx.load(to), full_check=True)
    feed = feeds_for(sg.load(to), 2)[1]
    assert all(np.isfinite(v).all() for v in run_onnx(onnx.load(to), feed).values())
    both = ["--through-norm", "--carry-mean"]
    refused = CliRunner().invoke(app, ["shrink", str(source), "-o", str(to), *both])
    assert refused.exit_code == 2
    assert "one of the two" in refused.output
    again = CliRunner().invoke(app, ["shrink", str(source), "-o", str(to), "--keep", "nothing=0.5"])
    assert again.exit_code == 2
    assert "no such group" in again.output
    wrong = CliRunner().invoke(app, ["shrink", str(source), "-o", str(to), "--multiple", "many"])
    assert wrong.exit_code == 2
    assert "a count or 'measured'" in wrong.output


def test_policy_is_part_of_the_analysis() -> None:
    model = sg.load(ALL["shufflenet_v1"]())
    assert len(groups(analyse(model, Policy("within")))) == 3
    assert not groups(analyse(model, Policy("whole")))


@pytest.mark.parametrize(
    "body",
    [
        "p = GlobalAveragePool(c)  f = Reshape(p, line)  e = Conv<pads=[1,1]>(f, near)"
        "  s = Sigmoid(e)  g = Reshape(s, map)  m = Mul(c, g)  trace = Relu(x)",
        "m = Softmax<axis=1>(c)  trace = Relu(x)",
        "m = LpNormalization<axis=1>(c)  trace = Relu(x)",
        "m = CumSum(c, one)  trace = Relu(x)",
        "m = Relu(c)  trace = Sigmoid(c)",
    ],
)
def test_near_misses_have_no_units_to_choose(body: str) -> None:
    """A convolution over channels, norms and sums along them, an output that shows them."""
    text = f"""g (float[1,3,6,6] x) => (float[1,4,6,6] y, float[n,k,6,6] trace) {{
        c = Conv(x, w)  {body}  y = Conv(m, v) }}"""
    given = {
        "near": weight(1, 1, 3), "line": np.array([1, 1, 6]), "map": np.array([1, 6, 1, 1]),
        "one": np.array(1),
    }  # fmt: skip
    used = {name: array for name, array in given.items() if f" {name})" in body}
    model = parse(text, w=weight(6, 3, 1, 1), v=weight(4, 6, 1, 1), **used)
    done = shrink(model, 0.5)
    assert not done.groups
    assert done.parameters[0] == done.parameters[1]


def two_blocks() -> ir.Model:
    """A stream of 32 channels that three operators read, and two blocks of 64."""
    text = """g (float[1,3,8,8] x) => (float[1,4,8,8] y) {
        s = Conv(x, w)  a = Conv(s, u1)  r = Conv<group=64, pads=[1,1,1,1]>(a, k)
        b = Conv(r, v1)  t = Add(s, b)
        c = Conv(t, u2)  q = Relu(c)  d = Conv(q, v2)  o = Add(t, d)  y = Conv(o, head) }"""
    ups = {f"u{i}": weight(64, 32, 1, 1) * i for i in (1, 2)}
    downs = {f"v{i}": weight(32, 64, 1, 1) * i for i in (1, 2)}
    ends = {"w": weight(32, 3, 1, 1), "head": weight(4, 32, 1, 1), "k": weight(64, 1, 3, 3)}
    return parse(text, **ends, **ups, **downs)


def widths(model: ir.Model) -> tuple[int, int]:
    """Of the stream and of a block."""
    n_inner, n_stream = model.graph.initializers["u1"].shape.numpy()[:2]  # type: ignore[union-attr]
    return n_stream, n_inner


def timed(monkeypatch: pytest.MonkeyPatch, ms: Callable[[ir.Model], float]) -> list[list[ir.Model]]:
    """Latencies are what `ms` says; the models of every round of timing."""
    seen: list[list[ir.Model]] = []

    def timer(models: list[ir.Model]) -> list[float]:
        seen.append(list(models))
        return [ms(model) for model in models]

    monkeypatch.setattr(balance, "latencies", timer)
    return seen


@pytest.mark.parametrize(
    ("times", "n_stream"),
    [([3.0, 2.0, 1.0], 24), ([1.0, 0.96, 0.96], 16), ([2.0, 1.0, 3.0], 20), ([2, 1.02, 1], 20)],
)
def test_an_equal_number_of_operations_elsewhere(
    monkeypatch: pytest.MonkeyPatch, times: list[float], n_stream: int
) -> None:
    by_width = dict(zip((16, 20, 24), times, strict=True))
    seen = timed(monkeypatch, lambda m: by_width[widths(m)[0]])
    monkeypatch.setattr(Moved, "__call__", lambda *_: 1.0)
    done = shrink(two_blocks(), 0.5, multiple=4, balance=True)
    assert widths(done.model)[0] == n_stream
    (models,) = seen
    even = n_macs(models[0])
    assert widths(models[0]) == (16, 32)
    assert [widths(model)[0] for model in models] == [16, 20, 24]
    assert all(0.85 * even <= n_macs(model) <= even for model in models)
    assert done.error is not None
    assert done.error <= 1e-5
    rows = done.facts()["balance"]
    assert [(row["ms"], row["chosen"]) for row in rows] == [  # type: ignore[attr-defined]
        (ms, width == n_stream) for width, ms in by_width.items()
    ]
    words = "cut evenly: none of 2" if n_stream == 16 else f"{n_stream / 32:.0%} of units with"
    assert words in done.summary()


def test_counts_are_rounded_up_where_the_runtime_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """34 of 48 channels are slow, 40 are fast, 48 are no cut at all."""
    text = """g (float[1,3,8,8] x) => (float[1,4,8,8] y) {
        a = Conv(x, w)  b = Relu(a)  y = Conv(b, v) }"""
    model = parse(text, w=weight(48, 3, 1, 1), v=weight(4, 48, 1, 1))

    def count(model: ir.Model) -> int:
        return int(model.graph.initializers["w"].shape[0])  # type: ignore[index]

    seen = timed(monkeypatch, lambda m: 9.0 if count(m) % 8 else 5.0)
    done = shrink(model, 0.7, balance=True)
    assert [[count(m) for m in models] for models in seen] == [[34, 40], [40, 32]]
    assert count(done.model) == 40
    assert done.multiple == 8
    assert (
        "counts rounded up: 70% of units at multiples of 8: 5 ms (without 9 ms)" in done.summary()
    )
    timed(monkeypatch, lambda m: 5.0)
    assert count(shrink(model, 0.7, balance=True).model) == 34


def test_what_is_faster_must_not_move_the_outputs_further(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, lambda m: 48.0 - widths(m)[0])
    monkeypatch.setattr(Moved, "__call__", lambda _, m: float(widths(m)[0]))
    done = shrink(two_blocks(), 0.5, multiple=4, balance=True)
    assert widths(done.model) == (16, 32)
    assert "moves the outputs further" in done.summary()


def test_a_faster_cut_that_fails_the_proof_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, lambda m: 48.0 - widths(m)[0])
    monkeypatch.setattr(Moved, "__call__", lambda *_: 1.0)
    sound = sys.modules["sparsegraph.shrink"].prove

    def strict(smaller: ir.Model, masked: ir.Model, base: ir.Model) -> float:
        if widths(smaller)[0] != 16:
            raise VerifyError("off")
        return sound(smaller, masked, base)

    monkeypatch.setattr(sys.modules["sparsegraph.shrink"], "prove", strict)
    done = shrink(two_blocks(), 0.5, multiple=4, balance=True)
    assert widths(done.model) == (16, 32)
    assert "failed the proof: off" in done.summary()


def test_the_command_balances_one_share_for_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source, table = tmp_path / "m.onnx", tmp_path / "t.json"
    onnx.save(ir.to_proto(two_blocks()), source)
    timed(monkeypatch, lambda m: 48.0 - widths(m)[0])
    arguments = ["shrink", str(source), "-o", str(tmp_path / "s.onnx"), "--json", str(table)]
    by_hand = [*arguments, "--multiple", "4", "--keep", "0.5"]
    assert CliRunner().invoke(app, by_hand).exit_code == 0
    assert len(json.loads(table.read_text())["balance"]) == 3
    name = shrink(two_blocks(), 1.0).groups[0].name
    assert CliRunner().invoke(app, [*arguments, "--keep", f"{name}=0.5"]).exit_code == 0
    assert json.loads(table.read_text())["balance"] == []


def test_models_beyond_memory_are_cut_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = timed(monkeypatch, lambda _: 1.0)
    one = weight_bytes(shrink(two_blocks(), 0.5).model.graph)
    monkeypatch.setattr(balance, "_HELD_BYTES", 2 * one)
    shrink(two_blocks(), 0.5, multiple=4, balance=True)
    assert [len(models) for models in seen] == [2]
    monkeypatch.setattr(balance, "_HELD_BYTES", 2 * one - 1)
    done = shrink(two_blocks(), 0.5, multiple=4, balance=True)
    assert len(seen) == 1
    assert done.searched is not None
    assert "there is no other cut" in str(done.searched)


def test_how_far_outputs_move() -> None:
    text = """g (float[2,8] x) => (float[2,8] y, int64[2] n) {
        y = MatMul(x, w)  n = ArgMax<axis=1,keepdims=0>(y) }"""
    w = weight(8, 8)
    moved = Moved(parse(text, w=w), [])
    assert moved(parse(text, w=w)) == 0
    assert moved(parse(text, w=0 * w)) == pytest.approx(1)
    assert moved(parse(text, w=1.5 * w)) == pytest.approx(0.5)
    feed = {"x": np.eye(2, 8, dtype=np.float32)}
    beyond = np.concatenate([w[:2], 0 * w[2:]])
    assert Moved(parse(text, w=w), [feed])(parse(text, w=beyond)) == 0


def test_nothing_to_balance() -> None:
    assert shrink(chain(), 1.0, balance=True).searched is None
