"""expand_linear: resizes, sums of patches and Fourier transforms as products."""

import numpy as np
import onnx_ir as ir
import pytest
from sparsegraph.passes.expand_linear import ExpandLinear

from sparsegraph import compile, verify
from sparsegraph.rewrite import Fuel
from tests.passes.check import Result, parse, run


def reason(result: Result) -> str:
    (found,) = result.declined
    return found.reason


RESIZES = [
    ('mode="cubic"', [1, 1, 2, 1.5], "2,3,12,10"),
    ('mode="cubic",cubic_coeff_a=-0.5,exclude_outside=1', [1, 1, 0.6, 2], "2,3,3,14"),
    ('mode="cubic",coordinate_transformation_mode="align_corners"', [1, 1, 2, 2], "2,3,12,14"),
    ('mode="cubic",antialias=1', [1, 1, 0.5, 0.4], "2,3,3,2"),
    ('mode="linear",antialias=1', [1, 1, 0.5, 0.7], "2,3,3,4"),
    ('mode="linear",antialias=1,axes=[3]', [0.5], "2,3,6,3"),
    ('mode="cubic",axes=[-1,-2]', [2, 1.5], "2,3,9,14"),
    ('mode="cubic"', [1, 1, 1.1, 1], "2,3,6,7"),
]


@pytest.mark.parametrize(("attributes", "scales", "out"), RESIZES)
def test_resizes_by_scales(attributes: str, scales: list, out: str) -> None:
    text = f"""g (float[2,3,6,7] x) => (float[{out}] y) {{
        y = Resize<{attributes}>(x, , scales) }}"""
    found = run(ExpandLinear(), text, scales=np.float32(scales))
    assert found.counts["MatMul"] == sum(s != 1 for s in scales)


@pytest.mark.parametrize("size", [(9, 20), (3, 7), (6, 2), (5, 5)])
@pytest.mark.parametrize("attributes", ['mode="cubic"', 'mode="linear",antialias=1'])
def test_resizes_to_sizes(attributes: str, size: tuple[int, int]) -> None:
    text = f"""g (float[2,3,6,7] x) => (float[2,3,{size[0]},{size[1]}] y) {{
        y = Resize<{attributes}>(x, , , sizes) }}"""
    found = run(ExpandLinear(), text, sizes=np.array([2, 3, *size]))
    assert found.counts["MatMul"] == (size[0] != 6) + (size[1] != 7)


def test_rows_come_first_where_they_become_fewer() -> None:
    text = """g (float[1,3,40,7] x) => (float[1,3,4,70] y) {
        y = Resize<mode="cubic">(x, , , sizes) }"""
    found = run(ExpandLinear(), text, sizes=np.array([1, 3, 4, 70]))
    shapes = [tuple(n.outputs[0].shape) for n in found.model.graph if n.op_type == "MatMul"]
    assert shapes == [(1, 3, 4, 7), (1, 3, 4, 70)]


@pytest.mark.parametrize("attributes", ['mode="linear"', 'mode="nearest"'])
def test_resizes_with_a_kernel_stay(attributes: str) -> None:
    text = f"""g (float[1,3,6,7] x) => (float[1,3,12,14] y) {{
        y = Resize<{attributes}>(x, , scales) }}"""
    found = run(ExpandLinear(), text, scales=np.float32([1, 1, 2, 2]))
    assert not found.n_applied
    assert not found.declined


def test_resizes_that_stay() -> None:
    text = """g (float[1,3,6,7] x, float[4] s) => (float[1,3,n,m] y) {
        y = Resize<mode="cubic">(x, , s) }"""
    (found,) = ExpandLinear().run(parse(text), Fuel()).declined
    assert found.reason == "its shape is not known"
    text = """g (float[1,1,3000,3000] x) => (float[1,1,1500,1500] y) {
        y = Resize<mode="cubic">(x, , , sizes) }"""
    (found,) = ExpandLinear().run(parse(text, sizes=np.array([1, 1, 1500, 1500])), Fuel()).declined
    assert found.reason == "a matrix of 4,500,000 elements"


@pytest.mark.parametrize(
    ("attributes", "size", "kernel", "places"),
    [
        ("", (6, 7), (2, 3), 25),
        ("<strides=[2,3]>", (6, 7), (2, 3), 6),
        ("<strides=[2,2],pads=[1,1,0,2]>", (6, 7), (3, 3), 12),
        ("<dilations=[2,1],strides=[1,2]>", (7, 8), (3, 2), 12),
        ("<strides=[3,4]>", (8, 9), (2, 2), 6),
    ],
)
def test_sums_of_patches(
    attributes: str, size: tuple[int, int], kernel: tuple[int, int], places: int
) -> None:
    """The last case leaves rows and columns at the end that no patch covers."""
    columns = 3 * kernel[0] * kernel[1]
    text = f"""g (float[2,{columns},{places}] x) => (float[2,3,{size[0]},{size[1]}] y) {{
        y = Col2Im{attributes}(x, size, kernel) }}"""
    found = run(ExpandLinear(), text, size=np.array(size), kernel=np.array(kernel))
    assert found.ops == ["Reshape", "ConvTranspose", "Reshape"]


