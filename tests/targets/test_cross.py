"""Whole models on machines that are not this one, under qemu, against ONNX Runtime."""

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import helper, numpy_helper
from sparsegraph.targets import inner_loop
from sparsegraph.targets.kernels.elementwise import RowMap

from benchmarks import bundles
from sparsegraph import targets, verify
from sparsegraph.compile import load
from tests.targets import cross

# Every machine runs the digits CNN; the larger models share the machines among them.
COMBINATIONS = [
    *(("digits_cnn", density, name)
      for name in ("armv7", "riscv64", "riscv64-v128", "riscv64-v256", "aarch64-sve256",
                   "raspberry-pi-5", "x86-64-v2")
      for density in (1.0, 0.1)),
    ("mobilenet_v1", 0.1, "aarch64"),
    ("mobilenet_v1", 1.0, "armv7"),
    ("minilm", 0.1, "a64fx"),
    ("resnet18", 1.0, "aarch64"),
    ("resnet18", 0.1, "riscv64"),
    ("resnet18", 0.1, "riscv64-v256"),
    ("minilm", 0.1, "armv7"),
    ("minilm", 0.1, "riscv64"),
    ("minilm", 1.0, "riscv64-v128"),
]  # fmt: skip


LENGTHS = {
    "riscv64-v128": ("rv64,v=true,vext_spec=v1.0,vlen=128", "rv64,v=true,vext_spec=v1.0,vlen=512"),
    "aarch64-sve256": ("max,sve-max-vq=2", "max,sve-max-vq=8,sve-default-vector-length=128"),
    "a64fx": ("max,sve-max-vq=4", "max,sve-max-vq=16,sve-default-vector-length=256"),
}


@pytest.mark.parametrize("name", LENGTHS)
def test_results_do_not_depend_on_the_vector_length(name: str, tmp_path: Path) -> None:
    target = targets.get(name)
    cross.require_for(target)
    if targets.runs_here(target):
        pytest.skip("this machine has one vector length")
    case = cross.Case("digits_cnn", 0.1)
    compiled = case.compile(target, tmp_path / "m.sg")
    program = cross.build_runner(target, compiled.path)
    results = []
    for cpu in LENGTHS[name]:
        command = [target.emulator[0], "-cpu", cpu, *target.emulator[-2:], program]
        case.check(compiled, *command, compiled.path / "weights.bin", 1)
        results.append([p.read_bytes() for p in sorted(tmp_path.glob("out_*"))])
    assert results[0] == results[1]


