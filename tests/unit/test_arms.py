"""Every method on a linear loss with a known gradient: the step it makes of slopes that are exactly right.

Run: pytest tests/unit/test_arms.py
"""

import math
from dataclasses import replace

import numpy as np
import pytest

from cooperllm.algorithm import noise, replay
from cooperllm.algorithm.arms import GuideSource, Measured
from cooperllm.algorithm.baselines import CloudOnly, FederatedAveraging, PlainZerothOrder, arm
from cooperllm.algorithm.guidance import blend_weights, guided_perturbations, orthonormalise
from cooperllm.algorithm.measured import MeasuredArm, regression_slope, shrinkage
from cooperllm.algorithm.paper import PaperArm, optimal_weight
from cooperllm.cloud import state
from cooperllm.config import ArmConfig, ArmName, OptimizerConfig, Rectification
from cooperllm.edge import Edge
from cooperllm.messages import DeviceReport, Grouping, Outcome, Plan, Probes, RandomSlopes, Update, probe_indices

SEED = 41
UNIT = 2.0**-24
"""Largest relative error of one float32 operation."""


def gradient(size, index=0):
    return noise.gaussian(100, index, size)


def span_of(num_columns, size):
    return orthonormalise([noise.gaussian(200, index, size) for index in range(num_columns)], size)


def plan(probes=None):
    return Plan(
        round_index=0,
        model_version=0,
        guide_version=-1,
        theta_hash=bytes(16),
        seed=SEED,
        cohort=tuple(range(8)),
        batch_size=4,
        guide=None,
        guide_hash=bytes(16),
        num_columns=2,
        probes=probes,
    )


def along(directions, private):
    """Slopes of a linear loss, rounded once as a device rounds them."""
    found = [float(direction.astype(np.float64) @ private.astype(np.float64)) for direction in directions]
    return np.array(found, np.float32)


def gaussians(group, count, size):
    return [noise.gaussian(SEED, index, size) for index in probe_indices(group, count)]


def measured(span, private, groups=(), num_random=0, weights=None, directions=gaussians):
    """What devices of a linear loss with gradient `private` report."""
    slopes = along(span, private)
    weights = weights or [4] * len(groups)
    random = tuple(
        RandomSlopes(group=group, num_examples=weight, slopes=along(directions(group, num_random, len(private)), private))
        for group, weight in zip(groups, weights, strict=True)
    )
    return Measured(
        num_devices=max(1, len(groups)),
        column_slopes=slopes,
        column_variance=np.zeros(len(slopes)),
        random_slopes=random if num_random else (),
        estimate=None,
    )


def step(found, span):
    """The direction that replicas rebuild from coordinates."""
    replica = replay.start(np.zeros(span.shape[1], np.float32), OptimizerConfig())
    update = Update(
        round_index=0,
        model_version=0,
        seed=SEED,
        learning_rate=1.0,
        guide=None,
        column_coefficients=found.columns,
        random_terms=found.random_terms,
        dense=found.dense,
        theta_hash=bytes(16),
    )
    return replay.direction(replica, update, span).astype(np.float64)


def projection(span, vector):
    wide = span.astype(np.float64)
    return wide.T @ (wide @ vector.astype(np.float64))


# The default arm


@pytest.mark.parametrize("size", [1, 5, 40])
def test_a_full_span_measured_on_devices_gives_their_gradient_exactly(size):
    private, public = gradient(size), gradient(size, 1)
    span = span_of(size, size)
    found = MeasuredArm().combine(ArmConfig(public_weight=0.0), plan(), span, along(span, public), measured(span, private))
    # Rows are off right angles by 2(k+4) units each, and k products and sums are rounded once.
    assert np.abs(step(found, span) - private).max() < 4 * (size + 4) * UNIT * np.linalg.norm(private) * math.sqrt(size)


