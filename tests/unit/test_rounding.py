"""Rounding: measured as what it is, told from curvature, outgrown by the half-step, and less of a weight where it was not.

Run: pytest tests/unit/test_rounding.py
"""

import math

import numpy as np
import pytest
import sample_messages

from cooperllm.algorithm import noise, replay, zeroth_order
from cooperllm.algorithm.aggregation import worth
from cooperllm.algorithm.guidance import digest
from cooperllm.algorithm.rounding import MOST_GROWTH, NO_ROUNDING, Rounding, half_step, least_half_step, rounding_of, slope_deviation
from cooperllm.config import ArmConfig, OptimizerConfig, SlopeMethod
from cooperllm.device.probe import run_device
from cooperllm.errors import ConfigError
from cooperllm.messages import Grouping, Order, Probes

SIZE = 32
GRADIENT = noise.gaussian(3, 0, SIZE)
THETA = noise.gaussian(4, 0, SIZE)


class Noisy:
    """A linear loss with a cubic part, which its machine rounds: each call draws anew."""

    num_examples, map_shape = 4, (0, SIZE)

    def __init__(self, deviation, cubic=0.0):
        self.deviation, self.cubic, self.calls = deviation, cubic, 0

    def losses(self, points):
        self.calls += 1
        along = (points.astype(np.float64) - THETA) @ GRADIENT
        drawn = noise.gaussian(5, self.calls, len(points)).astype(np.float64)
        return (along + self.cubic * along**3 + self.deviation * drawn).astype(np.float64)

    def rounding(self):
        return Rounding(loss_deviation=self.deviation, slope=float(np.linalg.norm(GRADIENT)), num_texts=4)

    def evaluate(self, chosen):
        return lambda points: self.losses(points).astype(np.float32), 1

    def differentiate(self, chosen):
        return lambda theta, directions: (0.5, (directions @ GRADIENT).astype(np.float32)), 4

    def estimate(self, theta, chosen, maps):
        return GRADIENT, 0.5


def directions(count):
    return [noise.gaussian(6, index, SIZE) for index in range(count)]


def test_rounding_of_a_known_size_is_found():
    """Three degrees of freedom from each of 200 directions: σ̂ deviates by σ / √(2 · 600), five times that is allowed."""
    found = rounding_of(Noisy(1e-3).losses, THETA, directions(200), 4)
    assert found.loss_deviation == pytest.approx(1e-3, rel=5 / math.sqrt(2 * 600))


def test_the_slope_found_is_that_of_standard_normal_directions():
    """s² is the mean of 200 squares of normal numbers of deviation |g|: √(2 / 200) of itself."""
    found = rounding_of(Noisy(0.0).losses, THETA, directions(200), 4)
    assert found.slope**2 == pytest.approx(float(GRADIENT @ GRADIENT), rel=5 * math.sqrt(2 / 200))


def test_curvature_is_not_taken_for_rounding():
    """A cubic term of a fifth of the slope at the longest half-step; what is left is float32 steps of θ + μ z, 2⁻²⁴ of sums near 30."""
    bent = rounding_of(Noisy(0.0, cubic=2.0).losses, THETA, directions(8), 4)
    assert bent.loss_deviation < 1e-5


def test_the_half_step_it_leads_to_gives_slopes_of_the_quality_that_was_asked_for():
    """q = 7: r = 1 / √(1 + 1/49) = .990; at the plan's μ the rounding is ten times the slope."""
    machine = Noisy(0.08)
    true = np.array([z @ GRADIENT for z in directions(200)])

    def correlation(scale):
        return np.corrcoef(
            true, zeroth_order.slopes(lambda points: machine.losses(points).astype(np.float32), THETA, directions(200), scale)
        )

    chosen = half_step(machine.rounding(), 1e-3, 7.0)
    assert 1e-3 < chosen < MOST_GROWTH * 1e-3 * 3.5
    assert correlation(least_half_step(machine.rounding(), 7.0))[0, 1] > 0.98
    assert correlation(1e-3)[0, 1] < 0.3


