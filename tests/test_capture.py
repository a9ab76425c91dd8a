"""Loading ONNX: what arrives, bound dimensions, old opsets, sparse and external tensors."""

import mmap
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparsegraph.capture import load
from sparsegraph.errors import CaptureError
from sparsegraph.graph import opset, static_shape
from sparsegraph.output import write_model
from sparsegraph.pipeline import optimize
from sparsegraph.verify import compare, feeds_for, run_onnx
from tests.passes.check import weight


def proto(text: str, opset_version: int = 23, **arrays: np.ndarray) -> onnx.ModelProto:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset_version}]>\n{text}')
    for name, array in arrays.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    return model


LINEAR = "g (float[2,4] x) => (float[2,3] y) { p = MatMul(x, w)  y = Relu(p) }"


def linear() -> onnx.ModelProto:
    return proto(LINEAR, w=weight(4, 3))


def test_all_sources_give_the_same_model(tmp_path: Path) -> None:
    source = linear()
    onnx.save(source, tmp_path / "m.onnx")
    sources = [source, source.SerializeToString(), tmp_path / "m.onnx", str(tmp_path / "m.onnx"),
               ir.from_proto(source)]  # fmt: skip
    want = run_onnx(source, {"x": weight(2, 4)})
    for each in sources:
        assert compare(run_onnx(load(each), {"x": weight(2, 4)}), want) == 0


@pytest.mark.parametrize("version", [7, 13, 23])
def test_a_newer_ir_version_than_onnx_runtime_takes(version: int) -> None:
    source = proto(LINEAR, version, w=weight(4, 3))
    want = run_onnx(source, {"x": weight(2, 4)})
    source.ir_version = 14
    model = load(source)
    assert opset(model) == 23
    assert compare(run_onnx(model, {"x": weight(2, 4)}), want) <= 1e-6


def test_the_source_is_not_changed() -> None:
    source = proto("g (float[N,4] x) => (float[N,3] y) { y = MatMul(x, w) }", 13, w=weight(4, 3))
    before = source.SerializeToString()
    load(source, {"N": 2})
    assert source.SerializeToString() == before


def test_every_value_has_a_shape_and_dtype() -> None:
    model = load(linear())
    for node in model.graph:
        for value in node.outputs:
            assert static_shape(value) is not None
            assert value.dtype is not None


@pytest.mark.parametrize(
    ("shapes", "want"),
    [({"N": 2, "T": 5}, (2, 5)), ({"x": [2, 5]}, (2, 5)), ({"x": (2, 5), "N": 2}, (2, 5))],
)
def test_dimensions_are_bound(shapes: dict[str, object], want: tuple[int, ...]) -> None:
    source = proto("g (float[N,T] x, float[N,T] z) => (float[N,T] y) { y = Add(x, z) }")
    model = load(source, shapes)  # type: ignore[arg-type]
    assert [static_shape(v) for v in (*model.graph.inputs, *model.graph.outputs)] == [want] * 3


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({}, ["free dimensions N (input x axis 0), T (input x axis 1)", "shapes={'N': ..., 'T': "]),
        ({"N": 2}, ["T (input x axis 1)", "shapes={'T': ...}"]),
        ({"N": 2, "T": 3, "Q": 1}, ["'Q'", "no such dimension"]),
        ({"q": [2, 3]}, ["'q'", "no such input"]),
        ({"x": [2]}, ["1 sizes", "2 sizes"]),
        ({"x": [2, 3], "N": 4}, ["size 2 for axis 0", "need 4"]),
        ({"x": [2, -3]}, ["size -3"]),
    ],
)
def test_unbound_and_wrong_dimensions(shapes: dict[str, object], words: list[str]) -> None:
    source = proto("g (float[N,T] x) => (float[N,T] y) { y = Relu(x) }")
    with pytest.raises(CaptureError) as caught:
        load(source, shapes)  # type: ignore[arg-type]
    for word in words:
        assert word in str(caught.value)


def test_question_marks_are_different_dimensions() -> None:
    source = proto("g (float[a,b] x) => (float[a,b] y) { y = Relu(x) }")
    for dim in source.graph.input[0].type.tensor_type.shape.dim:
        dim.dim_param = "?"
    model = load(source, {"x": [2, 3]})
    assert static_shape(model.graph.outputs[0]) == (2, 3)


def test_shapes_that_inference_cannot_tell_are_measured() -> None:
    source = proto(
        """g (float[3,4] x) => (float[a,b] y) {
        s = Shape(x)  f = Cast<to=1>(s)  h = Mul(f, two)  i = Cast<to=7>(h)
        y = Expand(one, i) }""",
        two=np.array(2, np.float32),
        one=np.ones((1, 1), np.float32),
    )
    assert static_shape(load(source).graph.outputs[0]) == (6, 8)


