"""Frozen weights in fewer bits: what a device multiplies by, for each variant of a package.

    y ≈ s_x ∘ s_w ∘ ( round(x / s_x) · round(W / s_w) ),   s_x = max|x| / 127 for each row,   s_w = max|W| / 127 for each column       (1)
    y = x Ŵ,   Ŵ = s_w ∘ round(W / s_w),   s_w as in (1)                                                                               (2)
    y = x Ŵ,   Ŵ = s_b ∘ q,   q in -8 ... 7,   s_b and q of the least squared error over 32 entries of a column                        (3)

(1) is the variant int8: integer products, one scale for each row of the activation. A scale for the whole activation would make an
example's loss depend on its neighbours; a scale for each row does not. (2) is int8-weights and (3) int4: their products are float32,
so that losses are a smooth function of θ and a slope has no rounding in it, whatever μ is. Rows of embeddings are kept as in (2), for
int4 as in (3).

A product with Wᵀ, which vector-Jacobian products have, multiplies by the same codes as the product with W in (2). In (1) and (3) Wᵀ has
codes of its own, since an operator for integer sums or blocks takes them in one order alone.
"""

from typing import Any, NamedTuple

import numpy as np
import onnx
from jaxtyping import Float32, Int8, UInt8
from onnx import TensorProto, helper, numpy_helper

from cooperllm.config import Variant
from cooperllm.packaging.weights import CONTRIB, drop_unused, knows_contrib

SMALLEST_SIDE = 32
"""Matrices with a shorter side stay float32: they weigh nothing, and their rounding would not average out."""

BLOCK = 32
"""Entries that share a scale in (3); columns of another number of entries are quantised as in (2)."""

SHARES = np.linspace(0.7, 1.15, 10, dtype=np.float32)
"""Scales that are tried for (3), as shares of the one that meets the entry of the largest magnitude."""


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
    knows_contrib(model)
    return count


def rows_to_int8(rows: Float32[np.ndarray, "N K"]) -> tuple[Int8[np.ndarray, "N K"], Float32[np.ndarray, "N"]]:
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


def rows_to_int4(rows: Float32[np.ndarray, "N K"]) -> tuple[Int8[np.ndarray, "N K"], Float32[np.ndarray, "N blocks"]]:
    """Rounds each block of a row to 16 steps, eq. (3).

    Args:
        rows: A matrix whose rows are whole blocks.

    Returns:
        (codes -8 ... 7 [N, K]; scales [N, K / 32]); a block ≈ codes · scale.

    Example:
        >>> codes, scales = rows_to_int4(np.array([[-4.0, 3.5, 0.5, 0.0] * 8], np.float32))
        >>> codes[0, :4].tolist(), scales.tolist()
        ([-8, 7, 1, 0], [[0.5]])
    """
    blocks = rows.reshape(len(rows), -1, BLOCK)
    whole = np.take_along_axis(blocks, np.abs(blocks).argmax(-1, keepdims=True), -1) / -8
    whole = np.where(whole == 0, 1, whole).astype(np.float32)
    codes, scales, least = np.zeros(blocks.shape, np.int8), whole, np.full(whole.shape, np.inf, np.float32)
    for share in SHARES:
        tried = np.clip(np.rint(blocks / (share * whole)), -8, 7)
        scale = (tried * blocks).sum(-1, keepdims=True) / np.maximum((tried * tried).sum(-1, keepdims=True), 1)
        error = ((tried * scale - blocks) ** 2).sum(-1, keepdims=True)
        better = error < least
        codes, scales, least = np.where(better, tried, codes), np.where(better, scale, scales), np.where(better, error, least)
    return codes.astype(np.int8).reshape(rows.shape), scales[..., 0].astype(np.float32)


def packed(codes: Int8[np.ndarray, "N K"], zero_point: int) -> UInt8[np.ndarray, "N half"]:
    """Puts two codes of 4 bits in a byte, the first in its lower half.

    Args:
        codes: -8 ... 7, an even number in each row.
        zero_point: What stands for 0: 8, or 0 for two's complement.

    Returns:
        Bytes.

    Example:
        >>> packed(np.array([[-8, 7]], np.int8), 8).tolist(), packed(np.array([[-8, 7]], np.int8), 0).tolist()
        ([[240]], [[120]])
    """
    nibbles = (codes + np.int8(zero_point)).astype(np.uint8) & 15
    return nibbles[:, ::2] | (nibbles[:, 1::2] << 4)


