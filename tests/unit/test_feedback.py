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
from cooperllm.algorithm.maps import DecodedMaps, Fitted, LayerMaps, pack_factors, pack_rows
from cooperllm.algorithm.rounding import NO_ROUNDING
from cooperllm.config import ArmConfig, ArmName, OptimizerConfig, SlopeMethod, passes_of_estimates, queries_of_estimates
from cooperllm.device.host import Host
from cooperllm.device.probe import choose_batch, run_device
from cooperllm.edge import Edge
from cooperllm.errors import DecodeError, ProtocolError
from cooperllm.link.codec import decode, encode
from cooperllm.messages import EdgeReport, Feedback, Grouping, Maps, Order, Outcome, Probes, RandomSlopes

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


# From the gradient at the last layer's output to that at the output of a layer below, eq. (1)-(4).

MEAN = (1 / BATCH.lengths[BATCH.owner]).astype(np.float32)
LAST = np.append(BATCH.owner[1:] != BATCH.owner[:-1], True).astype(np.float32)
READOUTS = pytest.mark.parametrize("shares", [MEAN, LAST], ids=["mean", "last token"])


def layered_network(y, described, gates, shares, readout, labels):
    """h_t = y_t + mean_s A_s y_s with A_s = Σ_f φ_sf G_f, scores R Σ_t a_t h_t: linear in φ at y, so that exact maps exist.

    Gives the loss's gradients at h and at y.
    """
    output = torch.from_numpy(y).double().requires_grad_()
    moved = torch.einsum("nf,fij,nj->ni", *map(torch.from_numpy, (described.astype(float), gates.astype(float))), output)
    means = torch.stack([part.mean(0) for part in moved.split(BATCH.lengths.tolist())])
    last = output + means[torch.from_numpy(BATCH.owner)]
    taken = torch.from_numpy(shares)[:, None] * last
    scores = torch.stack([part.sum(0) for part in taken.split(BATCH.lengths.tolist())]) @ torch.from_numpy(readout).double().T
    found = torch.autograd.grad(torch.nn.functional.cross_entropy(scores, torch.from_numpy(labels)), [last, output])
    return [gradient.numpy() for gradient in found]


@READOUTS
def test_with_the_maps_of_the_network_the_delta_is_the_gradient_at_the_output(shares):
    y, gates, readout = drawn(0, 8, 4), drawn(2, 7, 4, 4), drawn(3, 3, 4)
    described = feedback.features(y, BATCH, drawn(1, 4, 3))
    top, expected = layered_network(y, described, gates, shares, readout, np.array([0, 2, 1]))
    # An output error sums to 0 over the classes: two directions hold every gradient.
    directions = np.linalg.qr((readout[1:] - readout[0]).T.astype(float))[0].T.astype(np.float32)

    def delta(top, described, directions, gates):
        return feedback.deltas(top, described, BATCH, directions, np.einsum("fij,ki->kfj", gates, directions))

    parts = (top.astype(np.float32), described, directions, gates)
    found, magnitudes = delta(*parts), delta(*map(np.abs, parts))
    # The same sums over magnitudes, times the roundings on the way: the top, 4 tokens, 4 entries, a length, directions that are used
    # twice and leave a gradient of 4 entries unturned, 4 + 7 entries of a map and its product, 2 directions and the top.
    assert (np.abs(found - expected) <= 34 * UNIT * magnitudes).all()
    assert np.abs(expected - top).max() > 1e-2


def test_without_maps_the_delta_is_the_gradient_at_the_top():
    """Layers add to what they are given: a map says what they change."""
    top = drawn(0, 8, 4)
    before = top.tobytes()
    found = feedback.deltas(top, drawn(1, 8, 7), BATCH, drawn(2, 3, 4), np.zeros((3, 7, 4), np.float32))
    assert found.tobytes() == before
    feedback.deltas(top, drawn(1, 8, 7), BATCH, drawn(2, 3, 4), drawn(3, 3, 7, 4))
    assert top.tobytes() == before


