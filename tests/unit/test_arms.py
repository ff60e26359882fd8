"""Every method on a linear loss with a known gradient: the step it makes of slopes that are exactly right.

Run: pytest tests/unit/test_arms.py
"""

import math
from dataclasses import is_dataclass, replace

import numpy as np
import pytest
import sample_messages

from cooperllm.algorithm import noise, replay
from cooperllm.algorithm.arms import Measured, Public
from cooperllm.algorithm.baselines import CloudOnly, FederatedAveraging, PlainZerothOrder, arm
from cooperllm.algorithm.compression import packed_bytes
from cooperllm.algorithm.fwdllm import largest_square, relative_variance
from cooperllm.algorithm.guidance import blend_weights, guided_perturbations, inside, orthonormalise, random_directions, signs
from cooperllm.algorithm.measured import MeasuredArm, regression_slope, shrinkage
from cooperllm.algorithm.noise import probe_indices
from cooperllm.algorithm.paper import PaperArm, optimal_weight
from cooperllm.cloud import state
from cooperllm.config import ArmConfig, ArmName, OptimizerConfig, Rectification
from cooperllm.edge import Edge
from cooperllm.messages import Grouping, Probes, RandomSlopes, StepKind

SEED = 41
UNIT = 2.0**-24
"""Largest relative error of one float32 operation."""

NOTHING = np.zeros(0, np.float32)


def gradient(size, index=0):
    return noise.gaussian(100, index, size)


def rows_of(family, count, size):
    return orthonormalise([noise.gaussian(family, index, size) for index in range(count)], size)


def span_of(num_columns, size):
    return rows_of(200, num_columns, size)


def basis_of(num_rows, size):
    """At no right angle to the span: a real basis holds the public gradient, too."""
    return rows_of(300, num_rows, size)


def plan(probes=None):
    return sample_messages.plan(seed=SEED, probes=probes)


def along(directions, private):
    """Slopes of a linear loss, rounded once as a device rounds them."""
    found = [float(direction.astype(np.float64) @ private.astype(np.float64)) for direction in directions]
    return np.array(found, np.float32)


def public_of(span, public=None, basis=None):
    """The cloud's side: directions, and what its own gradient says of the columns."""
    predicted = np.zeros(len(span), np.float32) if public is None else along(span, public)
    return Public(span=span, basis=[] if basis is None else list(basis), predicted=predicted)


def gaussians(group, count, size):
    return [noise.gaussian(SEED, index, size) for index in probe_indices(group, count)]


def mixed_from(basis):
    """Random probes V r / √K, written out."""

    def directions(group, count, size):
        mixtures = [signs(SEED, group, position, len(basis)).astype(np.float64) @ basis for position in range(count)]
        return [(mixture / math.sqrt(len(basis))).astype(np.float32) for mixture in mixtures]

    return directions


def probes_from(basis):
    return mixed_from(basis) if len(basis) else gaussians


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
        agreement=NOTHING,
        energy=NOTHING,
    )


def step(found, span):
    """The direction that replicas rebuild from coordinates; a step in full needs no span."""
    replica = replay.start(np.zeros(span.shape[1], np.float32), OptimizerConfig())
    update = sample_messages.update(seed=SEED, column_coefficients=found.columns, random_terms=found.random_terms, dense=found.dense)
    return replay.direction(replica, update, span if len(found.columns) else span[:0]).astype(np.float64)


def projection(span, vector):
    wide = span.astype(np.float64)
    return wide.T @ (wide @ vector.astype(np.float64))


# The default arm


def combined(config, public, reports):
    """A round of the default arm, its step sent without loss but for the rounding of a quotient and a product."""
    num_random = len(reports.random_slopes[0].slopes) if reports.random_slopes else 0
    num_columns = len(public.span)
    config = replace(config, name=ArmName.MEASURED, estimate_bits=32, step_bits=32, queries=max(1, num_columns + num_random))
    probes = MeasuredArm().probes(config, num_columns, len(public.basis))
    return MeasuredArm().combine(config, plan(probes), public, reports)


@pytest.mark.parametrize("size", [1, 5, 40])
def test_a_full_span_measured_on_devices_gives_their_gradient_exactly(size):
    private, span = gradient(size), span_of(size, size)
    found = combined(ArmConfig(public_weight=0.0), public_of(span, gradient(size, 1)), measured(span, private))
    # Rows are off right angles by 2(k+4) units each, and k products and sums are rounded once.
    assert np.abs(step(found, span) - private).max() < 4 * (size + 4) * UNIT * np.linalg.norm(private) * math.sqrt(size)


