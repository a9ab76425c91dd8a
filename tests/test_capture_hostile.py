"""Files from strangers: every one ends in a CaptureError with a name, a finding and a fix."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from sparsegraph import isolate
from sparsegraph.capture import load
from sparsegraph.errors import CaptureError
from tests.passes.check import weight
from tests.test_capture import external, linear, proto, sparse_tensor


def refuse(source: object, *words: str) -> None:
    with pytest.raises(CaptureError) as caught:
        load(source)  # type: ignore[arg-type]
    text = str(caught.value)
    assert "Fix: " in text
    for word in words:
        assert word in text


def test_missing_file_and_folder(tmp_path: Path) -> None:
    refuse(tmp_path / "no.onnx", "no.onnx", "No such file")
    refuse(tmp_path, "readable file")


@pytest.mark.parametrize("seed", range(6))
def test_random_bytes(seed: int) -> None:
    refuse(np.random.default_rng(seed).bytes(1 + 300 * seed))


def test_empty_bytes() -> None:
    refuse(b"", "no graph")


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9, 0.99])
def test_truncated_file(share: float) -> None:
    data = linear().SerializeToString()
    refuse(data[: int(len(data) * share)])


@pytest.mark.parametrize("seed", range(4))
def test_flipped_bytes_never_crash(seed: int) -> None:
    rng = np.random.default_rng(seed)
    data = bytearray(linear().SerializeToString())
    for place in rng.integers(0, len(data), 6):
        data[place] ^= int(rng.integers(1, 256))
    try:
        model = load(bytes(data))
    except CaptureError as error:
        caught = error
    else:
        caught = None
    if caught is None:  # a flipped bit in a weight or name leaves a valid model
        assert len(model.graph) > 0
    else:
        assert "Fix: " in str(caught)


def set_entry(path: Path, **entries: str) -> Path:
    model = onnx.load(path, load_external_data=False)
    (tensor,) = model.graph.initializer
    for entry in tensor.external_data:
        entry.value = entries.get(entry.key, entry.value)
    path.write_bytes(model.SerializeToString())
    return path


ESCAPES: dict[str, tuple[Callable[[Path], object], str]] = {
    "parent": (lambda p: set_entry(p, location="../w.bin"), "relative path"),
    "absolute": (lambda p: set_entry(p, location=str(p.parent / "w.bin")), "relative path"),
    "missing": (lambda p: (p.parent / "w.bin").unlink(), "missing"),
    "short": (lambda p: os.truncate(p.parent / "w.bin", 100), "bytes that exist"),
    "length": (lambda p: set_entry(p, length="16"), "16 bytes"),
    "offset": (lambda p: set_entry(p, offset="999999"), "bytes that exist"),
    "negative": (lambda p: set_entry(p, offset="-4"), "natural number"),
    "hard link": (lambda p: os.link(p.parent / "w.bin", p.parent / "other"), "hard links"),
    "symlink": (
        lambda p: (p.parent / "w.bin").symlink_to((p.parent / "w.bin").rename(p.parent / "o")),
        "symbolic link",
    ),
    "folder": (
        lambda p: ((p.parent / "w.bin").unlink(), (p.parent / "w.bin").mkdir()),
        "another kind",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ESCAPES)
def test_external_data_that_must_not_be_read(kind: str, tmp_path: Path) -> None:
    path = external(tmp_path)
    damage, words = ESCAPES[kind]
    damage(path)
    refuse(path, words)


def test_external_data_needs_a_folder(tmp_path: Path) -> None:
    path = external(tmp_path)
    refuse(path.read_bytes(), "data in the model")


def test_external_data_in_an_attribute_is_checked(tmp_path: Path) -> None:
    tensor = TensorProto(name="t", data_type=TensorProto.FLOAT, dims=[2])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")
    model = linear()
    model.graph.node.insert(0, helper.make_node("Constant", [], ["c"], value=tensor))
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    refuse(tmp_path / "m.onnx", "relative path")


def test_inline_tensor_with_the_wrong_number_of_bytes() -> None:
    model = linear()
    model.graph.initializer[0].dims[0] = 5
    refuse(model, "48 bytes", "60 bytes")


@pytest.mark.parametrize("version", [1, 6, 99])
def test_unknown_opset(version: int) -> None:
    refuse(proto("g (float[2] x) => (float[2] y) { y = Relu(x) }", version), f"opset {version}")


def test_unknown_ops() -> None:
    refuse(proto("g (float[2] x) => (float[2] y) { y = NoSuchOp(x) }"), "NoSuchOp")
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 23, "acme": 1]> '
        "g (float[2] x) => (float[2] y) { y = acme.Magic(x) }"
    )
    refuse(model, "acme::Magic")


def test_cycle_and_dangling_input() -> None:
    refuse(proto("g (float[2] x) => (float[2] y) { a = Add(x, y)  y = Relu(a) }"))
    refuse(proto("g (float[2] x) => (float[2] y) { y = Add(x, nowhere) }"))


def test_sparse_bomb() -> None:
    model = linear()
    tensor = sparse_tensor("s")
    tensor.dims[:] = [1 << 40, 1 << 20]
    model.graph.sparse_initializer.append(tensor)
    refuse(model, "16 GiB")


def test_sparse_index_out_of_range() -> None:
    model = linear()
    tensor = sparse_tensor("s")
    tensor.dims[:] = [2, 3]
    model.graph.sparse_initializer.append(tensor)
    refuse(model, "out of range")


def test_shape_bomb_ends() -> None:
    """A constant of 2^40 elements must be refused or left alone, not computed."""
    text = (
        "g (float[2] x) => (float[2] y) { b = ConstantOfShape(n)  s = ReduceSum(b)  y = Add(x, s) }"
    )
    model = load(proto(text, n=np.array([1 << 40])))
    assert [n.op_type for n in model.graph] == ["ConstantOfShape", "ReduceSum", "Add"]


def test_deep_nesting() -> None:
    body = helper.make_graph([], "leaf", [], [])
    for _ in range(200):
        node = helper.make_node("If", ["c"], [], then_branch=body, else_branch=body)
        wrapped = onnx.GraphProto(name="b")
        wrapped.node.append(node)
        body = wrapped if len(body.SerializeToString()) < 1 << 16 else body
    model = linear()
    model.graph.node.extend(body.node)
    refuse(model.SerializeToString())


def test_child_limits() -> None:
    with pytest.raises(isolate.ChildError, match="no result after"):
        isolate.run("check", linear().SerializeToString(), time_limit_s=0.01)
    with pytest.raises(isolate.ChildError):
        isolate.run("infer", b"\xff\xfe")


def test_weight_survives_a_refused_binding() -> None:
    source = proto("g (float[N,4] x) => (float[N,3] y) { y = MatMul(x, w) }", w=weight(4, 3))
    refuse(source, "'N'")
    assert load(source, {"N": 1}).graph.initializers["w"].const_value is not None


@pytest.mark.parametrize(
    ("dims", "words"),
    [([1 << 60, 4], "1.72e+10 GiB"), ([1 << 40, 1 << 40], "GiB"), ([1 << 33, 4], "128 GiB")],
)
def test_inputs_that_no_memory_holds(dims: list[int], words: str) -> None:
    source = linear()
    for dim, size in zip(source.graph.input[0].type.tensor_type.shape.dim, dims):
        dim.dim_value = size
    refuse(source, "input 'x'", words)


def test_outputs_that_are_missing_or_named_twice() -> None:
    source = linear()
    source.graph.output.append(source.graph.output[0])
    refuse(source, "output 'y' twice")
    del source.graph.output[:]
    refuse(source, "no outputs")