def test_what_maps_add_to_a_text_is_its_own_gradients_and_nobody_elses():
    top, described, directions, maps = integers(0, 8, 4), integers(1, 8, 7), integers(2, 3, 4), integers(3, 3, 7, 4)
    changed = top.copy()
    changed[4:] += 5
    found = [feedback.deltas(one, described, BATCH, directions, maps) for one in (top, changed)]
    assert np.array_equal(found[0][:4], found[1][:4])
    assert not np.array_equal(found[0][4:] - top[4:], found[1][4:] - changed[4:])


def test_sums_of_texts_add_up_each_texts_own_tokens():
    values = integers(0, 8, 3)
    assert feedback.sums_of_texts(values, BATCH).tolist() == [values[:3].sum(0).tolist(), values[3].tolist(), values[4:].sum(0).tolist()]


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
    """Eq. (4) divides by T: what a map adds to an example adds up to the example's gradient whether it has one token or four."""
    top, one = np.array([[0, 0, 3, 2, 0, 0, 0, 4]], np.float32).T, np.ones((1, 1), np.float32)
    added = feedback.deltas(top, np.ones((8, 1), np.float32), BATCH, one, one[None]) - top
    assert [float(part.sum()) for part in np.split(added, [3, 4])] == [3, 2, 4]


# Directions, shares of tokens and bases.


def softmax(scores):
    return torch.from_numpy(scores).softmax(1).numpy()


def test_moments_are_those_of_gradients_under_labels_that_the_model_draws_itself():
    jacobian, counts = integers(0, 3, 4, 5), np.array([[2, 4, 1, 1], [8, 0, 0, 0], [3, 3, 1, 1]])
    probabilities = (counts / 8).astype(np.float32)  # they add up to 1 exactly, as a softmax does up to a rounding
    gradients = [
        (share, (share_of - np.eye(4)[label]) @ one)
        for one, share_of in zip(jacobian.astype(float), probabilities.astype(float), strict=True)
        for label, share in enumerate(share_of)
    ]
    expected = sum(share * np.outer(gradient, gradient) for share, gradient in gradients)
    # Sums of integers and eighths below 1000 in double precision: but for the squares of eight square roots, exact.
    np.testing.assert_allclose(feedback.gradient_moments(jacobian, probabilities), expected, atol=1e-12)


def test_a_text_that_the_model_is_sure_of_moves_no_direction():
    moments = feedback.gradient_moments(integers(0, 2, 3, 5), np.eye(3, dtype=np.float32)[:2])
    assert not moments.any()
    assert feedback.main_directions(moments, 8).shape == (0, 5)


def test_what_all_classes_share_is_in_no_gradient_however_large_it_is():
    """A float32 softmax adds up to 1 but for a rounding, which the square of a large shared part would magnify."""
    own, shared = drawn(0, 32, 2, 8), 1000 * drawn(1, 8)
    probabilities = softmax(np.tile(np.array([16.0, 0.0], np.float32), (32, 1)))
    expected = feedback.gradient_moments(own, probabilities)
    found = feedback.gradient_moments(own + shared, probabilities)
    # Entries near 1000 lose 1000 UNIT each; own parts are below 5, their squares count 1e-7 each, and there are 32 texts.
    np.testing.assert_allclose(found, expected, atol=32 * 1e-7 * 4 * 5 * 4000 * UNIT + 1e-15)
    assert np.linalg.eigvalsh(found).min() > -1e-15


