"""The state of lowering one segment: where every value lives, and the steps so far.

A value may be stored row-major, feature-major, or both; `row` and `feature` convert on demand and
remember. Views (reshapes, splits, transposes that move nothing) share memory. A deferred value is
computed only when somebody asks for it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from sparsegraph.errors import Declined as Declined
from sparsegraph.graph import constant, static_shape
from sparsegraph.lower.choose import Decide, choose
from sparsegraph.lower.problem import Choice
from sparsegraph.program import Arg, Program, Ref, Step
from sparsegraph.targets.kernel import Kernel
from sparsegraph.targets.kernels import convert
from sparsegraph.targets.layout import FeatureMajor, blocked, flat, planar, planes
from sparsegraph.targets.target import Target

if TYPE_CHECKING:
    from sparsegraph.lower.expand import Expansion

_FEW_POINTS = 16  # of an image; from there on they fill most of a tile
_STREAMED = 16  # vectors of a plane that are copied at once: 224x224 in 30 us, of two in 60
SLACK_BYTES = 1024  # kernels may read past the end of a temporary, never write
DTYPES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",  # for casts alone
    ir.DataType.INT64: "int64",
    ir.DataType.INT32: "int32",
    ir.DataType.BOOL: "bool",
    ir.DataType.UINT8: "uint8",
    ir.DataType.INT8: "int8",
}


@dataclass(frozen=True)
class Stored:
    """Where a value lies: an address, a logical shape, and a layout (None: row-major)."""

    ref: Ref
    shape: tuple[int, ...]
    dtype: str
    layout: FeatureMajor | None = None

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def fm(self) -> FeatureMajor:
        """The feature-major layout."""
        assert self.layout is not None
        return self.layout

    @property
    def address(self) -> Ref:
        """First element, the layout's offset included."""
        offset = self.ref.offset + (self.layout.offset if self.layout else 0)
        return Ref(self.ref.buffer, offset)

    def strides(self) -> tuple[Arg, ...]:
        """Pointer and strides (image, tile, row), as kernels take a feature-major operand."""
        return (self.address, self.fm.image, self.fm.tile, self.fm.row)


def shape_of(value: ir.Value) -> tuple[int, ...]:
    """Static shape.

    Raises:
        Declined: if the shape depends on run-time data.
    """
    shape = static_shape(value)
    if shape is None:
        raise Declined(f"the shape of '{value.name}' depends on run-time data")
    return shape


def dtype_of(value: ir.Value) -> str:
    """NumPy name of the value's type.

    Raises:
        Declined: if no kernel handles the type.
    """
    if value.dtype not in DTYPES:
        raise Declined(f"'{value.name}' has type {value.dtype}")
    return DTYPES[value.dtype]


def name_of(value: ir.Value) -> str:
    assert value.name is not None
    return value.name