@pytest.mark.parametrize("num_columns", [3, 20])
def test_devices_without_weight_leave_the_clouds_own_step(num_columns):
    """With λ = 1 the columns' part is the public gradient on the span, all of it when the span is full: cloud SGD."""
    size = 20
    private, public = gradient(size), gradient(size, 1)
    span = span_of(num_columns, size)
    predicted = along(span, public)
    config = ArmConfig(public_weight=1.0)
    found = MeasuredArm().combine(config, plan(), span, predicted, measured(span, private))
    assert np.array_equal(found.columns, predicted)
    assert np.array_equal(found.columns, CloudOnly().combine(config, plan(), span, predicted, measured(span, private)).columns)
    expected = public if num_columns == size else projection(span, public)
    assert np.abs(step(found, span) - expected).max() < 4 * (size + 4) * UNIT * np.linalg.norm(public) * math.sqrt(size)


def test_public_weight_mixes_predicted_and_measured_slopes():
    span = np.eye(2, 6, dtype=np.float32)
    found = measured(span, np.array([8, -4, 0, 0, 0, 0], np.float32))
    columns = MeasuredArm().combine(ArmConfig(public_weight=0.25), plan(), span, np.array([0, 4], np.float32), found).columns
    assert columns.tolist() == [0.75 * 8, 0.75 * -4 + 0.25 * 4]


@pytest.mark.parametrize("weights", [[4, 4], [1, 7]])
def test_with_the_guide_switched_off_the_default_arm_is_plain_two_point_zeroth_order(weights):
    size, nothing = 30, np.zeros((0, 30), np.float32)
    config, none = ArmConfig(effective_rank=0.0), np.zeros(0, np.float32)
    reports = measured(nothing, gradient(size), groups=(2, 5), num_random=4, weights=weights)
    ours = MeasuredArm().combine(config, plan(), nothing, none, reports)
    mezo = PlainZerothOrder(Grouping.DEVICE).combine(config, plan(), nothing, none, reports)
    assert [term.group for term in ours.random_terms] == [term.group for term in mezo.random_terms] == [2, 5]
    for one, other in zip(ours.random_terms, mezo.random_terms, strict=True):
        # One rounding here, two there (of the weight and of the product).
        assert np.allclose(one.coefficients, other.coefficients, rtol=3 * UNIT * (1 + 2**-20), atol=0)
    assert MeasuredArm().probes(config, 0).num_random == PlainZerothOrder(Grouping.DEVICE).probes(config, 0).num_random == config.queries


def test_random_probes_never_change_the_step_inside_the_span():
    """Whatever they saw, U d stays (1-λ) c + λ p."""
    size = 50
    span, private, public = span_of(6, size), gradient(size), gradient(size, 1)
    config = ArmConfig(public_weight=0.25, effective_rank=0.0)
    reports = measured(span, private, groups=(0, 3), num_random=3)
    predicted = along(span, public)
    found = step(MeasuredArm().combine(config, plan(), span, predicted, reports), span)
    expected = 0.75 * reports.column_slopes.astype(np.float64) + 0.25 * predicted
    # Six random terms and six columns are rounded at their own size, below 2 |∇f| √n for these few probes; U d adds √n of them.
    tolerance = 12 * 3 * UNIT * 2 * np.linalg.norm(private) * math.sqrt(size)
    assert np.abs(span.astype(np.float64) @ found - expected).max() < tolerance
    assert np.abs(found - projection(span, found)).max() > 100 * tolerance


