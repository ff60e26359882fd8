"""The noise protocol: the same (seed, index) gives the same bits for ever, and different ones share nothing.

Run: pytest tests/unit/test_noise.py
"""

import hashlib
import math
from statistics import NormalDist

import numpy as np
import pytest

from cooperllm.algorithm import noise
from cooperllm.algorithm.noise import BLOCK, Noise, Stream, probe_index
from cooperllm.config import Distribution

WORD = (1 << 64) - 1

KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b"),
    ((WORD,) * 4, (WORD,) * 2, "87b092c3013fe90b 438c3c67be8d0224 9cc7d7c69cd777b6 a09caebf594f0ba0"),
    (
        (0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89),
        (0x452821E638D01377, 0xBE5466CF34E90C6C),
        "a528f45403e61d95 38c72dbd566e9788 a5a1610e72fd18b5 57bd43b5e52b7fe6",
    ),
]
"""philox4x64-10 in kat_vectors of Random123 (Salmon et al., 2011): counter, key, output."""


def philox(counter: tuple[int, ...], key: tuple[int, ...]) -> list[int]:
    """Philox4x64-10 as its paper writes it, in Python's integers."""
    (a, b, c, d), (left, right) = counter, key
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * a, 0xCA5A826395121157 * c
        a, b, c, d = (second >> 64) ^ b ^ left, second & WORD, (first >> 64) ^ d ^ right, first & WORD
        left, right = (left + 0x9E3779B97F4A7C15) & WORD, (right + 0xBB67AE8584CAA73B) & WORD
    return [a, b, c, d]


def before(counter: tuple[int, ...]) -> list[int]:
    """The 256-bit counter one lower: NumPy raises it before its first block."""
    whole = (sum(word << 64 * place for place, word in enumerate(counter)) - 1) % (1 << 256)
    return [whole >> 64 * place & WORD for place in range(4)]


def sha256(values: np.ndarray, dtype: str) -> str:
    return hashlib.sha256(values.astype(dtype).tobytes()).hexdigest()


@pytest.fixture
def fresh_table():
    """The table is computed again in this test and after it."""
    noise._quantiles.cache_clear()
    yield
    noise._quantiles.cache_clear()


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_numpys_philox_gives_the_published_known_answers(counter, key, expected):
    words = np.random.Philox(key=np.array(key, np.uint64), counter=np.array(before(counter), np.uint64)).random_raw(4)
    assert " ".join(f"{word:016x}" for word in words) == expected
    assert " ".join(f"{word:016x}" for word in philox(counter, key)) == expected


@pytest.mark.parametrize("stream", list(Stream))
def test_words_are_philox_of_key_and_counter_without_numpy(stream):
    seed, index = WORD - 5, 1 << 63
    expected = philox((1, 0, 0, stream), (seed, index)) + philox((2, 0, 0, stream), (seed, index))
    assert noise.bits(seed, index, 8, stream=stream).tolist() == expected


def test_noise_matches_golden_vectors():
    direction = noise.gaussian(7, 3, 100_000)
    assert [float(value).hex() for value in direction[:3]] == ["0x1.7fc3940000000p-1", "0x1.ef85d40000000p-5", "0x1.8b750a0000000p-1"]
    assert float(direction[-1]).hex() == "0x1.d920060000000p-1"
    assert sha256(direction, "<f4") == "c763cd1b80af8cfbc5574a05ba258eec904628b5c11d5508c5e66bddc39ce0e4"
    signs = noise.rademacher(7, 3, 100_000)
    assert "".join("-+"[int(sign > 0)] for sign in signs[:24]) == "++++++++-+---+--+---+-+-"
    assert sha256(signs, "i1") == "c468edd53f5720b1c977a82880f699db578560d02b181a45d76bdeb79668ac77"
    assert noise.permutation(7, 3, 10).tolist() == [4, 2, 1, 6, 0, 7, 8, 5, 3, 9]
    assert sha256(noise.permutation(7, 3, 1000), "<i8") == "3c984d52cb5b979fe794da93f43a43d38480d59acbbc27e13f00ffec532d1c27"
    seeds = [noise.derive(7, 3), noise.derive(0, 0), noise.derive(WORD, WORD)]
    assert seeds == [7391366078291757867, 2756134701292975196, 7148328642652818733]
    assert [f"{noise.bits(7, 3, 1, stream=stream)[0]:016x}" for stream in Stream] == [
        "7b6cc7b1862cc5f2",
        "355e1e86e4aedd00",
        "5bf5d9c6fd1f03c7",
        "cd26d092fae79656",
        "9f70021e58b47034",
    ]


