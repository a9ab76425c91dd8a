"""Sub-networks over one weight file: sizes, outputs, masks that overlap, what is refused."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import Result
from typer.testing import CliRunner

import sparsegraph as sg
from benchmarks import zoo
from sparsegraph.cli import app
from sparsegraph.errors import CaptureError, UsageError, VerifyError
from sparsegraph.family import WEIGHTS, family
from sparsegraph.shrink import shrink
from sparsegraph.verify import Session, compare, feeds_for
from tests.structure.learnt import encoder
from tests.structure.topologies import ALL

BOUND = 1e-5


@pytest.mark.parametrize("by", ["prefix", "norm"])
def test_members_equal_what_shrink_makes(tmp_path: Path, by: str) -> None:
    model = sg.load(zoo.build("resnet18", size=64))
    members = family(model, {"0.5": 0.5, "0.75": 0.75, "1.0": 1.0}, tmp_path, by)
    feed = feeds_for(model, 2)[1]
    for member in members:
        alone = shrink(model, float(member.name), by)
        want = Session(alone.model).run(feed)
        assert compare(Session(sg.load(member.file)).run(feed), want) <= BOUND
        assert (member.parameters, member.macs) == (alone.parameters[1], alone.macs[1])
        assert member.error is not None
        assert member.error <= BOUND
    assert members[0].macs < members[1].macs < members[2].macs


def test_weights_are_written_once(tmp_path: Path) -> None:
    model = sg.load(zoo.build("resnet18", size=64))
    members = family(model, {"small": 0.25, "large": 1.0}, tmp_path)
    n_bytes = 4 * members[1].parameters
    assert n_bytes * 0.99 < (tmp_path / WEIGHTS).stat().st_size < n_bytes * 1.01
    assert all(member.file.stat().st_size < 0.01 * n_bytes for member in members)


def test_onnx_runtime_reads_the_files_as_they_are(tmp_path: Path) -> None:
    import onnxruntime

    model = sg.load(ALL["unet"]())
    (member,) = family(model, {"half": 0.5}, tmp_path)
    onnx.checker.check_model(str(member.file), full_check=True)
    session = onnxruntime.InferenceSession(member.file)
    feed = feeds_for(model, 2)[1]
    (want,) = Session(shrink(model, 0.5, "prefix").model).run(feed).values()
    (got,) = session.run(None, feed)
    assert np.abs(got - want).max() <= BOUND * np.abs(want).max()


def test_overlapping_masks_on_one_backbone(tmp_path: Path) -> None:
    """Two tasks keep different hidden units and heads of one encoder."""
    model = sg.load(encoder("none"))
    heads, hidden = (g.name for g in sorted(shrink(model, 1.0).groups, key=lambda g: len(g.roots)))
    masks = {
        "a": {heads: [0, 2], hidden: list(range(0, 40))},
        "b": {heads: [1, 2, 3], hidden: list(range(20, 64, 2))},
    }
    members = family(model, masks, tmp_path)
    feed = feeds_for(model, 2)[1]
    for member in members:
        want = Session(shrink(model, masks[member.name]).model).run(feed)
        assert compare(Session(sg.load(member.file)).run(feed), want) <= BOUND


def test_a_damaged_weight_file_is_noticed(tmp_path: Path) -> None:
    model = sg.load(ALL["vgg"]())
    (member,) = family(model, {"half": 0.5}, tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"")
    with pytest.raises(CaptureError):
        sg.load(member.file)


def test_a_family_may_take_the_place_of_the_one_it_comes_from(tmp_path: Path) -> None:
    """The model's weights are mapped from the file that is written."""
    model = sg.load(ALL["vgg"]())
    feed = feeds_for(model, 2)[1]
    want = Session(shrink(model, 0.5, "prefix").model).run(feed)
    (whole,) = family(model, {"whole": 1.0}, tmp_path)
    half, _ = family(sg.load(whole.file), {"half": 0.5, "whole": 1.0}, tmp_path)
    assert compare(Session(sg.load(half.file)).run(feed), want) <= BOUND


def test_what_fails_leaves_the_folder_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = sg.load(ALL["vgg"]())
    family(model, {"half": 0.5}, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    tries = iter([None, VerifyError("no")])

    def fail_later(*_: object) -> None:
        if error := next(tries):
            raise error

    monkeypatch.setattr("sparsegraph.family._check", fail_later)
    with pytest.raises(VerifyError):
        family(model, {"half": 0.25, "whole": 1.0}, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("keeps", [{}, {"": 0.5}, {"a/b": 0.5}, {"x": 0.0}])
def test_what_is_refused(tmp_path: Path, keeps: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        family(sg.load(ALL["vgg"]()), keeps, tmp_path)


def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["family", *map(str, arguments)])


def test_command(tmp_path: Path) -> None:
    """A width and a mask beside each other, and the names that a mask needs."""
    source, mask, table = tmp_path / "m.onnx", tmp_path / "mask.json", tmp_path / "t.json"
    onnx.save(ALL["vgg"](), source)
    names = [g.name for g in shrink(sg.load(source), 1.0).groups]
    mask.write_text(json.dumps({names[0]: [0, 2, 5], names[1]: 0.5}))
    to = tmp_path / "nested"
    result = command(
        source, "-o", to, "--member", "half=0.5", "--member", f"task={mask}", "--groups",
        "--json", table,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert all(name in result.output for name in (*names, WEIGHTS, "half.onnx"))
    facts = json.loads(table.read_text())
    assert [m["name"] for m in facts["members"]] == ["half", "task"]
    assert all(m["error_against_masked"] <= BOUND for m in facts["members"])
    want = shrink(sg.load(source), {names[0]: [0, 2, 5], names[1]: 0.5}, "prefix")
    assert facts["members"][1]["parameters"] == want.parameters[1]
    feed = feeds_for(want.model, 2)[1]
    assert compare(Session(sg.load(to / "task.onnx")).run(feed), Session(want.model).run(feed)) == 0


@pytest.mark.parametrize(
    ("members", "text"),
    [
        (["half"], "NAME=SHARE or a mask"),
        (["a=0.5", "a=0.25"], "each name once"),
        (["a=missing.json"], "No such file"),
        (["a=LIST"], "another layout"),
        (["a=WORDS"], "another layout"),
        (["a=NAMES"], "another layout"),
        (["a=GROUP"], "no such group"),
        (["a=2"], "at most 1"),
    ],
)
def test_command_refuses(tmp_path: Path, members: list[str], text: str) -> None:
    source = tmp_path / "m.onnx"
    onnx.save(ALL["vgg"](), source)
    layouts = {
        "LIST": [1],
        "WORDS": {"g": "half"},
        "NAMES": {"g": ["a"]},
        "GROUP": {"nothing": 0.5},
    }
    for name, layout in layouts.items():
        (tmp_path / name).write_text(json.dumps(layout))
        members = [one.replace(name, str(tmp_path / name)) for one in members]
    result = command(
        source, "-o", tmp_path / "f", *(x for one in members for x in ("--member", one))
    )
    assert result.exit_code == 2
    assert text in result.output
