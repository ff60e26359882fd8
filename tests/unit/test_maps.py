"""Maps on the link: whole ones and differences add up to the same bits, and nothing that does not fit the receiver's model is decoded.

Run: pytest tests/unit/test_maps.py
"""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from cooperllm.algorithm import noise
from cooperllm.algorithm.compression import HEADER, pack, packed_bytes
from cooperllm.algorithm.feedback import Moments, contrasts
from cooperllm.algorithm.maps import Fitted, factors, joined, missing, pack_basis, pack_factors, unpack_maps
from cooperllm.errors import DecodeError, ProtocolError
from cooperllm.link.codec import decode, encode
from cooperllm.messages import Maps, Packed

UNIT = 2.0**-24
CLASSES, WIDTH, RANK = 3, 2, 2
SIZES = [(6, 4), (6, 5), (8, 4)]


def drawn(index, *shape):
    return noise.gaussian(5, index, int(np.prod(shape))).reshape(shape)


def bases():
    return [drawn(2 * index, size, WIDTH) for index, (size, _) in enumerate(SIZES)]


def fitted(start=0):
    """Maps whose predictions are dominated by no output."""
    described = drawn(50 + start, 40, 1 + 2 * WIDTH).astype(np.float64)
    return [
        Fitted(maps=drawn(start + index, 2, 1 + 2 * WIDTH, output), xx=described.T @ described) for index, (_, output) in enumerate(SIZES)
    ]


def packed(bits=32, rank=RANK):
    return Maps(
        version=7,
        base_version=-1,
        contrasts=contrasts(drawn(9, 5, CLASSES), 8),
        num_components=WIDTH,
        basis=pack_basis(bases(), bits),
        rank=rank,
        factors=pack_factors(fitted(), rank, bits),
    )


def difference(version, base_version, start):
    return Maps(
        version=version,
        base_version=base_version,
        contrasts=np.zeros((0, CLASSES), np.float32),
        num_components=0,
        basis=None,
        rank=1,
        factors=pack_factors(fitted(start), 1),
    )


# What a fit comes to on the link.


@pytest.mark.parametrize("bits", [4, 8, 32])
def test_every_basis_comes_back_to_its_module(bits):
    found = unpack_maps([decode(encode(packed(bits)), Maps)], SIZES, CLASSES)
    largest = max(np.abs(basis).max() for basis in bases())
    # Half a step of b bits, with the scale of a block rounded up by at most 2⁻¹⁰; 32 bits are rounded twice.
    bound = largest * (2 * UNIT if bits == 32 else (1 + 2.0**-10) / (2 ** (bits - 1) - 1) / 2 + 2 * UNIT)
    for one, other in zip(found, bases(), strict=True):
        assert np.abs(one.basis - other).max() <= bound


def test_maps_of_full_rank_come_back_to_their_modules():
    """Five outputs at most, so that rank 4 and 5 lose nothing but roundings: of factors up to √5 · 4.33 and of sums of five."""
    sizes = [(6, 4)]
    message = replace(packed(), rank=4, basis=pack_basis(bases()[:1], 32), factors=pack_factors(fitted()[:1], 4, 32))
    (found,) = unpack_maps([message], sizes, CLASSES)
    assert np.abs(found.maps - fitted()[0].maps).max() <= 5 * 6 * 4.33 * 5 * UNIT


def test_the_rank_is_spent_where_predictions_move():
    """A large map of a feature that is never there counts for nothing."""
    maps = np.zeros((1, 2, 3), np.float32)
    maps[0, 0, 1], maps[0, 1, 2] = 1.0, 100.0
    left, right = factors(Fitted(maps=maps, xx=np.diag([1.0, 1e-9])), 1)
    assert np.abs(right).round(6).tolist() == [[0, 1, 0]]
    assert np.abs(left).round(6).tolist() == [[1, 0]]


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_no_other_cut_of_that_rank_predicts_more(rank):
    one = fitted()[1]
    root = np.linalg.cholesky(one.xx).T
    wide = np.concatenate([root @ contrast for contrast in one.maps.astype(np.float64)])
    best = np.square(np.linalg.svd(wide, compute_uv=False)[rank:]).sum()
    left, right = factors(one, rank)
    cut = (left.T.astype(np.float64) @ right).reshape(one.maps.shape)
    found = sum(np.square(root @ (contrast - other)).sum() for contrast, other in zip(one.maps, cut, strict=True))
    # Entries below 50 and products of norm below 300, rounded to float32 a few times.
    assert found == pytest.approx(best, rel=1e-4, abs=1e-4)


