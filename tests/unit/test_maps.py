"""Maps on the link: they come back as they were sent, and nothing that does not fit the receiver's model is decoded.

Run: pytest tests/unit/test_maps.py
"""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from cooperllm.algorithm import noise
from cooperllm.algorithm.compression import HEADER, pack, packed_bytes
from cooperllm.algorithm.feedback import contrasts
from cooperllm.algorithm.maps import pack_maps, unpack_maps
from cooperllm.errors import DecodeError
from cooperllm.link.codec import decode, encode
from cooperllm.messages import Maps, Packed

UNIT = 2.0**-24
CLASSES, WIDTH = 3, 2
SIZES = [(6, 4), (6, 5), (8, 4)]
"""The first two layers read the same input."""


def drawn(index, *shape):
    return noise.gaussian(5, index, int(np.prod(shape))).reshape(shape)


def parts():
    bases = [drawn(0, 6, WIDTH), drawn(1, 8, WIDTH)]
    return bases, [drawn(2 + layer, 2, 1 + 2 * WIDTH, size) for layer, (_, size) in enumerate(SIZES)]


def packed(bits=32):
    bases, maps = parts()
    return pack_maps(7, contrasts(drawn(9, 5, CLASSES), 8), [0, 0, 1], bases, maps, bits)


@pytest.mark.parametrize("bits", [4, 8, 32])
def test_every_basis_and_map_comes_back_to_its_layer(bits):
    bases, maps = parts()
    found = unpack_maps(decode(encode(packed(bits)), Maps), SIZES, CLASSES)
    largest = max(np.abs(part).max() for part in (*bases, *maps))
    # Half a step of b bits, with the scale of a block rounded up by at most 2⁻¹⁰; 32 bits are rounded twice.
    bound = largest * (2 * UNIT if bits == 32 else (1 + 2.0**-10) / (2 ** (bits - 1) - 1) / 2 + 2 * UNIT)
    for layer, basis, one_map in zip(found, [bases[0], bases[0], bases[1]], maps, strict=True):
        assert np.abs(layer.basis - basis).max() <= bound
        assert np.abs(layer.maps - one_map).max() <= bound


def test_thirty_two_bits_are_exact():
    """With a largest entry of 1 there is nothing to scale."""
    bases, maps = parts()
    bases[0][0, 0] = 4.0
    maps = [np.clip(one_map, -4, 4) for one_map in maps]
    message = pack_maps(7, contrasts(drawn(9, 5, CLASSES), 8), [0, 0, 1], bases, maps, 32)
    for layer, basis, one_map in zip(unpack_maps(message, SIZES, CLASSES), [bases[0], bases[0], bases[1]], maps, strict=True):
        assert layer.basis.tobytes() == basis.tobytes()
        assert layer.maps.tobytes() == one_map.tobytes()


def test_a_basis_that_two_layers_share_travels_once():
    entries = 6 * WIDTH + 8 * WIDTH + 2 * (1 + 2 * WIDTH) * (4 + 5 + 4)
    assert len(packed(8).values.payload) == packed_bytes(1, entries, 8)


def of_values(**changes):
    found = packed()
    return replace(found, values=replace(found.values, **changes))


def damaged():
    found = packed()
    entries = (len(found.values.payload) - HEADER.size) // 4
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
        "a-layer-fewer": replace(found, basis_of_layer=(0, 1)),
        "a-layer-more": replace(found, basis_of_layer=(0, 0, 1, 1)),
        "no-layer": replace(found, basis_of_layer=()),
        "a-gap-between-bases": replace(found, basis_of_layer=(0, 0, 2)),
        "no-first-basis": replace(found, basis_of_layer=(1, 1, 2)),
        "inputs-of-different-size-share-a-basis": replace(found, basis_of_layer=(0, 0, 0)),
        "bases-in-another-order": replace(found, basis_of_layer=(0, 1, 1)),
        "a-basis-more": replace(found, basis_of_layer=(0, 1, 2)),
        "a-huge-basis": replace(found, basis_of_layer=(0, 0, 1_000_000)),  # a list up to it would take 40 MB
        "no-component": replace(found, num_components=0),
        "a-component-more": replace(found, num_components=WIDTH + 1),
        "more-components-than-inputs": replace(found, num_components=7),
        "huge-components": replace(found, num_components=huge),
        "no-payload": of_values(payload=b""),
        "a-short-payload": of_values(payload=found.values.payload[:-1]),
        "a-long-payload": of_values(payload=found.values.payload + b"\0"),
        "a-payload-for-another-model": of_values(payload=pack(vector[:, 1:], 32)),
        "two-vectors": of_values(payload=pack(np.ones((2, entries), np.float32), 32)),
        "a-huge-header": of_values(payload=HEADER.pack(b"CG", 1, 4, 1, 1 << 60)),
        "infinite-values": of_values(payload=infinite),
    }


DAMAGED = damaged()


@pytest.mark.parametrize("name", DAMAGED)
def test_what_does_not_fit_the_model_is_refused_before_anything_large_is_allocated(name):
    tracemalloc.start()
    try:
        with pytest.raises(DecodeError, match=r"maps|guide|vector"):
            unpack_maps(DAMAGED[name], SIZES, CLASSES)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("scale", [1e30, 1e10])
def test_values_that_overflow_are_refused(scale):
    """Finite entries times a finite scale may still be infinite: such maps would poison an estimate without a word."""
    found = packed()
    entries = (len(found.values.payload) - HEADER.size) // 4
    payload = HEADER.pack(b"CG", 1, 32, 1, entries) + np.full(entries, 3e38, "<f4").tobytes()
    with pytest.raises(DecodeError):
        unpack_maps(replace(found, values=Packed(scale=scale, payload=payload)), SIZES, CLASSES)


def test_maps_for_a_model_without_adapted_layers_are_refused():
    with pytest.raises(DecodeError, match="for 0 adapted layers"):
        unpack_maps(replace(packed(), basis_of_layer=()), [], CLASSES)
