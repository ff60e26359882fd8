"""Maps on the link: whole ones and differences add up to the same bits, and nothing that does not fit the receiver's model is decoded.

Run: pytest tests/unit/test_maps.py
"""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from cooperllm.algorithm import noise
from cooperllm.algorithm.compression import HEADER, pack, packed_bytes
from cooperllm.algorithm.feedback import Moments
from cooperllm.algorithm.maps import MOST_DIRECTIONS, Fitted, factors, joined, missing, pack_factors, pack_rows, unpack_maps
from cooperllm.config import MOST_MAP_COMPONENTS
from cooperllm.errors import DecodeError, ProtocolError
from cooperllm.link.codec import decode, encode
from cooperllm.messages import Maps

UNIT = 2.0**-24
LAYERS, WIDTH, DIRECTIONS, COMPONENTS, RANK = 3, 6, 2, 2, 2
FEATURES = 1 + 2 * COMPONENTS


def drawn(index, *shape):
    return noise.gaussian(5, index, int(np.prod(shape))).reshape(shape)


def directions():
    return drawn(9, DIRECTIONS, WIDTH)


def bases():
    return [drawn(2 * layer, WIDTH, COMPONENTS) for layer in range(LAYERS)]


def fitted(start=0):
    """Maps whose predictions are dominated by no output."""
    described = drawn(50 + start, 40, FEATURES).astype(np.float64)
    return [Fitted(maps=drawn(start + layer, DIRECTIONS, FEATURES, WIDTH), xx=described.T @ described) for layer in range(LAYERS)]


def packed(bits=32, rank=RANK):
    return Maps(
        version=7,
        base_version=-1,
        num_directions=DIRECTIONS,
        directions=pack_rows([directions()], bits),
        num_components=COMPONENTS,
        basis=pack_rows(bases(), bits),
        rank=rank,
        factors=pack_factors(fitted(), rank, bits),
    )


def difference(version, base_version, start):
    return Maps(
        version=version,
        base_version=base_version,
        num_directions=0,
        directions=None,
        num_components=0,
        basis=None,
        rank=1,
        factors=pack_factors(fitted(start), 1),
    )


def unpacked(*held):
    return unpack_maps([decode(encode(maps), Maps) for maps in held], LAYERS, WIDTH)


# What a fit comes to on the link.


@pytest.mark.parametrize("bits", [4, 8, 32])
def test_directions_come_back_and_every_basis_to_its_layer(bits):
    found = unpacked(packed(bits))

    def share(lost, of):
        return np.linalg.norm(np.subtract(lost, of)) / np.linalg.norm(of)

    # √(1 - κ) of 4 and 8 bits is .107 and .01; the few entries here have shares of their own.
    worst = {4: 0.16, 8: 0.0175, 32: 0}[bits]
    assert share(found.directions, directions()) <= worst
    assert share([layer.basis for layer in found.layers], bases()) <= worst


def test_maps_of_full_rank_come_back_to_their_layers():
    """Six outputs, so that rank 6 loses nothing but roundings: of factors up to √6 · 4.33 and 1, of products and of sums of six."""
    found = unpacked(packed(rank=WIDTH))
    for layer, fit in zip(found.layers, fitted(), strict=True):
        assert np.abs(layer.maps - fit.maps).max() <= 6 * 11 * np.sqrt(6) * 4.33 * UNIT


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
    wide = np.concatenate([root @ direction for direction in one.maps.astype(np.float64)])
    best = np.square(np.linalg.svd(wide, compute_uv=False)[rank:]).sum()
    left, right = factors(one, rank)
    cut = (left.T.astype(np.float64) @ right).reshape(one.maps.shape)
    found = sum(np.square(root @ (direction - other)).sum() for direction, other in zip(one.maps, cut, strict=True))
    # Entries below 50 and products of norm below 300, rounded to float32 a few times.
    assert found == pytest.approx(best, rel=1e-4, abs=1e-4)