@pytest.mark.parametrize("num_probes", [1, 3])
def test_columns_and_a_basis_row_that_span_everything_give_the_gradient_up_to_the_shrinkage(num_probes):
    """With K = 1 a probe is ± the row itself: nothing of what it saw is left to chance."""
    size = 12
    rows, private = span_of(size, size), gradient(size)
    span, basis = rows[:-1], rows[-1:]
    reports = measured(span, private, groups=(2,), num_random=num_probes, directions=mixed_from(basis))
    found = step(combined(ArmConfig(public_weight=0.0), public_of(span, basis=basis), reports), span)
    expected = projection(span, private) + num_probes / (num_probes + 1) * projection(basis, private)
    assert np.abs(found - expected).max() < 4 * (size + 4) * UNIT * np.linalg.norm(private) * math.sqrt(size)


def test_columns_and_a_basis_that_span_everything_give_the_gradient_on_average():
    """K E[z zᵀ] is the projector onto the basis: with the factor left out the step would be K times too short."""
    size, num_columns, count = 10, 4, 3000
    rows, private = span_of(size, size), gradient(size)
    span, basis = rows[:num_columns], rows[num_columns:]
    num_rows = len(basis)
    reports = measured(span, private, groups=(0,), num_random=count, directions=mixed_from(basis))
    found = basis.astype(np.float64) @ step(combined(ArmConfig(public_weight=0.0), public_of(span, basis=basis), reports), span)
    truth = basis.astype(np.float64) @ private
    # Row i of the mean of K z zᵀ adds Σ_(j≠i) g_j times a mean of P signs, of standard deviation 1/√P.
    error = np.sqrt((truth @ truth - truth**2) / count)
    assert (np.abs(found - count / (count + num_rows) * truth) < 5 * error).all()


@pytest.mark.parametrize("num_columns", [3, 20])
def test_devices_without_weight_leave_the_clouds_own_step(num_columns):
    """With λ = 1 the columns' part is the public gradient on the span, all of it when the span is full: cloud SGD."""
    size = 20
    private, span = gradient(size), span_of(num_columns, size)
    public, config = public_of(span, gradient(size, 1)), ArmConfig(public_weight=1.0)
    found = step(combined(config, public, measured(span, private)), span)
    cloud = CloudOnly().combine(config, plan(), public, measured(span, private))
    assert np.array_equal(cloud.columns, public.predicted)
    tolerance = 4 * (size + 4) * UNIT * np.linalg.norm(gradient(size, 1)) * math.sqrt(size)
    assert np.abs(found - step(cloud, span)).max() < tolerance
    expected = gradient(size, 1) if num_columns == size else projection(span, gradient(size, 1))
    assert np.abs(found - expected).max() < tolerance


def test_public_weight_mixes_predicted_and_measured_slopes():
    """The largest entry of the step is 8, a power of two, so that packing rounds nothing."""
    span = np.eye(2, 6, dtype=np.float32)
    public = Public(span=span, basis=[], predicted=np.array([-16, 4], np.float32))
    found = combined(ArmConfig(public_weight=0.25), public, measured(span, np.array([16, -4, 0, 0, 0, 0], np.float32)))
    assert step(found, span).tolist() == [0.75 * 16 - 0.25 * 16, 0.75 * -4 + 0.25 * 4, 0, 0, 0, 0]
    assert found.observed["weight"] == 0.25


@pytest.mark.parametrize("weights", [[4, 4], [1, 7]])
def test_with_the_guide_switched_off_the_default_arm_is_plain_two_point_zeroth_order(weights):
    """Without columns, without a basis and without shrinkage; the rank r only adds the factor P/(P+r)."""
    size, nowhere = 30, np.zeros((0, 30), np.float32)
    reports = measured(nowhere, gradient(size), groups=(2, 5), num_random=4, weights=weights)
    mezo = PlainZerothOrder(Grouping.DEVICE).combine(ArmConfig(), plan(), public_of(nowhere), reports)
    # Eight terms, each rounded a few times at its own size here and there, and packed with two roundings.
    largest = sum(np.abs(term.coefficients).sum() for term in mezo.random_terms) * 4.33
    for rank, factor in ((0.0, 1), (24.0, 8 / (8 + 24))):
        ours = step(combined(ArmConfig(effective_rank=rank), public_of(nowhere), reports), nowhere)
        assert np.abs(ours - factor * step(mezo, nowhere)).max() < 12 * UNIT * largest


