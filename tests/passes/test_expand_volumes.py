"""expand_volumes: pools, resizes, depthwise and transposed convolutions of volumes."""

from collections import Counter

import numpy as np
import pytest
from sparsegraph.passes.expand_volumes import ExpandVolumes

from sparsegraph.rewrite import Fuel
from tests.passes.check import Result, parse, run, weight


def reasons(result: Result) -> list[str]:
    return [d.reason for d in result.declined]


@pytest.mark.parametrize(
    ("op", "attributes", "out", "n"),
    [
        ("MaxPool", "kernel_shape=[2,3,3]", "2,3,4,4,7", 2),
        ("MaxPool", "kernel_shape=[1,3,2],strides=[1,2,2]", "2,3,5,2,4", 1),
        ("MaxPool", "kernel_shape=[3,1,1],pads=[1,0,0,1,0,0]", "2,3,5,6,9", 1),
        ("MaxPool", "kernel_shape=[1,1,1],strides=[2,1,1]", "2,3,3,6,9", 1),
        ("MaxPool", "kernel_shape=[3,3,3],strides=[2,2,2],pads=[1,1,1,1,1,1]", "2,3,3,3,5", 2),
        ("MaxPool", "kernel_shape=[2,2,2],strides=[2,2,2],ceil_mode=1", "2,3,3,3,5", 2),
        ("MaxPool", "kernel_shape=[2,2,2],dilations=[2,3,1]", "2,3,3,3,8", 2),
        ("MaxPool", 'kernel_shape=[2,3,2],auto_pad="SAME_UPPER"', "2,3,5,6,9", 2),
        ("AveragePool", "kernel_shape=[2,3,3],strides=[1,2,1]", "2,3,4,2,7", 2),
        ("AveragePool", "kernel_shape=[3,3,3],pads=[1,1,1,0,1,1]", "2,3,4,6,9", 2),
        ("AveragePool", "kernel_shape=[3,3,3],pads=[1,1,1,0,1,1],count_include_pad=1",
         "2,3,4,6,9", 2),
        ("AveragePool", "kernel_shape=[2,2,2],dilations=[2,3,1]", "2,3,3,3,8", 2),
    ],
)  # fmt: skip
def test_pools(op: str, attributes: str, out: str, n: int) -> None:
    text = f"g (float[2,3,5,6,9] x) => (float[{out}] y) {{ y = {op}<{attributes}>(x) }}"
    found = run(ExpandVolumes(), text)
    assert found.counts[op] == n
    assert all(len(node.inputs[0].shape) == 4 for node in found.model.graph if node.op_type == op)


def test_pools_that_stay() -> None:
    text = """g (float[1,3,5,6,9] x) => (float[1,3,4,5,8] y, int64[1,3,4,5,8] i) {
        y, i = MaxPool<kernel_shape=[2,2,2]>(x) }"""
    assert reasons(run(ExpandVolumes(), text)) == ["the indices of the maxima are read"]
    text = "g (float[1,3,6,9] x) => (float[1,3,5,8] y) { y = MaxPool<kernel_shape=[2,2]>(x) }"
    found = run(ExpandVolumes(), text)
    assert not found.n_applied
    assert not found.declined
    text = "g (float[1,3,5,6,9] x) => (float[1,3,4,5,8] y) { y = MaxPool<kernel_shape=[2,2,2]>(x) }"
    (found,) = ExpandVolumes().run(parse(text, 12), Fuel()).declined
    assert found.reason == "an opset before 13"


@pytest.mark.parametrize(
    ("attributes", "inputs", "arrays", "out", "n"),
    [
        ('mode="nearest"', "x, , scales", {"scales": [1, 1, 2, 2, 2]}, "2,3,6,8,10", 2),
        ('mode="linear"', "x, , scales", {"scales": [1, 1, 2, 3, 1.5]}, "2,3,6,12,7", 2),
        ('mode="linear"', "x, , scales", {"scales": [1, 1, 1, 3, 1.5]}, "2,3,3,12,7", 1),
        ('mode="linear"', "x, , scales", {"scales": [1, 1, 1.3, 1, 1]}, "2,3,3,4,5", 1),
        ('mode="linear",axes=[2,4]', "x, , scales", {"scales": [2, 2]}, "2,3,6,4,10", 2),
        ('mode="linear",axes=[-1,-3]', "x, , scales", {"scales": [3, 2]}, "2,3,6,4,15", 2),
        ('mode="linear",coordinate_transformation_mode="align_corners"', "x, , , sizes",
         {"sizes": [2, 3, 7, 4, 9]}, "2,3,7,4,9", 2),
        ('mode="nearest",coordinate_transformation_mode="asymmetric",nearest_mode="floor"',
         "x, , , sizes", {"sizes": [2, 3, 3, 9, 9]}, "2,3,3,9,9", 1),
    ],
)  # fmt: skip
def test_resizes(attributes: str, inputs: str, arrays: dict, out: str, n: int) -> None:
    text = f"""g (float[2,3,3,4,5] x) => (float[{out}] y) {{
        y = Resize<{attributes}>({inputs}) }}"""
    dtypes = {"scales": np.float32, "sizes": np.int64}
    found = run(ExpandVolumes(), text, **{k: np.array(v, dtypes[k]) for k, v in arrays.items()})
    assert found.counts["Resize"] == n


