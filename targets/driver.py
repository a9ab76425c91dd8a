"""The C text that calls a model's kernels in order: tables for `runtime.c`, one function a step.

A library may hold the model several times, as codes for CPUs with different features.

All addresses are literals: inputs and outputs by index, weights by their place in the weight file,
temporaries by their place in the arena. `driver.h` declares the tables.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from sparsegraph.targets import emit
from sparsegraph.targets.kernel import Kernel

from sparsegraph.memory import MemoryPlan, scratch_sizes
from sparsegraph.program import Arg, Program, Ref, Scratch, Step, Tensor

ONNX_TYPES = {
    "float32": 1, "uint8": 2, "int8": 3, "uint16": 4, "int16": 5, "int32": 6, "int64": 7,
    "bool": 9, "float16": 10, "float64": 11,
}  # fmt: skip


@dataclass(frozen=True)
class Segment:
    """A program whose buffers have their places.

    Attributes:
        memory: places of the temporaries.
        weights: weight name -> byte offset in the weight file.
    """

    program: Program
    memory: MemoryPlan
    weights: Mapping[str, int]


@dataclass(frozen=True)
class Code:
    """The model for one kind of CPU.

    Attributes:
        features: CPU features that its kernels use, in LLVM's words.
        suffix: what its kernels' names end with, so that several codes fit into one library.
    """

    segments: Sequence[Segment]
    features: tuple[str, ...] = ()
    suffix: str = ""

    @property
    def kernels(self) -> dict[str, Kernel]:
        """Every kernel that it calls, by name."""
        return unique_kernels([segment.program for segment in self.segments])


def unique_kernels(programs: Sequence[Program]) -> dict[str, Kernel]:
    """Every kernel that the programs call, by name, in alphabetical order."""
    kernels: dict[str, Kernel] = {}
    for program in programs:
        for step in program.steps:
            known = kernels.setdefault(step.kernel.name, step.kernel)
            assert known == step.kernel, f"two kernels share the name {known.name}"
    return dict(sorted(kernels.items()))


def generate(codes: Sequence[Code], weight_file_bytes: int) -> str:
    """The driver of a model; equal arguments give equal text.

    Args:
        codes: the best first; all have the same number of segments.
    """
    counts = {len(code.segments) for code in codes}
    assert len(counts) == 1, f"codes with {sorted(counts)} segments"
    prototypes = [
        emit.c_declaration(name + code.suffix, kernel.params)
        for code in codes
        for name, kernel in code.kernels.items()
    ]
    parts = [
        '#include "driver.h"\n\n#include <math.h>\n#include <stddef.h>\n',
        "#pragma GCC visibility push(hidden)",
        *prototypes,
        "#pragma GCC visibility pop\n",
    ]
    for i, code in enumerate(codes):
        parts += _code_text(i, code)
    rows = [f"    {{segments_{i}, features_{i}}}" for i in range(len(codes))]
    parts += [
        f"const sg_code sg_codes[] = {{\n{_lines(rows)}\n}};",
        f"const int32_t sg_code_count = {len(codes)};",
        f"const int32_t sg_segment_count = {counts.pop()};",
        f"const int64_t sg_weight_file_bytes = {weight_file_bytes};\n",
    ]
    return "\n".join(parts)


def _code_text(i: int, code: Code) -> list[str]:
    parts = []
    for j, segment in enumerate(code.segments):
        parts += _segment_text(f"{i}_{j}", segment, code.suffix)
    rows = [_segment_row(f"{i}_{j}", segment) for j, segment in enumerate(code.segments)]
    words = ", ".join([*map(c_string, code.features), "NULL"])
    return [
        *parts,
        f"static const sg_segment segments_{i}[] = {{\n{_lines(rows) or '    {0}'}\n}};",
        f"static const char *const features_{i}[] = {{{words}}};\n",
    ]


def _lines(rows: Sequence[str]) -> str:
    return ",\n".join(rows)


def step_name(step: Step) -> str:
    """What people read in a profile: the ONNX nodes of a step."""
    return ", ".join(step.nodes) or step.kernel.name


def _segment_text(i: str, segment: Segment, suffix: str) -> list[str]:
    program = segment.program
    starts = segment.memory.scratch_starts
    parts = [
        _step_text(f"step_{i}_{j}", step, start, segment, suffix)
        for j, (step, start) in enumerate(zip(program.steps, starts, strict=True))
    ]
    parts += _tensors_text(f"inputs_{i}", program.inputs)
    parts += _tensors_text(f"outputs_{i}", program.outputs)
    if program.steps:
        lengths = {run.start: len(run) for run in program.runs()}
        rows = ",\n".join(
            f"    {{step_{i}_{j}, {s.items}, {lengths.get(j, 0)}, {c_string(step_name(s))}}}"
            for j, s in enumerate(program.steps)
        )
        parts.append(f"static const sg_step steps_{i}[] = {{\n{rows}\n}};\n")
    return parts


def _segment_row(i: str, segment: Segment) -> str:
    program, memory = segment.program, segment.memory
    inputs = f"inputs_{i}" if program.inputs else "NULL"
    outputs = f"outputs_{i}" if program.outputs else "NULL"
    steps = f"steps_{i}" if program.steps else "NULL"
    counts = f"{len(program.inputs)}, {len(program.outputs)}, {len(program.steps)}"
    sizes = f"{memory.arena_bytes}, {memory.scratch_bytes}"
    return f"    {{{inputs}, {outputs}, {steps}, {counts}, {sizes}}}"


def _tensors_text(name: str, tensors: Sequence[Tensor]) -> list[str]:
    if not tensors:
        return []
    shapes, rows = [], []
    for i, t in enumerate(tensors):
        extents = ", ".join(map(str, t.shape)) or "0"
        shapes.append(f"static const int64_t {name}_{i}[] = {{{extents}}};")
        head = f"{c_string(t.name)}, {ONNX_TYPES[t.dtype]}, {len(t.shape)}"
        rows.append(f"    {{{head}, {name}_{i}, {t.n_bytes}}}")
    table = ",\n".join(rows)
    return [*shapes, f"static const sg_tensor {name}[] = {{\n{table}\n}};\n"]


def _step_text(name: str, step: Step, scratch_start: int, segment: Segment, suffix: str) -> str:
    kernel = step.kernel
    assert len(step.args) == len(kernel.params), f"{kernel.name}: arguments do not match"
    assert 0 <= step.items < 1 << 31, f"{kernel.name}: {step.items} items"
    scratch = iter(_starts(scratch_sizes(step)))
    values = []
    for param, arg in zip(kernel.params, step.args):
        if isinstance(arg, Scratch):
            assert param.is_pointer, f"{kernel.name}.{param.name} is no pointer"
            values.append(_pointer(param, f"c->scratch + {scratch_start + next(scratch)}"))
        elif isinstance(arg, Ref):
            assert param.is_pointer, f"{kernel.name}.{param.name} is no pointer"
            values.append(_pointer(param, _address(param, arg, segment)))
        else:
            values.append(_scalar(param, arg))
    call = ", ".join([*values, "begin", "end"])
    return (
        f"static void {name}(const sg_call *c, int32_t begin, int32_t end)\n"
        f"{{\n    {kernel.name}{suffix}({call});\n}}\n"
    )


def _starts(sizes: Sequence[int]) -> list[int]:
    return [sum(sizes[:i]) for i in range(len(sizes))]


def _pointer(param: emit.Param, address: str) -> str:
    return f"({emit.C_TYPES[param.dtype]} *)({address})"


def _address(param: emit.Param, ref: Ref, segment: Segment) -> str:
    """C expression for an element of a buffer; the element must lie in the buffer."""
    program, start = segment.program, ref.offset * np.dtype(param.dtype).itemsize
    tensors = {"inputs": program.inputs, "outputs": program.outputs}
    for table, members in tensors.items():
        for i, tensor in enumerate(members):
            if tensor.name == ref.buffer:
                assert 0 <= start <= tensor.n_bytes, f"{ref} lies outside {tensor}"
                return f"(char *)c->{table}[{i}] + {start}"
    if ref.buffer in segment.weights:
        weight = program.weights[ref.buffer]
        assert 0 <= start <= weight.nbytes, f"{ref} lies outside the weight {weight.shape}"
        assert weight.dtype == param.dtype, f"{ref} is {weight.dtype}, need {param.dtype}"
        return f"c->weights + {segment.weights[ref.buffer] + start}"
    if ref.buffer in segment.memory.panels:
        assert 0 <= start <= program.panels[ref.buffer], f"{ref} lies outside its panel"
        return f"c->scratch + {segment.memory.panels[ref.buffer] + start}"
    assert ref.buffer in segment.memory.offsets, f"{ref} names no buffer of the program"
    assert 0 <= start <= program.temporaries[ref.buffer], f"{ref} lies outside its buffer"
    return f"c->arena + {segment.memory.offsets[ref.buffer] + start}"


def _scalar(param: emit.Param, value: Arg) -> str:
    """An exact C literal."""
    assert isinstance(value, int | float), f"{param.name}: {value!r}"
    assert not param.is_pointer, f"{param.name} is a pointer"
    if param.dtype == "float32":
        return _float(float(np.float32(value)))
    assert param.dtype == "int32", f"{param.name}: scalars of type {param.dtype} are not used"
    assert value == int(value), f"{param.name}: {value}"
    assert -(1 << 31) < value < 1 << 31, f"{param.name}: {value}"
    return str(int(value))


def _float(value: float) -> str:
    if math.isnan(value):
        return "NAN"
    if math.isinf(value):
        return "INFINITY" if value > 0 else "-INFINITY"
    return value.hex() + "f"


def c_string(text: str) -> str:
    """A C string literal; everything but plain characters as octal bytes."""
    plain = set(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 _-./:,()[]")
    escaped = "".join(chr(b) if b in plain else f"\\{b:03o}" for b in text.encode())
    return f'"{escaped}"'