def test_without_columns_and_basis_devices_probe_as_in_plain_zeroth_order():
    config = ArmConfig(queries=7, random_scale=2e-3)
    ours, mezo = MeasuredArm().probes(config, 0, 0), PlainZerothOrder(Grouping.DEVICE).probes(config, 0, 0)
    assert replace(ours, measures_columns=False) == mezo
    assert mezo.num_random == config.queries


@pytest.mark.parametrize("num_rows", [0, 8])
def test_random_probes_never_change_the_step_inside_the_span(num_rows):
    """Whatever they saw, U d stays (1-λ) c + λ p."""
    size = 50
    span, basis, private = span_of(6, size), basis_of(num_rows, size), gradient(size)
    public = public_of(span, gradient(size, 1), basis)
    reports = measured(span, private, groups=(0, 3), num_random=3, directions=probes_from(basis))
    found = step(combined(ArmConfig(public_weight=0.25, effective_rank=0.0), public, reports), span)
    expected = 0.75 * reports.column_slopes.astype(np.float64) + 0.25 * public.predicted
    # Six random terms and six columns are rounded at their own size, below 2 |∇f| √n for these few probes; U d adds √n of them.
    tolerance = 12 * 3 * UNIT * 2 * np.linalg.norm(private) * math.sqrt(size)
    assert np.abs(span.astype(np.float64) @ found - expected).max() < tolerance
    assert np.abs(found - projection(span, found)).max() > 100 * tolerance


@pytest.mark.parametrize("num_rows", [0, 18])
@pytest.mark.parametrize("weights", [[4, 4], [1, 7]])
def test_default_step_is_equation_three_written_out(weights, num_rows):
    """Equations (3) and (4) without a prior; the probes lie in K rows of a basis, or in all n dimensions with an effective rank."""
    size, count = 40, 3
    span, basis, private = span_of(4, size), basis_of(num_rows, size), gradient(size)
    public = public_of(span, gradient(size, 1), basis)
    reports = measured(span, private, groups=(1, 6), num_random=count, weights=weights, directions=probes_from(basis))
    found = step(combined(ArmConfig(public_weight=0.5, effective_rank=30.0), public, reports), span)

    wide, slopes = span.astype(np.float64), reports.column_slopes.astype(np.float64)
    expected = wide.T @ (0.5 * slopes + 0.5 * public.predicted)
    weight = 18 * 6 / (6 + 18) if num_rows else 6 / (6 + 30)
    for group in reports.random_slopes:
        for slope, z in zip(group.slopes, probes_from(basis)(group.group, count, size), strict=True):
            rest = slope - slopes @ (wide @ z)
            outside = z - wide.T @ (wide @ z)
            expected += weight * group.num_examples / sum(weights) / count * rest * outside
    # Six terms: isotropic ones below 2 |∇f| √n with a weight below 1, mixed ones below |∇f| with a weight below 5.
    assert np.abs(found - expected).max() < 10 * 3 * UNIT * 2 * np.linalg.norm(private) * math.sqrt(size)


@pytest.mark.parametrize("num_rows", [0, 4])
def test_probes_that_see_nothing_outside_the_span_add_nothing(num_rows):
    size = 30
    span, basis = span_of(3, size), basis_of(num_rows, size)
    private = (span.T @ np.array([1, -2, 3], np.float32)).astype(np.float32)
    reports = measured(span, private, groups=(0,), num_random=5, directions=probes_from(basis))
    found = combined(ArmConfig(public_weight=0.0, effective_rank=0.0), public_of(span, private, basis), reports)
    # Each probe's slope, of size |∇f| |z| <= |∇f| 2√n, is rounded once, and so are three column slopes; its remainder is then weighted
    # with 1/5 and multiplied with |z| (in a basis with 4/9, and |z| = 1). Columns are rounded as in the test of a full span.
    rest = 4 * 2 * UNIT * np.linalg.norm(private) * 2 * math.sqrt(size)
    assert np.abs(step(found, span) - private).max() < rest * 2 * math.sqrt(size)
    # Energies are squares: what rounding leaves outside is a share of (8 UNIT √n)² of the whole, counted once or K = 4 times.
    assert found.observed["span_energy"] == pytest.approx(1, abs=4 * (16 * UNIT) ** 2 * size)
    assert found.observed["rho"] == pytest.approx(1, rel=2**-40)


def test_span_energy_is_the_share_of_the_gradient_that_columns_saw():
    """With K = 1 and the row at right angles to the span a probe sees exactly what the columns left of span and basis."""
    rows = np.eye(3, 6, dtype=np.float32)
    reports = measured(rows[:2], np.array([1, 2, 4, 0, 0, 0], np.float32), groups=(0,), num_random=2, directions=mixed_from(rows[2:]))
    found = combined(ArmConfig(), public_of(rows[:2], basis=rows[2:]), reports)
    assert found.observed["span_energy"] == pytest.approx((1 + 4) / (1 + 4 + 16), rel=2**-40)