@pytest.mark.parametrize(("num_texts", "num_classes"), [(1, 2), (4, 2), (4, 3)])
def test_what_directions_leave_out_of_gradients_is_quiet(num_texts, num_classes):
    jacobian, probabilities = drawn(0, num_texts, num_classes, 6), softmax(2 * drawn(1, num_texts, num_classes))
    moments = feedback.gradient_moments(jacobian, probabilities)
    directions = feedback.main_directions(moments, 99)
    assert len(directions) <= min(num_texts * (num_classes - 1), 6)
    left, total = 0.0, 0.0
    for one, shares in zip(jacobian, probabilities, strict=True):
        for label, share in enumerate(shares):
            gradient = (shares - np.eye(num_classes)[label]) @ one
            left += share * squares(gradient - directions.T @ (directions @ gradient))
            total += share * squares(gradient)
    # Each of the directions left out holds less than its share; float32 directions lose the square of a few roundings.
    assert left <= ((6 - len(directions)) * feedback.QUIET + (10 * UNIT) ** 2) * total
    assert total > 0.1


AXES = np.linalg.qr(drawn(5, 6, 6).astype(float))[0].T
"""Six orthonormal rows."""


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize(("most", "expected"), [(1, [1]), (2, [1, 4]), (6, [1, 4, 0])])
def test_directions_are_orthonormal_and_those_along_which_gradients_are_longest(most, expected, scale):
    """The quiet ones hold less than a thousandth of all energy, whatever its size: one half of that, three nothing."""
    energies = scale * np.array([0.01, 5.0, 0.0, 0.0035, 2.0, 0.0])
    found = feedback.main_directions((AXES.T * energies) @ AXES, most)
    # Unit rows rounded to float32: each of six products errs by at most 3 UNIT. Double precision parts 0.01 from 0.0035 to 1e-13.
    np.testing.assert_allclose(found @ found.T, np.eye(len(expected)), atol=18 * UNIT)
    np.testing.assert_allclose(np.abs(found @ AXES.T), np.eye(6)[expected], atol=18 * UNIT)


def test_where_every_gradient_is_zero_there_are_no_directions():
    assert feedback.main_directions(np.zeros((4, 4)), 8).shape == (0, 4)


@pytest.mark.parametrize(
    "weights", [MEAN, LAST, np.array([0.5, 0.25, 0.25, 1, 0, 0.5, 0.125, 0.375], np.float32)], ids=["mean", "last", "any"]
)
def test_shares_are_the_weights_of_a_readout_that_adds_tokens_up(weights):
    """Whatever scores make of the sum, and however differently from text to text."""
    jacobian = weights[:, None] * drawn(0, 4, 3, 5)[:, BATCH.owner]
    # Entries, sums of up to 4 and the result are rounded to float32.
    np.testing.assert_allclose(feedback.token_shares(jacobian, BATCH), weights, rtol=6 * UNIT)


def test_the_shares_of_a_text_add_up_to_one():
    shares = feedback.token_shares(integers(0, 4, 8, 5), BATCH).astype(float)
    starts = [0, 3, 4]
    # Exact but for the rounding of each share.
    assert (np.abs(np.add.reduceat(shares, starts) - 1) <= UNIT * np.add.reduceat(np.abs(shares), starts)).all()
    assert np.ptp(shares[:3]) > 0.1


def test_shares_are_even_in_a_text_that_scores_do_not_depend_on():
    jacobian = LAST[:, None] * drawn(0, 4, 8, 5)
    jacobian[:, 4:] = 0
    assert feedback.token_shares(jacobian, BATCH).tolist() == [0, 0, 1, 1, 0.25, 0.25, 0.25, 0.25]


def test_principal_components_describe_inputs_that_vary_in_two_directions():
    activation = (np.outer(drawn(0, 30), [2, 0, 0, 1]) + np.outer(drawn(1, 30), [0, 1, 0, 0]) + 5).astype(np.float32)
    basis = feedback.principal_components(activation, 2)
    rows = basis / np.linalg.norm(basis, axis=0)
    centred = activation - activation.mean(axis=0)
    # What lies outside of them is rounding of entries below 16.
    assert np.abs(centred - centred @ rows @ rows.T).max() < 16 * 8 * UNIT
    assert feedback.principal_components(activation, 99).shape == (4, 4)
    assert np.isfinite(feedback.principal_components(np.ones((3, 4), np.float32), 2)).all()


