"""A run has diverged when it is worse than knowing nothing, three cohorts in a row, and not before.

Run: pytest tests/unit/test_divergence.py
"""

import math

import pytest

from cooperllm.algorithm.divergence import WINDOW, has_diverged, recent_loss


@pytest.mark.parametrize("num_classes", [2, 77])
def test_knowing_nothing_is_no_divergence(num_classes):
    assert not has_diverged([math.log(num_classes)] * 9, num_classes)


@pytest.mark.parametrize("num_classes", [2, 77])
def test_more_than_twice_of_it_is(num_classes):
    assert has_diverged([2.01 * math.log(num_classes)] * WINDOW, num_classes)


def test_one_unlucky_cohort_is_not_enough():
    assert not has_diverged([0.3, 0.3, 3.0], 2)
    assert not has_diverged([3.0, 0.3, 0.3], 2)


def test_what_was_before_the_window_is_forgotten():
    assert not has_diverged([100.0, *[0.3] * WINDOW], 2)
    assert recent_loss([100.0, *[0.25] * WINDOW]) == 0.25


@pytest.mark.parametrize("count", range(WINDOW))
def test_too_few_rounds_say_nothing(count):
    assert not has_diverged([9.0] * count, 2)
    assert recent_loss([0.0] * count) == math.inf
