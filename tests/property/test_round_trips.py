"""There and back: whatever goes through a codec, a compressor, a fold or a replay comes out as promised.

Run: pytest tests/property/test_round_trips.py
"""

import dataclasses
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import sample_messages
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from cooperllm.algorithm import replay
from cooperllm.algorithm.aggregation import variance_between, weighted_mean
from cooperllm.algorithm.compression import BLOCK, pack, pack_vector, packed_bytes, unpack
from cooperllm.algorithm.guidance import digest, dot, orthonormalise
from cooperllm.config import MOST_CANDIDATES, MOST_LOCAL_STEPS, MOST_QUERIES, SUPPORTED_BITS, OptimizerConfig, OptimizerKind
from cooperllm.edge import Edge
from cooperllm.errors import DecodeError, ReplayMismatchError
from cooperllm.link.codec import decode, encode
from cooperllm.messages import (
    LARGEST_LOSS,
    Chosen,
    DeviceReport,
    EdgeAnswer,
    EdgeOrder,
    EdgeReport,
    Feedback,
    Grouping,
    Guide,
    LocalTraining,
    Maps,
    Order,
    Outcome,
    Plan,
    Probes,
    RandomSlopes,
    RandomTerm,
    Snapshot,
    StepKind,
    Update,
)

UNIT = 2.0**-24

COUNTS = st.integers(0, (1 << 32) - 1)
SEEDS = st.integers(0, (1 << 63) - 1)
DIGESTS = st.binary(min_size=16, max_size=16)
POSITIVE = st.floats(2.0**-60, 2.0**60)
VERSIONS = st.integers(-1, 1 << 32)
LOSSES = st.floats(-LARGEST_LOSS, LARGEST_LOSS)
DEVIATIONS = st.floats(0, LARGEST_LOSS)


def vectors(sizes, **bounds):
    elements = st.floats(width=32, **bounds)
    return sizes.flatmap(lambda size: arrays.arrays(np.float32, size, elements=elements))


def few(strategy):
    return st.lists(strategy, max_size=3).map(tuple)


def fields_of(kind, /, **fields):
    """A message still in pieces: the type checks of its constructor draw random numbers, which no strategy may."""
    return st.tuples(st.just(kind), st.fixed_dictionaries(fields))


def made(pieces):
    """Puts a message together, from the inside out."""
    match pieces:
        case (type() as kind, dict() as fields):
            return kind(**{name: made(value) for name, value in fields.items()})
        case tuple():
            return tuple(map(made, pieces))
        case _:
            return pieces