def test_isotropic_probes_see_the_squared_length_of_what_lies_outside_the_span():
    size, count = 12, 2000
    span, private = span_of(2, size), gradient(size)
    reports = measured(span, private, groups=(0,), num_random=count)
    found = combined(ArmConfig(), public_of(span), reports)
    energy = float(np.linalg.norm(span.astype(np.float64) @ private) ** 2)
    total = float(np.linalg.norm(private.astype(np.float64)) ** 2)
    # (z·g)² has mean |g|² and variance 2 |g|⁴: the mean of P has a relative standard error of √(2/P), the quotient no more than that.
    assert found.observed["span_energy"] == pytest.approx(energy / total, rel=5 * math.sqrt(2 / count))


def test_measured_arm_spends_one_query_per_column_and_the_rest_at_random():
    arm_, config = MeasuredArm(), ArmConfig(queries=5)
    assert [arm_.probes(config, columns, 9).num_random for columns in (0, 1, 4, 5, 6)] == [5, 4, 1, 0, 0]
    assert arm_.probes(config, 3, 9).measures_columns


def test_probes_from_a_basis_move_the_model_as_far_as_a_column_probe():
    """They have the length of a column, 1; isotropic ones have √n and a scale of their own."""
    config = ArmConfig(column_scale=0.02, random_scale=1e-4)
    mixed, isotropic = (MeasuredArm().probes(config, 2, num_rows) for num_rows in (6, 0))
    assert (mixed.column_scale, mixed.random_scale, mixed.blend, mixed.blend_scale) == (0.02, 0.02, 0.0, 1.0)
    assert (isotropic.column_scale, isotropic.random_scale, isotropic.blend) == (0.02, 1e-4, None)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 32])
def test_the_default_step_is_sent_with_the_bits_of_its_setting(bits):
    size = 700
    span = span_of(2, size)
    reports = measured(span, gradient(size))
    config = ArmConfig(step_bits=bits)
    found = MeasuredArm().combine(config, plan(MeasuredArm().probes(config, 2, 0)), public_of(span), reports)
    assert len(found.dense) == packed_bytes(1, size, bits)
    assert len(found.columns) == len(found.random_terms) == 0


@pytest.mark.parametrize(
    ("num_probes", "dimension", "expected"), [(0, 0.0, 0), (0, 5, 0), (3, 0.0, 1), (3, 1, 0.75), (1, 3.0, 0.25), (64, 64, 0.5)]
)
def test_shrinkage_limits(num_probes, dimension, expected):
    assert shrinkage(num_probes, dimension) == expected


@pytest.mark.parametrize(("num_rows", "expected"), [(0, 6 / (6 + 30)), (18, 6 / (6 + 18))])
def test_shrinkage_counts_the_probes_of_all_groups_against_the_dimensions_they_lie_in(num_rows, expected):
    size = 40
    span, basis = span_of(4, size), basis_of(num_rows, size)
    reports = measured(span, gradient(size), groups=(1, 6), num_random=3, directions=probes_from(basis))
    assert combined(ArmConfig(effective_rank=30.0), public_of(span, basis=basis), reports).observed["shrinkage"] == expected


def test_no_multiple_of_the_estimate_in_a_basis_has_a_smaller_error_than_the_shrunk_one():
    """E|w ĝ - g|² over the signs: measured on many rounds of P probes, its minimum lies at P/(P+K-1), of which P/(P+K) is within 2 %."""
    num_rows, num_probes, rounds = 16, 4, 4000
    truth = gradient(num_rows).astype(np.float64)
    drawn = noise.rademacher(SEED, 0, rounds * num_probes * num_rows).reshape(rounds, num_probes, num_rows).astype(np.float64)
    estimates = (drawn @ truth)[..., None] * drawn
    estimates = estimates.mean(axis=1)  # K z (z·g) with z = r / √K
    best = float((estimates @ truth).mean() / (estimates**2).sum(axis=1).mean())
    # |ĝ|² is |g|² (K + P - 1) / P on average. Both means have relative standard errors below √(2 · 16 / 4000) / 4.
    assert best == pytest.approx(num_probes / (num_probes + num_rows - 1), rel=5 * math.sqrt(2 * 16 / rounds) / 4)
    assert shrinkage(num_probes, num_rows) == pytest.approx(best, rel=5 * math.sqrt(2 * 16 / rounds) / 4 + 1 / num_rows)


