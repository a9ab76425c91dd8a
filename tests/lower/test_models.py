"""Whole models compile without a fallback node and equal ONNX Runtime, dense and pruned."""

import dataclasses

import numpy as np
import pytest
from onnx import helper, numpy_helper
from sparsegraph.targets import runs_here
from sparsegraph.targets.layout import point_block
from sparsegraph.targets.target import Target

import benchmarks.prune
from benchmarks import real_models, zoo
from sparsegraph import pipeline, targets, verify
from sparsegraph.compile import compile, load
from sparsegraph.lower import partition
from sparsegraph.lower.tiling import tiled

pytestmark = pytest.mark.usefixtures("workspaces_of_nan")
MODELS = [
    ("resnet18", {"size": 64}),
    ("resnet50", {"size": 64}),
    ("mobilenet_v1", {"size": 64, "batch": 2}),
    ("mobilenet_v2", {"size": 64}),
    ("efficientnet_lite0", {"size": 64}),
    ("yolov8n", {"size": 96}),
    ("minilm", {"sequence": 37, "batch": 2}),
    ("deit_tiny", {"batch": 1}),
    ("digits_cnn", {"batch": 3}),
]
X86 = [name for name in ("x86-64-v3", "x86-64-v4") if runs_here(targets.get(name))]
REAL = ["ppocr_v2_cls", "ppocr_v4_det", "ppocr_v4_rec", "ppocr_v6_det", "ppocr_v6_rec"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sizes"), MODELS, ids=lambda v: str(v))
def test_pruned_model_equals_onnx_runtime(name: str, sizes: dict[str, int]) -> None:
    proto = zoo.build(name, **sizes)
    pruned = benchmarks.prune.magnitude(proto, 0.1, layers=benchmarks.prune.selector_for(name))
    proto = proto if pruned is None else pruned
    compiled = compile(proto, check=False, fallback=False)
    assert compiled.fallback_nodes == []
    assert "coded" in {layer["format"] for layer in compiled.manifest.layers}
    feeds = zoo.feeds(proto)
    expected = verify.run_onnx(load(proto), feeds)
    names = [o.name for o in compiled.session.get_outputs()]
    assert verify.compare(dict(zip(names, compiled.run(None, feeds))), expected) <= 1e-4


@pytest.mark.parametrize("size", [28, 20])
def test_patches_that_do_not_fill_their_last_tile(size: int) -> None:
    proto = zoo.build("conv", c_in=64, c_out=24, kernel=3, size=size)
    compiled = compile(proto, check=False, keep_native=True)
    assert compiled.manifest.layers[0]["format"].startswith("winograd")
    feeds = zoo.feeds(proto)
    expected = verify.run_onnx(load(proto), feeds)
    names = [o.name for o in compiled.session.get_outputs()]
    assert verify.compare(dict(zip(names, compiled.run(None, feeds))), expected) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_dense_model_and_threads(threads: int) -> None:
    proto = zoo.build("resnet18", size=64)
    compiled = compile(proto, check=False, fallback=False, threads=threads)
    formats = {layer["format"] for layer in compiled.manifest.layers}
    assert {"dense", "winograd-4", "winograd-4,4"} <= formats
    feeds = zoo.feeds(proto)
    expected = verify.run_onnx(load(proto), feeds)
    names = [o.name for o in compiled.session.get_outputs()]
    assert verify.compare(dict(zip(names, compiled.run(None, feeds))), expected) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_shipped_text_models_need_no_fallback(name: str) -> None:
    try:
        proto = real_models.load(name)
    except real_models.MissingPackage as missing:
        pytest.skip(str(missing))
    source = proto.graph.input[0].name
    shape = tuple(d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim)
    compiled = compile(proto, check=False, fallback=False)
    page = np.ones(shape, np.float32)
    rng = np.random.default_rng(0)
    for y, x in zip(rng.integers(0, shape[2] - 8, 12), rng.integers(0, shape[3] - 30, 12)):
        page[:, :, y : y + 6, x : x + 26 : 2] = -0.8  # strokes on white paper
    expected = verify.run_onnx(load(proto), {source: page})
    names = [o.name for o in compiled.session.get_outputs()]
    got = dict(zip(names, compiled.run(None, {source: page})))
    assert verify.compare(got, expected) <= 1e-4


@pytest.mark.parametrize("stride", [2, 4, 16])
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_patches_become_features(stride: int, density: float) -> None:
    node = helper.make_node(
        "Conv", ["x", "w"], ["y"], kernel_shape=[stride, stride], strides=[stride, stride]
    )
    rng = np.random.default_rng(stride)
    weight = rng.standard_normal((5, 3, stride, stride)).astype(np.float32)
    weight[rng.random(weight.shape) >= density] = 0
    x = rng.standard_normal((2, 3, 11 * stride, 7 * stride)).astype(np.float32)
    graph = helper.make_graph(
        [node], "patches", [helper.make_tensor_value_info("x", 1, x.shape)],
        [helper.make_tensor_value_info("y", 1, None)], [numpy_helper.from_array(weight, "w")],
    )  # fmt: skip
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    compiled = compile(proto, check=False, fallback=False)
    expected = verify.run_onnx(load(proto), {"x": x})
    assert verify.compare({"y": compiled.run(None, {"x": x})[0]}, expected) <= 1e-5


@pytest.mark.parametrize("target", X86)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", [3, 7, 9])
def test_maps_of_few_points_have_rows_in_the_lanes(size: int, threads: int, target: str) -> None:
    """A residual, an activation behind it, and rows that do not fill their last panel."""
    rng = np.random.default_rng(size)
    weights = {
        name: rng.standard_normal(shape).astype(np.float32) / 16
        for name, shape in (("a", (318, 256, 1, 1)), ("b", (318, 318, 1, 1)), ("c", (318,)))
    }
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["s"]), helper.make_node("Relu", ["s"], ["r"]),
        helper.make_node("Conv", ["r", "b", "c"], ["t"]),
        helper.make_node("Add", ["t", "r"], ["u"]), helper.make_node("Sigmoid", ["u"], ["y"]),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes, "blocks", [helper.make_tensor_value_info("x", 1, (2, 256, size, size))],
        [helper.make_tensor_value_info("y", 1, None)],
        [numpy_helper.from_array(w, name) for name, w in weights.items()],
    )  # fmt: skip
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    compiled = compile(proto, check=False, keep_native=True, target=target, threads=threads)
    x = rng.standard_normal((2, 256, size, size)).astype(np.float32)
    steps = compiled.session.profile({"x": x})
    assert sum("panels" in step.kernel for step in steps) == 2
    assert {layer["format"] for layer in compiled.manifest.layers} == {"dense"}
    expected = verify.run_onnx(load(proto), {"x": x})
    assert verify.compare({"y": compiled.run(None, {"x": x})[0]}, expected) <= 1e-5


