"""PyTorch's exporter, and ways around what it cannot do.

Its own optimiser stays off: it deletes `+ 1e-8` and folds masks of small weights only.
"""

import io
import logging
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr
from typing import Any

import onnx_ir as ir
import torch
from torch.export.graph_signature import TensorArgument
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from sparsegraph.decompositions import decomposed
from sparsegraph.graph import all_names
from sparsegraph.torch_reference import TorchReference, dense, inference

_ATEN = torch.ops.aten
_ATTENTION = _ATEN.scaled_dot_product_attention.default
_CONV3D = _ATEN.conv3d.default
_OPERANDS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")  # in their order
_DENSE = {
    _ATEN._sparse_mm.default: _ATEN.mm.default,
    _ATEN._sparse_addmm.default: _ATEN.addmm.default,
}
Inputs = Sequence[Any] | Mapping[str, Any]


def export(module: Any, example_inputs: Inputs, opset: int) -> tuple[ir.Model, TorchReference]:
    """A `torch.nn.Module`, in inference mode, or an `ExportedProgram` in ONNX's operators.

    Beside the model what PyTorch computes, to compare it with.

    Example inputs are by position or by name; a tensor alone is the only one. Outputs of a
    dictionary are called as its keys. Module and program are afterwards as they were. Raises what
    the exporter raises.
    """
    with ExitStack() as held:
        held.enter_context(_quiet())
        # other backends' results have strides that are lost on the way, and views of them fail
        held.enter_context(sdpa_kernel(SDPBackend.MATH))
        program, example = module, _example(example_inputs)
        if isinstance(module, torch.nn.Module):
            with inference(module):
                program = torch.export.export(module, *example)
        held.enter_context(dense([program.state_dict, program.constants]))
        if program is module and program.example_inputs is not None:
            example = program.example_inputs
        plain = decomposed(program)
        held.enter_context(_adapted(plain))
        exported = torch.onnx.export(
            plain, dynamo=True, optimize=False, opset_version=opset, verbose=False
        )
    assert exported is not None
    model = exported.model.clone()
    _name_outputs(model.graph, _output_names(program))
    return model, TorchReference(module, program, example, exported.exported_program)


def _output_names(program: Any) -> list[str] | None:
    """The keys, where a module returns a dictionary; in it, `key_0` and so on of a list."""
    spec = program.call_spec.out_spec
    tree = pytree.tree_unflatten(range(spec.num_leaves), spec)
    paths = [path for path, _ in pytree.tree_flatten_with_path(tree)[0]]
    if not all(path and isinstance(path[0], pytree.MappingKey) for path in paths):
        return None
    outputs = [o.arg for o in program.graph_signature.output_specs if o.kind.name == "USER_OUTPUT"]
    return [
        "_".join(re.findall(r"\w+", pytree.keystr(path)))
        for path, output in zip(paths, outputs, strict=True)
        if isinstance(output, TensorArgument)  # None is no output in ONNX
    ]


def _name_outputs(graph: ir.Graph, names: Sequence[str] | None) -> None:
    """Give the outputs these names, and a node of its own to one that is something else as well."""
    taken, seen = all_names(graph), set(graph.inputs) | set(graph.initializers.values())
    for at, value in enumerate(graph.outputs):
        if value in seen:
            node = ir.node("Identity", [value])
            graph.append(node)
            graph.outputs[at] = node.outputs[0]
            node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
        elif names is None:
            seen.add(value)
            continue
        seen.add(graph.outputs[at])
        wanted = str(value.name) if names is None else names[at]
        name, n = wanted, 1
        while name in taken:
            name, n = f"{wanted}_{n}", n + 1
        graph.outputs[at].name = name
        taken.add(name)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notes off the terminal.

    torchvision missing, its own deprecations, and, where it fails, the whole graph.
    """
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def _example(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs by position, and by name."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs,) if isinstance(inputs, torch.Tensor) else tuple(inputs), {}


@contextmanager
def _adapted(program: Any) -> Iterator[None]:
    """What the exporter refuses in operators that it takes, for the duration of the block.

    Products of sparse matrices are those of dense ones; convolutions of three axes are written as
    those of any number, since without a bias they get one of a wrong shape; attention has four
    dimensions and as many heads of keys as of queries, where PyTorch takes any number of the former
    and broadcasts.
    """
    graph, before = program.graph, set(program.graph.nodes)
    concerned = [n for n in graph.nodes if n.target in (_ATTENTION, _CONV3D, *_DENSE)]
    given = [(node, node.target, node.args, node.kwargs) for node in concerned]
    try:
        for node in concerned:
            if node.target in _DENSE:
                node.target = _DENSE[node.target]
            elif node.target == _CONV3D:
                _adapt_convolution(node)
            elif not node.kwargs.get("enable_gqa"):
                _adapt_attention(graph, node)
        yield
    finally:
        for node, target, args, kwargs in given:
            node.target, node.args, node.kwargs = target, args, kwargs
        for node in [n for n in reversed(graph.nodes) if n not in before]:
            graph.erase_node(node)


def _adapt_convolution(node: Any) -> None:
    schema = _CONV3D._schema.arguments
    given = dict(zip([a.name for a in schema], node.args)) | node.kwargs
    x, weight, bias, stride, padding, dilation, groups = (
        given.get(a.name, a.default_value) for a in schema
    )
    node.target = _ATEN.convolution.default
    node.args = (x, weight, bias, stride, padding, dilation, False, [0, 0, 0], groups)
    node.kwargs = {}


def _adapt_attention(graph: Any, node: Any) -> None:
    """The node becomes the reshape of an attention of its reshaped operands, where they need it."""
    given = dict(zip(_OPERANDS, node.args)) | node.kwargs
    shape = node.meta["val"].shape
    heads = shape[:-2]
    pair = (math.prod(heads[:-1]), math.prod(heads[-1:]))

    def call(target: Any, x: Any, wanted: Sequence[Any]) -> Any:
        value = x.meta["val"]
        if value.shape == torch.Size(wanted):
            return x
        made = graph.call_function(target, (x, list(wanted)))
        made.meta = {**x.meta, "val": target(value, list(wanted))}
        return made

    with graph.inserting_before(node):
        for name in _OPERANDS[: 3 if len(heads) == 2 else 4]:
            if (x := given.get(name)) is not None:
                rest = x.meta["val"].shape[-2:]
                x = call(_ATEN.expand.default, x, [*heads, *rest])
                given[name] = call(_ATEN.reshape.default, x, [*pair, *rest])
        if len(heads) == 2:
            node.args, node.kwargs = (), given
            return
        plain = graph.call_function(_ATTENTION, (), given)
    plain.meta = {**node.meta, "val": node.meta["val"].reshape(*pair, *shape[-2:])}
    node.target, node.args, node.kwargs = _ATEN.reshape.default, (plain, list(shape)), {}