class _Product(NamedTuple):
    """Names of a product's tensors: y = x W, or x Wᵀ where W is turned."""

    name: str
    turned: bool
    x: str
    y: str


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
                new = self._product(_Product(name, turned, node.input[0], node.output[0]))
        elif node.op_type == "Gather" and self._is_heavy(node.input[0]) and not any(item.i for item in node.attribute):  # of whole rows
            new = self._table(node.input[0], node.input[1], node.output[0])
        self.count += bool(new)
        return new

    def _is_heavy(self, name: str) -> bool:
        tensor = self._constants.get(name)
        return tensor is not None and tensor.data_type == TensorProto.FLOAT and len(tensor.dims) == 2 and min(tensor.dims) >= SMALLEST_SIDE

    def _product(self, product: _Product) -> list[onnx.NodeProto]:
        if self._variant is Variant.INT8:
            return self._integer_product(product)
        if self._variant is Variant.INT4 and self._constants[product.name].dims[int(product.turned)] % BLOCK == 0:
            return self._product_with_blocks(product)
        return self._product_with_columns(product)

    def _integer_product(self, product: _Product) -> list[onnx.NodeProto]:
        """Eq. (1) in ordinary operators; activations are unsigned with zero point 128, which is what integer units multiply fast."""
        name, turned, x, y = product
        codes, scale = f"{name}.codes{turned:d}", f"{name}.scale{turned:d}"
        if codes not in self.added:
            found, scales = rows_to_int8(self._columns(product))
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

    def _product_with_columns(self, product: _Product) -> list[onnx.NodeProto]:
        """Eq. (2), columns kept as rows, which a runtime dequantises fastest; one matrix at a time is float32, and none afterwards.

        Left to itself, a runtime dequantises the matrices of half a network before it multiplies by the first; so the scale comes out of
        an operation that waits for x. The product is the runtime's own operator, since it joins ordinary ones with a dequantisation into
        one that rounds activations.
        """
        name, turned, x, y = product
        codes, scale = f"{name}.columns", f"{name}.column_scale"
        if codes not in self.added:
            found, scales = rows_to_int8(self._columns(product._replace(turned=False)))
            self._add(codes, found)
            self._add(scale, scales)
        self._add("cooperllm.one", np.array([1], np.int64))
        return [
            _step("Shape", [x], f"{y}.num_rows", start=0, end=1),
            _step("Min", [f"{y}.num_rows", "cooperllm.one"], f"{y}.one"),
            _step("Expand", [scale, f"{y}.one"], f"{y}.scale"),
            _step("DequantizeLinear", [codes, f"{y}.scale"], f"{y}.matrix", axis=0),
            _step("FusedMatMul", [x, f"{y}.matrix"], y, domain=CONTRIB, transB=int(not turned)),
        ]

    def _product_with_blocks(self, product: _Product) -> list[onnx.NodeProto]:
        """Eq. (3) in the runtime's own operator, which multiplies in float32 unless it is told otherwise."""
        name, turned, x, y = product
        codes, scale = f"{name}.blocks{turned:d}", f"{name}.block_scale{turned:d}"
        columns = self._columns(product)
        if codes not in self.added:
            found, scales = rows_to_int4(columns)
            self._add(codes, packed(found, 8).reshape(len(columns), -1, BLOCK // 2))
            self._add(scale, scales)
        size_out, size_in = columns.shape
        return [_step("MatMulNBits", [x, codes, scale], y, domain=CONTRIB, K=size_in, N=size_out, bits=4, block_size=BLOCK)]

    def _table(self, name: str, places: str, y: str) -> list[onnx.NodeProto]:
        """Rows of an embedding; as few are dequantised as are looked up."""
        rows, codes, scale = numpy_helper.to_array(self._constants[name]), f"{name}.row_codes", f"{name}.row_scale"
        if self._variant is Variant.INT4 and rows.shape[1] % BLOCK == 0:
            found, scales = rows_to_int4(rows)
            self.added[codes] = helper.make_tensor(codes, TensorProto.INT4, rows.shape, packed(found, 0).tobytes(), raw=True)
            self._add(scale, scales)
            blocks = {"gather_axis": 0, "quantize_axis": 1, "block_size": BLOCK}
            return [_step("GatherBlockQuantized", [codes, places, scale], y, domain=CONTRIB, **blocks)]
        found, scales = rows_to_int8(rows)
        self._add(codes, found)
        self._add(scale, scales[:, None])
        return [
            _step("Gather", [codes, places], f"{y}.codes"),
            _step("Cast", [f"{y}.codes"], f"{y}.float_codes", to=TensorProto.FLOAT),
            _step("Gather", [scale, places], f"{y}.scale"),
            _step("Mul", [f"{y}.float_codes", f"{y}.scale"], y),
        ]

    def _columns(self, product: _Product) -> Float32[np.ndarray, "N K"]:
        """Columns of W, or of Wᵀ, as rows."""
        values = numpy_helper.to_array(self._constants[product.name])
        return np.ascontiguousarray(values if product.turned else values.T)

    def _add(self, name: str, value: np.ndarray) -> None:
        self.added[name] = numpy_helper.from_array(value, name)


def _step(operator: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(operator, inputs, [output], name=f"{output}.node", **attributes)
