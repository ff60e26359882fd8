"""Bytes from anywhere: a message of the declared types, or DecodeError, and never more memory than the bytes themselves.

Run: pytest tests/unit/test_codec.py
"""

import tracemalloc

import msgspec
import numpy as np
import pytest
import sample_messages

from cooperllm.algorithm.noise import probe_index, probe_indices
from cooperllm.errors import DecodeError
from cooperllm.link import codec
from cooperllm.link.codec import decode, encode
from cooperllm.messages import (
    Chosen,
    DeviceReport,
    EdgeAnswer,
    EdgeOrder,
    Feedback,
    Grouping,
    Guide,
    Maps,
    Order,
    Outcome,
    Plan,
    Probes,
    RandomSlopes,
    RandomTerm,
    Snapshot,
    Spent,
    Update,
)

MIB = 1 << 20

ARRAY = ["<f4", [2], np.array([1, -2], "<f4").tobytes()]


VALUES = b""
MAPS = {
    "version": 1, "base_version": -1, "num_directions": 1, "directions": VALUES, "num_components": 1, "basis": VALUES, "rank": 1,
    "factors": VALUES,
}  # fmt: skip


def term(array=ARRAY, **changes):
    """Bytes of a RandomTerm, field by field."""
    return msgspec.msgpack.encode({"group": 1, "coefficients": array} | changes)


def nested(depth, opener=b"\x91"):
    """A term whose array is a list in a list in a list."""
    return msgspec.msgpack.encode({"group": 1, "coefficients": 0})[:-1] + opener * depth + b"\xc0"


PACKED = b"CG\x02\x00"


WHOLE = Maps(version=4, base_version=-1, num_directions=1, directions=PACKED, num_components=1, basis=PACKED, rank=1, factors=PACKED)
DIFFERENCE = Maps(version=9, base_version=4, num_directions=0, directions=None, num_components=0, basis=None, rank=1, factors=PACKED)


def plan():
    return sample_messages.plan(
        seed=(1 << 63) - 1,
        cohort=(0, 5),
        guide=Guide(payload=b"CG\x01", num_columns=1, has_momentum=True),
        probes=Probes(measures_columns=True, num_random=3, grouping=Grouping.EDGE, column_scale=0.5, random_scale=1e-3, blend=0.5),
        feedback=Feedback(maps_version=4, blocks=((0, 2), (2, 5)), bits=8, slope_scale=0.5),
        maps=(WHOLE, DIFFERENCE),
    )


def update():
    chosen = Chosen(seed=7, group=0, positions=(4095, 3))
    terms = tuple(RandomTerm(group=1, coefficients=np.zeros(2, np.float32), chosen=named) for named in (None, chosen))
    return sample_messages.update(column_coefficients=np.ones(2, np.float32), random_terms=terms, dense=PACKED)


def edge_report():
    vector = np.arange(3, dtype=np.float32)
    return sample_messages.edge_report(
        plan(),
        dropped={Outcome.LOST: 1, Outcome.NON_FINITE_LOSS: 2},
        column_slopes=vector,
        column_squares=vector,
        random_slopes=(RandomSlopes(group=7, num_examples=8, slopes=vector),),
        estimate=PACKED,
        agreement=vector,
        energy=vector,
    )


def edge_answer():
    spent = Spent(node=2, begun_s=0.0, received_s=0.1, waited_s=0.0, worked_s=1.0, returned_s=0.2)
    return EdgeAnswer(
        edge_id=1, model_version=4, report=edge_report(), answered=(2, 3), forward_passes=18, bytes_down=70, bytes_up=60, spent=(spent,)
    )


STATE = Snapshot(model_version=4, theta=np.ones(3, np.float32), moments=(np.zeros(3, np.float32),))
MESSAGES = [
    plan(),
    update(),
    Order(device_id=1, group=0, plan=plan(), updates=(update(), update()), snapshot=None),
    EdgeOrder(edge_id=1, plan=plan(), updates=(update(),), snapshot=STATE),
    edge_report(),
    edge_answer(),
]
EVERY_KIND = pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)


def damaged(message, **changes):
    plain = msgspec.msgpack.decode(encode(message))
    return msgspec.msgpack.encode({key: value for key, value in (plain | changes).items() if value is not ...})


