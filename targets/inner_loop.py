"""The inner loop of a product kernel: instruction mix, spills, and estimated throughput.

Reads the assembly that LLVM emits for a target, takes the innermost loop with the most
multiply-adds, and counts; spills in every innermost loop that has half as many. Where llvm-mca is
installed (Debian: llvm) and knows the processor, it estimates the cycles of one round: a model of
the core with perfect caches, not a measurement.
"""

import itertools
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from sparsegraph.targets import emit
from sparsegraph.targets.kernel import Kernel, prim_func
from sparsegraph.targets.kernels import direct
from sparsegraph.targets.kernels.direct import Direct
from sparsegraph.targets.kernels.product import UNIT, Product
from sparsegraph.targets.target import Target

Flow = dict[int, set[int]]  # blocks of instructions that may follow each one

TOOL = "llvm-mca"
_RVV = "# LLVM-MCA-RISCV-LMUL M{}\n# LLVM-MCA-RISCV-SEW E32"  # pairs of registers, joined
_NEWEST, _OLDEST = 40, 14  # versions that are looked for by name
CORES = {  # of each machine family, cores that stand for its machines
    "x86_64": ("haswell", "znver3"),
    "aarch64": ("cortex-a76", "neoverse-n2", "cortex-a55"),
    "riscv64": ("sifive-u74", "sifive-p670"),
}


@dataclass(frozen=True)
class Syntax:
    """How a machine family writes what is counted: regular expressions over one instruction.

    Attributes:
        comment: what starts a comment.
        branch: a jump to a label, which is the first group.
        ends: what does not go on to the next line.
        fused: multiply-adds of a whole vector; `product` where it has none.
        load: loads of vectors, those inside of other instructions too.
        stack: an access to the stack.
        vector: a vector register.
    """

    comment: str
    branch: str
    ends: str
    fused: str
    product: str
    load: str
    stack: str
    vector: str


_X86 = Syntax(
    comment="#",
    branch=r"^j\w+\s+(\.\w+)",
    ends=r"^jmp|^ret",
    fused=r"^vfn?madd\d+ps",
    product=r"^v?mulps",
    load=r"^v?mov[au]ps\s[^,]*\(.*, %|^v(broadcastss|f\w+ps)\s.*\(",
    stack=r"\(%rsp[,)]",
    vector=r"%[xyz]mm\d+",
)
_A64 = Syntax(
    comment="//",
    branch=r"^(?:b\.?\w*|cbn?z|tbn?z)\s+(?:\w+, )?(?:#\d+, )?(\.\w+)$",
    ends=r"^b \.|^ret|^br ",
    fused=r"^fml[as]|^fmad",
    product=r"^fmul",
    load=r"^(ldr\s+q|ldp\s+q|ld1\w*\s)",
    stack=r"\[sp|^(ldr|str) z",
    vector=r"\b[vzq]\d+\b",
)
_A32 = Syntax(
    comment="@",
    branch=r"^b[\w.]*\s+(\.\w+)|^cbn?z\s+\w+, (\.\w+)|^le\s+lr, (\.\w+)",
    ends=r"^b(\.w)? \.|^bx|^pop.*pc",
    fused=r"^v(fma|mla)\w*\.f32",
    product=r"^vmul\.f32",
    load=r"^(vld1|vldr|vldmia)",
    stack=r"\bsp\b",  # its address, too: vectors are stored through another register
    vector=r"\b[qds]\d+\b",
)
_RISCV = Syntax(
    comment="#",
    branch=r"^(?:b\w+|j)\s+(?:\w+, )*(\.\w+)$",
    ends=r"^j |^ret",
    fused=r"^(vfmacc\.v[fv]|vfmadd\.v[fv]|fmadd\.s)",
    product=r"^(vfmul\.v|fmul\.s)",
    load=r"^(vle32|flw)",
    stack=r"\(sp\)|^v[ls]\dr\w*\.v",  # whole registers: only spilled ones
    vector=r"\bv\d+\b|\bf[tsa]\d+\b",
)
_PTX = Syntax(
    comment="//",
    branch=r"^(?:@!?%p\d+ )?bra(?:\.uni)?\s+(\$\w+);",
    ends=r"^bra|^ret",
    fused=r"^fma\.rn\.f32",
    product=r"^mul\.rn\.f32",
    load=r"^ld\.global",
    stack=r"\.local|__local_depot",
    vector=r"%[rf]\d+",
)
_NAME = re.compile(  # as `Product.name` writes it
    r"(?:spmm|gemm)_f32_(dense|coded)_r(\d+)_v([\dx]+)_l(\d+)(?:_gather(\d))?(?:_b(\d+))?"
    r"(?:_p(\d+(?:_\d+)?))?((?:_near|_far|_narrow)*)(?:_unit(\d))?(?:_x(\d))?"
)
SYNTAX = {
    "x86_64": _X86, "aarch64": _A64, "armv7l": _A32, "riscv64": _RISCV, "armv7e-m": _A32,
    "armv8.1-m.main": _A32, "nvptx64": _PTX,
}  # fmt: skip


