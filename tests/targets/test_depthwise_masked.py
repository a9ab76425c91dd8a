"""Depthwise convolution without a padded copy against float64: odd sizes, pads, products."""

import dataclasses

import numpy as np
import pytest
from sparsegraph.targets import emit, host
from sparsegraph.targets.kernel import prim_func
from sparsegraph.targets.kernels import convert, depthwise, expression
from sparsegraph.targets.kernels.depthwise_masked import (
    LEAD,
    Expand,
    MaskedDepthwise,
    border,
    kernels,
)
from sparsegraph.targets.kernels.window import Window
from sparsegraph.targets.layout import FeatureMajor, blocked, planar

from sparsegraph import compressed_rows, targets

MACHINE = targets.native()
LANES = MACHINE.lanes
RELU = ("Relu", ("arg", 0))
RESIDUAL = ("Relu", ("Add", ("Mul", ("arg", 0), ("arg", 2)), ("arg", 1)))
RESIDUAL_OF_TWO = ("Add", ("Mul", ("arg", 0), ("arg", 2)), ("arg", 1))
ONE, TWO = (1, 1), (2, 2)
# window, rows of the result per pass, height, width, pads (top, left, bottom, right)
CASES = [
    ((3, 3), ONE, ONE, 4, (33, 40), (1, 1, 1, 1)),
    ((3, 3), ONE, ONE, 4, (8, 64), (1, 1, 1, 1)),
    ((3, 3), ONE, ONE, 3, (7, 7), (1, 1, 1, 1)),
    ((3, 3), ONE, ONE, 2, (2, 2), (1, 1, 1, 1)),
    ((3, 3), ONE, ONE, 1, (1, 9), (1, 1, 1, 1)),
    ((3, 3), TWO, ONE, 4, (28, 64), (1, 1, 1, 1)),
    ((3, 3), TWO, ONE, 4, (29, 63), (1, 1, 1, 1)),
    ((3, 3), TWO, ONE, 4, (14, 14), (0, 0, 1, 1)),
    ((5, 5), TWO, ONE, 3, (19, 50), (2, 2, 2, 2)),
    ((5, 5), ONE, ONE, 4, (5, 21), (2, 2, 2, 2)),
    ((3, 3), ONE, TWO, 3, (11, 37), (4, 3, 2, 5)),
    ((3, 3), (1, 2), TWO, 2, (13, 45), (2, 1, 0, 6)),
    ((2, 5), (3, 1), (1, 3), 2, (17, 41), (1, 9, 2, 4)),
    ((3, 1), ONE, ONE, 4, (12, 24), (1, 0, 1, 0)),
    ((7, 7), ONE, ONE, 2, (9, 30), (3, 3, 3, 3)),
]


def strides(layout: FeatureMajor) -> tuple[int, int, int]:
    return layout.image, layout.tile, layout.row


