"""The seam to TVM: tensor-level IR from Python calls, objects from LLVM. No other file but the
kernel files of this package touches tvm, and those only through the names here.

A kernel is one C function `void name(pointers..., scalars..., int32_t begin, int32_t end)`. It
works on items [begin, end) of its outermost loop, so a host splits it over threads as it likes.
Pass order: facts of TVM 0.27 (no packed calls, no runtime symbols but those of libm).
"""

import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sparsegraph.targets.target import Target


class _Late:
    """A module that is imported when something of it is needed.

    TVM takes longer to import than everything else together, and processes that plan, inspect or
    prune generate no code.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        found = getattr(import_module(self._name), name)
        setattr(self, name, found)
        return found


tvm: Any = _Late("tvm")
tirx: Any = _Late("tvm.tirx")
T: Any = _Late("tvm.tirx.script.builder")
Expr = Any  # a tirx expression; TVM's classes are not typed

STORED_AS = {"bool": "uint8", "float16": "uint16"}  # bits that kernels load and store
UNBOUNDED = 1 << 30  # declared length of a pointer argument: sizes are run-time arguments
C_TYPES = {
    "float32": "float", "int64": "int64_t", "int32": "int32_t", "int8": "int8_t",
    "uint8": "uint8_t", "uint16": "uint16_t", "bool": "uint8_t", "float64": "double",
    "float16": "uint16_t",
}  # fmt: skip


class Param(NamedTuple):
    """One argument of a kernel: a pointer (`float32*`) or a scalar (`int32`, `float32`)."""

    name: str
    type: str

    @property
    def is_pointer(self) -> bool:
        return self.type.endswith("*")

    @property
    def dtype(self) -> str:
        return self.type.rstrip("*")


Signature = tuple[Param, ...]
RANGE = (Param("begin", "int32"), Param("end", "int32"))


def signature(text: str) -> Signature:
    """`"y:float32* x:float32* n:int32"` -> Params."""
    return tuple(Param(*word.split(":")) for word in text.split())


def c_declaration(name: str, params: Signature) -> str:
    """The C prototype of a kernel, its range included."""
    args = ", ".join(
        f"{C_TYPES[p.dtype]}{'*' if p.is_pointer else ''} {p.name}" for p in (*params, *RANGE)
    )
    return f"void {name}({args});"


@contextmanager
def function(name: str, params: Signature) -> Iterator[dict[str, Expr]]:
    """Open a kernel; yields its arguments by name. Use through `build`."""
    with T.prim_func():
        T.func_name(name)
        T.func_attr({"tirx.noalias": True})
        args: dict[str, Expr] = {}
        for p in (*params, *RANGE):
            if p.is_pointer:
                dtype = STORED_AS.get(p.dtype, p.dtype)
                args[p.name] = T.arg(p.name, T.buffer((UNBOUNDED,), dtype, align=1))
            else:
                scalar = {"int32": T.int32, "float32": T.float32}[p.dtype]
                args[p.name] = T.arg(p.name, scalar())
        yield args


def build(name: str, params: Signature, body: Any) -> Any:
    """The PrimFunc of `body(**arguments)`, with pointer parameters."""
    with tvm.script.ir_builder.IRBuilder() as ib, function(name, params) as args:
        body(**args)
    func = ib.get()
    pointers, declarations = [], []
    for p in func.params:
        if isinstance(p.ty, tirx.buffer.BufferType):
            handle = tirx.Var(p.name + "_p", tvm.ir.PointerType(p.ty.dtype))
            pointers.append(handle)
            declarations.append(tirx.DeclBuffer(p, data=handle))
        else:
            pointers.append(p)
    flat = tirx.PrimFunc(pointers, tirx.SeqStmt([*declarations, func.body]))
    return flat.with_attr("global_symbol", name).with_attr("tirx.noalias", True)


# ---------------------------------------------------------------- scalars and vectors


def const(value: float | int, dtype: str = "float32") -> Expr:
    return tirx.const(value, dtype)


def as_int(x: Expr) -> Expr:
    """Cast to int32, the type of all indices."""
    return T.cast(x, "int32")


def bind(x: Expr) -> Expr:
    """Name a value, so that it is computed once."""
    return T.Bind(x)


def splat(x: Expr, lanes: int) -> Expr:
    """Vector of `lanes` equal values; the scalar itself for one lane."""
    return x if lanes == 1 else tirx.Broadcast(x, lanes)


def load(buffer: Expr, index: Expr, lanes: int = 1) -> Expr:
    """`lanes` consecutive elements from `index`."""
    return buffer[index if lanes == 1 else tirx.Ramp(index, 1, lanes)]


def store(buffer: Expr, value: Expr, index: Expr, lanes: int = 1) -> None:
    """Store `lanes` consecutive elements at `index`."""
    T.buffer_store(buffer, value, [index if lanes == 1 else tirx.Ramp(index, 1, lanes)])


def moved(buffer: Expr, n_bytes: Expr) -> Expr:
    """The memory of a buffer of float32 from `n_bytes` on: an address that nothing scales."""
    kind = tvm.ir.PointerType(tvm.ir.PrimType("float32"))
    call = tirx.op.call_intrin(kind, "tirx.handle_add_byte_offset", buffer.data, n_bytes)
    return T.decl_buffer((UNBOUNDED,), "float32", data=T.Bind(call, kind), align=1)


def prefetch(buffer: Expr, index: Expr, *, is_written: bool = True) -> None:
    """Ask for the cache line of an element that will be read or written soon."""
    intent = [const(int(i), "int32") for i in (is_written, 3, 1)]  # all levels; data
    T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", T.address_of(buffer[index]), *intent))


def pair(buffer: Expr, at: Expr, lanes: int, *, is_joined: bool) -> list[Expr]:
    """2 * lanes values to `shuffle`: two vectors, or one that RVV narrows to every second value."""
    size = 2 * lanes if is_joined else lanes
    return [bind(load(buffer, at + i, size)) for i in range(0, 2 * lanes, size)]


def shuffle(vectors: Sequence[Expr], lanes: Sequence[int]) -> Expr:
    """Vector of the named lanes of the concatenated `vectors`; a scalar for one lane."""
    if len(lanes) == 1 and all("x" not in str(v.ty) for v in vectors):
        return vectors[lanes[0]]  # TVM 0.27 makes of it an undefined value
    return T.Shuffle(list(vectors), [const(i, "int32") for i in lanes])


_lookup_lanes: ContextVar[int] = ContextVar("lookup_lanes", default=0)


@contextmanager
def with_lookups(lanes: int) -> Iterator[None]:
    """Code for a machine with an instruction behind `look_up` for vectors of `lanes`; 0: none."""
    token = _lookup_lanes.set(lanes)
    try:
        yield
    finally:
        _lookup_lanes.reset(token)


def looks_up(lanes: int) -> bool:
    """True if `look_up` is one instruction for vectors of `lanes`."""
    return lanes == _lookup_lanes.get() > 0


def look_up(table: Sequence[float] | np.ndarray, index: Expr) -> Expr:
    """table[index & 7] for a vector of int32; the table has 8 numbers.

    Raises:
        KeyError: a number of lanes without such an instruction; ask `looks_up`.
    """
    lanes = int(str(index.ty).partition("x")[2])
    numbers = [const(float(table[i % 8])) for i in range(lanes)]
    values = shuffle(numbers, range(lanes))
    return T.call_llvm_pure_intrin(f"float32x{lanes}", _LOOKUPS[lanes], values, index)


_LOOKUPS = {8: "llvm.x86.avx2.permps", 16: "llvm.x86.avx512.permvar.sf.512"}


class Cell:
    """A mutable scalar or vector that LLVM keeps in a register."""

    def __init__(self, dtype: str = "float32", lanes: int = 1) -> None:
        self.lanes = lanes
        full = dtype if lanes == 1 else f"{dtype}x{lanes}"
        self.buffer = T.alloc_buffer((1,), full, scope="global")

    def set(self, value: Expr) -> None:
        T.buffer_store(self.buffer, value, [0])

    def get(self) -> Expr:
        return self.buffer[0]


def loop(start: Expr | int, stop: Expr | int) -> Any:
    """`with loop(a, b) as i:` counts i from a to b-1."""
    return T.serial(start, stop)


def when(condition: Expr) -> Any:
    """`with when(c):` runs its body only if `c` holds."""
    return _When(condition)


def divide(a: Expr, b: Expr | int) -> Expr:
    """a / b of non-negative integers; with `//` and its sign cases LLVM takes minutes."""
    return tirx.truncdiv(a, b if not isinstance(b, int) else const(b, "int32"))


def modulo(a: Expr, b: Expr | int) -> Expr:
    """a % b of non-negative integers."""
    return tirx.truncmod(a, b if not isinstance(b, int) else const(b, "int32"))


class Choice:
    """`with choose(c) as (then, otherwise):` followed by `with then:` and `with otherwise:`."""

    def __init__(self, condition: Expr) -> None:
        self._if = T.If(condition)

    def __enter__(self) -> tuple[Any, Any]:
        self._if.__enter__()
        return T.Then(), T.Else()

    def __exit__(self, *exc: Any) -> None:
        self._if.__exit__(*exc)


choose = Choice


def minimum(a: Expr, b: Expr) -> Expr:
    """The smaller of two scalars or of two vectors, lane by lane."""
    return tirx.Min(a, b)


def hidden_zero(size: Expr) -> Expr:
    """0, from a size that is positive: for all that LLVM knows any number from 0 on."""
    zero = const(0, "int32")
    return bind(maximum(zero - size, zero))


def maximum(a: Expr, b: Expr) -> Expr:
    """The larger of two scalars or of two vectors, lane by lane."""
    return tirx.Max(a, b)


def select(condition: Expr, a: Expr, b: Expr) -> Expr:
    """a where `condition` holds, else b; both are evaluated. Never bind a vector condition."""
    return tirx.Select(condition, a, b)


class _When:
    def __init__(self, condition: Expr) -> None:
        self.outer, self.inner = T.If(condition), T.Then()

    def __enter__(self) -> None:
        self.outer.__enter__()
        self.inner.__enter__()

    def __exit__(self, *exc: Any) -> None:
        self.inner.__exit__(*exc)
        self.outer.__exit__(*exc)


def gpu_thread() -> Expr:
    """Number of this GPU thread in its launch."""
    block, size, thread = (
        T.call_llvm_pure_intrin("int32", f"llvm.nvvm.read.ptx.sreg.{name}.x")
        for name in ("ctaid", "ntid", "tid")
    )
    return bind(block * size + thread)


# ---------------------------------------------------------------- code generation


def import_tvm() -> None:
    """Import TVM now."""
    import_module(T._name)


def _passes() -> list[Any]:
    tir, s_tir = tvm.tirx.transform, tvm.s_tir.transform
    return [
        s_tir.CanonicalizeLoop(), s_tir.LowerInitBlock(),
        s_tir.PlanAndUpdateBufferAllocationLocation(), s_tir.ConvertBlocksToOpaque(),
        s_tir.CompactBufferAllocation(), s_tir.LowerMatchBuffer(), s_tir.StmtSimplify(),
        s_tir.LowerOpaqueBlock(),
        tir.FlattenBuffer(), tir.NarrowDataType(32), tir.VectorizeLoop(), tir.UnrollLoop(),
        tir.StmtSimplify(), tir.RemoveNoOp(),
    ]  # fmt: skip


def _machine(target: Target) -> Any:
    """TVM's own description of the target."""
    if target.output == "c":
        return tvm.target.Target({"kind": "c"})
    attributes = [f"+{f}" for f in (*target.code_features, *target.extra_features)]
    options: dict[str, Any] = {"kind": "llvm", "mtriple": target.triple, "mcpu": target.cpu}
    if attributes:
        options["mattr"] = attributes
    if target.abi:
        options["mfloat-abi" if target.abi == "hard" else "mabi"] = target.abi
    if target.output in ("wasm", "bare"):  # LLVM's own idea of them is unknown to TVM
        options["vector-width"] = 32 * target.lanes
    return tvm.target.Target(options)


