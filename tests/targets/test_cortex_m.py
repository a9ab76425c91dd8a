"""Microcontrollers: models on emulated boards, without an operating system or a C library."""

import re
import shutil
import struct
from pathlib import Path

import numpy as np
import onnx
import pytest
from sparsegraph.targets.target import Target

import benchmarks.prune
from benchmarks import bundles, zoo
from benchmarks.zoo.builder import Builder
from sparsegraph import explain, targets, verify
from sparsegraph.compile import Compiled, load
from tests.targets import cross

HERE = Path(__file__).parent
FLASH_KIB = {"cortex-m7": 4096, "cortex-m55": 512}  # of the boards that qemu emulates
STACK_BYTES = 8192
LINKER_SCRIPT = """
MEMORY {{
  FLASH (rx) : ORIGIN = 0x00000000, LENGTH = {flash}K
  RAM (rwx) : ORIGIN = 0x20000000, LENGTH = 512K
}}
SECTIONS {{
  .text : {{ KEEP(*(.vectors)) *(.text*) *(.rodata*) *(.got*) }} > FLASH
  .ARM.exidx : {{ *(.ARM.exidx*) }} > FLASH
  .data : {{ data_start = .; *(.data*) . = ALIGN(4); data_end = .; }} > RAM AT> FLASH
  data_load = LOADADDR(.data);
  .bss (NOLOAD) : {{ bss_start = .; *(.bss* COMMON) . = ALIGN(4); bss_end = .; }} > RAM
  stack_end = ALIGN(8);
  stack_top = stack_end + {stack};
}}
"""
PROGRAM = """#include "board.h"
#include "model.h"
#include "runtime.h"

static _Alignas(64) unsigned char workspace[SG_WORKSPACE_BYTES];
static _Alignas(64) unsigned char values[SG_BORDER_BYTES];

int main(void)
{
    static const int32_t starts[] = SG_BORDER_STARTS;
    const void *inputs[] = {values};
    void *outputs[] = {values + starts[1]};
    sg_instance model;
    read_file(INPUT, sizeof INPUT - 1, values, (uint32_t)sg_input(0, 0)->n_bytes);
    if (sg_init(&model, sg_weights, SG_WEIGHTS_BYTES, workspace, sizeof workspace) ||
        sg_instance_run(&model, inputs, outputs, 0))
        return 1;
    write_file(OUTPUT, sizeof OUTPUT - 1, outputs[0], (uint32_t)sg_output(0, 0)->n_bytes);
    return 0;
}
"""


def small_mobilenet() -> onnx.ModelProto:
    """48x48 RGB, depthwise and pointwise convolutions of 8 to 64 channels, 12 classes."""
    b = Builder("small_mobilenet", seed=0)
    x = b.conv(b.input("input", (1, 3, 48, 48)), "stem", 3, 8, 3, stride=2)
    x, c_in = b.relu(b.batch_norm(x, "stem.bn", 8)), 8
    for i, (c_out, stride) in enumerate([(16, 1), (32, 2), (32, 1), (64, 2), (64, 1)]):
        x = b.conv(x, f"{i}.depthwise", c_in, c_in, 3, stride=stride, groups=c_in)
        x = b.relu(b.batch_norm(x, f"{i}.bn1", c_in))
        x = b.relu(b.batch_norm(b.conv(x, f"{i}.pointwise", c_in, c_out, 1), f"{i}.bn2", c_out))
        c_in = c_out
    x = b.op("Flatten", b.op("GlobalAveragePool", x), axis=1)
    b.output(b.gemm(x, "classifier", c_in, 12), "output")
    return b.finish()


class SmallMobilenet(bundles.Case):
    """The small MobileNet with its pointwise convolutions pruned."""

    def __init__(self, density: float) -> None:
        pruned = benchmarks.prune.magnitude(
            small_mobilenet(), density, layers=benchmarks.prune.pointwise
        )
        self.proto = pruned
        self.feeds = zoo.feeds(pruned)
        self.expected = verify.run_onnx(load(pruned), self.feeds)


CASES = {"digits_cnn": lambda density: cross.Case("digits_cnn", density),
         "small_mobilenet": SmallMobilenet, "wide": lambda density: cross.Wide()}  # fmt: skip


def build(target: Target, compiled: Compiled, program: Path, *flags: str) -> Path:
    """`program` with the start-up code, as an image for the board."""
    folder = program.parent
    script = folder / "board.ld"
    flash = FLASH_KIB[target.name]
    script.write_text(LINKER_SCRIPT.format(flash=flash, stack=STACK_BYTES))
    image = folder / f"{program.stem}.elf"
    command = [
        target.linker[0], *cross.STRICT, "-Os", *target.c_flags, *flags, f"-I{HERE}",
        f"-I{compiled.path}", "-nostartfiles", "-ffreestanding", "-ffunction-sections",
        "-fdata-sections", "-Wl,--gc-sections", "-T", script, HERE / "board.c", program,
        compiled.path / "libmodel.a", "-lm", "-o", image,
    ]  # fmt: skip
    done = cross.execute(*command)
    assert done.returncode == 0, done.stderr
    return image


