"""Packed guides: small errors, exact sizes, and nothing but DecodeError for what is not one.

Run: pytest tests/unit/test_compression.py
"""

import struct
import tracemalloc

import numpy as np
import pytest

from cooperllm.algorithm import noise
from cooperllm.algorithm.compression import BLOCK, HEADER, MAX_COLUMNS, SUPPORTED_BITS, pack, packed_bytes, unpack
from cooperllm.errors import ConfigError, DecodeError

MIB = 1 << 20


def columns(count, size, seed=1):
    return np.stack([noise.gaussian(seed, index, size) for index in range(count)])


def header(*, magic=b"CG", version=1, bits=8, num_columns=1, size=512):
    return HEADER.pack(magic, version, bits, num_columns, size)


def peak_of(action):
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def refuses(payload, size):
    with pytest.raises(DecodeError, match="guide"):
        unpack(payload, size)


@pytest.mark.parametrize(("bits", "expected"), [(4, 0.98), (8, 0.9999)])
def test_a_decoded_column_points_where_the_column_pointed(bits, expected):
    """Error of one entry: s²/12 with s = max/levels. No lane of the noise exceeds 4.33, so s <= 4.33/levels: cos = 1/√(1 + s²/12) is
    at least 0.9844 with 7 levels and 0.99995 with 127."""
    given = columns(3, 10_000).astype(np.float64)
    decoded = unpack(pack(given.astype(np.float32), bits), 10_000).astype(np.float64)
    cosines = (given * decoded).sum(axis=1) / np.linalg.norm(given, axis=1) / np.linalg.norm(decoded, axis=1)
    assert cosines.min() > expected


def test_thirty_two_bits_lose_nothing():
    given = columns(3, 1000)
    given[:, 17] = 8  # the largest entry is a power of two: dividing by it is exact
    assert np.array_equal(unpack(pack(given, 32), 1000), given / 8)


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_the_largest_entry_becomes_one_whatever_the_length(bits):
    given = columns(1, 600)
    decoded = unpack(pack(given, bits), 600)
    # The scale is rounded up to half precision: at most one unit in the last place, 2**-10.
    assert np.abs(decoded).max() == pytest.approx(1, rel=2**-10)
    for length in (2.0**-100, 2.0**100):
        assert pack(given * np.float32(length), bits) == pack(given, bits)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("magnitude", [1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-9])
def test_a_block_of_small_entries_is_within_half_a_step_too(bits, magnitude):
    """A block may be far smaller than the column's largest entry, as LoRA's A beside its B. Half precision has steps of 2⁻²⁴ near 0,
    so that a scale may be that much too large, and an entry off by half of it."""
    small = np.float32(magnitude / 4.33) * noise.gaussian(1, 0, BLOCK)
    column = np.concatenate([np.ones(BLOCK, np.float32), small])
    decoded = unpack(pack(column[None], bits), 2 * BLOCK)[0, BLOCK:]
    step = np.abs(small).max() / (2 ** (bits - 1) - 1) * (1 + 2**-10) + 2**-24
    assert np.abs(decoded - small).max() <= step / 2


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_zeros_stay_zeros(bits):
    given = np.zeros((2, 3 * BLOCK), np.float32)
    given[1, 0] = 5
    decoded = unpack(pack(given, bits), 3 * BLOCK)
    assert not decoded[0].any()
    assert not decoded[1, 1:].any()


def test_both_signs_of_every_code_survive():
    """The scale 1/8 is a half-precision number, so that the codes -7 ... 7 must come back exactly."""
    codes = np.arange(-7, 8).astype(np.float32)
    column = np.zeros(2 * BLOCK, np.float32)
    column[: len(codes)] = codes / 8
    column[BLOCK] = 1
    assert np.array_equal(unpack(pack(column[None], 4), 2 * BLOCK)[0, : len(codes)], codes / 8)


def test_odd_lengths_keep_their_last_nibble():
    column = np.array([[1, -1, 1]], np.float32)
    assert np.sign(unpack(pack(column, 4), 3)).tolist() == [[1, -1, 1]]