@pytest.mark.parametrize(
    ("attributes", "scales", "out", "reason"),
    [
        ('mode="nearest"', [2, 1, 1, 1, 1], "4,3,3,4,5", "images and channels must stay"),
        ('mode="linear",antialias=1', [1, 1, 1, 1, 0.6], "2,3,3,4,3", "antialias 1"),
    ],
)
def test_resizes_that_stay(attributes: str, scales: list, out: str, reason: str) -> None:
    text = f"""g (float[2,3,3,4,5] x) => (float[{out}] y) {{
        y = Resize<{attributes}>(x, , scales) }}"""
    (found,) = run(ExpandVolumes(), text, scales=np.float32(scales)).declined
    assert reason in found.reason


DEPTHWISE = [  # kernel, attributes, out
    ("3,3,3", "pads=[1,1,1,1,1,1]", "2,4,5,6,7"),
    ("3,3,3", "pads=[1,1,1,1,1,1],strides=[2,2,2]", "2,4,3,3,4"),
    ("3,1,2", "pads=[0,1,0,2,0,1],dilations=[2,1,3]", "2,4,3,7,5"),
    ("1,3,3", "strides=[1,2,1]", "2,4,5,2,5"),
    ("5,1,1", 'auto_pad="VALID"', "2,4,1,6,7"),
]


@pytest.mark.parametrize(("kernel", "attributes", "out"), DEPTHWISE)
@pytest.mark.parametrize("bias", [", b", ""])
def test_depthwise(kernel: str, attributes: str, out: str, bias: str) -> None:
    shape = [int(n) for n in kernel.split(",")]
    text = f"""g (float[2,4,5,6,7] x) => (float[{out}] y) {{
        y = Conv<group=4,{attributes}>(x, w{bias}) }}"""
    arrays = {"w": weight(4, 1, *shape)} | ({"b": weight(4)} if bias else {})
    found = run(ExpandVolumes(), text, **arrays)
    assert found.counts["Conv"] == shape[0]
    assert found.counts["Add"] == shape[0] - 1


def test_depths_without_weights_are_not_computed() -> None:
    w = weight(4, 1, 3, 3, 3)
    w[:, :, [0, 2]] = 0
    text = """g (float[1,4,5,6,7] x) => (float[1,4,5,6,7] y) {
        y = Conv<group=4,pads=[1,1,1,1,1,1]>(x, w) }"""
    assert run(ExpandVolumes(), text, w=w).counts["Conv"] == 1
    assert run(ExpandVolumes(), text, w=0 * w).counts["Conv"] == 1


def test_convolutions_that_stay() -> None:
    plain = "g (float[1,4,5,6,7] x) => (float[1,4,3,4,5] y) { y = Conv(x, w) }"
    found = run(ExpandVolumes(), plain, w=weight(4, 4, 3, 3, 3))
    assert not found.n_applied
    assert not found.declined
    text = "g (float[1,4,5,6,7] x) => (float[1,8,3,4,5] y) { y = Conv<group=4>(x, w) }"
    found = run(ExpandVolumes(), text, w=weight(8, 1, 3, 3, 3))
    assert reasons(found) == ["2 features per channel"]
    text = """g (float[1,4,5,6,7] x, float[4,1,3,3,3] w) => (float[1,4,3,4,5] y) {
        y = Conv<group=4>(x, w) }"""
    assert reasons(run(ExpandVolumes(), text)) == ["weight or bias is not constant"]


@pytest.mark.parametrize("bias", [", b", ""])
def test_transposed(bias: str) -> None:
    text = f"""g (float[2,4,3,5,2] x) => (float[2,6,6,15,2] y) {{
        y = ConvTranspose<strides=[2,3,1]>(x, w{bias}) }}"""
    arrays = {"w": weight(4, 6, 2, 3, 1)} | ({"b": weight(6)} if bias else {})
    found = run(ExpandVolumes(), text, **arrays)
    assert found.counts == Counter(Conv=1, Reshape=2, Transpose=1)


@pytest.mark.parametrize(
    ("attributes", "channels", "out", "reason"),
    [
        ("strides=[1,1,1]", 6, "6,4,6,3", "overlap"),
        ("strides=[2,2,2],pads=[1,0,0,0,0,0]", 6, "6,5,10,4", "overlap"),
        ("strides=[2,2,2],output_padding=[1,0,0]", 6, "6,7,10,4", "gaps"),
        ("strides=[2,2,2],group=2", 3, "6,6,10,4", "groups"),
    ],
)
def test_transposed_that_stay(attributes: str, channels: int, out: str, reason: str) -> None:
    text = f"""g (float[1,4,3,5,2] x) => (float[1,{out}] y) {{
        y = ConvTranspose<{attributes}>(x, w) }}"""
    (found,) = run(ExpandVolumes(), text, w=weight(4, channels, 2, 2, 2)).declined
    assert reason in found.reason