class Builder:
    """Lowers the nodes of one segment into `program`."""

    def __init__(
        self, program: Program, target: Target, chunks: int, decide: Decide | None = None
    ) -> None:
        self.program = program
        self.target = target
        self.decide = decide or (lambda problem, _, target: choose(problem, target))
        self.chunks = chunks  # parts of the rows of one product that may run on their own
        self.done: set[ir.Node] = set()
        self.layers: list[dict[str, Any]] = []  # one entry per product, for the report
        self.n_converted = 0  # elements whose layout changes
        self.placements: dict[str, Stored] = {}
        self.expansions: dict[str, Expansion] = {}  # waiting products, by their result
        self._stored: dict[str, dict[str, Stored]] = {}
        self._deferred: dict[str, Callable[[], None]] = {}
        self._outputs = {t.name for t in program.outputs}
        for t in program.inputs:
            self._stored[t.name] = {"row": Stored(Ref(t.name), t.shape, t.dtype)}

    # ------------------------------------------------------------ asking for values

    def is_ready(self, value: ir.Value) -> bool:
        """True if the value can be had without lowering another node."""
        name = name_of(value)
        return name in self._stored or name in self._deferred or constant(value) is not None

    def row(self, value: ir.Value) -> Stored:
        """The value in row-major order."""
        forms = self._forms(value)
        if "row" not in forms:
            forms["row"] = self.to_row(value, next(iter(forms.values())))
        return forms["row"]

    def feature(self, value: ir.Value, axis: int, *, is_planar: bool = False) -> Stored:
        """The value in feature-major order with its features on `axis`, float32 only."""
        if dtype_of(value) != "float32":
            raise Declined(f"'{value.name}' is {dtype_of(value)}, products take float32")
        forms = self._forms(value)
        axis %= max(1, len(shape_of(value)))
        if constant(value) is not None and "fm" not in forms:
            array = constant(value)
            assert array is not None
            stored = self.constant_planes(f"{value.name}.fm", array, axis, together=True)
            return self.keep(value, stored)
        for kind in ("fm", "planar"):
            form = forms.get(kind)
            if form and form.fm.axis == axis and (form.fm.is_planar or not is_planar):
                return form
        form = forms.get("fm")
        if form and form.fm.axis == axis:
            forms["planar"] = self._copy(value, form, is_planar=True)
            return forms["planar"]
        made = self.to_feature(value, self.row(value), axis, is_planar, together=True)
        forms["planar" if is_planar and "fm" in forms else "fm"] = made
        return made

    def single(self, value: ir.Value, axis: int, images: int) -> Stored:
        """One point in each of some images, flat if that is how the value lies.

        A view may hold them as the points of one image: a convolution's, each a sequence of one.
        """
        forms = self._forms(value)
        if "row" not in forms or "fm" in forms or dtype_of(value) != "float32":
            stored = self.feature(value, axis)
            if (stored.fm.images, stored.fm.points) == (images, 1):
                return stored
        return replace(self.row(value), layout=flat(images, shape_of(value)[axis], axis))

    def maps(self, value: ir.Value, *, is_planar: bool = False) -> Stored:
        """The value [images, channels, ...] in feature-major order, as windows read it.

        A view may hold the points of several images as those of one: a product's [N, C], reshaped.
        """
        layout = self.layout_of(value)
        if layout is None or layout.axis != 1 or layout.images == shape_of(value)[0]:
            return self.feature(value, 1, is_planar=is_planar)
        return self.to_feature(value, self.row(value), 1, is_planar)

    def layout_of(self, value: ir.Value) -> FeatureMajor | None:
        """The feature-major layout in which the value is already stored, or None."""
        if constant(value) is not None or not self.is_ready(value):
            return None
        form = self._forms(value).get("fm")
        return form.layout if form else None

    def _forms(self, value: ir.Value) -> dict[str, Stored]:
        name = name_of(value)
        if name not in self._stored and name in self._deferred:
            self._deferred.pop(name)()
        if name not in self._stored:
            array = constant(value)
            if array is None:
                raise Declined(f"'{name}' is not computed before it is used")
            dtype = dtype_of(value)
            ref = self.weight(name, np.ascontiguousarray(array, dtype=np.dtype(dtype)))
            self._stored[name] = {"row": Stored(ref, array.shape, dtype)}
        return self._stored[name]

    # ------------------------------------------------------------ making room for values

    def new_row(self, value: ir.Value) -> Stored:
        """Room for a row-major value, the caller's own memory for an output."""
        shape, dtype = shape_of(value), dtype_of(value)
        name = name_of(value)
        if name in self._outputs:
            stored = Stored(Ref(name), shape, dtype)
        else:
            n_bytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
            stored = Stored(self.temporary(name, n_bytes), shape, dtype)
        return self.keep(value, stored)

    def new_feature(
        self, value: ir.Value, like: FeatureMajor, *, is_planar: bool = False
    ) -> Stored:
        """Room for a feature-major value with the points of `like` and the value's features.

        In planes if `is_planar`, which is a wish, or if a reader wants them.
        A value that a Concat of features reads is placed inside the Concat's memory.
        """
        name, shape = name_of(value), shape_of(value)
        if name in self.placements:
            return self.keep(value, self.placements[name])
        make = planar if is_planar or wants_planes(value) else blocked
        layout = make(like.images, shape[like.axis], like.points, like.axis, self.target)
        parent = self._concat_place(value, layout)
        if parent is not None:
            return self.keep(value, parent)
        stored = Stored(self.temporary(name, 4 * layout.size), shape, "float32", layout)
        return self.keep(value, stored)

    def _concat_place(self, value: ir.Value, layout: FeatureMajor) -> Stored | None:
        """The value's slice of the one Concat (along features) that reads it, or None."""
        concats = [n for n in value.consumers() if n.op_type == "Concat" and n not in self.done]
        if len(concats) != 1 or list(concats[0].inputs).count(value) != 1:
            return None
        node, result = concats[0], concats[0].outputs[0]
        shape = static_shape(result)
        axis = int(node.attributes["axis"].value) % len(shape_of(value))
        if shape is None or axis != layout.axis or name_of(value) in self._outputs:
            return None
        if name_of(result) not in self.placements:
            make = (
                planar
                if any(wants_planes(v) for v in (*node.inputs, result) if v is not None)
                else blocked
            )
            whole = make(layout.images, shape[axis], layout.points, axis, self.target)
            place = self._concat_place(result, whole)
            if place is None:
                ref = self.temporary(name_of(result), 4 * whole.size)
                place = Stored(ref, shape, "float32", whole)
            self.placements[name_of(result)] = place
        start = 0
        for v in node.inputs:
            if v is value:
                break
            assert v is not None
            start += shape_of(v)[axis]
        parent = self.placements[name_of(result)]
        view = parent.fm.slice(start, shape_of(value)[axis])
        return Stored(parent.ref, shape_of(value), "float32", view)

    def part_of(self, value: ir.Value, like: FeatureMajor, features: int) -> Stored:
        """Room for some features of a value with the points of `like`."""
        layout = blocked(like.images, features, like.points, like.axis, self.target)
        ref = self.temporary(f"{name_of(value)}.part", 4 * layout.size)
        return Stored(ref, shape_of(value), "float32", layout)

    def is_output(self, value: ir.Value) -> bool:
        """True if nobody but the caller reads the value."""
        return name_of(value) in self._outputs and not value.consumers()

    def own_planes(self, value: ir.Value, axis: int) -> Stored | None:
        """The caller's planes for an output that nothing else reads, if they hold whole tiles."""
        if not self.is_output(value):
            return None
        shape = shape_of(value)
        images, points = split_points(shape, axis)
        fm = planes(images, shape[axis], points, axis, self.target)
        if int(np.prod(shape[:axis], dtype=np.int64)) != images or points % fm.block:
            return None
        return replace(self.new_row(value), layout=fm)

    def keep(self, value: ir.Value, stored: Stored) -> Stored:
        """Remember where a value lies."""
        kind = "row" if stored.layout is None else "fm"
        self._stored.setdefault(name_of(value), {})[kind] = stored
        return stored

    def defer(self, value: ir.Value, make: Callable[[], None]) -> None:
        """Call `make`, which must store the value, only if somebody asks for it."""
        self._deferred[name_of(value)] = make

    def temporary(self, name: str, n_bytes: int) -> Ref:
        """Workspace memory under a name that nothing else has."""
        unique, i = name, 1
        while self._is_taken(unique):
            unique, i = f"{name}~{i}", i + 1
        self.program.temporaries[unique] = n_bytes + SLACK_BYTES
        return Ref(unique)

    def _is_taken(self, name: str) -> bool:
        """True if workspace, a weight, an input or an output has that name: an address by name."""
        borders = {t.name for t in (*self.program.inputs, *self.program.outputs)}
        return name in self.program.temporaries or name in self.program.weights or name in borders

    def weight(self, name: str, array: np.ndarray) -> Ref:
        """A constant in the weight file."""
        unique, i = name, 1
        while self._is_taken(unique):
            if unique in self.program.weights and self.program.weights[unique] is array:
                return Ref(unique)
            unique, i = f"{name}~{i}", i + 1
        self.program.weights[unique] = array
        return Ref(unique)

    # ------------------------------------------------------------ steps

    def step(
        self, kernel: Kernel, args: Sequence[Arg], items: int, nodes: Sequence[ir.Node] = (),
        **about: Any,
    ) -> None:  # fmt: skip
        """Append one kernel call."""
        assert len(args) == len(kernel.params), (kernel.name, len(args), len(kernel.params))
        names = tuple(n.name or n.op_type for n in nodes)
        self.program.steps.append(Step(kernel, tuple(args), items, names, **about))
        self.done.update(nodes)

    def describe(
        self, node: ir.Node, shape: Sequence[int], density: float, choice: Choice, macs: int
    ) -> None:
        """Note what was decided for one layer."""
        name = node.name or name_of(node.outputs[0])
        layer = {
            "node": name,
            "op": node.op_type,
            "weight": list(shape),
            "density": density,
            "format": choice.format,
            "break_even": choice.break_even,
            "macs": macs,
            "estimate": choice.cost,
            "ms": choice.ms,
            "is_measured": choice.is_measured,
        }
        if self.layers and self.layers[-1]["node"] == name:
            layer = _sum(self.layers.pop(), layer)
        self.layers.append(layer)

    def finish(self, outputs: Sequence[ir.Value]) -> None:
        """Bring every output of the segment into the caller's memory."""
        for value in outputs:
            stored = self.row(value)
            if stored.ref != Ref(name_of(value)):
                self._stored[name_of(value)].pop("row")
                self.copy_row(stored, self.new_row(value))

    def copy_row(self, source: Stored, to: Stored) -> None:
        """Copy row-major memory of any type."""
        from sparsegraph.lower.movement import copy_flat

        copy_flat(self, source, to)

    def copy_permuted(self, x: Stored, perm: Sequence[int], to: Stored) -> None:
        """Transpose row-major memory of any type."""
        from sparsegraph.lower.movement import copy_permuted

        copy_permuted(self, x, perm, to)

    # ------------------------------------------------------------ conversions

    def to_row(self, value: ir.Value, form: Stored) -> Stored:
        """A row-major copy of `form`, which holds the value (perhaps under another shape)."""
        made, fm = self.new_row(value), form.fm
        before = int(np.prod(form.shape[: fm.axis], dtype=np.int64))
        if before == fm.images:  # features, then points: planes
            self.n_converted += made.size
            kernel = convert.Copy("result", self.target.lanes, fm.block // self.target.lanes)
            plane = (fm.features * fm.points, fm.block, fm.points)
            args = (made.address, *plane, *form.strides(), fm.tiles, fm.features, fm.points,
                    fm.block)  # fmt: skip
            detail = f"layout of {value.name}"
            self.step(kernel, args, fm.images * fm.tiles, tiled=("y", "x"), detail=detail)
        elif fm.axis == len(form.shape) - 1:
            self.to_tokens(form, made.ref, fm.features)
        else:  # points on both sides: features go last, then where they belong
            tokens = self.temporary(f"{value.name}.tokens", 4 * made.size)
            self.to_tokens(form, tokens, fm.features)
            shape = (before, fm.images * fm.points // before, fm.features)
            self.copy_permuted(Stored(tokens, shape, "float32"), (0, 2, 1), made)
        return made

    def to_tokens(self, form: Stored, to: Ref, total: int) -> None:
        """Copy `form` to row-major [images, points, total] memory, from the feature at `to` on."""
        fm = form.fm
        self.n_converted += fm.images * fm.points * fm.features
        kernel = convert.Transpose("tokens", self.target.shuffle_lanes)
        args = (to, fm.points * total, total, *form.strides(), fm.tiles, fm.features, fm.points,
                fm.block)  # fmt: skip
        detail = f"layout of {to.buffer}"
        self.step(kernel, args, fm.images * fm.tiles, tiled=("y", "x"), detail=detail)

    def to_feature(
        self, value: ir.Value, form: Stored, axis: int, is_planar: bool = False,
        *, together: bool = False,
    ) -> Stored:  # fmt: skip
        """A feature-major copy of row-major `form`, which holds the value."""
        images, points = split_points(form.shape, axis, together=together)
        self.n_converted += form.size
        make = planar if is_planar or wants_planes(value) else blocked
        fm = make(images, form.shape[axis] if form.shape else 1, points, axis, self.target)
        lanes = self.target.lanes
        made = Stored(self.temporary(f"{value.name}.fm", 4 * fm.size), form.shape, "float32", fm)
        before = int(np.prod(form.shape[:axis], dtype=np.int64))
        detail = f"layout of {value.name}"
        if before == images and fm.is_planar:
            self._stream(form, made, detail)
            return made
        if before == images:
            kernel: Kernel = convert.Copy("source", lanes, fm.block // lanes)
            plane = (fm.features * fm.points, fm.block, fm.points)
            args = (*made.strides(), form.address, *plane, fm.tiles, fm.features, fm.points,
                    fm.block)  # fmt: skip
        elif axis == len(form.shape) - 1:
            kernel = convert.Transpose("feature", self.target.shuffle_lanes)
            args = (*made.strides(), form.address, fm.points * fm.features, fm.features,
                    fm.tiles, fm.features, fm.points, fm.block)  # fmt: skip
        else:
            raise Declined(f"features on axis {axis} of '{value.name}' {form.shape}")
        self.step(kernel, args, fm.images * fm.tiles, tiled=("y", "x"), detail=detail)
        return made

    def _stream(self, planes: Stored, to: Stored, detail: str) -> None:
        """Copy row-major planes to padded ones, many vectors at a time."""
        fm, lanes = to.fm, self.target.lanes
        n = next(n for n in range(1, fm.tiles + 1) if _is_part(fm, n, lanes))
        part = fm.tiles // n * fm.block
        kernel = convert.Copy("source", lanes, part // lanes)
        args = (to.address, fm.row, part, 0, planes.address, fm.points, part, 0, n, 1, fm.points,
                part)  # fmt: skip
        self.step(kernel, args, fm.images * fm.features * n, detail=detail)

    def constant_planes(
        self, name: str, array: np.ndarray, axis: int, *, together: bool = False
    ) -> Stored:
        """A constant, stored feature-major in the weight file."""
        images, points = split_points(array.shape, axis, together=together)
        fm = blocked(images, array.shape[axis], points, axis, self.target)
        planes = np.moveaxis(array, axis, -1).reshape(images, points, -1).transpose(0, 2, 1)
        ref = self.weight(name, convert.pack(planes, fm))
        return Stored(ref, array.shape, "float32", fm)

    def scratch_feature(self, value: ir.Value, shape: tuple[int, ...], axis: int) -> Stored:
        """Feature-major room that is not the value's own form."""
        images, points = split_points(shape, axis)
        fm = blocked(images, shape[axis], points, axis, self.target)
        ref = self.temporary(f"{value.name}.fm", 4 * fm.size)
        return Stored(ref, shape, "float32", fm)

    def _copy(self, value: ir.Value, form: Stored, *, is_planar: bool) -> Stored:
        fm, make = form.fm, planar if is_planar else blocked
        to = make(fm.images, fm.features, fm.points, fm.axis, self.target)
        ref = self.temporary(f"{value.name}.planes", 4 * to.size)
        made = replace(form, ref=ref, layout=to)
        self.copy_feature(form, made)
        return made

    def copy_feature(self, source: Stored, to: Stored) -> None:
        """Copy between two feature-major places with the same points."""
        fm = source.fm
        kernel = convert.Copy("neither", self.target.lanes)
        args = (*to.strides(), *source.strides(), fm.tiles, fm.features, fm.points, fm.block)
        self.step(kernel, args, fm.images * fm.tiles, tiled=("y", "x"), detail="copy")


def _sum(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """One layer of two parts that hold different rows of its weight."""
    total = a["macs"] + b["macs"]
    share = {k: (a[k] * a["macs"] + b[k] * b["macs"]) / total for k in ("density", "estimate")}
    rows = a["weight"][0] + b["weight"][0]
    formats = dict.fromkeys((*a["format"].split("+"), b["format"]))
    both = {
        "weight": [rows, *a["weight"][1:]],
        "format": "+".join(formats),
        "macs": total,
        "ms": a["ms"] + b["ms"],
        "is_measured": a["is_measured"] and b["is_measured"],
    }
    return {**a, **share, **both}


def _is_part(fm: FeatureMajor, n: int, lanes: int) -> bool:
    """True if a plane falls into n parts of whole tiles that are few vectors, or tiles alone."""
    tiles, rest = divmod(fm.tiles, n)
    return not rest and (tiles == 1 or tiles * fm.block <= _STREAMED * lanes)


def split_points(shape: Sequence[int], axis: int, *, together: bool = False) -> tuple[int, int]:
    """(images, points) for features on `axis`: the leading axis counts images from rank 3 on.

    With `together`, points that are few and whose features are last count as those of one image,
    since those of each would fill a small part of its tile. PyTorch's encoders take [tokens, batch,
    features]: with 90 % zeros, 64 tokens and a batch of 4, one takes a quarter of the time so.
    """
    rest = [d for i, d in enumerate(shape) if i != axis]
    images = rest[0] if len(shape) >= 3 else 1
    total = int(np.prod(rest, dtype=np.int64))
    points = total // images if images else 0
    is_last = axis == len(shape) - 1
    if together and is_last and points < _FEW_POINTS:
        return 1, total
    return images, points


def wants_planes(value: ir.Value) -> bool:
    """True if a consumer reads neighbouring pixels, so planes save it index arithmetic."""
    return any(_reads_neighbours(node) for node in value.consumers())


def _reads_neighbours(node: ir.Node) -> bool:
    if node.op_type in ("MaxPool", "AveragePool", "Resize", "ConvTranspose"):
        return True
    if node.op_type != "Conv":
        return False
    shape = static_shape(node.inputs[1])
    return shape is not None and any(k != 1 for k in shape[2:])