def refuses(data, kind):
    with pytest.raises(DecodeError, match=kind.__name__):
        decode(data, kind)


def test_a_term_is_written_as_documented():
    assert msgspec.msgpack.decode(encode(RandomTerm(group=1, coefficients=np.array([1, -2], np.float32)))) == {
        "group": 1,
        "coefficients": ARRAY,
        "chosen": None,
    }


@pytest.mark.parametrize("positions", [(), (1,), (1, 2, 3)])
def test_a_term_that_names_more_or_fewer_directions_than_it_weighs_is_refused(positions):
    refuses(term(chosen={"seed": 1, "group": 0, "positions": positions}), RandomTerm)


def test_arrays_keep_every_bit():
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 3e38], np.float32)
    assert decode(encode(RandomTerm(group=0, coefficients=special)), RandomTerm).coefficients.tobytes() == special.tobytes()


def test_arrays_travel_the_same_from_any_memory_and_byte_order():
    plain = np.arange(6, dtype=np.float32)
    expected = encode(RandomTerm(group=0, coefficients=plain))
    for other in (np.repeat(plain, 2)[::2], plain[::-1].copy()[::-1], plain.astype(">f4")):
        assert encode(RandomTerm(group=0, coefficients=other)) == expected


def test_a_decoded_array_belongs_to_its_message():
    """A view of the received bytes would be read-only and would keep the whole message alive."""
    found = decode(term(), RandomTerm).coefficients
    found[0] = 5
    assert decode(term(), RandomTerm).coefficients.tolist() == [1, -2]


@EVERY_KIND
def test_every_truncation_is_refused(message):
    data = encode(message)
    for length in range(len(data)):
        refuses(data[:length], type(message))


@EVERY_KIND
def test_every_field_without_a_default_must_be_there(message):
    plain = msgspec.msgpack.decode(encode(message))
    optional = {
        "probes",
        "local_training",
        "feedback",
        "maps",
        "lookahead_rate",
        "signal_to_noise",
        "format_version",
        "kind",
        "distribution",
        "spent",
        "scheduled",
    }
    for name in plain.keys() - optional:
        refuses(damaged(message, **{name: ...}), type(message))


@EVERY_KIND
def test_a_flipped_bit_gives_a_message_or_a_refusal(message):
    data = encode(message)
    for bit in range(0, 8 * len(data), 3):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            found = decode(bytes(changed), type(message))
        except DecodeError:
            continue
        assert isinstance(found, type(message))


@EVERY_KIND
def test_trailing_bytes_are_refused(message):
    refuses(encode(message) + b"\xc0", type(message))


def test_random_bytes_are_refused():
    generator = np.random.Philox(key=7)
    for length in range(1, 300):
        data = generator.random_raw(length).tobytes()[:length]
        refuses(data, DeviceReport)


@pytest.mark.parametrize(
    "array",
    [
        ["<f8", [1], bytes(8)],
        [">f4", [2], bytes(8)],
        ["f4", [2], bytes(8)],
        ["|O", [1], bytes(8)],
        ["O", [1], bytes(8)],
        ["|V8", [1], bytes(8)],
        ["<i4", [2], bytes(8)],
        ["<f4", [3], bytes(8)],
        ["<f4", [1], bytes(8)],
        ["<f4", [2], bytes(7)],
        ["<f4", [-2], bytes(8)],
        ["<f4", [-1, -2], bytes(8)],
        ["<f4", [-1], b""],
        ["<f4", [2, 1], bytes(8)],
        ["<f4", [], bytes(4)],
        ["<f4", [2.0], bytes(8)],
        ["<f4", ["2"], bytes(8)],
        ["<f4", [None], bytes(8)],
        ["<f4", 2, bytes(8)],
        ["<f4", [2], "12345678"],
        ["<f4", [2], [0.0, 0.0]],
        ["<f4", [2]],
        ["<f4", [2], bytes(8), 1],
        [[2], "<f4", bytes(8)],
        [1.0, 2.0],
        None,
        "array",
        {"<f4": [2]},
        {},
        b"12345678",
        [],
    ],
    ids=repr,
)
def test_what_is_not_an_array_of_the_declared_kind_is_refused(array):
    refuses(term(array), RandomTerm)


