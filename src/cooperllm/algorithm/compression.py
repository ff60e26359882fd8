"""Packs the columns of a guide for the link (the first part of the paper's DTC).

    q = round(x / s),   s = max|x| over a block of 256 / (2^(b-1) - 1)      (1)  b-bit codes with one float16 scale per block

Slopes are measured along the decoded direction, so an error of the codec turns a column a little and biases nothing: every replica, the
cloud included, works with `unpack(pack(columns))`. The step is elementwise, hence the same bits everywhere.

Layout, little endian: magic "CG", version, bits, number of columns u32, length u64, then per column the scales and the codes.

Dimension key: k columns, n trainable parameters.
"""

import struct

import numpy as np
from jaxtyping import Float32, Int16

from cooperllm.errors import ConfigError, DecodeError

BLOCK = 256
MAX_COLUMNS = 1024
HEADER = struct.Struct("<2sBBIQ")
SUPPORTED_BITS = (4, 8, 32)


def pack(columns: Float32[np.ndarray, "k n"], bits: int) -> bytes:
    """Encodes columns, eq. (1).

    Args:
        columns: Finite rows of any length, shape [k, n], k <= 1024. Each is scaled to a largest entry of 1 first: only directions
            count.
        bits: 4 or 8 for block-scaled codes, 32 for exact float32.

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
        largest = np.abs(column).max(initial=0)
        unit = column / largest if largest > 0 else column
        parts.append(unit.astype("<f4").tobytes() if bits == 32 else _quantise(unit, bits))
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
        array([[ 1. , -0.5]], dtype=float32)
    """
    if len(payload) < HEADER.size:
        raise DecodeError(f"guide: {len(payload)} bytes found, at least {HEADER.size} expected")
    magic, version, bits, num_columns, found = HEADER.unpack_from(payload)
    if (magic, version) != (b"CG", 1) or bits not in SUPPORTED_BITS or num_columns > MAX_COLUMNS:
        raise DecodeError(f"guide: header {payload[: HEADER.size].hex()} is not one of this version")
    if found != size:
        raise DecodeError(f"guide: columns of length {found} found, the model has {size} trainable parameters")
    if len(payload) != packed_bytes(num_columns, size, bits):
        raise DecodeError(f"guide: {len(payload)} bytes found, {packed_bytes(num_columns, size, bits)} expected")
    width = (len(payload) - HEADER.size) // num_columns if num_columns else 0
    starts = range(HEADER.size, len(payload), width) if num_columns else range(0)
    columns = [_decode_column(payload[start : start + width], size, bits) for start in starts]
    if not all(np.isfinite(column).all() for column in columns):
        raise DecodeError("guide: a non-finite entry found")
    return np.stack(columns) if columns else np.zeros((0, size), np.float32)


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
    per_column = 4 * size if bits == 32 else 2 * -(-size // BLOCK) + -(-size * bits // 8)
    return HEADER.size + num_columns * per_column


def _quantise(unit: Float32[np.ndarray, "n"], bits: int) -> bytes:
    blocks = np.zeros(-(-len(unit) // BLOCK) * BLOCK, np.float32)
    blocks[: len(unit)] = unit
    blocks = blocks.reshape(-1, BLOCK)
    levels = 2 ** (bits - 1) - 1
    exact = np.abs(blocks).max(axis=1) / np.float32(levels)
    scales = exact.astype("<f2")
    # A scale rounded down would clip the largest entry, and one rounded to zero would lose its block.
    scales = np.where(scales.astype(np.float32) < exact, np.nextafter(scales, np.float16(np.inf)), scales).astype("<f2")
    divisors = np.where(scales > 0, scales, 1).astype(np.float32)[:, None]
    codes = np.clip(np.rint(blocks / divisors), -levels, levels).astype(np.int8).reshape(-1)[: len(unit)]
    return scales.tobytes() + (codes.tobytes() if bits == 8 else _to_nibbles(codes))


def _decode_column(data: bytes, size: int, bits: int) -> Float32[np.ndarray, "n"]:
    if bits == 32:
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
