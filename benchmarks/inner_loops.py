"""The inner loops of product kernels: instruction mix, spills, and estimated throughput.

    python -m benchmarks.inner_loops [--on aarch64 cortex-a55] [--density 1 .1] [--json file.json]

Reads the assembly that LLVM emits for a target, takes the innermost loop with the most
multiply-adds, and counts. Where llvm-mca is installed (Debian: llvm) and knows the processor, it
estimates the cycles of one round: a model of the core with perfect caches, not a measurement.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sparsegraph.targets import emit
from sparsegraph.targets.kernel import prim_func
from sparsegraph.targets.kernels.product import Product
from sparsegraph.targets.target import Target

from benchmarks import results
from sparsegraph import targets
from sparsegraph.lower import choose
from sparsegraph.lower.problem import Problem

MACHINES = (
    "x86-64-v2", "x86-64-v3", "x86-64-v4", "aarch64", "aarch64-sve256", "armv7", "riscv64",
    "riscv64-v128", "riscv64-v256", "cortex-m7", "cortex-m55",
)  # fmt: skip


@dataclass(frozen=True)
class Syntax:
    """How a machine family writes what is counted: regular expressions over one instruction.

    Attributes:
        comment: what starts a comment.
        branch: a jump to a label, which is the first group.
        fused: multiply-adds of a whole vector; `product` where it has none.
        load: loads of vectors, those inside of other instructions too.
        stack: an access to the stack.
        vector: a vector register.
    """

    comment: str
    branch: str
    fused: str
    product: str
    load: str
    stack: str
    vector: str


_X86 = Syntax(
    comment="#",
    branch=r"^j\w+\s+(\.\w+)",
    fused=r"^vfn?madd\d+ps",
    product=r"^v?mulps",
    load=r"^v?mov[au]ps\s[^,]*\(.*, %|^v(broadcastss|f\w+ps)\s.*\(",
    stack=r"\(%rsp[,)]",
    vector=r"%[xyz]mm\d+",
)
_A64 = Syntax(
    comment="//",
    branch=r"^(?:b\.?\w*|cbn?z|tbn?z)\s+(?:\w+, )?(?:#\d+, )?(\.\w+)$",
    fused=r"^fml[as]|^fmad",
    product=r"^fmul",
    load=r"^(ldr\s+q|ldp\s+q|ld1\w*\s)",
    stack=r"\[sp|^(ldr|str) z",
    vector=r"\b[vzq]\d+\b",
)
_A32 = Syntax(
    comment="@",
    branch=r"^b\w*\s+(\.\w+)|^le\s+lr, (\.\w+)",
    fused=r"^v(fma|mla)\w*\.f32",
    product=r"^vmul\.f32",
    load=r"^(vld1|vldr|vldmia)",
    stack=r"\[sp",
    vector=r"\b[qds]\d+\b",
)
_RISCV = Syntax(
    comment="#",
    branch=r"^b\w+\s+(?:\w+, )*(\.\w+)$",
    fused=r"^(vfmacc\.v[fv]|vfmadd\.v[fv]|fmadd\.s)",
    product=r"^(vfmul\.v|fmul\.s)",
    load=r"^(vle32|flw)",
    stack=r"\(sp\)",
    vector=r"\bv\d+\b|\bf[tsa]\d+\b",
)
SYNTAX = {
    "x86_64": _X86, "aarch64": _A64, "armv7l": _A32, "riscv64": _RISCV, "armv7e-m": _A32,
    "armv8.1-m.main": _A32,
}  # fmt: skip


@dataclass(frozen=True)
class Loop:
    """The innermost loop of a kernel.

    Attributes:
        fused: multiply-adds of vectors, in one round.
        products: multiplications that are not fused.
        spills: accesses to the stack.
        registers: distinct vector registers.
        cycles: estimate of llvm-mca for one round; None without one.
    """

    target: str
    kernel: str
    instructions: int
    fused: int
    products: int
    loads: int
    spills: int
    registers: int
    cycles: float | None = None


def kernel_for(target: Target, weight: str) -> Product:
    """The kernel that the planner takes for a product of four vectors of points."""
    points, density = 4 * target.lanes, 1.0 if weight == "dense" else 0.1
    problem = Problem(
        rows=256, channels=256, taps=1, images=1, points=points, vectors=4, row=points,
        gather=None, density=density, is_shared=False, source=points, out=(1, points),
    )  # fmt: skip
    choice = (choose.dense if weight == "dense" else choose.coded)(problem, target)
    return Product(choice.weight, choice.group, choice.split, target.lanes)


def assembly(target: Target, kernel: Product) -> list[str]:
    """Labels and instructions of the kernel, without directives and comments."""
    text = emit.assembly({kernel.name: prim_func(kernel, target)}, target)
    comment = SYNTAX[target.arch].comment
    lines = [" ".join(line.partition(comment)[0].split()) for line in text.splitlines()]
    return [x for x in lines if x and (x.endswith(":") or not x.startswith("."))]


def inner_loop(lines: Sequence[str], syntax: Syntax) -> list[str]:
    """Instructions of the innermost loop with the most multiply-adds."""
    labels = {line[:-1]: i for i, line in enumerate(lines) if line.endswith(":")}
    loops = []
    for i, line in enumerate(lines):
        if found := re.search(syntax.branch, line):
            start = labels.get(next(g for g in found.groups() if g), i + 1)
            if start <= i:
                loops.append((start, i + 1))
    innermost = [
        a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)
    ]
    bodies = [[x for x in lines[a:b] if not x.endswith(":")] for a, b in innermost]
    pattern = f"{syntax.fused}|{syntax.product}"
    return max(bodies, key=lambda body: _count(body, pattern))


def _count(body: Sequence[str], pattern: str) -> int:
    return sum(bool(re.search(pattern, line)) for line in body)


def look(target: Target, kernel: Product) -> Loop:
    """Count what the kernel's innermost loop is made of."""
    syntax = SYNTAX[target.arch]
    body = inner_loop(assembly(target, kernel), syntax)
    return Loop(
        target=str(target),
        kernel=kernel.name,
        instructions=len(body),
        fused=_count(body, syntax.fused),
        products=_count(body, syntax.product),
        loads=_count(body, syntax.load),
        spills=_count(body, syntax.stack),
        registers=len({r for line in body for r in re.findall(syntax.vector, line)}),
        cycles=estimate(target, body),
    )