ANY = vectors(st.integers(0, 6))
GUIDES = fields_of(Guide, payload=st.binary(max_size=20), num_columns=COUNTS, has_momentum=st.booleans())
PACKED = st.binary(max_size=20)
ANY_MAPS = {"version": COUNTS, "num_directions": COUNTS, "num_components": COUNTS, "rank": COUNTS, "factors": PACKED}
MAPS = fields_of(Maps, base_version=st.just(-1), directions=PACKED, basis=PACKED, **ANY_MAPS) | fields_of(
    Maps, base_version=COUNTS, directions=st.none(), basis=st.none(), **ANY_MAPS
)
EDGES = st.lists(COUNTS, max_size=5, unique=True).map(sorted)
BLOCKS = EDGES.map(lambda edges: tuple(pairwise(edges)))
FEEDBACK = fields_of(Feedback, maps_version=VERSIONS, blocks=BLOCKS, bits=st.sampled_from(SUPPORTED_BITS), slope_scale=POSITIVE)
PROBES = fields_of(
    Probes,
    measures_columns=st.booleans(),
    num_random=st.integers(0, MOST_QUERIES),
    grouping=st.sampled_from(Grouping),
    column_scale=POSITIVE,
    random_scale=POSITIVE,
    blend=st.none() | st.floats(0.0, 1.0),
    blend_scale=POSITIVE,
    pool_seed=st.none() | SEEDS,
    pool_size=st.integers(1, 1 << 32),
    num_candidates=st.integers(1, MOST_CANDIDATES // MOST_QUERIES),
)
TRAINING = fields_of(
    LocalTraining, num_steps=st.integers(1, MOST_LOCAL_STEPS), learning_rate=POSITIVE, checkpoints_activations=st.booleans()
)
PLANS = fields_of(
    Plan,
    round_index=COUNTS,
    model_version=COUNTS,
    guide_version=VERSIONS,
    theta_hash=DIGESTS,
    seed=SEEDS,
    cohort=few(COUNTS),
    batch_size=st.integers(1, 1 << 32),
    guide=st.none() | GUIDES,
    guide_hash=DIGESTS,
    num_columns=COUNTS,
    probes=st.none() | PROBES,
    local_training=st.none() | TRAINING,
    feedback=st.none() | FEEDBACK,
    maps=few(MAPS),
    signal_to_noise=st.floats(0, 1e6),
)
CHOSEN = fields_of(Chosen, seed=SEEDS, group=COUNTS, positions=few(COUNTS))
TERMS = fields_of(RandomTerm, group=COUNTS, coefficients=ANY) | few(COUNTS).flatmap(
    lambda positions: fields_of(
        RandomTerm,
        group=COUNTS,
        coefficients=vectors(st.just(len(positions))),
        chosen=fields_of(Chosen, seed=SEEDS, group=COUNTS, positions=st.just(positions)),
    )
)
UPDATES = fields_of(
    Update,
    round_index=COUNTS,
    model_version=COUNTS,
    seed=SEEDS,
    learning_rate=POSITIVE,
    guide=st.none() | GUIDES,
    column_coefficients=ANY,
    random_terms=few(TERMS),
    dense=st.none() | PACKED,
    loss=st.none() | LOSSES,
    theta_hash=DIGESTS,
    kind=st.sampled_from(StepKind),
)
SNAPSHOTS = fields_of(Snapshot, model_version=COUNTS, theta=ANY, moments=few(ANY))
ORDERS = fields_of(Order, device_id=COUNTS, group=COUNTS, plan=PLANS, updates=few(UPDATES), snapshot=st.none() | SNAPSHOTS)
DEVICE_REPORTS = fields_of(
    DeviceReport,
    device_id=COUNTS,
    round_index=COUNTS,
    model_version=COUNTS,
    guide_version=VERSIONS,
    num_examples=COUNTS,
    outcome=st.sampled_from(Outcome),
    loss=LOSSES,
    column_slopes=ANY,
    random_slopes=ANY,
    column_deviation=DEVIATIONS,
    random_deviation=DEVIATIONS,
    estimate=st.none() | PACKED,
    agreement=ANY,
    energy=ANY,
    forward_passes=COUNTS,
)
EDGE_REPORTS = fields_of(
    EdgeReport,
    edge_id=COUNTS,
    round_index=COUNTS,
    num_devices=COUNTS,
    num_examples=COUNTS,
    dropped=st.dictionaries(st.sampled_from(Outcome), COUNTS),
    loss=LOSSES,
    column_slopes=ANY,
    column_squares=ANY,
    random_slopes=few(fields_of(RandomSlopes, group=COUNTS, num_examples=COUNTS, slopes=ANY)),
    estimate=st.none() | PACKED,
    agreement=ANY,
    energy=ANY,
    forward_passes=COUNTS,
)
EDGE_ORDERS = fields_of(EdgeOrder, edge_id=COUNTS, plan=PLANS, updates=few(UPDATES), snapshot=st.none() | SNAPSHOTS)
EDGE_ANSWERS = fields_of(
    EdgeAnswer,
    edge_id=COUNTS,
    model_version=VERSIONS,
    report=st.none() | EDGE_REPORTS,
    answered=few(COUNTS),
    forward_passes=COUNTS,
    bytes_down=COUNTS,
    bytes_up=COUNTS,
)
MESSAGES = {
    Guide: GUIDES,
    Maps: MAPS,
    Feedback: FEEDBACK,
    Probes: PROBES,
    LocalTraining: TRAINING,
    Chosen: CHOSEN,
    Plan: PLANS,
    RandomTerm: TERMS,
    Update: UPDATES,
    Snapshot: SNAPSHOTS,
    Order: ORDERS,
    DeviceReport: DEVICE_REPORTS,
    EdgeReport: EDGE_REPORTS,
    EdgeOrder: EDGE_ORDERS,
    EdgeAnswer: EDGE_ANSWERS,
}


def plain(value):
    """A message as nested tuples in which arrays are their bytes, so that NaN equals itself and -0 is not 0."""
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if dataclasses.is_dataclass(value):
        return type(value), *(plain(getattr(value, field.name)) for field in dataclasses.fields(value))
    if isinstance(value, tuple):
        return tuple(map(plain, value))
    return value


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
def test_every_message_comes_back_as_it_was(kind):
    @given(pieces=MESSAGES[kind])
    def comes_back(pieces):
        message = made(pieces)
        data = encode(message)
        found = decode(data, type(message))
        assert plain(found) == plain(message)
        assert encode(found) == data

    comes_back()


@pytest.mark.parametrize(
    "kind", [Plan, Update, Order, DeviceReport, EdgeReport, Snapshot, EdgeOrder, EdgeAnswer], ids=lambda kind: kind.__name__
)
def test_bytes_from_anywhere_give_a_message_or_a_refusal(kind):
    @given(data=st.binary(max_size=200))
    @example(data=b"\x80")
    @example(data=b"\xc1")
    def is_refused(data):
        with pytest.raises(DecodeError, match=kind.__name__):
            decode(data, kind)

    is_refused()


@given(pieces=UPDATES, cut=st.floats(0, 1, exclude_max=True))
def test_a_truncated_message_is_refused(pieces, cut):
    data = encode(made(pieces))
    with pytest.raises(DecodeError, match="Update"):
        decode(data[: int(cut * len(data))], Update)


@given(pieces=DEVICE_REPORTS, position=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
def test_a_changed_byte_gives_a_message_or_a_refusal(pieces, position, value):
    data = bytearray(encode(made(pieces)))
    data[int(position * len(data))] = value
    try:
        found = decode(bytes(data), DeviceReport)
    except DecodeError:
        return
    assert isinstance(found, DeviceReport)


COLUMNS = st.tuples(st.integers(1, 3), st.integers(1, 3 * BLOCK + 5)).flatmap(
    lambda shape: arrays.arrays(
        np.float32, shape, elements=st.floats(-1000, 1000, width=32, allow_subnormal=False), fill=st.floats(1, 1000, width=32)
    )
)


@given(columns=COLUMNS, bits=st.sampled_from(SUPPORTED_BITS), fewest=st.sampled_from([0, 1, 2, 4, 8]))
def test_a_packed_guide_never_takes_more_bytes_than_announced(columns, bits, fewest):
    assert len(pack(columns, bits, fewest_bits=min(bits, fewest))) <= packed_bytes(*columns.shape, bits)


@given(columns=COLUMNS, bits=st.sampled_from([1, 2, 4, 8]), fewest=st.sampled_from([0, 1, 2, 4, 8]))
def test_what_is_lost_of_a_block_is_at_right_angles_to_what_is_kept(columns, bits, fewest):
    """So nothing decoded is longer than what was packed. Ten additions in float32 there and ten back lose a share of 20 · 2⁻²⁴ at most."""
    decoded = unpack(pack(columns, bits, seed=5, fewest_bits=min(bits, fewest)), columns.shape[1]).astype(np.float64)
    for start in range(0, columns.shape[1], BLOCK):
        given_block, kept = columns[:, start : start + BLOCK].astype(np.float64), decoded[:, start : start + BLOCK]
        if given_block.shape[1] in {8, BLOCK}:  # the last block of another length is cut off where it was filled up
            energies = (given_block**2).sum(axis=1)
            assert (np.abs(((given_block - kept) * kept).sum(axis=1)) <= 1e-5 * energies).all()


@given(columns=COLUMNS)
def test_thirty_two_bits_keep_every_bit(columns):
    assert unpack(pack(columns, 32), columns.shape[1]).tobytes() == columns.tobytes()


@given(
    columns=COLUMNS, bits=st.sampled_from(SUPPORTED_BITS),
    changes=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), max_size=5), cut=st.integers(0, 3),
)  # fmt: skip
def test_a_damaged_guide_is_refused_or_finite(columns, bits, changes, cut):
    payload = bytearray(pack(columns, bits))
    for place, value in changes:
        payload[place % len(payload)] = value
    try:
        found = unpack(bytes(payload[: len(payload) - cut]), columns.shape[1])
    except DecodeError:
        return
    assert np.isfinite(found).all()


