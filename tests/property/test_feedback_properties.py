"""Feedback for any gradient, estimate and order of arrival: a gain is a projection, a fold is a mean, a codec has its bound.

Run: pytest tests/property/test_feedback_properties.py
"""

from itertools import pairwise

import numpy as np
import sample_messages
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from cooperllm.algorithm import feedback, noise, replay
from cooperllm.algorithm.compression import BLOCK, pack_unbiased, pack_vector, unpack_vector
from cooperllm.algorithm.guidance import digest
from cooperllm.algorithm.maps import Fitted, pack_factors, pack_rows, unpack_maps
from cooperllm.algorithm.rounding import NO_ROUNDING
from cooperllm.config import OptimizerConfig
from cooperllm.device.probe import run_device
from cooperllm.edge import Edge
from cooperllm.errors import DecodeError
from cooperllm.link.codec import encode
from cooperllm.messages import Feedback, Maps, Order

UNIT = 2.0**-24
SIZE = 24
NOTHING = np.zeros(0, np.float32)
ENTRIES = st.one_of(st.just(0.0), st.floats(-100, 100, width=32).filter(lambda value: abs(value) > 1e-3))
VECTORS = arrays.arrays(np.float32, SIZE, elements=ENTRIES)
CUTS = st.lists(st.integers(0, SIZE), min_size=2, max_size=5, unique=True).map(sorted)


def drawn(index, *shape):
    return noise.gaussian(1, index, int(np.prod(shape))).reshape(shape)


class LinearLoss:
    """A device whose loss is θ · gradient, and whose estimate is whatever it is."""

    num_examples = 4
    map_shape = (0, 1)

    def __init__(self, gradient, estimated):
        self._gradient, self._estimated = gradient.astype(np.float64), estimated

    def rounding(self):
        return NO_ROUNDING

    def evaluate(self, chosen):
        return lambda points: (points.astype(np.float64) @ self._gradient).astype(np.float32), 1

    def differentiate(self, chosen):
        return lambda theta, directions: (float(theta @ self._gradient), (directions @ self._gradient).astype(np.float32)), 4

    def estimate(self, theta, chosen, maps):
        return self._estimated, float(theta @ self._gradient)


def plan(blocks, bits=32):
    replica = replay.start(np.zeros(SIZE, np.float32), OptimizerConfig())
    return sample_messages.plan(
        theta_hash=replica.state_hash,
        cohort=tuple(range(8)),
        guide_hash=digest(np.zeros((0, SIZE), np.float32)),
        feedback=Feedback(maps_version=-1, blocks=tuple(blocks), bits=bits, slope_scale=0.25),
    ), replica


@given(gradient=VECTORS, estimated=VECTORS, cuts=CUTS)
def test_a_device_alone_projects_its_gradient_onto_each_block_of_its_estimate(gradient, estimated, cuts):
    blocks = list(pairwise(cuts))
    asked, replica = plan(blocks)
    order = Order(device_id=0, group=0, plan=asked, updates=(), snapshot=None)
    report = run_device(order, replica, LinearLoss(gradient, estimated.copy()), None, None)
    found = feedback.rectified(estimated, blocks, feedback.gains(report.agreement, report.energy)).astype(np.float64)
    for start, stop in blocks:
        part, wide = gradient[start:stop].astype(np.float64), estimated[start:stop].astype(np.float64)
        share = (part @ wide) / (wide @ wide) if wide.any() else 0.0
        # A unit direction, two points, two losses, a slope, two lengths and the gain: fewer than 16 roundings of |g| |ê| each.
        assert np.abs(found[start:stop] - share * wide).max() <= 16 * UNIT * np.linalg.norm(part)
        assert np.linalg.norm(part - found[start:stop]) <= np.linalg.norm(part) * (1 + 16 * UNIT)
    outside = [position for position in range(SIZE) if not cuts[0] <= position < cuts[-1]]
    assert np.array_equal(found[outside], estimated[outside])


def answer(device_id, asked, estimated, num_examples):
    return sample_messages.device_report(
        device_id,
        asked,
        num_examples=num_examples,
        estimate=pack_vector(estimated, asked.feedback.bits),
        agreement=estimated[:1],
        energy=np.abs(estimated[:1]),
    )