def test_inside_gives_the_coordinates_along_the_columns():
    span, vector = span_of(3, 20), gradient(20)
    # Exact products, one rounding.
    assert np.allclose(inside(span, vector), span.astype(np.float64) @ vector, rtol=2 * UNIT, atol=UNIT)
    assert inside(span[:0], vector).shape == (0,)


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
    return PaperArm().combine(config, plan(), public_of(span, private if public is None else public), reports)


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
    config = ArmConfig(name=ArmName.PAPER, rectification=Rectification.OPTIMAL, blend=blend, queries=count)
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
    probes = PaperArm().probes(config, 1, 0)
    assert (probes.num_random, probes.measures_columns, probes.grouping) == (7, False, Grouping.DEVICE)
    assert probes.random_scale * probes.blend_scale == config.column_scale
    assert (probes.blend, probes.blend_scale) == (0.25, 4.0)


# The baselines


def test_mezo_weighs_every_devices_estimate_by_its_examples():
    size, nowhere = 10, np.zeros((0, 10), np.float32)
    reports = measured(nowhere, gradient(size), groups=(1, 4), num_random=2, weights=[3, 1])
    found = PlainZerothOrder(Grouping.DEVICE).combine(ArmConfig(), plan(), public_of(nowhere), reports)
    for term, group, share in zip(found.random_terms, reports.random_slopes, (3 / 4, 1 / 4), strict=True):
        assert term.group == group.group
        assert np.array_equal(term.coefficients, group.slopes * np.float32(share / 2))
    expected = sum(
        share / 2 * slope * z.astype(np.float64)
        for group, share in zip(reports.random_slopes, (3 / 4, 1 / 4), strict=True)
        for slope, z in zip(group.slopes, gaussians(group.group, 2, size), strict=True)
    )
    largest = np.abs(np.concatenate([group.slopes for group in reports.random_slopes])).sum()
    assert np.abs(step(found, nowhere) - expected).max() < 8 * UNIT * 4.33 * largest


def test_decomfl_over_two_edges_is_one_group_with_the_mean_of_all_devices():
    """Devices of both edges probe the same directions: two terms with the same group would count them twice."""
    decomfl, config = arm(ArmName.DECOMFL), ArmConfig(name=ArmName.DECOMFL, queries=2)
    asked = plan(decomfl.probes(config, 0, 0))
    slopes = {0: [1, 2], 1: [3, -2], 2: [5, 0], 3: [-1, 4]}
    examples = {0: 1, 1: 2, 2: 3, 3: 2}
    reports = {
        device_id: sample_messages.device_report(
            device_id, asked, num_examples=examples[device_id], random_slopes=np.array(values, np.float32)
        )
        for device_id, values in slopes.items()
    }
    folded = [Edge(1, [1, 3], 5).fold(asked, [reports[1], reports[3]]), Edge(0, [0, 2], 5).fold(asked, [reports[0], reports[2]])]
    found = decomfl.combine(config, asked, public_of(np.zeros((0, 5), np.float32)), state._measured(folded, 0, 5))
    (term,) = found.random_terms
    assert term.group == 0
    mean = [sum(examples[i] * slopes[i][j] for i in slopes) / 8 for j in (0, 1)]
    # Each edge's mean, the mean of both and the product with 1/P are rounded once, at the size of a slope.
    assert np.abs(term.coefficients - np.array(mean) / 2).max() <= 4 * UNIT * 5 / 2


def test_equal_seeds_make_shared_directions_and_own_seeds_do_not():
    assert arm(ArmName.MEZO_FL).probes(ArmConfig(), 0, 0).grouping is Grouping.DEVICE
    assert arm(ArmName.DECOMFL).probes(ArmConfig(), 0, 0).grouping is Grouping.SHARED


def test_cloud_only_asks_no_device():
    assert CloudOnly().probes(ArmConfig(), 1, 0) is None
    assert CloudOnly().local_training(ArmConfig()) is None
    assert CloudOnly().feedback(ArmConfig(), 3, [(0, 1)]) is None


def test_federated_averaging_hands_on_the_mean_change():
    change, nowhere = gradient(9), np.zeros((0, 9), np.float32)
    reports = replace(measured(nowhere, change), estimate=change)
    found = FederatedAveraging().combine(ArmConfig(), plan(), public_of(nowhere), reports)
    # A quotient and a product with the largest entry, one rounding each; with a power of two neither rounds.
    assert (np.abs(step(found, nowhere) - change) <= 2 * UNIT * (1 + 2 * UNIT) * np.abs(change)).all()
    change[0] = 8
    exact = FederatedAveraging().combine(ArmConfig(), plan(), public_of(nowhere), replace(reports, estimate=change))
    assert np.array_equal(step(exact, nowhere), change)
    task = FederatedAveraging().local_training(ArmConfig(local_steps=3, local_learning_rate=0.2))
    assert (task.num_steps, task.learning_rate) == (3, 0.2)


