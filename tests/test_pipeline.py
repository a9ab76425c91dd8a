"""The list of passes as a whole: proof, roll-back, fuel, skip, dump."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from sparsegraph.errors import PassError, UsageError, VerifyError
from sparsegraph.pipeline import PASSES, PassRecord, optimize
from sparsegraph.rewrite import Fuel, Outcome
from sparsegraph.verify import compare, feeds_for, run_onnx
from tests.passes.check import parse, weight

NET = """g (float[1,4,8,8] x) => (float[1,3] y) {
    m = Mul(w, mask)  c = Conv<pads=[1,1,1,1]>(x, m)
    b = BatchNormalization(c, gamma, beta, mean, var)  i = Identity(b)  r = Relu(i)
    p = GlobalAveragePool(r)  s = Shape<end=1>(x)  t = Concat<axis=0>(s, rest)
    f = Reshape(p, t)  g = Gemm<transB=1>(f, v)  y = Mul(g, two) }"""


def net() -> ir.Model:
    mask = (np.arange(8 * 4 * 9).reshape(8, 4, 3, 3) % 3 == 0).astype(np.float32)
    return parse(
        NET, w=weight(8, 4, 3, 3), mask=mask, gamma=weight(8), beta=weight(8), mean=weight(8),
        var=weight(8) ** 2 + 0.5, rest=np.array([-1]), v=weight(3, 8), two=np.array(2, np.float32),
    )  # fmt: skip


@dataclass(frozen=True)
class Wrong:
    """Scales a weight, which no pass may."""

    exact: ClassVar[bool] = True
    name: ClassVar[str] = "wrong"
    more: float = 1.0

    def run(self, model: ir.Model, fuel: Fuel) -> Outcome:
        value = model.graph.initializers["v"]
        assert value.const_value is not None
        value.const_value = ir.tensor(
            value.const_value.numpy() * np.float32(1 + self.more), name="v"
        )
        return Outcome(1)


@dataclass(frozen=True)
class Crash:
    """Fails half way."""

    exact: ClassVar[bool] = True
    name: ClassVar[str] = "crash"

    def run(self, model: ir.Model, fuel: Fuel) -> Outcome:
        model.graph.remove(model.graph.node(-1), safe=False)
        raise KeyError("nothing")


def test_a_masked_network_becomes_plain_and_small() -> None:
    model = net()
    result = optimize(model)
    ops = [n.op_type for n in result.model.graph]
    assert ops == ["Conv", "Relu", "GlobalAveragePool", "Reshape", "Gemm"]
    weights = result.model.graph.node(0).inputs[1].const_value.numpy()
    assert (weights == 0).mean() == pytest.approx(2 / 3)
    for feed in feeds_for(model, 4):
        assert compare(run_onnx(result.model, feed), run_onnx(model, feed)) < 1e-5
    assert len(model.graph) == 11, "the caller's model is left as it was"


def test_a_second_run_changes_nothing() -> None:
    first = optimize(net())
    again = optimize(first.model)
    assert all(r.n_applied == 0 for r in again.records)


def test_records_tell_what_happened() -> None:
    seen: list[PassRecord] = []
    result = optimize(net(), on_pass=seen.append)
    assert tuple(seen) == result.records
    assert [r.name for r in seen] == [p.name for p in PASSES]
    folded = next(r for r in seen if r.name == "fold_batch_norm")
    assert (folded.n_applied, folded.nodes_before - folded.nodes_after) == (1, 1)
    assert folded.max_rel_error is not None
    assert 0 <= folded.max_rel_error < 1e-5


def test_a_wrong_pass_is_named_and_undone(tmp_path: Path) -> None:
    model = net()
    with pytest.raises(VerifyError, match="wrong") as caught:
        optimize(model, passes=(Wrong(),), dump=tmp_path)
    assert "--skip wrong" in str(caught.value)
    before = onnx.load(tmp_path / "wrong_before.onnx")
    feed = dict(np.load(tmp_path / "wrong_feed.npz"))
    assert compare(run_onnx(before, feed), run_onnx(model, feed)) == 0


def test_without_verification_nothing_is_compared() -> None:
    result = optimize(net(), verify=False, passes=(Wrong(),))
    assert result.records[0].max_rel_error is None


def test_a_crash_is_wrapped_and_leaves_the_model_whole() -> None:
    model = net()
    with pytest.raises(PassError, match=r"crash.*KeyError"):
        optimize(model, passes=(Crash(),))
    assert len(model.graph) == 11


@pytest.mark.parametrize("units", range(0, 12, 3))
def test_any_amount_of_fuel_gives_a_right_model(units: int) -> None:
    result = optimize(net(), fuel=units)
    free = {"remove_unused", "classify_masks"}
    assert sum(r.n_applied for r in result.records if r.name not in free) <= units


def test_skip_and_stop_after() -> None:
    result = optimize(net(), skip=["fold_batch_norm"], stop_after="fold_conv_bias")
    assert result.records[-1].name == "fold_conv_bias"
    assert "BatchNormalization" in [n.op_type for n in result.model.graph]


@pytest.mark.parametrize("options", [{"skip": ["nope"]}, {"stop_after": "nope"}])
def test_unknown_pass_names(options: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="nope"):
        optimize(net(), **options)  # type: ignore[arg-type]


def test_dump_keeps_runnable_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEGRAPH_DUMP", str(tmp_path))
    model = net()
    optimize(model)
    stages = sorted(tmp_path.glob("*.onnx"))
    assert stages[0].name == "00_capture.onnx"
    assert len(stages) > 3
    feed = feeds_for(model)[1]
    want = run_onnx(model, feed)
    for stage in stages:
        assert compare(run_onnx(onnx.load(stage), feed), want) < 1e-5


def test_debug_levels(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    optimize(net(), stop_after="fold_constants")
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("SPARSEGRAPH_DEBUG", "3")
    optimize(net(), stop_after="fold_constants")
    lines = capsys.readouterr().err
    assert "fold_constants" in lines
    assert "- m = Mul(w, mask)" in lines


def test_random_models_are_not_compared_with_themselves() -> None:
    text = "g (float[8] x) => (float[8] y) { a = Identity(x)  b = Bernoulli(h)  y = Add(a, b) }"
    model = parse(text, 15, h=np.full(8, 0.5, np.float32))
    result = optimize(model)
    assert sum(r.n_applied for r in result.records) > 0
    assert all(r.max_rel_error is None for r in result.records)
