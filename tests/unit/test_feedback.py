"""Feedback estimates: exact where the maps are, worth what their slopes say, and no round stops for a bad one.

Run: pytest tests/unit/test_feedback.py
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import sample_messages
import torch

from cooperllm.algorithm import feedback, noise, replay
from cooperllm.algorithm.arms import Measured, Public
from cooperllm.algorithm.compression import HEADER, pack, pack_vector, unpack_vector
from cooperllm.algorithm.feedback import Moments
from cooperllm.algorithm.feedback_arm import FeedbackArm
from cooperllm.algorithm.guidance import digest, orthonormalise, random_directions
from cooperllm.algorithm.maps import Fitted, pack_basis, pack_factors
from cooperllm.config import ArmConfig, ArmName, OptimizerConfig
from cooperllm.device.probe import choose_batch, run_device
from cooperllm.edge import Edge
from cooperllm.errors import ProtocolError
from cooperllm.link.codec import decode, encode
from cooperllm.messages import EdgeReport, Feedback, Grouping, Maps, Order, Outcome, Packed, Probes, RandomSlopes

UNIT = 2.0**-24
NOTHING = np.zeros(0, np.float32)
MASK = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
BATCH = feedback.tokens(MASK)


def drawn(index, *shape):
    return noise.gaussian(11, index, math.prod(shape)).reshape(shape)


def integers(index, *shape):
    """Small ones: float32 sums of their products are exact."""
    return np.rint(2 * drawn(index, *shape)).astype(np.float32)


def squares(values):
    return float(np.square(values, dtype=np.float64).sum())


# From the output error to a gradient at a module's output, eq. (1)-(3).


def gated_network(x, gate, readout, output, labels, basis):
    """Scores mean_t ((G φ_t) ⊙ y_t) Rᵀ: linear in φ at y, so that exact maps exist. Gives e and the loss's gradient at y."""
    y = torch.from_numpy(output).double().requires_grad_()
    gated = torch.from_numpy(feedback.features(x, BATCH, basis) @ gate) * y
    scores = torch.stack([part.mean(0) for part in gated.split(BATCH.lengths.tolist())]) @ torch.from_numpy(readout).double().T
    (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(scores, torch.from_numpy(labels)), y)
    return feedback.output_error(scores.detach().softmax(1).float().numpy(), labels), gradient.numpy()


def test_with_the_maps_of_the_network_the_delta_is_the_gradient_at_the_output():
    x, basis, gate, readout, output = drawn(0, 8, 5), drawn(1, 5, 3), drawn(2, 7, 4), drawn(3, 3, 4), drawn(4, 8, 4)
    along = feedback.contrasts(drawn(6, 5, 3), 9)
    error, expected = gated_network(x, gate, readout, output, np.array([0, 2, 1]), basis)

    def delta(e, contrasts, scores_of, gates, features):
        return feedback.deltas(features, BATCH, (contrasts @ scores_of)[:, None, :] * gates, e @ contrasts.T)

    parts = (along, readout, gate, feedback.features(x, BATCH, basis))
    # The same sums over magnitudes (|e| <= 1/B), times the roundings on the way: 3 classes twice, 3 + 7 + 2 terms, 8 factors.
    magnitudes = delta(np.full_like(error, 1 / 3), *map(np.abs, parts))
    assert (np.abs(delta(error, *parts) - expected) <= 26 * UNIT * magnitudes).all()
    assert np.abs(expected).max() > 1e-2


def test_the_output_error_is_the_gradient_of_the_mean_cross_entropy():
    scores, labels = torch.from_numpy(drawn(0, 4, 3)).requires_grad_(), np.array([0, 2, 2, 1])
    (expected,) = torch.autograd.grad(torch.nn.functional.cross_entropy(scores, torch.from_numpy(labels)), scores)
    probabilities = scores.detach().softmax(1).numpy()
    before = probabilities.copy()
    np.testing.assert_allclose(feedback.output_error(probabilities, labels), expected.numpy(), atol=4 * UNIT)
    assert np.array_equal(probabilities, before)