@pytest.mark.parametrize("weights", [[4, 4], [1, 7]])
def test_default_step_is_equation_three_written_out(weights):
    size, count = 40, 3
    span, private, public = span_of(4, size), gradient(size), gradient(size, 1)
    config = ArmConfig(public_weight=0.5, effective_rank=18.0)
    reports = measured(span, private, groups=(1, 6), num_random=count, weights=weights)
    predicted = along(span, public)
    found = step(MeasuredArm().combine(config, plan(), span, predicted, reports), span)

    wide, slopes = span.astype(np.float64), reports.column_slopes.astype(np.float64)
    expected = wide.T @ (0.5 * slopes + 0.5 * predicted)
    shrink = 6 / (6 + 18)
    for group in reports.random_slopes:
        for slope, z in zip(group.slopes, gaussians(group.group, count, size), strict=True):
            rest = slope - slopes @ (wide @ z)
            outside = z - wide.T @ (wide @ z)
            expected += shrink * group.num_examples / sum(weights) / count * rest * outside
    assert np.abs(found - expected).max() < 10 * 3 * UNIT * 2 * np.linalg.norm(private) * math.sqrt(size)


def test_probes_that_see_nothing_outside_the_span_add_nothing():
    size = 30
    span = span_of(3, size)
    private = (span.T @ np.array([1, -2, 3], np.float32)).astype(np.float32)
    reports = measured(span, private, groups=(0,), num_random=5)
    found = MeasuredArm().combine(ArmConfig(public_weight=0.0, effective_rank=0.0), plan(), span, along(span, private), reports)
    # A slope of size |∇f| |z| is rounded once, and so are three column slopes.
    assert np.abs(found.random_terms[0].coefficients).max() < 4 * 2 * UNIT * np.linalg.norm(private) * 2 * math.sqrt(size) / 5
    # Energies are squares: what rounding leaves outside is a share of (8 UNIT √n)² of the whole, beyond double precision's 1.
    assert found.observed["span_energy"] == pytest.approx(1, abs=(16 * UNIT) ** 2 * size)
    assert found.observed["rho"] == pytest.approx(1, rel=2**-40)


def test_measured_arm_spends_one_query_per_column_and_the_rest_at_random():
    arm_, config = MeasuredArm(), ArmConfig(queries=5)
    assert [arm_.probes(config, columns).num_random for columns in (0, 1, 4, 5, 6)] == [5, 4, 1, 0, 0]
    assert arm_.probes(config, 3).measures_columns


@pytest.mark.parametrize(("num_probes", "rank", "expected"), [(0, 0.0, 0), (0, 5.0, 0), (3, 0.0, 1), (1, 3.0, 0.25)])
def test_shrinkage_limits(num_probes, rank, expected):
    assert shrinkage(num_probes, rank) == expected


def test_regression_slope_says_how_far_predictions_hold():
    predicted = np.array([1, -2, 2], np.float32)
    assert regression_slope(predicted, 3 * predicted) == 3
    assert regression_slope(predicted, -predicted) == -1
    assert regression_slope(predicted, np.array([2, 1, 0], np.float32)) == 0
    assert regression_slope(np.zeros(3, np.float32), predicted) == 0


# The paper's arm


def guided(config, span):
    def directions(group, count, size):
        return list(guided_perturbations(span, SEED, probe_indices(group, count), group, config.blend, config.blend_scale))

    return directions


def paper_step(config, span, private, num_probes, public=None, groups=(0,)):
    reports = measured(np.zeros((0, len(private)), np.float32), private, groups, num_probes, directions=guided(config, span))
    predicted = along(span, private if public is None else public)
    return PaperArm().combine(config, plan(), span, predicted, reports)


@pytest.mark.parametrize("blend", [0.5, 0.1])
def test_papers_estimate_is_its_perturbations_weighted_by_slope_and_divided_by_the_largest_eigenvalue(blend):
    size, config = 30, ArmConfig(blend=blend, blend_scale=2.0)
    span, private = span_of(2, size), gradient(size)
    found = step(paper_step(config, span, private, 3, groups=(0, 4)), span)
    largest = 4 * (blend / size + (1 - blend) / 2)
    expected = np.zeros(size)
    for group in (0, 4):
        for v in guided(config, span)(group, 3, size):
            wide = v.astype(np.float64)
            expected += (wide @ private) * wide / largest / 6
    # Six slopes and six perturbations are rounded a few times each; every term is below |v|² |∇f| / Λ / 6 with |v|² < 4 · β².
    assert np.abs(found - expected).max() < 6 * 10 * UNIT * 4 * 4 * np.linalg.norm(private) / largest / 6


