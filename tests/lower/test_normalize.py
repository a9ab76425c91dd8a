"""LayerNormalization and RMSNormalization: which scales and biases are vectors."""

import numpy as np
import pytest

from sparsegraph.compile import Compiled, compile
from tests.passes.check import parse, weight

NORMS = ["RMSNormalization", "LayerNormalization"]


def compiled(op: str, axis: int, **arrays: np.ndarray) -> Compiled:
    """A norm of x [2, 5, 8] by `s` and perhaps `b`."""
    given = ", b" if "b" in arrays else ""
    text = f"""g (float[2,5,8] x) => (float[2,5,8] y) {{
        y = {op}<axis={axis}>(x, s{given}) }}"""
    return compile(parse(text, **arrays), keep_native=True)


@pytest.mark.parametrize("op", NORMS)
@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("lead", [0, 1, 2])
def test_scales_in_the_shape_of_x(op: str, axis: int, lead: int) -> None:
    """As PyTorch writes a norm without a scale: ones for every element."""
    space = (2, 5, 8)[axis:]
    shape = (2, 5, 8)[max(0, 3 - len(space) - lead) :]
    arrays = {"s": np.broadcast_to(weight(*space), shape).copy()}
    if op == "LayerNormalization":
        arrays["b"] = np.broadcast_to(weight(*space) + 1, shape).copy()
    done = compiled(op, axis, **arrays)
    assert not done.fallback_nodes
    assert done.manifest.verification["max_rel_error"] <= 1e-6


def test_one_number_for_all() -> None:
    done = compiled("RMSNormalization", -1, s=np.array([0.5], np.float32))
    assert not done.fallback_nodes


@pytest.mark.parametrize("axis", [-1, 1])
def test_scales_that_differ_elsewhere(axis: int) -> None:
    done = compiled("RMSNormalization", axis, s=weight(2, 5, 8))
    assert len(done.fallback_nodes) == 1
    assert "scale or bias is not a constant vector" in done.report()
