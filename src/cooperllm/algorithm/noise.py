"""The only source of randomness: (seed, index) -> the same bits on every machine and runtime.

    w_i = Philox4x64-10(key = (seed, index), counter = (i, 0, 0, stream))      (1)  64-bit words
    z_j = T[ 16-bit lane j of w ],   T[i] = Φ⁻¹((i + 1/2) / 2¹⁶) / c             (2)  c: unit variance
    r_j = 1 - 2 · (bit j of w)                                                 (3)  Rademacher

A direction has entries of (2) or of (3): signs are a fourth of the bits of normal numbers, and a thirtieth of their time.

The transform (2) is a table look-up, so no logarithm or cosine of a machine's own mathematics library takes part, and a
runtime in any language needs the generator and 2¹⁶ floats to reproduce it. The lanes are the inverse distribution function at
the midpoints of 2¹⁶ equal slices: symmetric, mean exactly 0, variance 1, largest value 4.32. Nothing here keeps state.

Any part of a direction can be made without what lies before it, since a word's counter says where it stands: a device with millions of
weights makes the noise of one layer while that layer runs.

References:
    Salmon, Moraes, Dror, Shaw, 2011, Parallel random numbers: as easy as 1, 2, 3 (Philox).
    Wichura, 1988, Algorithm AS 241: the percentage points of the normal distribution (Python's statistics.NormalDist).
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from statistics import NormalDist

import numpy as np
from jaxtyping import Float32, Int64, UInt64

from cooperllm.config import Distribution

BLOCK = 1 << 16
"""Numbers drawn at a time, so that scratch memory does not grow with the length of a direction."""

WORDS, LANES, SIGN_LANES = 4, 4, 64
"""Words that one counter gives, and normal numbers and signs that one word gives."""

TABLE_SHA256 = "8babbcaf96568f10165a1eab530c0e5c92d04de96761b6dbb3dadfa94baba37f"
"""Digest of the table T as little-endian float32: a machine that computes another table must not take part."""


class Stream(IntEnum):
    """What the bits are for; two purposes never share a stream."""

    DIRECTION = 0
    SIGN = 1
    CHOICE = 2
    SEED = 3
    INITIALISATION = 4


@dataclass(frozen=True, slots=True)
class Noise:
    """Names a direction that has no end: whoever knows the name can make any part of it.

    Attributes:
        seed: Names a family of directions, in [0, 2⁶⁴).
        index: Direction within the family, in [0, 2⁶⁴).
        distribution: Of its entries, eq. (2) or (3).
        stream: Purpose of the bits.

    Example:
        >>> Noise(7, 3).part(0, 4)
        array([ 0.749539  ,  0.06048862,  0.7723773 , -0.04482312],
              dtype=float32)
        >>> Noise(7, 3, Distribution.RADEMACHER).part(2, 6)
        array([ 1.,  1., -1., -1.], dtype=float32)
    """

    seed: int
    index: int
    distribution: Distribution = Distribution.NORMAL
    stream: Stream = Stream.DIRECTION

    def part(self, start: int, stop: int) -> Float32[np.ndarray, "m"]:
        """Makes the entries at positions start, ..., stop-1.

        Args:
            start: First position, >= 0.
            stop: Behind the last one, >= start.

        Returns:
            float32 values, shape [stop - start].
        """
        is_normal = self.distribution is Distribution.NORMAL
        lanes = LANES if is_normal else SIGN_LANES
        skipped, first = divmod(start, WORDS * lanes)
        last = first + stop - start
        words = _philox(self.seed, self.index, self.stream, skipped).random_raw(-(-last // lanes)).astype("<u8", copy=False)
        if is_normal:
            return _quantiles()[words.view("<u2")[first:last]]
        return np.take(_octets(), words.view(np.uint8), axis=0).reshape(-1)[first:last]

    def blocks(self, size: int) -> Iterator[tuple[int, Float32[np.ndarray, "b"]]]:
        """Yields the first entries piece by piece, in memory that does not grow with their number.

        Args:
            size: Number of values n >= 0.

        Yields:
            (start, values): `values` belong at positions start, start + 1, ...; at most `BLOCK` of them.

        Example:
            >>> [(start, len(block)) for start, block in Noise(7, 3).blocks(BLOCK + 2)]
            [(0, 65536), (65536, 2)]
        """
        return ((start, self.part(start, min(start + BLOCK, size))) for start in range(0, size, BLOCK))

    def values(self, size: int) -> Float32[np.ndarray, "n"]:
        """Makes the first n entries.

        Args:
            size: Number of values n >= 0.

        Returns:
            float32 values, shape [n].
        """
        found = np.empty(size, np.float32)
        for start, block in self.blocks(size):
            found[start : start + len(block)] = block
        return found


def gaussian(seed: int, index: int, size: int, *, stream: Stream = Stream.DIRECTION) -> Float32[np.ndarray, "n"]:
    """Draws a standard normal direction, eq. (2).

    Args:
        seed: Names a family of directions, in [0, 2⁶⁴).
        index: Direction within the family, in [0, 2⁶⁴).
        size: Number of values n >= 0.
        stream: Purpose of the bits.

    Returns:
        float32 values, shape [n], a function of (seed, index, stream) alone: a shorter draw is a prefix of a longer one.

    Example:
        >>> gaussian(7, 3, 4)
        array([ 0.749539  ,  0.06048862,  0.7723773 , -0.04482312],
              dtype=float32)
    """
    return Noise(seed, index, stream=stream).values(size)


def rademacher(seed: int, index: int, size: int) -> Float32[np.ndarray, "n"]:
    """Draws random signs, eq. (3).

    Args:
        seed: Names a family of draws, in [0, 2⁶⁴).
        index: Draw within the family, in [0, 2⁶⁴).
        size: Number of values n >= 0.

    Returns:
        float32 values, each -1 or 1, shape [n].

    Example:
        >>> rademacher(7, 3, 5)
        array([1., 1., 1., 1., 1.], dtype=float32)
    """
    return Noise(seed, index, Distribution.RADEMACHER, Stream.SIGN).values(size)


def bits(seed: int, index: int, count: int, *, stream: Stream) -> UInt64[np.ndarray, "count"]:
    """Draws raw 64-bit words, eq. (1).

    Args:
        seed: First half of the key, in [0, 2⁶⁴).
        index: Second half of the key, in [0, 2⁶⁴).
        count: Number of words >= 0.
        stream: Purpose of the bits.

    Returns:
        Words in little-endian byte order, shape [count].

    Example:
        >>> bits(0, 0, 1, stream=Stream.DIRECTION)
        array([213000021201967259], dtype=uint64)
    """
    return _philox(seed, index, stream).random_raw(count).astype("<u8", copy=False)


def permutation(seed: int, index: int, size: int) -> Int64[np.ndarray, "n"]:
    """Shuffles 0 .. size-1 by sorting one random word for each.

    Args:
        seed: Names a family of shuffles, in [0, 2⁶⁴).
        index: Shuffle within the family, in [0, 2⁶⁴).
        size: Number of items n >= 0.

    Returns:
        A permutation, shape [n]; the first k entries are a sample of k without replacement.

    Example:
        >>> permutation(7, 3, 5)
        array([4, 2, 1, 0, 3])
    """
    return np.argsort(bits(seed, index, size, stream=Stream.CHOICE), kind="stable").astype(np.int64)


def derive(seed: int, index: int) -> int:
    """Makes the seed of a child, for example of one round of a run.

    Args:
        seed: The parent's seed, in [0, 2⁶⁴).
        index: Which child, in [0, 2⁶⁴).

    Returns:
        A seed in [0, 2⁶³), which every message format can carry; two children share a key only by a 63-bit coincidence.

    Example:
        >>> derive(7, 0) == derive(7, 1)
        False
    """
    return int(bits(seed, index, 1, stream=Stream.SEED)[0] >> np.uint64(1))


def _philox(seed: int, index: int, stream: Stream, skipped: int = 0) -> np.random.Philox:
    """The generator of eq. (1), behind its first 4 · `skipped` words."""
    assert 0 <= seed < 1 << 64, f"seed {seed} is outside [0, 2**64)"
    assert 0 <= index < 1 << 64, f"index {index} is outside [0, 2**64)"
    # NumPy raises the counter before its first block, so word 0 is the output at counter (1, 0, 0, stream).
    return np.random.Philox(key=np.array([seed, index], np.uint64), counter=np.array([skipped, 0, 0, stream], np.uint64))


@cache
def _quantiles() -> Float32[np.ndarray, "65536"]:
    """The table T of eq. (2), built from its upper half and checked against its digest."""
    normal = NormalDist()
    upper = [normal.inv_cdf((i + 0.5) / BLOCK) for i in range(BLOCK // 2, BLOCK)]
    deviation = math.sqrt(math.fsum(q * q for q in upper) / len(upper))
    half = (np.array(upper) / deviation).astype("<f4")
    table = np.concatenate([-half[::-1], half])
    digest = hashlib.sha256(table.tobytes()).hexdigest()
    assert digest == TABLE_SHA256, f"this machine's normal table has digest {digest}, the protocol's is {TABLE_SHA256}"
    return table


@cache
def _octets() -> Float32[np.ndarray, "256 8"]:
    """The signs of eq. (3) that each byte gives, lowest bit first."""
    bits_of_bytes = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return (1 - 2 * bits_of_bytes.astype(np.int8)).astype(np.float32)


def probe_index(group: int, position: int) -> int:
    """Numbers the random directions of a round without collisions.

    Args:
        group: Whose direction, in [0, 2³²).
        position: Position within the group, in [0, 2³²).

    Returns:
        Index for `gaussian`, in [0, 2⁶⁴).

    Example:
        >>> probe_index(1, 2)
        4294967298
    """
    return (group << 32) | position


def probe_indices(group: int, count: int) -> Iterator[int]:
    """Yields the indices of a group's first `count` directions.

    Args:
        group: Whose directions.
        count: How many, >= 0.

    Yields:
        Indices in order.

    Example:
        >>> list(probe_indices(0, 3))
        [0, 1, 2]
    """
    return (probe_index(group, position) for position in range(count))