def test_papers_estimate_does_not_depend_on_the_length_of_perturbations():
    """Without the division by Λ it would grow with β² = 16."""
    size = 30
    span, private = span_of(2, size), gradient(size)
    one, other = (step(paper_step(ArmConfig(blend_scale=beta), span, private, 4), span) for beta in (1.0, 4.0))
    assert np.allclose(one, other, rtol=0, atol=8 * UNIT * np.abs(one).max())


def test_papers_estimate_is_unbiased_along_the_guide():
    size, count = 24, 2000
    config, span, private = ArmConfig(blend=0.3), span_of(2, size), gradient(size)
    found = step(paper_step(config, span, private, count), span)
    isotropic, guide = blend_weights(2, size, 0.3, 1.0)
    wide = np.stack(guided(config, span)(0, count, size)).astype(np.float64)
    single = (wide @ private)[:, None] * (wide @ span.T.astype(np.float64)) / (isotropic**2 + guide**2)
    # The spread of single estimates, measured on the same draws, gives the mean's standard error.
    error = single.std(axis=0) / math.sqrt(count)
    assert (np.abs(span.astype(np.float64) @ found - span @ private) < 5 * error).all()
    assert (5 * error < np.abs(span @ private)).any()


def test_papers_estimate_is_unbiased_everywhere_when_isotropic():
    size, count = 6, 3000
    private = gradient(size).astype(np.float64)
    found = step(paper_step(ArmConfig(blend=1.0), span_of(2, size), gradient(size), count), span_of(2, size))
    # One estimate (z·∇f) z has variance |∇f|² + ∇f_i² in coordinate i.
    error = np.sqrt((private @ private + private**2) / count)
    assert (np.abs(found - private) < 5 * error).all()


def test_the_best_weight_has_the_right_limits():
    assert optimal_weight(3.0, 0.0, 0.0) == 1
    assert optimal_weight(0.0, 2.0, 1.0) == 0
    assert optimal_weight(0.0, 0.0, 0.0) == 0
    assert optimal_weight(2.0, 1.0, 1.0) == 0.5


@pytest.mark.parametrize(("variance", "bias", "public"), [(3.0, 1.0, 0.5), (0.1, 4.0, 0.0), (1.0, 0.0, 0.2)])
def test_no_other_weight_has_a_smaller_error(variance, bias, public):
    """E|λ g_B + (1-λ) g_Z - ∇f|² = λ² (|b|² + τ²) + (1-λ)² dσ²."""

    def error(weight):
        return weight**2 * (bias + public) + (1 - weight) ** 2 * variance

    best = optimal_weight(variance, bias, public)
    assert all(error(best) <= error(weight / 100) for weight in range(101))


def rectified_weight(private, public, seed_group=0, **changes):
    config = ArmConfig(rectification=Rectification.OPTIMAL, **changes)
    span = orthonormalise([public], len(public))
    return paper_step(config, span, private, config.queries, public=public, groups=(seed_group,)).observed["weight"]


def test_an_exact_public_gradient_gets_nearly_all_weight_when_the_estimate_is_noisy():
    """With α = 0.99 and n = 2000 an estimate's variance is about |∇f|² / Λ / P = 95 |∇f|² / P; |b|² is measured to about √(2/P) |∇f|²,
    so that the weight is 1 - √(2P)/95 up to a few of those errors: above 1 - 4 · 0.047 for P = 10."""
    private = gradient(2000)
    weights = [rectified_weight(private, private, group, blend=0.99, queries=10) for group in range(10)]
    assert min(weights) > 1 - 4 * math.sqrt(20) / 95
    assert max(weights) <= 1