@pytest.mark.parametrize(
    "data",
    [
        term(["<f4", [1 << 40], bytes(8)]),
        term(["<f4", [1 << 32, 1 << 32], bytes(8)]),
        term(["<f4", [1 << 62, 4], b""]),
        term(["<f4", [0, 1 << 62], b""]),
        term(["<f4", [0, (1 << 64) - 1], b""]),
        term(["<f4", [1] * 100, bytes(4)]),
        term()[:-14] + b"\xc6\xff\xff\xff\xff",
        nested(0) + b"\xdd\xff\xff\xff\xff",
        nested(0)[:-1] + b"\xdd\xff\xff\xff\xff",
        nested(0)[:-1] + b"\xdf\xff\xff\xff\xff",
        nested(0)[:-1] + b"\xdb\xff\xff\xff\xff",
        nested(0)[:-1] + b"\xc9\xff\xff\xff\xff\x01",
        nested(0)[:-1] + b"\xd7\xff" + b"\xff" * 8,
        nested(0)[:-1] + b"\xa1\xff",
        nested(0)[:-1] + b"\x81\x80\xc0",
    ],
    ids=range(15),
)
def test_hostile_headers_are_refused_and_allocate_nothing_large(data):
    tracemalloc.start()
    try:
        refuses(data, RandomTerm)
        assert tracemalloc.get_traced_memory()[1] < MIB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("depth", [10, 900, 5000, 1_000_000])
@pytest.mark.parametrize("opener", [b"\x91", b"\x81\xa1a"], ids=["lists", "maps"])
def test_nesting_of_any_depth_is_refused(depth, opener):
    """A megabyte of opening brackets must not end an edge with RecursionError."""
    refuses(nested(depth, opener), RandomTerm)


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        (plan(), {"round_index": -1}),
        (plan(), {"round_index": 1 << 32}),
        (plan(), {"model_version": 1.5}),
        (plan(), {"model_version": "1"}),
        (plan(), {"batch_size": 0}),
        (plan(), {"seed": 1 << 63}),
        (plan(), {"seed": -1}),
        (plan(), {"theta_hash": bytes(15)}),
        (plan(), {"guide_hash": bytes(17)}),
        (plan(), {"cohort": [0, -1]}),
        (plan(), {"guide": {"payload": b"", "num_columns": -1, "has_momentum": False}}),
        (plan(), {"guide": {"payload": b"", "num_columns": 1, "has_momentum": 1}}),
        (plan(), {"guide": {"payload": b"", "has_momentum": False}}),
        (plan(), {"feedback": {"maps_version": 0, "blocks": [[0, -1]], "bits": 8, "slope_scale": 0.5}}),
        (plan(), {"feedback": {"maps_version": 0, "blocks": [[0, 1, 2]], "bits": 8, "slope_scale": 0.5}}),
        (plan(), {"feedback": {"maps_version": 0, "blocks": [], "bits": 8, "slope_scale": 0.0}}),
        (plan(), {"feedback": {"maps_version": 0, "blocks": [], "bits": 8, "slope_scale": float("nan")}}),
        (plan(), {"maps": [{"version": 0}]}),
        (plan(), {"maps": MAPS}),
        (plan(), {"maps": [MAPS | {"version": -1}]}),
        (plan(), {"maps": [MAPS | {"base_version": -2}]}),
        (plan(), {"maps": [MAPS | {"base_version": 0}]}),
        (plan(), {"maps": [MAPS | {"basis": None}]}),
        (plan(), {"maps": [MAPS | {"rank": -1}]}),
        (plan(), {"maps": [MAPS | {"num_directions": -1}]}),
        (plan(), {"maps": [MAPS | {"num_directions": 1 << 32}]}),
        (plan(), {"maps": [MAPS | {"directions": ARRAY}]}),
        (update(), {"dense": {"scale": -1.0, "payload": b""}}),
        (update(), {"dense": {"scale": float("nan"), "payload": b""}}),
        (update(), {"dense": {"scale": float("inf"), "payload": b""}}),
        (update(), {"dense": {"scale": 1.0, "payload": None}}),
        (update(), {"dense": ARRAY}),
        (update(), {"learning_rate": "0.1"}),
        (update(), {"random_terms": [{"group": 1 << 33, "coefficients": ARRAY}]}),
        (update(), {"column_coefficients": None}),
        (edge_report(), {"dropped": {"no such outcome": 1}}),
        (edge_report(), {"dropped": {"lost": 0.5}}),
        (edge_report(), {"num_devices": None}),
        (edge_report(), {"estimate": {"scale": 1e31, "payload": b""}}),
        (edge_report(), {"agreement": None}),
        (edge_report(), {"energy": [0.0]}),
    ],
    ids=lambda value: repr(value) if isinstance(value, dict) else "",
)
def test_a_field_outside_its_bounds_is_refused(message, changes):
    refuses(damaged(message, **changes), type(message))