# The fit, eq. (5).


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


# Gains and the arm, eq. (7).


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
ARM = ArmConfig(name=ArmName.FEEDBACK, queries=8, estimate_bits=32, step_bits=32, column_scale=0.25)


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


def test_estimates_count_three_passes_each():
    assert [passes_of_estimates(count) for count in range(6)] == [0, 3, 6, 9, 12, 15]
    for count in range(50):
        assert passes_of_estimates(count) == 3 * count
        assert queries_of_estimates(count) == math.ceil(passes_of_estimates(count) / 2)


@pytest.mark.parametrize("num_columns", [0, 2])
@pytest.mark.parametrize(("queries", "steps", "blocks"), [(4, 1, 2), (7, 3, 2), (6, 2, 1), (9, 4, 1), (10, 1, 8), (2, 1, 0), (5, 3, 0)])
def test_estimates_blocks_columns_and_probes_share_one_budget(queries, steps, blocks, num_columns):
    config = replace(ARM, queries=queries, local_steps=steps, feedback_blocks=blocks)
    free = FeedbackArm().free_queries(config)
    passes = 3 * steps + 2 * blocks + 2 * free
    assert 2 * queries - 2 < passes <= 2 * queries
    assert FeedbackArm().probes(config, min(num_columns, free), 0).num_random + min(num_columns, free) == free


@pytest.mark.parametrize("maps_version", [-1, 0, 7])
def test_blocks_are_measured_with_maps_and_without(maps_version):
    """Whoever asks for blocks gets them: on rounded weights a gradient carried down is an estimate, too."""
    assert FeedbackArm().feedback(ARM, maps_version, BLOCKS).blocks == BLOCKS


def test_an_estimate_without_blocks_is_exact_and_stays():
    """A network with nothing adapted below its last layer."""
    asked, _ = plan(blocks=())
    measured = Measured(
        num_devices=1,
        column_slopes=NOTHING,
        column_variance=np.zeros(0),
        random_slopes=(),
        estimate=drawn(7, SIZE),
        agreement=NOTHING,
        energy=NOTHING,
    )
    public = Public(span=np.zeros((0, SIZE), np.float32), basis=[], predicted=NOTHING)
    found = FeedbackArm().combine(ARM, asked, public, measured)
    # Packed at 32 bits.
    assert np.array_equal(unpack_vector(found.dense, SIZE), drawn(7, SIZE))
    assert "gain" not in found.observed  # 0 would say that maps are worthless


# Local steps on a device.


class Bowl:
    """A loss |θ|²/2 whose estimate is its gradient, scaled by the batch it is asked for."""

    num_examples = 4
    map_shape = (1, 4)

    def rounding(self):
        return NO_ROUNDING

    def evaluate(self, chosen):
        return lambda points: np.square(points.astype(np.float64)).sum(axis=1).astype(np.float32) / 2, 1

    def differentiate(self, chosen):
        return lambda theta, directions: (float(np.square(theta, dtype=np.float64).sum() / 2), directions @ theta), 4

    def estimate(self, theta, chosen, maps):
        return theta * np.float32(1 + chosen[0]), float(np.square(theta, dtype=np.float64).sum() / 2)


