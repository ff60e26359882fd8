"""Packed guides: small errors, exact sizes, and nothing but DecodeError for what is not one.

Run: pytest tests/unit/test_compression.py
"""

import itertools
import struct
import tracemalloc

import numpy as np
import pytest

from cooperllm.algorithm import noise
from cooperllm.algorithm.compression import (
    BLOCK,
    HEADER,
    KEPT,
    MAX_COLUMNS,
    STEPS,
    SUPPORTED_BITS,
    Rows,
    allocate,
    pack,
    pack_unbiased,
    pack_vector,
    packed_bytes,
    unpack,
    unpack_vector,
)
from cooperllm.errors import ConfigError, DecodeError

MIB = 1 << 20
CODED_BITS = [1, 2, 4, 8]


def columns(count, size, seed=1):
    return np.stack([noise.gaussian(seed, index, size) for index in range(count)])


def header(*, magic=b"CG", version=2, kind=0, num_columns=1, size=512, seed=0):
    return HEADER.pack(magic, version, kind, num_columns, size, seed)


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


@pytest.mark.parametrize("bits", CODED_BITS)
@pytest.mark.parametrize("kind", ["normal", "spikes", "equal", "ramp"])
def test_a_decoded_vector_keeps_its_share_of_the_energy_whatever_its_entries_are(bits, kind):
    """κ is the mean for normal entries. With one bit a block's own share has a deviation of at most 1.2/√1024 = .04, so that five of them
    over 20 blocks are below .045, and less with more bits. Rotated, equal entries lie on a grid: with 8 bits each may lose (δ/2)²."""
    size = 20 * BLOCK
    given = {
        "normal": noise.gaussian(1, 0, size),
        "spikes": np.where(np.arange(size) % 333 == 0, noise.gaussian(1, 0, size), np.float32(0)),
        "equal": np.ones(size, np.float32),
        "ramp": np.arange(size, dtype=np.float32),
    }[kind].astype(np.float32)
    decoded = unpack_vector(pack_vector(given, bits), size).astype(np.float64)
    kept = (given @ decoded) ** 2 / (decoded @ decoded) / (given.astype(np.float64) @ given)
    assert kept > KEPT[bits] - {1: 0.045, 2: 0.015, 4: 0.002, 8: (STEPS[8] / 2) ** 2}[bits]


def test_the_nearest_multiple_is_sent_or_one_without_bias():
    """Eq. (3) leaves an error at right angles to what was decoded; eq. (4) makes <x, x̂> = |x|², and is longer than x."""
    given = columns(1, 4 * BLOCK)[0]
    nearest = unpack_vector(pack_vector(given, 1), len(given)).astype(np.float64)
    unbiased = unpack_vector(pack_unbiased(given, 1, 5, 6), len(given)).astype(np.float64)
    energy = given.astype(np.float64) @ given
    assert (given - nearest) @ nearest == pytest.approx(0, abs=1e-5 * energy)
    assert given @ unbiased == pytest.approx(energy, rel=1e-5)
    assert unbiased @ unbiased > 1.4 * energy


@pytest.mark.parametrize("bits", CODED_BITS)
def test_the_mean_of_many_senders_is_that_of_their_vectors(bits):
    """One sender's squared error is 1/κ - 1 of the vector's; the mean of 400 has a 400th of it, to a tenth: the error has 4000 degrees of
    freedom, so its relative deviation is √(2/4000) = .022. What is rounded to the nearest keeps its error however often it is sent."""
    given, senders = columns(1, 4 * BLOCK)[0], 400
    energy = given.astype(np.float64) @ given
    mean = np.mean(
        [unpack_vector(pack_unbiased(given, bits, 3, sender), len(given)) for sender in range(senders)], axis=0, dtype=np.float64
    )
    assert senders * ((mean - given) ** 2).sum() / energy == pytest.approx(1 / KEPT[bits] - 1, rel=0.1, abs=2e-5)
    biased = np.mean([unpack_vector(pack_vector(given, bits, sender), len(given)) for sender in range(senders)], axis=0, dtype=np.float64)
    assert (biased @ given) / energy == pytest.approx(KEPT[bits], rel=0.02)


def test_senders_turn_their_vectors_each_in_its_own_way():
    given = columns(1, BLOCK)[0]
    assert pack_unbiased(given, 4, 3, 0) == pack_unbiased(given, 4, 3, 0)
    assert len({pack_unbiased(given, 4, seed, index)[HEADER.size :] for seed in (3, 4) for index in (0, 1)}) == 4


def test_thirty_two_bits_lose_nothing():
    given = columns(3, 1000)
    assert np.array_equal(unpack(pack(given, 32), 1000), given)
    assert np.array_equal(unpack_vector(pack_vector(given[0], 32), 1000), given[0])