def test_tokens_are_listed_in_the_order_of_the_masked_activations():
    mask = np.array([[0, 1, 1], [1, 0, 0], [1, 1, 0]])
    found = feedback.tokens(mask)
    assert found.owner.tolist() == np.arange(3)[:, None].repeat(3, 1)[mask > 0].tolist() == [0, 0, 1, 2, 2]
    assert found.lengths.tolist() == [2, 1, 2]


def test_features_pool_over_the_sentences_own_tokens_only():
    x, basis = integers(0, 8, 2), np.eye(2, dtype=np.float32)
    found = feedback.features(x, BATCH, basis)
    assert np.array_equal(found[:, 1:3], x)
    assert np.array_equal(found[3, 3:], x[3])  # a sentence of one token is its own mean
    assert np.array_equal(found[4:, 3:], np.tile(x[4:].mean(0), (4, 1)))
    changed = x.copy()
    changed[4:] += 7
    assert np.array_equal(feedback.features(changed, BATCH, basis)[:4], found[:4])


def test_a_sentences_share_of_the_delta_does_not_grow_with_its_length():
    """Eq. (3) divides by T: the deltas of an example add up to its error whether it has one token or four."""
    found = feedback.deltas(np.ones((8, 1), np.float32), BATCH, np.ones((1, 1, 1), np.float32), np.array([[3.0], [2.0], [4.0]], np.float32))
    assert [float(part.sum()) for part in np.split(found, [3, 4])] == [3, 2, 4]


# Contrasts and bases.


@pytest.mark.parametrize("num_classes", [2, 3, 7])
@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0])
def test_contrasts_are_orthonormal_sum_to_zero_and_lose_nothing_of_an_output_error(num_classes, scale):
    scores = np.float32(scale) * drawn(0, 20, num_classes)
    found = feedback.contrasts(scores, num_classes)
    # Unit rows rounded to float32: each of C products errs by at most 3 UNIT.
    tolerance = 4 * num_classes * UNIT
    np.testing.assert_allclose(found @ found.T, np.eye(num_classes - 1), atol=tolerance)
    np.testing.assert_allclose(found.sum(axis=1), 0, atol=tolerance)
    error = feedback.output_error(torch.from_numpy(drawn(1, 5, num_classes)).softmax(1).numpy(), np.zeros(5, np.int64))
    np.testing.assert_allclose(error @ found.T @ found, error, atol=tolerance)


def test_the_contrast_kept_is_the_one_along_which_scores_vary():
    loud, quiet = np.array([1, -1, 0]) / math.sqrt(2), np.array([1, 1, -2]) / math.sqrt(6)
    varied = np.outer([3, -3, 3, -3], loud) + np.outer([1, 1, -1, -1], quiet) + np.array([[5], [-5], [9], [0]])
    (found,) = feedback.contrasts(varied.astype(np.float32), 1)
    # Scores up to 12 are rounded by 12 UNIT each, against squares that differ by 9 - 1 per example.
    assert abs(found @ loud) > 1 - 12 * UNIT


def test_principal_components_describe_inputs_that_vary_in_two_directions():
    activation = (np.outer(drawn(0, 30), [2, 0, 0, 1]) + np.outer(drawn(1, 30), [0, 1, 0, 0]) + 5).astype(np.float32)
    basis = feedback.principal_components(activation, 2)
    rows = basis / np.linalg.norm(basis, axis=0)
    centred = activation - activation.mean(axis=0)
    # What lies outside of them is rounding of entries below 16.
    assert np.abs(centred - centred @ rows @ rows.T).max() < 16 * 8 * UNIT
    assert feedback.principal_components(activation, 99).shape == (4, 4)
    assert np.isfinite(feedback.principal_components(np.ones((3, 4), np.float32), 2)).all()


# The fit, eq. (4).


def sums(described, targets):
    found = Moments.zero(described.shape[1], len(targets), targets[0].shape[1])
    found.add(described, targets)
    return found


def left_over(maps, described, targets):
    """The share of the targets' squares that maps leave, computed on the data."""
    rests = sum(squares(target - described @ one) for target, one in zip(targets, maps, strict=True))
    return rests / sum(map(squares, targets))


def test_without_a_ridge_the_fit_is_least_squares():
    described, targets = integers(0, 40, 5), [integers(1, 40, 3), integers(2, 40, 3)]
    found = sums(described, targets).solve(0.0)
    # Exact sums, solved in double precision: the error is the condition number (below 10 here, squared) times 1e-16.
    for one, target in zip(found, targets, strict=True):
        np.testing.assert_allclose(one, np.linalg.lstsq(described.astype(float), target.astype(float))[0], atol=1e-12)


