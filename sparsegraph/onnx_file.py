"""Read an ONNX file from a stranger: parse, external data inside its folder only, dense tensors."""

import math
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx import numpy_helper

from sparsegraph.errors import CaptureError, message

_DETACH_BYTES = 1024
_LARGEST_DENSE = 16 << 30
_EXPORT_AGAIN = "export the model again"


def read_proto(
    source: str | Path | bytes | onnx.ModelProto, name: str
) -> tuple[onnx.ModelProto, Path | None]:
    """The parsed model and the folder of its external data (None for bytes and protos).

    A proto that the caller passes is copied. Raises CaptureError when it is no ONNX model.
    """
    folder = None
    if isinstance(source, onnx.ModelProto):
        proto = onnx.ModelProto()
        proto.CopyFrom(source)
    else:
        if isinstance(source, str | Path):
            folder = Path(source).resolve().parent
            source = _read_file(Path(source))
        proto = _parse(source, name)
    if not proto.graph.node and not proto.graph.output:
        _refuse(name, "no graph", "an ONNX model", "check that the file is complete")
    if not proto.opset_import:
        _refuse(name, "no opset import", "an ONNX model", _EXPORT_AGAIN)
    return proto, folder


def check_external_data(proto: onnx.ModelProto, folder: Path | None, name: str) -> None:
    """Refuse external tensors that leave the folder or do not have the declared bytes."""
    for tensor in tensors(proto):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            _check_inline(tensor, name)
            continue
        if folder is None:
            fix = "pass the path of the file, or embed the data"
            _refuse(name, f"external data of {tensor.name!r}", "data in the model", fix)
        _check_location(tensor, folder, name)