def test_streams_keep_their_numbers():
    assert {stream.name: stream.value for stream in Stream} == {
        "DIRECTION": 0,
        "SIGN": 1,
        "CHOICE": 2,
        "SEED": 3,
        "INITIALISATION": 4,
    }


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 5, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK])
def test_a_shorter_draw_is_a_prefix_of_a_longer_one(size):
    longer = 2 * BLOCK + 7
    assert np.array_equal(noise.gaussian(1, 2, size), noise.gaussian(1, 2, longer)[:size])
    assert np.array_equal(noise.rademacher(1, 2, size), noise.rademacher(1, 2, longer)[:size])


def test_blocks_follow_each_other_and_make_the_whole():
    size = 2 * BLOCK + 5
    starts, blocks = zip(*Noise(5, 6).blocks(size), strict=True)
    assert starts == (0, BLOCK, 2 * BLOCK)
    assert np.array_equal(np.concatenate(blocks), noise.gaussian(5, 6, size))


@pytest.mark.parametrize("distribution", Distribution)
@pytest.mark.parametrize(("start", "stop"), [(0, 0), (0, 1), (15, 17), (255, 257), (256, 512), (7, 4000), (BLOCK - 1, BLOCK + 1)])
def test_any_part_of_a_direction_is_that_part_of_the_whole(distribution, start, stop):
    direction = Noise(5, 6, distribution)
    assert np.array_equal(direction.part(start, stop), direction.values(2 * BLOCK)[start:stop])


def test_directions_of_signs_are_signs_and_not_those_of_another_purpose():
    found = Noise(5, 6, Distribution.RADEMACHER).values(100)
    assert set(found.tolist()) == {-1.0, 1.0}
    assert not np.array_equal(found, noise.rademacher(5, 6, 100))


