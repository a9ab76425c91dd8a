"""Several cuts of one model over one weight file: nested sub-networks, several masks on a backbone.

Every member is an ONNX file of its own, with its own input and output; large constants are parts of
the whole model's, which lie once in `weights.bin`. Leading rows are a stretch of that file; other
parts are a Slice or Gather on a constant, which runtimes and our compiler fold when they load it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from sparsegraph import output
from sparsegraph.capture import load
from sparsegraph.errors import UsageError, VerifyError, message
from sparsegraph.graph import all_names, remove_unused_initializers
from sparsegraph.rewrite import Builder
from sparsegraph.shrink import Keep, n_macs, n_parameters, prepare
from sparsegraph.structure.cut import View
from sparsegraph.structure.ties import Policy
from sparsegraph.verify import Feed, Session, compare, feeds_for

WEIGHTS = "weights.bin"
_ALIGN = 64
_SMALL = 4097
"""Bytes below which a constant lies in the member's own file: shape inference reads those."""


@dataclass(frozen=True)
class Member:
    """One sub-network. `error`: against the masked model, None where there is none."""

    name: str
    file: Path
    parameters: int
    macs: int
    error: float | None


def read_keeps(given: Sequence[str]) -> dict[str, float | dict[str, Keep]]:
    """What each member keeps, from texts `NAME=SHARE` and `NAME=MASK.json`.

    The file holds an object: a group's name, and the share or the indices of the units that stay;
    groups that it does not name stay whole. Raises UsageError for anything else.
    """
    keeps: dict[str, float | dict[str, Keep]] = {}
    for text in given:
        name, _, what = text.partition("=")
        if not name or not what or name in keeps:
            fix = "write --member half=0.5 --member task=mask.json, each name once"
            raise UsageError(message("--member", text, f"'{text}'", "NAME=SHARE or a mask", fix))
        try:
            keeps[name] = float(what)
        except ValueError:
            keeps[name] = _read_mask(text, Path(what))
    return keeps


def _read_mask(text: str, file: Path) -> dict[str, Keep]:
    """Shares or indices by group."""
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        found = getattr(error, "strerror", None) or f"no JSON: {error}"
        need, fix = (
            f"a share, or {file} to hold a mask",
            'write {"group": 0.5} or {"group": [0, 2]}',
        )
        raise UsageError(message("--member", text, found, need, fix)) from error
    if not isinstance(held, dict) or not all(_is_keep(one) for one in held.values()):
        need = '{"group": 0.5, "other": [0, 2]}'
        raise UsageError(message("--member", text, "another layout", need, f"change {file.name}"))
    return held


def _is_keep(value: object) -> bool:
    if isinstance(value, list):
        return all(type(one) is int for one in value)
    return type(value) in (int, float)


def family(
    model: ir.Model,
    keeps: Mapping[str, float | Mapping[str, Keep]],
    folder: Path,
    by: str = "prefix",
    *,
    calibration: Sequence[Feed] = (),
) -> tuple[Member, ...]:
    """Write one model per entry of `keeps` (as for `shrink`) into a folder, with shared weights.

    With `prefix` the first units stay, as in networks trained so that each width works; any other
    criterion nests as well, since all members rank units alike. Each file is read back and compared
    with the cut that was proved before any file of the folder is replaced. Raises UsageError,
    VerifyError.
    """
    if not keeps or any(not name or Path(name).name != name for name in keeps):
        found = list(keeps)
        raise UsageError(message("option", "nested", found, "names of files", "give 0.25,0.5"))
    job = prepare(model, Policy(), by, calibration)
    folder.parent.mkdir(parents=True, exist_ok=True)
    members: list[Member] = []

    def fill(partial: Path) -> None:
        places = _write_weights(job.base, partial)
        for name, keep in keeps.items():
            gone = job.marks(keep)
            smaller, views = job.cut(gone)
            shared = _share(smaller, job.base, views, places)
            onnx.save(ir.to_proto(shared), partial / f"{name}.onnx")
            _check(partial / f"{name}.onnx", smaller)
            sizes, proof = (n_parameters(smaller), n_macs(smaller)), job.proof(smaller, gone)
            error = None if proof is None else proof.error
            members.append(Member(name, folder / f"{name}.onnx", *sizes, error))

    output.write_folder(folder, fill)
    return tuple(members)