# FedKSeed

POOL = {"pool_seed": 77, "pool_size": 1 << 32}


def fedkseed_step(private, count, groups=(0,), weights=None, **pool):
    """A round of the arm on exact slopes, and the step that replicas make of it."""
    method, size = arm(ArmName.FEDKSEED), len(private)
    asked = plan(replace(method.probes(ArmConfig(name=ArmName.FEDKSEED, queries=count), 0, 0), **POOL | pool))

    def members(group, _count, _size):
        return list(random_directions(SEED, group, asked.probes, [], size))

    nowhere = np.zeros((0, size), np.float32)
    reports = measured(nowhere, private, groups, count, weights, directions=members)
    return step(method.combine(ArmConfig(), asked, public_of(nowhere), reports), nowhere), members


def test_fedkseeds_step_is_the_weighted_mean_of_slopes_along_members_of_the_pool():
    private = gradient(20)
    found, members = fedkseed_step(private, 3, groups=(1, 6), weights=[1, 3], pool_size=5)
    pool = [noise.gaussian(77, member, 20) for member in range(5)]
    expected = np.zeros(20)
    for group, share in ((1, 1 / 4), (6, 3 / 4)):
        for z in members(group, 3, 20):
            assert any(np.array_equal(z, member) for member in pool)
            expected += share / 3 * (z.astype(np.float64) @ private) * z
    # Six slopes of size |∇f| |z| and six directions with entries below 4.33 are rounded a few times each.
    assert np.abs(found - expected).max() < 6 * 6 * UNIT * 4.33 * np.linalg.norm(private) * 3 * math.sqrt(20)


def test_fedkseed_is_unbiased_over_a_pool_that_is_never_exhausted():
    size, count = 6, 3000
    private = gradient(size).astype(np.float64)
    found, _ = fedkseed_step(gradient(size), count)
    # One estimate (z·∇f) z has variance |∇f|² + ∇f_i² in coordinate i.
    assert (np.abs(found - private) < 5 * np.sqrt((private @ private + private**2) / count)).all()


def test_fedkseed_with_two_seeds_never_leaves_the_plane_of_two_directions():
    """What a finite pool costs, and what the docstring says of it: E[d] is (1/K) Σ z zᵀ ∇f."""
    size, count = 12, 4000
    private, pool = (
        gradient(size).astype(np.float64),
        np.stack([noise.gaussian(77, member, size) for member in range(2)]).astype(np.float64),
    )
    found, _ = fedkseed_step(gradient(size), count, pool_size=2)
    expected = pool.T @ (pool @ private) / 2
    # Both members are drawn N(P/2, P/4) times: their shares are off by 1/√(4P).
    assert np.linalg.norm(found - expected) < 5 / math.sqrt(4 * count) * np.linalg.norm((pool @ private)[:, None] * pool, axis=1).sum()
    assert np.linalg.matrix_rank(np.stack([*pool, found]), tol=1e-4 * np.linalg.norm(found)) == 2


# FwdLLM

MOMENTUM = orthonormalise([noise.gaussian(400, 0, 6)], 6)
NEVER_WAITS = ArmConfig(name=ArmName.FWDLLM, most_held_rounds=0)


def fwdllm_round(config, span, reports_of, groups, held=(), seed=SEED):
    """A round of the arm; `reports_of` gives the slope of a device along a direction."""
    method, size = arm(ArmName.FWDLLM), span.shape[1]
    asked = replace(plan(method.probes(config, 1, 0)), seed=seed)
    found = {group: list(random_directions(seed, group, asked.probes, list(span), size)) for group in groups}
    slopes = {group: np.array([reports_of(group, z) for z in found[group]], np.float32) for group in groups}
    random = tuple(RandomSlopes(group=group, num_examples=4, slopes=values) for group, values in slopes.items())
    reports = replace(measured(span[:0], np.zeros(size, np.float32)), num_devices=len(groups), random_slopes=random, held=held)
    return method.combine(config, asked, public_of(span), reports), found, slopes


def on_a_linear_loss(private):
    return lambda _group, z: float(z.astype(np.float64) @ private.astype(np.float64))