def test_a_public_gradient_that_points_elsewhere_gets_less_weight():
    private, other = gradient(2000), gradient(2000, 1)
    for group in range(10):
        right = rectified_weight(private, private, group, blend=0.99, queries=10)
        elsewhere = rectified_weight(private, other, group, blend=0.99, queries=10)
        opposite = rectified_weight(private, -private, group, blend=0.99, queries=10)
        assert opposite < right
        assert elsewhere < right


@pytest.mark.parametrize("cosine", [0.8, 0.6, 0.3])
def test_the_plugged_in_weight_is_the_best_one_for_a_known_gradient(cosine):
    """What eq. (4) asks for: dσ² = (E|g(v) v|²/Λ² - |E g_Z|²) / P, where E g_Z is ∇f along the guide and only β²α/n/Λ of it elsewhere."""
    size, count, blend = 400, 1000, 0.5
    private = gradient(size).astype(np.float64)
    private /= np.linalg.norm(private)
    other = gradient(size, 1) - (gradient(size, 1) @ private) * private
    public = (cosine * private + math.sqrt(1 - cosine**2) * other / np.linalg.norm(other)).astype(np.float32)
    isotropic, guide = blend_weights(1, size, blend, 1.0)
    largest = isotropic**2 + guide**2
    mean_square = isotropic**2 + guide**2 * cosine**2  # E g(v)², |v|² = β² = 1 up to 1/√n
    mean_norm = cosine**2 + (isotropic**2 / largest) ** 2 * (1 - cosine**2)
    expected = optimal_weight((mean_square / largest**2 - mean_norm) / count, float(np.sum((public - private) ** 2)), 0.0)
    config = ArmConfig(rectification=Rectification.OPTIMAL, blend=blend, queries=count)
    found = paper_step(config, orthonormalise([public], size), private.astype(np.float32), count, public=public).observed["weight"]
    # g(v)² and |∇f|² are known to √(2/P) = 4.5 %, and |v|² to 1/√n = 5 %: together a third, with a margin of three.
    assert found == pytest.approx(expected, rel=1 / 3)


def test_rectification_mixes_the_public_gradient_into_the_whole_estimate():
    size = 40
    private = gradient(size)
    public = private + gradient(size, 1)
    span = orthonormalise([public], size)
    plain = paper_step(ArmConfig(blend=0.9), span, private, 5, public=public)
    mixed = paper_step(ArmConfig(blend=0.9, rectification=Rectification.OPTIMAL), span, private, 5, public=public)
    weight = mixed.observed["weight"]
    assert 0 < weight < 1
    expected = weight * projection(span, public) + (1 - weight) * step(plain, span)
    assert np.abs(step(mixed, span) - expected).max() < 20 * UNIT * (np.abs(step(plain, span)).max() + np.abs(public).max())
    assert plain.observed["weight"] == 0


def test_papers_probes_move_the_model_as_far_as_a_column_probe():
    config = ArmConfig(column_scale=0.02, blend_scale=4.0, blend=0.25, queries=7)
    probes = PaperArm().probes(config, 1)
    assert (probes.num_random, probes.measures_columns, probes.grouping) == (7, False, Grouping.DEVICE)
    assert probes.random_scale * probes.blend_scale == config.column_scale
    assert (probes.blend, probes.blend_scale) == (0.25, 4.0)


# The baselines


