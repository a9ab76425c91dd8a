"""What decides whether an artefact is right where ONNX Runtime itself is not."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import sparsegraph as sg
from sparsegraph import double, proof, verify
from sparsegraph.errors import UnsupportedError, VerifyError
from tests.passes.check import parse, weight

LIMIT = proof.TOLERANCE


@pytest.fixture(scope="module")
def model() -> ir.Model:
    """On zeros its norm divides equal values by their deviation; ONNX Runtime rounds their mean."""
    text = """g (float[1,3,24,24] x) => (float[1,16,24,24] y) {
        c = Conv<pads=[1,1,1,1]>(x, w, b)
        n = InstanceNormalization(c, scale, shift)
        y = Mul(n, gain) }"""
    arrays = {"scale": weight(16), "shift": weight(16), "gain": weight(1, 16, 1, 1)}
    return parse(text, w=weight(16, 3, 3, 3), b=weight(16), **arrays)


@pytest.fixture(scope="module")
def artefact(model: ir.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("proof") / "model.sg"
    compiled = sg.compile(model, output=path, keep_native=True, check=False)
    assert not compiled.fallback_nodes
    return path


def make_wrong(monkeypatch: pytest.MonkeyPatch, error: float) -> None:
    """Artefacts give outputs that are off by `error`."""
    true_run = proof.InferenceSession.run

    def run(self: proof.InferenceSession, *args: object) -> list[np.ndarray]:
        (y,) = true_run(self, *args)
        y.flat[0] += error * np.abs(y).max()
        return [y]

    monkeypatch.setattr(proof.InferenceSession, "run", run)


def test_outputs_that_are_nearer_to_float64(model: ir.Model, artefact: Path) -> None:
    feed = verify.feeds_for(model)[0]
    found = verify.Session(model).run(feed)
    wide = {name: y.astype("f8") for name, y in found.items()}
    assert verify.compare(wide, double.run(model, feed)) > LIMIT, "ONNX Runtime got better"
    record = proof.prove([model], artefact, 1)
    assert (record["checked"], record["feeds"]) == (True, 3)
    assert record["max_rel_error"] < 1e-5


def test_outputs_that_are_further(
    model: ir.Model, artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_wrong(monkeypatch, 1e-3)
    with pytest.raises(VerifyError, match=r"on feed 0, need <= 1e-04.*amplifies rounding"):
        proof.prove([model], artefact, 1)


def test_without_float64_it_is_refused(
    model: ir.Model, artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(*_: object) -> None:
        raise UnsupportedError("no such operator")

    monkeypatch.setattr(double, "run", lacking)
    with pytest.raises(VerifyError, match=r"on feed 0.*report this model"):
        proof.prove([model], artefact, 1)


@pytest.mark.parametrize(
    ("own", "theirs", "is_right"),
    [
        (0.5e-4, 1e-2, True),  # right, whatever ONNX Runtime gives
        (0.5e-4, np.inf, True),
        (0.9e-2, 1e-2, True),
        (1.1e-2, 1e-2, False),
        (0.5, 0.6, False),  # neither is
        (0.5, np.inf, False),
        (0.5, np.nan, False),
        (np.nan, 1e-2, False),
    ],
)
def test_in_double(own: float, theirs: float, is_right: bool) -> None:
    model = parse("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    feed = {"x": np.ones(2, "f4")}
    ours, found = ({"y": np.array([1, 1 - off], "f4")} for off in (own, theirs))
    error, judged, fix = proof._in_double(model, feed, ours, found, 0.7, LIMIT)
    assert judged is is_right
    assert error == (pytest.approx(own, rel=1e-2) if is_right else 0.7)
    assert bool(fix) is not is_right


def close_call(share: float = 1.0) -> ir.Model:
    """Row 0 or 1 of a table where the input is zero, which of them is for the last bit to say."""
    return parse(
        """g (float[1,4] x) => (float[1,1,3] y) {
        scaled = Mul(x, share)  d = Add(scaled, b)  v, i = TopK(d, k)  y = Gather(table, i) }""",
        b=np.float32([[1, np.nextafter(np.float32(1), np.float32(2)), 0, 0]]), table=weight(4, 3),
        k=np.array([1]), share=np.float32(share),
    )  # fmt: skip


def rounding() -> ir.Model:
    """The sine of a large number where the input is zero."""
    return parse(
        """g (float[1,4] x) => (float[1,4] y) {
        large = Mul(b, scale)  wave = Sin(large)
        is_zero = Equal(x, zero)  y = Where(is_zero, wave, x) }""",
        b=weight(1, 4), scale=np.float32(1e7), zero=np.float32(0),
    )  # fmt: skip


@pytest.mark.parametrize("make", [close_call, rounding])
def test_a_feed_on_which_the_model_cannot_tell(
    make: Callable[[], ir.Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not count; others do."""

    def lacking(*_: object) -> None:
        raise UnsupportedError("no such operator")

    model, path = make(), tmp_path / "model.sg"
    sg.compile(model, output=path, keep_native=True, check=False)
    if make is rounding:
        monkeypatch.setattr(double, "run", lacking)
    true_run, at_zero = proof.InferenceSession.run, [1.0, 0.0]

    def run(self: proof.InferenceSession, _: None, feed: verify.Feed) -> list[np.ndarray]:
        (y,) = true_run(self, None, feed)
        return [y + np.float32(at_zero[bool(feed["x"].any())])]

    monkeypatch.setattr(proof.InferenceSession, "run", run)
    assert proof.prove([model], path, 1)["feeds"] == 2
    at_zero[1] = 0.1
    with pytest.raises(VerifyError, match="on feed 1"):
        proof.prove([model], path, 1)


def test_no_feed_on_which_the_model_can_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = close_call(share=0.0), tmp_path / "model.sg"
    sg.compile(model, output=path, keep_native=True, check=False)
    make_wrong(monkeypatch, 0.1)
    with pytest.raises(VerifyError, match=r"rounding decides, on every feed.*check=False"):
        proof.prove([model], path, 1)