@dataclass(frozen=True)
class Loop:
    """The innermost loop of a kernel.

    Attributes:
        fused: multiply-adds of vectors, in one round.
        products: multiplications that are not fused.
        spills: accesses to the stack in this loop and in the others that multiply (`inner_loops`).
        registers: distinct vector registers.
        joined: vectors in one multiply-add (`Product.joined`).
        cycles: estimates of llvm-mca for one round, by core; None without one.
    """

    target: str
    kernel: str
    instructions: int
    fused: int
    products: int
    loads: int
    spills: int
    registers: int
    joined: int
    cycles: dict[str, float | None]

    @property
    def work(self) -> int:
        """Multiply-adds of vectors in one round."""
        return self.joined * (self.fused or self.products)


def assembly(target: Target, kernel: Kernel) -> list[str]:
    """Labels and instructions of the kernel, without directives and comments."""
    text = emit.assembly({kernel.name: prim_func(kernel, target)}, target)
    comment = SYNTAX[target.arch].comment
    lines = [" ".join(line.partition(comment)[0].split()) for line in text.splitlines()]
    return [x for x in lines if x and (x.endswith(":") or not x.startswith("."))]


def inner_loop(lines: Sequence[str], syntax: Syntax) -> list[str]:
    """Instructions of the innermost loop with the most multiply-adds."""
    return inner_loops(lines, syntax)[0]


def inner_loops(lines: Sequence[str], syntax: Syntax) -> list[list[str]]:
    """The innermost loop with the most multiply-adds, and those with at least half as many.

    Fewer have the rests of loops that LLVM unrolled.
    """
    bodies = innermost(lines, syntax)
    work = [_count(body, f"{syntax.fused}|{syntax.product}") for body in bodies]
    order = sorted(range(len(bodies)), key=lambda i: -work[i])
    return [bodies[i] for i in order if 2 * work[i] >= max(work)]


def innermost(lines: Sequence[str], syntax: Syntax) -> list[list[str]]:
    """Instructions of each loop that contains no other, wherever LLVM placed its blocks."""
    jumps = {label for x in lines if (label := _label(x, syntax))}
    starts = {i for i, x in enumerate(lines) if i == 0 or x[:-1] in jumps}
    starts |= {i + 1 for i, x in enumerate(lines[:-1]) if _label(x, syntax)}
    blocks = [list(lines[a:b]) for a, b in itertools.pairwise([*sorted(starts), len(lines)])]
    at = {block[0][:-1]: i for i, block in enumerate(blocks)}
    flow: Flow = {}
    for i, block in enumerate(blocks):
        follows = not re.search(syntax.ends, block[-1]) and i + 1 < len(blocks)
        label = _label(block[-1], syntax)
        flow[i] = ({at[label]} if label in at else set()) | ({i + 1} if follows else set())
    loops = _loops(set(flow), flow)
    return [[x for i in sorted(loop) for x in blocks[i] if not x.endswith(":")] for loop in loops]


def _label(line: str, syntax: Syntax) -> str:
    """Where a jump goes; nothing for other instructions."""
    found = re.search(syntax.branch, line)
    return next(g for g in found.groups() if g) if found else ""