class Case:
    """One call: random values, all arguments, the float64 result and its error bound."""

    def __init__(
        self, case, direct: bool, epilogue=None, operands=(), expand=None, multiplier: int = 1,
        kept: float | None = None, spread: bool = False,
    ):  # fmt: skip
        kernel, stride, dilation, rows, size, pads = case
        rng = np.random.default_rng(size[0] * size[1])
        images, channels = 2, 5
        outputs = channels * multiplier
        window = Window(kernel, stride, dilation, 1, LANES)
        weights = rng.standard_normal((outputs, *kernel)).astype("f4")
        stored = [weights.ravel()]
        if kept is not None:
            weights[rng.random(weights.shape) >= kept] = 0
            stored = list(compressed_rows.pack(weights.reshape(outputs, -1), np.uint8))
        bias = rng.standard_normal(outputs).astype("f4")
        source, x, magnitude = self.source(rng, images, channels, size, expand)
        self.expected = depthwise.reference(x, weights, bias, window, pads)
        magnitude = depthwise.reference(magnitude, np.abs(weights), np.abs(bias), window, pads)
        out = self.expected.shape[2:]
        layout = planar if direct else blocked
        self.layout = layout(images, outputs, out[0] * out[1], 1, MACHINE)
        edges = border(window, size, pads[:2], out)
        self.spec = MaskedDepthwise(
            window, edges, direct, epilogue, operands, self.expand, kept is not None, spread
        )
        self.y = host.aligned(np.full(self.layout.size + 16, np.nan, "f4"))
        values, extra = [], []
        for kind in operands:
            value = rng.standard_normal(self.expected.shape if kind == "same" else outputs)
            value = value.astype("f4")
            values.append(value if kind == "same" else value[:, None, None])
            if kind == "feature":
                extra.append(value)
                continue
            flat = convert.pack(value.reshape(images, outputs, -1), self.layout)
            extra += [host.aligned(flat), *strides(self.layout)]
        self.bound = 2.0**-21 * (1 + np.sqrt(weights[0].size)) * (magnitude + 1)
        if epilogue is not None:
            self.expected = expression.evaluate(epilogue, [self.expected, *values])
            self.bound = self.bound * (2 + sum(np.abs(v) for v in values))
        n_bytes = self.spec.scratch_bytes(size[1], out, self.layout.block, self.z_points)
        self.scratch = host.aligned(np.full(n_bytes // 4 + LANES, np.nan, "f4"))
        self.args = [
            self.y, *strides(self.layout), *source, self.scratch, *size, *out, rows,
            self.layout.block,
            outputs, *stored, bias, multiplier,
            *extra,
        ]  # fmt: skip
        self.items = images * outputs

    def source(self, rng, images, channels, size, expand):
        """Arguments, the map, and a bound of the magnitude of its terms."""
        self.expand, self.z_points = None, 0
        if expand is None:
            x = rng.standard_normal((images, channels, *size)).astype("f4")
            fm = planar(images, channels, size[0] * size[1], 1, MACHINE)
            flat = convert.pack(x.reshape(images, channels, -1), fm, fill=np.nan)
            behind = np.full(3 * LANES, np.nan, "f4")
            self.x = host.aligned(np.concatenate([np.full(LEAD, np.nan, "f4"), flat, behind]))
            return (self.x[LEAD:], fm.image, fm.row), x, np.abs(x)
        density, layout, epilogue = expand
        fm = layout(images, 6, size[0] * size[1], 1, MACHINE)
        z = rng.standard_normal((images, 6, *size)).astype("f4")
        matrix = rng.standard_normal((channels, 6)).astype("f4")
        matrix[rng.random(matrix.shape) >= density] = 0
        bias = rng.standard_normal(channels).astype("f4")
        x = np.einsum("ck,nkhw->nchw", matrix.astype("f8"), z) + bias[:, None, None]
        if epilogue is not None:
            x = expression.evaluate(epilogue, [x])
        magnitude = np.einsum("ck,nkhw->nchw", abs(matrix), abs(z)) + abs(bias[:, None, None])
        row, column = np.nonzero(matrix)
        starts = np.searchsorted(row, np.arange(channels + 1)).astype("i4")
        self.expand, self.z_points = Expand(fm.block // LANES, epilogue), fm.tiles * fm.block
        z_args = (host.aligned(convert.pack(z.reshape(images, 6, -1), fm)), fm.image, fm.tile)
        sparse = (starts, (column * fm.row).astype("i4"), matrix[row, column], bias)
        return (*z_args, fm.tiles, *sparse), x, magnitude

    @property
    def fits(self) -> bool:
        """What a direct kernel asks of the result."""
        return not self.spec.direct or self.expected.shape[3] >= LANES

    def check(self, library: host.Library) -> None:
        # two calls as two threads would make them
        library.call(self.spec, *self.args, begin=0, end=self.items // 3)
        library.call(self.spec, *self.args, begin=self.items // 3, end=self.items)
        got = convert.unpack(self.y, self.layout).reshape(self.expected.shape)
        assert (np.abs(got - self.expected) <= self.bound).all(), np.abs(got - self.expected).max()
        points = self.layout.tiles * self.layout.block
        every = FeatureMajor(**{**vars(self.layout), "points": points})
        assert np.isfinite(convert.unpack(self.y, every)).all(), "pad points must be finite"


def _cases() -> list[Case]:
    found = [Case(c, i % 2 == 0) for i, c in enumerate(CASES)]
    found += [Case(c, i % 2 == 1) for i, c in enumerate(CASES[:6])]
    found += [Case(c, False, RESIDUAL, ("same", "feature")) for c in CASES[:2]]
    found.append(Case(CASES[0], True, RESIDUAL_OF_TWO, ("feature", "feature")))
    found.append(Case(CASES[0], False, multiplier=3))
    for i, c in enumerate(CASES[:12]):
        density = (0.0, 0.01, 0.5, 0.9, 1.0)[i % 5]
        expand = (density, (blocked, planar)[i % 2], RELU if i % 3 else None)
        found.append(Case(c, i % 2 == 1, RELU, (), expand))
    found += [Case(c, i % 2 == 0, kept=(0.0, 0.1, 0.5, 1.0)[i % 4]) for i, c in enumerate(CASES)]
    found.append(Case(CASES[0], True, RELU, (), (0.5, blocked, RELU), kept=0.2))
    found.append(Case(CASES[0], False, multiplier=3, kept=0.2))
    found += [Case(c, i % 2 == 0, spread=True) for i, c in enumerate(CASES)]
    found.append(Case(CASES[0], True, RELU, (), (0.5, blocked, RELU), kept=0.2, spread=True))
    return [c for c in found if c.fits]


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return _cases()


@pytest.fixture(scope="module")
def library(cases: list[Case]) -> host.Library:
    return host.Library([c.spec for c in cases], MACHINE)


def test_against_float64(cases: list[Case], library: host.Library) -> None:
    assert len(cases) >= 30
    assert any(c.spec.direct and c.spec.expand for c in cases)
    assert sum(c.spec.coded for c in cases) >= 12
    for case in cases:
        case.check(library)


@pytest.mark.parametrize("n", [8, 14])
def test_weights_and_masks_that_registers_have_no_room_for(cases: list[Case], n: int) -> None:
    """With 8 registers windows of 3x3 read most weights at every use, with 14 those of 5x5."""
    few = host.Library([c.spec for c in cases], dataclasses.replace(MACHINE, n_registers=n))
    for case in cases:
        case.y[:] = np.nan
        case.check(few)


def test_what_masks_hide_has_no_influence(library: host.Library) -> None:
    """Rows that no window covers may hold anything; the end of a row never reaches the next."""
    case = Case(CASES[7], False)
    fm = planar(2, 5, 14 * 14, 1, MACHINE)
    planes = convert.unpack(case.x[LEAD:], fm)
    assert np.isfinite(planes).all()
    assert np.isnan(case.x[:LEAD]).all(), "what lies before the map is read"
    case.check(library)


@pytest.mark.parametrize("name", ["aarch64", "x86-64-v4"])
def test_compiles_for_other_machines(name: str) -> None:
    machine = targets.get(name)
    functions = {k.name: prim_func(k, machine) for k in kernels(machine.lanes)[1:4]}
    text = emit.assembly(functions, machine)
    assert all(f"{name}:" in text for name in functions)
