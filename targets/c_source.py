"""Kernels as plain C11, for machines that LLVM does not reach or builds that want source.

Prints the lowered TIR of scalar kernels (`lanes` = 1): loops, branches, scalars, loads and stores.
What C leaves undefined for TIR's wrapping integers goes through `portable.h`. Values that nothing
reads are left out, so that the text compiles without warnings.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from sparsegraph.targets import emit
from sparsegraph.targets.kernel import Kernel, prim_func
from sparsegraph.targets.target import Target

Node = Any  # a statement or expression of TIR

_OPERATORS = {
    "Add": "+", "Sub": "-", "Mul": "*", "Div": "/", "Mod": "%", "LT": "<", "LE": "<=", "GT": ">",
    "GE": ">=", "EQ": "==", "NE": "!=", "And": "&&", "Or": "||", "RShift": ">>",
    "BitwiseAnd": "&", "BitwiseOr": "|", "BitwiseXor": "^",
}  # fmt: skip
_WRAPPING = {"Add": "add", "Sub": "sub", "Mul": "mul"}
_PLAIN_LOOPS = (0, 3)  # tvm.tirx.ForKind: serial, unrolled
_BINARY = {*_OPERATORS, "Min", "Max", "LShift"}
_MATH = {"fabs", "sqrt", "floor", "ceil", "trunc", "nearbyint", "round"}


def kernels_text(functions: Iterable[str]) -> str:
    """One C file with all kernels."""
    return "\n".join(['#include "portable.h"\n', *functions])


def function_text(kernel: Kernel, target: Target) -> str:
    """The C function of one kernel, with its prototype."""
    function = emit.lowered({kernel.name: prim_func(kernel, target)}, target)[kernel.name]
    return _Printer(kernel).text(function)


class _Printer:
    """Prints one function; names are given in order of appearance."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.names: dict[Node, str] = {}
        self.cells: set[Node] = set()  # buffers of one element: local variables
        self.arrays: set[Node] = set()  # buffers of more elements
        self.dead: set[Node] = set()
        self.mentioned: set[str] = set()
        self.lines: list[str] = []

    def text(self, function: Node) -> str:
        params = (*self.kernel.params, *emit.RANGE)
        for param, var in zip(params, function.params, strict=True):
            self.names[var] = param.name
        self.dead = _unused(function.body)
        self.statement(function.body, 1)
        unused = [f"    (void){p.name};" for p in params if p.name not in self.mentioned]
        args = ", ".join(
            f"{emit.C_TYPES[p.dtype]} {'*restrict ' if p.is_pointer else ''}{p.name}"
            for p in params
        )
        prototype = emit.c_declaration(self.kernel.name, self.kernel.params)
        head = f"{prototype}\nvoid {self.kernel.name}({args})\n{{"
        return "\n".join([head, *unused, *self.lines, "}\n"])

    # ------------------------------------------------ statements

    def statement(self, node: Node, depth: int) -> None:
        kind = type(node).__name__
        pad = "    " * depth
        if kind == "SeqStmt":
            for part in node.seq:
                self.statement(part, depth)
        elif kind == "DeclBuffer":
            self.names[node.buffer] = self.names[node.data]
        elif kind == "AllocBuffer":
            self.allocate(node.buffer, pad)
        elif kind == "Bind":
            if node.var not in self.dead:
                value = self.expression(node.value)
                name = self.new(node.var, "v")
                self.lines.append(f"{pad}const {_type(node.value)} {name} = {value};")
        elif kind == "BufferStore":
            if node.buffer not in self.dead:
                value = self.expression(node.value)
                self.lines.append(f"{pad}{self.place(node.buffer, node.indices)} = {value};")
        elif kind == "For":
            self.loop(node, depth)
        elif kind == "IfThenElse":
            self.branch(node, depth)
        else:
            raise AssertionError(f"{self.kernel.name}: no C for the statement {kind}")

    def allocate(self, buffer: Node, pad: str) -> None:
        if buffer in self.dead:
            return
        (extent,) = (int(n) for n in buffer.ty.shape)
        name = self.new(buffer, "c")
        (self.cells if extent == 1 else self.arrays).add(buffer)
        size = "" if extent == 1 else f"[{extent}]"
        start = "0" if extent == 1 else "{0}"
        self.lines.append(f"{pad}{emit.C_TYPES[str(buffer.ty.dtype)]} {name}{size} = {start};")

    def loop(self, node: Node, depth: int) -> None:
        assert node.step is None, f"{self.kernel.name}: a loop with a step"
        assert int(node.kind) in _PLAIN_LOOPS, f"{self.kernel.name}: a loop of kind {node.kind}"
        start, extent = self.expression(node.min), self.expression(node.extent)
        name = self.new(node.loop_var, "i")
        stop = extent if start == "0" else f"{start} + {extent}"
        pad = "    " * depth
        self.lines.append(f"{pad}for (int32_t {name} = {start}; {name} < {stop}; {name}++) {{")
        self.statement(node.body, depth + 1)
        self.lines.append(pad + "}")

    def branch(self, node: Node, depth: int) -> None:
        pad = "    " * depth
        self.lines.append(f"{pad}if ({_bare(self.expression(node.condition))}) {{")
        self.statement(node.then_case, depth + 1)
        if node.else_case is not None:
            self.lines.append(pad + "} else {")
            self.statement(node.else_case, depth + 1)
        self.lines.append(pad + "}")

    def new(self, var: Node, prefix: str) -> str:
        name = f"{prefix}{len(self.names)}"
        self.names[var] = name
        return name

    def name(self, var: Node) -> str:
        self.mentioned.add(self.names[var])
        return self.names[var]

    def place(self, buffer: Node, indices: Sequence[Node]) -> str:
        (index,) = indices
        name = self.name(buffer)
        return name if buffer in self.cells else f"{name}[{_bare(self.expression(index))}]"

    # ------------------------------------------------ expressions

    def expression(self, node: Node) -> str:
        kind = type(node).__name__
        if kind == "Var":
            return self.name(node)
        if kind in ("IntImm", "FloatImm"):
            return _literal(node)
        if kind == "TensorLoad":
            return self.place(node.source, node.indices)
        parts = [self.expression(part) for part in _operands(node)]
        if kind in _WRAPPING and str(node.ty) == "int32" and self.holds_bits(node):
            return f"sg_wrap_{_WRAPPING[kind]}({_bare(parts[0])}, {_bare(parts[1])})"
        if kind in _OPERATORS:
            return f"({parts[0]} {_OPERATORS[kind]} {parts[1]})"
        if kind in ("Min", "Max"):
            name = f"sg_{kind.lower()}_{_type(node)}"
            return f"{name}({_bare(parts[0])}, {_bare(parts[1])})"
        if kind == "LShift":
            assert str(node.ty) == "int32", f"{self.kernel.name}: shift of {node.ty}"
            return f"sg_shift_left({_bare(parts[0])}, {_bare(parts[1])})"
        if kind == "Select":
            return f"({parts[0]} ? {parts[1]} : {parts[2]})"
        if kind == "Not":
            return f"(!{parts[0]})"
        if kind in ("Cast", "BitwiseNot"):
            return f"(({_type(node)}){'~' * (kind != 'Cast')}{parts[0]})"
        assert kind == "Call", f"{self.kernel.name}: no C for the expression {kind}"
        return self.call(node, parts)

    def call(self, node: Node, parts: Sequence[str]) -> str:
        name = _short_name(node)
        value = _bare(parts[0])
        if name == "reinterpret":
            return f"sg_bits_{_type(node)}({value})"
        if name == "isnan":
            return f"(isnan({value}) != 0)"
        assert name in _MATH, f"{self.kernel.name}: no C for the function {name}"
        return f"{name}{'f' if str(node.ty) == 'float32' else ''}({value})"

    def holds_bits(self, node: Node) -> bool:
        """True if the integer comes from bits of a float, so that it may wrap around."""
        kind = type(node).__name__
        if kind == "LShift" or (kind == "TensorLoad" and node.source in self.cells):
            return True
        if kind == "Call":
            return _short_name(node) == "reinterpret"
        return kind in (*_WRAPPING, "Select") and any(map(self.holds_bits, _operands(node)))


