"""One file for the weights of all graphs: equal tensors are written once, page by page, so that a device maps them and copies nothing.

    y ≈ s_x ∘ s_w ∘ ( round(x / s_x) · round(W / s_w) ),   s_x = max|x| / 127 for each row,   s_w = max|W| / 127 for each column       (1)

(1) is the int8 variant: integer products, one scale for each row of the activation. A scale for the whole activation would make an
example's loss depend on its neighbours; a scale for each row does not.
"""

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

ALIGNMENT = 4096
"""Bytes of a memory page."""

INLINE_BYTES = 1024
"""Smaller tensors stay in the graph."""

SMALLEST_SIDE = 32
"""Matrices with a shorter side stay float32: they weigh nothing, and their rounding would not average out."""


def write_graphs(graphs: Mapping[str, onnx.ModelProto], directory: Path, weights_name: str) -> None:
    """Writes graphs as NAME.onnx, and the weights of all of them to one file.

    Args:
        graphs: Graphs by name; changed in place.
        directory: Where; it exists.
        weights_name: Name of the file of weights.
    """
    places: dict[bytes, tuple[int, int]] = {}
    with (directory / weights_name).open("wb") as file:
        for name, model in graphs.items():
            _fold_transposes(model.graph)
            _forget_origins(model.graph)
            for tensor in model.graph.initializer:
                data = numpy_helper.to_array(tensor).tobytes()
                if len(data) < INLINE_BYTES:
                    continue
                digest = hashlib.sha256(data).digest()
                if digest not in places:
                    file.write(b"\0" * (-file.tell() % ALIGNMENT))
                    places[digest] = (file.tell(), len(data))
                    file.write(data)
                _point_to(tensor, weights_name, *places[digest])
            onnx.save_model(model, directory / f"{name}.onnx")


def multiplications(model: onnx.ModelProto) -> int:
    """Counts what each token is multiplied with in a graph.

    Args:
        model: A graph in float32.

    Returns:
        Entries of all constant matrices that are multiplied.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    turned = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Transpose"}
    found = [constants.get(turned.get(node.input[1], node.input[1])) for node in model.graph.node if node.op_type == "MatMul"]
    return sum(math.prod(tensor.dims) for tensor in found if tensor is not None and len(tensor.dims) == 2)


def to_int8_rows(model: onnx.ModelProto) -> int:
    """Replaces products with constant matrices by eq. (1).

    Args:
        model: A graph; changed in place.

    Returns:
        How many products were replaced.
    """
    graph = model.graph
    _fold_transposes(graph)
    constants = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    added: dict[str, onnx.TensorProto] = {}
    count = 0
    for node in graph.node:
        weight = constants.get(node.input[1]) if node.op_type == "MatMul" else None
        if weight is None or len(weight.dims) != 2 or min(weight.dims) < SMALLEST_SIDE:
            nodes.append(node)
            continue
        nodes += _quantised(node, weight, added)
        count += 1
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(added.values())
    _drop_unused(graph)
    return count


def _quantised(node: onnx.NodeProto, weight: onnx.TensorProto, added: dict[str, onnx.TensorProto]) -> list[onnx.NodeProto]:
    """Eq. (1) in ordinary operators; activations are unsigned with zero point 128, which is what integer units multiply fast."""
    if f"{weight.name}.int8" not in added:
        values = numpy_helper.to_array(weight).astype(np.float32)
        scale = np.maximum(np.abs(values).max(0, keepdims=True), 1e-12) / np.float32(127)
        rounded = np.rint(values / scale).astype(np.int8)
        for name, value in (("int8", rounded), ("scale", scale.astype(np.float32))):
            added[f"{weight.name}.{name}"] = numpy_helper.from_array(value, f"{weight.name}.{name}")
    constants = {
        "cooperllm.last": np.array([-1], np.int64),
        "cooperllm.127": np.array(127, np.float32),
        "cooperllm.128": np.array(128, np.float32),
        "cooperllm.tiny": np.array(1e-12, np.float32),
        "cooperllm.zero_point": np.array(128, np.uint8),
    }
    added.update({name: numpy_helper.from_array(value, name) for name, value in constants.items() if name not in added})
    x, y = node.input[0], node.output[0]

    def step(operator: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
        return helper.make_node(operator, inputs, [output], name=f"{output}.node", **attributes)

    return [
        step("Abs", [x], f"{y}.abs"),
        step("ReduceMax", [f"{y}.abs", "cooperllm.last"], f"{y}.max", keepdims=1),
        step("Max", [f"{y}.max", "cooperllm.tiny"], f"{y}.largest"),
        step("Div", [f"{y}.largest", "cooperllm.127"], f"{y}.row_scale"),
        step("Div", [x, f"{y}.row_scale"], f"{y}.scaled"),
        step("Round", [f"{y}.scaled"], f"{y}.rounded"),
        step("Add", [f"{y}.rounded", "cooperllm.128"], f"{y}.shifted"),
        step("Cast", [f"{y}.shifted"], f"{y}.codes", to=TensorProto.UINT8),
        step("MatMulInteger", [f"{y}.codes", f"{weight.name}.int8", "cooperllm.zero_point"], f"{y}.sums"),
        step("Cast", [f"{y}.sums"], f"{y}.float_sums", to=TensorProto.FLOAT),
        step("Mul", [f"{y}.float_sums", f"{y}.row_scale"], f"{y}.by_row"),
        step("Mul", [f"{y}.by_row", f"{weight.name}.scale"], y),
    ]


def _fold_transposes(graph: onnx.GraphProto) -> None:
    """Writes weights the way they are multiplied: a runtime that turns them round at load has a copy of its own of each."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    kept: list[onnx.NodeProto] = []
    for node in graph.node:
        source = constants.get(node.input[0]) if node.op_type == "Transpose" else None
        if source is None:
            kept.append(node)
            continue
        order = next((list(attribute.ints) for attribute in node.attribute if attribute.name == "perm"), None)
        turned = np.ascontiguousarray(numpy_helper.to_array(source).transpose(order))
        constants[node.output[0]] = graph.initializer.add()
        constants[node.output[0]].CopyFrom(numpy_helper.from_array(turned, node.output[0]))
    del graph.node[:]
    graph.node.extend(kept)
    _drop_unused(graph)


def _drop_unused(graph: onnx.GraphProto) -> None:
    used = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _forget_origins(graph: onnx.GraphProto) -> None:
    """Leaves out where in PyTorch each node came from, which is most of a graph's bytes and names files of this machine."""
    for node in graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    for value in (*graph.input, *graph.output, *graph.initializer):
        value.doc_string = ""
        del value.metadata_props[:]
    del graph.value_info[:]
    del graph.metadata_props[:]


def _point_to(tensor: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    tensor.ClearField("raw_data")
    for values in ("float_data", "int32_data", "int64_data"):
        tensor.ClearField(values)
    del tensor.external_data[:]
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    tensor.data_location = TensorProto.EXTERNAL
