"""The HTML report: self-contained, escaped, with the figures that it was given."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from sparsegraph import picture, report
from sparsegraph.bench import Bench, LayerTime
from sparsegraph.capture import load
from sparsegraph.inspect import inspect
from sparsegraph.prune import prune
from tests.conftest import BATCH, perceptron

VOID = {"meta", "br", "path", "rect", "circle"}


class Balance(HTMLParser):
    """Checks that every tag is closed by its own end tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def checked(text: str) -> str:
    Balance(text)
    assert not re.search(r"(src|href)=|url\(|@import|<script", text), "not self-contained"
    return text


def test_report_of_an_inspection() -> None:
    found = inspect(load(perceptron(), {"batch": BATCH}), "x86-64-v3", impose=0.9)
    text = checked(report.of_inspection(found, "model <b>.onnx"))
    assert "model &lt;b&gt;.onnx" in text
    assert text.count('<svg class="map"') == 1  # only the layer with zeros
    assert f"{found.speedup:.2f}×" in text
    assert "what-if" in text


def test_report_of_an_artefact(artefact: Path) -> None:
    manifest = json.loads((artefact / "manifest.json").read_text())
    layers = (
        LayerTime(("up", "act"), "spmm", "coded", 1.25, 5.0),
        LayerTime(("down",), "gemm", "dense", 0.5, None),
    )
    timed = Bench(8.0, 2.0, 3.5, 4.5, 1e-6, 1, 9, layers)
    found = inspect(load(perceptron(), {"batch": BATCH}), "x86-64-v3")
    text = checked(report.of_artefact(manifest, "model", found, timed))
    for part in ("4.00×", "1.25", "unstructured", "no zeros", "Verification", "Passes"):
        assert part in text
    assert f"{manifest['layers'][0]['ms']:.3g}" in text
    assert manifest["model_sha256"] in text
    bare = checked(report.of_artefact(manifest, "model"))
    assert "Kernel calls" not in bare


def test_all_calls_of_a_layer_count(artefact: Path) -> None:
    manifest = json.loads((artefact / "manifest.json").read_text())
    layers = (
        LayerTime(("up",), "winograd_input", "", 1.25, 5.0),
        LayerTime(("up",), "gemm", "", 2.25, 5.0),
        LayerTime(("up", "act"), "winograd_output", "", 1.0, 6.0),
    )
    text = checked(
        report.of_artefact(manifest, "model", None, Bench(8, 5, 1, 2, 1e-6, 1, 9, layers))
    )
    assert re.search(r"<td>winograd_output</td>.*?<td[^>]*>4.5</td><td[^>]*>6</td>", text)


def test_declined_reasons_and_fallback_nodes_are_shown(artefact: Path) -> None:
    manifest = json.loads((artefact / "manifest.json").read_text())
    manifest["passes"] = [
        {"name": "fuse_gelu", "n_applied": 0, "nodes_before": 3, "nodes_after": 3,
         "max_rel_error": None, "declined": ["act: it is a Relu"]}
    ]  # fmt: skip
    manifest["segments"] += [{"kind": "onnxruntime", "nodes": ["nms"], "reason": "no kernel"}]
    text = checked(report.of_artefact(manifest, "model"))
    assert "act: it is a Relu" in text
    assert re.search(r"<td>nms</td><td>no kernel</td>", text)


def test_heat_map_draws_what_is_there() -> None:
    svg = picture.heat_map([[0.0, 0.5], [1.0, 1.0]])
    assert svg.count("<path") == 2  # levels 4 and 8 of 8; an empty cell draws nothing
    assert svg.count("M") == 3
    assert 'fill-opacity="0.5"' in svg
    assert picture.heat_map([[0.001]]).count("M") == 1


def test_bars_are_to_scale() -> None:
    svg = picture.bars([("dense", 4.0), ("ours", 1.0)])
    dense, ours = (float(w) for w in re.findall(r'<rect [^>]*width="([\d.]+)"', svg))
    assert dense == pytest.approx(4 * ours)
    assert picture.pairs([("layer", None, 1.0)]).count("<rect") == 1


def test_a_trade_off_puts_its_points_where_their_values_are() -> None:
    text = picture.curve([(10.0, 0.0), (0.0, 4.0)], (5.0, 1.0), ("ms", "loss & more"))
    ElementTree.fromstring(text)
    places = [
        (float(x), float(y), int(r))
        for x, y, r in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="(\d)"', text)
    ]
    (right, low, _), (left, high, _), (x, y, radius) = places
    assert (x, y) == ((left + right) / 2, pytest.approx(low - (low - high) / 4))
    assert radius > places[0][2]
    assert "loss &amp; more" in text


def test_report_of_a_pruning_without_a_budget() -> None:
    pruned = prune(load(perceptron(), {"batch": BATCH}), "magnitude:0.75")
    text = checked(report.of_pruning(pruned, "magnitude:0.75", "m"))
    n_zero = sum(row.pattern.n_zero for row in pruned.table)
    n = sum(row.shape[0] * row.shape[1] for row in pruned.table)
    assert f"<b>{n_zero / n:.0%}</b>" in text
    assert "<circle" not in text
    columns, rows = report.pruned_layers(pruned)
    assert "ms" not in columns
    assert [row[0] for row in rows] == ["up", "down"]