def test_a_ridge_solves_the_damped_normal_equations():
    described, targets, ridge = integers(0, 40, 5), [integers(1, 40, 3)], 0.1
    (found,) = sums(described, targets).solve(ridge)
    damping = ridge * squares(described) / 5
    np.testing.assert_allclose(described.T.astype(float) @ (targets[0] - described @ found), damping * found, atol=1e-10)


@pytest.mark.parametrize("ridge", [0.0, 0.1, 10.0])
def test_unexplained_is_the_share_of_squares_that_maps_leave(ridge):
    described, targets = integers(0, 40, 5), [integers(1, 40, 3), integers(2, 40, 3)]
    found = sums(described, targets)
    maps = found.solve(ridge)
    assert found.unexplained(maps) == pytest.approx(left_over(maps, described, targets), abs=1e-12)
    assert found.unexplained(np.zeros_like(maps)) == 1


def test_sums_of_parts_are_the_sums_of_the_whole():
    described, targets = integers(0, 40, 5), [integers(1, 40, 3)]
    parts = sums(described[:13], [targets[0][:13]]).plus(sums(described[13:], [targets[0][13:]]))
    whole = sums(described, targets)
    assert np.array_equal(parts.xx, whole.xx)
    assert np.array_equal(parts.xy, whole.xy)
    assert parts.yy == whole.yy


def test_nothing_to_predict_gives_zero_maps():
    maps, _, unexplained = feedback.fit(*[sums(integers(0, 6, 3), [np.zeros((6, 2), np.float32)])] * 2)
    assert not maps.any()
    assert unexplained == 1


def noisy(index, count, noise_scale):
    described = drawn(index, count, 12)
    return described, [described @ drawn(99, 12, 3) + np.float32(noise_scale) * drawn(index + 1, count, 3)]


@pytest.mark.parametrize("noise_scale", [0.0, 3.0, 10.0, 100.0])
def test_the_ridge_is_the_one_that_predicts_held_out_examples_best(noise_scale):
    kept, held_out = noisy(0, 16, noise_scale), noisy(10, 12, noise_scale)
    maps, ridge, unexplained = feedback.fit(sums(*kept), sums(*held_out))
    judged = {tried: left_over(sums(*kept).solve(tried), *held_out) for tried in feedback.RIDGES}
    assert ridge == min(judged, key=judged.get)
    assert unexplained == pytest.approx(judged[ridge], abs=1e-6)
    both = np.concatenate([kept[0], held_out[0]]), [np.concatenate([kept[1][0], held_out[1][0]])]
    np.testing.assert_allclose(maps, sums(*both).solve(ridge), rtol=1e-3, atol=1e-4)


def test_noise_asks_for_more_ridge():
    chosen = [feedback.fit(sums(*noisy(0, 16, level)), sums(*noisy(10, 12, level)))[1] for level in (0.0, 100.0)]
    assert chosen == [min(feedback.RIDGES), max(feedback.RIDGES)]


# Gains and the arm, eq. (6).


def test_an_opposite_estimate_is_turned_round_and_a_true_one_keeps_its_length():
    """Gradient (3, 4); estimates: itself, its double, its opposite, at right angles, none."""
    gradient = np.array([3, 4], np.float32)
    estimates = np.array([[3, 4], [6, 8], [-3, -4], [4, -3], [0, 0]], np.float32)
    found = feedback.gains(estimates @ gradient, (estimates * estimates).sum(axis=1))
    assert found.tolist() == [1, 0.5, -1, 0, 0]


