"""What a bundle holds beside weights and manifest: library, module or source, and how to use it.

library    model.so                                   runtime.h  main.c  bench.c  CMakeLists.txt
wasm       model.wasm  model.mjs  model.d.mts  index.html
bare       libmodel.a  model.h                        runtime.h  main.c  CMakeLists.txt
c          kernels.c  driver.c  the runtime's files   runtime.h  main.c  bench.c  CMakeLists.txt
           weights.c
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from sparsegraph.targets import c_source, link
from sparsegraph.targets.driver import Segment
from sparsegraph.targets.target import Target

SOURCES = Path(__file__).parent
LIBRARY, MODULE, ARCHIVE = "model.so", "model.wasm", "libmodel.a"
RUNTIME = ("runtime.c", "pool.c", "cpu.c", "instance.c")
BARE_RUNTIME = ("runtime.c", "bare.c", "instance.c")
LINE = 64  # alignment of workspace, inputs and outputs in the example
ARRAY_LIMIT = 8 << 20  # bytes of weights as a C array: larger ones take compilers gigabytes

_CMAKE_BARE = """cmake_minimum_required(VERSION 3.13)
project(model C)
set(CMAKE_C_STANDARD 11)
{library}
add_executable(example main.c)
target_link_libraries(example PRIVATE model)
"""
_CMAKE = (
    _CMAKE_BARE
    + """add_executable(bench bench.c)
target_link_libraries(bench PRIVATE model)
"""
)
_SHARED = """add_library(model INTERFACE)
target_include_directories(model INTERFACE ${CMAKE_CURRENT_LIST_DIR})
target_link_libraries(model INTERFACE ${CMAKE_CURRENT_LIST_DIR}/model.so)"""
_ARCHIVE = """add_library(model INTERFACE)
target_include_directories(model INTERFACE ${CMAKE_CURRENT_LIST_DIR})
target_link_libraries(model INTERFACE ${CMAKE_CURRENT_LIST_DIR}/libmodel.a m)"""
_STATIC = """add_library(model STATIC {files})
target_include_directories(model PUBLIC ${{CMAKE_CURRENT_LIST_DIR}})
target_link_libraries(model PUBLIC m)"""


def write_library(objects: Sequence[Path], driver: Path, target: Target, folder: Path) -> None:
    """The shared library, and an example that uses it."""
    sources = [*(SOURCES / name for name in RUNTIME), driver]
    link.shared_library(objects, sources, target, folder / LIBRARY)
    _write_example(folder, _SHARED)


def write_wasm(objects: Sequence[Path], driver: Path, target: Target, folder: Path) -> None:
    """The module and its loader."""
    sources = [*(SOURCES / name for name in (*BARE_RUNTIME, "bare_memory.c")), driver]
    link.wasm_module(objects, sources, target, folder / MODULE)
    for name in ("model.mjs", "model.d.mts", "index.html"):
        shutil.copyfile(SOURCES / name, folder / name)


def write_bare(
    objects: Sequence[Path],
    driver: Path,
    target: Target,
    folder: Path,
    segment: Segment,
) -> tuple[int, int]:
    """The static library with the weights inside, and an example without an operating system.

    Returns:
        Bytes of flash and of RAM that the example takes, without start-up code and stack.
    """
    sources = [*(SOURCES / name for name in BARE_RUNTIME), driver]
    weights, library = folder / "weights.bin", folder / ARCHIVE
    link.static_library(objects, sources, weights, target, library)
    (folder / "model.h").write_text(_model_header(segment, weights.stat().st_size))
    (folder / "CMakeLists.txt").write_text(_CMAKE_BARE.format(library=_ARCHIVE))
    shutil.copyfile(SOURCES / "mcu.c", folder / "main.c")
    shutil.copyfile(SOURCES / "runtime.h", folder / "runtime.h")
    return link.footprint(library, folder / "main.c", target)


def _model_header(segment: Segment, weights_bytes: int) -> str:
    """Sizes that a program without allocation has to know when it is compiled."""
    program, memory = segment.program, segment.memory
    starts, end = [], 0
    for tensor in (*program.inputs, *program.outputs):
        starts.append(end)
        end += -(-tensor.n_bytes // LINE) * LINE
    numbers = {
        "N_INPUTS": len(program.inputs),
        "N_OUTPUTS": len(program.outputs),
        "WEIGHTS_BYTES": weights_bytes,
        "WORKSPACE_BYTES": memory.arena_bytes + memory.scratch_bytes + LINE,
        "BORDER_BYTES": end,
        "BORDER_STARTS": "{" + ", ".join(map(str, starts)) + "}",
    }
    lines = [f"#define SG_{name} {number}" for name, number in numbers.items()]
    array = "extern const unsigned char sg_weights[SG_WEIGHTS_BYTES]; /* in libmodel.a */"
    head = "/* Sizes of the model; inputs and outputs lie one behind the other, on cache lines. */"
    return "\n".join([head, "#ifndef SG_MODEL_H", "#define SG_MODEL_H", *lines, array, "#endif\n"])


def write_source(kernels: Sequence[Path], driver: Path, folder: Path, weights: Path) -> None:
    """C files that build without anything else; small weights also as an array."""
    files = ["kernels.c", "driver.c", *BARE_RUNTIME]
    (folder / "kernels.c").write_text(c_source.kernels_text(k.read_text() for k in kernels))
    shutil.copyfile(driver, folder / "driver.c")
    for name in (*BARE_RUNTIME, "driver.h", "portable.h"):
        shutil.copyfile(SOURCES / name, folder / name)
    if weights.stat().st_size <= ARRAY_LIMIT:
        (folder / "weights.c").write_text(c_source.array_text("sg_weights", weights.read_bytes()))
    _write_example(folder, _STATIC.format(files=" ".join(files)))


def _write_example(folder: Path, library: str) -> None:
    (folder / "CMakeLists.txt").write_text(_CMAKE.format(library=library))
    shutil.copyfile(SOURCES / "runner.c", folder / "main.c")
    for name in ("bench.c", "runtime.h"):
        shutil.copyfile(SOURCES / name, folder / name)
