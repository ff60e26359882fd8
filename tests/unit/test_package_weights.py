"""Weights of device packages: written once, the way they are multiplied, as float32 or in the codes of a variant."""

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from cooperllm.algorithm import noise
from cooperllm.byte_tokenizer import byte_tokenizer
from cooperllm.config import Variant
from cooperllm.device.manifest import WeightEntry, WeightKind
from cooperllm.device.onnxruntime_graph import OnnxRuntimeGraph
from cooperllm.device.settings import Settings
from cooperllm.packaging.quantise import quantise, rows_to_int4
from cooperllm.packaging.weights import fold_gathers, write_graphs

SMOOTH = [Variant.INT8_WEIGHTS, Variant.INT4]
QUANTISED = [Variant.INT8, *SMOOTH]


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


def test_wt_is_not_written_where_w_is(tmp_path):
    """As in a graph with a product and its vector-Jacobian product."""
    weight, x, delta = matrix(64, 48), matrix(6, 64, 1).reshape(2, 3, 64), matrix(6, 48, 2).reshape(2, 3, 48)
    back = product(weight.T.copy(), transposed=True)
    assert [node.op_type for node in back.graph.node] == ["Transpose", "MatMul"]
    write_graphs({"back": back, "there": product(weight)}, tmp_path, "weights.bin")
    assert (tmp_path / "weights.bin").stat().st_size == 64 * 48 * 4
    np.testing.assert_allclose(run(str(tmp_path / "there.onnx"), x), x @ weight, atol=1e-4)
    np.testing.assert_allclose(run(str(tmp_path / "back.onnx"), delta), delta @ weight.T, atol=1e-4)


def test_graphs_share_a_weight_by_one_name_and_what_is_no_numpy_type_by_none(tmp_path):
    weight, x = matrix(64, 48), matrix(6, 64, 1).reshape(2, 3, 64)
    graphs = {"one": product(weight), "two": product(weight, transposed=True), "four-bits": product(weight)}
    quantise(graphs["four-bits"], Variant.INT4)
    found = write_graphs(graphs, tmp_path, "weights.bin")
    named = {name: {t.name for t in onnx.load(tmp_path / f"{name}.onnx", load_external_data=False).graph.initializer} for name in graphs}
    assert named["one"] == named["two"] == {"weight_0"}
    assert found["weight_0"] == WeightEntry(offset=0, kind=WeightKind.FLOAT32, shape=(64, 48))
    assert set(found) - {"weight_0"} < named["four-bits"]
    data = np.memmap(tmp_path / "weights.bin", np.uint8, "r")
    held = {name: data[entry.offset : entry.stop].view(entry.kind.value).reshape(entry.shape) for name, entry in found.items()}
    np.testing.assert_array_equal(held["weight_0"], weight)
    # Another weight under that name is what a graph multiplies by, so that it is the one handed in and not the one in the file.
    for weights, expected in ((held, x @ weight), (held | {"weight_0": weight + 1}, x @ (weight + 1))):
        graph = OnnxRuntimeGraph(tmp_path / "one.onnx", Settings(), 1, weights)
        np.testing.assert_allclose(graph.run({"x": x})["y"], expected, atol=1e-4)


@pytest.mark.parametrize("operator", ["Gather", "GatherND"])
def test_of_a_table_whose_rows_are_always_the_same_those_alone_are_kept(operator):
    table, rows = matrix(500, 8), np.array([7, 3, 7])
    places = rows if operator == "Gather" else rows[:, None]
    nodes = [
        helper.make_node(operator, ["table", "places"], ["words"]),
        helper.make_node("Gather", ["table", "given"], ["looked_up"]),
        helper.make_node("Add", ["words", "looked_up"], ["y"]),
    ]
    stored = [numpy_helper.from_array(table, "table"), numpy_helper.from_array(places, "places")]
    given = helper.make_tensor_value_info("given", TensorProto.INT64, [3])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 8])
    for kept in (nodes, [nodes[0], helper.make_node("Identity", ["words"], ["y"])]):
        graph = helper.make_graph(kept, "words", [given], [y], stored)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        inputs = {"given": np.array([1, 2, 499])}
        (expected,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, inputs)
        fold_gathers(model)
        np.testing.assert_array_equal(onnxruntime.InferenceSession(model.SerializeToString()).run(None, inputs)[0], expected)
        sizes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
        assert sizes["words"] == (3, 8)
        assert ("table" in sizes) is (kept is nodes)  # what else is looked up in it needs it


# Products of each variant.


def quantised(weight, variant, *, transposed=False):
    model = product(weight, transposed=transposed)
    assert quantise(model, variant) == 1
    assert not any(
        tensor.data_type == TensorProto.FLOAT and len(tensor.dims) == 2 and min(tensor.dims) > 2 for tensor in model.graph.initializer
    )
    return model


def matrix_of(model, size_in):
    """Ŵ: what a graph makes of the rows of the identity, exactly where products are float32."""
    return run(model, np.eye(size_in, dtype=np.float32)[None])[0]


