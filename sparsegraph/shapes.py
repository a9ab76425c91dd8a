"""Make every dimension a number: bind free ones, and measure what inference cannot tell."""

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from sparsegraph.errors import CaptureError, message
from sparsegraph.graph import captured, input_at, is_op, static_bytes, static_shape
from sparsegraph.verify import Session, feeds_for, tapped

Shapes = Mapping[str, int | Sequence[int]]

_LARGEST_INPUT = 16 << 30  # bytes: an input of every model is made up to compare outputs
_SIZE_FROM_DATA = (
    "Compress", "If", "Loop", "NonMaxSuppression", "NonZero", "Scan", "StringSplit", "Unique",
)  # fmt: skip
_SHAPE_OPERANDS = {
    "AffineGrid": (1,), "BlackmanWindow": (0,), "CenterCropPad": (1,), "ConstantOfShape": (0,),
    "DFT": (1,), "Expand": (1,), "HammingWindow": (0,), "HannWindow": (0,), "OneHot": (1,),
    "Pad": (1, 3), "Range": (0, 1, 2), "ReduceMax": (1,), "ReduceMean": (1,), "ReduceSum": (1,),
    "Reshape": (1,), "Resize": (2, 3), "Slice": (1, 2, 3, 4), "Split": (1,), "Squeeze": (1,),
    "Tile": (1,), "TopK": (1,), "Unsqueeze": (1,), "Upsample": (1,),
}  # fmt: skip


def bind(model: ir.Model, name: str, shapes: Shapes) -> None:
    """Replace free input dimensions: `shapes` maps a dimension to a size or an input to a shape.

    Raises CaptureError for names that do not exist, sizes that contradict each other, dimensions
    that stay free (all of them, with the option to give), and inputs that no memory would hold.
    """
    inputs = {str(v.name): v for v in model.graph.inputs}
    for value in inputs.values():
        _forget_anonymous(value)
    known = {n for v in inputs.values() for d in _dims(v) if (n := _name(d))}
    sizes = {key: size for key, size in shapes.items() if isinstance(size, int)}
    for key in sizes:
        if key not in known:
            need = f"one of {sorted(known)}" if known else "no option: nothing is free"
            raise CaptureError(message("shapes", key, "no such dimension", need, f"see '{name}'"))
    for key, dims in shapes.items():
        if not isinstance(dims, int):
            _bind_input(inputs.get(key), key, tuple(int(d) for d in dims), sizes, list(inputs))
    free = [entry for value in inputs.values() for entry in _apply(value, sizes)]
    if free:
        options = ", ".join(dict.fromkeys(f"{option}: ..." for option, _ in free))
        found = "free dimensions " + ", ".join(place for _, place in free)
        raise CaptureError(message("model", name, found, "fixed sizes", f"shapes={{{options}}}"))
    for key, value in inputs.items():
        n_bytes = static_bytes(value) or 0
        if n_bytes > _LARGEST_INPUT:
            found, need = f"{n_bytes / 2**30:.3g} GiB", f"at most {_LARGEST_INPUT >> 30} GiB"
            raise CaptureError(message("input", key, found, need, "bind smaller dimensions"))


def fill_from_run(model: ir.Model) -> None:
    """Set shapes that inference left open from one run; those that depend on data stay open."""
    unknown = [
        v
        for n in model.graph
        for v in n.outputs
        if v.name and isinstance(v.type, ir.TensorType | None)
        if static_shape(v) is None or v.dtype is None
    ]
    varying = _sizes_from_data(model.graph) if unknown else set()
    holes = [v for v in unknown if v not in varying]
    if not holes:
        return
    with tapped(model, holes):
        run = Session(model).run(feeds_for(model, 2)[1])
    for value in holes:
        array = run[str(value.name)]
        if hasattr(array, "dtype"):
            value.shape = ir.Shape(array.shape)
            value.dtype = value.dtype or ir.DataType.from_numpy(array.dtype)


def _dims(value: ir.Value) -> tuple[int | ir.SymbolicDim, ...]:
    return () if value.shape is None else tuple(value.shape.dims)


def _name(dim: int | ir.SymbolicDim) -> str | None:
    return None if isinstance(dim, int) else dim.value


def _forget_anonymous(value: ir.Value) -> None:
    """Several axes named `?` are not one dimension, and -1 means free."""
    if value.shape is None:
        return
    dims: list[int | str | None] = []
    for dim in _dims(value):
        name = _name(dim)
        if isinstance(dim, int):
            dims.append(dim if dim >= 0 else None)
        else:
            dims.append(name if name is not None and any(c.isalnum() for c in name) else None)
    value.shape = ir.Shape(dims)


def _bind_input(
    value: ir.Value | None,
    name: str,
    shape: tuple[int, ...],
    sizes: dict[str, int],
    inputs: list[str],
) -> None:
    if value is None:
        raise CaptureError(message("shapes", name, "no such input", inputs, "use an input's name"))
    dims = _dims(value) if value.shape is not None else shape
    if len(dims) != len(shape):
        found, need = f"{len(shape)} sizes", f"{len(dims)} sizes"
        raise CaptureError(message("shapes", name, found, need, "give one size for every axis"))
    for axis, (dim, size) in enumerate(zip(dims, shape)):
        label = _name(dim)
        fixed = sizes.setdefault(label, size) if label is not None else dim
        if size < 0 or (isinstance(fixed, int) and fixed != size):
            found, need = f"size {size} for axis {axis}", f"{fixed}"
            raise CaptureError(message("shapes", name, found, need, "give the size that fits"))
    value.shape = ir.Shape(shape)


def _apply(value: ir.Value, sizes: Mapping[str, int]) -> list[tuple[str, str]]:
    """Set the sizes; returns (option, place) for every dimension that stays free."""
    if value.shape is None:
        is_tensor = isinstance(value.type, ir.TensorType)
        return [(repr(value.name), f"{value.name} (any rank)")] if is_tensor else []
    free: list[tuple[str, str]] = []
    dims: list[int] = []
    for axis, dim in enumerate(_dims(value)):
        name = _name(dim)
        size = dim if isinstance(dim, int) else sizes.get(str(name))
        if size is None or size < 0:
            option = repr(name if name is not None else value.name)
            free.append((option, f"{name or '?'} (input {value.name} axis {axis})"))
        dims.append(-1 if size is None else size)
    if not free:
        value.shape = ir.Shape(dims)
    return free


def _sizes_from_data(graph: ir.Graph) -> set[ir.Value]:
    """Values whose shape may change with the data fed, found by following it forward.

    Shape of such a value is data again; Shape of any other value is a constant.
    """
    data: set[ir.Value] = set(graph.inputs)
    varying: set[ir.Value] = set()
    for node in graph:
        inputs = [v for v in (*node.inputs, *captured(node)) if v is not None]
        open_input = any(v in varying and static_shape(v) is None for v in inputs)
        reads_data = any(v in data for v in inputs)
        operands = [input_at(node, i) for i in _SHAPE_OPERANDS.get(node.op_type, ())]
        sized_by_data = any(v in data for v in operands if v is not None) or (
            reads_data and is_op(node, *_SIZE_FROM_DATA)
        )
        if open_input or sized_by_data:
            varying.update(node.outputs)
        if open_input or (reads_data and not is_op(node, "Shape", "Size")):
            data.update(node.outputs)
    return varying