def test_what_lies_in_no_block_stays_bit_for_bit():
    estimate = drawn(0, 20)
    before = estimate.tobytes()
    found = feedback.rectified(estimate, [(2, 5), (5, 9), (15, 16)], np.array([0, 2, 0.5], np.float32))
    outside = [0, 1, *range(9, 15), *range(16, 20)]
    assert found[outside].tobytes() == estimate[outside].tobytes()
    assert found[2:5].tolist() == [0, 0, 0]
    assert np.array_equal(found[5:9], 2 * estimate[5:9])
    assert found[15] == estimate[15] / 2
    assert estimate.tobytes() == before


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        (1, list(range(1, 20))),
        (2, [1, 2, 4, 6, 8, 10, 12, 14, 16, 18]),
        (6, [1, 2, 4, 6, 12, 18]),
        (8, [1, 2, 4, 8, 16]),
        (100, [1, 2, 4, 8, 16]),
    ],
)
def test_maps_are_fitted_often_at_first_and_then_every_so_many_rounds(every, expected):
    assert [version for version in range(20) if feedback.is_refresh(version, every)] == expected


SIZE, BLOCKS = 64, ((4, 20), (20, 50))
ARM = ArmConfig(name=ArmName.FEEDBACK, queries=8, estimate_bits=32, column_scale=0.25)


def plan(*, blocks=BLOCKS, num_columns=0, num_random=0, maps=(), maps_version=3, cohort=(0, 1), bits=32):
    replica = replay.start(drawn(0, SIZE), OptimizerConfig())
    return sample_messages.plan(
        theta_hash=replica.state_hash,
        cohort=cohort,
        num_columns=num_columns,
        probes=Probes(measures_columns=True, num_random=num_random, grouping=Grouping.DEVICE, column_scale=1.0, random_scale=1.0),
        feedback=Feedback(maps_version=maps_version, blocks=blocks, bits=bits, slope_scale=0.25),
        maps=maps,
    ), replica


def combined(estimate, gradient, *, num_columns, num_random):
    """What the arm makes of an estimate when one device measures every slope exactly."""
    asked, _ = plan(num_columns=num_columns, num_random=num_random)
    span = orthonormalise([drawn(index, SIZE) for index in range(1, 1 + num_columns)], SIZE)
    slopes = [direction @ gradient for direction in random_directions(asked.seed, 0, asked.probes, [], SIZE)]
    measured = Measured(
        num_devices=1,
        column_slopes=span @ gradient,
        column_variance=np.zeros(num_columns),
        random_slopes=(RandomSlopes(group=0, num_examples=4, slopes=np.array(slopes, np.float32)),) if slopes else (),
        estimate=estimate,
        agreement=np.array([estimate[a:b] @ gradient[a:b] for a, b in BLOCKS], np.float32),
        energy=np.array([estimate[a:b] @ estimate[a:b] for a, b in BLOCKS], np.float32),
    )
    public = Public(span=span, basis=[], predicted=np.zeros(num_columns, np.float32))
    found = FeedbackArm().combine(ARM, asked, public, measured)
    return unpack_vector(found.dense, SIZE), found.observed


def test_a_true_estimate_leaves_nothing_for_slopes_to_add():
    gradient = drawn(7, SIZE)
    found, observed = combined(gradient, gradient, num_columns=2, num_random=3)
    # Slopes are sums of 64 products of numbers below 4, added along unit columns and 3 probes of entries below 4.
    np.testing.assert_allclose(found, gradient, atol=5 * 64 * 16 * 4 * UNIT)
    assert observed["gain"] == pytest.approx(1, abs=64 * UNIT)


def test_maps_that_point_the_wrong_way_cost_nothing_where_slopes_are_exact():
    """Block by block the gradient, three times too long and turned round: what a map that has aged did to a run on real text."""
    gradient = drawn(7, SIZE)
    estimate = gradient.copy()
    for start, stop in BLOCKS:
        estimate[start:stop] *= -3
    found, observed = combined(estimate, gradient, num_columns=0, num_random=0)
    # A slope and a length of up to 30 products each, and the packing.
    np.testing.assert_allclose(found, gradient, atol=64 * 4 * UNIT)
    assert observed["gain"] == pytest.approx(-1 / 3, abs=64 * UNIT)


def test_along_a_measured_column_the_slope_has_the_last_word():
    """Whatever the estimate says: the direction's part along a column is the measured slope."""
    gradient, estimate = drawn(7, SIZE), drawn(8, SIZE)
    found, _ = combined(estimate, gradient, num_columns=3, num_random=2)
    span = orthonormalise([drawn(index, SIZE) for index in (1, 2, 3)], SIZE)
    np.testing.assert_allclose(span @ found, span @ gradient, atol=5 * 64 * 16 * 4 * UNIT)


