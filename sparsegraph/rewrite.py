"""What a pass is, and the runner that applies local rewrites.

A rewriting pass is a frozen dataclass with two methods: `match(node, graph)` returns bindings (any
object), None, or a `Decline`; `rewrite(bindings, build)` returns the values that replace the
outputs of the matched node. The runner does the rest: it inserts the new nodes before the matched
one, keeps the names of graph inputs and outputs, lets the replacement take over the old value's
name, records provenance, removes what became unused and repeats until nothing applies.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeAlias

import numpy as np
import onnx_ir as ir

from sparsegraph.errors import PassError, message
from sparsegraph.graph import (
    all_names,
    is_used,
    remove_dead,
    remove_unused_initializers,
    static_shape,
)

Attribute: TypeAlias = int | float | str | Sequence[int] | Sequence[float]

_REWRITES_PER_NODE = 8  # a pass that needs more is feeding on its own output
FROM = "sparsegraph.from"
PASS = "sparsegraph.pass"


@dataclass(frozen=True)
class Decline:
    """A place that a pass left as it is, with the reason; `node` is its name."""

    node: str
    reason: str


@dataclass(frozen=True)
class Outcome:
    """What one run of a pass did: rewrites (or removals) counted, and places declined."""

    n_applied: int
    declined: tuple[Decline, ...] = ()


@dataclass
class Fuel:
    """The number of rewrites still allowed; None is unlimited. Bisects a wrong answer."""

    left: int | None = None

    def take(self) -> bool:
        """Use one unit; False when there is none."""
        if self.left is None:
            return True
        self.left -= 1
        return self.left >= 0


class Pass(Protocol):
    """Anything with a name that changes a model in place. `exact` passes must not move outputs."""

    name: ClassVar[str]
    exact: ClassVar[bool]

    def run(self, model: ir.Model, fuel: Fuel) -> Outcome:
        """Apply to the model."""
        ...


@dataclass
class Builder:
    """Makes the nodes and constants of one replacement."""

    graph: ir.Graph
    names: set[str]
    hint: str
    nodes: list[ir.Node] = field(default_factory=list)
    constants: list[ir.Value] = field(default_factory=list)

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Attribute] | None = None,
        *,
        like: ir.Value | None = None,
        shape: Sequence[int] | None = None,
    ) -> ir.Value:
        """One node with one output. `like` gives dtype and shape; `shape` overrides the latter."""
        node = ir.node(op_type, list(inputs), attributes=dict(attributes or {}))
        node.name = self.unique(f"{self.hint}/{op_type}")
        out = node.outputs[0]
        out.name = self.unique(f"{self.hint}_{op_type.lower()}")
        if like is not None:
            out.type = like.type
            out.shape = like.shape
        if shape is not None:
            out.shape = ir.Shape(shape)
        self.nodes.append(node)
        return out

    def constant(self, array: np.ndarray, name: str, *sources: ir.Value | None) -> ir.Value:
        """An initializer; `sources` are the values that it was computed from."""
        value = ir.Value(name=self.unique(name))
        value.const_value = ir.tensor(np.asarray(array, order="C"), name=value.name)
        value.shape = ir.Shape(array.shape)
        value.type = ir.TensorType(value.const_value.dtype)
        origins = [o for s in sources if s is not None for o in origin(s)]
        if origins:
            value.metadata_props[FROM] = ",".join(dict.fromkeys(origins))
        self.constants.append(value)
        return value

    def expanded(self, value: ir.Value, shape: tuple[int, ...]) -> ir.Value:
        """An Expand of the value to `shape`; the value itself if it has that shape."""
        if static_shape(value) == shape:
            return value
        size = self.constant(np.array(shape, np.int64), f"{self.hint}_shape")
        return self.op("Expand", [value, size], like=value, shape=shape)

    def reshaped(self, value: ir.Value, shape: Sequence[int]) -> ir.Value:
        """A Reshape of the value to `shape`."""
        sizes = self.constant(np.array(shape, np.int64), f"{self.hint}_sizes")
        return self.op("Reshape", [value, sizes], like=value, shape=shape)

    def unique(self, name: str) -> str:
        """The name, or the name with a number when it is taken."""
        candidate, n = name, 1
        while candidate in self.names:
            n += 1
            candidate = f"{name}_{n}"
        self.names.add(candidate)
        return candidate


@dataclass(frozen=True)
class Rule:
    """How a pass treats one operator: why it declines a node, if so, and what else computes it."""

    obstacle: Callable[[ir.Node, ir.Graph], str | None]
    expand: Callable[[ir.Node, Builder], ir.Value]


def origin(value: ir.Value) -> list[str]:
    """The user's names that an initializer stands for."""
    recorded = value.metadata_props.get(FROM, "")
    return recorded.split(",") if recorded else [str(value.name)]


