"""The check of public libraries' architectures, without them: what it reads, tells, returns."""

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from benchmarks import architectures  # noqa: E402
from benchmarks.architectures import MIXED, NATIVE, REFUSED, WRONG, Case  # noqa: E402

nn = torch.nn


class Branch(nn.Module):
    def forward(self, x: Any) -> Any:
        return x if x.sum() > 0 else -x


class Angle(nn.Module):
    def forward(self, x: Any) -> Any:
        return {"places": x.long(), "angles": torch.atan(x)}


def built(name: str, side: int) -> tuple[nn.Module, dict[str, Any]]:
    """In the place of a library."""
    modules = {
        "linear": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        "branch": lambda: nn.Sequential(nn.Conv2d(3, 3, 3), Branch()),
        "angle": lambda: nn.Sequential(nn.Conv2d(3, 16, 3), Angle()),
    }
    module = modules[name]()
    return module, {"input": torch.randn(1, 3, side, side)}


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architectures, "_timm", built)
    monkeypatch.setattr(architectures, "find_spec", lambda name: name == "timm" or None)


@pytest.mark.parametrize(
    ("name", "kind", "note"),
    [
        ("linear", NATIVE, ""), ("angle", MIXED, "atan"), ("branch", REFUSED, "data-dependent"),
        ("unknown", REFUSED, "not built: KeyError"),
    ],
)  # fmt: skip
def test_outcomes(name: str, kind: str, note: str) -> None:
    found = architectures.attempt(Case("timm", name, 8), 0.5)
    assert found.kind == kind
    assert note in found.note
    assert (found.error is not None) == (kind in (NATIVE, MIXED))


def test_another_answer_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module gives other values when it is asked for the first time than when captured."""
    module, inputs = Case("timm", "linear", 8).build()
    first = [1.001]

    class Changing(nn.Module):
        def forward(self, *values: Any) -> Any:
            y = module(*values)
            return y if torch.compiler.is_exporting() or not first else y * first.pop()

    monkeypatch.setattr(Case, "build", lambda self: (Changing(), inputs))
    found = architectures.attempt(Case("timm", "linear", 8), 1.0)
    assert found.kind == WRONG
    assert found.error == pytest.approx(1e-3, rel=0.1)


def test_the_table() -> None:
    """Every configuration names a kind of inputs, and its class can be told from its name."""
    cases = list(architectures.cases())
    assert {c.library for c in cases} == set(architectures.LIBRARIES)
    for case in cases:
        if case.library != "transformers":
            sides = case.options if isinstance(case.options, list) else [case.options]
            assert 4 <= min(sides) <= max(sides) <= 256
            assert len(sides) in (1, 3)
            continue
        assert architectures._inputs(case.options["kind"], case.options)
    assert [c.name for c in architectures.cases(["swin_v2"])] == ["swin_v2_t"]


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "table.toml"
    table.write_text(
        '[timm]\nlinear = 8\n[torchvision]\nalexnet = 64\n'
        '[transformers-defaults]\n[transformers]\n'
    )  # fmt: skip
    monkeypatch.setattr(architectures.cases, "__defaults__", ((), table))
    out = tmp_path / "out.json"
    assert architectures.main(["--density", "0.5", "--json", str(out)]) == 0
    told = capsys.readouterr()
    assert "1 native" in told.out
    assert "1 of torchvision left out: pip install torchvision" in told.err
    assert [o["kind"] for o in json.loads(out.read_text())] == [NATIVE]
    assert architectures.main(["--only", "alexnet"]) == 1
    for wrong in (["--density", "0"], ["--only", "nothing"]):
        with pytest.raises(SystemExit) as stopped:
            architectures.main(wrong)
        assert stopped.value.code == 2