def boot(target: Target, image: Path) -> int:
    """Run the image; bytes of stack that it used."""
    options = ["-nographic", "-monitor", "none", "-semihosting-config", "enable=on,target=native"]
    done = cross.execute(*target.emulator, *options, "-kernel", image)
    found = re.search(r"stack (\d+)", done.stdout + done.stderr)
    assert done.returncode == 0, done.stdout + done.stderr
    assert found
    return int(found[1])


@pytest.mark.parametrize("name", FLASH_KIB)
@pytest.mark.parametrize(
    ("model", "density"),
    [("digits_cnn", 1.0), ("digits_cnn", 0.1), ("small_mobilenet", 0.1), ("wide", 1.0)],
)
def test_models_equal_onnx_runtime(model: str, density: float, name: str, tmp_path: Path) -> None:
    target = targets.get(name)
    cross.require(target.linker[0], target.emulator[0])
    case = CASES[model](density)
    compiled = case.compile(target, tmp_path / "m.sg")
    (tmp_path / "program.c").write_text(PROGRAM)
    (source,) = bundles.write(compiled, case.feeds, tmp_path)
    result = tmp_path / "out"
    names = [f'-DINPUT="{source}"', f'-DOUTPUT="{result}"']
    stack = boot(target, build(target, compiled, tmp_path / "program.c", *names))
    assert case.compare(compiled, [result]) <= cross.LIMIT
    assert stack < 2048


def loaded(image: Path) -> tuple[int, int]:
    """Bytes that lie in flash, and bytes of RAM that are taken before the stack."""
    data = image.read_bytes()
    (start,) = struct.unpack_from("<I", data, 28)
    size, n = struct.unpack_from("<HH", data, 42)
    headers = [struct.unpack_from("<8I", data, start + i * size) for i in range(n)]
    flash = sum(h[4] for h in headers if h[0] == 1)
    return flash, sum(h[5] for h in headers if h[0] == 1 and h[2] >= 0x20000000)


@pytest.mark.parametrize("name", FLASH_KIB)
def test_flash_and_ram_are_what_the_bundle_says(name: str, tmp_path: Path) -> None:
    target = targets.get(name)
    cross.require(target.linker[0], target.emulator[0])
    case = CASES["small_mobilenet"](0.1)
    compiled = case.compile(target, tmp_path / "m.sg")
    shutil.copyfile(compiled.path / "main.c", tmp_path / "main.c")
    image = build(target, compiled, tmp_path / "main.c")
    assert boot(target, image) < 2048
    (tmp_path / "none.c").write_text("int main(void);\nint main(void) { return 0; }\n")
    startup = loaded(build(target, compiled, tmp_path / "none.c"))
    found = np.subtract(loaded(image), startup)
    said = compiled.manifest.footprint
    assert abs(said.flash_bytes / found[0] - 1) <= 0.01
    assert abs(said.ram_bytes / found[1] - 1) <= 0.01
    text = explain.summary(compiled.manifest.model_dump(mode="json", by_alias=True))
    assert f"{said.flash_bytes / 1e3:.1f} kB of flash, {said.ram_bytes / 1e3:.1f} kB of RAM" in text


def test_the_library_needs_no_allocation_and_no_system(tmp_path: Path) -> None:
    target = targets.get("cortex-m7")
    cross.require(target.linker[0])
    compiled = CASES["digits_cnn"](0.1).compile(target, tmp_path / "m.sg")
    whole = tmp_path / "whole.o"
    link = [target.linker[0], *target.c_flags, "-nostdlib", "-r", "-Wl,--whole-archive"]
    assert cross.execute(*link, compiled.path / "libmodel.a", "-o", whole).returncode == 0
    names = cross.execute("arm-none-eabi-nm", "-u", whole).stdout.split()[1::2]
    allowed = {"memcpy", "memmove", "memset", "strlen"}
    own = {n for n in names if not n.startswith("__aeabi_") and n not in allowed}
    assert own == set(), names


def test_pruning_saves_flash(tmp_path: Path) -> None:
    target = targets.get("cortex-m7")
    cross.require(target.linker[0])
    dense, pruned = (
        CASES["digits_cnn"](d).compile(target, tmp_path / f"{d}.sg").manifest.footprint
        for d in (1.0, 0.1)
    )
    assert pruned.flash_bytes < 0.35 * dense.flash_bytes
