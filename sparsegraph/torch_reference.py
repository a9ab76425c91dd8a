"""What PyTorch itself computes: the judge of a captured module.

Exporters have defects that raise no error (torch 2.13 ignores that `scatter_reduce` may leave out
its own input), and every later proof would compare with the wrong model that they wrote.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch.export.graph_signature import TensorArgument
from torch.utils import _pytree as pytree

from sparsegraph.errors import CaptureError, SparsegraphError, VerifyError, brief, message
from sparsegraph.graph import is_op, static_shape
from sparsegraph.verify import (
    CHOICES,
    TOLERANCE,
    TOLERANCE_HALF,
    Feed,
    Session,
    compare,
    is_wide,
    tapped,
    tells,
)

_ROUGH = 0.1  # beside PyTorch's bfloat16: 8 significant bits, layer after layer


class TorchReference:
    """A module or program, to run on arrays by the names of the captured model's inputs.

    Attributes:
        has_bfloat16: values are rounded to 8 bits on the way; those of the captured model are not.
    """

    def __init__(self, source: Any, program: Any, example: Sequence[Any], decomposed: Any) -> None:
        """Nothing runs yet.

        Args:
            source: the module, or the program.
            program: the program, also of a module.
            example: the inputs by position, and those by name.
            decomposed: the program that became ONNX, whose values have the same names there.
        """
        self._source, self._decomposed = source, decomposed
        self._leaves, self._spec = pytree.tree_flatten(tuple(example))
        signature = program.graph_signature
        self._names = _names(signature.input_specs, "USER_INPUT")
        self._outputs = _names(signature.output_specs, "USER_OUTPUT")
        values = (node.meta.get("val") for node in program.graph.nodes)
        self.has_bfloat16 = any(getattr(v, "dtype", None) == torch.bfloat16 for v in values)

    def feed(self, shapes: Mapping[str, tuple[int, ...]]) -> Feed:
        """The example inputs; repeated or cut where a free dimension was bound to another size."""
        found = {name: _array(x) for name, x in zip(self._names, self._leaves) if name}
        return {name: np.resize(found[name], shape) for name, shape in shapes.items()}

    def run(self, feed: Feed) -> list[np.ndarray]:
        """The outputs in their order; inputs, buffers and modes stay as they are."""
        args, kwargs = pytree.tree_unflatten(self._tensors(feed), self._spec)
        is_module = isinstance(self._source, torch.nn.Module)
        module = self._source if is_module else self._source.module()
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        with torch.no_grad(), inference(module if is_module else torch.nn.Module()):
            result = torch.func.functional_call(module, buffers, args, kwargs)
        return [_array(x) for x, name in zip(pytree.tree_leaves(result), self._outputs) if name]

    def judge(self, model: ir.Model, name: str) -> None:
        """Compare the captured model of a module of this name, unless last bits or ties decide.

        A model that ONNX Runtime cannot run is refused later, by whoever needs it.

        Raises:
            CaptureError: the module does not run on its example inputs.
            VerifyError: outputs differ; names the first node that does.
        """
        shapes = {str(v.name): static_shape(v) or () for v in model.graph.inputs}
        names = [str(v.name) for v in model.graph.outputs]
        try:
            feed = self.feed(shapes)
            want = dict(zip(names, self.run(feed), strict=True))
        except Exception as error:  # of the module, for any reason
            need, fix = "a module that runs on its example inputs", "correct one or the other"
            raise CaptureError(message("module", name, brief(error), need, fix)) from error
        try:
            theirs = Session(model).run(feed)
        except SparsegraphError:
            return
        distance = compare(theirs, want)
        limit = _ROUGH if self.has_bfloat16 else TOLERANCE if is_wide(model) else TOLERANCE_HALF
        if distance <= limit or not tells(model, feed, theirs, limit):
            return
        first = self._first_difference(model, feed, limit)
        if first is not None and is_op(first, *CHOICES):
            return  # of equal values either is right
        found = f"outputs that differ by {distance:.1e} of the largest from PyTorch's"
        if first is None:
            found += ", as they do in the program that torch.export made"
            fix = "let the module compute the same when it is traced"
        else:
            found += f", first at node '{first.name}' ({first.op_type})"
            fix = "write that step in other operators, and report it to PyTorch's exporter"
        raise VerifyError(message("module", name, found, f"<= {limit:.0e}", fix))

    def _first_difference(self, model: ir.Model, feed: Feed, limit: float) -> ir.Node | None:
        """The first node one of whose outputs is not PyTorch's, if any inner value tells."""
        values = [v for node in model.graph for v in node.outputs if v.name]
        nodes = {str(v.name): v.producer() for v in values}
        with tapped(model, values):
            found = Session(model).run(feed)
        first = self._first(feed, lambda n, v: n in found and compare(found[n], v) > limit)
        return None if first is None else nodes[first]

    def _first(self, feed: Feed, is_wanted: Callable[[str, np.ndarray], bool]) -> str | None:
        """The name of the first inner value that is wanted, in the order of computation."""
        found: list[str] = []

        class Until(torch.fx.Interpreter):
            def run_node(self, node: Any) -> Any:
                value = super().run_node(node)
                if isinstance(value, torch.Tensor) and is_wanted(node.name, _array(value)):
                    found.append(node.name)
                    raise StopIteration
                return value

        with torch.no_grad():
            try:
                Until(self._decomposed.module()).run(*self._tensors(feed))
            except StopIteration:
                return found[0]
        return None

    def _tensors(self, feed: Feed) -> list[Any]:
        """The leaves of the inputs, tensors from `feed`."""
        pairs = zip(self._names, self._leaves)
        return [torch.tensor(feed[n]).to(x) if n and n in feed else x for n, x in pairs]


@contextmanager
def inference(module: torch.nn.Module) -> Iterator[None]:
    """The module in inference mode, with dense weights, within the block."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with dense([s for p, _ in modes for s in (p._parameters, p._buffers, vars(p))]):
            yield
    finally:
        for part, was_training in modes:
            part.training = was_training


@contextmanager
def dense(stores: Sequence[dict[str, Any]]) -> Iterator[None]:
    """Tensors of sparse layouts are dense within the block: exporters know no other."""
    held = [
        (store, name, tensor)
        for store in stores
        for name, tensor in store.items()
        if isinstance(tensor, torch.Tensor) and tensor.layout != torch.strided
    ]
    try:
        for store, name, tensor in held:
            full = tensor.detach().to_dense()
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            store[name] = torch.nn.Parameter(full, False) if is_parameter else full
        yield
    finally:
        for store, name, tensor in held:
            store[name] = tensor


def _names(specs: Sequence[Any], kind: str) -> list[str | None]:
    """Of what the caller gives or gets: the names of tensors, None of anything else."""
    of_caller = [spec.arg for spec in specs if spec.kind.name == kind]
    return [arg.name if isinstance(arg, TensorArgument) else None for arg in of_caller]


def _array(tensor: Any) -> np.ndarray:
    tensor = tensor.detach().cpu()
    array: np.ndarray = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array