def test_data_dependent_shapes_stay_open() -> None:
    source = proto("g (float[6] x) => (int64[1,n] y) { n = NonZero(x)  y = Abs(n) }")
    assert static_shape(load(source).graph.outputs[0]) is None


def test_constants_functions_and_default_inputs_become_initializers() -> None:
    source = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 18, "local": 1]>
        g (float[2] x, float[2] w) => (float[2] y) <float[2] w = {1, 2}> {
            c = Constant<value = float[2] {3, 4}>()  a = local.twice(x)  b = Add(a, c)
            y = Add(b, w) }
        <domain: "local", opset_import: ["": 18]> twice (p) => (q) { q = Add(p, p) }"""
    )
    model = load(source)
    assert [v.name for v in model.graph.inputs] == ["x"]
    assert [n.op_type for n in model.graph] == ["Add", "Add", "Add"]
    got = run_onnx(model, {"x": np.array([1, 1], np.float32)})["y"]
    np.testing.assert_array_equal(got, [6, 8])


OLD = {
    7: "a = Reshape(x, s)  y = Upsample<scales=[1.0,1.0,2.0,2.0], mode=\"nearest\">(a)",
    9: "a = Reshape(x, s)  y = Upsample<mode=\"nearest\">(a, r)",
    10: "a = Reshape(x, s)  b = Dropout(a)  y = Resize<mode=\"nearest\">(b, r)",
    11: "a = Reshape(x, s)  b = Unsqueeze<axes=[0]>(a)  c = Squeeze<axes=[0]>(b)  d = Clip(c, low)"
        "  e = Softmax<axis=3>(d)  y = Resize<mode=\"nearest\">(e, roi, r)",
    17: "a = Reshape(x, s)  b = ReduceMean<axes=[1]>(a)  c = Sub(a, b)  y = Resize(c, roi, r)",
}  # fmt: skip


@pytest.mark.parametrize("version", OLD)
def test_old_opsets_are_raised_with_the_same_outputs(version: int) -> None:
    text = f"g (float[1,64] x) => (float[1,4,8,8] y) {{ {OLD[version]} }}"
    arrays = {"s": np.array([1, 4, 4, 4]), "r": np.array([1, 1, 2, 2], np.float32)}
    arrays |= {"low": np.array(0, np.float32), "roi": np.array([], np.float32)}
    source = proto(text, version, **arrays)
    model = load(source)
    assert opset(model) == 23, model.graph.metadata_props
    for feed in feeds_for(model):
        assert compare(run_onnx(model, feed), run_onnx(source, feed)) < 1e-6


def test_metadata_and_names_survive_the_conversion() -> None:
    source = proto(LINEAR, 13, w=weight(64, 3)[:4])
    source.graph.node[0].name = "layer.0"
    entry = source.graph.node[0].metadata_props.add()
    entry.key, entry.value = "scope", "encoder"
    model = load(source)
    node = model.graph.node(0)
    assert (opset(model), node.name, node.metadata_props["scope"]) == (23, "layer.0", "encoder")


def test_an_opset_that_would_stop_running_is_kept() -> None:
    model = load(proto("g (float[8] x) => (float[8] y) { y = Bernoulli(x) }", 15))
    assert opset(model) == 15
    assert "sparsegraph.opset_kept" in model.graph.metadata_props


def sparse_tensor(name: str) -> onnx.SparseTensorProto:
    values = numpy_helper.from_array(np.array([1.5, -2.0], np.float32), name)
    indices = numpy_helper.from_array(np.array([1, 11], np.int64), f"{name}_indices")
    return helper.make_sparse_tensor(values, indices, [4, 3])


def test_sparse_initializers_and_constants_become_dense() -> None:
    source = proto("g (float[2,4] x) => (float[2,3] y) { a = MatMul(x, w)  b = MatMul(x, c)  "
                   "y = Add(a, b) }")  # fmt: skip
    source.graph.sparse_initializer.append(sparse_tensor("w"))
    node = helper.make_node("Constant", [], ["c"], sparse_value=sparse_tensor("c"))
    source.graph.node.insert(0, node)
    model = load(source)
    dense = np.zeros(12, np.float32)
    dense[[1, 11]] = 1.5, -2.0
    for name in ("w", "c"):
        tensor = model.graph.initializers[name].const_value
        assert tensor is not None
        np.testing.assert_array_equal(tensor.numpy(), dense.reshape(4, 3))


def external(folder: Path) -> Path:
    path = folder / "m.onnx"
    source = proto(LINEAR.replace("4]", "64]").replace("2,3]", "2,32]"), w=weight(64, 32))
    onnx.save(source, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    return path


def test_external_data_beside_the_model(tmp_path: Path) -> None:
    model = load(external(tmp_path))
    tensor = model.graph.initializers["w"].const_value
    assert tensor is not None
    np.testing.assert_array_equal(tensor.numpy(), weight(64, 32))
    array: object = tensor.numpy()
    while isinstance(array, np.ndarray):
        array = array.base
    assert isinstance(getattr(array, "obj", array), mmap.mmap), "the file is mapped, not read"


def test_a_written_model_holds_its_weights(tmp_path: Path) -> None:
    """A model with its weights beside it would refer to files that the copy does not have."""
    model = load(external(tmp_path))
    feed = feeds_for(model, 2)[1]
    want = run_onnx(model, feed)
    (tmp_path / "elsewhere").mkdir()
    path = tmp_path / "elsewhere" / "copy.onnx"
    write_model(path, model)
    assert compare(run_onnx(onnx.load(path), feed), want) == 0
    assert compare(run_onnx(ir.to_proto(model), feed), want) == 0


def test_a_model_may_be_written_over_the_files_it_came_from(tmp_path: Path) -> None:
    path = external(tmp_path)
    model = load(path)
    feed = feeds_for(model, 2)[1]
    want = run_onnx(model, feed)
    write_model(path, model)
    write_model(tmp_path / "w.bin", model)
    assert compare(run_onnx(load(path), feed), want) == 0
    assert compare(run_onnx(model, feed), want) == 0


@pytest.mark.parametrize("size", [2, 64])
def test_external_tensors_reach_checker_and_subgraphs(size: int, tmp_path: Path) -> None:
    """As PyTorch's exporter writes it: every tensor beside the model, biases and shapes too."""
    text = (
        "g (float[1,4] x, bool c) => (float[1,S] z) { y = MatMul(x, w)  r = Add(y, b) "
        "z = If(c) <then_branch = t () => (float[1,S] p) { p = Relu(r) }, "
        "else_branch = e () => (float[1,S] q) <float[S,S] inner> { q = MatMul(r, inner) }> }"
    )
    want = proto(text.replace("S", str(size)), w=weight(4, size), b=weight(size))
    inner = want.graph.node[-1].attribute[1].g
    inner.initializer.append(numpy_helper.from_array(weight(size, size), "inner"))
    del inner.value_info[:]
    held = onnx.ModelProto()
    held.CopyFrom(want)
    path = tmp_path / "m.onnx"
    onnx.save(held, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    feed = {"x": weight(1, 4), "c": np.array(False)}
    assert compare(run_onnx(load(path), feed), run_onnx(want, feed)) == 0
    assert compare(run_onnx(load(ir.load(path)), feed), run_onnx(want, feed)) == 0


def test_weights_beyond_two_gigabytes(tmp_path: Path) -> None:
    rows = 1 << 15
    source = proto(f"g (float[1,4] x) => (float[1,{rows}] y) {{ "
                   "t = Gather(w, i)  s = Gather(t, i)  "
                   "a = Gather(v, i)  b = Gather(a, i)  d = Add(s, b)  r = Gather(x, i)  "
                   "e = Gather(r, i)  f = Add(d, e)  y = Expand(f, n) }",
                   i=np.array(0), n=np.array([1, rows]))  # fmt: skip
    with (tmp_path / "big.bin").open("wb") as file:
        file.truncate(2 * rows * rows * 4)
    for number, name in enumerate("wv"):
        tensor = source.graph.initializer.add(name=name, data_type=TensorProto.FLOAT)
        tensor.dims.extend([rows, rows])
        tensor.data_location = TensorProto.EXTERNAL
        size = rows * rows * 4
        for key, value in (("location", "big.bin"), ("offset", number * size), ("length", size)):
            tensor.external_data.add(key=key, value=str(value))
    onnx.save(source, tmp_path / "big.onnx")
    model = load(tmp_path / "big.onnx")
    assert sum(v.const_value.nbytes for v in model.graph.initializers.values()) > 8 << 30
    assert static_shape(model.graph.outputs[0]) == (1, rows)


def test_a_constant_output_keeps_its_name() -> None:
    source = linear()
    source.graph.output.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 3]))
    model = load(source)
    feed = feeds_for(model, 2)[1]
    assert [v.name for v in model.graph.outputs] == ["y", "w"]
    assert not any(v.is_initializer() for v in model.graph.outputs)
    assert compare(run_onnx(model, feed), run_onnx(source, feed)) < 1e-6
    assert compare(run_onnx(optimize(model).model, feed), run_onnx(source, feed)) < 1e-6


def test_numbers_without_axes_and_values_without_elements() -> None:
    text = "g (float t, float[0,4] x) => (float s, float[0,3] y) { s = Exp(t)  y = MatMul(x, w) }"
    model = optimize(load(proto(text, w=weight(4, 3)))).model
    y = run_onnx(model, {"t": np.array(1, np.float32), "x": np.zeros((0, 4), np.float32)})["y"]
    assert y.shape == (0, 3)