def test_nothing_but_directions_bases_and_factors_travels():
    entries = LAYERS * RANK * (DIRECTIONS * FEATURES + WIDTH)
    assert len(packed(8).factors) == packed_bytes(1, entries, 8)
    assert len(packed(8).basis) == packed_bytes(1, LAYERS * WIDTH * COMPONENTS, 8)
    assert len(packed(8).directions) == packed_bytes(1, DIRECTIONS * WIDTH, 8)


# Differences.


def test_whole_maps_and_differences_add_up_in_order_to_the_same_bits():
    chain = [packed(8), difference(8, 7, 20), difference(16, 8, 30)]
    found = unpacked(*chain)
    parts = [unpacked(packed(8)), *(unpacked(replace(packed(8), rank=1, factors=maps.factors)) for maps in chain[1:])]
    assert found.version == 16
    assert found.directions.tobytes() == parts[0].directions.tobytes()
    for layer, (whole, first, second) in zip(found.layers, zip(*(part.layers for part in parts), strict=True), strict=True):
        assert layer.maps.tobytes() == ((whole.maps + first.maps) + second.maps).tobytes()
        assert layer.basis.tobytes() == whole.basis.tobytes()


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


def of(name, payload):
    return replace(packed(), **{name: payload})


def of_value(name, value):
    """Float32 entries, as many as there were."""
    entries = (len(getattr(packed(), name)) - HEADER.size) // 4
    return of(name, HEADER.pack(b"CG", 2, 32, 1, entries, 0) + np.full(entries, value, "<f4").tobytes())


def of_size(num_directions, num_components, width, num_layers=1, rank=1):
    """Maps whose parts are as long as their sizes say, all ones."""
    lengths = (
        num_directions * width,
        num_layers * width * num_components,
        num_layers * rank * (num_directions * (1 + 2 * num_components) + width),
    )
    parts = dict(
        zip(("directions", "basis", "factors"), (pack_rows([np.ones((1, length), np.float32)], 8) for length in lengths), strict=True)
    )
    return Maps(version=7, base_version=-1, num_directions=num_directions, num_components=num_components, rank=rank, **parts)


def damaged():
    found, huge = packed(), 1 << 32
    entries = (len(found.factors) - HEADER.size) // 4
    vector = np.ones((1, entries), np.float32)
    payloads = {name: getattr(found, name) for name in ("directions", "basis", "factors")}
    return {
        "no-direction": of_size(0, COMPONENTS, WIDTH, LAYERS),
        "a-direction-fewer": replace(found, num_directions=DIRECTIONS - 1),
        "a-direction-more": replace(found, num_directions=DIRECTIONS + 1),
        "more-directions-than-width": replace(found, num_directions=WIDTH + 1, directions=pack_rows([drawn(9, WIDTH + 1, WIDTH)], 32)),
        "huge-directions": replace(found, num_directions=huge),
        "directions-of-another-width": replace(found, directions=pack_rows([drawn(9, DIRECTIONS, WIDTH + 1)], 32)),
        "no-component": of_size(DIRECTIONS, 0, WIDTH, LAYERS),
        "a-component-more": replace(found, num_components=COMPONENTS + 1),
        "more-components-than-width": replace(found, num_components=WIDTH + 1, basis=pack_rows([drawn(9, LAYERS * WIDTH, WIDTH + 1)], 32)),
        "huge-components": replace(found, num_components=huge),
        "only-a-difference": difference(8, 7, 20),
        "no-rank": of_size(DIRECTIONS, COMPONENTS, WIDTH, LAYERS, rank=0),
        "a-rank-more": replace(found, rank=RANK + 1),
        "more-rank-than-width": of_size(DIRECTIONS, COMPONENTS, WIDTH, LAYERS, rank=WIDTH + 1),
        "huge-rank": replace(found, rank=huge),
        "a-payload-for-another-model": of("factors", pack(vector[:, 1:], 32)),
        "two-vectors": of("factors", pack(np.ones((2, entries), np.float32), 32)),
        "a-huge-header": of("factors", HEADER.pack(b"CG", 2, 0, 1, 1 << 60, 0)),
        **{f"no-{name}-payload": of(name, b"") for name in payloads},
        **{f"a-short-{name}-payload": of(name, payload[:-1]) for name, payload in payloads.items()},
        **{f"a-long-{name}-payload": of(name, payload + b"\0") for name, payload in payloads.items()},
        **{f"infinite-{name}": of_value(name, np.inf) for name in payloads},
    }