def test_packing_the_same_columns_gives_the_golden_bytes():
    """The layout is a protocol: columns [1, -1/2] with 8 bits are the header, one half-precision scale 1/127, and codes 127, -63; with 4
    bits, two codes share a byte, the first in its low half, each raised by 8."""
    found = pack(np.array([[2, -1]], np.float32), 8)
    # 1/127 and 1/7 lie between two half-precision numbers: the upper ones are 0x2009 and 0x3093, and 0.5 / 0x2009 rounds to 63.
    assert found == struct.pack("<2sBBIQ", b"CG", 1, 8, 1, 2) + b"\x09\x20" + bytes([127, 256 - 63])
    assert pack(np.array([[7, -1, 3]], np.float32), 4)[HEADER.size :] == b"\x93\x30" + bytes([
        15 | 7 << 4,
        11 | 8 << 4,
    ])


def test_no_columns_travel_as_a_header():
    payload = pack(np.zeros((0, 100), np.float32), 8)
    assert len(payload) == HEADER.size
    assert unpack(payload, 100).shape == (0, 100)


@pytest.mark.parametrize("bits", [0, 1, 16, 64])
def test_other_bits_are_a_setting_out_of_its_domain(bits):
    with pytest.raises(ConfigError, match=f"found {bits}, expected one of"):
        pack(np.ones((1, 4), np.float32), bits)


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_every_truncation_is_refused(bits):
    payload = pack(columns(2, 300), bits)
    for length in range(0, len(payload), 7):
        refuses(payload[:length], 300)
    refuses(payload[:-1], 300)
    refuses(payload + b"\0", 300)


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_every_flipped_bit_of_the_header_is_refused(bits):
    payload = pack(columns(2, 300), bits)
    for bit in range(8 * HEADER.size):
        damaged = bytearray(payload)
        damaged[bit // 8] ^= 1 << bit % 8
        refuses(bytes(damaged), 300)


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_a_flipped_bit_of_the_body_is_refused_or_still_finite(bits):
    payload = pack(columns(1, 300), bits)
    for bit in range(8 * HEADER.size, 8 * len(payload), 3):
        damaged = bytearray(payload)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            decoded = unpack(bytes(damaged), 300)
        except DecodeError:
            continue
        assert decoded.shape == (1, 300)
        assert np.isfinite(decoded).all()


@pytest.mark.parametrize("scale", [0x7C00, 0xFC00, 0x7E00, 0x7D00], ids=["inf", "-inf", "nan", "signalling nan"])
@pytest.mark.parametrize("code", [0, 1])
def test_a_non_finite_scale_is_refused(scale, code):
    refuses(header(size=4) + struct.pack("<H", scale) + bytes([code] * 4), 4)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_a_non_finite_float_is_refused(value):
    refuses(header(bits=32, size=2) + np.array([1, value], "<f4").tobytes(), 2)


@pytest.mark.parametrize(
    ("payload", "size"),
    [
        (b"", 512),
        (header(), 512),
        (header(size=1 << 63), 512),
        (header(size=1 << 63), 1 << 63),
        (header(size=(1 << 64) - 1, num_columns=MAX_COLUMNS), (1 << 64) - 1),
        (header(num_columns=(1 << 32) - 1), 512),
        (header(num_columns=MAX_COLUMNS), 512),
        (header(num_columns=MAX_COLUMNS + 1) + bytes((MAX_COLUMNS + 1) * (512 + 4)), 512),
        (header(size=1 << 40) + bytes(1000), 1 << 40),
        (header(bits=3) + bytes(1000), 512),
        (header(bits=0) + bytes(1000), 512),
        (header(version=2) + bytes(516), 512),
        (header(magic=b"GC") + bytes(516), 512),
    ],
)
def test_hostile_headers_are_refused_and_allocate_nothing_large(payload, size):
    assert peak_of(lambda: refuses(payload, size)) < MIB


def test_a_guide_for_another_model_is_refused_with_both_sizes():
    with pytest.raises(DecodeError, match="length 300 found, the model has 301"):
        unpack(pack(columns(1, 300), 8), 301)


def test_size_is_known_before_packing():
    for bits in SUPPORTED_BITS:
        for count, size in [(0, 5), (1, 1), (3, 255), (2, 256), (2, 257), (5, 1001)]:
            assert len(pack(np.ones((count, size), np.float32), bits)) == packed_bytes(count, size, bits)
