"""Packs vectors for the link in 1 to 8 bits an entry (the first part of the paper's DTC): rotated, and most bits where most energy is.

    z = H S x / √B                                                   (1)  a block of B entries, its signs S and the Hadamard matrix H
    q = clip(⌊z / (δ_b σ)⌋, -2^(b-1), 2^(b-1) - 1) + 1/2,   σ² = |z|² / B       (2)  codes of b bits; δ_b is the best step for a normal z
    x̂ = s S H q / √B,   s = <z, q> / |q|²                                (3)  the nearest multiple; of the energy κ_b |x|² is kept
    x̂ = s S H q / √B,   s = |z|² / <z, q>                                (4)  instead of it E[x̂] = x over rotations: sums of many stay right
    max Σ |x_i|² κ_{b_i}   subject to   Σ b_i B_i ≤ b n                     (5)  which block gets how many bits

A rotated block has nearly normal entries whatever x was, so that one step serves all and a large entry costs its neighbours nothing. κ is
.64, .88, .988 and .9999 for 1, 2, 4 and 8 bits; its gains per bit fall, so that (5) is solved by taking them in order (the best there
is, but for the last step that finds no room). Slopes are measured along the decoded direction, so an error of the codec turns a column a
little and biases nothing: every replica, the cloud included, works with `unpack(pack(columns))`. Decoding adds, subtracts and multiplies
entry by entry, hence the same bits everywhere.

Layout, little endian: magic "CG", version, 32 or 0, number of columns u32, length u64, seed of the signs u64; then float32 entries (32), or
(0) the bits of each block of each column, a byte each, and for each block that has any its scale, float32, and its codes.

Dimension key: k columns, n trainable parameters, m blocks of a column.

References:
    Vargaftik and others, 2022, EDEN: communication-efficient and robust distributed mean estimation (the scale (4)).
    Max, 1960, Quantizing for minimum distortion (the steps δ).
"""

import struct
from collections.abc import Iterator, Sequence
from copy import copy
from itertools import pairwise
from typing import overload

import numpy as np
from jaxtyping import Float32, Float64, Int64

from cooperllm.algorithm import noise
from cooperllm.config import SUPPORTED_BITS
from cooperllm.errors import ConfigError, DecodeError

BLOCK = 1024
"""Entries that share a rotation and a scale; the last block of a column is filled up with zeros to a power of two."""

SMALLEST_BLOCK = 8
"""So that codes of every width fill whole bytes."""

MAX_COLUMNS = 1024
HEADER = struct.Struct("<2sBBIQQ")
VERSION = 2
SCALE_BYTES = 4
LARGEST = 1e30
"""Entries of a vector beyond this are refused."""

LARGEST_TO_FOLD = 1e24
"""Entries of a vector that will be folded and sent on: decoded, a packed mean may have entries up to B times as large as its own."""

SMALLEST_ENERGY = 1e-60
"""Blocks of less are sent as zeros: their scale would be no normal float32."""

EXACT = 32
STEPS = {1: 1.5958, 2: 0.9957, 4: 0.3352, 8: 0.035}
"""δ_b for entries of unit variance; with 8 bits an eighth above the best one in the mean, so that no entry is ever cut off."""

KEPT = {0: 0.0, 1: 0.6366, 2: 0.8812, 4: 0.98846, 8: 0.9999}
"""κ_b: share of a normal vector's energy along what b bits decode to."""


