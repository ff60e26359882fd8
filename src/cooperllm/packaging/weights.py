"""One file for the weights of all graphs: equal tensors are written once, page by page, so that a device maps them and copies nothing.

They have the same names in every graph, by which a device hands one mapping to all of them.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Set
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from cooperllm.device.manifest import WeightEntry, WeightKind

ALIGNMENT = 4096
"""Bytes of a memory page."""

INLINE_BYTES = 1024
"""Smaller tensors stay in the graph."""

CONTRIB = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""


KINDS: Mapping[int, WeightKind] = {
    TensorProto.FLOAT: WeightKind.FLOAT32,
    TensorProto.INT8: WeightKind.INT8,
    TensorProto.UINT8: WeightKind.UINT8,
    TensorProto.INT64: WeightKind.INT64,
}
"""What NumPy can hold; entries of 4 bits each graph maps for itself."""


def write_graphs(graphs: Mapping[str, onnx.ModelProto], directory: Path, weights_name: str) -> dict[str, WeightEntry]:
    """Writes graphs as NAME.onnx, and the weights of all of them to one file.

    Args:
        graphs: Graphs by name; changed in place.
        directory: Where; it exists.
        weights_name: Name of the file of weights.

    Returns:
        Where in that file each weight is that graphs can share, by its name in all of them.
    """
    straight = {_digest(tensor) for model in graphs.values() for tensor in _multiplied(model.graph)}
    places: dict[bytes, tuple[int, int]] = {}
    shared: dict[tuple[int, WeightKind, tuple[int, ...]], str] = {}
    with (directory / weights_name).open("wb") as file:
        for name, model in graphs.items():
            _multiply_turned(model, straight)
            _fold_transposes(model.graph)
            _forget_origins(model.graph)
            names: dict[str, str] = {}
            for tensor in model.graph.initializer:
                data = _data(tensor)
                if len(data) < INLINE_BYTES:
                    continue
                digest = _digest(tensor)
                if digest not in places:
                    file.write(b"\0" * (-file.tell() % ALIGNMENT))
                    places[digest] = (file.tell(), len(data))
                    file.write(data)
                _point_to(tensor, weights_name, *places[digest])
                if tensor.data_type in KINDS:
                    entry = (places[digest][0], KINDS[tensor.data_type], tuple(tensor.dims))
                    names[tensor.name] = shared.setdefault(entry, f"weight_{len(shared)}")
            _rename(model.graph, names)
            onnx.save_model(model, directory / f"{name}.onnx")
    return {name: WeightEntry(offset=offset, kind=kind, shape=shape) for (offset, kind, shape), name in shared.items()}


def fold_gathers(model: onnx.ModelProto) -> None:
    """Keeps of a table the rows that are always the same ones, as those of label words are, and leaves the table out.

    A runtime would do so when it loads the graph, with the whole table in its private memory.

    Args:
        model: A graph in float32; changed in place.
    """

    def rows(node: onnx.NodeProto, table: np.ndarray, places: np.ndarray) -> np.ndarray | None:
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        if attributes.get("batch_dims"):
            return None
        return (
            np.take(table, places, axis=attributes.get("axis", 0)) if node.op_type == "Gather" else table[tuple(np.moveaxis(places, -1, 0))]
        )

    _fold(model.graph, {"Gather", "GatherND"}, rows)


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


def knows_contrib(model: onnx.ModelProto) -> None:
    """Says in a graph that it has operators of the runtime's own.

    Args:
        model: A graph; changed in place.
    """
    if not any(one.domain == CONTRIB for one in model.opset_import):
        model.opset_import.append(helper.make_opsetid(CONTRIB, 1))


def _multiplied(graph: onnx.GraphProto) -> list[onnx.TensorProto]:
    """Constants that are multiplied by as they are."""
    right = {node.input[1] for node in graph.node if node.op_type == "MatMul"}
    return [tensor for tensor in graph.initializer if tensor.name in right]


def _multiply_turned(model: onnx.ModelProto, straight: Set[bytes]) -> None:
    """Multiplies by Wᵀ without writing it where W itself is written: vector-Jacobian products have Wᵀ, forward passes W."""
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    sources = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Transpose" and node.input[0] in constants}
    found = {turned for turned, name in sources.items() if len(constants[name].dims) == 2 and _digest(constants[name]) in straight}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in found:
            node.input[1] = sources[node.input[1]]
            node.op_type, node.domain = "FusedMatMul", CONTRIB
            node.attribute.append(helper.make_attribute("transB", 1))
            knows_contrib(model)
    drop_unused(graph)


def _fold_transposes(graph: onnx.GraphProto) -> None:
    """Writes weights the way they are multiplied: a runtime that turns them round at load has a copy of its own of each."""

    def turned(node: onnx.NodeProto, matrix: np.ndarray) -> np.ndarray:
        return matrix.transpose(next((list(attribute.ints) for attribute in node.attribute if attribute.name == "perm"), None))

    _fold(graph, {"Transpose"}, turned)


def _fold(graph: onnx.GraphProto, operators: Set[str], value: Callable[..., np.ndarray | None]) -> None:
    """Replaces operations on nothing but constants by their values; an operation whose value is None stays."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    kept: list[onnx.NodeProto] = []
    for node in graph.node:
        is_fixed = node.op_type in operators and all(name in constants for name in node.input)
        found = value(node, *(numpy_helper.to_array(constants[name]) for name in node.input)) if is_fixed else None
        if found is None:
            kept.append(node)
            continue
        constants[node.output[0]] = graph.initializer.add()
        constants[node.output[0]].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(found), node.output[0]))
    del graph.node[:]
    graph.node.extend(kept)
    drop_unused(graph)


def drop_unused(graph: onnx.GraphProto) -> None:
    """Leaves out what leads to no output.

    Args:
        graph: A graph; changed in place.
    """
    used, nodes = {output.name for output in graph.output}, list[onnx.NodeProto]()
    for node in reversed(graph.node):
        if used & set(node.output):
            used.update(node.input)
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(reversed(nodes))
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


def _rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Gives constants other names; two that are the same from now on are one."""
    kept: dict[str, onnx.TensorProto] = {}
    for tensor in graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
        kept.setdefault(tensor.name, tensor)
    del graph.initializer[:]
    graph.initializer.extend(kept.values())
    for node in graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = names.get(name, name)


def _data(tensor: onnx.TensorProto) -> bytes:
    """A tensor's bytes as a runtime maps them; a NumPy array would give each entry of 4 bits a byte of its own."""
    return tensor.raw_data if tensor.HasField("raw_data") else numpy_helper.to_array(tensor).tobytes()


def _digest(tensor: onnx.TensorProto) -> bytes:
    return hashlib.sha256(_data(tensor)).digest()


def _point_to(tensor: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    tensor.ClearField("raw_data")
    for values in ("float_data", "int32_data", "int64_data"):
        tensor.ClearField(values)
    del tensor.external_data[:]
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    tensor.data_location = TensorProto.EXTERNAL
