"""InferenceSession: right results on any number of threads, refusals, independence, overhead."""

import ctypes
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsegraph import artefact, loading, runtime, segments, targets
from sparsegraph.errors import ArtefactError, UsageError
from tests import sample_program as sample

ROOT = Path(__file__).parent.parent
Modify = Callable[[Path], None]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "m.sg"
    artefact.write(sample.plan(), targets.get("native"), path, sample.META)
    return path


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixed") / "m.sg"
    artefact.write(sample.mixed_plan(), targets.get("native"), path, sample.META)
    return path


@pytest.fixture
def copy(mixed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(mixed, tmp_path / "m.sg"))


@pytest.fixture
def many_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))


def check(found: list[np.ndarray], feed: dict[str, np.ndarray]) -> None:
    for a, b in zip(found, sample.reference(feed["x"], feed["ids"]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- results


def test_matches_numpy_and_describes_itself(model: Path) -> None:
    session = runtime.InferenceSession(str(model), None, ["CPUExecutionProvider"])
    feed = sample.feed()
    check(session.run(None, feed), feed)
    middle, y = session.run(["y_middle", "y"], feed)
    check([y, middle], feed)
    described = [(a.name, a.type, a.shape) for a in session.get_inputs()]
    rows, width = sample.ROWS, sample.WIDTH
    assert described == [("x", "tensor(float)", [rows, width]), ("ids", "tensor(int64)", [rows])]
    assert [a.name for a in session.get_outputs()] == ["y", "y_middle"]
    assert session.get_providers() == ["CPUExecutionProvider"]


@pytest.mark.usefixtures("many_cores")
def test_any_number_of_threads_gives_the_same_bits(model: Path) -> None:
    sessions = [runtime.InferenceSession(model, threads=n) for n in (1, 2, 3, 8)]
    assert [s.threads for s in sessions] == [1, 2, 3, 8]
    for seed in range(20):
        feed = sample.feed(seed)
        results = [s.run(None, feed) for s in sessions]
        check(results[0], feed)
        for result in results[1:]:
            assert all(np.array_equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.usefixtures("many_cores")
@pytest.mark.parametrize("threads", [1, 2])
def test_concurrent_runs_of_two_sessions(model: Path, threads: int) -> None:
    sessions = [runtime.InferenceSession(model, threads=threads) for _ in range(2)]

    def work(seed: int) -> None:
        feed = sample.feed(seed)
        for _ in range(50):
            check(sessions[seed % 2].run(None, feed), feed)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(8)))


def test_results_of_one_run_survive_the_next(model: Path) -> None:
    session = runtime.InferenceSession(model)
    first = session.run(None, sample.feed(0))
    session.run(None, sample.feed(1))
    check(first, sample.feed(0))


def test_segments_of_onnx_runtime(mixed: Path) -> None:
    session = runtime.InferenceSession(mixed)
    feed = sample.feed()
    out, y = session.run(None, feed)
    expected, _ = sample.reference(feed["x"], feed["ids"])
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    last, _ = sample.reference(np.maximum(expected, 0), feed["ids"], seed=1)
    np.testing.assert_allclose(out, last, rtol=1e-5, atol=1e-5)
    times = session.profile(feed)
    assert [t.kernel for t in times].count("onnxruntime") == 1
    assert times[5].nodes == ("relu",)


@pytest.mark.usefixtures("many_cores")
@pytest.mark.parametrize("threads", [1, 2])
def test_profile_names_the_nodes_of_every_step(model: Path, threads: int) -> None:
    times = runtime.InferenceSession(model, threads=threads).profile(sample.feed())
    assert [t.nodes for t in times] == [("a", 'b "quoted" \\ é'), ("c",), ("d",), ("e",), ("e",)]
    assert times[0].detail == "dense"
    assert all(0 < t.seconds < 1 for t in times)


def test_slices_and_other_arrays_are_accepted(model: Path) -> None:
    feed = sample.feed()
    wide = np.zeros((sample.ROWS, 2 * sample.WIDTH), np.float32)
    wide[:, ::2] = feed["x"]
    check(runtime.InferenceSession(model).run(None, {**feed, "x": wide[:, ::2]}), feed)
    read_only = feed["x"].copy()
    read_only.flags.writeable = False
    check(runtime.InferenceSession(model).run(None, {**feed, "x": read_only}), feed)


@pytest.mark.usefixtures("many_cores")
def test_forked_process_runs_with_threads(model: Path) -> None:
    session = runtime.InferenceSession(model, threads=2)
    feed = sample.feed()
    expected = session.run(None, feed)[0]
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(session.run(None, feed)[0], expected) else 1)
    deadline = time.monotonic() + 20
    status: tuple[int, int] = (0, 0)
    while status[0] == 0 and time.monotonic() < deadline:
        status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.01)
    if status[0] == 0:
        os.kill(child, 9)
    assert status == (child, 0)