def _write_weights(base: ir.Model, folder: Path) -> dict[str, ir.ExternalTensor]:
    """All large constants, one behind the other, each on a boundary of 64 bytes."""
    places: dict[str, ir.ExternalTensor] = {}
    with (folder / WEIGHTS).open("wb") as file:
        for name, value in base.graph.initializers.items():
            tensor = value.const_value
            if tensor is None or tensor.nbytes < _SMALL:
                continue
            file.write(bytes(-file.tell() % _ALIGN))
            places[name] = _stretch(folder, file.tell(), tensor)
            file.write(tensor.tobytes())
    return places


def _stretch(folder: Path, offset: int, tensor: ir.TensorProtocol) -> ir.ExternalTensor:
    """A tensor of this size and type that starts at an offset in the shared file."""
    shape = ir.Shape(tensor.numpy().shape)
    return ir.ExternalTensor(
        WEIGHTS, offset, tensor.nbytes, tensor.dtype,
        shape=shape, name=str(tensor.name), base_dir=str(folder),
    )  # fmt: skip


def _share(
    smaller: ir.Model,
    base: ir.Model,
    views: Mapping[str, View],
    places: Mapping[str, ir.ExternalTensor],
) -> ir.Model:
    """A copy of the member whose large constants are parts of the shared ones."""
    model = smaller.clone()
    graph = model.graph
    build = Builder(graph, all_names(graph), "shared")
    wholes: dict[str, ir.Value] = {}
    for name, value in list(graph.initializers.items()):
        view, tensor = views.get(name), value.const_value
        if tensor is None:
            continue
        if view is None:
            whole = base.graph.initializers.get(name)
            if name in places and whole is not None and _equal(whole.const_value, tensor):
                value.const_value = places[name]
        elif view.whole in places and tensor.nbytes >= _SMALL:
            place = places[view.whole]
            if _is_prefix(view.keeps[0]) and all(keep.all() for keep in view.keeps[1:]):
                folder, at = Path(place.base_dir), place.offset or 0
                value.const_value = _stretch(folder, at, tensor)
                continue
            if view.whole not in wholes:
                wholes[view.whole] = _whole(build, view.whole, place)
                graph.register_initializer(wholes[view.whole])
            value.replace_all_uses_with(_part(build, wholes[view.whole], view))
    for constant in build.constants:
        graph.register_initializer(constant)
    graph.insert_before(graph[0], build.nodes)
    remove_unused_initializers(graph)
    return model


def _equal(a: ir.TensorProtocol | None, b: ir.TensorProtocol) -> bool:
    return a is not None and a.shape == b.shape and a.tobytes() == b.tobytes()


def _is_prefix(keep: np.ndarray) -> bool:
    return bool(keep[: int(keep.sum())].all())


def _whole(build: Builder, name: str, place: ir.ExternalTensor) -> ir.Value:
    value = ir.Value(name=build.unique(f"{name}_whole"), const_value=place)
    value.shape, value.type = ir.Shape(place.shape), ir.TensorType(place.dtype)
    return value


def _part(build: Builder, whole: ir.Value, view: View) -> ir.Value:
    """One Slice for all axes that keep a prefix, one Gather for each other axis."""
    cut = [axis for axis, keep in enumerate(view.keeps) if not keep.all()]
    slices = [axis for axis in cut if _is_prefix(view.keeps[axis])]
    shape = [keep.size for keep in view.keeps]
    value = whole
    if slices:
        ends = [int(view.keeps[axis].sum()) for axis in slices]
        for axis, end in zip(slices, ends, strict=True):
            shape[axis] = end
        bounds = [np.zeros(len(slices), np.int64), np.array(ends), np.array(slices)]
        inputs = [build.constant(bound, f"{whole.name}_bound") for bound in bounds]
        value = build.op("Slice", [value, *inputs], like=whole, shape=shape)
    for axis in cut:
        if axis not in slices:
            kept = np.flatnonzero(view.keeps[axis])
            shape[axis] = len(kept)
            indices = build.constant(kept, f"{whole.name}_kept")
            value = build.op("Gather", [value, indices], {"axis": axis}, like=whole, shape=shape)
    return value


def _check(file: Path, smaller: ir.Model) -> None:
    """The file as written computes what the cut model does, to the last bit but for sums."""
    feed = feeds_for(smaller, 2)[1]
    error = compare(Session(load(file)).run(feed), Session(smaller).run(feed))
    if error > 1e-6:
        raise VerifyError(message("member", file.name, f"off by {error:.1e}", "1e-6", "report it"))
