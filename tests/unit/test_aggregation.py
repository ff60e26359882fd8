"""Weighted means and spreads, and that neither the order of arrival nor the division into edges counts.

Run: pytest tests/unit/test_aggregation.py
"""

import itertools

import numpy as np
import pytest
import sample_messages

from cooperllm.algorithm import noise
from cooperllm.algorithm.aggregation import merged, variance_between, weighted_mean, worth
from cooperllm.edge import Edge
from cooperllm.link.codec import encode
from cooperllm.messages import Grouping, Outcome, Probes, RandomSlopes

UNIT = 2.0**-24
"""Largest relative error of one rounding to float32."""

SIZE = 7


def vectors(count, size=SIZE):
    return [noise.gaussian(1, index, size) for index in range(count)]


def plan(grouping=Grouping.SHARED):
    probes = Probes(measures_columns=True, num_random=2, grouping=grouping, column_scale=1.0, random_scale=1.0)
    return sample_messages.plan(num_columns=3, probes=probes)


def report(device_id, asked, num_examples, outcome=Outcome.OK):
    numbers = {"column_slopes": noise.gaussian(2, device_id, 3), "random_slopes": noise.gaussian(3, device_id, 2)}
    return sample_messages.device_report(device_id, asked, num_examples=num_examples, outcome=outcome, **numbers)


def test_mean_weighs_by_examples():
    assert weighted_mean([np.array([1, 10], np.float32), np.array([5, -2], np.float32)], [3, 1]).tolist() == [2, 7]


def test_mean_of_one_is_that_one_bit_for_bit():
    (value,) = vectors(1)
    assert weighted_mean([value], [16]).tobytes() == value.tobytes()


def test_mean_is_rounded_once():
    values, weights = vectors(50), list(range(1, 51))
    exact = sum(weight * value.astype(np.float64) for weight, value in zip(weights, values, strict=True)) / sum(weights)
    # Double precision adds far less than one float32 rounding.
    assert (np.abs(weighted_mean(values, weights) - exact) <= UNIT * (1 + 2**-10) * np.abs(exact)).all()


def test_mean_leaves_its_inputs_alone():
    values = vectors(3)
    before = [value.tobytes() for value in values]
    weighted_mean(values, [1, 2, 3])
    assert [value.tobytes() for value in values] == before


def test_a_value_without_a_weight_is_refused():
    with pytest.raises(ValueError, match=r"zip\(\)"):
        weighted_mean(vectors(2), [1])


def test_mean_of_means_is_the_flat_mean():
    values, weights = vectors(9), [1, 2, 3, 4, 5, 6, 7, 8, 100]
    parts = [slice(0, 2), slice(2, 3), slice(3, 9)]
    folded = weighted_mean([weighted_mean(values[part], weights[part]) for part in parts], [sum(weights[part]) for part in parts])
    # Each part is rounded once, and both results once: three roundings relative to the largest value.
    largest = np.abs(np.stack(values)).max()
    assert np.abs(folded - weighted_mean(values, weights)).max() <= 3 * UNIT * largest


def test_variance_is_the_unbiased_sample_variance():
    values = np.stack(vectors(6))
    weights = [4] * 6
    mean, squares = weighted_mean(list(values), weights), weighted_mean(list(values**2), weights)
    # mean² carries two roundings, squares two (of each square, of their mean), all relative to the mean square, times D/(D-1).
    tolerance = 4 * UNIT * (values.astype(np.float64) ** 2).mean(axis=0) * 6 / 5 * (1 + 2**-10)
    expected = values.astype(np.float64).var(axis=0, ddof=1)
    assert (np.abs(variance_between(mean, squares, 6) - expected) <= tolerance).all()


def test_variance_is_never_negative():
    """Rounding of equal values gives a mean square slightly below the squared mean."""
    mean = np.full(1000, 1.1, np.float32) + np.float32(1e-7) * np.arange(1000).astype(np.float32)
    assert (variance_between(mean, mean * mean, 3) >= 0).all()