def test_session_options_of_onnxruntime_set_the_threads(model: Path) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    cores = len(os.sched_getaffinity(0))
    assert runtime.InferenceSession(model, options).threads == min(2, cores)


# ---------------------------------------------------------------- wrong use

WRONG_FEEDS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "missing": (lambda f: {"x": f["x"]}, "input 'ids': found x, need ids, x. Fix: add it"),
    "none": (lambda f: {}, "input 'ids': found no inputs, need ids, x"),
    "unknown": (lambda f: {**f, "z": f["x"]}, "input 'z': found an unknown name, need ids, x"),
    "dtype": (
        lambda f: {**f, "x": f["x"].astype(np.float64)},
        r"input 'x': found float64, need float32. Fix: pass np.asarray\(value, np.float32\)",
    ),
    "byte order": (lambda f: {**f, "x": f["x"].astype(">f4")}, "found >f4, need float32"),
    "shape": (lambda f: {**f, "x": f["x"][1:]}, r"found \(12, 24\), need \(13, 24\)"),
    "rank": (lambda f: {**f, "ids": f["ids"][None]}, r"found \(1, 13\), need \(13,\)"),
}


@pytest.mark.parametrize("case", WRONG_FEEDS)
def test_wrong_feed(model: Path, case: str) -> None:
    change, text = WRONG_FEEDS[case]
    session = runtime.InferenceSession(model)
    with pytest.raises(UsageError, match=text):
        session.run(None, change(sample.feed()))
    with pytest.raises(UsageError, match=text):
        session.profile(change(sample.feed()))


def test_wrong_options(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="output 'q': found no such output, need one of y, y_mid"):
        runtime.InferenceSession(model).run(["q"], sample.feed())
    with pytest.raises(UsageError, match="CUDAExecutionProvider"):
        runtime.InferenceSession(model, providers=["CUDAExecutionProvider"])
    for threads in (0, -1, 1 << 20, 1.5):
        with pytest.raises(UsageError, match="need 1 to 1024"):
            runtime.InferenceSession(model, threads=threads)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"found no manifest.json"):
        runtime.InferenceSession(tmp_path / "nothing.sg")


# ---------------------------------------------------------------- damage

MEMBERS = ("model.so", "weights.bin", "runtime.h", "fallback_1.onnx", "manifest.json",
           "manifest.sha256")  # fmt: skip


def flip_first(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)