@pytest.mark.parametrize("bits", CODED_BITS)
def test_a_length_is_a_factor_and_nothing_else(bits):
    """Powers of two round nothing."""
    given = columns(1, 3000)
    for length in (2.0**-60, 2.0**60):
        found = unpack(pack(given * np.float32(length), bits), 3000)
        assert np.array_equal(found, unpack(pack(given, bits), 3000) * np.float32(length))


@pytest.mark.parametrize("magnitude", [1e-2, 1e-5, 1e-9])
def test_an_even_share_is_a_small_blocks_too(magnitude):
    """LoRA's A beside its B: a block may be far smaller than its neighbour."""
    large, small = columns(2, BLOCK)
    small = small * np.float32(magnitude)
    decoded = unpack_vector(pack_vector(np.concatenate([large, small]), 4), 2 * BLOCK)[BLOCK:]
    assert np.linalg.norm(decoded - small) < 0.13 * np.linalg.norm(small)
    by_energy = unpack(pack(np.concatenate([large, small])[None], 4), 2 * BLOCK)[0, BLOCK:]
    assert not by_energy.any()


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_blocks_of_zeros_stay_zeros_and_take_no_bytes(bits):
    given = np.zeros((2, 3 * BLOCK), np.float32)
    given[1, 0] = 5
    payload = pack(given, bits)
    decoded = unpack(payload, 3 * BLOCK)
    assert not decoded[0].any()
    assert not decoded[1, BLOCK:].any()
    if bits != 32:
        assert len(payload) <= HEADER.size + 2 * 3 + 4 + BLOCK  # a table, a scale, and at most 8 bits of the one block


def test_packing_the_same_vector_gives_the_golden_bytes():
    """The layout is a protocol: header, bits of the one block of 8, its scale, its codes, several to a byte, the first in its lowest bits.

    The signs of seed 111 start + + + + + + + +, so that [2, 0, 0, ...] becomes 2/√8 eight times: one bit says +, and
    <z, q> / |q|² = √2 with q = 1/2 (3)."""
    given = np.array([2, 0, 0, 0, 0, 0, 0, 0], np.float32)
    assert noise.rademacher(111, 0, 8).tolist() == [1] * 8
    packed = pack_vector(given, 1, 111)
    assert packed[: HEADER.size] == struct.pack("<2sBBIQQ", b"CG", 2, 0, 1, 8, 111)
    assert packed[HEADER.size :] == bytes([1]) + np.array([2**0.5], "<f4").tobytes() + bytes([0xFF])
    # Steps of .9957 and .3352 of .7071: codes 1 of -2 ... 1 and 2 of -8 ... 7, raised by 2 and 8.
    assert pack_vector(given, 2, 111)[HEADER.size + 5 :] == bytes([0b11111111, 0b11111111])
    assert pack_vector(given, 4, 111)[HEADER.size + 5 :] == bytes([0xAA] * 4)


def test_the_first_code_of_a_byte_is_in_its_lowest_bits():
    """[1, 1, ..., -1 ...] of eight: the transform has one entry that is not 0, the fifth: signs of its halves differ."""
    given = np.array([1, 1, 1, 1, -1, -1, -1, -1], np.float32)
    codes = pack_vector(given, 2, 111)[HEADER.size + 5 :]
    unpacked = [byte >> shift & 3 for byte in codes for shift in (0, 2, 4, 6)]
    assert unpacked == [2, 2, 2, 2, 3, 2, 2, 2]


# Who gets how many bits.


def test_more_bits_go_where_more_energy_is():
    sizes = np.array([BLOCK] * 4)
    assert allocate(np.array([[1.0, 1.0, 1.0, 1.0]]), sizes, 2, 0).tolist() == [[2, 2, 2, 2]]
    assert allocate(np.array([[1e6, 1e4, 1.0, 0.0]]), sizes, 2, 0).tolist() == [[4, 4, 0, 0]]
    assert allocate(np.array([[1e6, 1e4, 1.0, 0.0]]), sizes, 2, 1).tolist() == [[4, 2, 2, 0]]
    assert allocate(np.array([[1e6, 1e4, 1.0, 0.0]]), sizes, 2, 2).tolist() == [[4, 2, 2, 0]]