def test_local_steps_walk_and_report_the_mean_of_their_estimates():
    asked, replica = plan(maps_version=-1)
    no_guide = digest(np.zeros((0, SIZE), np.float32))
    asked = replace(asked, batch_size=1, guide_hash=no_guide, feedback=replace(asked.feedback, num_steps=3, step_size=0.25))
    report = run_device(Order(device_id=0, group=0, plan=asked, updates=(), snapshot=None), replica, Bowl(), None, None)
    point, estimates = replica.theta, []
    for step in range(3):
        found, _ = Bowl().estimate(point, choose_batch(asked, 0, 4, step), None)
        estimates.append(feedback.shortened(found, float(np.linalg.norm(estimates[0])) if estimates else np.inf))
        point = point - np.float32(0.25) * estimates[-1]
    # Packed at 32 bits: a rounding of a mean of three.
    np.testing.assert_allclose(unpack_vector(report.estimate, SIZE), np.mean(estimates, axis=0), rtol=6 * UNIT)
    assert (report.num_examples, report.forward_passes) == (3, 9 + 2 * len(BLOCKS))
    first = [float(estimates[0][a:b] @ estimates[0][a:b]) for a, b in BLOCKS]
    np.testing.assert_allclose(report.energy, first, rtol=100 * UNIT)


def test_forward_mode_rectifies_an_estimate_as_two_point_slopes_do_for_one_pass_more_than_blocks():
    asked, replica = plan(maps_version=-1)
    asked = replace(asked, batch_size=1, guide_hash=digest(np.zeros((0, SIZE), np.float32)))
    order = Order(device_id=0, group=0, plan=asked, updates=(), snapshot=None)
    two_sided, exact = (
        run_device(order, replica, Bowl(), None, None, method) for method in (SlopeMethod.TWO_SIDED, SlopeMethod.FORWARD_MODE)
    )
    # A bowl is quadratic: differences are exact up to float32 losses near |θ|²/2, divided by 2μ.
    np.testing.assert_allclose(exact.agreement, two_sided.agreement, rtol=1e-2)
    np.testing.assert_allclose(exact.energy, two_sided.energy, rtol=0)
    assert two_sided.forward_passes - exact.forward_passes == 2 * len(BLOCKS) - (1 + len(BLOCKS)) > 0


def test_five_directions_in_forward_mode_are_two_passes_with_a_loss_at_theta_each():
    asked, replica = plan(num_random=5)
    asked = replace(asked, feedback=None, guide_hash=digest(np.zeros((0, SIZE), np.float32)))
    order = Order(device_id=0, group=0, plan=asked, updates=(), snapshot=None)
    report = run_device(order, replica, Bowl(), None, None, SlopeMethod.FORWARD_MODE)
    assert report.forward_passes == (1 + 4) + (1 + 1)
    assert report.loss == pytest.approx(float(replica.theta @ replica.theta) / 2, rel=1e-6)
    found = run_device(order, replica, Bowl(), None, None)
    assert found.forward_passes == 2 * 5
    np.testing.assert_allclose(report.random_slopes, found.random_slopes, rtol=1e-2, atol=1e-2)


def test_devices_round_what_they_send_each_by_itself():
    """The same estimate on two devices: within a step of it and of each other, by noise that each draws again the same."""
    asked, replica = plan(maps_version=-1, bits=4)
    asked = replace(asked, guide_hash=digest(np.zeros((0, SIZE), np.float32)))
    orders = [Order(device_id=device_id, group=0, plan=asked, updates=(), snapshot=None) for device_id in (0, 1, 0)]
    runtime = Bowl()
    runtime.num_examples = 1
    first, second, again = (unpack_vector(run_device(order, replica, runtime, None, None).estimate, SIZE) for order in orders)
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
    report = run_device(Order(device_id=0, group=0, plan=asked, updates=(), snapshot=None), replica, Cliff(), None, None)
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
    report = run_device(Order(device_id=0, group=0, plan=asked, updates=(), snapshot=None), replica, Bowl(), None, None)
    assert report.loss == squares(replica.theta) / 2


# Maps on a device.


class Listener(Bowl):
    """Remembers the versions of the maps that it was given."""

    def __init__(self):
        self.given = []

    def estimate(self, theta, chosen, maps):
        self.given.append(None if maps is None else maps.version)
        return super().estimate(theta, chosen, maps)


def order_of(device_id=0, **changes):
    asked, replica = plan(**changes)
    asked = replace(asked, guide_hash=digest(np.zeros((0, SIZE), np.float32)))
    return Order(device_id=device_id, group=0, plan=asked, updates=(), snapshot=None), replica