@pytest.mark.parametrize("size", [8, 9, 12])
@pytest.mark.parametrize("density", [0.1, 1.0])
def test_pointwise_output_of_whole_tiles_is_written_where_the_caller_wants_it(
    size: int, density: float
) -> None:
    proto = zoo.build("conv", batch=2, c_in=200, c_out=33, kernel=1, size=size)
    proto = benchmarks.prune.magnitude(proto, density, layers=lambda _: True) or proto
    compiled = compile(proto, check=False, keep_native=True)
    feeds = zoo.feeds(proto)
    kernels = [step.kernel for step in compiled.session.profile(feeds)]
    is_whole = size * size % point_block(size * size, tiled(density, targets.native())) == 0
    assert ("copy_f32_exact_result" in " ".join(kernels)) != is_whole
    expected = verify.run_onnx(load(proto), feeds)
    names = [o.name for o in compiled.session.get_outputs()]
    assert verify.compare(dict(zip(names, compiled.run(None, feeds))), expected) <= 1e-5


FEW = dataclasses.replace(targets.get("x86-64-v3"), narrow_index=True, index_unit=0)
"""x86, with code as for machines where instructions are what counts."""
SCALAR = dataclasses.replace(FEW, lanes=1, n_registers=32, row_vectors=16, segment=16)
JOINED = dataclasses.replace(FEW, n_registers=15, scalar_factors=True, joined=4)