@pytest.mark.parametrize("num_columns", [0, 2])
@pytest.mark.parametrize(("queries", "steps", "blocks"), [(3, 1, 2), (5, 3, 2), (5, 1, 2), (9, 4, 1), (9, 1, 8)])
def test_estimates_blocks_columns_and_probes_share_one_budget(queries, steps, blocks, num_columns):
    config = replace(ARM, queries=queries, local_steps=steps, feedback_blocks=blocks)
    free = FeedbackArm().free_queries(config)
    assert free == queries - steps - blocks
    assert FeedbackArm().probes(config, min(num_columns, free), 0).num_random + min(num_columns, free) == free


# Local steps on a device.


class Bowl:
    """A loss |θ|²/2 whose estimate is its gradient, scaled by the batch it is asked for."""

    num_examples = 4

    def evaluate(self, chosen):
        return lambda points: np.square(points.astype(np.float64)).sum(axis=1).astype(np.float32) / 2, 1

    def estimate(self, theta, chosen, maps):
        return theta * np.float32(1 + chosen[0]), float(np.square(theta, dtype=np.float64).sum() / 2)


def test_local_steps_walk_and_report_the_mean_of_their_estimates():
    asked, replica = plan(maps_version=-1)
    no_guide = digest(np.zeros((0, SIZE), np.float32))
    asked = replace(asked, batch_size=1, guide_hash=no_guide, feedback=replace(asked.feedback, num_steps=3, step_size=0.25))
    report = run_device(Order(device_id=0, group=0, plan=asked, updates=(), snapshot=None), replica, Bowl(), None, ())
    point, estimates = replica.theta, []
    for step in range(3):
        found, _ = Bowl().estimate(point, choose_batch(asked, 0, 4, step), None)
        estimates.append(feedback.shortened(found, float(np.linalg.norm(estimates[0])) if estimates else np.inf))
        point = point - np.float32(0.25) * estimates[-1]
    # Packed at 32 bits: two roundings of a mean of three.
    np.testing.assert_allclose(unpack_vector(report.estimate, SIZE), np.mean(estimates, axis=0), rtol=6 * UNIT)
    assert (report.num_examples, report.forward_passes) == (3, 2 * 3 + 2 * len(BLOCKS))
    first = [float(estimates[0][a:b] @ estimates[0][a:b]) for a, b in BLOCKS]
    np.testing.assert_allclose(report.energy, first, rtol=100 * UNIT)


def test_devices_round_what_they_send_each_by_itself():
    """The same estimate on two devices: within a step of it and of each other, by noise that each draws again the same."""
    asked, replica = plan(maps_version=-1, bits=4)
    asked = replace(asked, guide_hash=digest(np.zeros((0, SIZE), np.float32)))
    orders = [Order(device_id=device_id, group=0, plan=asked, updates=(), snapshot=None) for device_id in (0, 1, 0)]
    runtime = Bowl()
    runtime.num_examples = 1
    first, second, again = (unpack_vector(run_device(order, replica, runtime, None, ()).estimate, SIZE) for order in orders)
    step = np.abs(replica.theta).max() / 7 * (1 + 2**-10)
    assert np.abs(first - replica.theta).max() <= step
    assert np.array_equal(first, again)
    assert not np.array_equal(first, second)


class Cliff(Bowl):
    """Estimates that grow tenfold with every step, as on the far wall of a valley that is too narrow for the step."""

    def __init__(self):
        self.asked = 0

    def estimate(self, theta, chosen, maps):
        self.asked += 1
        return np.ones(SIZE, np.float32) * np.float32(10**self.asked), 0.5


def test_no_estimate_of_a_walk_counts_for_more_than_its_first():
    asked, replica = plan(maps_version=-1, blocks=())
    asked = replace(asked, guide_hash=digest(np.zeros((0, SIZE), np.float32)), feedback=replace(asked.feedback, num_steps=3))
    report = run_device(Order(device_id=0, group=0, plan=asked, updates=(), snapshot=None), replica, Cliff(), None, ())
    assert unpack_vector(report.estimate, SIZE) == pytest.approx(10, rel=8 * UNIT)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_cutting_does_not_hide_what_is_not_finite(bad):
    """A device must be able to say that its estimate is worthless."""
    assert not np.isfinite(feedback.shortened(np.array([1.0, bad], np.float32), 0.5)).all()


