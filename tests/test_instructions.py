"""Counting instructions: of a module written by hand, of a program, of pruned models."""

from pathlib import Path

import pytest

from benchmarks import bundles, instructions, wasm_counter
from sparsegraph import targets
from tests.targets import cross

ROUNDS = 10
BODY = bytes([
    1, 1, 0x7F,                     # one local of type i32
    0x03, 0x40,                     # loop
    0xFD, 12, *range(16), 0x1A,     # v128.const, drop
    0x20, 0, 0x41, 1, 0x6A, 0x22, 0,  # local.get, i32.const 1, i32.add, local.tee
    0x41, ROUNDS, 0x49,             # i32.const, i32.lt_u
    0x0D, 0,                        # br_if
    0x0B,                           # end
    0x20, 0, 0x04, 0x7F,            # local.get, if
    0x41, 7, 0x05,                  # i32.const, else
    0x41, 8, 0x41, 8, 0x6A, 0x0B,   # never: i32.const, i32.const, i32.add, end
    0x0B,
])  # fmt: skip
PER_ROUND, AFTER = 9, 3
RUN = """
import { readFileSync } from "node:fs";
const { exports } = await WebAssembly.instantiate(
    await WebAssembly.compile(readFileSync(process.argv[2])), {});
console.log(exports.f(), exports.executed.value, exports.f(), exports.executed.value);
"""


def module(body: bytes) -> bytes:
    """One exported function `f` without arguments that returns an i32, and one global."""

    def section(kind: int, content: bytes) -> bytes:
        return bytes([kind, len(content)]) + content

    return b"".join([
        b"\0asm\1\0\0\0",
        section(1, bytes([1, 0x60, 0, 1, 0x7F])),
        section(3, bytes([1, 0])),
        section(6, bytes([1, 0x7F, 0, 0x41, 5, 0x0B])),
        section(7, bytes([1, 1]) + b"f" + bytes([0, 0])),
        section(10, bytes([1, len(body)]) + body),
    ])  # fmt: skip


def test_a_module_counts_what_it_executes(tmp_path: Path) -> None:
    cross.require("node")
    (tmp_path / "m.wasm").write_bytes(wasm_counter.counting(module(BODY)))
    (tmp_path / "run.mjs").write_text(RUN)
    done = cross.execute("node", tmp_path / "run.mjs", tmp_path / "m.wasm")
    once = PER_ROUND * ROUNDS + AFTER
    assert done.stdout.split() == ["7", f"{once}n", "7", f"{2 * once}n"], done.stderr


def test_unknown_instructions_are_errors() -> None:
    with pytest.raises(ValueError, match="opcode 0xfb"):
        wasm_counter.counting(module(bytes([0, 0xFB, 0, 0x0B])))


@pytest.mark.parametrize("n", [1, 63, 64, 127, 128, 8191, 8192, 100_000])
def test_signed_numbers(n: int) -> None:
    data = wasm_counter._signed(n)
    value = sum((byte & 0x7F) << 7 * i for i, byte in enumerate(data))
    assert value == n
    assert not data[-1] & 0x40
    assert all(byte & 0x80 for byte in data[:-1])


def test_the_plugin_counts_rounds_of_a_loop(tmp_path: Path) -> None:
    cross.require("aarch64-linux-gnu-gcc", "qemu-aarch64", "cc")
    (tmp_path / "main.c").write_text("""#include <stdlib.h>
        int main(int argc, char **argv)
        {
            for (long n = argc > 3 ? atol(argv[3]) * 100000 : 0; n; n--)
                __asm__ volatile("nop\\n nop\\n nop");
            return 0;
        }""")
    target = targets.get("aarch64")
    (tmp_path / "m.sg").mkdir()
    (tmp_path / "m.sg" / "bench.c").write_bytes((tmp_path / "main.c").read_bytes())
    empty = "#include <stddef.h>\nconst char model = 0;\n"
    (tmp_path / "empty.c").write_text(empty)
    library = tmp_path / "m.sg" / "model.so"
    command = ["aarch64-linux-gnu-gcc", "-shared", "-fPIC", tmp_path / "empty.c", "-o", library]
    assert cross.execute(*command).returncode == 0
    found = instructions.count_native(target, tmp_path / "m.sg")
    assert 5 * 100_000 <= found <= 5 * 100_000 + 200  # three nops, a subtraction, a branch


@pytest.mark.slow
@pytest.mark.parametrize("name", ["aarch64", "wasm"])
def test_most_instructions_of_a_pruned_model_are_gone(name: str) -> None:
    target = targets.get(name)
    cross.require(*target.linker, *target.emulator[:1])
    model = bundles.Model("minilm", {"sequence": 64, "layers": 1})
    count = instructions.measure(model, target, instructions.DENSITY)
    assert 0.05 < count.ratio <= instructions.BAR
