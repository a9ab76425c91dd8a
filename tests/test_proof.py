"""What decides whether an artefact is right where ONNX Runtime itself is not."""

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