@given(
    senders=st.lists(st.tuples(VECTORS, st.integers(1, 1000)), min_size=1, max_size=8),
    order=st.randoms(use_true_random=False),
    bits=st.sampled_from([4, 8, 32]),
)
def test_estimates_fold_to_their_weighted_mean_in_any_order(senders, order, bits):
    asked, _ = plan([(0, SIZE)], bits)
    reports = [answer(device_id, asked, *sender) for device_id, sender in enumerate(senders)]
    found = Edge(0, range(8), SIZE).fold(asked, reports)
    shuffled = reports.copy()
    order.shuffle(shuffled)
    assert encode(Edge(0, range(8), SIZE).fold(asked, shuffled)) == encode(found)
    arrived = [unpack_vector(report.estimate, SIZE).astype(np.float64) for report in reports]
    expected = np.average(arrived, axis=0, weights=[count for _, count in senders])
    sent = unpack_vector(found.estimate, SIZE).astype(np.float64)
    energy, lost = expected @ expected, np.linalg.norm(sent - expected)
    # Without bias: <x, x̂> = |x|². 32 entries, the last 8 of them zeros, are at most √32 deviations: 8 bits may cut off a fifth of one.
    assert abs(expected @ sent - energy) <= 1e-5 * energy + 2.0**-100
    assert lost <= {4: 0.9, 8: 0.25, 32: 4 * UNIT}[bits] * np.sqrt(energy) + 2.0**-60
    weighted = np.average([float(report.energy[0]) for report in reports], weights=[count for _, count in senders])
    assert abs(found.energy[0] - weighted) <= 2 * UNIT * weighted


@given(
    vector=arrays.arrays(np.float32, st.sampled_from([1, 3, 8, BLOCK, 2 * BLOCK + 5]), elements=st.floats(-(2.0**66), 2.0**66, width=32)),
    bits=st.sampled_from([1, 2, 4, 8]),
    index=st.integers(0, 1 << 33),
)
def test_what_a_sender_packs_without_bias_has_the_vectors_length_along_it(vector, bits, index):
    """<x, x̂> = |x|² for every vector and rotation, so that a fold loses nothing along what was sent."""
    found = unpack_vector(pack_unbiased(vector, bits, 3, index), len(vector)).astype(np.float64)
    wide = vector.astype(np.float64)
    # Blocks below 1e-60 are zeros; what is filled up beyond the end is zero in the vector.
    assert abs(found @ wide - wide @ wide) <= 1e-5 * (wide @ wide) + 1e-57


def near(honest):
    """Numbers of which about every second is the honest one."""
    return st.one_of(st.just(honest), st.integers(0, 9), st.just(1 << 32))


PARTS = {
    "directions": pack_rows([drawn(5, 2, 4)], 8),
    "basis": pack_rows([drawn(index, 4, 2) for index in (1, 2)], 8),
    "factors": pack_factors([Fitted(maps=drawn(index, 2, 5, 4), xx=np.eye(5)) for index in (3, 4)], 3),
}


@settings(max_examples=300)
@given(
    model=st.tuples(st.one_of(st.just(2), st.integers(0, 4)), st.one_of(st.just(4), st.integers(0, 8))),
    num_directions=near(2),
    num_components=near(2),
    rank=near(3),
    part=st.sampled_from(sorted(PARTS)),
    cut=st.one_of(st.just(0), st.integers(-40, 40)),
)
@example(model=(2, 4), num_directions=2, num_components=2, rank=3, part="factors", cut=0)
def test_maps_from_anywhere_fit_the_model_or_are_refused(model, num_directions, num_components, rank, part, cut):
    payload = PARTS[part][:cut] if cut < 0 else PARTS[part] + bytes(cut)
    sizes = {"num_directions": num_directions, "num_components": num_components, "rank": rank}
    changed = Maps(version=1, base_version=-1, **sizes, **PARTS | {part: payload})
    num_layers, width = model
    try:
        found = unpack_maps([changed], num_layers, width)
    except DecodeError:
        assert (model, num_directions, num_components, rank, cut) != ((2, 4), 2, 2, 3, 0)
        return
    num_features = 1 + 2 * num_components
    # As many numbers may fit another model of the same size; the payloads' lengths are what a receiver can check.
    assert cut == 0
    assert (num_directions * width, num_layers * width * num_components) == (2 * 4, 2 * 4 * 2)
    assert num_layers * rank * (num_directions * num_features + width) == 2 * 3 * (2 * 5 + 4)
    assert found.directions.shape == (num_directions, width)
    shapes = [(layer.basis.shape, layer.maps.shape) for layer in found.layers]
    assert shapes == [((width, num_components), (num_directions, num_features, width))] * num_layers
    assert all(np.isfinite(values).all() for layer in found.layers for values in (layer.basis, layer.maps, found.directions))


@given(data=st.data(), lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_a_sentence_is_described_the_same_in_any_company(data, lengths):
    """Features of a sentence are the same bits alone and in a batch."""
    count = sum(lengths)
    x = data.draw(arrays.arrays(np.float32, (count, 3), elements=st.integers(-50, 50).map(float)))
    mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
    together = feedback.features(x, feedback.tokens(mask), np.eye(3, dtype=np.float32))
    start = 0
    for length in lengths:
        alone = feedback.features(x[start : start + length], feedback.tokens(np.ones((1, length), int)), np.eye(3, dtype=np.float32))
        assert together[start : start + length].tobytes() == alone.tobytes()
        start += length
