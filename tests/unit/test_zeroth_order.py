"""Two-point slopes and the estimates made of them: exact where theory says so, and θ never moves.

Run: pytest tests/unit/test_zeroth_order.py
"""

import numpy as np
import pytest

from cooperllm.algorithm import noise
from cooperllm.algorithm.zeroth_order import derivatives, estimate, slopes, weighted_sum


def rows(*values):
    return [np.array(value, np.float32) for value in values]


def directions(count, size):
    return [noise.gaussian(1, index, size) for index in range(count)]


def bowl(points):
    return (points * points).sum(axis=1)


def test_slope_is_exact_on_a_linear_loss():
    """Small integers and powers of two: no rounding anywhere."""
    gradient = np.array([3, -1, 2], np.float32)
    found = slopes(lambda points: points @ gradient, np.array([5, 6, 7], np.float32), rows([1, 0, 0], [1, 2, -4], [0, 0, 0]), 0.25)
    assert found.tolist() == [3, 3 - 2 - 8, 0]


def test_slope_is_exact_on_a_quadratic_loss_for_any_step():
    theta = np.array([2, -1], np.float32)
    for scale in (0.125, 1.0, 8.0):
        assert slopes(bowl, theta, rows([1, 1]), scale).tolist() == [2 * (2 - 1)]


@pytest.mark.parametrize("scale", [0.5, 0.25, 0.125])
def test_slope_of_a_cubic_errs_by_the_square_of_the_step(scale):
    """((1+μ)³ - (1-μ)³) / 2μ = 3 + μ²; these cubes fit into float32."""
    found = slopes(lambda points: (points**3).sum(axis=1), np.ones(1, np.float32), rows([1]), scale)
    assert found.tolist() == [3 + scale**2]


@pytest.mark.parametrize("points_per_pass", [1, 2, 3, 4, 64])
def test_slopes_do_not_depend_on_how_many_points_share_a_pass(points_per_pass):
    theta, probes = noise.gaussian(2, 0, 50), directions(7, 50)
    found = slopes(bowl, theta, probes, 1e-2, points_per_pass=points_per_pass)
    assert np.array_equal(found, slopes(bowl, theta, probes, 1e-2))


@pytest.mark.parametrize(("points_per_pass", "expected"), [(1, [1] * 10), (2, [2] * 5), (3, [2] * 5), (4, [4, 4, 2]), (64, [10])])
def test_no_pass_holds_more_points_than_allowed(points_per_pass, expected):
    seen = []

    def evaluate(points):
        seen.append(len(points))
        return bowl(points)

    slopes(evaluate, np.zeros(3, np.float32), directions(5, 3), 1.0, points_per_pass=points_per_pass)
    assert seen == expected


def test_directions_are_drawn_one_pass_at_a_time():
    """A list of all directions would need P times the memory of θ."""
    taken, ahead = [], []

    def lazily():
        for index in range(6):
            taken.append(index)
            yield noise.gaussian(1, index, 3)

    def evaluate(points):
        ahead.append(len(taken))
        return bowl(points)

    slopes(evaluate, np.zeros(3, np.float32), lazily(), 1.0, points_per_pass=4)
    assert ahead == [2, 4, 6]


def test_the_two_points_of_a_direction_are_theta_plus_and_minus():
    seen = []
    slopes(lambda points: seen.append(points.copy()) or bowl(points), np.array([1, 2], np.float32), rows([4, 8]), 0.25)
    assert np.array_equal(seen[0], [[2, 4], [0, 0]])


def test_probing_leaves_theta_bitwise_unmoved():
    theta = noise.gaussian(3, 0, 1000)
    before = theta.tobytes()

    def scribbles(points):
        losses = bowl(points)
        points[:] = 7
        return losses

    for points_per_pass in (1, 2, 8):
        slopes(scribbles, theta, directions(9, 1000), 1e-3, points_per_pass=points_per_pass)
    assert theta.tobytes() == before


def test_theta_is_unmoved_when_a_pass_raises():
    theta = noise.gaussian(3, 0, 100)
    before, calls = theta.tobytes(), iter([True, True, False])

    def fails_at_the_third(points):
        if not next(calls):
            raise MemoryError
        return bowl(points)

    with pytest.raises(MemoryError):
        slopes(fails_at_the_third, theta, directions(5, 100), 1e-3)
    assert theta.tobytes() == before