def test_lanes_are_taken_from_the_low_end_of_a_word_on_any_machine():
    words = noise.bits(9, 4, 100, stream=Stream.DIRECTION)
    lanes = [int(word) >> 16 * lane & 0xFFFF for word in words for lane in range(4)]
    assert np.array_equal(noise.gaussian(9, 4, 400), noise._quantiles()[lanes])
    words = noise.bits(9, 4, 3, stream=Stream.SIGN)
    assert noise.rademacher(9, 4, 150).tolist() == [1 - 2 * (int(words[bit // 64]) >> bit % 64 & 1) for bit in range(150)]


def test_words_are_little_endian_and_other_dtypes_have_native_bytes():
    assert noise.bits(1, 1, 4, stream=Stream.SEED).astype("<u8").tobytes() == b"".join(
        word.to_bytes(8, "little") for word in philox((1, 0, 0, Stream.SEED), (1, 1))
    )
    assert noise.gaussian(1, 1, 4).dtype == noise.rademacher(1, 1, 4).dtype == np.float32
    assert noise.permutation(1, 1, 4).dtype == np.int64


@pytest.mark.parametrize(
    ("one", "other"),
    [((16, 1), (17, 0)), ((0, 1), (1, 0)), ((7, 3), (7, 4)), ((7, 3), (8, 3)), ((7, probe_index(0, 1)), (7, probe_index(1, 0)))],
)
def test_neighbours_are_unrelated(one, other):
    """(16, 1) and (17, 0) are the same directions where seed + index is the key, as in DeComFL."""
    size = 10_000
    left, right = noise.gaussian(*one, size), noise.gaussian(*other, size)
    # The mean of products of independent unit normals has a standard error of 1/√n.
    assert abs(float(np.mean(left.astype(np.float64) * right))) < 5 / math.sqrt(size)
    assert noise.derive(*one) != noise.derive(*other)


def test_no_two_streams_share_a_word():
    words = np.concatenate([noise.bits(7, 3, 1000, stream=stream) for stream in Stream])
    # 5000 words of 64 bits meet by chance with probability 5000²/2/2⁶⁴ < 10⁻¹².
    assert len(np.unique(words)) == len(words)


def test_the_table_is_symmetric_and_rises():
    table = noise._quantiles()
    assert len(table) == 1 << 16
    assert np.array_equal(table, -table[::-1])
    assert (np.diff(table) > 0).all()


def test_the_table_has_mean_zero_exactly_and_variance_one():
    table = noise._quantiles().astype(np.float64)
    assert math.fsum(table) == 0
    # Rounding to float32 changes a value by a share of at most 2⁻²⁴, hence a square by 2⁻²³; the rest cancels in double precision.
    assert abs(math.fsum(table * table) / len(table) - 1) < 2**-23 * (1 + 2**-20)


def test_the_tables_fourth_moment_is_a_normals():
    table = noise._quantiles().astype(np.float64)
    normal, slice_ = NormalDist(), 2.0**-16
    edge = normal.inv_cdf(1 - slice_)
    # An even power rises on x > 0, so a midpoint errs by less than slice · (power at its right end - at its left): summed, slice · edgeᵖ.
    # Beyond the last edge both the table and the normal hold at most the normal's own tail: ∫x²φ = eφ(e) + Q, ∫x⁴φ = (e³ + 3e)φ(e) + 3Q.
    second = 2 * (slice_ * edge**2 + edge * normal.pdf(edge) + slice_)
    fourth = 2 * (slice_ * edge**4 + (edge**3 + 3 * edge) * normal.pdf(edge) + 3 * slice_)
    # Dividing by c, with |c² - 1| < second, changes a fourth moment of 3 by 2 · 3 · second to first order.
    assert abs(math.fsum(table**4) / len(table) - 3) < fourth + 6 * second < 0.03


def test_a_long_draw_has_the_moments_of_a_normal():
    size = 200_000
    drawn = noise.gaussian(11, 12, size).astype(np.float64)
    # Standard errors: Var x = 1, Var x² = 2, Var x³ = 15, Var x⁴ = 105 - 9.
    for power, (moment, variance) in {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}.items():
        assert abs(np.mean(drawn**power) - moment) < 5 * math.sqrt(variance / size), power


def test_signs_are_balanced():
    signs = noise.rademacher(3, 4, 100_000)
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 5 / math.sqrt(len(signs))


@pytest.mark.parametrize("size", [0, 1, 2, 1000])
def test_a_permutation_holds_every_item_once(size):
    assert sorted(noise.permutation(1, 2, size).tolist()) == list(range(size))


def test_every_first_item_is_equally_likely():
    draws, size = 4000, 5
    counts = np.bincount([noise.permutation(seed, 0, size)[0] for seed in range(draws)], minlength=size)
    # Binomial with p = 1/5: standard deviation √(draws · 0.16).
    assert np.abs(counts - draws / size).max() < 5 * math.sqrt(draws * 0.16)


def test_a_childs_seed_fits_a_message():
    children = [noise.derive(7, index) for index in range(1000)]
    assert all(0 <= child < 1 << 63 for child in children)
    assert len(set(children)) == len(children)


def test_numpys_global_generator_is_neither_used_nor_moved(fresh_table):
    before_all = np.random.get_state()[1:3]  # noqa: NPY002 -- the state that must not move
    noise.gaussian(1, 2, 10)
    noise.rademacher(1, 2, 10)
    noise.permutation(1, 2, 10)
    noise.derive(1, 2)
    keys, position = np.random.get_state()[1:3]  # noqa: NPY002
    assert np.array_equal(keys, before_all[0])
    assert position == before_all[1]


def test_a_drawn_direction_belongs_to_the_caller():
    first = noise.gaussian(7, 3, 100)
    first[:] = 0
    assert noise.gaussian(7, 3, 100).any()


def test_a_machine_with_another_table_refuses(monkeypatch, fresh_table):
    monkeypatch.setattr(noise, "TABLE_SHA256", "0" * 64)
    with pytest.raises(AssertionError, match="normal table has digest"):
        noise.gaussian(7, 3, 4)


@pytest.mark.parametrize(("seed", "index"), [(-1, 0), (0, -1), (1 << 64, 0), (0, 1 << 64)])
def test_a_key_beyond_64_bits_is_refused_instead_of_wrapped(seed, index):
    with pytest.raises(AssertionError, match="outside"):
        noise.gaussian(seed, index, 4)