@pytest.mark.parametrize("length", [0.0, 0.1, 5.0, 7.0])
def test_a_vector_is_cut_to_a_length_and_keeps_its_direction(length):
    vector = np.array([3.0, 4.0], np.float32)
    found = feedback.shortened(vector, length)
    assert np.linalg.norm(found) == pytest.approx(min(length, 5.0), rel=2 * UNIT)
    assert found[0] * 4 == pytest.approx(found[1] * 3, rel=2 * UNIT)
    assert vector.tolist() == [3, 4]


def test_a_report_tells_the_loss_where_the_round_began():
    asked, replica = plan(maps_version=-1)
    asked = replace(asked, guide_hash=digest(np.zeros((0, SIZE), np.float32)), feedback=replace(asked.feedback, num_steps=3))
    report = run_device(Order(device_id=0, group=0, plan=asked, updates=(), snapshot=None), replica, Bowl(), None, ())
    assert report.loss == squares(replica.theta) / 2


# The edge.


def answer(device_id, asked, **changes):
    blocks = len(asked.feedback.blocks)
    report = sample_messages.device_report(
        device_id,
        asked,
        estimate=pack_vector(drawn(20 + device_id, SIZE), asked.feedback.bits),
        agreement=np.full(blocks, device_id, np.float32),
        energy=np.full(blocks, 2 * device_id, np.float32),
    )
    return replace(report, **changes)


def packed_with(scale, payload):
    return Packed(scale=scale, payload=payload)


@pytest.mark.parametrize(
    "changes",
    [
        {"estimate": None},
        {"estimate": packed_with(1.0, b"")},
        {"estimate": packed_with(1.0, pack(np.ones((1, SIZE), np.float32), 8)[:-1])},
        {"estimate": packed_with(1.0, pack(np.ones((1, SIZE + 1), np.float32), 8))},
        {"estimate": packed_with(1.0, pack(np.ones((2, SIZE), np.float32), 8))},
        {"estimate": packed_with(1.0, HEADER.pack(b"CG", 1, 4, 1, 1 << 60))},
        {"estimate": packed_with(1.0, pack(np.full((1, SIZE), np.nan, np.float32), 32))},
        {"agreement": np.zeros(1, np.float32)},
        {"energy": np.zeros(3, np.float32)},
        {"agreement": NOTHING, "energy": NOTHING},
    ],
    ids=["none", "empty", "short", "longer-model", "two-columns", "huge-header", "non-finite", "agreement", "energy", "no-gains"],
)
def test_a_report_with_an_unusable_estimate_is_a_mismatch_and_changes_no_number(changes):
    asked, _ = plan()
    good = [answer(0, asked), answer(1, asked)]
    found = Edge(0, range(4), SIZE).fold(asked, [*good, answer(2, asked, **changes)])
    assert found.dropped == {Outcome.MISMATCH: 1}
    assert encode(replace(found, dropped={})) == encode(Edge(0, range(4), SIZE).fold(asked, good))


@pytest.mark.parametrize("name", ["agreement", "energy"])
def test_a_non_finite_measure_of_an_estimate_is_counted_as_such(name):
    asked, _ = plan()
    found = Edge(0, range(4), SIZE).fold(asked, [answer(0, asked), answer(1, asked, **{name: np.array([1, np.inf], np.float32)})])
    assert (found.dropped, found.num_devices) == ({Outcome.NON_FINITE_LOSS: 1}, 1)


def test_an_estimate_that_nobody_asked_for_is_a_mismatch():
    asked, _ = plan()
    report = answer(0, asked, agreement=NOTHING, energy=NOTHING)
    assert Edge(0, range(4), SIZE).fold(replace(asked, feedback=None), [report]).dropped == {Outcome.MISMATCH: 1}


def hostile(scale, value):
    """Float32 entries that `pack` would have scaled to 1."""
    return packed_with(scale, HEADER.pack(b"CG", 1, 32, 1, SIZE) + np.full(SIZE, value, "<f4").tobytes())


