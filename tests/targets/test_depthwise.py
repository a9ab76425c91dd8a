"""Depthwise convolution against float64: every variant, odd sizes, uneven pads, both layouts."""

import numpy as np
import pytest
from sparsegraph.targets import emit, host
from sparsegraph.targets.kernel import prim_func
from sparsegraph.targets.kernels import convert, depthwise, expression
from sparsegraph.targets.kernels.depthwise import Depthwise, Sizes, output_rows
from sparsegraph.targets.layout import FeatureMajor, blocked, planar

from sparsegraph import targets

MACHINE = targets.native()
KERNELS = depthwise.kernels(MACHINE.lanes)
# height, width, pads (top, left, bottom, right)
MAPS = [
    (7, 7, (1, 1, 1, 1)),
    (14, 14, (1, 0, 0, 1)),
    (28, 28, (2, 2, 2, 2)),
    (13, 31, (4, 3, 4, 3)),
    (33, 18, (0, 1, 3, 6)),
    (9, 65, (5, 0, 5, 2)),
    (12, 9, (0, 0, 0, 0)),
]


@pytest.fixture(scope="module")
def library() -> host.Library:
    return host.Library(KERNELS, MACHINE)


def strides(layout: FeatureMajor) -> tuple[int, int, int]:
    return layout.image, layout.tile, layout.row


class Case:
    """One call: random values, all arguments, the float64 result and its error bound."""

    def __init__(self, spec: Depthwise, size: tuple[int, int], pads, layout, multiplier=1):
        rng = np.random.default_rng(size[0] * size[1])
        self.spec, images, channels = spec, 2, 5
        kernel = spec.window.kernel
        outputs = channels * multiplier
        x = rng.standard_normal((images, channels, *size)).astype("f4")
        weights = rng.standard_normal((outputs, *kernel)).astype("f4")
        bias = rng.standard_normal(outputs).astype("f4")
        self.expected = depthwise.reference(x, weights, bias, spec.window, pads)
        magnitude = depthwise.reference(np.abs(x), np.abs(weights), np.abs(bias), spec.window, pads)
        height, width = self.expected.shape[2:]
        self.sizes = Sizes(*size, pads[0], pads[1], height, width, 0)
        self.layout = layout(images, outputs, height * width, 1, MACHINE)
        self.sizes = Sizes(*size, pads[0], pads[1], height, width, self.layout.block)
        source = planar(images, channels, size[0] * size[1], 1, MACHINE)
        planes = x.reshape(images, channels, -1)
        self.x = host.aligned(convert.pack(planes, source, fill=np.nan))
        self.y = host.aligned(np.full(self.layout.size + 16, np.nan, "f4"))
        operands = []
        values = []
        for kind in spec.operands:
            shape = self.expected.shape if kind == "same" else (outputs,)
            value = rng.standard_normal(shape).astype("f4")
            values.append(value if kind == "same" else value[:, None, None])
            if kind == "feature":
                operands.append(value)
                continue
            flat = convert.pack(value.reshape(images, outputs, -1), self.layout)
            operands += [host.aligned(flat), *strides(self.layout)]
        self.bound = 2.0**-22 * (1 + np.sqrt(weights[0].size)) * (magnitude + 1)
        if spec.epilogue is not None:
            arrays = [self.expected, *values]
            self.expected = expression.evaluate(spec.epilogue, arrays)
            self.bound = self.bound * (2 + sum(np.abs(v) for v in values))
        ahead = 3
        scratch = np.full(spec.scratch_bytes(self.sizes, ahead) // 4, np.nan, "f4")
        self.scratch = host.aligned(scratch)
        self.args = [
            self.y, *strides(self.layout), self.x, source.image, source.row, self.scratch,
            *self.sizes.values, outputs, ahead, weights.ravel(), bias, multiplier, *operands,
        ]  # fmt: skip
        self.items = images * outputs

    def fits(self) -> bool:
        """The conditions of a direct kernel."""
        window, sizes = self.spec.window, self.sizes
        wide = sizes.out_width >= window.lanes and sizes.out_height >= window.rows
        return not self.spec.direct or (wide and self.layout.is_planar)

    def check(self, library: host.Library) -> None:
        # two calls as two threads would make them
        library.call(self.spec, *self.args, begin=0, end=self.items // 3)
        library.call(self.spec, *self.args, begin=self.items // 3, end=self.items)
        got = convert.unpack(self.y, self.layout).reshape(self.expected.shape)
        assert (np.abs(got - self.expected) <= self.bound).all(), np.abs(got - self.expected).max()
        every = FeatureMajor(
            **{**vars(self.layout), "points": self.layout.tiles * self.layout.block}
        )
        assert np.isfinite(convert.unpack(self.y, every)).all(), "pad points must be finite"


@pytest.mark.parametrize("layout", [blocked, planar], ids=lambda f: f.__name__)
@pytest.mark.parametrize("spec", KERNELS, ids=lambda k: k.name)
def test_against_float64(library: host.Library, spec: Depthwise, layout) -> None:
    checked = 0
    for height, width, pads in MAPS:
        (kh, kw), (dy, dx) = spec.window.kernel, spec.window.dilation
        is_empty = height + pads[0] + pads[2] <= (kh - 1) * dy
        if is_empty or width + pads[1] + pads[3] <= (kw - 1) * dx:
            continue
        case = Case(spec, (height, width), pads, layout)
        if case.fits():
            case.check(library)
            checked += 1
    assert checked >= 2 or (spec.direct and layout is blocked)


def test_channel_multiplier(library: host.Library) -> None:
    Case(KERNELS[2], (19, 23), (1, 1, 1, 1), blocked, multiplier=3).check(library)


def test_infinite_neighbours_stay_outside(library: host.Library) -> None:
    """A value that no window covers has no influence, not even as 0 * inf."""
    case = Case(KERNELS[2], (14, 14), (0, 0, 0, 0), blocked)
    plane = planar(2, 5, 14 * 14, 1, MACHINE)
    last = 13 * 14 + np.arange(14)  # stride 2 from row 0: row 13 is not read
    for image in range(2):
        for channel in range(5):
            case.x[image * plane.image + channel * plane.row + last] = np.inf
    case.check(library)


@pytest.mark.parametrize("height", [*range(1, 20), 28, 56, 112])
@pytest.mark.parametrize("registers", [16, 32])
def test_output_rows_waste_little(height: int, registers: int) -> None:
    rows = output_rows(height, registers)
    assert 1 <= rows <= height
    assert -(-height // rows) * rows <= height + max(2, height // 4)


@pytest.mark.parametrize("name", ["aarch64", "x86-64-v4"])
def test_compiles_for_other_machines(name: str) -> None:
    machine = targets.get(name)
    functions = {k.name: prim_func(k, machine) for k in depthwise.kernels(machine.lanes)[:4]}
    text = emit.assembly(functions, machine)
    assert all(f"{name}:" in text for name in functions)
