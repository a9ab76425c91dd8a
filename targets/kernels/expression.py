"""Element-wise expressions: hashable trees of ONNX operators that kernels emit and NumPy evaluates.

A tree is `("arg", i)`, `("const", number)`, `("type", name)` or `(operator, child, ...)`:

    ("Relu", ("Add", ("arg", 0), ("arg", 1)))
    ("Clip", ("arg", 0), ("const", 0.0), ("const", 6.0))      attributes are constant children
    ("Cast", ("arg", 0), ("type", "int64"))

A constant takes the type of its siblings (float32 if there is none). Numbers are Python numbers.
Halves are bits that `FromHalf` reads and `ToHalf` makes; nothing else takes them. Bool values are
stored as uint8 of 0 and 1; inside an expression any operand that is not bool
counts as true where it is not 0. NaN goes through every operator (also Relu, Clip, Max, Min), as
in ONNX Runtime, save comparisons and ThresholdedRelu; exp overflows to inf; sigmoid(-200) is 0.
Errors of the functions: targets/kernels/math.py. Of integers quotient and remainder by 0 are 0.
"""

import hashlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from sparsegraph.targets import emit as tir
from sparsegraph.targets.kernels.math import hold
from sparsegraph.targets.kernels.operators import OPERATORS

from sparsegraph.errors import UnsupportedError, message

Tree = tuple[Any, ...]
_CHEAP = {"arg", "const", "Relu", "Clip", "Add", "Sub", "Mul", "Min", "Max", "LeakyRelu"}
LEAVES = ("arg", "const", "type")
COMPARISONS = (
    "Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual", "And", "Or", "Xor", "Not", "IsNaN",
)  # fmt: skip


def emit(tree: Tree, operands: Sequence[tir.Expr], lanes: int) -> tir.Expr:
    """The value of `tree` on `operands` (each of `lanes` lanes); equal subtrees are shared.

    Raises:
        UnsupportedError: an operator that no kernel computes.
    """
    seen: dict[Tree, tir.Expr] = {}

    def walk(node: Tree, near: tir.Expr | None) -> tir.Expr:
        if node[0] == "arg":
            return operands[node[1]]
        if node[0] == "const":
            return _constant(node[1], near, lanes)
        if node[0] == "type":
            return node[1]
        if node not in seen:
            seen[node] = _named(_operator(node).emit(*_children(node, walk)))
        return seen[node]

    return walk(tree, None)


def _children(node: Tree, walk: Any) -> list[tir.Expr]:
    """Values of the children; constants take the type of the others."""
    values = {i: walk(c, None) for i, c in enumerate(node[1:]) if c[0] != "const"}
    typed = [v for i, v in values.items() if not isinstance(v, str)]
    if node[0] == "Where":
        typed = [v for i, v in values.items() if i > 0]
    near = typed[0] if typed else None
    for i, child in enumerate(node[1:]):
        if child in node[1 : i + 1] and i in values:  # TVM makes 0 of x - x, also where x is NaN
            values[i] = _named(values[i])
    return [values[i] if i in values else walk(c, near) for i, c in enumerate(node[1:])]


def _constant(value: float, near: tir.Expr | None, lanes: int) -> tir.Expr:
    dtype = "float32" if near is None else str(near.ty).partition("x")[0]
    if dtype == "bool":
        dtype = "int32"
    if dtype.startswith("float"):
        return tir.splat(tir.const(float(value), dtype), lanes)
    return tir.splat(_integer(value, dtype), lanes)


def _integer(value: float, dtype: str) -> tir.Expr:
    """The constant, hidden from TVM if it is large or has no sign.

    TVM adds to constants when it looks for bounds, and aborts where that leaves their type.
    """
    info = np.iinfo(dtype)
    number = int(min(max(value, info.min), info.max))
    if info.min and (info.bits < 32 or info.min // 2 <= number <= info.max // 2):
        return tir.const(number, dtype)
    return tir.T.bitwise_not(tir.const(info.min + info.max - number, dtype))


def _named(value: tir.Expr) -> tir.Expr:
    """Bound to a name, so that it is computed once; bool vectors must stay inline."""
    return value if str(value.ty).startswith("bool") else hold(value)


def _operator(node: Tree) -> Any:
    if node[0] not in OPERATORS:
        need = "one of " + ", ".join(sorted(OPERATORS))
        text = message("expression", str(node[0]), "no such operator", need, "run it in a fallback")
        raise UnsupportedError(text)
    return OPERATORS[node[0]]


def evaluate(tree: Tree, arrays: Sequence[np.ndarray]) -> np.ndarray:
    """NumPy's value of `tree`, in the precision of `arrays` (the reference of every kernel)."""
    seen: dict[Tree, Any] = {}

    def walk(node: Tree) -> Any:
        if node[0] in LEAVES:
            return arrays[node[1]] if node[0] == "arg" else node[1]
        if node not in seen:
            seen[node] = _operator(node).numpy(*[walk(c) for c in node[1:]])
        return seen[node]

    with np.errstate(all="ignore"):
        return np.asarray(walk(tree))


def dtype(tree: Tree, arg_dtypes: Sequence[str]) -> str:
    """Element type of the value: a NumPy name, `bool` for truth values."""
    if tree[0] == "arg":
        return arg_dtypes[tree[1]]
    if tree[0] == "const":
        return "float32"
    if tree[0] in COMPARISONS:
        return "bool"
    if tree[0] == "Cast":
        return str(tree[2][1])
    if tree[0] in ("FromHalf", "ToHalf"):
        return "float32" if tree[0] == "FromHalf" else "float16"
    children = tree[2:] if tree[0] == "Where" else tree[1:]
    typed = [c for c in children if c[0] != "const"]
    return dtype(typed[0], arg_dtypes) if typed else "float32"


def is_cheap(tree: Tree) -> bool:
    """True if it takes a few instructions: no more code than a loop around it where repeated."""
    return tree[0] in _CHEAP and all(is_cheap(c) for c in tree[1:] if isinstance(c, tuple))


def n_args(tree: Tree) -> int:
    """Operands that the tree reads: one more than the largest argument number."""
    if tree[0] == "arg":
        return int(tree[1]) + 1
    return max((n_args(c) for c in tree[1:]), default=0) if tree[0] not in LEAVES else 0


def label(tree: Tree | None) -> str:
    """A short C identifier, different for different trees; `id` for none."""
    if tree is None:
        return "id"
    text = _spell(tree)
    if len(text) <= 32:
        return text
    return f"{text[:20].rstrip('_')}_{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def _spell(tree: Tree) -> str:
    if tree[0] == "arg":
        return f"a{tree[1]}"
    if tree[0] == "const":
        value = float(tree[1]) if float(tree[1]) == tree[1] else tree[1]  # 2 and 2.0 are one tree
        return "c" + repr(value).replace("-", "m").replace(".", "p").replace("+", "")
    if tree[0] == "type":
        return str(tree[1])
    count = str(len(tree) - 1) if len(tree) > 3 else ""
    name = re.sub(r"\W", "", tree[0]).lower() + count
    return "_".join([name, *map(_spell, tree[1:])])