def test_columns_count_the_same_whatever_their_lengths():
    shares = np.array([[3.0, 1.0], [1.0, 3.0]])
    found = allocate(shares * [[1.0], [1e9]], np.array([BLOCK, BLOCK]), 1, 0)
    assert found.tolist() == allocate(shares, np.array([BLOCK, BLOCK]), 1, 0).tolist()
    assert found[0].tolist() == found[1, ::-1].tolist()


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("seed", range(6))
def test_taking_gains_in_order_is_nearly_the_best_there_is(bits, seed):
    """All 5⁵ ways of giving five blocks, one of them small, their bits."""
    energies = np.exp(3 * noise.gaussian(seed, 0, 5).astype(np.float64))[None]
    sizes, rates = np.array([BLOCK] * 4 + [128]), list(KEPT)
    ways = np.array(list(itertools.product(range(len(rates)), repeat=5)))
    costs, kept = (np.array(rates)[ways] * sizes).sum(axis=1), (np.array(list(KEPT.values()))[ways] * energies).sum(axis=1)
    budget = bits * sizes.sum()
    found = allocate(energies, sizes, bits, 0)[0]
    assert (found * sizes).sum() <= budget
    assert sum(KEPT[rate] * energy for rate, energy in zip(found.tolist(), energies[0], strict=True)) >= 0.9 * kept[costs <= budget].max()


def test_no_columns_travel_as_a_header():
    payload = pack(np.zeros((0, 100), np.float32), 8)
    assert len(payload) == HEADER.size
    assert unpack(payload, 100).shape == (0, 100)


@pytest.mark.parametrize("bits", [0, 3, 16, 64])
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
def test_every_flipped_bit_of_the_header_is_refused_but_those_of_the_signs_seed(bits):
    """Another seed is another guide, which the plan's digest of the decoded one tells."""
    payload = pack(columns(2, 300), bits)
    for bit in range(8 * (HEADER.size - 8)):
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


@pytest.mark.parametrize("scale", [np.inf, -np.inf, np.nan, 3e38])
@pytest.mark.parametrize("code", [0, 255])
def test_a_scale_that_leaves_no_finite_entry_is_refused(scale, code):
    refuses(header(size=8) + bytes([8]) + struct.pack("<f", scale) + bytes([code] * 8), 8)


@pytest.mark.parametrize("rate", [3, 5, 7, 16, 32, 255])
def test_bits_that_no_block_has_are_refused(rate):
    refuses(header(size=8) + bytes([rate]) + bytes(4 + 8), 8)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_a_non_finite_float_is_refused(value):
    refuses(header(kind=32, size=2) + np.array([1, value], "<f4").tobytes(), 2)


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
        (header(num_columns=MAX_COLUMNS + 1) + bytes((MAX_COLUMNS + 1) * (512 + 5)), 512),
        (header(size=1 << 40) + bytes(1000), 1 << 40),
        (header(kind=3) + bytes(1000), 512),
        (header() + bytes(1000), 512),
        (header() + bytes([8]), 512),
        (header(size=1 << 24) + bytes([8]) * (1 << 14), 1 << 24),
        (header(version=1) + bytes(516), 512),
        (header(magic=b"GC") + bytes(516), 512),
    ],
)
def test_hostile_headers_are_refused_and_allocate_nothing_large(payload, size):
    assert peak_of(lambda: refuses(payload, size)) < MIB


def test_a_guide_for_another_model_is_refused_with_both_sizes():
    with pytest.raises(DecodeError, match="length 300 found, the model has 301"):
        unpack(pack(columns(1, 300), 8), 301)


def test_an_even_share_has_a_size_that_is_known_before_packing():
    for bits in SUPPORTED_BITS:
        for count, size in [(0, 5), (1, 1), (3, 255), (2, 256), (2, 257), (5, 3001)]:
            assert len(pack(np.ones((count, size), np.float32), bits, fewest_bits=bits)) == packed_bytes(count, size, bits)
            assert len(pack(columns(5, size)[:count], bits)) <= packed_bytes(count, size, bits)


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

    assert peak_of(read) < 16 * MIB


def test_a_damaged_row_is_refused_when_it_is_read():
    payload = pack(columns(2, 4), 32)
    rows = Rows(payload[:-4] + np.array([np.nan], "<f4").tobytes(), 4)
    assert np.isfinite(rows[0]).all()
    with pytest.raises(DecodeError, match="guide: a non-finite entry found"):
        rows[1]


@pytest.mark.parametrize(("count", "sentence"), [(0, "0 columns found, 1 expected"), (2, "2 columns found, 1 expected")])
def test_a_vector_is_one_column(count, sentence):
    with pytest.raises(DecodeError, match=sentence):
        unpack_vector(pack(np.ones((count, 9), np.float32), 8), 9)


@pytest.mark.parametrize("value", [np.inf, np.nan])
@pytest.mark.parametrize("bits", [8, 32])
def test_a_vector_that_is_not_finite_is_packed_into_one_that_is_refused(value, bits):
    given = np.array([1, value, 2], np.float32)
    with np.errstate(invalid="ignore"):
        packed = pack_vector(given, bits)
    with pytest.raises(DecodeError, match="guide"):
        unpack_vector(packed, 3)