@pytest.mark.parametrize(
    ("given", "attributes", "parts", "out"),
    [
        ("", "", 1, "3,6,2"),
        ("", "<onesided=1>", 1, "3,4,2"),
        (", length", "", 2, "3,9,2"),
        (", length", "<onesided=1>", 1, "3,5,2"),
        (", short", "", 2, "3,4,2"),
        ("", "<inverse=1>", 2, "3,6,2"),
        (", , first", "", 2, "3,6,2"),
        (", , first", "<onesided=1>", 1, "2,6,2"),
    ],
)
def test_spectra(given: str, attributes: str, parts: int, out: str) -> None:
    text = f"""g (float[3,6,{parts}] x) => (float[{out}] y) {{
        y = DFT{attributes}(x{given}) }}"""
    arrays = {"length": np.array(9), "short": np.array(4), "first": np.array(0)}
    used = {k: v for k, v in arrays.items() if k in given}
    assert run(ExpandLinear(), text, **used).counts["MatMul"] == 1


def test_spectra_of_older_opsets() -> None:
    text = "g (float[3,6,5,2] x) => (float[3,6,5,2] y) { y = DFT<axis=2>(x) }"
    model = parse(text, 17)
    feed = verify.feeds_for(model, 2)[1]
    wanted = verify.run_onnx(model, feed)
    assert ExpandLinear().run(model, Fuel()).n_applied == 1
    assert verify.compare(verify.run_onnx(model, feed), wanted) < 1e-6


def test_spectra_that_stay() -> None:
    text = "g (float[3,6,2] x, int64 n) => (float[3,m,2] y) { y = DFT(x, n) }"
    (found,) = ExpandLinear().run(parse(text), Fuel()).declined
    assert found.reason == "its shape is not known"
    text = "g (float[2,2000,1] x) => (float[2,2000,2] y) { y = DFT(x) }"
    assert reason(run(ExpandLinear(), text)) == "a matrix of 8,000,000 elements"


@pytest.mark.parametrize(
    ("shape", "given", "attributes", "out"),
    [
        ("2,50,1", "hop, window", "<onesided=1>", "2,11,5,2"),
        ("2,50,1", "hop, , length", "<onesided=1>", "2,11,5,2"),
        ("2,50,1", "hop, window, length", "<onesided=0>", "2,11,8,2"),
    ],
)
def test_spectra_of_frames(shape: str, given: str, attributes: str, out: str) -> None:
    text = f"""g (float[{shape}] x) => (float[{out}] y) {{
        y = STFT{attributes}(x, {given}) }}"""
    arrays = {"hop": np.array(4), "window": np.hanning(8).astype("f"), "length": np.array(8)}
    used = {k: v for k, v in arrays.items() if k in given.split(", ")}
    assert run(ExpandLinear(), text, **used).counts["Conv"] == 1


def test_spectra_of_frames_that_stay() -> None:
    text = "g (float[2,50,1] x) => (float[2,n,m,2] y) { y = STFT(x, hop, window) }"
    found = run(ExpandLinear(), text, hop=np.array(4), window=np.ones(8, np.float32))
    assert reason(found) == "shape inference gave it 8 bins"
    text = (
        "g (float[2,50,1] x, float[8] w) => (float[2,n,m,2] y) { y = STFT<onesided=1>(x, hop, w) }"
    )
    found = run(ExpandLinear(), text, hop=np.array(4))
    assert reason(found) == "its step, window or length is computed"


NATIVE = [
    'g (float[1,3,12,14] x) => (float[1,3,24,7] y) { y = Resize<mode="cubic">(x, , , sizes) }',
    """g (float[1,27,25] x) => (float[1,3,7,7] y) {
        y = Col2Im(x, side, kernel) }""",
    "g (float[2,16,1] x) => (float[2,16,2] y) { y = DFT(x) }",
    "g (float[2,90,1] x) => (float[2,11,5,2] y) { y = STFT<onesided=1>(x, hop, window) }",
]
ARRAYS = {
    "sizes": np.array([1, 3, 24, 7]), "side": np.array([7, 7]), "kernel": np.array([3, 3]),
    "hop": np.array(8), "window": np.hanning(8).astype(np.float32),
}  # fmt: skip


@pytest.mark.parametrize("text", NATIVE)
def test_nothing_is_left_to_onnx_runtime(text: str) -> None:
    model = parse(text, **{k: v for k, v in ARRAYS.items() if k in text})
    assert compile(ir.to_proto(model), keep_native=True).fallback_nodes == []