def decoded(version):
    layer = LayerMaps(basis=drawn(30, 4, 2), maps=drawn(31, 1, 5, 4))
    return DecodedMaps(version=version, directions=drawn(29, 1, 4), layers=(layer,))


@pytest.mark.parametrize(("asked_version", "expected"), [(3, 3), (-1, None)])
def test_an_estimate_is_made_with_the_maps_that_the_plan_means(asked_version, expected):
    """A device may hold maps that the cloud has taken back."""
    order, replica = order_of(maps_version=asked_version)
    runtime = Listener()
    run_device(order, replica, runtime, None, decoded(3))
    assert runtime.given == [expected]


@pytest.mark.parametrize(("held", "found"), [(None, "none"), (decoded(2), "version 2")], ids=["none", "older"])
def test_a_device_without_the_maps_that_the_plan_means_says_so(held, found):
    order, replica = order_of()
    with pytest.raises(ProtocolError, match=f"feedback maps of version 3 expected, {found} found"):
        run_device(order, replica, Bowl(), None, held)


def test_a_host_keeps_maps_and_refuses_those_of_another_model_without_losing_them():
    runtime = Listener()
    host = Host([runtime, runtime], lambda: order_of()[1], OptimizerConfig(), list)
    host.answer(encode(order_of(maps=(maps_of(3),))[0]))
    for wrong in (maps_of(8, width=5), maps_of(8, 5)):
        with pytest.raises((DecodeError, ProtocolError), match=r"maps|guide"):
            host.answer(encode(order_of(maps=(wrong,), maps_version=8)[0]))
    host.answer(encode(order_of(device_id=1)[0]))
    for version, base_version in ((8, 3), (16, 8)):
        host.answer(encode(order_of(maps=(maps_of(version, base_version),), maps_version=version)[0]))
    assert runtime.given == [3, 3, 8, 16]


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


@pytest.mark.parametrize(
    "changes",
    [
        {"estimate": None},
        {"estimate": b""},
        {"estimate": pack(np.ones((1, SIZE), np.float32), 8)[:-1]},
        {"estimate": pack(np.ones((1, SIZE + 1), np.float32), 8)},
        {"estimate": pack(np.ones((2, SIZE), np.float32), 8)},
        {"estimate": HEADER.pack(b"CG", 2, 0, 1, 1 << 60, 0)},
        {"estimate": pack(np.full((1, SIZE), np.nan, np.float32), 32)},
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


@pytest.mark.parametrize("value", [3e38, 1e30, 1.1e24, 0.9e24])
@pytest.mark.parametrize("bits", [1, 8, 32])
def test_an_estimate_of_absurd_size_stops_no_round(value, bits):
    """The edge's own report must survive the link and the cloud's checks, or one device could end the run."""
    asked, _ = plan(bits=bits)
    absurd = pack(np.full((1, SIZE), value, np.float32), 32)
    found = Edge(0, range(4), SIZE).fold(asked, [answer(0, asked), answer(1, asked, estimate=absurd)])
    arrived = decode(encode(found), EdgeReport)
    assert (arrived.num_devices, found.dropped) == ((1, {Outcome.MISMATCH: 1}) if value > 1e24 else (2, {}))
    assert np.isfinite(unpack_vector(arrived.estimate, SIZE)).all()


def maps_of(version, base_version=-1, width=4):
    is_whole = base_version == -1
    return Maps(
        version=version,
        base_version=base_version,
        num_directions=int(is_whole),
        directions=pack_rows([drawn(29, 1, width)], 8) if is_whole else None,
        num_components=2 * is_whole,
        basis=pack_rows([drawn(30, width, 2)], 8) if is_whole else None,
        rank=1,
        factors=pack_factors([Fitted(maps=drawn(31, 1, 5, width), xx=np.eye(5))], 1),
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
