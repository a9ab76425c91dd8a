"""Kernels compiled in processes of their own: what fails, fails alone and says why."""

import errno
import importlib
import json
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from sparsegraph.targets import compiler, spec
from sparsegraph.targets.compiler import Job, KernelError
from sparsegraph.targets.kernel import Kernel
from sparsegraph.targets.kernels import elementwise, movement, reduce, sample, scatter
from sparsegraph.targets.kernels.depthwise_masked import Border, MaskedDepthwise
from sparsegraph.targets.kernels.direct import Axis, Direct
from sparsegraph.targets.kernels.pool import GlobalPool
from sparsegraph.targets.kernels.product import Product
from sparsegraph.targets.kernels.window import Window

import sparsegraph as sg
from sparsegraph import targets
from sparsegraph.errors import UnsupportedError, UsageError
from tests.sample_program import Affine
from tests.targets.failing_kernels import Failing, FailingPool, FullDiskPool

NATIVE = targets.get("native")
WINDOW = Window((3, 3), (1, 1), (1, 1), 4, 8)
CLIP = ("Clip", ("arg", 0), ("const", -math.inf), ("const", 6.5))
SPECS = (
    *elementwise.KERNELS, *movement.KERNELS, *reduce.KERNELS, *scatter.KERNELS,
    *sample.KERNELS, *targets.KNOWN.values(),
    Product("coded", 2, (4, 2), 16, epilogue=CLIP, operands=("same",)),
    MaskedDepthwise(WINDOW, Border((1, 1), 1, (True, False)), operands=("same",)),
    Direct(Axis(5, 5, 3, 1, 1), Axis(7, 4, 3, 2, 1), (1, 4)),
)  # fmt: skip
DIED = {
    "raise": "ValueError: this lies deep inside",
    "segfault": "SIGSEGV: !!!!!!! Segfault encountered !!!!!!!",
    "abort": "SIGABRT: Check failed: vectors differ",
}


def compile_all(kernels: list[Kernel], folder: Path) -> int:
    """Compile to 0.o, 1.o ...; the number of kernels that were reported as done."""
    done: list[None] = []
    jobs = [Job(k, NATIVE, k.name, folder / f"{i}.o") for i, k in enumerate(kernels)]
    compiler.compile_all(jobs, lambda: done.append(None))
    return len(done)


@pytest.mark.parametrize("known", SPECS, ids=lambda s: s.name)
def test_specs_survive_as_text(known: object) -> None:
    text = json.dumps(spec.plain(known))
    assert spec.made(json.loads(text)) == known
    assert type(spec.made(json.loads(text))) is type(known)


@pytest.mark.parametrize("part", [np.float32(1), [1], {"a": 1}, np.zeros(2), object()])
def test_what_is_no_spec(part: object) -> None:
    with pytest.raises(TypeError, match="is no part of a spec"):
        spec.plain(Failing(part))  # type: ignore[arg-type]


@pytest.mark.parametrize("how", DIED)
def test_a_kernel_fails_alone(tmp_path: Path, how: str) -> None:
    kernels = [Affine(i) for i in range(3, 9)]
    with pytest.raises(KernelError) as error:
        compile_all([*kernels[:3], Failing(how), *kernels[3:]], tmp_path)
    assert error.value.reasons == {f"failing_{how}": DIED[how]}
    assert all(word in str(error.value) for word in (f"failing_{how}", DIED[how], "Fix: "))
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{i}.o" for i in (0, 1, 2, 4, 5, 6)]
    assert not list(Path.cwd().glob("core*"))


def test_all_that_fail_are_named(tmp_path: Path) -> None:
    with pytest.raises(KernelError) as error:
        compile_all([Failing(how) for how in DIED], tmp_path)
    assert error.value.reasons == {f"failing_{how}": reason for how, reason in DIED.items()}


@pytest.mark.parametrize("how", ["kill", "memory", "server"])
def test_memory_runs_out(tmp_path: Path, how: str) -> None:
    """That is no reason to compile the model in another way."""
    with pytest.raises(UnsupportedError, match="too little memory") as error:
        compile_all([Failing(how)], tmp_path)
    assert not isinstance(error.value, KernelError)
    assert compile_all([Affine(3)], tmp_path) == 1