def test_float32_stays_as_it_is():
    model = product(matrix(64, 48))
    before = model.SerializeToString()
    assert quantise(model, Variant.FP32) == 0
    assert model.SerializeToString() == before


@pytest.mark.parametrize("transposed", [False, True])
def test_int8_rows_are_off_by_less_than_half_a_step_of_each_factor(transposed):
    weight, x = matrix(64, 48), matrix(6, 64, 1).reshape(2, 3, 64)
    model = quantised(weight, Variant.INT8, transposed=transposed)
    row_step, column_step = np.abs(x).max(-1, keepdims=True) / 127, np.abs(weight).max(0) / 127
    bound = (row_step * np.abs(weight).sum(0) + np.abs(x).sum(-1, keepdims=True) * column_step) / 2 + 64 * row_step * column_step / 4
    error = np.abs(run(model, x) - x @ weight)
    assert (error <= bound + 1e-5).all()
    assert error.max() > 1e-4  # it is an approximation


def test_int8_weights_are_off_by_half_a_step_of_their_column():
    weight = matrix(64, 48)
    error = np.abs(matrix_of(quantised(weight, Variant.INT8_WEIGHTS), 64) - weight)
    assert (error <= np.abs(weight).max(0) / 127 / 2 + 1e-6).all()
    assert error.max() > 1e-4


def test_int4_weights_are_no_further_off_than_plain_rounding_block_by_block():
    weight = matrix(64, 48)
    error = (matrix_of(quantised(weight, Variant.INT4), 64) - weight).reshape(2, 32, 48)
    blocks = weight.reshape(2, 32, 48)
    step = np.take_along_axis(blocks, np.abs(blocks).argmax(1, keepdims=True), 1) / -8
    plain = np.clip(np.rint(blocks / step), -8, 7) * step - blocks
    # The plain scale is one of those tried, and the scale is fitted to its codes afterwards.
    shares = np.linalg.norm(error, axis=1) / np.linalg.norm(plain, axis=1)
    assert shares.max() <= 1 + 1e-3
    assert 0.5 < shares.mean() < 0.97


@pytest.mark.parametrize("variant", SMOOTH)
@pytest.mark.parametrize("transposed", [False, True])
def test_products_in_float32_are_linear_however_small_the_step(variant, transposed):
    """Rounded activations would give steps of 1 / 127 of the largest entry; so would operators that a runtime makes of several."""
    weight, x, z = matrix(64, 48), matrix(6, 64, 1).reshape(2, 3, 64), matrix(6, 64, 2).reshape(2, 3, 64)
    model = quantised(weight, variant, transposed=transposed)
    expected = z @ matrix_of(model, 64)
    slope = (run(model, x + np.float32(1e-3) * z) - run(model, x - np.float32(1e-3) * z)) / np.float32(2e-3)
    # Results of some 10 have float32 steps of 1e-6, a slope 1 / 2e-3 times as many, added up over 64 terms.
    np.testing.assert_allclose(slope, expected, atol=1e-2)


def test_with_int8_weights_the_product_with_wt_is_the_exact_transpose():
    weight, delta = matrix(64, 48), matrix(6, 48, 2).reshape(2, 3, 48)
    there, back = (quantised(one, Variant.INT8_WEIGHTS, transposed=turned) for one, turned in ((weight, False), (weight.T.copy(), True)))
    # The transposed product's graph has W [64, 48] behind a transposition: the same tensor as the forward product's.
    np.testing.assert_allclose(run(back, delta), delta @ matrix_of(there, 64).T, atol=1e-4)
    codes = [next(t for t in model.graph.initializer if t.data_type == TensorProto.INT8).raw_data for model in (there, back)]
    assert codes[0] == codes[1]


@pytest.mark.parametrize("variant", QUANTISED)
def test_no_row_depends_on_its_neighbours(variant):
    weight, x = matrix(64, 48), matrix(6, 64, 1).reshape(2, 3, 64)
    model = quantised(weight, variant)
    beside = x.copy()
    beside[1] *= 1000
    assert run(model, beside)[0].tobytes() == run(model, x)[0].tobytes()


@pytest.mark.parametrize("variant", QUANTISED)
@pytest.mark.parametrize("transposed", [False, True])
def test_zeros_stay_zeros(variant, transposed):
    """Rows of activations, columns and blocks of weights: no scale is divided by that could be 0."""
    weight = matrix(64, 48)
    weight[:, 5] = weight[:32, 7] = 0
    model = quantised(weight, variant, transposed=transposed)
    assert not run(model, np.zeros((1, 1, 64), np.float32)).any()
    found = run(model, np.concatenate([np.ones(32), np.zeros(32)]).astype(np.float32)[None, None])[0, 0]
    assert np.isfinite(found).all()
    assert not found[[5, 7]].any()
    assert found[[4, 6, 8]].all()


