"""Element-wise neighbours of a value that can be computed where the value is produced.

A region starts at a value and grows along its consumers while every node is element-wise, every
other operand is at hand, and exactly one value of the region is needed outside. It becomes one
expression tree: the epilogue of a product, or one element-wise kernel.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from sparsegraph.graph import attribute, constant, static_shape
from sparsegraph.targets.kernels.expression import Tree
from sparsegraph.targets.kernels.operators import MOST_FACTORS

UNARY = frozenset(
    [
        "Abs",
        "Ceil",
        "Cos",
        "Erf",
        "Exp",
        "Floor",
        "HardSwish",
        "Log",
        "Mish",
        "Neg",
        "Not",
        "Reciprocal",
        "Relu",
        "Round",
        "Sigmoid",
        "Sign",
        "Sin",
        "Softplus",
        "Softsign",
        "Sqrt",
        "Tanh",
        "IsNaN",
    ]
)
BINARY = frozenset(
    [
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Pow",
        "Max",
        "Min",
        "Sum",
        "And",
        "Or",
        "Xor",
        "Equal",
        "Greater",
        "GreaterOrEqual",
        "Less",
        "LessOrEqual",
        "Mod",
        "Where",
        "PRelu",
        "Mean",
    ]
)
WITH_ATTRIBUTES = frozenset(
    [
        "Gelu",
        "Clip",
        "LeakyRelu",
        "HardSigmoid",
        "Elu",
        "Selu",
        "Celu",
        "ThresholdedRelu",
        "Cast",
        "Swish",
    ]
)
ELEMENTWISE = UNARY | BINARY | WITH_ATTRIBUTES
MAX_NODES = 12

Classify = Callable[[ir.Value], str | None]


@dataclass(frozen=True)
class Region:
    """An expression over a start value and operands.

    Attributes:
        tree: expression; argument 0 is the start value, then `operands` in order.
        operands: values that the expression reads besides the start value.
        kinds: how each operand is read, as the caller's classifier named it.
        result: the value that the expression computes.
        nodes: the ONNX nodes it stands for, in order.
    """

    tree: Tree
    operands: tuple[ir.Value, ...]
    kinds: tuple[str, ...]
    result: ir.Value
    nodes: tuple[ir.Node, ...]


def grow(
    start: ir.Value, classify: Classify, first: ir.Node | None = None, *, any_type: bool = False
) -> Region:
    """The largest region from `start`; only the start value itself if nothing can be absorbed.

    `classify` names how an operand from outside would be read, or None if it cannot be. With
    `first` the region begins with that node even if `start` has other consumers. The result is
    float32 unless `any_type`.
    """
    search = _Search(start, classify, owns_start=first is None)
    if first is not None:
        search.shape = static_shape(first.outputs[0])
        search.absorb(first)
        search.settle(first.outputs[0])
    while (node := search.candidate()) is not None and len(search.nodes) < MAX_NODES:
        search.absorb(node)
        exit_value = search.exit()
        if exit_value is not None and (any_type or exit_value.dtype == ir.DataType.FLOAT):
            search.settle(exit_value)
    return search.best


class _Search:
    def __init__(self, start: ir.Value, classify: Classify, *, owns_start: bool) -> None:
        self.classify = classify
        self.outside = set() if owns_start else {start}
        self.shape = static_shape(start)
        self.trees: dict[ir.Value, Tree] = {start: ("arg", 0)}
        self.operands: list[ir.Value] = []
        self.kinds: list[str] = []
        self.nodes: list[ir.Node] = []
        self.refused: set[ir.Node] = set()
        self.best = Region(("arg", 0), (), (), start, ())

    def candidate(self) -> ir.Node | None:
        """The next consumer of the region that can join it."""
        for value in self.trees:
            if value.is_graph_output():
                continue
            for node in value.consumers():
                if node in self.nodes or node in self.refused:
                    continue
                if self.can_join(node):
                    return node
                self.refused.add(node)
        return None

    def can_join(self, node: ir.Node) -> bool:
        if node.op_type not in ELEMENTWISE or node.domain not in ("", "ai.onnx"):
            return False
        if static_shape(node.outputs[0]) != self.shape or refusal(node) is not None:
            return False
        return all(
            v is None or v in self.trees or scalar_of(v) is not None or self.classify(v)
            for v in node.inputs
        )

    def absorb(self, node: ir.Node) -> None:
        children = [None if v is None else self.leaf(v) for v in node.inputs]
        self.trees[node.outputs[0]] = tree_of(node, children)
        self.nodes.append(node)
        self.refused.clear()  # what waited for this value may join now

    def leaf(self, value: ir.Value) -> Tree:
        if value in self.trees:
            return self.trees[value]
        number = scalar_of(value)
        if number is not None:
            return ("const", number)
        if value not in self.operands:
            kind = self.classify(value)
            assert kind is not None
            self.operands.append(value)
            self.kinds.append(kind)
        return ("arg", 1 + self.operands.index(value))

    def exit(self) -> ir.Value | None:
        """The one value that is read outside of the region, or None if there are several."""
        exits = [
            v
            for v in self.trees
            if v not in self.outside
            and (v.is_graph_output() or any(n not in self.nodes for n in v.consumers()))
        ]
        return exits[0] if len(exits) == 1 else None

    def settle(self, result: ir.Value) -> None:
        self.best = Region(
            self.trees[result], tuple(self.operands), tuple(self.kinds), result, tuple(self.nodes)
        )


def refusal(node: ir.Node) -> str | None:
    """Why no kernel computes an element-wise node, or None."""
    if node.op_type != "Cast" and any(v is not None and is_half(v) for v in node.inputs):
        return "numbers of half precision"
    if node.op_type != "Pow":
        return None
    base, exponent = node.inputs
    assert base is not None
    assert exponent is not None
    number = scalar_of(exponent)
    if _is_integer(base):
        if number in range(MOST_FACTORS + 1):
            return None
        return f"powers of integers but of constants 0, 1 ... {MOST_FACTORS}"
    if scalar_of(base) is not None and _is_integer(exponent):
        return "a constant to the power of integers"
    return None


def is_half(value: ir.Value) -> bool:
    return value.dtype == ir.DataType.FLOAT16


def _is_integer(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_integer()


def scalar_of(value: ir.Value) -> float | int | None:
    """The number of a one-element constant; constants take the type of the other operand."""
    array = constant(value)
    if array is None or array.size != 1 or array.dtype.kind not in "fbiu":
        return None
    number = array.reshape(()).item()
    return float(number) if array.dtype.kind == "f" else int(number)


_NUMBERS = {  # attributes that follow the inputs as constants
    "LeakyRelu": (("alpha", 0.01),),
    "Mod": (("fmod", 0),),
    "HardSigmoid": (("alpha", 0.2), ("beta", 0.5)),
    "Elu": (("alpha", 1.0),),
    "Celu": (("alpha", 1.0),),
    "ThresholdedRelu": (("alpha", 1.0),),
    "Swish": (("alpha", 1.0),),
    "Selu": (("alpha", 1.67326319217681884765625), ("gamma", 1.05070102214813232421875)),
}


def tree_of(node: ir.Node, inputs: Sequence[Tree | None]) -> Tree:
    """The expression of one node over its inputs' expressions (None: input left out)."""
    op = node.op_type
    if op == "Clip":
        low, high = ([*inputs, None, None][i] for i in (1, 2))
        low = low or ("const", _number(node, "min", -np.inf))
        high = high or ("const", _number(node, "max", np.inf))
        return ("Clip", inputs[0], low, high)
    children = [t for t in inputs if t is not None]
    if op == "Cast":
        return _cast(node, children[0])
    if op == "Gelu" and attribute(node, "approximate", "none") == "tanh":
        return ("GeluTanh", *children)
    if op in ("Sum", "Max", "Min"):
        return _fold("Add" if op == "Sum" else op, children)
    if op == "Mean":
        return ("Mul", _fold("Add", children), ("const", 1.0 / len(children)))
    numbers = [("const", _number(node, name, value)) for name, value in _NUMBERS.get(op, ())]
    return (op, *children, *numbers)


def _cast(node: ir.Node, x: Tree) -> Tree:
    """Halves only by way of float32."""
    value, result = node.inputs[0], node.outputs[0]
    assert value is not None
    to = ir.DataType(int(_number(node, "to", 1)))
    if is_half(value):
        x = ("FromHalf", x)
    if is_half(result):
        return ("ToHalf", x if is_half(value) else ("Cast", x, ("type", "float32")))
    return ("Cast", x, ("type", np.dtype(to.numpy()).name))


def _fold(op: str, children: Sequence[Tree]) -> Tree:
    tree = children[0]
    for child in children[1:]:
        tree = (op, tree, child)
    return tree


def _number(node: ir.Node, name: str, default: float) -> float:
    value = attribute(node, name, default)
    assert isinstance(value, int | float)
    return float(value)
