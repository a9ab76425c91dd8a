"""InstanceNormalization and GroupNormalization in kernels of ours, wherever the value lies."""

import numpy as np
import onnx
import onnx.parser
import pytest

from sparsegraph.compile import compile
from tests.passes.check import parse, weight


def check(text: str, **arrays: np.ndarray) -> list[str]:
    """Compiled without ONNX Runtime and right; the kernels."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 23]>\n{text}')
    for name, array in arrays.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    compiled = compile(proto, keep_native=True, fallback=False)
    assert compiled.manifest.verification["max_rel_error"] <= 1e-5
    (segment,) = compiled.manifest.segments
    return [step.kernel for step in segment.steps]


@pytest.mark.parametrize("shape", ["2,6,5,7", "1,6,33", "2,6,4,4,4", "3,6,2"])
@pytest.mark.parametrize("op", ["InstanceNormalization", "GroupNormalization<num_groups=3>"])
def test_row_major(op: str, shape: str) -> None:
    text = f"g (float[{shape}] x) => (float[{shape}] y) {{ y = {op}(x, s, b) }}"
    (kernel,) = check(text, s=weight(6), b=weight(6))
    assert kernel.startswith("group_norm")


@pytest.mark.parametrize("op", ["InstanceNormalization", "GroupNormalization<num_groups=4>"])
def test_between_convolutions_nothing_is_copied(op: str) -> None:
    text = f"""g (float[1,3,9,9] x) => (float[1,2,9,9] y) {{
        a = Conv(x, w)  n = {op}(a, s, b)  r = Relu(n)  y = Conv(r, v) }}"""
    arrays = {"w": weight(8, 3, 1, 1), "v": weight(2, 8, 1, 1), "s": weight(8), "b": weight(8)}
    kernels = check(text, **arrays)
    at = next(i for i, name in enumerate(kernels) if name.startswith("group_norm"))
    assert not any("copy" in name for name in kernels[at - 1 : at + 2])


def test_a_scale_that_is_computed_is_declined() -> None:
    text = """g (float[1,6,5] x, float[6] s) => (float[1,6,5] y) {
        y = InstanceNormalization(x, s, b) }"""
    compiled = compile(parse(text, b=weight(6)), keep_native=True)
    (segment,) = compiled.manifest.segments
    assert "scale or bias is not a constant vector" in segment.reason


@pytest.mark.parametrize(
    ("norm", "is_even"),
    [
        ("n = InstanceNormalization(m, s, b)", True),
        ("n = GroupNormalization<num_groups=64>(m, s, b)", True),
        ("n = GroupNormalization<num_groups=8>(m, s, b)", False),
        ("n = Relu(m)", False),
    ],
)
def test_maps_of_one_colour(norm: str, is_even: bool) -> None:
    """Points of a patch of Winograd's method round in ways of their own; norms would show it."""
    text = f"""g (float[1,64,28,28] x) => (float[1,64,28,28] y) {{
        p = Pad<mode="reflect">(x, pads)
        a = Conv(p, w, c)  r = Relu(a)  q = Pad<mode="reflect">(r, pads)
        m = Conv(q, v, c)  {norm}
        o = Relu(n)  z = Pad<mode="reflect">(o, pads)  y = Conv(z, w) }}"""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 23]>\n{text}')
    w = weight(64, 64, 3, 3)
    arrays = {"w": w, "v": w[::-1].copy(), "s": weight(64), "b": weight(64), "c": weight(64)}
    arrays["pads"] = np.array([0, 0, 1, 1, 0, 0, 1, 1])
    for name, array in arrays.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    compiled = compile(proto, "x86-64-v3", keep_native=True, fallback=False, check=False)
    (segment,) = compiled.manifest.segments
    kernels = [step.kernel for step in segment.steps]
    inputs = [i for i, name in enumerate(kernels) if name.startswith("winograd_input")]
    norms = [i for i, name in enumerate(kernels) if name.startswith("group_norm")]
    assert len(inputs) == (1 if is_even else 3), kernels
    assert not is_even or inputs[0] > norms[0]
    if compiled.session is not None and "Instance" in norm:
        y = compiled(np.full((1, 64, 28, 28), 0.3, "f4"))
        assert np.ptp(y, axis=(2, 3)).max() <= 3e-5  # the last convolution rounds as it likes