@pytest.mark.parametrize("variant", QUANTISED)
@pytest.mark.parametrize(("size_in", "size_out"), [(33, 47), (44, 64), (64, 33), (32, 32)])
def test_sizes_need_not_be_whole_blocks(variant, size_in, size_out):
    weight, x = matrix(size_in, size_out), matrix(1, size_in, 1)[None]
    for transposed in (False, True):
        found = run(quantised(weight, variant, transposed=transposed), x)
        # Codes of 4 bits keep nine tenths, and are taken where columns are whole blocks.
        assert np.linalg.norm(found - x @ weight) <= 0.15 * np.linalg.norm(x @ weight)


@pytest.mark.parametrize("variant", QUANTISED)
@pytest.mark.parametrize(("size_in", "size_out"), [(1, 1), (64, 31), (31, 64)])
def test_small_matrices_stay_float32(variant, size_in, size_out):
    weight = matrix(size_in, size_out)
    model = product(weight)
    assert quantise(model, variant) == 0
    np.testing.assert_allclose(matrix_of(model, size_in), weight, atol=1e-6)


def test_codes_of_four_bits_meet_a_block_that_has_sixteen_values():
    block = np.array([3, -8, 7, 0] * 8, np.float32) / 4
    codes, scales = rows_to_int4(np.stack([block, -block, np.zeros(32, np.float32)]))
    np.testing.assert_allclose(codes * scales, np.stack([block, -block, np.zeros(32)]), atol=1e-6)


def test_matrices_are_float32_one_after_the_other(tmp_path):
    """A runtime starts with what has no inputs: all matrices at once would be a float32 model."""
    weights = [numpy_helper.from_array(matrix(64, 64, index), f"w{index}") for index in range(4)]
    names = ["x", "x1", "x2", "x3", "y"]
    nodes = [
        node
        for index, (x, y) in enumerate(pairwise(names))
        for node in (helper.make_node("MatMul", [x, f"w{index}"], [f"p{index}"]), helper.make_node("Sigmoid", [f"p{index}"], [y]))
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", "t", 64]) for name in "xy"]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    assert quantise(model, Variant.INT8_WEIGHTS) == 4
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    session.run(None, {"x": matrix(2, 64)[None]})
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf8"))
    events = sorted((one for one in events if one["name"].endswith("kernel_time")), key=lambda one: one["ts"])
    order = [one["args"]["op_name"] for one in events]
    assert [name for name in order if name in {"DequantizeLinear", "FusedMatMul"}] == ["DequantizeLinear", "FusedMatMul"] * 4


# Embeddings of each variant.


def lookup(table):
    """y = rows of a table."""
    ids = helper.make_tensor_value_info("x", TensorProto.INT64, ["b", "t"])
    rows = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", "t", table.shape[1]])
    graph = helper.make_graph(
        [helper.make_node("Gather", ["w", "x"], ["y"])], "lookup", [ids], [rows], [numpy_helper.from_array(table, "w")]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize(("variant", "width", "kind"), [
    (Variant.INT8, 64, TensorProto.INT8),
    (Variant.INT8_WEIGHTS, 33, TensorProto.INT8),
    (Variant.INT4, 64, TensorProto.INT4),
    (Variant.INT4, 40, TensorProto.INT8),  # no whole blocks
])  # fmt: skip
def test_rows_of_a_table_are_looked_up_in_few_bits(variant, width, kind):
    table = matrix(50, width)
    table[7] = 0
    model = lookup(table)
    assert quantise(model, variant) == 1
    assert Counter(tensor.data_type for tensor in model.graph.initializer) == {kind: 1, TensorProto.FLOAT: 1}
    ids = np.array([[0, 7, 49], [7, 7, 3]])
    found = run(model, ids)
    assert not found[0, 1].any()
    assert not found[1, :2].any()
    if kind == TensorProto.INT8:
        assert (np.abs(found - table[ids]) <= np.abs(table[ids]).max(-1, keepdims=True) / 127 / 2 + 1e-6).all()
    assert 0 < np.linalg.norm(found - table[ids]) <= 0.12 * np.linalg.norm(table[ids])


def test_codes_of_four_bits_are_written_two_to_a_byte(tmp_path):
    table = matrix(64, 64)
    model = lookup(table)
    quantise(model, Variant.INT4)
    before = run(model, np.arange(64)[None])
    write_graphs({"lookup": model}, tmp_path, "weights.bin")
    assert (tmp_path / "weights.bin").stat().st_size == 64 * 64 // 2  # the scales, 64 * 2 * 4 bytes, stay in the graph
    assert run(str(tmp_path / "lookup.onnx"), np.arange(64)[None]).tobytes() == before.tobytes()


@pytest.mark.parametrize("text", ["A fine film.", "", " two  spaces\n\t", "naïve café 漢字 🙂"])
def test_the_byte_tokeniser_is_byt5s(text):
    tokenizer = byte_tokenizer()
    assert tokenizer.encode(text).ids == [byte + 3 for byte in text.encode()] + [1]
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text