def test_theta_may_be_read_only():
    theta = np.ones(3, np.float32)
    theta.flags.writeable = False
    assert slopes(bowl, theta, rows([1, 0, 0]), 0.5).tolist() == [2]


@pytest.mark.parametrize(
    ("plus", "minus"),
    [(np.inf, 0), (0, np.inf), (np.nan, 0), (np.inf, np.inf), (-np.inf, np.inf), (np.nan, np.nan), (3e38, -3e38)],
)
def test_a_non_finite_loss_gives_a_non_finite_slope_and_leaves_the_others_alone(plus, minus):
    """3e38 - (-3e38) over 2μ does not fit into float32 either: an answer, not a warning."""
    losses = np.array([plus, minus, 2, 1], np.float32)
    found = slopes(lambda _points: losses, np.zeros(2, np.float32), directions(2, 2), 0.5, points_per_pass=4)
    assert not np.isfinite(found[0])
    assert found[1] == 1


def test_no_direction_gives_no_slope_and_no_pass():
    def never(points):
        raise AssertionError

    found = slopes(never, np.zeros(2, np.float32), [], 1.0)
    assert (found.shape, found.dtype) == ((0,), np.float32)


def tangent_of_bowl(theta, directions):
    return float(theta @ theta), directions @ (2 * theta)


def test_forward_mode_is_the_limit_of_two_point_slopes():
    """On a quadratic the two are the same for any μ; a power of two keeps θ ± μz exact."""
    theta, probes = np.array([2, -1, 3], np.float32), rows([1, 2, 0], [0, -1, 4])
    found = derivatives(tangent_of_bowl, theta, probes, directions_per_pass=4)
    assert found.tolist() == slopes(bowl, theta, probes, 0.5).tolist() == [0, 26]


@pytest.mark.parametrize(("directions_per_pass", "expected"), [(1, [1] * 5), (2, [2, 2, 1]), (4, [4, 1]), (64, [5])])
def test_no_pass_carries_more_directions_than_allowed_and_none_is_padded(directions_per_pass, expected):
    seen, drawn = [], []

    def differentiate(theta, directions):
        seen.append(len(directions))
        assert len(drawn) == sum(seen)  # directions are drawn one pass at a time
        return tangent_of_bowl(theta, directions)

    lazily = (drawn.append(index) or noise.gaussian(1, index, 3) for index in range(5))
    theta = np.ones(3, np.float32)
    found = derivatives(differentiate, theta, lazily, directions_per_pass=directions_per_pass)
    assert seen == expected
    np.testing.assert_allclose(found, np.stack(directions(5, 3)) @ (2 * theta), rtol=1e-6)


def test_forward_mode_without_directions_runs_nothing():
    def never(theta, directions):
        raise AssertionError

    found = derivatives(never, np.zeros(2, np.float32), [], directions_per_pass=4)
    assert (found.shape, found.dtype) == ((0,), np.float32)


def test_estimate_is_the_mean_of_slope_times_direction():
    found = estimate(np.array([2, -4], np.float32), rows([1, 0, 3], [0, 1, 1]))
    assert found.tolist() == [1, -2, 1]


def test_weighted_sum_is_the_explicit_loop_bit_for_bit():
    probes, coefficients = directions(17, 1001), noise.gaussian(5, 0, 17)
    expected = np.zeros(1001, np.float32)
    for coefficient, direction in zip(coefficients, probes, strict=True):
        expected = expected + coefficient * direction
    assert weighted_sum(coefficients, iter(probes)).tobytes() == expected.tobytes()


def test_weighted_sum_leaves_its_directions_alone():
    probes = directions(3, 10)
    before = [probe.tobytes() for probe in probes]
    weighted_sum(np.ones(3, np.float32), probes)
    assert [probe.tobytes() for probe in probes] == before


@pytest.mark.parametrize("count", [1, 3])
def test_a_coefficient_without_a_direction_is_refused(count):
    with pytest.raises(ValueError, match=r"zip\(\)"):
        weighted_sum(np.ones(count, np.float32), directions(2, 4))