def densify(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Replace sparse initializers and sparse Constant nodes by dense ones, in place."""
    for graph in _graphs(proto.graph):
        for sparse in graph.sparse_initializer:
            graph.initializer.append(_dense(sparse))
        del graph.sparse_initializer[:]
        _densify_nodes(graph.node)
    for function in proto.functions:
        _densify_nodes(function.node)
    return proto


def map_external_tensors(model: ir.Model) -> None:
    """Let tensors beside the model be arrays over the mapped file: nothing is read yet.

    PyTorch's exporter writes all of them there. A reference to the file would not survive: onnx's
    checker, ONNX Runtime and every model that is written get the graph without its folder.
    """
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=value.name)


def without_large_weights(
    model: ir.Model,
) -> tuple[onnx.ModelProto, dict[str, ir.TensorProtocol]]:
    """A proto in which large initializers are typed graph inputs, and their tensors by name."""
    held: dict[str, ir.TensorProtocol] = {}
    initializers = model.graph.initializers
    for key, value in initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.nbytes > _DETACH_BYTES:
            held[key] = tensor
    try:
        for key, tensor in held.items():
            initializers[key].const_value = ir.ExternalTensor(
                "detached", 0, 0, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=key
            )
        proto = ir.to_proto(model)
    finally:
        for key, tensor in held.items():
            initializers[key].const_value = tensor
    kept = [t for t in proto.graph.initializer if t.name not in held]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    for key, tensor in held.items():
        proto.graph.input.append(
            onnx.helper.make_tensor_value_info(key, tensor.dtype.value, tensor.shape.numpy())
        )
    shown = [v for v in proto.graph.value_info if v.name not in initializers]
    del proto.graph.value_info[:]  # of initializers it is stale as soon as one changes shape
    proto.graph.value_info.extend(shown)
    return proto, held


def tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor in graphs, subgraphs, functions and attributes, also inside sparse ones."""
    for graph in _graphs(proto.graph):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
        yield from _node_tensors(graph.node)
    for function in proto.functions:
        for graph in _subgraphs(function.node):
            yield from graph.initializer
            yield from _node_tensors(graph.node)
        yield from _node_tensors(function.node)


def _node_tensors(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attr in node.attribute:
            if attr.HasField("t"):
                yield attr.t
            if attr.HasField("sparse_tensor"):
                yield from (attr.sparse_tensor.values, attr.sparse_tensor.indices)
            yield from attr.tensors


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    yield from _subgraphs(graph.node)


def _subgraphs(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.GraphProto]:
    for node in nodes:
        for attr in node.attribute:
            if attr.HasField("g"):
                yield from _graphs(attr.g)
            for inner in attr.graphs:
                yield from _graphs(inner)


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise CaptureError(
            message("file", str(path), reason, "a readable file", "check the path")
        ) from error


def _parse(data: bytes, name: str) -> onnx.ModelProto:
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError:
        fix = "check that the file is complete"
        _refuse(name, f"{len(data)} bytes that do not parse", "an ONNX model", fix)
    return proto


def _check_inline(tensor: onnx.TensorProto, name: str) -> None:
    need = _n_bytes(tensor)
    if tensor.HasField("raw_data") and need is not None and len(tensor.raw_data) != need:
        found = f"{len(tensor.raw_data)} bytes in tensor {tensor.name!r}"
        _refuse(name, found, f"{need} bytes", _EXPORT_AGAIN)


def _check_location(tensor: onnx.TensorProto, folder: Path, name: str) -> None:
    entries = {e.key: e.value for e in tensor.external_data}
    location = entries.get("location", "")
    what = f"external data {location!r} of {tensor.name!r}"
    relative = Path(location)
    if not location or relative.is_absolute() or ".." in relative.parts or "\\" in location:
        _refuse(name, what, "a relative path inside the model's folder", "move the file there")
    path = folder
    for part in relative.parts:
        path = path / part
        if path.is_symlink():
            _refuse(name, what + " behind a symbolic link", "a plain file", "copy the file")
    size = _file_size(path, what, name)
    offset = _natural(entries.get("offset", "0"), what, name)
    length = _natural(entries.get("length", str(size - offset)), what, name)
    need = _n_bytes(tensor)
    if need is not None and length != need:
        _refuse(name, f"{what} with {length} bytes", f"{need} bytes", _EXPORT_AGAIN)
    if offset + length > size:
        found = f"{what}: bytes {offset} to {offset + length} of {size}"
        _refuse(name, found, "bytes that exist", "copy the data file again")


def _file_size(path: Path, what: str, name: str) -> int:
    try:
        status = os.stat(path)
    except OSError:
        _refuse(name, what + " missing", "the data file", "put it beside the model")
    if not stat.S_ISREG(status.st_mode):
        _refuse(name, what + " of another kind", "a plain file", "copy the file")
    if status.st_nlink > 1:
        _refuse(name, what + " with several hard links", "a plain file", "copy the file")
    return status.st_size


def _natural(text: str, what: str, name: str) -> int:
    if not text.isascii() or not text.isdigit():
        _refuse(name, f"{what} with offset or length {text!r}", "a natural number", _EXPORT_AGAIN)
    return int(text)


def _n_bytes(tensor: onnx.TensorProto) -> int | None:
    """Bytes of the declared shape and dtype; None for strings and undefined types."""
    try:
        dtype = ir.DataType(tensor.data_type)
    except ValueError:
        return None
    if dtype in (ir.DataType.STRING, ir.DataType.UNDEFINED):
        return None
    count = 1
    for dim in tensor.dims:
        count *= dim
    return -(-count * dtype.bitwidth // 8)


def _densify_nodes(nodes: Iterable[onnx.NodeProto]) -> None:
    for node in nodes:
        for attr in node.attribute:
            if attr.name == "sparse_value" and attr.HasField("sparse_tensor"):
                dense = _dense(attr.sparse_tensor)
                node.attribute.remove(attr)
                node.attribute.append(onnx.helper.make_attribute("value", dense))
                break


def _dense(sparse: onnx.SparseTensorProto) -> onnx.TensorProto:
    name = sparse.values.name
    shape = tuple(sparse.dims)
    values = numpy_helper.to_array(sparse.values)
    if min(shape, default=0) < 0 or math.prod(shape) * values.itemsize > _LARGEST_DENSE:
        _refuse(name, f"a sparse tensor of shape {shape}", "at most 16 GiB dense", _EXPORT_AGAIN)
    indices = numpy_helper.to_array(sparse.indices)
    full = np.zeros(shape, values.dtype)
    if indices.ndim == 2:
        indices = np.ravel_multi_index(tuple(indices.T), shape)
    if indices.size and not 0 <= int(indices.min()) <= int(indices.max()) < full.size:
        _refuse(name, "sparse indices out of range", f"below {full.size}", _EXPORT_AGAIN)
    full.reshape(-1)[indices] = values
    return numpy_helper.from_array(full, name)


def _refuse(name: str, found: str, need: str, fix: str) -> NoReturn:
    raise CaptureError(message("model", name, found, need, fix))
