"""Winograd's method strip by strip: which maps are cut, and that the pieces make the whole."""

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest

from sparsegraph import targets, verify
from sparsegraph.compile import compile, load
from sparsegraph.lower.windows import PLAIN, Filter, strip_of

pytestmark = pytest.mark.usefixtures("workspaces_of_nan")
SEVEN = Filter(4, 2)  # 7x7 of stride 2
CASES = [  # rows, channels, height, width, kernel, stride, pads
    pytest.param((16, 3, 64, 48, 7, 2, (3, 3, 3, 3)), id="stem"),
    pytest.param((16, 16, 48, 64, 3, 1, (1, 1, 1, 1)), id="3x3"),
    pytest.param((17, 5, 50, 64, 3, 1, (0, 2, 2, 0)), id="rows-left-over"),
    pytest.param((8, 8, 91, 37, 3, 1, (1, 1, 1, 1)), id="odd"),
]


def model(rows: int, channels: int, height: int, width: int, kernel: int, stride: int,
          pads: tuple[int, ...], tail: str) -> onnx.ModelProto:  # fmt: skip
    proto = onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["": 21]>
        g (float[2,{channels},{height},{width}] x) => (float[2,r,h,w] y) {{
        q = Conv<strides=[{stride},{stride}]>(x, p)
        a = Conv<pads={list(pads)}, strides=[{stride},{stride}]>(x, w, b)  {tail} }}""")
    rng = np.random.default_rng(rows)
    arrays = {"w": (rows, channels, kernel, kernel), "b": (rows,), "p": (rows, channels, 1, 1)}
    for name, shape in arrays.items():
        array = rng.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return proto


@pytest.mark.parametrize(
    "tail", ["c = Relu(a)  y = Concat<axis=1>(c, q)", "c = Add(a, q)  y = Relu(c)"]
)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("l2_kib", [1 << 20, 256, 160])
def test_strips_make_the_map(case: tuple[Any, ...], tail: str, l2_kib: int) -> None:
    proto = model(*case, tail)
    target = replace(targets.native(), l2_bytes=l2_kib << 10)
    compiled = compile(proto, target, check=False, keep_native=True, fallback=False)
    (segment,) = compiled.manifest.segments
    kernels = [step.kernel for step in segment.steps]
    n = sum(kernel.startswith("winograd_output") for kernel in kernels)
    assert n == 1 if l2_kib == 1 << 20 else n > 1, kernels
    flops = sum(s.dense_flops for s in segment.steps if s.detail.startswith("Winograd F"))
    assert flops == 2 * max(layer["macs"] for layer in compiled.manifest.layers)
    shape = [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim]
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    expected = verify.run_onnx(load(proto), {"x": x})
    assert verify.compare({"y": compiled.run(None, {"x": x})[0]}, expected) <= 1e-5


@pytest.mark.parametrize(
    ("out", "method", "features", "rows"),
    [
        ((112, 112), SEVEN, (3, 64), 1),  # ResNet's stem: .4 MB a row of patches, 28 rows
        ((56, 56), PLAIN, (64, 64), 14),  # its first 3x3: weights of .6 MB, maps of 3.6 MB
        ((224, 224), PLAIN, (64, 64), 1),  # maps of 58 MB
        ((224, 224), PLAIN, (16, 16), 2),
        ((28, 28), PLAIN, (16, 16), 7),  # all of it fits
        ((228, 228), PLAIN, (16, 16), 2),  # every other row of patches begins with a tile of 32
    ],
)
def test_maps_are_cut_where_weights_are_small_or_maps_are_large(
    out: tuple[int, int], method: Filter, features: tuple[int, int], rows: int
) -> None:
    assert strip_of(out, 4, method, features, 32, targets.get("x86-64-v4")) == rows
