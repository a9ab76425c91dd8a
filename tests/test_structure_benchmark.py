"""The structure benchmark: topologies are what they say, rows survive the file, ratios."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from benchmarks import lettering, ordered, removal, structure
from benchmarks.zoo import decoder, swin, tagger, unet, yolox
from benchmarks.zoo.counts import macs, parameters
from sparsegraph.capture import load
from sparsegraph.structure.ties import Policy
from sparsegraph.verify import Session, compare, feeds_for
from tests.passes.check import parse, weight
from tests.structure.topologies import ALL

FASTER = structure.Faster("m", "ort", 5, 100, 40, 1000, 250, 400, 160, 8.0, 2.5, 1e-7, 8)


@pytest.mark.parametrize(
    ("make", "published", "operations"),
    [
        (yolox.yolox, 5.06e6, 6.45e9 / 2),  # floating-point operations are two per MAC
        (swin.swin_tiny, 28.29e6, 4.5e9),
        (unet.unet, 31.04e6, None),
        (decoder.decoder, None, None),
        (tagger.tagger, None, None),
    ],
)
def test_published_sizes(
    make: structure.Make, published: float | None, operations: float | None
) -> None:
    proto = make()
    if published is not None:
        assert parameters(proto) == pytest.approx(published, rel=0.012)
    if operations is not None:
        assert macs(proto) == pytest.approx(operations, rel=0.01)


def test_every_topology_of_the_issue_is_listed() -> None:
    assert len(structure.TOPOLOGIES) >= 20
    for name in ("densenet121", "inception_v1", "squeezenet", "shufflenet", "vgg19", "swin_tiny"):
        assert name in structure.TOPOLOGIES


def test_a_row_of_a_small_model() -> None:
    row = removal.cut_against_mask("vgg", load(ALL["vgg"]()), Policy(), 1)
    assert (row.n_units, row.n_groups) == (104, 6)
    assert row.n_removed == sum(max(1, int(0.3 * n)) for n in (8, 8, 16, 16, 32, 24))
    assert row.parameters_left < row.parameters
    assert row.rounding_left is not None
    assert max(row.rounding, row.rounding_left) <= removal.BOUND
    assert row.first <= row.error <= removal.BOUND
    assert (row.n_above, row.n_draws, row.ordered, row.n_exact) == (0, removal.DRAWS, 0, 1)
    assert row.exact <= 1e-12
    assert 0 < row.analysis_s <= 1


STEEP = """g (float[64,48] x) => (float[64,8] y) {
    h = MatMul(x, w)  r = Relu(h)  z = MatMul(r, v)  y = Softmax(z) }"""


def steep() -> ir.Model:
    """Logits of thousands before a Softmax."""
    return parse(STEEP, w=weight(48, 600), v=weight(600, 8) * 100)


def test_what_float32_cannot_hold_is_nothing_but_the_order_of_sums() -> None:
    row = removal.cut_against_mask("softmax", steep(), Policy())
    assert row.rounding_left is not None
    assert min(row.error, row.rounding, row.rounding_left) > removal.BOUND
    assert 0 < row.n_above <= row.n_draws == row.n_exact
    assert row.exact <= 1e-10
    assert row.ordered == 0


def test_sums_in_order_are_those_of_onnx_runtime_but_for_rounding() -> None:
    model = load(ALL["squeeze_excite"]())
    feed = feeds_for(model, 2)[1]
    assert 0 < compare(ordered.run(model, feed), Session(model).run(feed)) <= 1e-5


def test_cutting_something_else_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(model: ir.Model, policy: Policy, gone: np.ndarray) -> tuple[ir.Model, ir.Model]:
        smaller, hidden = pair(model, policy, gone)
        weights = smaller.graph.initializers["v"]
        array = weights.const_value.numpy()  # type: ignore[union-attr]
        weights.const_value = ir.tensor(array * np.float32(1 + 1e-6))
        return smaller, hidden

    pair = removal.pair
    monkeypatch.setattr(removal, "pair", other)
    row = removal.cut_against_mask("softmax", steep(), Policy())
    assert row.error < 3 * row.rounding, "float32 alone does not tell"
    assert min(row.exact, row.ordered) > 1e-6


def test_a_page_is_dark_strokes_on_white() -> None:
    page = lettering.page(320, 200)
    assert page.shape == (1, 3, 320, 200)
    green = page[0, 1] * 0.224 + 0.456
    assert green.min() == pytest.approx(0.1, abs=1e-3)
    assert green.max() == pytest.approx(1.0, abs=1e-3)
    dark = green < 0.5
    assert 0.02 < dark.mean() < 0.2
    rows = dark.any(axis=1)
    assert np.count_nonzero(rows[1:] & ~rows[:-1]) == 4, "lines of text"
    assert not dark[:, :16].any()


def test_rows_are_merged_by_model_and_engine(tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    masked = removal.cut_against_mask("vgg", load(ALL["vgg"]()), Policy())
    for kind, row in (("half", FASTER), ("masked", masked), ("half", FASTER)):
        structure.save(file, kind, row, ["half"])
    rows = structure.read(file)
    assert [replace(row, commit="") for row in rows] == [FASTER, masked]
    assert all(row.commit for row in rows)
    text = structure.table(structure.read(file))
    assert text.index("vgg") < text.index("ort")


def test_speed_over_operations() -> None:
    assert FASTER.of_macs == pytest.approx((8.0 / 2.5) / 4)
    assert "0.80" in structure.line(FASTER)


def test_the_published_file_meets_the_bars() -> None:
    rows = structure.read(structure.FILE)
    assert all(row.commit and "dirty" not in row.commit for row in rows)
    masked = [row for row in rows if isinstance(row, structure.Masked)]
    assert {row.model for row in masked} >= set(structure.TOPOLOGIES)
    for row in masked:
        assert row.analysis_s <= 1
        assert row.exact <= 1e-11, row.model
        assert min(row.first, row.error) <= removal.BOUND, f"{row.model}, first draw"
        assert row.error <= removal.BOUND or row.n_above, row.model
        assert row.n_exact >= max(1, row.n_above), row.model
        assert row.ordered <= 1e-7, row.model
        assert row.error <= max(removal.BOUND, 3 * row.rounding), row.model
        assert row.n_draws == removal.DRAWS * (1 + (row.model in removal.READERS)), row.model