def test_mezo_weighs_every_devices_estimate_by_its_examples():
    size, nothing = 10, np.zeros((0, 10), np.float32)
    reports = measured(nothing, gradient(size), groups=(1, 4), num_random=2, weights=[3, 1])
    found = PlainZerothOrder(Grouping.DEVICE).combine(ArmConfig(), plan(), nothing, np.zeros(0, np.float32), reports)
    for term, group, share in zip(found.random_terms, reports.random_slopes, (3 / 4, 1 / 4), strict=True):
        assert term.group == group.group
        assert np.array_equal(term.coefficients, group.slopes * np.float32(share / 2))
    expected = sum(
        share / 2 * slope * z.astype(np.float64)
        for group, share in zip(reports.random_slopes, (3 / 4, 1 / 4), strict=True)
        for slope, z in zip(group.slopes, gaussians(group.group, 2, size), strict=True)
    )
    assert (
        np.abs(step(found, nothing) - expected).max()
        < 8 * UNIT * 4.33 * np.abs(np.concatenate([g.slopes for g in reports.random_slopes])).sum()
    )


def test_decomfl_over_two_edges_is_one_group_with_the_mean_of_all_devices():
    """Devices of both edges probe the same directions: two terms with the same group would count them twice."""
    decomfl = arm(ArmName.DECOMFL)
    asked = plan(decomfl.probes(ArmConfig(queries=2, residual_queries=0), 0))
    nothing = np.zeros(0, np.float32)
    slopes = {0: [1, 2], 1: [3, -2], 2: [5, 0], 3: [-1, 4]}
    examples = {0: 1, 1: 2, 2: 3, 3: 2}
    reports = {
        device_id: DeviceReport(
            device_id=device_id,
            round_index=0,
            model_version=0,
            guide_version=-1,
            num_examples=examples[device_id],
            outcome=Outcome.OK,
            column_slopes=nothing,
            random_slopes=np.array(values, np.float32),
            estimate=None,
            forward_passes=4,
        )
        for device_id, values in slopes.items()
    }
    folded = [Edge(1, [1, 3]).fold(asked, [reports[1], reports[3]]), Edge(0, [0, 2]).fold(asked, [reports[0], reports[2]])]
    found = decomfl.combine(
        ArmConfig(queries=2, residual_queries=0), asked, np.zeros((0, 5), np.float32), nothing, state._measured(folded, 0)
    )
    (term,) = found.random_terms
    assert term.group == 0
    mean = [sum(examples[i] * slopes[i][j] for i in slopes) / 8 for j in (0, 1)]
    # Each edge's mean, the mean of both and the product with 1/P are rounded once, at the size of a slope.
    assert np.abs(term.coefficients - np.array(mean) / 2).max() <= 4 * UNIT * 5 / 2


def test_equal_seeds_make_shared_directions_and_own_seeds_do_not():
    assert arm(ArmName.MEZO_FL).probes(ArmConfig(), 0).grouping is Grouping.DEVICE
    assert arm(ArmName.DECOMFL).probes(ArmConfig(), 0).grouping is Grouping.SHARED


def test_cloud_only_asks_no_device():
    assert CloudOnly().probes(ArmConfig(), 1) is None
    assert CloudOnly().local_training(ArmConfig()) is None


def test_federated_averaging_hands_on_the_mean_change():
    change = gradient(9)
    reports = replace(measured(np.zeros((0, 9), np.float32), change), estimate=change)
    found = FederatedAveraging().combine(ArmConfig(), plan(), np.zeros((0, 9), np.float32), np.zeros(0, np.float32), reports)
    assert np.array_equal(step(found, np.zeros((0, 9), np.float32)), change)
    task = FederatedAveraging().local_training(ArmConfig(local_steps=3, local_learning_rate=0.2))
    assert (task.num_steps, task.learning_rate) == (3, 0.2)


@pytest.mark.parametrize("name", [ArmName.PAPER, ArmName.MEZO_FL, ArmName.DECOMFL])
def test_every_zeroth_order_arm_spends_the_same_queries(name):
    probes = arm(name).probes(ArmConfig(queries=6), 1)
    assert isinstance(probes, Probes)
    assert probes.num_random + (1 if probes.measures_columns else 0) == 6


@pytest.mark.parametrize("name", list(ArmName))
def test_every_method_has_a_name_and_says_what_the_cloud_computes(name):
    assert isinstance(arm(name).guide, GuideSource)