def test_nothing_but_bases_and_factors_travels():
    entries = sum(RANK * (2 * (1 + 2 * WIDTH) + output) for _, output in SIZES)
    assert len(packed(8).factors.payload) == packed_bytes(1, entries, 8)
    assert len(packed(8).basis.payload) == packed_bytes(1, (6 + 6 + 8) * WIDTH, 8)


# Differences.


def test_whole_maps_and_differences_add_up_in_order_to_the_same_bits():
    chain = [packed(8), difference(8, 7, 20), difference(16, 8, 30)]
    found = unpack_maps([decode(encode(maps), Maps) for maps in chain], SIZES, CLASSES)
    parts = [unpack_maps([packed(8)], SIZES, CLASSES)]
    parts += [unpack_maps([replace(packed(8), rank=1, factors=maps.factors)], SIZES, CLASSES) for maps in chain[1:]]
    for module, (whole, first, second) in zip(found, zip(*parts, strict=True), strict=True):
        assert module.maps.tobytes() == ((whole.maps + first.maps) + second.maps).tobytes()
        assert module.basis.tobytes() == whole.basis.tobytes()


def test_a_fit_beyond_maps_is_what_has_to_be_added():
    described, truth, held = drawn(60, 50, 3), drawn(61, 1, 3, 2), drawn(62, 1, 3, 2)
    sums = Moments.zero(3, 1, 2)
    sums.add(described, [described @ truth[0]])
    left = sums.beyond(held)
    np.testing.assert_allclose(left.solve(0.0), truth - held, atol=1e-4)
    assert left.unexplained(np.zeros((1, 3, 2))) == pytest.approx(1)
    assert left.yy == pytest.approx(np.square(described @ (truth - held)[0], dtype=np.float64).sum(), rel=1e-4)


def versions(chain):
    return [(maps.version, maps.base_version) for maps in chain]


def test_what_arrives_is_put_behind_what_it_is_a_difference_to():
    whole, first, second = packed(8), difference(8, 7, 20), difference(16, 8, 30)
    assert versions(joined((), [whole, first, second])) == [(7, -1), (8, 7), (16, 8)]
    assert versions(joined([whole], [first])) == [(7, -1), (8, 7)]
    # An answer that was lost: the edge sends again what the device has.
    assert versions(joined([whole, first, second], [first, second])) == [(7, -1), (8, 7), (16, 8)]
    assert versions(joined([whole, first, second], [replace(packed(8), version=64)])) == [(64, -1)]


@pytest.mark.parametrize(
    ("held", "arrived"),
    [([], difference(8, 7, 20)), ([packed(8)], difference(16, 8, 20)), ([packed(8)], difference(7, 7, 20))],
    ids=["no whole maps", "a gap", "no progress"],
)
def test_a_chain_with_a_gap_is_refused(held, arrived):
    with pytest.raises(ProtocolError, match=rf"version {arrived.version} as a difference to version {arrived.base_version} found"):
        joined(held, [arrived])


def test_a_receiver_lacks_what_came_after_its_version_or_everything():
    chain = joined((), [packed(8), difference(8, 7, 20), difference(16, 8, 30)])
    assert [versions(missing(chain, version)) for version in (16, 8, 7, -1, 3)] == [
        [],
        [(16, 8)],
        [(8, 7), (16, 8)],
        versions(chain),
        versions(chain),
    ]


# What does not fit.


def of_factors(**changes):
    found = packed()
    return replace(found, factors=replace(found.factors, **changes))