def test_the_folder_is_gone(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        compile_all([Affine(3)], tmp_path / "gone")


@pytest.mark.parametrize("how", ["disk", "llvm_disk"])
def test_the_disk_is_full(tmp_path: Path, how: str) -> None:
    with pytest.raises(OSError, match="No space left") as error:
        compile_all([Failing(how)], tmp_path)
    assert error.value.errno == errno.ENOSPC


def test_a_server_serves_again(tmp_path: Path) -> None:
    compile_all([Affine(3)], tmp_path)
    assert len(compiler._idle) == 1
    first = compiler._idle[0].pid
    assert compile_all([Affine(4), Affine(5)], tmp_path) == 2
    assert [server.pid for server in compiler._idle] == [first]
    compiler._idle[0].terminate()
    assert compile_all([Affine(6)], tmp_path) == 1
    assert [server.pid for server in compiler._idle] != [first]


def test_threads_have_servers_of_their_own(tmp_path: Path) -> None:
    folders = [tmp_path / str(i) for i in range(3)]
    for folder in folders:
        folder.mkdir()
    with ThreadPoolExecutor(3) as pool:
        done = pool.map(lambda folder: compile_all([Affine(i) for i in range(4)], folder), folders)
        assert list(done) == [4, 4, 4]
    one, *others = ([p.read_bytes() for p in sorted(f.iterdir())] for f in folders)
    assert others == [one, one]
    servers = list(compiler._idle)
    assert 1 <= len(servers) <= 3
    compiler.end_servers()
    assert all(server.poll() == 0 for server in servers)
    assert not compiler._idle


def test_a_server_that_lacks_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler.end_servers()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(UnsupportedError, match=r"ended with status 1.*Fix: see what it printed"):
        compile_all([Affine(3)], tmp_path)
    monkeypatch.undo()
    assert compile_all([Affine(3)], tmp_path) == 1


def test_modules_of_the_working_folder_do_not_count(tmp_path: Path) -> None:
    """A user's `selectors.py` is not the standard library's."""
    (tmp_path / "selectors.py").write_text("raise SystemExit('not this one')")
    script = tmp_path / "scripts" / "build.py"
    script.parent.mkdir()
    script.write_text(ORPHAN.replace("os.kill", "#"))
    child = subprocess.run(
        [sys.executable, script, tmp_path], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    assert (tmp_path / "f.o").is_file()


def test_interrupted(tmp_path: Path) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    jobs = [Job(Affine(i), NATIVE, f"f{i}", tmp_path / f"{i}.o") for i in range(20)]
    compiler.warm_up()
    server = compiler._idle[-1]
    with pytest.raises(KeyboardInterrupt):
        compiler.compile_all(jobs, stop)
    assert server.poll() is not None
    assert server not in compiler._idle
    assert len(list(tmp_path.iterdir())) < 20


ORPHAN = """
import os, sys
from pathlib import Path
from sparsegraph.targets import compiler, get
from tests.sample_program import Affine
compiler.compile_all([compiler.Job(Affine(3), get("native"), "f", Path(sys.argv[1], "f.o"))], int)
print(compiler._idle[0].pid, flush=True)
os.kill(os.getpid(), 9)
"""


def test_a_server_ends_with_its_parent(tmp_path: Path) -> None:
    child = subprocess.run([sys.executable, "-c", ORPHAN, tmp_path], capture_output=True, text=True)
    server = int(child.stdout)
    for _ in range(100):
        if not _is_running(server):
            return
        time.sleep(0.1)
    pytest.fail(f"{server} still runs")


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def pooled() -> onnx.ModelProto:
    """Relu, GlobalAveragePool, Exp."""
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], "relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["p"], "pool"),
        helper.make_node("Exp", ["p"], ["y"], "exp"),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 6, 5])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 1, 1])
    graph = helper.make_graph(nodes, "pooled", [x], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


@pytest.fixture
def failing_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsegraph.lower.pooling.GlobalPool", FailingPool)
    monkeypatch.setattr(importlib.import_module("sparsegraph.compile"), "LEAVE_REFUSED", True)


@pytest.mark.usefixtures("failing_pool")
def test_its_nodes_go_to_onnx_runtime(tmp_path: Path) -> None:
    model = pooled()
    compiled = sg.compile(model, output=tmp_path / "m.sg", keep_native=True)
    assert [s.kind for s in compiled.manifest.segments] == ["native", "onnxruntime", "native"]
    assert compiled.fallback_nodes == ["pool"]
    name = GlobalPool("sum", NATIVE.lanes).name
    reason = f"the code generator failed at its kernel ({DIED['abort']})"
    assert f"GlobalAveragePool: {reason}" in compiled.report()
    assert name not in compiled.report()
    x = np.random.default_rng(3).standard_normal((1, 4, 6, 5), np.float32)
    expected = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    np.testing.assert_allclose(compiled.run(None, {"x": x})[0], expected[0], rtol=1e-5)


@pytest.mark.usefixtures("failing_pool")
def test_without_onnx_runtime_it_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError) as error:
        sg.compile(pooled(), "c11", output=tmp_path / "m.sg", keep_native=True)
    assert "pool (GlobalAveragePool: the code generator failed" in str(error.value)
    assert DIED["abort"] in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsegraph.lower.pooling.GlobalPool", FullDiskPool)
    with pytest.raises(UsageError, match="free some space"):
        sg.compile(pooled(), output=tmp_path / "m.sg", keep_native=True)
    assert not list(tmp_path.iterdir())