@pytest.mark.parametrize(
    ("target", "size", "last", "kind"),
    [
        (SCALAR, 8, "Relu", "sconv_f32_8k3s1p1d1"),
        (SCALAR, 8, "Sigmoid", "r1_v16_l1_gather1_near_narrow_unit0_sigmoid_add"),
        (SCALAR, 7, "Sigmoid", "r2_v5_l1_gather1_near_narrow_unit0_sigmoid_add"),
        (JOINED, 16, "Relu", "r1_v4_l8_gather0_near_narrow_unit0_x4_relu_add"),
        (JOINED, 4, "Relu", "r2_v2_l8_gather0_near_narrow_unit0_x2_relu_add"),
    ],
)
def test_machines_where_instructions_are_what_counts(
    target: Target, size: int, last: str, kind: str
) -> None:
    channels, rng = 11, np.random.default_rng(size)
    weights = rng.standard_normal((2, channels, channels, 3, 3)).astype(np.float32)
    weights[rng.random(weights.shape) >= 0.1] = 0
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "w1"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["c", "b"], ["d"]),
        helper.make_node(last, ["d"], ["e"]),
        helper.make_node("MaxPool", ["e"], ["y"], kernel_shape=[2, 2]),
    ]
    x = rng.standard_normal((2, channels, size, size)).astype(np.float32)
    graph = helper.make_graph(
        nodes, "residual", [helper.make_tensor_value_info("x", 1, x.shape)],
        [helper.make_tensor_value_info("y", 1, None)],
        [numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(weights)],
    )  # fmt: skip
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    compiled = compile(proto, target, check=False, fallback=False)
    (segment,) = compiled.session.manifest["segments"]
    kernels = [step["kernel"] for step in segment["steps"]]
    assert any(kind in name for name in kernels), kernels
    expected = verify.run_onnx(load(proto), {"x": x})
    assert verify.compare({"y": compiled.run(None, {"x": x})[0]}, expected) <= 1e-5


@pytest.mark.parametrize(("c_in", "is_copied"), [(16, False), (512, True)])
def test_partial_sums_do_not_wait_in_planes_beyond_the_cache(c_in: int, is_copied: bool) -> None:
    c_out = targets.native().l2_bytes // (4 * 64 * 64) + 1
    proto = zoo.build("conv", c_in=c_in, c_out=c_out, kernel=1, size=64)
    proto = benchmarks.prune.magnitude(proto, 0.1, layers=lambda _: True)
    (segment,) = compile(proto, check=False, keep_native=True).session.manifest["segments"]
    kernels = [step["kernel"] for step in segment["steps"]]
    assert any(name.startswith("copy_f32_exact_result") for name in kernels) == is_copied


def test_attention_counts_in_the_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dense encoder gains by attention; one without any is estimated as before."""
    estimates = []
    for theirs, ours in ((2.7, 1.3), (1.3, 2.7), (0.0, 0.0)):
        monkeypatch.setattr(partition, "_THEIR_ATTENTION", theirs)
        monkeypatch.setattr(partition, "_OUR_ATTENTION", ours)
        models = [zoo.build("deit_tiny"), zoo.build("conv", c_in=8, c_out=8, kernel=1, size=8)]
        graphs = [pipeline.optimize(load(m), verify=False).model for m in models]
        estimates.append([partition.plan(g, targets.get("x86-64-v3")).estimate for g in graphs])
    (faster, plain), (slower, same), (neither, _) = estimates
    assert faster > neither > slower
    assert faster > 1.05
    assert plain == same


def test_a_dense_model_is_left_to_onnx_runtime_where_that_is_faster() -> None:
    proto = zoo.build("conv", c_in=64, c_out=64, size=14, stride=2)
    compiled = compile(proto, check=False)
    assert compiled.fallback_nodes
    (segment,) = compiled.manifest.segments
    assert "estimated" in segment.reason
