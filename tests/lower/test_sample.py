"""GridSample in every mode against ONNX Runtime, also far outside of the map."""

import itertools

import numpy as np
import onnx_ir as ir
import pytest
from sparsegraph.targets.kernels.sample import MODES, PADDINGS

from sparsegraph import targets
from sparsegraph.compile import compile
from sparsegraph.lower import partition
from sparsegraph.program import Fallback
from sparsegraph.verify import compare, run_onnx
from tests.passes.check import parse, rng

TEXT = """g (float[{x}] x, float[{grid}] i) => (float[{y}] y) {{
    s = GridSample<mode="{mode}", padding_mode="{padding}", align_corners={aligned}>(x, i)
    y = Relu(s) }}"""


def sampled(
    shape: tuple[int, ...], points: tuple[int, ...], mode: str, padding: str, aligned: int
) -> ir.Model:
    sizes = [shape, (shape[0], *points, 2), (*shape[:2], *points)]
    x, grid, y = (",".join(map(str, one)) for one in sizes)
    text = TEXT.format(x=x, grid=grid, y=y, mode=mode, padding=padding, aligned=aligned)
    return parse(text, opset=20)


@pytest.mark.parametrize(
    ("mode", "padding", "aligned"), list(itertools.product(MODES, PADDINGS, (0, 1)))
)
def test_modes(mode: str, padding: str, aligned: int) -> None:
    """Nearest pixels are asked for away from the middle between two, where rounding decides."""
    for shape, points in (((2, 19, 5, 8), (3, 7)), ((3, 2, 4, 6), (9, 2))):
        model = sampled(shape, points, mode, padding, aligned)
        made = compile(ir.to_proto(model), keep_native=True)
        assert made.fallback_nodes == []
        x = rng().standard_normal(shape).astype(np.float32)
        grid = rng().uniform(-3, 3, (shape[0], *points, 2)).astype(np.float32)
        grid[0, 0, :2] = [[-1, 1], [1, -1]]
        if mode == "nearest":
            size = np.array(shape[:1:-1])
            pixel = (grid + 1) / 2 * (size - 1) if aligned else ((grid + 1) * size - 1) / 2
            pixel = np.round(pixel) + rng().uniform(-0.4, 0.4, pixel.shape)
            grid = pixel / (size - 1) * 2 - 1 if aligned else (pixel * 2 + 1) / size - 1
        feed = {"x": x, "i": grid.astype(np.float32)}
        assert compare(made.run(None, feed)[0], run_onnx(model, feed)["y"]) < 1e-5


def test_points_that_are_no_numbers_read_nothing_foreign() -> None:
    model = sampled((1, 9, 4, 4), (2, 3), "linear", "zeros", 0)
    made = compile(ir.to_proto(model), keep_native=True)
    grid = np.full((1, 2, 3, 2), 1e30, np.float32)
    grid[0, 0] = [[np.nan, 0], [np.inf, 0], [0, -np.inf]]
    (found,) = made.run(None, {"x": np.ones((1, 9, 4, 4), np.float32), "i": grid})
    assert not found.any()


@pytest.mark.parametrize(
    ("shape", "mode", "padding", "why"),
    [
        ((1, 2, 4, 4), "cubic", "zeros", "mode 'cubic' with padding 'zeros'"),
        ((1, 2, 1, 4), "linear", "reflection", "a single pixel between mirrors"),
    ],
)
def test_what_is_left(shape: tuple[int, ...], mode: str, padding: str, why: str) -> None:
    plan = partition.plan(sampled(shape, (2, 3), mode, padding, 1), targets.get("native"))
    assert [why in s.reason for s in plan.segments if isinstance(s, Fallback)] == [True]