class RewritePass:
    """Base of local rewrites; subclasses are frozen dataclasses with `name`, `match`, `rewrite`."""

    name: ClassVar[str]
    exact: ClassVar[bool] = True

    def match(self, node: ir.Node, graph: ir.Graph) -> Any:
        """Bindings when the rewrite applies at this node, None or a Decline when not."""
        raise NotImplementedError

    def rewrite(self, found: Any, build: Builder) -> Sequence[ir.Value]:
        """The values that replace the outputs of the matched node, in order."""
        raise NotImplementedError

    def run(self, model: ir.Model, fuel: Fuel) -> Outcome:
        """Sweep the graph until no rewrite applies or the fuel is used up."""
        graph = model.graph
        names = all_names(graph)
        limit = _REWRITES_PER_NODE * len(graph) + 64
        n_applied = 0
        while True:
            n_sweep, declined, empty = self._sweep(graph, names, fuel)
            n_applied += n_sweep
            if not n_sweep or empty:
                break
            if n_applied > limit:
                found, need = f"{n_applied} rewrites", f"at most {limit}"
                raise PassError(
                    message("pass", self.name, found, need, "it matches its own output")
                )
        if n_applied:
            remove_unused_initializers(graph)
            graph.sort()
        return Outcome(n_applied, tuple(declined))

    def _sweep(
        self, graph: ir.Graph, names: set[str], fuel: Fuel
    ) -> tuple[int, list[Decline], bool]:
        n_applied = 0
        declined: list[Decline] = []
        for node in list(graph):
            if node.graph is not graph:
                continue
            found = self.match(node, graph)
            if isinstance(found, Decline):
                declined.append(found)
            elif found is not None:
                if not fuel.take():
                    return n_applied, declined, True
                self._apply(node, found, graph, names)
                n_applied += 1
        return n_applied, declined, False

    def _apply(self, node: ir.Node, found: Any, graph: ir.Graph, names: set[str]) -> None:
        build = Builder(graph, names, str(node.outputs[0].name))
        values = self.rewrite(found, build)
        left_out = node.outputs[len(values) :]  # such as the mask of Dropout
        assert not any(is_used(v) for v in left_out), f"{self.name} replaced {len(values)} outputs"
        for value in build.constants:
            graph.register_initializer(value)
        stamp = {PASS: self.name, FROM: ",".join(dict.fromkeys(_node_origin(node)))}
        for new in build.nodes:
            new.metadata_props.update({**node.metadata_props, **stamp})
        graph.insert_before(node, build.nodes)
        fresh = {id(n) for n in build.nodes}
        for old, new_value in zip(node.outputs, values, strict=False):
            take_over(graph, node, old, new_value, fresh, build)
        remove_dead(graph, [node])
        remove_dead(graph, reversed(build.nodes))


def take_over(
    graph: ir.Graph,
    node: ir.Node,
    old: ir.Value,
    new: ir.Value,
    fresh: set[int],
    build: Builder,
) -> None:
    """Let `new` replace `old`, with its name where no other name must stay."""
    if old is new or not is_used(old):
        return
    producer = new.producer()
    is_new = producer is not None and id(producer) in fresh
    if old.is_graph_output() and not is_new and (producer is None or new.is_graph_output()):
        new = build.op("Identity", [new], like=new)  # a name of the interface must not move
        new_node = new.producer()
        assert new_node is not None
        graph.insert_before(node, new_node)
        is_new = True
    if is_new and new.shape is None:
        new.shape = old.shape
    if is_new and new.type is None:
        new.type = old.type
    if is_new:
        new.metadata_props.update(old.metadata_props)
    renames = is_new or old.is_graph_output()
    old_name = old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    if renames and not (new.is_graph_output() and new.name == old_name):
        old.name = build.unique(f"{old_name}_replaced")
        new.name = old_name


def decline(node: ir.Node, reason: str) -> Decline:
    """A decline at this node."""
    return Decline(str(node.name or node.outputs[0].name), reason)


def _node_origin(node: ir.Node) -> list[str]:
    recorded = node.metadata_props.get(FROM, "")
    return recorded.split(",") if recorded else [str(node.name or node.op_type)]