@pytest.mark.parametrize(("scale", "value"), [(1e30, 3e38), (1.0, 3e38), (1e30, 1.0), (1e30, 1e5)])
def test_an_estimate_of_absurd_size_stops_no_round(scale, value):
    """The edge's own report must survive the link, or one device could end the run."""
    asked, _ = plan()
    found = Edge(0, range(4), SIZE).fold(asked, [answer(0, asked), answer(1, asked, estimate=hostile(scale, value))])
    assert decode(encode(found), EdgeReport).num_devices + sum(found.dropped.values()) == 2


def maps_of(version, base_version=-1):
    is_whole = base_version == -1
    return Maps(
        version=version,
        base_version=base_version,
        contrasts=feedback.contrasts(np.zeros((1, 2), np.float32), 1)[: int(is_whole)],
        num_components=2 * is_whole,
        basis=pack_basis([drawn(30, 6, 2)], 8) if is_whole else None,
        rank=1,
        factors=pack_factors([Fitted(maps=drawn(31, 1, 5, 4), xx=np.eye(5))], 1),
    )


def maps_in(edge, asked, replica):
    return {order.device_id: [maps.version for maps in order.plan.maps] for order in edge.fan_out(asked, replica)}


def test_maps_go_to_each_device_once_and_again_when_there_are_newer_ones():
    edge = Edge(0, [0, 1], SIZE)
    first, replica = plan(maps=(maps_of(3),), cohort=(0,))
    assert maps_in(edge, first, replica) == {0: [3]}
    edge.fold(first, [answer(0, first)])
    same, _ = plan()  # the cloud does not repeat itself; device 1 was not in the cohort when the maps came
    assert maps_in(edge, same, replica) == {0: [], 1: [3]}
    edge.fold(same, [answer(0, same), answer(1, same)])
    assert maps_in(edge, same, replica) == {0: [], 1: []}
    newer, _ = plan(maps=(maps_of(8),), maps_version=8)
    assert maps_in(edge, newer, replica) == {0: [8], 1: [8]}


@pytest.mark.parametrize("changes", [{"outcome": Outcome.LOST}, {"round_index": 9}, {"estimate": None}])
def test_a_device_without_a_usable_answer_gets_the_maps_again(changes):
    edge = Edge(0, [0, 1], SIZE)
    asked, replica = plan(maps=(maps_of(3),))
    edge.fan_out(asked, replica)
    edge.fold(asked, [answer(0, asked, **changes)], lost=1)
    assert maps_in(edge, replace(asked, maps=()), replica) == {0: [3], 1: [3]}


def test_no_maps_travel_before_the_first_fit_or_where_nobody_asks():
    edge = Edge(0, [0], SIZE)
    before, replica = plan(maps_version=-1)
    assert maps_in(edge, before, replica) == {0: []}
    with_maps, _ = plan(maps=(maps_of(3),))
    edge.fan_out(with_maps, replica)
    assert maps_in(edge, replace(with_maps, feedback=None, maps=()), replica) == {0: []}


def test_a_device_gets_the_differences_that_it_lacks():
    edge = Edge(0, [0, 1, 2], SIZE)
    first, replica = plan(maps=(maps_of(8),), maps_version=8, cohort=(0,))
    assert maps_in(edge, first, replica) == {0: [8]}
    edge.fold(first, [answer(0, first)])
    second, _ = plan(maps=(maps_of(16, 8),), maps_version=16, cohort=(0, 1))
    assert maps_in(edge, second, replica) == {0: [16], 1: [8, 16]}
    edge.fold(second, [answer(0, second)], lost=1)
    third, _ = plan(maps=(maps_of(24, 16),), maps_version=24, cohort=(0, 1, 2))
    assert maps_in(edge, third, replica) == {0: [24], 1: [8, 16, 24], 2: [8, 16, 24]}
    edge.fold(third, [answer(0, third)], lost=2)
    whole, _ = plan(maps=(maps_of(32),), maps_version=32, cohort=(0, 1))
    assert maps_in(edge, whole, replica) == {0: [32], 1: [32]}


def test_a_difference_to_maps_that_an_edge_does_not_have_is_refused():
    edge = Edge(0, [0], SIZE)
    asked, replica = plan(maps=(maps_of(16, 8),), maps_version=16)
    with pytest.raises(ProtocolError, match=r"version 16 as a difference to version 8 found, one to any of \[\]"):
        edge.fan_out(asked, replica)
