"""Packs the columns of a guide for the link (the first part of the paper's DTC).

    q = round(x / s),   s = max|x| over a block of 256 / (2^(b-1) - 1)      (1)  b-bit codes with one float16 scale per block
    q = floor(x / s + v),   v uniform in (0, 1)                             (2)  E[q s] = x: sums of many senders stay right

Slopes are measured along the decoded direction, so an error of the codec turns a column a little and biases nothing: every replica, the
cloud included, works with `unpack(pack(columns))`. The step is elementwise, hence the same bits everywhere.

Layout, little endian: magic "CG", version, bits, number of columns u32, length u64, then per column the scales and the codes.

Dimension key: k columns, n trainable parameters.
"""

import math
import struct
from collections.abc import Sequence
from copy import copy
from typing import overload

import numpy as np
from jaxtyping import Float32, Float64, Int16

from cooperllm.algorithm import noise
from cooperllm.config import SUPPORTED_BITS
from cooperllm.errors import ConfigError, DecodeError
from cooperllm.messages import Packed

BLOCK = 256
MAX_COLUMNS = 1024
HEADER = struct.Struct("<2sBBIQ")
LARGEST = 1e30
"""Entries of a vector beyond this are refused: whoever folds vectors must be able to send the mean on."""

EXACT = 32


def pack(columns: Float32[np.ndarray, "k n"], bits: int, dither: Float64[np.ndarray, "n"] | None = None) -> bytes:
    """Encodes columns, eq. (1), or eq. (2) where a dither says how to round.

    Args:
        columns: Finite rows of any length, shape [k, n], k <= 1024. Each is scaled to a largest entry of 1 first: only directions
            count.
        bits: 4 or 8 for block-scaled codes, 32 for exact float32.
        dither: v in (0, 1), shape [n]; None rounds to the nearest code. Exact bits ignore it.

    Returns:
        `packed_bytes(k, n, bits)` bytes.

    Raises:
        ConfigError: If `bits` is not supported.

    Example:
        >>> len(pack(np.ones((2, 1000), np.float32), 8)) == packed_bytes(2, 1000, 8)
        True
    """
    if bits not in SUPPORTED_BITS:
        raise ConfigError(f"guide bits: found {bits}, expected one of {SUPPORTED_BITS}")
    num_columns, size = columns.shape
    parts = [HEADER.pack(b"CG", 1, bits, num_columns, size)]
    for column in columns:
        unit = column / np.float32(_unit_of(column, bits))
        parts.append(unit.astype("<f4").tobytes() if bits == EXACT else _quantise(unit, bits, dither))
    return b"".join(parts)


def unpack(payload: bytes, size: int) -> Float32[np.ndarray, "k n"]:
    """Decodes columns; nothing is allocated before the header has been checked against the payload's length.

    Args:
        payload: Output of `pack`, possibly damaged or hostile.
        size: n that the receiver's model has.

    Returns:
        Columns up to their lengths, shape [k, n].

    Raises:
        DecodeError: If the payload is not a packed guide for n parameters.

    Example:
        >>> unpack(pack(np.array([[2.0, -1.0]], np.float32), 32), 2)
        array([[ 0.5 , -0.25]], dtype=float32)
    """
    rows = Rows(payload, size)
    return np.stack(list(rows)) if len(rows) else np.zeros((0, size), np.float32)


class Rows(Sequence[np.ndarray]):
    """Packed columns that are decoded one at a time: a device never holds them all.

    Example:
        >>> rows = Rows(pack(np.ones((3, 2), np.float32), 8), 2)
        >>> len(rows), len(rows[1:]), rows[2].shape
        (3, 2, (2,))
    """

    def __init__(self, payload: bytes, size: int) -> None:
        """Checks the header against the payload's length; see `unpack`."""
        if len(payload) < HEADER.size:
            raise DecodeError(f"guide: {len(payload)} bytes found, at least {HEADER.size} expected")
        magic, version, bits, num_columns, found = HEADER.unpack_from(payload)
        if (magic, version) != (b"CG", 1) or bits not in SUPPORTED_BITS or num_columns > MAX_COLUMNS:
            raise DecodeError(f"guide: header {payload[: HEADER.size].hex()} is not one of this version")
        if found != size:
            raise DecodeError(f"guide: columns of length {found} found, the model has {size} trainable parameters")
        if len(payload) != packed_bytes(num_columns, size, bits):
            raise DecodeError(f"guide: {len(payload)} bytes found, {packed_bytes(num_columns, size, bits)} expected")
        self._payload, self._size, self._bits = payload, size, bits
        self._chosen = range(num_columns)

    def __len__(self) -> int:
        return len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> "Rows": ...
    def __getitem__(self, index: int | slice) -> "np.ndarray | Rows":
        if isinstance(index, slice):
            part = copy(self)
            part._chosen = self._chosen[index]
            return part
        width = packed_bytes(1, self._size, self._bits) - HEADER.size
        start = HEADER.size + self._chosen[index] * width
        column = _decode_column(self._payload[start : start + width], self._size, self._bits)
        if not np.isfinite(column).all():
            raise DecodeError("guide: a non-finite entry found")
        return column


