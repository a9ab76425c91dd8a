"""What a bundle holds: the C interface, its sizes, the CMake file, equal bytes of equal builds."""

import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sparsegraph.targets import bundle, link

from sparsegraph import artefact, targets
from tests import sample_program as sample
from tests.targets import cross

RUNTIME_LIMIT = 40_000  # bytes of a stripped library without kernels and weights
NO_MODEL = """#include "driver.h"
#include <stddef.h>
static const sg_segment none[] = {{0}};
static const char *const features[] = {NULL};
const sg_code sg_codes[] = {{none, features}};
const int32_t sg_code_count = 1;
const int32_t sg_segment_count = 0;
const int64_t sg_weight_file_bytes = 0;
"""
CHECKS = """#include "runtime.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(condition) do { if (!(condition)) { puts(#condition); return 1; } } while (0)

int main(void)
{
    sg_instance a, b;
    int64_t n = sg_weights_bytes(), room = sg_workspace_bytes(0, 1);
    char *weights = calloc((size_t)n + 64, 1), *aligned = weights + (-(uintptr_t)weights & 63);
    char *space[2] = {malloc((size_t)room), malloc((size_t)room)};
    CHECK(sg_init(NULL, aligned, n, space[0], room) == SG_BAD_ARGUMENT);
    CHECK(sg_init(&a, NULL, n, space[0], room) == SG_BAD_ARGUMENT);
    CHECK(!strcmp(sg_last_error(&a), "a null pointer"));
    CHECK(sg_init(&a, aligned, n - 1, space[0], room) == SG_BAD_ARGUMENT);
    CHECK(strstr(sg_last_error(&a), "wrong size"));
    CHECK(sg_init(&a, aligned + 1, n, space[0], room) == SG_BAD_ARGUMENT);
    CHECK(strstr(sg_last_error(&a), "aligned"));
    CHECK(sg_init(&a, aligned, n, space[0], room - 1) == SG_BAD_ARGUMENT);
    CHECK(strstr(sg_last_error(&a), "workspace"));
    CHECK(sg_instance_run(&a, NULL, NULL, NULL) == SG_BAD_ARGUMENT);
    CHECK(strstr(sg_last_error(&a), "sg_init"));
    CHECK(sg_init(&a, aligned, n, space[0], room) == SG_OK);
    CHECK(sg_init(&b, aligned, n, space[1], room) == SG_OK);
    CHECK(!strcmp(sg_last_error(&a), "ok"));
    CHECK(sg_instance_run(&a, NULL, NULL, NULL) == SG_BAD_ARGUMENT);
    CHECK(strstr(sg_last_error(&a), "null pointer"));
    const void *inputs[2] = {calloc(1, (size_t)sg_input(0, 0)->n_bytes),
                             calloc(1, (size_t)sg_input(0, 1)->n_bytes)};
    void *outputs[2] = {calloc(1, (size_t)sg_output(0, 0)->n_bytes),
                        calloc(1, (size_t)sg_output(0, 1)->n_bytes)};
    CHECK(sg_instance_run(&b, inputs, outputs, NULL) == SG_OK);
    CHECK(!strcmp(sg_last_error(&b), "ok"));
    CHECK(((float *)outputs[0])[0] == -3.0F); /* -(0 + id + shift) with weights of zero */
    sg_pool *pool = NULL;
    if (sg_pool_create(2, &pool) == SG_OK) {
        CHECK(sg_instance_run(&b, inputs, outputs, pool) == SG_BAD_ARGUMENT);
        CHECK(strstr(sg_last_error(&b), "threads"));
        sg_pool_destroy(pool);
    }
    for (int i = 0; i < 2; i++) {
        free((void *)inputs[i]);
        free(outputs[i]);
        free(space[i]);
    }
    free(weights);
    return 0;
}
"""
WRITE = """
import sys
from sparsegraph import artefact, targets
from tests import sample_program as sample
artefact.write(sample.plan(), targets.get(sys.argv[1]), sys.argv[2], sample.META)
"""


@pytest.mark.parametrize("name", ["native", "c11"])
def test_instances_check_what_they_are_given(name: str, tmp_path: Path) -> None:
    model = tmp_path / "m.sg"
    artefact.write(sample.plan(), targets.get(name), model, sample.META)
    (model / "main.c").write_text(CHECKS)
    if name == "c11":
        cross.require("gcc")
        program = cross.build_source(model, "gcc", "-g", "-fsanitize=address,undefined")
    else:
        program = cross.build_runner(targets.get(name), model)
    done = cross.execute(program)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def loaded_bytes(library: Path) -> int:
    """What the file's loadable segments hold; AArch64 files are padded to pages of 64 KiB."""
    data = library.read_bytes()
    (start,) = struct.unpack_from("<Q", data, 32)  # e_phoff of ELF64
    size, n = struct.unpack_from("<HH", data, 54)  # e_phentsize, e_phnum
    headers = [struct.unpack_from("<IIQQQQ", data, start + i * size) for i in range(n)]
    return sum(file_size for kind, _, _, _, _, file_size in headers if kind == 1)  # PT_LOAD


@pytest.mark.parametrize("name", ["native", "aarch64"])
def test_runtime_is_small(name: str, tmp_path: Path) -> None:
    target = targets.get(name)
    if not targets.runs_here(target):
        cross.require(*target.linker[:1])
    (tmp_path / "driver.c").write_text(NO_MODEL)
    sources = [*(bundle.SOURCES / f for f in bundle.RUNTIME), tmp_path / "driver.c"]
    link.shared_library([], sources, target, tmp_path / "runtime.so")
    assert 1000 < loaded_bytes(tmp_path / "runtime.so") <= RUNTIME_LIMIT


@pytest.mark.parametrize("name", ["native", "c11"])
def test_cmake_builds_the_example(name: str, tmp_path: Path) -> None:
    cross.require("cmake")
    model, build = tmp_path / "m.sg", tmp_path / "build"
    artefact.write(sample.plan(), targets.get(name), model, sample.META)
    for command in (["cmake", "-S", model, "-B", build], ["cmake", "--build", build]):
        done = cross.execute(*command)
        assert done.returncode == 0, done.stdout + done.stderr
    feed = sample.feed()
    paths = [tmp_path / n for n in ("x", "ids", "y", "middle")]
    feed["x"].tofile(paths[0])
    feed["ids"].tofile(paths[1])
    done = cross.execute(build / "example", model / "weights.bin", 1, *paths)
    assert done.returncode == 0, done.stderr
    for path, expected in zip(paths[2:], sample.reference(feed["x"], feed["ids"]), strict=True):
        found = np.fromfile(path, np.float32).reshape(sample.ROWS, sample.WIDTH)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["aarch64", "wasm", "c11"])
def test_builds_are_equal_bytes(name: str, tmp_path: Path) -> None:
    target = targets.get(name)
    cross.require(*(target.linker if target.output == "wasm" else target.linker[:1]))
    builds = []
    for seed, folder in (("1", tmp_path / "a"), ("2", tmp_path / "other" / "deeper")):
        folder.mkdir(parents=True)
        subprocess.run(
            [sys.executable, "-c", WRITE, name, folder / "m.sg"],
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=Path(__file__).parents[2],
        )
        builds.append({p.name: p.read_bytes() for p in sorted((folder / "m.sg").iterdir())})
    assert builds[0] == builds[1]
    assert len(builds[0]) >= 6