def pack(columns: Float32[np.ndarray, "k n"], bits: int, seed: int = 0, *, fewest_bits: int = 0, is_unbiased: bool = False) -> bytes:
    """Encodes columns, eq. (1)-(3) and (5), or (4) in the place of (3).

    Args:
        columns: Rows of any length, shape [k, n], k <= 1024. Columns with a non-finite entry travel exactly and are refused by whoever
            decodes them.
        bits: Bits per entry, 1, 2, 4 or 8 in the mean over all blocks of all columns, each column's energy being 1; or 32: exact.
        seed: Of the random signs, in [0, 2⁶⁴).
        fewest_bits: Bits that every block has at least, unless it is zero: 0, 1, 2, 4 or 8, <= `bits`. As many as `bits` shares them out
            evenly.
        is_unbiased: Whether vectors of many senders with other seeds are going to be added up.

    Returns:
        At most `packed_bytes(k, n, bits)` bytes.

    Raises:
        ConfigError: If `bits` is not supported.

    Example:
        >>> len(pack(np.ones((2, 1000), np.float32), 8)) == packed_bytes(2, 1000, 8)
        True
    """
    if bits not in SUPPORTED_BITS:
        raise ConfigError(f"bits: found {bits}, expected one of {SUPPORTED_BITS}")
    num_columns, size = columns.shape
    is_exact = bits == EXACT or not np.isfinite(columns).all()
    header = HEADER.pack(b"CG", VERSION, EXACT if is_exact else 0, num_columns, size, seed)
    if is_exact:
        return header + columns.astype("<f4").tobytes()
    sizes = _block_sizes(size)
    squares = [np.add.reduceat(column.astype(np.float64) ** 2, _starts(sizes)) for column in columns] if len(sizes) else []
    energies = np.reshape(squares, (num_columns, len(sizes)))
    energies[energies < SMALLEST_ENERGY] = 0
    rates = allocate(energies, sizes, bits, fewest_bits)
    coded = [_coded(column, _signs(seed, row, sizes), rates[row], sizes, is_unbiased=is_unbiased) for row, column in enumerate(columns)]
    return b"".join([header, rates.astype(np.uint8).tobytes(), *coded])


