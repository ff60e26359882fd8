"""Packed guides: small errors, exact sizes, and nothing but DecodeError for what is not one.

Run: pytest tests/unit/test_compression.py
"""

import math
import struct
import tracemalloc

import numpy as np
import pytest

from cooperllm.algorithm import noise
from cooperllm.algorithm.compression import (
    BLOCK,
    HEADER,
    MAX_COLUMNS,
    SUPPORTED_BITS,
    Rows,
    pack,
    pack_vector,
    packed_bytes,
    unpack,
    unpack_vector,
)
from cooperllm.errors import ConfigError, DecodeError
from cooperllm.messages import Packed

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
    given[:, 17] = 7.3  # divided by 8, the power of two above it: that rounds nothing
    assert np.array_equal(unpack(pack(given, 32), 1000), given / 8)
    assert np.array_equal(unpack_vector(pack_vector(given[0], 32), 1000), given[0])


@pytest.mark.parametrize("bits", [4, 8])
def test_the_largest_entry_becomes_one(bits):
    decoded = unpack(pack(columns(1, 600), bits), 600)
    # The scale is rounded up to half precision: at most one unit in the last place, 2**-10.
    assert np.abs(decoded).max() == pytest.approx(1, rel=2**-10)


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_the_length_of_a_column_does_not_travel(bits):
    given = columns(1, 600)
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


def test_a_dither_rounds_up_or_down_and_exact_bits_ignore_it():
    """Scale 1/8: 2.25 and -2.25 steps become 2 and -3 where the dither is small, 3 and -2 where it is large."""
    column = np.array([[0.875, 2.25 / 8, -2.25 / 8]], np.float32)
    dithers = [np.full(3, value) for value in (0.125, 0.5, 0.875)]
    codes = [np.rint(unpack(pack(column, 4, dither), 3)[0] * 7).tolist() for dither in dithers]
    assert codes == [[7, 2, -3], [7, 2, -2], [7, 3, -2]]
    assert pack(column, 32, dithers[0]) == pack(column, 32)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_mean_of_many_senders_is_that_of_their_vectors(bits):
    """Each entry of the mean of 400 has deviation at most a step / (2 √400), and 1000 entries stay within 5 of them but for 6e-4."""
    vector, senders = columns(1, 1000)[0], 400
    sent = [unpack_vector(pack_vector(vector, bits, noise.uniform(3, sender, 1000)), 1000) for sender in range(senders)]
    step = 4.33 / (2 ** (bits - 1) - 1) * (1 + 2**-10)
    assert np.abs(np.mean(sent, axis=0, dtype=np.float64) - vector).max() < 5 * step / 2 / math.sqrt(senders)
    nearest = unpack_vector(pack_vector(vector, bits), 1000)
    assert np.abs(nearest - vector).max() > 5 * step / 2 / math.sqrt(senders)


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


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_rows_decoded_one_at_a_time_are_the_rows_decoded_together(bits):
    payload = pack(columns(5, 300), bits)
    whole, rows = unpack(payload, 300), Rows(payload, 300)
    assert len(rows) == 5
    assert np.array_equal(list(rows), whole)
    assert np.array_equal(rows[-1], whole[-1])
    assert np.array_equal(list(rows[1:4]), whole[1:4])
    assert np.array_equal(list(rows[1:4][1:]), whole[2:4])
    with pytest.raises(IndexError):
        rows[2:][3]


def test_rows_are_not_held_in_memory_together():
    """64 rows of 1 MiB each: only the one in hand is decoded."""
    payload = pack(np.ones((64, MIB // 4), np.float32), 8)

    def read():
        for row in Rows(payload, MIB // 4):
            assert row[0] > 0

    assert peak_of(read) < 8 * MIB


def test_a_damaged_row_is_refused_when_it_is_read():
    payload = pack(columns(2, 4), 32)
    rows = Rows(payload[:-4] + np.array([np.nan], "<f4").tobytes(), 4)
    assert np.isfinite(rows[0]).all()
    with pytest.raises(DecodeError, match="guide: a non-finite entry found"):
        rows[1]


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("length", [1e-20, 1.0, 1e20])
def test_a_packed_vector_keeps_its_length(bits, length):
    given = np.float32(length) * columns(1, 3000)[0]
    found = unpack_vector(pack_vector(given, bits), 3000)
    # The error of an entry has variance s²/12, s <= 4.33/levels: at most 1.6 % of the squares with 7 levels; rounding is far below.
    share = np.linalg.norm(found.astype(np.float64) - given) / np.linalg.norm(given.astype(np.float64))
    assert share < {4: math.sqrt(4.33**2 / 7**2 / 12), 8: 4.33 / 127 / math.sqrt(12), 32: 2**-23}[bits]


def test_thirty_two_bits_round_an_entry_twice_and_zeros_never():
    given = columns(1, 1000)[0]
    given[3] = 0
    found = unpack_vector(pack_vector(given, 32), 1000)
    assert (np.abs(found - given.astype(np.float64)) <= 2 * 2.0**-24 * (1 + 2**-20) * np.abs(given)).all()
    assert unpack_vector(pack_vector(np.zeros(7, np.float32), 32), 7).tolist() == [0] * 7


@pytest.mark.parametrize(("count", "sentence"), [(0, "0 columns found, 1 expected"), (2, "2 columns found, 1 expected")])
def test_a_vector_is_one_column(count, sentence):
    with pytest.raises(DecodeError, match=sentence):
        unpack_vector(Packed(scale=1.0, payload=pack(np.ones((count, 9), np.float32), 8)), 9)


@pytest.mark.parametrize("value", [np.inf, np.nan])
@pytest.mark.parametrize("bits", [8, 32])
def test_a_vector_that_is_not_finite_is_packed_into_one_that_is_refused(value, bits):
    given = np.array([1, value, 2], np.float32)
    with np.errstate(invalid="ignore"):
        packed = pack_vector(given, bits)
    with pytest.raises(DecodeError, match="guide"):
        unpack_vector(packed, 3)