def lowered(functions: dict[str, Any], target: Target) -> Any:
    """The module of all `functions` (name -> PrimFunc) as loops, scalars and vectors."""
    machine = _machine(target)
    module = tvm.tirx.transform.BindTarget(machine)(tvm.IRModule(functions))
    with machine, tvm.transform.PassContext(opt_level=3):
        for step in _passes():
            module = step(module)
    return module


def compile_module(functions: dict[str, Any], target: Target) -> Any:
    """LLVM module of all `functions` (name -> PrimFunc)."""
    llvm, module = _machine(target), lowered(functions, target)
    with llvm, tvm.transform.PassContext(opt_level=3):
        module = tvm.tirx.transform.LowerIntrin()(module)
        built = tvm.get_global_func("target.build.llvm")(module, llvm)
    if target.sve_bits:
        return _with_sve_length(built, target.sve_bits)
    if target.function_attributes:
        return _with_attributes(built, target.function_attributes)
    return _with_entries(built, functions) if target.output == "ptx" else built


def _with_entries(module: Any, names: Iterable[str]) -> Any:
    """The LLVM module with the functions `names` as kernels that a host can launch."""
    text = str(module.inspect_source("ll"))
    for name in names:
        text, n = re.subn(rf"^define [^@]*void @{name}\(", _entry(name), text, flags=re.MULTILINE)
        assert n == 1, f"{name} is defined {n} times"
    return _reloaded(text)