def estimate(target: Target, body: Sequence[str], rounds: int = 100) -> float | None:
    """Cycles of one round as llvm-mca models the core; None where it cannot."""
    tool = shutil.which("llvm-mca")
    if tool is None:
        return None
    command = [tool, f"-mtriple={target.triple}", f"-mcpu={target.cpu}", f"-iterations={rounds}"]
    features = [f"+{f}" for f in target.code_features]
    command += [f"-mattr={','.join(features)}"] if features else []
    text = "\n".join(re.sub(r"\.L\w+", "0", line) for line in body)
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    found = re.search(r"^Total Cycles:\s+(\d+)", done.stdout, re.MULTILINE)
    return int(found[1]) / rounds if found else None


def main(arguments: list[str] | None = None) -> int:
    """Parse, look, print."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inner_loops")
    parser.add_argument("--on", nargs="+", default=list(MACHINES), metavar="TARGET")
    parser.add_argument("--weights", nargs="+", default=["dense", "coded"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    rows = []
    print("target          weight instr fused mul loads spills registers  estimated cycles / fused")
    for name in options.on:
        target = targets.get(name)
        for weight in options.weights:
            row = look(target, kernel_for(target, weight))
            rows.append(row)
            work = row.fused or row.products
            cycles = "-" if row.cycles is None else f"{row.cycles:.1f} ({row.cycles / work:.2f})"
            print(
                f"{name:15} {weight:6} {row.instructions:5} {row.fused:5} {row.products:3} "
                f"{row.loads:5} {row.spills:6} {row.registers:9}  {cycles}"
            )
    if options.json:
        head = asdict(results.begin(["benchmarks.inner_loops", *arguments]))
        rows_json = [{**asdict(row), "cycles_are": "estimated by llvm-mca"} for row in rows]
        options.json.write_text(json.dumps({**head, "rows": rows_json}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
