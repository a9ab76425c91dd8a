"""Bring a model in: ONNX file, bytes, proto or PyTorch module -> one plain static ONNX graph.

After `load` or `capture`: functions inlined, constants are initializers, sparse initializers dense,
bfloat16 is float32, TopK is sorted, every dimension a number, opset 23 where the converter gets
there with the same outputs, and a shape and dtype on every value but those whose shape depends on
run-time data. Nothing is folded yet.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from sparsegraph import isolate
from sparsegraph.errors import CaptureError, SparsegraphError, brief, message
from sparsegraph.graph import all_names, all_values, is_op, opset, static_shape
from sparsegraph.onnx_file import (
    check_external_data,
    densify,
    map_external_tensors,
    read_proto,
    without_large_weights,
)
from sparsegraph.passes.expand_contrib import ExpandContrib
from sparsegraph.passes.spread_masks import SpreadMasks
from sparsegraph.passes.widen_half import WidenHalf
from sparsegraph.rewrite import Fuel
from sparsegraph.shapes import Shapes, bind, fill_from_run
from sparsegraph.verify import Session, compare, feeds_for, tolerance

Source = str | Path | bytes | onnx.ModelProto | ir.Model

OPSET = 23  # the first with Attention; also has Gelu (20) and LayerNormalization (17)
OLDEST_OPSET = 7
MIN_IR_VERSION = 10  # ONNX Runtime accepts opset 23 from here on
MAX_IR_VERSION = 11  # ONNX Runtime lags behind onnx; later ones only add types we do not take
_KNOWN_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})
_HINTS = {  # a word of the exporter's reason -> what helps
    "DynamicCache": "set module.config.use_cache = False",
    "grouped_mm": "build the module with experts_implementation='batched_mm' in its configuration",
    "data-dependent": "choose with torch.where, not with a branch or a size that depends on data",
}
_PRIVATE_METADATA = ("pkg.torch.onnx.stack_trace", "pkg.torch.onnx.fx_node", "pkg.torch.export")


def load(source: Source, shapes: Shapes | None = None) -> ir.Model:
    """An ONNX model as a static graph; the source is not changed.

    `shapes` binds free dimensions: by dimension name to a size, or by input name to a full shape.
    Raises CaptureError for an unreadable, unsafe or invalid model and for unbound dimensions.
    """
    name = str(source) if isinstance(source, str | Path) else "model"
    if isinstance(source, ir.Model):
        return _normalize(source.clone(), name, shapes or {})
    proto, folder = read_proto(source, name)
    _check_opset(proto, name)
    check_external_data(proto, folder, name)
    try:
        model = ir.from_proto(densify(proto))
        if folder is not None:
            ir.external_data.set_base_dir(model.graph, folder)
        return _normalize(model, name, shapes or {})
    except SparsegraphError:
        raise
    except Exception as error:
        raise CaptureError(
            message("model", name, brief(error), "a valid ONNX model", "export it again")
        ) from error


def capture(
    module: Any,
    example_inputs: Sequence[Any] | Mapping[str, Any],
    shapes: Shapes | None = None,
    *,
    check: bool = True,
) -> ir.Model:
    """A `torch.nn.Module` or `ExportedProgram` as a static graph, in inference mode.

    Example inputs are by position, or by name as tokenizers return them; their shapes are those of
    the model. Weights of sparse layouts (CSR, BSR, COO ...) become dense, zeros and all. With
    `check` the graph is compared with PyTorch on the example inputs.

    Raises CaptureError with the exporter's reason, VerifyError if PyTorch's outputs are others.
    """
    try:
        from sparsegraph import exporter
    except ImportError as error:
        raise CaptureError(
            message(
                "capture", "torch", "not installed", "torch 2.6", "pip install sparsegraph[torch]"
            )
        ) from error
    name = type(module).__name__
    try:
        model, reference = exporter.export(module, example_inputs, OPSET)
    except Exception as error:
        found = brief(error)
        fix = next((hint for word, hint in _HINTS.items() if word in found), "see torch.export")
        raise CaptureError(message("module", name, found, "an exportable module", fix)) from error
    model = _normalize(model, name, shapes or {}, has_true_shapes=True)
    if check:
        reference.judge(model, name)
    return model


def _check_opset(proto: onnx.ModelProto, name: str) -> None:
    newest = onnx.defs.onnx_opset_version()
    for entry in proto.opset_import:
        if entry.domain in ("", "ai.onnx") and not OLDEST_OPSET <= entry.version <= newest:
            found, need = f"opset {entry.version}", f"{OLDEST_OPSET} to {newest}"
            raise CaptureError(message("model", name, found, need, "export with opset 23"))


def _normalize(
    model: ir.Model, name: str, shapes: Shapes, has_true_shapes: bool = False
) -> ir.Model:
    for step in (
        common.InlinePass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.RemoveInitializersFromInputsPass(),
        common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        common.NameFixPass(),
    ):
        model = step(model).model
    map_external_tensors(model)
    _strip_private_metadata(model)
    _check_domains(model, name)
    _name_outputs(model, name)
    _widen_bfloat16(model, name)
    _sort(model)
    bind(model, name, shapes)
    _expand(model, name)
    _infer(model, name, has_true_shapes)
    SpreadMasks().run(model, Fuel())
    model.ir_version = min(max(model.ir_version, MIN_IR_VERSION), MAX_IR_VERSION)
    model = _raise_opset(model)
    common.NameFixPass()(model)  # names that the converter made
    fill_from_run(model)
    return model


def _strip_private_metadata(model: ir.Model) -> None:
    """Drop what holds source paths of the exporting machine."""
    for node in model.graph.all_nodes():
        for key in [k for k in node.metadata_props if k.startswith(_PRIVATE_METADATA)]:
            del node.metadata_props[key]
    for value in all_values(model.graph):
        for key in [k for k in value.metadata_props if k.startswith("pkg.torch")]:
            del value.metadata_props[key]


def _check_domains(model: ir.Model, name: str) -> None:
    for node in model.graph.all_nodes():
        if node.domain not in _KNOWN_DOMAINS:
            found = f"op {node.domain}::{node.op_type} without a function body"
            what = f"model '{name}' node"
            fix = "export the op as an ONNX function or replace it"
            raise CaptureError(message(what, str(node.name), found, "a known op", fix))


def _name_outputs(model: ir.Model, name: str) -> None:
    """Check that there are outputs, each of its own name; a constant one gets a node.

    Raises CaptureError.
    """
    outputs = model.graph.outputs
    names = [str(value.name) for value in outputs]
    twice = [n for n in names if names.count(n) > 1]
    if not names or twice:
        found = f"output '{twice[0]}' twice" if twice else "no outputs"
        fix = "name every output once" if twice else "export what the model is to compute"
        raise CaptureError(message("model", name, found, "outputs of different names", fix))
    for at, value in enumerate(outputs):
        if not value.is_initializer():
            continue
        del model.graph.initializers[names[at]]
        value.name = f"{names[at]}_constant"
        while value.name in all_names(model.graph):
            value.name += "_"
        model.graph.register_initializer(value)
        node = ir.node("Identity", [value], name=f"{names[at]}_identity")
        node.outputs[0].name, node.outputs[0].type = names[at], value.type
        node.outputs[0].shape = value.shape
        model.graph.append(node)
        outputs[at] = node.outputs[0]


def _sort(model: ir.Model) -> None:
    """Where any order of the best values is right, the one that every runtime can repeat."""
    for node in model.graph.all_nodes():
        if is_op(node, "TopK"):
            node.attributes.pop("sorted", None)


def _widen_bfloat16(model: ir.Model, name: str) -> None:
    """float32 everywhere, also of inputs and outputs: ONNX Runtime and NumPy have no bfloat16."""
    outcome = WidenHalf(ir.DataType.BFLOAT16, borders=False).run(model, Fuel())
    if outcome.declined:
        place = outcome.declined[0]
        found, fix = f"bfloat16, and {place.reason}", "export it in float32"
        raise CaptureError(message(f"model '{name}' node", place.node, found, "float32", fix))


def _expand(model: ir.Model, name: str) -> None:
    """Spell out ONNX Runtime's own norms and activations; proved against what stood there."""
    before = model.clone()
    if not ExpandContrib().run(model, Fuel()).n_applied:
        return
    reason = _difference(model, before)
    if reason:
        fix = "report it, and export without ONNX Runtime's optimiser"
        raise CaptureError(message("model", name, reason, "the outputs of its own nodes", fix))


