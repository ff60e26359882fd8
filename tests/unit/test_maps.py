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
from cooperllm.algorithm.maps import ModuleMaps, pack_maps, unpack_maps
from cooperllm.errors import DecodeError
from cooperllm.link.codec import decode, encode
from cooperllm.messages import Maps, Packed

UNIT = 2.0**-24
CLASSES, WIDTH = 3, 2
SIZES = [(6, 4), (6, 5), (8, 4)]


def drawn(index, *shape):
    return noise.gaussian(5, index, int(np.prod(shape))).reshape(shape)


def modules():
    return [
        ModuleMaps(basis=drawn(2 * index, size, WIDTH), maps=drawn(2 * index + 1, 2, 1 + 2 * WIDTH, output))
        for index, (size, output) in enumerate(SIZES)
    ]


def packed(bits=32):
    return pack_maps(7, contrasts(drawn(9, 5, CLASSES), 8), modules(), bits)


@pytest.mark.parametrize("bits", [4, 8, 32])
def test_every_basis_and_map_comes_back_to_its_module(bits):
    found = unpack_maps(decode(encode(packed(bits)), Maps), SIZES, CLASSES)
    largest = max(np.abs(part).max() for module in modules() for part in (module.basis, module.maps))
    # Half a step of b bits, with the scale of a block rounded up by at most 2⁻¹⁰; 32 bits are rounded twice.
    bound = largest * (2 * UNIT if bits == 32 else (1 + 2.0**-10) / (2 ** (bits - 1) - 1) / 2 + 2 * UNIT)
    for one, other in zip(found, modules(), strict=True):
        assert np.abs(one.basis - other.basis).max() <= bound
        assert np.abs(one.maps - other.maps).max() <= bound


def test_thirty_two_bits_are_exact():
    """With a largest entry that is a power of two, scaling rounds nothing."""
    sent = [ModuleMaps(basis=np.clip(one.basis, -4, 4), maps=np.clip(one.maps, -4, 4)) for one in modules()]
    sent[0].basis[0, 0] = 4.0
    message = pack_maps(7, contrasts(drawn(9, 5, CLASSES), 8), sent, 32)
    for one, other in zip(unpack_maps(message, SIZES, CLASSES), sent, strict=True):
        assert one.basis.tobytes() == other.basis.tobytes()
        assert one.maps.tobytes() == other.maps.tobytes()


def test_nothing_but_bases_and_maps_travels():
    entries = (6 + 6 + 8) * WIDTH + 2 * (1 + 2 * WIDTH) * (4 + 5 + 4)
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


@pytest.mark.parametrize("sizes", [[], SIZES[:2], [*SIZES, (6, 4)], [(6, 4), (6, 5), (8, 5)]], ids=["none", "fewer", "more", "wider"])
def test_maps_for_another_model_are_refused(sizes):
    with pytest.raises(DecodeError):
        unpack_maps(packed(), sizes, CLASSES)