@given(payload=st.binary(max_size=64), size=st.integers(0, 1 << 64))
def test_a_guide_from_anywhere_is_refused(payload, size):
    with pytest.raises(DecodeError, match="guide"):
        unpack(payload, size)


FINITE = {"min_value": -1000, "max_value": 1000, "allow_nan": False}


@given(columns=st.lists(arrays.arrays(np.float32, 8, elements=st.floats(-1000, 1000, width=32)), max_size=10))
def test_a_span_is_orthonormal_and_holds_every_column(columns):
    span = orthonormalise(columns, 8)
    wide = span.astype(np.float64)
    count = len(span)
    assert count <= 8
    # See test_guidance: (k + 4) roundings for each of two unit rows.
    assert np.abs(wide @ wide.T - np.eye(count)).max(initial=0) < 2 * (count + 4) * UNIT
    for column in columns:
        length = np.linalg.norm(column.astype(np.float64))
        rest = np.linalg.norm(column - wide.T @ (wide @ column))
        # What was left out is shorter than DEPENDENT of the column.
        assert rest <= 1.01e-4 * length


@given(left=vectors(st.integers(0, 200), **FINITE), seed=st.integers(0, 3))
def test_dot_does_not_depend_on_strides(left, seed):
    right = np.roll(left, seed)
    assert dot(np.repeat(left, 2)[::2], np.repeat(right, 3)[::3]) == dot(left, right)
    assert digest(np.repeat(left, 2)[::2]) == digest(left)