@pytest.mark.parametrize("candidates", [2, 10])
def test_fwdllm_probes_of_all_candidates_the_one_along_the_last_step(candidates):
    config = replace(NEVER_WAITS, candidates=candidates, queries=3)
    _, found, _ = fwdllm_round(config, MOMENTUM, on_a_linear_loss(gradient(6)), groups=(4,))
    made = np.stack(gaussians(4, 3 * candidates, 6)).reshape(3, candidates, 6)
    for query, direction in enumerate(found[4]):
        overlaps = np.abs(made[query].astype(np.float64) @ MOMENTUM[0])
        assert np.array_equal(direction, made[query][overlaps.argmax()])


def test_fwdllms_choice_among_candidates_does_not_bias_its_step():
    """Uncorrected it would be κ = 3.8 times too long along the last step."""
    size, count, config = 6, 3000, replace(NEVER_WAITS, queries=3000)
    private = gradient(size).astype(np.float64)
    coordinates, found, slopes = fwdllm_round(config, MOMENTUM, on_a_linear_loss(gradient(size)), groups=(0,))
    estimates = np.stack(found[0]).astype(np.float64) * slopes[0].astype(np.float64)[:, None]
    along = MOMENTUM[0].astype(np.float64)
    corrected = estimates - (1 - 1 / largest_square(10)) * (estimates @ along)[:, None] * along
    # The spread of single estimates, measured on the same draws, gives the mean's standard error.
    error = corrected.std(axis=0) / math.sqrt(count)
    found_step = step(coordinates, MOMENTUM)
    assert (np.abs(found_step - private) < 5 * error).all()
    wrong = (largest_square(10) - 1) * abs(private @ along)
    assert wrong > 5 * abs(corrected @ along).std() / math.sqrt(count), "the test could not see the bias"
    assert abs(found_step @ along - private @ along) < wrong / 4


@pytest.mark.parametrize(("count", "expected"), [(1, 1.0), (2, 1 + 2 / math.pi)])
def test_the_largest_of_two_squares_is_known_in_closed_form(count, expected):
    """E max(x², y²) = 1 + E|x² - y²|/2 = 1 + 2/π. The trapezoids' error is of order 10⁻⁸."""
    assert largest_square(count) == pytest.approx(expected, abs=1e-7)


def test_fwdllm_before_its_first_step_is_mezo():
    nowhere, config = np.zeros((0, 6), np.float32), ArmConfig(name=ArmName.FWDLLM, queries=3)
    coordinates, _, _ = fwdllm_round(config, nowhere, on_a_linear_loss(gradient(6)), groups=(1, 5))
    reports = measured(nowhere, gradient(6), groups=(1, 5), num_random=3)
    mezo = PlainZerothOrder(Grouping.DEVICE).combine(config, plan(), public_of(nowhere), reports)
    assert np.array_equal(step(coordinates, nowhere), step(mezo, nowhere))
    assert coordinates.kind is StepKind.STEP


def disagreeing(group, z):
    """Devices with opposite gradients along the last step: their mean there is nothing."""
    return float(z.astype(np.float64) @ MOMENTUM[0]) * (1 if group % 2 else -1)


def test_fwdllm_waits_while_devices_disagree_and_steps_when_they_agree():
    held, _, _ = fwdllm_round(ArmConfig(), MOMENTUM, disagreeing, groups=(0, 1, 2, 3))
    stepped, _, _ = fwdllm_round(ArmConfig(), MOMENTUM, on_a_linear_loss(MOMENTUM[0]), groups=(0, 1, 2, 3))
    assert (held.kind, stepped.kind) == (StepKind.HOLD, StepKind.STEP)
    assert held.observed["relative_variance"] > ArmConfig().variance_threshold >= stepped.observed["relative_variance"]
    assert len(held.columns) == 0, "a held round needs no guide in the log"


def test_fwdllm_waits_no_longer_than_it_may():
    rounds = []
    for seed in range(4):
        found, _, _ = fwdllm_round(
            ArmConfig(variance_threshold=1e-9, most_held_rounds=3), MOMENTUM, disagreeing, (0, 1), tuple(rounds), seed
        )
        rounds.append(found.random_terms)
        assert found.kind is (StepKind.STEP if seed == 3 else StepKind.HOLD)
    assert len(found.random_terms) == 4 * 2