def _bare(text: str) -> str:
    """Without the outermost parentheses, if they belong together."""
    if not (text.startswith("(") and text.endswith(")")):
        return text
    depth = 0
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0 and i + 1 < len(text):
            return text
    return text[1:-1]


def _short_name(call: Node) -> str:
    """`tirx.sqrt` and `prim.sqrt` -> `sqrt`."""
    return str(call.op.name).rpartition(".")[2]


def _type(node: Node) -> str:
    return emit.C_TYPES[str(node.ty)]


def _literal(node: Node) -> str:
    dtype, value = str(node.ty), node.value
    if not dtype.startswith("float"):
        number = int(value)
        if dtype == "int64":
            if number == -(1 << 63):
                return "INT64_MIN"
            return f"INT64_C({number})" if number >= 0 else f"(-INT64_C({-number}))"
        if number == -(1 << 31):
            return "INT32_MIN"
        return str(number) if number >= 0 else f"({number})"
    real = float(value)
    if math.isnan(real):
        return "NAN"
    if math.isinf(real):
        return "INFINITY" if real > 0 else "(-INFINITY)"
    text = real.hex() + ("f" if dtype == "float32" else "")
    return text if real >= 0 and not text.startswith("-") else f"({text})"


def _operands(node: Node) -> list[Node]:
    kind = type(node).__name__
    if kind == "Select":
        return [node.condition, node.true_value, node.false_value]
    if kind == "Cast":
        return [node.value]
    if kind == "Call":
        return list(node.args)
    if kind in ("Not", "BitwiseNot"):
        return [node.a]
    assert kind in _BINARY, f"no C for the expression {kind}"
    return [node.a, node.b]