class Convolution(bundles.Model):
    """Two images of 3 channels, and one convolution with bias and Relu."""

    def __init__(self, kernel: int, stride: int, height: int, width: int) -> None:
        sizes = {"kernel": kernel, "stride": stride, "height": height, "width": width}
        super().__init__("convolution", sizes)

    def build(self, root: Path | None = None) -> onnx.ModelProto:
        rng, (kernel, stride, height, width) = np.random.default_rng(0), self.sizes.values()
        arrays = {"w": rng.standard_normal((5, 3, kernel, kernel)), "b": rng.standard_normal(5)}
        nodes = [
            helper.make_node(
                "Conv", ["x", "w", "b"], ["c"], strides=(stride,) * 2, pads=[kernel // 2] * 4
            ),
            helper.make_node("Relu", ["c"], ["y"]),
        ]
        graph = helper.make_graph(
            nodes, "g", [helper.make_tensor_value_info("x", 1, (2, 3, height, width))],
            [helper.make_tensor_value_info("y", 1, None)],
            [numpy_helper.from_array(a.astype(np.float32), n) for n, a in arrays.items()],
        )  # fmt: skip
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


@pytest.mark.parametrize("name", ["riscv64", "riscv64-v128", "aarch64"])
def test_a_strided_stem_goes_by_its_phases(name: str, tmp_path: Path) -> None:
    target = targets.get(name)
    cross.require_for(target)
    case = bundles.Case(Convolution(7, 2, 21, 38), 1.0)
    compiled = case.compile(target, tmp_path / "m.sg")
    assert [layer["format"] for layer in compiled.manifest.layers] == ["winograd-4,4"]
    assert case.error(compiled, *bundles.command(target, compiled.path)) <= 4e-6


@pytest.mark.parametrize(
    ("kernel", "stride", "height", "width"),
    [(3, 1, 8, 8), (3, 2, 9, 28), (5, 1, 6, 3), (3, 1, 14, 14), (3, 1, 17, 19)],
)
def test_few_weights_are_read_in_place_without_vectors(
    kernel: int, stride: int, height: int, width: int, tmp_path: Path
) -> None:
    target = targets.get("riscv64")
    cross.require_for(target)
    case = bundles.Case(Convolution(kernel, stride, height, width), 0.2)
    compiled = case.compile(target, tmp_path / "m.sg")
    names = [s["kernel"] for s in compiled.manifest.segments[0].model_dump()["steps"]]
    in_place = width != 19  # no tile of 7 points or more divides it
    assert any(name.startswith("sconv" if in_place else "spmm") for name in names)
    assert case.error(compiled, *bundles.command(target, compiled.path)) <= 1e-6


VOLUMES = """<ir_version: 9, opset_import: ["" : 17]>
g (float[2,3,5,9,11] x) => (float[2,4,8,8,9] y) {
    a = Conv<pads=[1,1,1,1,1,1]>(x, w0)         b = Relu(a)
    c = Conv<group=9,pads=[1,1,1,1,1,1]>(b, w1)
    d = MaxPool<kernel_shape=[2,3,3],strides=[1,1,1]>(c)
    e = Conv<strides=[2,2,2],pads=[1,1,1,1,1,1]>(d, w2)
    y = ConvTranspose<strides=[4,2,2]>(e, w3) }"""
WEIGHTS = {
    "w0": (9, 3, 3, 3, 3),
    "w1": (9, 1, 3, 3, 3),
    "w2": (7, 9, 3, 3, 3),
    "w3": (7, 4, 4, 2, 2),
}


class Volumes(bundles.Model):
    """Convolutions of two images of three axes: plain, depthwise, strided, transposed; a pool."""

    def __init__(self) -> None:
        super().__init__("volumes", {})

    def build(self, root: Path | None = None) -> onnx.ModelProto:
        rng, proto = np.random.default_rng(0), onnx.parser.parse_model(VOLUMES)
        for name, shape in WEIGHTS.items():
            array = rng.standard_normal(shape).astype(np.float32)
            proto.graph.initializer.append(numpy_helper.from_array(array, name))
        return proto


@pytest.mark.parametrize("density", [1.0, 0.3])
@pytest.mark.parametrize("name", ["x86-64-v2", "aarch64", "armv7", "riscv64", "riscv64-v128"])
def test_volumes(name: str, density: float, tmp_path: Path) -> None:
    target = targets.get(name)
    cross.require_for(target)
    case = bundles.Case(Volumes(), density)
    compiled = case.compile(target, tmp_path / "m.sg")
    assert case.error(compiled, *bundles.command(target, compiled.path)) <= 1e-6


class Tables(bundles.Model):
    """Rows of a table of few values, plus those of a table of which half the rows are zero."""

    def __init__(self) -> None:
        super().__init__("tables", {})

    def build(self, root: Path | None = None) -> onnx.ModelProto:
        rng = np.random.default_rng(0)
        thin, short = rng.standard_normal((2, 90, 37)).astype(np.float32)
        thin[rng.random(thin.shape) < 0.8] = 0
        short[::2] = 0
        nodes = [
            helper.make_node("Gather", ["thin", "i"], ["a"]),
            helper.make_node("Gather", ["short", "i"], ["b"]),
            helper.make_node("Add", ["a", "b"], ["y"]),
        ]
        given = helper.make_tensor_value_info("i", onnx.TensorProto.INT64, (90,))
        out = helper.make_tensor_value_info("y", 1, (90, 37))
        tables = [numpy_helper.from_array(a, n) for n, a in (("thin", thin), ("short", short))]
        graph = helper.make_graph(nodes, "g", [given], [out], tables)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


@pytest.mark.parametrize("name", ["x86-64-v2", "aarch64", "armv7", "riscv64-v128"])
def test_tables_without_zeros(name: str, tmp_path: Path) -> None:
    target = targets.get(name)
    cross.require_for(target)
    case = bundles.Case(Tables(), 1.0)
    case.feeds = {"i": np.random.default_rng(1).permutation(90)}
    case.expected = verify.run_onnx(load(case.proto), case.feeds)
    compiled = case.compile(target, tmp_path / "m.sg")
    kernels = [step.kernel for step in compiled.manifest.segments[0].steps]
    assert kernels[:2] == ["embedding_f32_int64_coded", "embedding_f32_int64"]
    assert case.error(compiled, *bundles.command(target, compiled.path)) == 0


# kernel, stride, dilation, height, width, pads (top, left, bottom, right), zeros
WINDOWS = [
    ((3, 3), (1, 1), (1, 1), 14, 14, (1, 1, 1, 1), 0.0),
    ((3, 3), (1, 1), (1, 1), 9, 41, (1, 1, 1, 1), 0.9),
    ((3, 3), (2, 2), (1, 1), 28, 33, (1, 1, 1, 1), 0.0),
    ((3, 3), (2, 2), (1, 1), 14, 70, (0, 0, 1, 1), 0.9),
    ((5, 5), (2, 2), (1, 1), 15, 50, (2, 2, 2, 2), 0.0),
    ((5, 5), (1, 1), (1, 1), 7, 7, (2, 2, 2, 2), 0.9),
    ((7, 3), (1, 2), (2, 1), 20, 35, (6, 1, 3, 2), 0.0),
    ((4, 5), (3, 4), (1, 2), 22, 60, (1, 3, 2, 0), 0.0),
]


class DepthwiseWindows(bundles.Case):
    """Depthwise convolutions of six channels, one beside the other."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        nodes, weights, inputs, outputs, self.feeds = [], [], [], [], {}
        for i, (kernel, strides, dilations, *size, pads, zeros) in enumerate(WINDOWS):
            weight = rng.standard_normal((6, 1, *kernel)).astype(np.float32)
            weight[rng.random(weight.shape) < zeros] = 0
            bias = rng.standard_normal(6).astype(np.float32)
            weights += [
                numpy_helper.from_array(a, f"{n}{i}") for n, a in (("w", weight), ("b", bias))
            ]
            names = [f"{n}{i}" for n in "xwb"]
            window = {"strides": strides, "dilations": dilations, "pads": pads}
            nodes += [
                helper.make_node("Conv", names, [f"c{i}"], group=6, **window),
                helper.make_node("Relu", [f"c{i}"], [f"y{i}"]),
            ]
            inputs.append(helper.make_tensor_value_info(f"x{i}", 1, [1, 6, *size]))
            outputs.append(helper.make_tensor_value_info(f"y{i}", 1, None))
            self.feeds[f"x{i}"] = rng.standard_normal((1, 6, *size)).astype(np.float32)
        graph = helper.make_graph(nodes, "windows", inputs, outputs, weights)
        version = [helper.make_opsetid("", 17)]
        proto = helper.make_model(graph, opset_imports=version, ir_version=9)
        self.proto = onnx.shape_inference.infer_shapes(proto)
        self.expected = verify.run_onnx(load(self.proto), self.feeds)


@pytest.mark.parametrize(
    "name",
    ["x86-64-v2", "x86-64-v3", "aarch64", "aarch64-sve256", "armv7", "riscv64", "riscv64-v128",
     "riscv64-v256"],
)  # fmt: skip
def test_windows_of_depthwise_convolutions(name: str, tmp_path: Path) -> None:
    target = targets.get(name)
    cross.require_for(target)
    case = DepthwiseWindows()
    compiled = case.compile(target, tmp_path / "m.sg")
    kernels = [s.kernel for s in compiled.manifest.segments[0].steps if "depthwise" in s.kernel]
    assert len(kernels) == len(WINDOWS)
    assert sum("coded" in k for k in kernels) == sum(w[-1] > 0.5 for w in WINDOWS)
    assert case.error(compiled, *bundles.command(target, compiled.path)) <= 1e-6


@pytest.mark.parametrize("name", ["armv7", "aarch64", "riscv64", "riscv64-v128", "x86-64-v2"])
def test_wide_integers(name: str, tmp_path: Path) -> None:
    target = targets.get(name)
    cross.require_for(target)
    case = cross.Wide()
    compiled = case.compile(target, tmp_path / "m.sg")
    assert case.error(compiled, *bundles.command(target, compiled.path)) == 0


@pytest.mark.parametrize("name", ["armv7", "cortex-a7", "cortex-m7", "cortex-m55"])
def test_library_calls_are_those_of_the_arm_abi(name: str) -> None:
    """Others pass floats in other registers than the C library expects."""
    lines = inner_loop.assembly(
        targets.get(name), RowMap(("Cast", ("arg", 0), ("type", "float32")), ("int64",), (True,), 0)
    )
    calls = {line.split()[1] for line in lines if line.startswith("bl ")}
    assert "__aeabi_l2f" in calls
    assert all(call.startswith("__aeabi_") for call in calls)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "density", "name"), COMBINATIONS)
def test_models_equal_onnx_runtime(model: str, density: float, name: str, tmp_path: Path) -> None:
    target = targets.get(name)
    cross.require_for(target)
    case = cross.Case(model, density)
    compiled = case.compile(target, tmp_path / "m.sg")
    program = cross.build_runner(target, compiled.path)
    emulator = () if targets.runs_here(target) else target.emulator
    case.check(compiled, *emulator, program, compiled.path / "weights.bin", 1)
