import json
import struct
from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from sparsegraph.errors import UsageError
from sparsegraph.masks import read_masks
from sparsegraph.tensor_file import read_arrays

ARRAYS = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.array([1, 0, 1], dtype=bool),
    "c": np.array(7, dtype=np.int64),
    "d": np.linspace(0, 1, 5, dtype=np.float16),
}


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_arrays_come_back(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"arrays{suffix}"
    (np.savez(path, **ARRAYS) if suffix == ".npz" else save_file(ARRAYS, path))
    found = read_arrays(path)
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.array([{"no": "data"}], dtype=object))
    found = r"found Python objects in 'a', need an \.npz or \.safetensors"
    with pytest.raises(UsageError, match=found):
        read_arrays(tmp_path / "x.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("harm", ["cut", "flipped"])
def test_a_damaged_archive_is_told_from_another_kind_of_file(
    tmp_path: Path, save: Callable[..., None], harm: str
) -> None:
    path = tmp_path / "x.npz"
    save(path, a=np.random.default_rng(3).normal(size=4000))
    raw = bytearray(path.read_bytes())
    if harm == "flipped":
        raw[1000:1100] = bytes(x ^ 0x55 for x in raw[1000:1100])
    path.write_bytes(raw[: len(raw) // 2] if harm == "cut" else raw)
    with pytest.raises(UsageError, match=r"found an archive that is damaged .*save or copy it"):
        read_arrays(path)


def test_a_header_that_promises_more_than_memory_is_refused(tmp_path: Path) -> None:
    head = {"descr": "<f8", "fortran_order": False, "shape": (1 << 50,)}
    with ZipFile(tmp_path / "x.npz", "w") as archive, archive.open("a.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, head)
    with pytest.raises(UsageError, match=r"found an archive that is damaged .*allocate"):
        read_arrays(tmp_path / "x.npz")


def header(entries: object, n: int | None = None, data: bytes = bytes(64)) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if n is None else n) + text + data


@pytest.mark.parametrize(
    ("raw", "found"),
    [
        (b"123", "no safetensors header"),
        (header({}, n=1 << 40), "a header of"),
        (header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [56, 72]}}), "bytes 56 to 72"),
        (header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}}), "a of shape"),
        (header({"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}), "a of shape"),
        (header({"a": {"dtype": "X9", "shape": [4], "data_offsets": [0, 16]}}), "a of type X9"),
        (header({"a": {"dtype": "F32"}}), "shape"),
        (header(["a"]), "no table"),
        (struct.pack("<Q", 4) + b"{{{{", "need an .npz"),
    ],
)
def test_damaged_safetensors_are_refused(tmp_path: Path, raw: bytes, found: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    with pytest.raises(UsageError, match=found):
        read_arrays(path)


def test_missing_and_single_arrays_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_arrays(tmp_path / "none.npz")
    np.save(tmp_path / "one.npy", ARRAYS["a"])
    with pytest.raises(UsageError, match="one array"):
        read_arrays(tmp_path / "one.npy")


def test_masks_of_another_model(tmp_path: Path) -> None:
    w = np.array([[0, 1.5], [-2, 0]], dtype=np.float32)
    full, bias = np.ones((2, 2), dtype=np.float32), np.zeros(2, dtype=np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["x", "w", "bias"], ["h"]),
            helper.make_node("MatMul", ["h", "full"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2])],
        [numpy_helper.from_array(a, n) for a, n in [(w, "w"), (full, "full"), (bias, "bias")]],
    )
    opset = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), tmp_path / "m.onnx")
    found = read_masks(tmp_path / "m.onnx")
    assert list(found) == ["w"]
    np.testing.assert_array_equal(found["w"], w != 0)
