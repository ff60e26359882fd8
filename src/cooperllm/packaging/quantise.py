"""Frozen weights in fewer bits: what a device multiplies by, for each variant of a package.

    y ≈ s_x ∘ s_w ∘ ( round(x / s_x) · round(W / s_w) ),   s_x = max|x| / 127 for each row,   s_w = max|W| / 127 for each column       (1)
    y = x Ŵ,   Ŵ = s_w ∘ round(W / s_w),   s_w as in (1)                                                                               (2)
    y = x Ŵ,   Ŵ = s_b ∘ (q - 8),   q = round(W / s_b) + 8 in 0 ... 15,   s_b = -(the largest entry) / 8 for 32 entries of a column    (3)

(1) is the variant int8: integer products, one scale for each row of the activation. A scale for the whole activation would make an
example's loss depend on its neighbours; a scale for each row does not. (2) is int8-weights and (3) int4: the products are float32, so that the
losses are a smooth function of θ, and finite differences have no rounding in them whatever μ is. Embeddings are quantised row by row as in
(2), for int4 as in (3).

A product with Wᵀ, which vector-Jacobian products have, multiplies by the same codes as the product with W in (2) and (3), and is the exact
derivative of it; in (1) it has codes of its own, since scales must not stand inside an integer sum.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
from jaxtyping import Float32, UInt8
from onnx import TensorProto, helper, numpy_helper

from cooperllm.config import Variant
from cooperllm.packaging.weights import drop_unused

SMALLEST_SIDE = 32
"""Matrices with a shorter side stay float32: they weigh nothing, and their rounding would not average out."""

BLOCK = 32
"""Entries that share a scale in (3); columns of another number of entries are quantised as in (2)."""

CONTRIB = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""


def quantise(model: onnx.ModelProto, variant: Variant) -> int:
    """Replaces products with constant matrices, and rows of constant tables, by those of a variant.

    Args:
        model: A graph; changed in place.
        variant: How weights are kept; float32 changes nothing.

    Returns:
        How many products and tables were replaced.
    """
    if variant is Variant.FP32:
        return 0
    quantiser = _Quantiser(model.graph, variant)
    nodes = [node if new is None else new for node in model.graph.node for new in (quantiser.replaced(node) or [None])]
    count = quantiser.count
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(quantiser.added.values())
    drop_unused(model.graph)
    if not any(one.domain == CONTRIB for one in model.opset_import):
        model.opset_import.append(helper.make_opsetid(CONTRIB, 1))
    return count


def rows_to_int8(rows: Float32[np.ndarray, "N K"]) -> tuple[np.ndarray, Float32[np.ndarray, "N"]]:
    """Rounds each row to 255 steps, eq. (2).

    Args:
        rows: A matrix.

    Returns:
        (codes int8 [N, K]; scales); rows ≈ codes ∘ scales.

    Example:
        >>> codes, scales = rows_to_int8(np.array([[1, -2], [0, 0]], np.float32))
        >>> codes.tolist(), (scales * 127).round(3).tolist()
        ([[64, -127], [0, 0]], [2.0, 0.0])
    """
    scales = (np.maximum(np.abs(rows).max(1), 1e-12) / 127).astype(np.float32)
    return np.rint(rows / scales[:, None]).astype(np.int8), scales


def rows_to_int4(rows: Float32[np.ndarray, "N K"]) -> tuple[UInt8[np.ndarray, "N K"], Float32[np.ndarray, "N blocks"]]:
    """Rounds each block of a row to 16 steps, eq. (3); the entry of the largest magnitude is met exactly.

    Args:
        rows: A matrix whose rows are whole blocks.

    Returns:
        (codes 0 ... 15 [N, K]; scales [N, K / 32]); a block ≈ (codes - 8) · scale.

    Example:
        >>> codes, scales = rows_to_int4(np.linspace(-1, 1, 32, dtype=np.float32)[None])
        >>> codes[0, [0, 15, 16, 31]].tolist(), scales.tolist()
        ([0, 8, 8, 15], [[0.125]])
    """
    blocks = rows.reshape(len(rows), -1, BLOCK)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1, keepdims=True), -1)
    scales = np.where(largest == 0, 1, largest / -8).astype(np.float32)
    codes = np.clip(np.rint(blocks / scales) + 8, 0, 15).astype(np.uint8)
    return codes.reshape(rows.shape), scales[..., 0]


def packed(codes: UInt8[np.ndarray, "N K"]) -> UInt8[np.ndarray, "N half"]:
    """Puts two codes of 4 bits in a byte, the first in its lower half.

    Args:
        codes: 0 ... 15, an even number in each row.

    Returns:
        Bytes.

    Example:
        >>> packed(np.array([[1, 2, 15, 0]], np.uint8)).tolist()
        [[33, 15]]
    """
    return codes[:, ::2] | (codes[:, 1::2] << 4)


class _Quantiser:
    """Writes the nodes of one graph anew, and collects the tensors that they need.

    Attributes:
        added: New constants by name; a matrix that several products share is there once.
        count: Products and tables replaced so far.
    """

    def __init__(self, graph: onnx.GraphProto, variant: Variant) -> None:
        self.added: dict[str, onnx.TensorProto] = {}
        self.count = 0
        self._variant = variant
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self._turned = {
            node.output[0]: node.input[0] for node in graph.node if node.op_type == "Transpose" and node.input[0] in self._constants
        }

    def replaced(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """Returns nodes that stand for this one, or nothing where it stays."""
        new: list[onnx.NodeProto] = []
        if node.op_type == "MatMul":
            turned = node.input[1] in self._turned
            name = self._turned.get(node.input[1], node.input[1])
            if self._is_heavy(name):
                new = self._product(name, node.input[0], node.output[0], turned)
        elif node.op_type == "Gather" and self._is_heavy(node.input[0]) and not any(item.i for item in node.attribute):  # of whole rows
            new = self._table(node.input[0], node.input[1], node.output[0])
        self.count += bool(new)
        return new

    def _is_heavy(self, name: str) -> bool:
        tensor = self._constants.get(name)
        return (
            tensor is not None
            and tensor.data_type == TensorProto.FLOAT
            and len(tensor.dims) == 2
            and min(tensor.dims) >= SMALLEST_SIDE
        )

    def _product(self, name: str, x: str, y: str, turned: bool) -> list[onnx.NodeProto]:
        size_in = self._constants[name].dims[0]
        if self._variant is Variant.INT8:
            return self._integer_product(name, x, y, turned)
        if self._variant is Variant.INT4 and size_in % BLOCK == 0:
            return self._product_of_blocks(name, x, y, turned)
        return self._product_of_rows(name, x, y, turned)

    def _integer_product(self, name: str, x: str, y: str, turned: bool) -> list[onnx.NodeProto]:
        """Eq. (1) in ordinary operators; activations are unsigned with zero point 128, which is what integer units multiply fast."""
        codes, scale = f"{name}.int8{'_turned' * turned}", f"{name}.scale{'_turned' * turned}"
        if codes not in self.added:
            values = self._values(name)
            found, scales = rows_to_int8(np.ascontiguousarray(values if turned else values.T))
            self._add(codes, np.ascontiguousarray(found.T))
            self._add(scale, scales)
        for constant, value in {
            "cooperllm.last": np.array([-1], np.int64),
            "cooperllm.127": np.array(127, np.float32),
            "cooperllm.128": np.array(128, np.float32),
            "cooperllm.tiny": np.array(1e-12, np.float32),
            "cooperllm.zero_point": np.array(128, np.uint8),
        }.items():
            self._add(constant, value)
        return [
            _step("Abs", [x], f"{y}.abs"),
            _step("ReduceMax", [f"{y}.abs", "cooperllm.last"], f"{y}.max", keepdims=1),
            _step("Max", [f"{y}.max", "cooperllm.tiny"], f"{y}.largest"),
            _step("Div", [f"{y}.largest", "cooperllm.127"], f"{y}.row_scale"),
            _step("Div", [x, f"{y}.row_scale"], f"{y}.scaled"),
            _step("Round", [f"{y}.scaled"], f"{y}.rounded"),
            _step("Add", [f"{y}.rounded", "cooperllm.128"], f"{y}.shifted"),
            _step("Cast", [f"{y}.shifted"], f"{y}.codes", to=TensorProto.UINT8),
            _step("MatMulInteger", [f"{y}.codes", codes, "cooperllm.zero_point"], f"{y}.sums"),
            _step("Cast", [f"{y}.sums"], f"{y}.float_sums", to=TensorProto.FLOAT),
            _step("Mul", [f"{y}.float_sums", f"{y}.row_scale"], f"{y}.by_row"),
            _step("Mul", [f"{y}.by_row", scale], y),
        ]

    def _product_of_rows(self, name: str, x: str, y: str, turned: bool) -> list[onnx.NodeProto]:
        """Eq. (2), columns kept as rows: a runtime dequantises those fastest, one matrix at a time, and forgets it after the product."""
        if f"{name}.int8" not in self.added:
            codes, scales = rows_to_int8(np.ascontiguousarray(self._values(name).T))
            self._add(f"{name}.int8", codes)
            self._add(f"{name}.scale", scales)
        return self._with_matrix(x, y, turned, [f"{name}.int8", f"{name}.scale"], axis=0)

    def _product_of_blocks(self, name: str, x: str, y: str, turned: bool) -> list[onnx.NodeProto]:
        """Eq. (3); both operators read the same bytes."""
        import os
        size_in, size_out = self._constants[name].dims
        eights = f"cooperllm.eights_{size_out}_{size_in // BLOCK}"
        if f"{name}.scales" not in self.added:
            codes, scales = rows_to_int4(np.ascontiguousarray(self._values(name).T))
            self._add(f"{name}.bytes", packed(codes).reshape(size_out, -1, BLOCK // 2))
            self._add_nibbles(f"{name}.codes", packed(codes), TensorProto.UINT4, (size_out, size_in))
            self._add(f"{name}.scales", scales)
            self._add_nibbles(eights, np.full((scales.size + 1) // 2, 0x88, np.uint8), TensorProto.UINT4, scales.shape)
        if turned or os.environ.get("DQ4"):
            return self._with_matrix(x, y, turned, [f"{name}.codes", f"{name}.scales", eights], axis=1, block_size=BLOCK)
        return [
            _step(
                "MatMulNBits", [x, f"{name}.bytes", f"{name}.scales"], y, domain=CONTRIB, K=size_in, N=size_out, bits=4, block_size=BLOCK
            )
        ]

    def _table(self, name: str, places: str, y: str) -> list[onnx.NodeProto]:
        """Rows of an embedding."""
        if self._variant is Variant.INT4 and self._constants[name].dims[1] % BLOCK == 0:
            if f"{name}.scales" not in self.added:
                pass
            codes, scales = rows_to_int4(self._values(name))
            # Signed here, for which the operator needs no zero points: code - 8 in two's complement.
            self._add_nibbles(f"{name}.signed_codes", packed(codes ^ 8), TensorProto.INT4, codes.shape)
            self._add(f"{name}.table_scales", scales)
            inputs = [f"{name}.signed_codes", places, f"{name}.table_scales"]
            return [_step("GatherBlockQuantized", inputs, y, domain=CONTRIB, gather_axis=0, quantize_axis=1, block_size=BLOCK)]
        codes, scales = rows_to_int8(self._values(name))
        self._add(f"{name}.row_codes", codes)
        self._add(f"{name}.row_scales", scales[:, None])
        return [
            _step("Gather", [f"{name}.row_codes", places], f"{y}.codes"),
            _step("Cast", [f"{y}.codes"], f"{y}.float_codes", to=TensorProto.FLOAT),
            _step("Gather", [f"{name}.row_scales", places], f"{y}.row_scales"),
            _step("Mul", [f"{y}.float_codes", f"{y}.row_scales"], y),
        ]

    def _with_matrix(self, x: str, y: str, turned: bool, inputs: list[str], **attributes: int) -> list[onnx.NodeProto]:
        """y = x Mᵀ, or x M, where M is dequantised when x is there.

        Left to itself, a runtime dequantises the matrices of half a network before it multiplies by the first; so the scale comes out of
        an operation that waits for x. The product is the runtime's own operator, since it joins ordinary ones with a dequantisation into
        one that rounds activations.
        """
        self._add("cooperllm.one", np.array([1], np.int64))
        return [
            _step("Shape", [x], f"{y}.num_rows", start=0, end=1),
            _step("Min", [f"{y}.num_rows", "cooperllm.one"], f"{y}.ready"),
            _step("Expand", [inputs[1], f"{y}.ready"], f"{y}.scale"),
            _step("DequantizeLinear", [inputs[0], f"{y}.scale", *inputs[2:]], f"{y}.matrix", **attributes),
            _step("FusedMatMul", [x, f"{y}.matrix"], y, domain=CONTRIB, transB=int(not turned)),
        ]

    def _values(self, name: str) -> Float32[np.ndarray, "K N"]:
        return numpy_helper.to_array(self._constants[name])

    def _add(self, name: str, value: np.ndarray) -> None:
        self.added[name] = numpy_helper.from_array(value, name)

    def _add_nibbles(self, name: str, data: np.ndarray, kind: int, shape: Iterable[int]) -> None:
        self.added[name] = helper.make_tensor(name, kind, tuple(shape), data.tobytes(), raw=True)


def _step(operator: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(operator, inputs, [output], name=f"{output}.node", **attributes)