def test_the_step_after_a_wait_is_the_mean_of_all_its_rounds():
    """The sum would be twice as long; a step that forgot the held round would be that of its own round."""
    private = on_a_linear_loss(gradient(6))
    waits, steps = ArmConfig(variance_threshold=1e-9), NEVER_WAITS
    held, _, _ = fwdllm_round(waits, MOMENTUM, private, (0, 1), seed=3)
    assert held.kind is StepKind.HOLD
    both, _, _ = fwdllm_round(steps, MOMENTUM, private, (2, 3, 4), (held.random_terms,), seed=8)
    alone = [fwdllm_round(steps, MOMENTUM, private, groups, seed=seed)[0] for groups, seed in (((0, 1), 3), ((2, 3, 4), 8))]
    mean = sum(step(found, MOMENTUM) for found in alone) / 2
    # Some 25 terms of size |z|² |∇f| / 25 < 4 · 6 |∇f| / 25 are rounded a few times each, here and there, and so are two columns.
    assert np.abs(step(both, MOMENTUM) - mean).max() < 2 * 10 * UNIT * 4 * 6 * np.linalg.norm(gradient(6))


def test_relative_variance_is_that_of_the_mean_of_reports():
    values = noise.gaussian(7, 0, 9).astype(np.float64) + 1
    expected = values.var(ddof=1) / 9 / values.mean() ** 2
    assert relative_variance(values / 9) == pytest.approx(expected, rel=1e-12)
    assert relative_variance(values[:1]) == relative_variance(np.zeros(3)) == math.inf


# Warm start


def test_a_warm_start_has_a_step_size_for_each_phase_and_hands_over_once():
    method, config = arm(ArmName.WARM_START), ArmConfig(learning_rate=1e-3, warm_start_learning_rate=0.5, warm_start_rounds=2)
    span, private = span_of(1, 9), gradient(9)
    reports = measured(span[:0], private, groups=(1,), num_random=2)
    found = [method.combine(config, replace(plan(), round_index=index), public_of(span, private), reports) for index in range(4)]
    assert [method.learning_rate(config, index) for index in range(4)] == [0.5, 0.5, 1e-3, 1e-3]
    assert [coordinates.kind for coordinates in found] == [StepKind.STEP, StepKind.STEP, StepKind.RESTART, StepKind.STEP]
    cloud = CloudOnly().combine(config, plan(), public_of(span, private), reports)
    mezo = PlainZerothOrder(Grouping.DEVICE).combine(config, plan(), public_of(span, private), reports)
    for coordinates, expected in zip(found, (cloud, cloud, mezo, mezo), strict=True):
        assert np.array_equal(step(coordinates, span), step(expected, span))


@pytest.mark.parametrize("name", [ArmName.MEASURED, ArmName.PAPER, ArmName.MEZO_FL, ArmName.DECOMFL, ArmName.FEDKSEED, ArmName.FWDLLM])
@pytest.mark.parametrize("num_rows", [0, 9])
def test_every_zeroth_order_arm_spends_the_same_queries(name, num_rows):
    probes = arm(name).probes(ArmConfig(queries=6), 1, num_rows)
    assert isinstance(probes, Probes)
    assert probes.num_random + (1 if probes.measures_columns else 0) == 6


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (ArmName.FEEDBACK, {"has_gradient", "has_momentum", "has_basis", "has_maps"}),
        (ArmName.MEASURED, {"has_gradient", "has_momentum", "has_basis"}),
        (ArmName.PAPER, {"has_gradient"}),
        (ArmName.MEZO_FL, set()),
        (ArmName.DECOMFL, set()),
        (ArmName.FEDKSEED, {"has_pool"}),
        (ArmName.FWDLLM, {"has_momentum"}),
        (ArmName.WARM_START, {"has_gradient"}),
        (ArmName.CLOUD_ONLY, {"has_gradient"}),
        (ArmName.FEDAVG_BP, set()),
        (ArmName.FEDAVG_BP_CHECKPOINTED, set()),
    ],
)
def test_a_method_gets_from_the_cloud_what_its_paper_says_and_no_more(name, expected):
    """Momentum or a basis for the paper's arm, or a gradient for MeZO, would be another method under its name."""
    choices = ("has_gradient", "has_momentum", "has_basis", "has_maps", "has_pool")
    assert {choice for choice in choices if getattr(arm(name), choice)} == expected


def test_every_method_has_a_name():
    """Those that share a class differ in what they were made with."""
    assert len({(type(method), repr(method) if is_dataclass(method) else "") for method in map(arm, ArmName)}) == len(ArmName)


def test_only_the_feedback_arm_keeps_queries_from_columns_and_random_directions():
    config = ArmConfig(queries=8, feedback_blocks=2)
    assert {name: arm(name).free_queries(config) for name in ArmName} == dict.fromkeys(ArmName, 8) | {ArmName.FEEDBACK: 8 - 5 - 2}