def test_a_half_step_grows_so_far_and_no_further_and_never_shrinks():
    assert half_step(Rounding(loss_deviation=1.0, slope=1e-3, num_texts=1), 1e-3, 7.0) == MOST_GROWTH * 1e-3
    assert half_step(NO_ROUNDING, 1e-3, 7.0) == 1e-3
    assert half_step(Rounding(loss_deviation=1.0, slope=1.0, num_texts=1), 1e-3, 0.0) == 1e-3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_losses_that_are_not_finite_leave_no_half_step_long_enough(bad):
    found = rounding_of(lambda points: np.full(len(points), bad, np.float32), THETA, directions(1), 4)
    assert math.isnan(found.loss_deviation)
    assert least_half_step(found, 7.0) == math.inf


def order(signal_to_noise=7.0, num_random=8, scale=1e-3):
    replica = replay.start(THETA, OptimizerConfig())
    asked = sample_messages.plan(
        theta_hash=replica.state_hash,
        guide_hash=digest(np.zeros((0, SIZE), np.float32)),
        batch_size=4,
        probes=Probes(measures_columns=False, num_random=num_random, grouping=Grouping.DEVICE, column_scale=0.03, random_scale=scale),
        signal_to_noise=signal_to_noise,
    )
    return Order(device_id=0, group=0, plan=asked, updates=(), snapshot=None), replica


def test_a_device_that_rounds_takes_longer_half_steps_and_says_what_is_left():
    asked, replica = order()
    machine = Noisy(0.01)
    report = run_device(asked, replica, machine, None, None)
    used = half_step(machine.rounding(), 1e-3, 7.0)
    assert report.random_deviation == pytest.approx(slope_deviation(machine.rounding(), used, 4))
    assert report.random_deviation == pytest.approx(machine.rounding().slope / 7)
    exact = run_device(asked, replica, Noisy(0.01), None, None, SlopeMethod.FORWARD_MODE)
    # Eight slopes, each off by its rounding: the root mean square of eight normal numbers is below 2.2 in all but 1e-5 of cases.
    assert np.sqrt(np.mean((report.random_slopes - exact.random_slopes) ** 2)) < 2.2 * report.random_deviation
    assert exact.random_deviation == 0


def test_where_no_half_step_is_long_enough_a_noise_aware_device_differentiates():
    asked, replica = order()
    for deviation, passes in ((1e-4, 2 * 8), (1.0, 2 * (1 + 4))):
        report = run_device(asked, replica, Noisy(deviation), None, None, SlopeMethod.NOISE_AWARE)
        assert report.forward_passes == passes
        assert (report.random_deviation == 0) == (passes == 10)


@pytest.mark.parametrize("changes", [{"signal_to_noise": 0.0}, {"num_random": 0}])
def test_rounding_is_not_measured_for_a_plan_that_does_not_care(changes):
    class Untouched(Noisy):
        def rounding(self):
            raise AssertionError("eighty passes for nothing")

    asked, replica = order(**changes)
    assert run_device(asked, replica, Untouched(0.01), None, None).random_deviation == 0


def test_slopes_that_rounding_drowns_count_for_little_beside_others():
    steep = np.array([3.0, -4.0], np.float32)
    assert worth([16, 16, 16], [0.0, 0.0, 100.0], [steep, steep, steep]) == [16, 16, 1]
    assert worth([16, 8], [0.0, 0.0], [steep, steep]) == [16, 8]


def test_nothing_is_lost_where_all_senders_drown():
    assert worth([16, 8], [5.0, 5.0], [np.zeros(2, np.float32)] * 2) == [1, 1]


def test_a_signal_below_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"arm.signal_to_noise: found -1"):
        ArmConfig(signal_to_noise=-1)
