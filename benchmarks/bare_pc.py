"""Runs a bundle for x86-64 on a CPU that this machine is not: a PC that the emulator Bochs models.

    python benchmarks/bare_pc.py [--cpu MODEL] BUNDLE INPUTS... OUTPUTS...

qemu-user has no AVX-512, Bochs has. It emulates a whole computer, but this one needs no operating
system: its firmware (`pc/boot.S`) enables the vector registers and calls a program
(`pc/program.c`) that loads the bundle's `model.so`, unchanged, as a dynamic linker would.

Exit codes: 0 the outputs are written, 1 the model or the emulator failed, 2 wrong usage.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

EMULATOR = "bochs"
HERE = Path(__file__).with_name("pc")
CPUS = {"x86-64-v4": "corei7_skylake_x", "x86-64-v3": "corei7_haswell_4770"}
"""Target -> the CPU of Bochs with just its features."""
TIMEOUT_S = 900
_PROGRAM, _LIBRARY, _IMAGE, _WEIGHTS, _VALUES = 16 << 20, 32 << 20, 48 << 20, 64 << 20, 512 << 20
_MEMORY_MIB, _SECTOR, _CYLINDER = 1024, 512, 16 * 63
_OPTIONS = """config_interface: textconfig
display_library: term
romimage: file=rom, address=0xffff0000
memory: guest={memory}, host={memory}
cpu: model={cpu}, count=1, reset_on_triple_fault=0
optramimage1: file=program, address={program:#x}
ata0-master: type=disk, mode=flat, path=disk
port_e9_hack: enabled=1
panic: action=fatal
log: log
"""


class Failed(RuntimeError):
    """The program on the emulated machine ended with an error, or not at all."""


def run(bundle: Path, inputs: list[bytes], cpu: str) -> tuple[int, list[bytes]]:
    """The number of the code that the library picked for this CPU, and the model's outputs.

    Raises:
        Failed: says why.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _build(bundle, folder)
        files = [(bundle / name).read_bytes() for name in ("model.so", "weights.bin")]
        (folder / "disk").write_bytes(_disk([*files, *inputs]))
        options = _OPTIONS.format(memory=_MEMORY_MIB, cpu=cpu, program=_PROGRAM)
        (folder / "options").write_text(options)
        (folder / "go").write_text("continue\n")  # Debian's Bochs begins in its debugger
        done = subprocess.run(
            [EMULATOR, "-q", "-f", "options", "-rc", "go"],
            cwd=folder, env={**os.environ, "TERM": "xterm"}, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, errors="replace", check=False, timeout=TIMEOUT_S,
        )  # fmt: skip
        return _read(done.stdout + "\n" + done.stderr)


def _disk(files: list[bytes]) -> bytes:
    """Every file begins a sector; the whole is a multiple of what Bochs takes for a cylinder."""
    data = b"".join(x + bytes(-len(x) % _SECTOR) for x in files)
    return data + bytes(-len(data) % (_SECTOR * _CYLINDER))


def _read(text: str) -> tuple[int, list[bytes]]:
    lines = text.splitlines()
    at = [i for i, line in enumerate(lines) if line.startswith("code ")]
    if not at:
        errors = [line for line in lines if line.startswith("error: ")]
        raise Failed(errors[0] if errors else f"no answer from {EMULATOR}: {text[-500:]}")
    outputs = [line.removeprefix("output ") for line in lines if line.startswith("output ")]
    return int(lines[at[0]].removeprefix("code ")), [bytes.fromhex(x) for x in outputs]


def _build(bundle: Path, folder: Path) -> None:
    """Firmware and program as flat images."""
    flat = ("-nostdlib", "-static", "-no-pie", "-Wl,--oformat=binary,--build-id=none")
    places = {
        "LIBRARY_AT": _LIBRARY, "IMAGE_AT": _IMAGE, "WEIGHTS_AT": _WEIGHTS, "VALUES_AT": _VALUES,
        "LIBRARY_BYTES": (bundle / "model.so").stat().st_size,
    }  # fmt: skip
    boot = ["-Wl,-Ttext=0,-e,0", f"-DPROGRAM={_PROGRAM:#x}", str(HERE / "boot.S")]
    program = [
        "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-ffreestanding", "-fno-pie",
        "-fno-stack-protector", "-fno-tree-loop-distribute-patterns", f"-I{bundle}",
        f"-Wl,--defsym=PROGRAM={_PROGRAM:#x},-T,{HERE / 'program.ld'},-e,start",
        *(f"-D{name}={place:#x}" for name, place in places.items()), str(HERE / "program.c"),
    ]  # fmt: skip
    for words, output in ((boot, "rom"), (program, "program")):
        subprocess.run(["gcc", *flat, *words, "-o", str(folder / output)], check=True)


def can_run(target: str) -> bool:
    """True if the emulator is installed and models a CPU for the target."""
    return target in CPUS and shutil.which(EMULATOR) is not None


def main() -> int:
    """Parse, run, write; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cpu", default=CPUS["x86-64-v4"], help="as `bochs --help cpu` lists them")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    given = parser.parse_args()
    manifest = json.loads((given.bundle / "manifest.json").read_text())
    n = len(manifest["inputs"])
    if len(given.files) != n + len(manifest["outputs"]):
        parser.error(f"need {n} inputs and {len(manifest['outputs'])} outputs")
    try:
        _, outputs = run(given.bundle, [f.read_bytes() for f in given.files[:n]], given.cpu)
    except Failed as error:
        print(error, file=sys.stderr)
        return 1
    for file, data in zip(given.files[n:], outputs, strict=True):
        file.write_bytes(data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
