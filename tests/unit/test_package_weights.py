"""Weights of device packages: written once, the way they are multiplied, or as integers with a scale for each row."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from cooperllm.algorithm import noise
from cooperllm.byte_tokenizer import byte_tokenizer
from cooperllm.packaging.weights import to_int8_rows, write_graphs


def matrix(rows, columns, index=0):
    return noise.gaussian(11, index, rows * columns).reshape(rows, columns)


def product(weight, *, transposed=False):
    """y = x W as a graph."""
    stored = numpy_helper.from_array(np.ascontiguousarray(weight.T) if transposed else weight, "w")
    nodes = [helper.make_node("Transpose", ["w"], ["v"], perm=[1, 0])] if transposed else []
    nodes.append(helper.make_node("MatMul", ["x", "v" if transposed else "w"], ["y"]))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", "t", size]) for name, size in zip("xy", weight.shape, strict=True)]
    graph = helper.make_graph(nodes, "product", ends[:1], ends[1:], [stored])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def run(model, x):
    session = onnxruntime.InferenceSession(model if isinstance(model, (str, bytes)) else model.SerializeToString())
    return session.run(None, {"x": x})[0]


def test_equal_weights_are_written_once_however_they_were_turned(tmp_path):
    weight, x = matrix(64, 48), matrix(6, 64, 1).reshape(2, 3, 64)
    graphs = {"one": product(weight), "two": product(weight, transposed=True), "three": product(weight + 1)}
    write_graphs(graphs, tmp_path, "weights.bin")
    # Two tensors of 64 * 48 * 4 = 3 pages each.
    assert (tmp_path / "weights.bin").stat().st_size == 2 * 64 * 48 * 4
    for name in ("one", "two"):
        np.testing.assert_allclose(run(str(tmp_path / f"{name}.onnx"), x), x @ weight, atol=1e-4)
    assert [node.op_type for node in onnx.load(tmp_path / "two.onnx", load_external_data=False).graph.node] == ["MatMul"]


def test_int8_rows_are_off_by_less_than_half_a_step_of_each_factor():
    weight, x = matrix(64, 48), matrix(6, 64, 1).reshape(2, 3, 64)
    model = product(weight, transposed=True)
    assert to_int8_rows(model) == 1
    assert {tensor.data_type for tensor in model.graph.initializer if len(tensor.dims) == 2 and tensor.dims[0] > 1} == {TensorProto.INT8}
    row_step, column_step = np.abs(x).max(-1, keepdims=True) / 127, np.abs(weight).max(0) / 127
    bound = (row_step * np.abs(weight).sum(0) + np.abs(x).sum(-1, keepdims=True) * column_step) / 2 + 64 * row_step * column_step / 4
    error = np.abs(run(model, x) - x @ weight)
    assert (error <= bound + 1e-5).all()
    assert error.max() > 1e-4  # it is an approximation


def test_with_int8_rows_no_row_depends_on_its_neighbours():
    weight, x = matrix(64, 48), matrix(6, 64, 1).reshape(2, 3, 64)
    model = product(weight)
    to_int8_rows(model)
    beside = x.copy()
    beside[1] *= 1000
    assert run(model, beside)[0].tobytes() == run(model, x)[0].tobytes()


def test_a_row_of_zeros_stays_zero():
    model = product(matrix(64, 48))
    to_int8_rows(model)
    assert not run(model, np.zeros((1, 1, 64), np.float32)).any()


@pytest.mark.parametrize("text", ["A fine film.", "", " two  spaces\n\t", "naïve café 漢字 🙂"])
def test_the_byte_tokeniser_is_byt5s(text):
    tokenizer = byte_tokenizer()
    assert tokenizer.encode(text).ids == [byte + 3 for byte in text.encode()] + [1]
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text