def _infer(model: ir.Model, name: str, has_true_shapes: bool) -> None:
    """Check the model and set shape and dtype of every value that inference can tell.

    Shapes in a file are claims, and dropped; those of a module exported here stand where inference
    knows none.
    """
    values = [value for node in model.graph for value in node.outputs]
    given = [(v, v.shape) for v in values if has_true_shapes and static_shape(v) is not None]
    for value in values:
        if isinstance(value.type, ir.TensorType | None):
            value.shape = None
    proto, _ = without_large_weights(model)
    try:
        inferred = isolate.run("check,infer", proto.SerializeToString())
    except isolate.ChildError as error:
        raise CaptureError(
            message("model", name, error, "a valid ONNX model", "correct or export it again")
        ) from error
    _copy_shapes(onnx.load_model_from_string(inferred), model)
    for value, shape in given:
        if value.shape is None:
            value.shape = shape


def _copy_shapes(proto: onnx.ModelProto, model: ir.Model) -> None:
    known = {v.name: v for v in (*proto.graph.value_info, *proto.graph.output)}
    for node in model.graph:
        for value in node.outputs:
            if value.name in known:
                read = ir.serde.deserialize_value_info_proto(known[value.name], None)
                value.type = read.type or value.type
                value.shape = read.shape if static_shape(read) is not None else None