@pytest.mark.parametrize("num_senders", [0, 1])
def test_one_sender_says_nothing_about_the_spread(num_senders):
    assert variance_between(np.ones(1, np.float32), np.full(1, 9, np.float32), num_senders).tolist() == [9]


@pytest.mark.parametrize("grouping", list(Grouping))
def test_order_of_arrival_cannot_change_a_byte_of_the_edges_report(grouping):
    outcomes = [Outcome.OK, Outcome.OK, Outcome.NON_FINITE_LOSS, Outcome.OK, Outcome.MISMATCH]
    asked = plan(grouping)
    reports = [report(device_id, asked, 3 + device_id, outcome) for device_id, outcome in enumerate(outcomes)]
    encoded = {encode(Edge(1, range(5), SIZE).fold(asked, order, lost=1)) for order in itertools.permutations(reports)}
    assert len(encoded) == 1


def test_folds_of_two_edges_have_the_mean_of_all_devices():
    reports = [report(device_id, plan(), 3 + device_id) for device_id in range(5)]
    one, other = Edge(0, [0, 2, 4], SIZE).fold(plan(), reports[0::2]), Edge(1, [1, 3], SIZE).fold(plan(), reports[1::2])
    whole = Edge(0, range(5), SIZE).fold(plan(), reports)
    weights = [one.num_examples, other.num_examples]
    assert sum(weights) == whole.num_examples
    pairs = [
        (one.column_slopes, other.column_slopes, whole.column_slopes),
        (one.column_squares, other.column_squares, whole.column_squares),
        (one.random_slopes[0].slopes, other.random_slopes[0].slopes, whole.random_slopes[0].slopes),
    ]
    for left, right, expected in pairs:
        largest = max(np.abs(left).max(), np.abs(right).max())
        assert np.abs(weighted_mean([left, right], weights) - expected).max() <= 3 * UNIT * largest


def test_entries_of_one_group_become_one_and_groups_come_in_order():
    entries = [
        RandomSlopes(group=9, num_examples=1, slopes=np.array([1, 10], np.float32)),
        RandomSlopes(group=2, num_examples=5, slopes=np.array([7, 7], np.float32)),
        RandomSlopes(group=9, num_examples=3, slopes=np.array([5, -2], np.float32)),
    ]
    found = merged(entries)
    # (1 · 1 + 3 · 5) / 4 = 4 and (1 · 10 - 3 · 2) / 4 = 1
    assert [(entry.group, entry.num_examples, entry.slopes.tolist()) for entry in found] == [(2, 5, [7, 7]), (9, 4, [4, 1])]
    assert merged([]) == ()


def test_a_deviation_whose_square_is_nothing_counts_as_none_whatever_the_slopes_are():
    """Found by changed messages: a device that said 1e-200 beside slopes of zero took its whole edge with it."""
    flat = np.zeros(1, np.float32)
    assert worth([16, 16], [1e-200, 0.0], [flat, flat]) == [16, 16]
    assert worth([16, 16], [1e-200, 1.0], [flat, flat]) == [16, 1]


def test_a_group_merged_over_two_edges_is_the_group_of_all_devices():
    """Directions shared by all: two entries with the same group would count them twice."""
    reports = [report(device_id, plan(), 3 + device_id) for device_id in range(5)]
    folded = [Edge(0, [0, 2, 4], SIZE).fold(plan(), reports[0::2]), Edge(1, [1, 3], SIZE).fold(plan(), reports[1::2])]
    (found,) = merged([entry for edge in folded for entry in edge.random_slopes])
    (whole,) = Edge(0, range(5), SIZE).fold(plan(), reports).random_slopes
    assert (found.group, found.num_examples) == (whole.group, whole.num_examples)
    assert np.abs(found.slopes - whole.slopes).max() <= 3 * UNIT * max(np.abs(r.random_slopes).max() for r in reports)
