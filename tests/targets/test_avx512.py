"""AVX-512 code, run: bundles on a CPU that Bochs emulates, where this machine may have no such."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from benchmarks import bare_pc, bundles
from sparsegraph import targets, verify
from sparsegraph.capture import load
from sparsegraph.compile import Compiled
from tests.targets import cross
from tests.targets.test_cortex_m import SmallMobilenet

SKYLAKE, HASWELL = bare_pc.CPUS["x86-64-v4"], bare_pc.CPUS["x86-64-v3"]
NEHALEM, PENRYN = "corei5_lynnfield_750", "core2_penryn_t9600"
LEVELS = "x86-64-v4+x86-64-v3+x86-64-v2"


class Gelus(bundles.Case):
    """A product of 96 points with GELU, from -12 to 12."""

    def __init__(self, density: float) -> None:
        rng = np.random.default_rng(8)
        weight = rng.standard_normal((4, 24)).astype(np.float32) * (rng.random((4, 24)) < density)
        text = """<ir_version: 10, opset_import: ["": 20]>
        g (float[1, 96, 4] x) => (float[1, 96, 24] y) { t = MatMul(x, w)  y = Gelu(t) }"""
        self.proto = onnx.parser.parse_model(text)
        self.proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
        x = rng.standard_normal((1, 96, 4)).astype(np.float32)
        self.feeds = {"x": x * np.float32(12 / np.abs(x @ weight).max())}
        self.expected = verify.run_onnx(load(self.proto), self.feeds)


CASES = {"digits_cnn": lambda density: cross.Case("digits_cnn", density),
         "small_mobilenet": SmallMobilenet, "gelus": Gelus}  # fmt: skip


def run(case: bundles.Case, compiled: Compiled, cpu: str, folder: Path) -> int:
    """Compare with ONNX Runtime; the number of the code that the library picked."""
    inputs = [f.read_bytes() for f in bundles.write(compiled, case.feeds, folder)]
    code, outputs = bare_pc.run(compiled.path, inputs, cpu)
    (folder / "out").write_bytes(outputs[0])
    assert case.compare(compiled, [folder / "out"]) <= cross.LIMIT
    return code


@pytest.mark.parametrize(
    ("model", "density"),
    [
        ("digits_cnn", 1.0),
        ("digits_cnn", 0.2),
        ("digits_cnn", 0.1),
        ("small_mobilenet", 0.1),
        ("gelus", 0.5),
    ],
)
def test_models_equal_onnx_runtime(model: str, density: float, tmp_path: Path) -> None:
    cross.require(bare_pc.EMULATOR, "gcc")
    case = CASES[model](density)
    compiled = case.compile("x86-64-v4", tmp_path / "m.sg")
    assert run(case, compiled, SKYLAKE, tmp_path) == 0


@pytest.fixture(scope="module")
def levels(tmp_path_factory: pytest.TempPathFactory) -> tuple[bundles.Case, Compiled]:
    cross.require(bare_pc.EMULATOR, "gcc")
    case = CASES["small_mobilenet"](0.1)
    return case, case.compile(LEVELS, tmp_path_factory.mktemp("levels") / "m.sg")


@pytest.mark.parametrize(("cpu", "code"), [(SKYLAKE, 0), (HASWELL, 1), (NEHALEM, 2)])
def test_the_cpu_picks_the_code(
    cpu: str, code: int, levels: tuple[bundles.Case, Compiled], tmp_path: Path
) -> None:
    assert run(*levels, cpu, tmp_path) == code


def test_failures_are_told(levels: tuple[bundles.Case, Compiled], tmp_path: Path) -> None:
    case, compiled = levels
    inputs = [f.read_bytes() for f in bundles.write(compiled, case.feeds, tmp_path)]
    with pytest.raises(bare_pc.Failed, match="error: the CPU lacks"):
        bare_pc.run(compiled.path, inputs, PENRYN)
    broken = tmp_path / "m.sg"
    shutil.copytree(compiled.path, broken)
    (broken / "model.so").write_bytes(bytes(4096))
    with pytest.raises(bare_pc.Failed, match="error: the library lacks sg_n_inputs"):
        bare_pc.run(broken, inputs, SKYLAKE)


def test_only_machines_that_are_not_this_one_are_emulated() -> None:
    assert not bundles.is_bare_pc(targets.get("aarch64"))
    assert not bundles.is_bare_pc(targets.get("x86-64-v2"))
    target = targets.get("x86-64-v4")
    cross.require(bare_pc.EMULATOR)
    assert bundles.is_bare_pc(target) != targets.runs_here(target)
