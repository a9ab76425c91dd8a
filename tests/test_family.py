"""Sub-networks over one weight file: sizes, outputs, masks that overlap, what is refused."""

from pathlib import Path

import numpy as np
import onnx
import pytest

import sparsegraph as sg
from benchmarks import zoo
from sparsegraph.errors import CaptureError, UsageError
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


@pytest.mark.parametrize("keeps", [{}, {"": 0.5}, {"a/b": 0.5}, {"x": 0.0}])
def test_what_is_refused(tmp_path: Path, keeps: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        family(sg.load(ALL["vgg"]()), keeps, tmp_path)