def _raise_opset(model: ir.Model) -> ir.Model:
    """The model at opset 23 when the converter yields the same outputs, else as it is."""
    if opset(model) >= OPSET or opset(model) == 0:
        return model
    proto, held = without_large_weights(model)
    try:
        step = f"convert:{OPSET},infer"
        converted = onnx.load_model_from_string(isolate.run(step, proto.SerializeToString()))
        raised = ir.from_proto(converted)
        _reattach(raised, model, held)
        _copy_shapes(converted, raised)
        raised.ir_version = model.ir_version
        reason = _difference(raised, model)
    except Exception as error:  # any failure of the converter has one consequence: not raised
        reason = brief(error)
    if reason:
        model.graph.metadata_props["sparsegraph.opset_kept"] = reason
        return model
    return raised


def _reattach(raised: ir.Model, model: ir.Model, held: Mapping[str, ir.TensorProtocol]) -> None:
    """Put the weights back, and the names and metadata that the converter loses."""
    graph = raised.graph
    for value in [v for v in graph.inputs if v.name in held]:
        graph.inputs.remove(value)
        value.const_value = held[str(value.name)]
        graph.register_initializer(value)
    raised.metadata_props.update(model.metadata_props)
    graph.metadata_props.update(model.graph.metadata_props)
    for name, value in graph.initializers.items():
        if name in model.graph.initializers:
            value.metadata_props.update(model.graph.initializers[name].metadata_props)
    taken = {n.name for n in model.graph}
    old = {v.name: (n, v) for n in model.graph for v in n.outputs}
    for node in graph:
        if node.name in taken:
            node.name = None  # the converter gives all parts of one op the same name
        for value in node.outputs:
            if value.name not in old:
                continue
            before, old_value = old[value.name]
            node.name = before.name
            node.metadata_props.update(before.metadata_props)
            value.metadata_props.update(old_value.metadata_props)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(raised)


def _difference(raised: ir.Model, model: ir.Model) -> str:
    new, old = Session(raised), Session(model)
    for feed in feeds_for(model, 2):
        want = old.run(feed)
        error = compare(new.run(feed), want)
        if error > tolerance(want):
            return f"outputs of the converted model differ by {error:.1e}"
    return ""