def pack_vector(vector: Float32[np.ndarray, "n"], bits: int, dither: Float64[np.ndarray, "n"] | None = None) -> Packed:
    """Encodes one vector with its length, eq. (1), or eq. (2) where a dither says how to round.

    Args:
        vector: Shape [n].
        bits: 4, 8 or 32.
        dither: v in (0, 1), shape [n]; None rounds to the nearest code.

    Returns:
        The packed vector; a vector with a non-finite entry becomes one that `unpack_vector` refuses.

    Raises:
        ConfigError: If `bits` is not supported.

    Example:
        >>> unpack_vector(pack_vector(np.array([2.0, -4.0], np.float32), 32), 2)
        array([ 2., -4.], dtype=float32)
    """
    return Packed(scale=_unit_of(vector, bits) if vector.any() else 0.0, payload=pack(vector[None], bits, dither))


def pack_unbiased(vector: Float32[np.ndarray, "n"], bits: int, seed: int, index: int) -> Packed:
    """Encodes one of many vectors that are going to be added up, eq. (2): each by noise of its own, so that errors average out.

    Args:
        vector: Shape [n].
        bits: 4, 8 or 32.
        seed: The round's seed.
        index: Number of the sender, told apart from every other that sends in the round.

    Returns:
        The packed vector, see `pack_vector`.

    Raises:
        ConfigError: If the number of bits is not supported.

    Example:
        >>> unpack_vector(pack_unbiased(np.array([2.0, -4.0], np.float32), 32, 1, 0), 2)
        array([ 2., -4.], dtype=float32)
    """
    return pack_vector(vector, bits, None if bits == EXACT else noise.uniform(seed, index, len(vector)))


def unpack_vector(packed: Packed, size: int) -> Float32[np.ndarray, "n"]:
    """Decodes one vector.

    Args:
        packed: Output of `pack_vector`, possibly damaged or hostile.
        size: n that the receiver expects.

    Returns:
        The vector up to the codec's error, shape [n].

    Raises:
        DecodeError: If it is not one packed vector of n entries, none above `LARGEST`.

    Example:
        See `pack_vector`.
    """
    columns = unpack(packed.payload, size)
    if len(columns) != 1:
        raise DecodeError(f"vector: {len(columns)} columns found, 1 expected")
    with np.errstate(over="ignore"):
        vector = columns[0] * np.float32(packed.scale)
    if np.abs(vector).max(initial=0) > LARGEST:
        raise DecodeError(f"vector: an entry above {LARGEST:g} found")
    return vector


def packed_bytes(num_columns: int, size: int, bits: int) -> int:
    """Counts the bytes that `pack` makes.

    Args:
        num_columns: k.
        size: n.
        bits: 4, 8 or 32.

    Returns:
        Bytes, header included.

    Example:
        >>> packed_bytes(1, 512, 8)
        532
    """
    per_column = 4 * size if bits == EXACT else 2 * -(-size // BLOCK) + -(-size * bits // 8)
    return HEADER.size + num_columns * per_column


def _unit_of(column: Float32[np.ndarray, "n"], bits: int) -> float:
    """What a column is divided by: its largest entry, or the power of two above it where nothing may be rounded."""
    largest = float(np.abs(column).max(initial=0)) or 1.0
    return largest if bits != EXACT else math.ldexp(1.0, math.frexp(largest)[1])


def _quantise(unit: Float32[np.ndarray, "n"], bits: int, dither: Float64[np.ndarray, "n"] | None) -> bytes:
    blocks = np.zeros(-(-len(unit) // BLOCK) * BLOCK, np.float32)
    blocks[: len(unit)] = unit
    blocks = blocks.reshape(-1, BLOCK)
    levels = 2 ** (bits - 1) - 1
    exact = np.abs(blocks).max(axis=1) / np.float32(levels)
    scales = exact.astype("<f2")
    # A scale rounded down would clip the largest entry, and one rounded to zero would lose its block.
    scales = np.where(scales.astype(np.float32) < exact, np.nextafter(scales, np.float16(np.inf)), scales).astype("<f2")
    divisors = np.where(scales > 0, scales, 1).astype(np.float32)[:, None]
    ratios = (blocks / divisors).reshape(-1)[: len(unit)]
    rounded = np.rint(ratios) if dither is None else np.floor(ratios + dither)
    codes = np.clip(rounded, -levels, levels).astype(np.int8)
    return scales.tobytes() + (codes.tobytes() if bits == 8 else _to_nibbles(codes))


def _decode_column(data: bytes, size: int, bits: int) -> Float32[np.ndarray, "n"]:
    if bits == EXACT:
        return np.frombuffer(data, "<f4").astype(np.float32)
    num_blocks = -(-size // BLOCK)
    scales = np.frombuffer(data, "<f2", num_blocks)
    if not np.isfinite(scales).all():
        raise DecodeError("guide: a non-finite scale found")
    coded = np.frombuffer(data, np.uint8, offset=2 * num_blocks)
    codes = coded.view(np.int8) if bits == 8 else _from_nibbles(coded, size)
    return codes.astype(np.float32) * np.repeat(scales.astype(np.float32), BLOCK)[:size]


def _to_nibbles(codes: np.ndarray) -> bytes:
    shifted = (np.append(codes, np.zeros(len(codes) % 2, np.int8)) + 8).astype(np.uint8)
    return (shifted[0::2] | (shifted[1::2] << 4)).tobytes()


def _from_nibbles(coded: np.ndarray, size: int) -> Int16[np.ndarray, "n"]:
    codes = np.empty(2 * len(coded), np.int16)
    codes[0::2], codes[1::2] = coded & 15, coded >> 4
    return codes[:size] - 8
