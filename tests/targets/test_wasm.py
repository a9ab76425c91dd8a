"""WebAssembly: modules run in node through the bundle's loader, against ONNX Runtime."""

import re
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from benchmarks import bundles
from sparsegraph import targets, verify
from sparsegraph.compile import load
from tests.targets import cross

COMBINATIONS = [
    ("digits_cnn", 1.0), ("digits_cnn", 0.1), ("mobilenet_v1", 0.1), ("minilm", 1.0),
    ("resnet18", 0.1),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("model", "density"), COMBINATIONS)
def test_models_equal_onnx_runtime(model: str, density: float, tmp_path: Path) -> None:
    cross.require("clang", "wasm-ld", "node")
    case = cross.Case(model, density)
    compiled = case.compile(targets.get("wasm"), tmp_path / "m.sg")
    case.check(compiled, "node", cross.MODULE_RUNNER, compiled.path)


def test_loader_refuses_other_weights(tmp_path: Path) -> None:
    cross.require("clang", "wasm-ld", "node")
    case = cross.Case("digits_cnn", 0.1)
    compiled = case.compile(targets.get("wasm"), tmp_path / "m.sg")
    weights = compiled.path / "weights.bin"
    weights.write_bytes(weights.read_bytes()[:-64])
    files = bundles.write(compiled, case.feeds, tmp_path)
    done = cross.execute("node", cross.MODULE_RUNNER, compiled.path, *files, tmp_path / "out")
    assert done.returncode != 0
    assert "weights: found" in done.stderr


def test_relaxed_simd_equals_onnx_runtime(tmp_path: Path) -> None:
    cross.require("clang", "wasm-ld", "node")
    case = cross.Case("digits_cnn", 0.1)
    compiled = case.compile(targets.get("wasm:relaxed-simd"), tmp_path / "m.sg")
    flag = "--experimental-wasm-relaxed-simd"
    case.check(compiled, "node", flag, cross.MODULE_RUNNER, compiled.path)
    # 0xFD 0x105: f32x4.relaxed_madd
    assert (compiled.path / "model.wasm").read_bytes().count(b"\xfd\x85\x02") >= 50
    plain = case.compile(targets.get("wasm"), tmp_path / "plain.sg")
    assert (plain.path / "model.wasm").read_bytes().count(b"\xfd\x85\x02") == 0


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Tests print nothing."""


def test_the_page_runs_in_a_browser(tmp_path: Path) -> None:
    cross.require("clang", "wasm-ld", "chromium")
    case = cross.Case("digits_cnn", 0.1)
    compiled = case.compile(targets.get("wasm"), tmp_path / "m.sg")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=compiled.path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'user'}"]
    address = f"http://127.0.0.1:{server.server_port}/index.html"
    budget = ["--virtual-time-budget=20000", "--dump-dom"]
    page = cross.execute("chromium", *flags, *budget, address).stdout
    server.shutdown()
    found = re.search(r"ms\n.*\]: ([^<]*)</pre>", page)
    assert found, page
    (tensor,) = compiled.manifest.inputs
    feed = (np.arange(np.prod(tensor.shape)) * 37 % 101 / 101).astype(np.float32)
    expected = verify.run_onnx(load(case.proto), {tensor.name: feed.reshape(tensor.shape)})
    (values,) = expected.values()
    got = np.array([float(x) for x in found[1].split()])
    assert np.abs(got - values.ravel()[:10]).max() <= cross.LIMIT * np.abs(values).max()