def damaged():
    found = packed()
    entries = (len(found.factors.payload) - HEADER.size) // 4
    bad = found.contrasts.copy()
    bad[0, 0] = np.nan
    huge = 1 << 32
    vector = np.ones((1, entries), np.float32)
    infinite = HEADER.pack(b"CG", 1, 32, 1, entries) + np.full(entries, np.inf, "<f4").tobytes()
    return {
        "another-number-of-classes": replace(found, contrasts=contrasts(drawn(9, 5, CLASSES + 1), 2)),
        "no-contrast": replace(found, contrasts=found.contrasts[:0]),
        "as-many-contrasts-as-classes": replace(found, contrasts=np.eye(CLASSES, dtype=np.float32)),
        "a-contrast-fewer-than-maps": replace(found, contrasts=found.contrasts[:1]),
        "non-finite-contrasts": replace(found, contrasts=bad),
        "no-component": replace(found, num_components=0),
        "a-component-more": replace(found, num_components=WIDTH + 1),
        "more-components-than-inputs": replace(found, num_components=7),
        "huge-components": replace(found, num_components=huge),
        "a-short-basis": replace(found, basis=replace(found.basis, payload=found.basis.payload[:-1])),
        "only-a-difference": replace(difference(8, 7, 20), contrasts=found.contrasts, num_components=WIDTH),
        "no-rank": replace(found, rank=0),
        "a-rank-more": replace(found, rank=RANK + 1),
        "more-rank-than-outputs": replace(found, rank=5),
        "huge-rank": replace(found, rank=huge),
        "no-payload": of_factors(payload=b""),
        "a-short-payload": of_factors(payload=found.factors.payload[:-1]),
        "a-long-payload": of_factors(payload=found.factors.payload + b"\0"),
        "a-payload-for-another-model": of_factors(payload=pack(vector[:, 1:], 32)),
        "two-vectors": of_factors(payload=pack(np.ones((2, entries), np.float32), 32)),
        "a-huge-header": of_factors(payload=HEADER.pack(b"CG", 1, 4, 1, 1 << 60)),
        "infinite-values": of_factors(payload=infinite),
    }


DAMAGED = damaged()


@pytest.mark.parametrize("name", DAMAGED)
def test_what_does_not_fit_the_model_is_refused_before_anything_large_is_allocated(name):
    tracemalloc.start()
    try:
        with pytest.raises(DecodeError, match=r"maps|guide|vector"):
            unpack_maps([DAMAGED[name]], SIZES, CLASSES)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_damaged_difference_is_refused_too():
    damaged_one = replace(difference(8, 7, 20), rank=2)
    with pytest.raises(DecodeError):
        unpack_maps([packed(), damaged_one], SIZES, CLASSES)


@pytest.mark.parametrize("scale", [1e30, 1e10])
def test_values_that_overflow_are_refused(scale):
    """Finite entries times a finite scale may still be infinite: such maps would poison an estimate without a word."""
    found = packed()
    entries = (len(found.factors.payload) - HEADER.size) // 4
    payload = HEADER.pack(b"CG", 1, 32, 1, entries) + np.full(entries, 3e38, "<f4").tobytes()
    with pytest.raises(DecodeError):
        unpack_maps([replace(found, factors=Packed(scale=scale, payload=payload))], SIZES, CLASSES)


@pytest.mark.parametrize("scale", [1e16, 1e30])
def test_factors_whose_product_is_absurd_are_refused(scale):
    found = packed()
    entries = (len(found.factors.payload) - HEADER.size) // 4
    payload = HEADER.pack(b"CG", 1, 32, 1, entries) + np.ones(entries, "<f4").tobytes()
    with pytest.raises(DecodeError, match="maps"):
        unpack_maps([replace(found, factors=Packed(scale=scale, payload=payload))], SIZES, CLASSES)


@pytest.mark.parametrize("sizes", [[], SIZES[:2], [*SIZES, (6, 4)], [(6, 4), (6, 5), (8, 5)]], ids=["none", "fewer", "more", "wider"])
def test_maps_for_another_model_are_refused(sizes):
    with pytest.raises(DecodeError):
        unpack_maps([packed()], sizes, CLASSES)