def flip_middle(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 128
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip_first, flip_middle, truncate, append, empty, Path.unlink])
@pytest.mark.parametrize("member", MEMBERS)
def test_damaged_member_is_named(copy: Path, member: str, damage: Modify) -> None:
    damage(copy / member)
    is_gone = member == "manifest.json" and damage is Path.unlink
    with pytest.raises(
        UsageError if is_gone else ArtefactError, match=member.replace(".sha256", "")
    ):
        runtime.InferenceSession(copy)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest and its checksum."""
    import hashlib

    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    text = json.dumps(manifest)
    (folder / "manifest.json").write_text(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    (folder / "manifest.sha256").write_text(f"{digest}  manifest.json\n")


def test_other_schema_machine_and_features_are_refused(copy: Path) -> None:
    rewrite(copy, lambda m: m["target"].update(features=["avx2", "avx9000"]))
    with pytest.raises(ArtefactError, match="found a CPU without avx9000, need"):
        runtime.InferenceSession(copy)
    rewrite(copy, lambda m: m["target"].update(arch="vax"))
    with pytest.raises(ArtefactError, match="need vax"):
        runtime.InferenceSession(copy)
    rewrite(copy, lambda m: m.update(schema=99))
    with pytest.raises(ArtefactError, match="found schema 99, ABI 1, need schema 2, ABI 1"):
        runtime.InferenceSession(copy)


def test_features_are_compared_by_meaning() -> None:
    assert loading._plain("avx512_vnni") == loading._plain("avx512vnni")
    assert loading._plain("sse4_1") == loading._plain("sse4.1")


# ---------------------------------------------------------------- independence, C interface

WITHOUT = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ImportError("blocked " + name)
sys.meta_path.insert(0, Block())
from sparsegraph.runtime import InferenceSession
import numpy as np
session = InferenceSession({path!r})
x, ids = session.get_inputs()
y = session.run(None, {{"x": np.ones(x.shape, np.float32), "ids": np.zeros(ids.shape, np.int64)}})
assert np.isfinite(y[0]).all()
"""
HEAVY = ("tvm", "tvm_ffi", "torch", "onnx", "onnx_ir", "onnxruntime", "pydantic", "scipy", "rich")


def run_without(blocked: tuple[str, ...], path: Path) -> subprocess.CompletedProcess[str]:
    code = WITHOUT.format(blocked=blocked, path=str(path))
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_runs_with_numpy_alone(model: Path) -> None:
    done = run_without(HEAVY, model)
    assert done.returncode == 0, done.stderr


def test_missing_onnxruntime_is_named(mixed: Path) -> None:
    done = run_without(("onnxruntime",), mixed)
    assert "segment 'fallback_1.onnx': found 1 nodes that need onnxruntime" in done.stderr


def test_c_interface_checks_its_arguments(model: Path) -> None:
    library = ctypes.CDLL(str(model / "model.so"))
    library.sg_status_text.restype = library.sg_step_name.restype = ctypes.c_char_p
    library.sg_input.restype = ctypes.c_void_p
    library.sg_workspace_bytes.restype = library.sg_weights_bytes.restype = ctypes.c_int64
    pool = ctypes.c_void_p()
    assert library.sg_n_segments() == 1
    assert [library.sg_n_inputs(i) for i in (-1, 0, 1)] == [0, 2, 0]
    assert library.sg_input(0, 2) is None
    assert library.sg_step_name(0, 0).decode() == 'a, b "quoted" \\ é'
    assert library.sg_weights_bytes() == (model / "weights.bin").stat().st_size
    assert [library.sg_workspace_bytes(i, n) for i, n in ((1, 1), (0, 0), (0, 1025))] == [-1] * 3
    assert library.sg_workspace_bytes(0, 2) > library.sg_workspace_bytes(0, 1) > 0
    assert library.sg_run(0, None, None, None, None, None) == 1
    assert library.sg_run(7, None, None, None, None, None) == 1
    assert library.sg_pool_create(0, ctypes.byref(pool)) == 1
    assert b"null pointer" in library.sg_status_text(1)
    assert library.sg_status_text(77) == b"unknown status"


def test_only_the_interface_is_exported(model: Path) -> None:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("needs nm (Debian: binutils)")
    text = subprocess.run([nm, "-D", "--defined-only", model / "model.so"], check=True,
                          capture_output=True, text=True).stdout  # fmt: skip
    strong = {line.split()[2] for line in text.splitlines() if line.split()[1] == "T"}
    assert strong
    assert all(name.startswith("sg_") for name in strong)


def test_run_has_little_overhead(model: Path) -> None:
    session, feed = runtime.InferenceSession(model), sample.feed()
    best = float("inf")
    for _ in range(300):
        start = time.perf_counter()
        session.run(None, feed)
        best = min(best, time.perf_counter() - start)
    assert best < 50e-6  # 15 us are the aim; the bound has room for slow machines


@pytest.mark.parametrize("array", [np.zeros(3), np.zeros(0), np.broadcast_to(np.ones(3), (2, 3))])
def test_addresses(array: np.ndarray) -> None:
    """Also of arrays that are empty or must not be written to."""
    assert segments._address(array) == array.ctypes.data