# ---------------------------------------------------------------- values that nothing reads


def _unused(body: Node) -> set[Node]:
    """Bound values and local buffers that no living statement reads."""
    dead: set[Node] = set()
    while True:
        uses: Counter[Node] = Counter()
        made = list(_definitions(body, uses, dead))
        new = {var for var in made if not uses[var]} - dead
        if not new:
            return dead
        dead |= new


def _definitions(node: Node, uses: Counter[Node], dead: set[Node]) -> Iterator[Node]:
    """Yields what the statements define; counts in `uses` what the living ones read."""
    kind = type(node).__name__
    if kind == "SeqStmt":
        for part in node.seq:
            yield from _definitions(part, uses, dead)
    elif kind == "Bind":
        yield node.var
        if node.var not in dead:
            _count(node.value, uses)
    elif kind == "AllocBuffer":
        yield node.buffer
    elif kind == "BufferStore":
        if node.buffer not in dead:
            for part in (node.value, *node.indices):
                _count(part, uses)
    elif kind == "For":
        _count(node.min, uses)
        _count(node.extent, uses)
        yield from _definitions(node.body, uses, dead)
    elif kind == "IfThenElse":
        _count(node.condition, uses)
        yield from _definitions(node.then_case, uses, dead)
        if node.else_case is not None:
            yield from _definitions(node.else_case, uses, dead)


def _count(node: Node, uses: Counter[Node]) -> None:
    kind = type(node).__name__
    if kind == "Var":
        uses[node] += 1
    elif kind == "TensorLoad":
        uses[node.source] += 1
        for index in node.indices:
            _count(index, uses)
    elif kind not in ("IntImm", "FloatImm"):
        for part in _operands(node):
            _count(part, uses)


# ---------------------------------------------------------------- weights


def array_text(name: str, data: bytes) -> str:
    """`data` as an array aligned to 64 bytes, as `runtime.h` wants weights."""
    rows = (data[i : i + 32] for i in range(0, len(data), 32))
    text = "\n".join("    " + "".join(f"{byte}," for byte in row) for row in rows)
    head = f"#include <stdalign.h>\n\nextern const unsigned char {name}[];\n"
    return f"{head}alignas(64) const unsigned char {name}[] = {{\n{text}\n}};\n"