@pytest.mark.parametrize("name", ["column_scale", "random_scale", "blend_scale"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_a_scale_that_is_not_positive_is_refused_on_arrival_too(name, value):
    probes = msgspec.msgpack.decode(encode(plan()))["probes"]
    refuses(damaged(plan(), probes=probes | {name: value}), Plan)


@pytest.mark.parametrize("blend", [1.5, -0.1, float("nan")])
def test_a_blend_outside_its_domain_is_refused_on_arrival_too(blend):
    probes = msgspec.msgpack.decode(encode(plan()))["probes"]
    refuses(damaged(plan(), probes=probes | {"blend": blend}), Plan)


@pytest.mark.parametrize("blend", [0.0, 1.0, None])
def test_a_blend_at_the_edge_of_its_domain_arrives(blend):
    """0 mixes probes from a basis alone, 1 is isotropic."""
    probes = msgspec.msgpack.decode(encode(plan()))["probes"]
    assert decode(damaged(plan(), probes=probes | {"blend": blend}), Plan).probes.blend == blend


@pytest.mark.parametrize("missing", [("directions",), ("basis",), ("directions", "basis")], ids=" and ".join)
def test_maps_are_whole_with_directions_and_bases_or_a_difference_without(missing):
    """A mixture of both would be decoded with directions or bases of other maps."""
    nothing = dict.fromkeys(missing)
    with pytest.raises(DecodeError, match="maps: base version -1 found"):
        decode(msgspec.msgpack.encode(MAPS | nothing), Maps)
    found = dict.fromkeys(missing, VALUES)
    with pytest.raises(DecodeError, match="maps: base version 0 found"):
        decode(msgspec.msgpack.encode(MAPS | {"base_version": 0, "directions": None, "basis": None} | found), Maps)
    assert decode(msgspec.msgpack.encode(MAPS), Maps).base_version == -1
    assert decode(msgspec.msgpack.encode(MAPS | {"base_version": 0, "directions": None, "basis": None}), Maps).basis is None


@pytest.mark.parametrize("changes", [{"bits": 5}, {"blocks": ((4, 4),)}, {"blocks": ((0, 5), (4, 9))}, {"blocks": ((3, 2),)}], ids=str)
def test_a_request_for_feedback_that_makes_no_sense_is_refused_on_arrival(changes):
    sensible = Feedback(maps_version=1, blocks=((0, 4), (4, 9)), bits=8, slope_scale=0.1)
    assert decode(encode(sensible), Feedback) == sensible
    plain = msgspec.to_builtins(sensible) | changes
    with pytest.raises(DecodeError, match="feedback"):
        decode(msgspec.msgpack.encode(plain), Feedback)


def test_one_kind_of_message_is_not_another():
    refuses(encode(plan()), Update)
    refuses(encode(update()), Plan)
    refuses(encode(edge_report()), Snapshot)


def test_a_message_beyond_the_largest_is_not_looked_at(monkeypatch):
    monkeypatch.setattr(codec, "MAX_BYTES", 10)
    with pytest.raises(DecodeError, match="RandomTerm: 11 bytes found, at most 10 expected"):
        decode(bytes(11), RandomTerm)


def test_what_is_no_message_cannot_be_sent():
    with pytest.raises(TypeError, match="object cannot travel"):
        encode(object())


def test_probe_indices_of_different_groups_never_meet():
    top = (1 << 32) - 1
    indices = {probe_index(group, position) for group in (0, 1, 2, top) for position in (0, 1, 2, top)}
    assert len(indices) == 16
    assert max(indices) == (1 << 64) - 1
    assert list(probe_indices(3, 2)) == [probe_index(3, 0), probe_index(3, 1)]