def _loops(nodes: set[int], flow: Flow) -> list[set[int]]:
    """Sets of blocks that reach each other and, without the one they are entered by, no longer."""
    back: Flow = {n: set() for n in flow}
    for node, following in flow.items():
        for to in following:
            back[to].add(node)
    found = []
    left = set(nodes)
    while left:
        node = min(left)
        ring = _reached(node, nodes, flow) & _reached(node, nodes, back)
        left -= ring | {node}
        if ring:
            entries = {n for n in ring if back[n] - ring}
            found += _loops(ring - {min(entries or ring)}, flow) or [ring]
    return found


def _reached(node: int, nodes: set[int], flow: Flow) -> set[int]:
    """What lies one step of `flow` or more from `node`, within `nodes`."""
    seen: set[int] = set()
    waiting = [node]
    while waiting:
        new = (flow[waiting.pop()] & nodes) - seen
        seen |= new
        waiting += new
    return seen


def _count(body: Sequence[str], pattern: str) -> int:
    return sum(bool(re.search(pattern, line)) for line in body)


def kernel_of(name: str) -> Product | Direct | None:
    """The product kernel of this name, without its epilogue; None for any other kernel."""
    found = _NAME.match(name)
    if found is None:
        return direct.named(name)
    weight, group, split, lanes, step, batch, points, tail, unit, joined = found.groups()
    return Product(
        weight,
        int(group),
        tuple(map(int, split.split("x"))),
        int(lanes),
        None if step is None else int(step),
        batch=int(batch or 1),
        near="_near" in tail,
        far="_far" in tail,
        unit=int(unit or UNIT),
        narrow="_narrow" in tail,
        joined=int(joined or 1),
        points=tuple(map(int, points.split("_"))) if points else (),
    )


def look(target: Target, kernel: Product | Direct, cores: Sequence[str] = ()) -> Loop:
    """Count what the kernel's innermost loop is made of; estimate it on `cores`."""
    syntax = SYNTAX[target.arch]
    bodies = inner_loops(assembly(target, kernel), syntax)
    body = bodies[0]
    joined = kernel.joined if isinstance(kernel, Product) else 1
    return Loop(
        target=str(target),
        kernel=kernel.name,
        instructions=len(body),
        fused=_count(body, syntax.fused),
        products=_count(body, syntax.product),
        loads=_count(body, syntax.load),
        spills=sum(_count(b, syntax.stack) for b in bodies),
        registers=len({r for line in body for r in re.findall(syntax.vector, line)}),
        joined=joined,
        cycles={core: estimate(target, body, core, joined=joined) for core in cores},
    )


def find_tool() -> str | None:
    """The newest llvm-mca that is installed: Debian's packages llvm-N stand side by side."""
    names = [f"{TOOL}-{n}" for n in range(_NEWEST, _OLDEST, -1)]
    return next(filter(None, map(shutil.which, [*names, TOOL])), None)


def version() -> str:
    """Name and version of the tool, or nothing."""
    tool = find_tool()
    if tool is None:
        return ""
    done = subprocess.run([tool, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"version (\d+)", done.stdout)
    return f"{TOOL} {found[1]}" if found else TOOL


def estimate(
    target: Target, body: Sequence[str], core: str = "", rounds: int = 100, *, joined: int = 1
) -> float | None:
    """Cycles of one round as llvm-mca models the core, the target's own by default.

    None where the tool is missing, or does not know the core or an instruction.
    """
    tool = find_tool()
    if tool is None:
        return None
    command = [
        tool,
        f"-mtriple={target.triple}",
        f"-mcpu={core or target.cpu}",
        f"-iterations={rounds}",
    ]
    features = [f"+{f}" for f in target.code_features]
    command += [f"-mattr={','.join(features)}"] if features else []
    head = [_RVV.format(2 * joined)] if target.has("v") else []  # set in front of the loop
    text = "\n".join([*head, *(re.sub(r"\.L\w+", "0", line) for line in body)])
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    found = re.search(r"^Total Cycles:\s+(\d+)", done.stdout, re.MULTILINE)
    return int(found[1]) / rounds if found else None