SENDERS = st.lists(
    st.tuples(arrays.arrays(np.float32, 3, elements=st.floats(-1000, 1000, width=32)), st.integers(1, 1000)), min_size=2, max_size=8
)


@given(senders=SENDERS, cut=st.floats(0, 1))
def test_a_fold_of_folds_is_the_flat_mean(senders, cut):
    border = min(max(1, int(cut * len(senders))), len(senders) - 1)
    parts = [senders[:border], senders[border:]]
    means = [weighted_mean([value for value, _ in part], [weight for _, weight in part]) for part in parts]
    folded = weighted_mean(means, [sum(weight for _, weight in part) for part in parts])
    flat = weighted_mean([value for value, _ in senders], [weight for _, weight in senders])
    # Three roundings to float32 at the size of the largest value; below the smallest normal number they are absolute.
    assert np.abs(folded - flat).max() <= 3 * UNIT * max(np.abs(value).max() for value, _ in senders) + 3 * 2.0**-149


@given(senders=SENDERS)
def test_a_mean_lies_between_its_values_and_a_variance_above_zero(senders):
    values, weights = [value for value, _ in senders], [weight for _, weight in senders]
    mean = weighted_mean(values, weights)
    slack = UNIT * np.abs(np.stack(values)).max()
    assert (np.min(values, axis=0) - slack <= mean).all()
    assert (mean <= np.max(values, axis=0) + slack).all()
    assert (variance_between(mean, weighted_mean([value * value for value in values], weights), len(values)) >= 0).all()


@given(senders=SENDERS, order=st.randoms(use_true_random=False), grouping=st.sampled_from(Grouping))
def test_an_edges_report_does_not_depend_on_the_order_of_arrival(senders, order, grouping):
    probes = Probes(measures_columns=True, num_random=3, grouping=grouping, column_scale=1.0, random_scale=1.0)
    plan = sample_messages.plan(num_columns=3, probes=probes)
    reports = [
        sample_messages.device_report(
            device_id,
            plan,
            num_examples=weight,
            outcome=Outcome.OK if device_id % 3 < 2 else Outcome.NON_FINITE_LOSS,
            column_slopes=value,
            random_slopes=-value,
        )
        for device_id, (value, weight) in enumerate(senders)
    ]
    expected = encode(Edge(0, range(len(senders)), 1).fold(plan, reports))
    order.shuffle(reports)
    assert encode(Edge(0, range(len(senders)), 1).fold(plan, reports)) == expected


COEFFICIENTS = st.floats(-10, 10, width=32)


@given(
    columns=arrays.arrays(np.float32, (2, 40), elements=st.floats(-1, 1, width=32)),
    coefficients=arrays.arrays(np.float32, (4, 5), elements=COEFFICIENTS),
    kind=st.sampled_from(OptimizerKind),
    seed=SEEDS,
)
def test_a_log_leads_another_replica_to_the_same_bits_and_a_changed_one_nowhere(columns, coefficients, kind, seed):
    optimizer = OptimizerConfig(kind=kind)
    cloud = device = replay.start(np.linspace(-1, 1, 40, dtype=np.float32), optimizer)
    guide = Guide(payload=pack(columns, 8), num_columns=2, has_momentum=kind is not OptimizerKind.SGD)
    for version, row in enumerate(coefficients):
        size = len(replay.span(cloud, guide))
        update = sample_messages.update(
            version,
            seed=seed,
            guide=guide,
            column_coefficients=row[:size],
            random_terms=(RandomTerm(group=version, coefficients=row[3:]),),
            dense=pack_vector(columns[0], 8),
        )
        sealed, cloud = replay.seal(cloud, update, optimizer)
        arrived = decode(encode(sealed), Update)
        term = replace(arrived.random_terms[0], coefficients=arrived.random_terms[0].coefficients + np.float32(1))
        with pytest.raises(ReplayMismatchError):
            replay.apply(device, replace(arrived, random_terms=(term,)), optimizer)
        device = replay.apply(device, arrived, optimizer)
        assert device.theta.tobytes() == cloud.theta.tobytes()
        assert device.state_hash == cloud.state_hash