DAMAGED = damaged()


def refuses(message, num_layers=LAYERS, width=WIDTH, match="maps|guide|vector"):
    """With a sentence, and before anything large is allocated."""
    tracemalloc.start()
    try:
        with pytest.raises(DecodeError, match=match):
            unpack_maps([message], num_layers, width)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_maps_whose_parts_are_as_long_as_their_sizes_say_are_taken():
    """What is refused below is not refused for another reason."""
    (first, *_) = unpack_maps([of_size(DIRECTIONS, COMPONENTS, WIDTH, LAYERS, rank=WIDTH)], LAYERS, WIDTH).layers
    assert first.maps.shape == (DIRECTIONS, FEATURES, WIDTH)


@pytest.mark.parametrize("name", DAMAGED)
def test_what_does_not_fit_the_model_is_refused_before_anything_large_is_allocated(name):
    refuses(DAMAGED[name])


@pytest.mark.parametrize(
    ("name", "most", "sizes"),
    [("directions", MOST_DIRECTIONS, lambda count: (count, 1)), ("components", MOST_MAP_COMPONENTS, lambda count: (1, count))],
)
def test_a_receiver_has_a_bound_of_its_own_on_directions_and_components(name, most, sizes):
    """A model may be wide enough for more; what a message may ask for does not grow with its width alone."""
    width = MOST_MAP_COMPONENTS + 9
    (layer,) = unpack_maps([of_size(*sizes(most), width)], 1, width).layers
    assert (layer.maps.shape[0], layer.basis.shape[1]) == sizes(most)
    refuses(of_size(*sizes(most + 1), width), 1, width, f"maps: {most + 1} {name} found, 1 to {most} expected")
    refuses(of_size(*sizes(8), 7), 1, 7, f"maps: 8 {name} found, 1 to 7 expected")


def test_a_difference_brings_no_sizes_of_its_own():
    """Receivers share directions and bases since the whole maps: what a difference claims of them changes nothing."""
    honest = unpacked(packed(8), difference(8, 7, 20))
    claimed = unpacked(packed(8), replace(difference(8, 7, 20), num_directions=(1 << 32) - 1, num_components=(1 << 32) - 1))
    assert [layer.maps.tobytes() for layer in claimed.layers] == [layer.maps.tobytes() for layer in honest.layers]


@pytest.mark.parametrize(
    "changes", [{"rank": 2}, {"rank": 0}, {"rank": (1 << 32) - 1}, {"factors": pack_rows([np.ones((1, 3), np.float32)], 8)}], ids=str
)
def test_a_damaged_difference_is_refused_too(changes):
    with pytest.raises(DecodeError):
        unpack_maps([packed(), replace(difference(8, 7, 20), **changes)], LAYERS, WIDTH)


@pytest.mark.parametrize("name", ["directions", "basis", "factors"])
def test_values_beyond_use_are_refused(name):
    with pytest.raises(DecodeError, match="vector"):
        unpacked(of_value(name, 1e31))


@pytest.mark.parametrize("value", [1e16, 1e30])
def test_factors_whose_product_is_absurd_are_refused(value):
    """Finite factors may have a product that is not: such maps would poison an estimate without a word."""
    with pytest.raises(DecodeError, match="maps"):
        unpacked(of_value("factors", value))


@pytest.mark.parametrize(
    ("num_layers", "width"),
    [(LAYERS - 1, WIDTH), (LAYERS + 1, WIDTH), (LAYERS, WIDTH - 1), (LAYERS, WIDTH + 1), (1000, 4096)],
    ids=["fewer layers", "more layers", "narrower", "wider", "a large model"],
)
def test_maps_for_another_model_are_refused(num_layers, width):
    refuses(packed(), num_layers, width)


def test_a_model_without_a_layer_below_the_last_one_takes_no_maps():
    refuses(packed(), 0, WIDTH, "maps: version 7 found, none expected: no adapted layer")
