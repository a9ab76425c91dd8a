"""Code for several CPUs in one library, and what happens on a CPU that runs none of it."""

import re
from pathlib import Path

import numpy as np
import pytest
from sparsegraph.targets import bundle

from sparsegraph import artefact, loading, runtime, targets
from sparsegraph.compile import Compiled
from sparsegraph.errors import ArtefactError, UnsupportedError
from tests import sample_program as sample
from tests.targets import cross

LEVELS = "x86-64-v4+x86-64-v2+x86-64-v3"
WHICH = """#include "runtime.h"
#include <stdio.h>
#include <stdlib.h>

int main(void)
{
    static char workspace[1 << 22];
    _Alignas(64) static char weights[1 << 22];
    const char *missing = sg_missing_feature();
    sg_instance model;
    int32_t status = sg_init(&model, weights, sg_weights_bytes(), workspace, sizeof workspace);
    const void *inputs[2] = {workspace, workspace};
    void *outputs[2] = {workspace, workspace};
    printf("%d %s %d %s | ", (int)sg_code_index(), missing ? missing : "-", (int)status,
           sg_last_error(&model));
    if (missing)
        printf("%d %s", (int)sg_run(0, weights, workspace, inputs, outputs, NULL),
               sg_status_text(sg_run(0, weights, workspace, inputs, outputs, NULL)));
    return 0;
}
"""


@pytest.fixture(scope="module")
def levels(tmp_path_factory: pytest.TempPathFactory) -> tuple[cross.Case, Compiled]:
    """The digits CNN for three levels of x86-64."""
    target = targets.get("x86-64-v2")
    if not targets.runs_here(target):
        pytest.skip("this machine is no x86-64")
    path = tmp_path_factory.mktemp("levels") / "m.sg"
    case = cross.Case("digits_cnn", 0.1)
    return case, case.compile(LEVELS, path)


def test_the_best_comes_first() -> None:
    assert [t.name for t in targets.codes(LEVELS)] == ["x86-64-v4", "x86-64-v3", "x86-64-v2"]
    assert [t.name for t in targets.codes("wasm")] == ["wasm"]


@pytest.mark.parametrize(
    "text", ["x86-64-v3+aarch64", "wasm+x86-64-v2", "c11+wasm", "x86-64-v3+x86-64-v3"]
)
def test_codes_of_one_library_include_each_other(text: str) -> None:
    with pytest.raises(UnsupportedError, match="one bundle per target"):
        targets.codes(text)


@pytest.mark.parametrize(("cpu", "index"), [("Nehalem", 2), ("Haswell", 1), ("Opteron_G1", -1)])
def test_the_cpu_picks_the_code(
    cpu: str, index: int, levels: tuple[cross.Case, Compiled], tmp_path: Path
) -> None:
    cross.require("qemu-x86_64")
    case, compiled = levels
    model = compiled.path
    program = tmp_path / "which"
    (tmp_path / "which.c").write_text(WHICH)
    build = ["cc", *cross.STRICT, f"-I{model}", f"-L{model}", tmp_path / "which.c", "-l:model.so"]
    assert cross.execute(*build, f"-Wl,-rpath,{model}", "-o", program).returncode == 0
    said = cross.execute("qemu-x86_64", "-cpu", cpu, program).stdout
    if index >= 0:
        assert said.startswith(f"{index} - 0 ok")
        runner = cross.build_runner(targets.get("x86-64-v2"), model)
        case.check(compiled, "qemu-x86_64", "-cpu", cpu, runner, model / "weights.bin", 1)
    else:
        assert re.fullmatch(
            r"-1 (\S+) 4 the CPU lacks \1 \| 4 the CPU lacks a feature that the code needs", said
        )


def test_python_takes_the_same_code(levels: tuple[cross.Case, Compiled]) -> None:
    case, compiled = levels
    session = runtime.InferenceSession(compiled.path)
    best = next(t for t in targets.codes(LEVELS) if targets.runs_here(t))
    assert session.target == best.name
    (found,) = session.run(None, case.feeds)
    (expected,) = case.expected.values()
    assert np.abs(found - expected).max() <= cross.LIMIT * np.abs(expected).max()
    kernels = {step.kernel for step in session.profile(case.feeds)}
    assert any(f"_l{best.lanes}" in kernel for kernel in kernels)


def test_weights_that_are_alike_are_stored_once(levels: tuple[cross.Case, Compiled]) -> None:
    case, compiled = levels
    alone = [case.compile(t, compiled.path.with_name(f"{t}.sg")) for t in LEVELS.split("+")]
    assert compiled.weight_bytes < 0.9 * sum(one.weight_bytes for one in alone)


def test_every_feature_is_known_to_the_check() -> None:
    text = (bundle.SOURCES / "cpu.c").read_text()
    known = set(re.findall(r'\{"([\w.]+)",', text))
    for target in targets.KNOWN.values():
        if target.output == "library":
            assert {f.name for f in target.known_features} | targets.features(target) <= known


@pytest.mark.parametrize(
    ("name", "cpu", "missing"),
    [
        ("aarch64-sve256", "max,sve-max-vq=1", "sve256b"),
        ("raspberry-pi-5", "cortex-a53", "dotprod"),
        ("riscv64-v256", "rv64,v=true,vext_spec=v1.0,vlen=128", "zvl256b"),
        ("riscv64-v128", "rv64", "v"),
        ("cortex-a7", "cortex-a9", "vfp4"),
    ],
)
def test_a_cpu_that_lacks_a_feature_is_refused(
    name: str, cpu: str, missing: str, tmp_path: Path
) -> None:
    target = targets.get(name)
    cross.require_for(target)
    if targets.runs_here(target):
        pytest.skip("this machine has the feature")
    model = tmp_path / "m.sg"
    artefact.write(sample.plan(), target, model, sample.META)
    program = cross.build_runner(target, model)
    (tmp_path / "x").write_bytes(bytes(4 * sample.ROWS * sample.WIDTH))
    (tmp_path / "ids").write_bytes(bytes(8 * sample.ROWS))
    files = [tmp_path / n for n in ("x", "ids", "y", "middle")]
    emulator = [target.emulator[0], "-cpu", cpu, *target.emulator[-2:]]
    done = cross.execute(*emulator, program, model / "weights.bin", 1, *files)
    assert (done.returncode, done.stderr) == (1, f"cannot run: 'the CPU lacks {missing}'\n")
    good = cross.run(target, program, model / "weights.bin", 1, *files)
    assert good.returncode == 0, good.stderr


def test_python_names_what_the_cpu_lacks(
    levels: tuple[cross.Case, Compiled], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, compiled = levels
    have = targets.cpu_features() - {"sse4.2", "sse4_2"}
    monkeypatch.setattr(loading, "cpu_features", lambda: have)
    with pytest.raises(ArtefactError, match=r"a CPU without sse4\.2"):
        runtime.InferenceSession(compiled.path)