def _entry(name: str) -> str:
    return f"define ptx_kernel void @{name}("


def _with_sve_length(module: Any, bits: int) -> Any:
    """The LLVM module, allowed to count on SVE registers of at least `bits`.

    TVM 0.27 writes `vscale_range(1,16)` on every function: any length, so that LLVM keeps fixed
    vectors in NEON registers. With a least length of two granules of 128 bits or more it puts them
    into SVE registers, under predicates of their own length: the code runs on longer ones too.
    """
    text, n = re.subn(
        r"\bvscale_range\(\d+,(\d+)\)",
        rf"vscale_range({bits // 128},\1)",
        str(module.inspect_source("ll")),
    )
    assert n, "TVM declared no SVE length"
    return _reloaded(text)


def _with_attributes(module: Any, attributes: Sequence[str]) -> Any:
    """The LLVM module, already optimised, with `attributes` on every function."""
    text, n = re.subn(
        r"^(attributes #\d+ = \{)",
        rf"\1 {' '.join(attributes)}",
        str(module.inspect_source("ll")),
        flags=re.MULTILINE,
    )
    assert n, "TVM declared no attributes"
    return _reloaded(text)


def _reloaded(text: str) -> Any:
    """The module of LLVM's text form."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernels.ll")
        path.write_text(text)
        return tvm.runtime.load_module(str(path))


def write_object(functions: dict[str, Any], target: Target, path: Path) -> None:
    """Compile `functions` into the object file `path`."""
    compile_module(functions, target).write_to_file(str(path))


def assembly(functions: dict[str, Any], target: Target) -> str:
    """Assembly text, for inspection and golden tests."""
    return str(compile_module(functions, target).inspect_source("asm"))