def allocate(energies: Float64[np.ndarray, "k m"], sizes: Int64[np.ndarray, "m"], bits: int, fewest_bits: int) -> Int64[np.ndarray, "k m"]:
    """Decides how many bits each block gets, eq. (5), by gain per bit.

    Args:
        energies: |x_i|² of each block, >= 0, shape [k, m].
        sizes: Entries B_i of the blocks, shape [m].
        bits: Mean bits per entry b.
        fewest_bits: Of every block that has any energy, <= `bits`.

    Returns:
        Bits per entry, 0, 1, 2, 4 or 8, shape [k, m]; 0 exactly where that is allowed and spent best, or there is no energy.

    Example:
        >>> allocate(np.array([[100.0, 1.0]]), np.array([1024, 1024]), 1, 0)
        array([[2, 0]])
    """
    totals = energies.sum(axis=1, keepdims=True)
    shares = (energies / np.where(totals > 0, totals, 1)).reshape(-1)
    lengths = np.tile(sizes, len(energies))
    rates = np.where(shares > 0, fewest_bits, 0)
    left = bits * int(lengths.sum()) - int((rates * lengths).sum())
    ladder = [(low, high) for low, high in pairwise(KEPT) if low >= fewest_bits]
    gains = np.array([shares * (KEPT[high] - KEPT[low]) / ((high - low) * lengths) for low, high in ladder]).reshape(-1)
    for place in np.argsort(-gains, kind="stable").tolist():
        (low, high), block = ladder[place // len(shares)], place % len(shares)
        cost = (high - low) * int(lengths[block])
        if gains[place] > 0 and rates[block] == low and cost <= left:
            rates[block], left = high, left - cost
    return rates.reshape(energies.shape)


def unpack(payload: bytes, size: int) -> Float32[np.ndarray, "k n"]:
    """Decodes columns; nothing is allocated before the header has been checked against the payload's length.

    Args:
        payload: Output of `pack`, possibly damaged or hostile.
        size: n that the receiver's model has.

    Returns:
        Columns, shape [k, n].

    Raises:
        DecodeError: If the payload is not a packed guide for n parameters.

    Example:
        >>> unpack(pack(np.array([[2.0, -1.0]], np.float32), 32), 2)
        array([[ 2., -1.]], dtype=float32)
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
        """Checks the header and every block's bits against the payload's length; see `unpack`."""
        if len(payload) < HEADER.size:
            raise DecodeError(f"guide: {len(payload)} bytes found, at least {HEADER.size} expected")
        magic, version, kind, num_columns, found, seed = HEADER.unpack_from(payload)
        if (magic, version) != (b"CG", VERSION) or kind not in {0, EXACT} or num_columns > MAX_COLUMNS:
            raise DecodeError(f"guide: header {payload[: HEADER.size].hex()} is not one of this version")
        if found != size:
            raise DecodeError(f"guide: columns of length {found} found, the model has {size} trainable parameters")
        self._payload, self._size, self._seed, self._is_exact = payload, size, seed, kind == EXACT
        self._chosen = range(num_columns)
        if self._is_exact:
            self._starts = np.arange(num_columns + 1) * 4 * size + HEADER.size
        else:
            self._starts = self._starts_of_columns(num_columns)
        if len(payload) != self._starts[-1]:
            raise DecodeError(f"guide: {len(payload)} bytes found, {self._starts[-1]} expected")

    def _starts_of_columns(self, num_columns: int) -> Int64[np.ndarray, "_starts"]:
        num_blocks = -(-self._size // BLOCK)
        if len(self._payload) < HEADER.size + num_columns * num_blocks:
            raise DecodeError(f"guide: {len(self._payload)} bytes found, more expected for {num_columns} columns of {num_blocks} blocks")
        self._sizes = _block_sizes(self._size)
        table = np.frombuffer(self._payload, np.uint8, num_columns * num_blocks, HEADER.size)
        if not np.isin(table, list(KEPT)).all():
            raise DecodeError(f"guide: a block with bits other than {', '.join(map(str, KEPT))} found")
        self._rates = table.astype(np.int64).reshape(num_columns, num_blocks)
        lengths = _coded_bytes(self._rates, self._sizes).sum(axis=1)
        return np.concatenate([[0], np.cumsum(lengths)]) + HEADER.size + num_columns * num_blocks

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
        row = self._chosen[index]
        coded = self._payload[self._starts[row] : self._starts[row + 1]]
        with np.errstate(over="ignore", invalid="ignore"):  # of a hostile scale: what it gives is refused below
            column = np.frombuffer(coded, "<f4").astype(np.float32) if self._is_exact else self._decoded(coded, row)
        if not np.isfinite(column).all():
            raise DecodeError("guide: a non-finite entry found")
        return column

    def _decoded(self, coded: bytes, row: int) -> Float32[np.ndarray, "n"]:
        rates, sizes = self._rates[row], self._sizes
        column, data = np.zeros(sizes.sum(), np.float32), np.frombuffer(coded, np.uint8)
        starts, signs = _starts(_coded_bytes(rates, sizes)), _signs(self._seed, row, sizes)
        for rate, blocks, places in _alike(rates, sizes):
            bytes_of = data[starts[blocks][:, None] + np.arange(SCALE_BYTES + places.shape[1] * rate // 8)]
            scales = np.ascontiguousarray(bytes_of[:, :SCALE_BYTES]).view("<f4").astype(np.float32)
            levels = (_from_bytes(bytes_of[:, SCALE_BYTES:], rate) - np.float32(2 ** (rate - 1) - 0.5)) * scales
            column[places] = _transformed(levels) * signs[places]
        return column[: self._size]


def pack_vector(vector: Float32[np.ndarray, "n"], bits: int, seed: int = 0) -> bytes:
    """Encodes one vector, eq. (3), its bits shared out evenly.

    Args:
        vector: Shape [n].
        bits: 1, 2, 4, 8 or 32.
        seed: Of the random signs.

    Returns:
        The packed vector; a vector with a non-finite entry becomes one that `unpack_vector` refuses.

    Raises:
        ConfigError: If `bits` is not supported.

    Example:
        >>> unpack_vector(pack_vector(np.array([2.0, -4.0], np.float32), 32), 2)
        array([ 2., -4.], dtype=float32)
    """
    return pack(vector[None], bits, seed, fewest_bits=bits)


def pack_unbiased(vector: Float32[np.ndarray, "n"], bits: int, seed: int, index: int) -> bytes:
    """Encodes one of many vectors that are going to be added up, eq. (4): each rotated in its own way, so that errors average out.

    Args:
        vector: Shape [n].
        bits: 1, 2, 4, 8 or 32.
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
    return pack(vector[None], bits, noise.derive(seed, index), fewest_bits=bits, is_unbiased=True)


def unpack_vector(payload: bytes, size: int, largest: float = LARGEST) -> Float32[np.ndarray, "n"]:
    """Decodes one vector.

    Args:
        payload: Output of `pack_vector` or `pack_unbiased`, possibly damaged or hostile.
        size: n that the receiver expects.
        largest: Size of the largest entry that the receiver can use.

    Returns:
        The vector up to the codec's error, shape [n].

    Raises:
        DecodeError: If it is not one packed vector of n entries, none above `largest`.

    Example:
        See `pack_vector`.
    """
    columns = unpack(payload, size)
    if len(columns) != 1:
        raise DecodeError(f"vector: {len(columns)} columns found, 1 expected")
    if np.abs(columns[0]).max(initial=0) > largest:
        raise DecodeError(f"vector: an entry above {largest:g} found")
    return columns[0]


def packed_bytes(num_columns: int, size: int, bits: int) -> int:
    """Counts the bytes that `pack` makes at most: fewer where a block is zero, or has more than its share.

    Args:
        num_columns: k.
        size: n.
        bits: 1, 2, 4, 8 or 32.

    Returns:
        Bytes, header included.

    Example:
        >>> packed_bytes(1, 512, 8)
        541
    """
    sizes = _block_sizes(size)
    per_column = 4 * size if bits == EXACT else int((1 + SCALE_BYTES + sizes * bits // 8).sum())
    return HEADER.size + num_columns * per_column


def _block_sizes(size: int) -> Int64[np.ndarray, "m"]:
    full, rest = divmod(size, BLOCK)
    last = [max(SMALLEST_BLOCK, 1 << (rest - 1).bit_length())] if rest else []
    return np.array([BLOCK] * full + last, np.int64)


def _coded_bytes(rates: np.ndarray, sizes: Int64[np.ndarray, "m"]) -> np.ndarray:
    return np.where(rates > 0, SCALE_BYTES + sizes * rates // 8, 0)


def _starts(lengths: Int64[np.ndarray, "m"]) -> Int64[np.ndarray, "m"]:
    return np.cumsum(lengths) - lengths


def _alike(
    rates: Int64[np.ndarray, "m"], sizes: Int64[np.ndarray, "m"]
) -> Iterator[tuple[int, Int64[np.ndarray, "_blocks"], Int64[np.ndarray, "_blocks _size"]]]:
    """Yields blocks of one size and rate, which are worked on together: (bits, which blocks, places of their entries); none of no bits."""
    for size, rate in sorted({(int(size), int(rate)) for size, rate in zip(sizes, rates, strict=True) if rate}):
        (blocks,) = np.nonzero((rates == rate) & (sizes == size))
        yield rate, blocks, _starts(sizes)[blocks][:, None] + np.arange(size)


def _signs(seed: int, row: int, sizes: Int64[np.ndarray, "m"]) -> Float32[np.ndarray, "_padded"]:
    return noise.rademacher(seed, row, int(sizes.sum()))


def _transformed(blocks: Float32[np.ndarray, "_blocks _size"]) -> Float32[np.ndarray, "_blocks _size"]:
    """H x / √B of each row by additions and subtractions, then one multiplication: its own inverse."""
    found, (count, size), half = blocks, blocks.shape, 1
    while half < size:
        pairs = found.reshape(count, -1, 2, half)
        found = np.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], axis=2)
        half *= 2
    return found.reshape(count, size) * np.float32(size**-0.5)


def _coded(
    column: Float32[np.ndarray, "n"],
    signs: Float32[np.ndarray, "_padded"],
    rates: Int64[np.ndarray, "m"],
    sizes: Int64[np.ndarray, "m"],
    *,
    is_unbiased: bool,
) -> bytes:
    padded = np.zeros(len(signs), np.float32)
    padded[: len(column)] = column
    padded *= signs
    parts = [b""] * len(sizes)
    for rate, blocks, places in _alike(rates, sizes):
        rotated = _transformed(padded[places]).astype(np.float64)
        energies, half = (rotated**2).sum(axis=1), 2 ** (rate - 1)
        steps = STEPS[rate] * np.sqrt(energies / places.shape[1])
        codes = np.clip(np.floor(rotated / steps[:, None]), -half, half - 1)
        levels = codes + 0.5
        products = (rotated * levels).sum(axis=1)
        scales = energies / products if is_unbiased else products / (levels**2).sum(axis=1)
        words = _to_bytes((codes + half).astype(np.uint8), rate)
        for block, scale, word in zip(blocks.tolist(), scales.astype("<f4"), words, strict=True):
            parts[block] = scale.tobytes() + word.tobytes()
    return b"".join(parts)


def _to_bytes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Several codes share a byte, the first in its lowest bits."""
    grouped = codes.reshape(len(codes), -1, 8 // bits)
    return np.bitwise_or.reduce(grouped << np.arange(0, 8, bits, dtype=np.uint8), axis=2, dtype=np.uint8)


def _from_bytes(words: np.ndarray, bits: int) -> Float32[np.ndarray, "_blocks _size"]:
    codes = (words[:, :, None] >> np.arange(0, 8, bits, dtype=np.uint8)) & np.uint8(2**bits - 1)
    return codes.reshape(len(words), -1).astype(np.float32)
