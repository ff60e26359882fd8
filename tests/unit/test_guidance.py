"""The span, the paper's perturbations, and the fixed-order arithmetic under both.

Run: pytest tests/unit/test_guidance.py
"""

import math

import numpy as np
import pytest

from cooperllm.algorithm import noise
from cooperllm.algorithm.guidance import (
    blend_weights,
    digest,
    digest_of,
    dot,
    guided_perturbations,
    mixtures,
    orthonormalise,
    random_directions,
    signs,
)
from cooperllm.algorithm.noise import probe_index, probe_indices
from cooperllm.messages import Grouping, Probes

UNIT = 2.0**-24
"""Largest relative error of one float32 operation."""


def columns(count, size, seed=1):
    return [noise.gaussian(seed, index, size) for index in range(count)]


def elsewhere(vector):
    """The same values behind other strides and alignments."""
    spread = np.zeros(3 * len(vector), np.float32)
    spread[::3] = vector
    shifted = np.frombuffer(b"\0" + vector.tobytes(), np.float32, offset=1)
    assert not shifted.flags.aligned
    return [spread[::3], shifted, vector[::-1].copy()[::-1], np.asfortranarray(np.stack([vector, vector]))[1]]


def gram(span):
    return span.astype(np.float64) @ span.astype(np.float64).T


@pytest.mark.parametrize(("count", "size"), [(1, 1), (5, 5), (8, 100), (12, 10_000)])
def test_rows_are_orthonormal(count, size):
    span = orthonormalise(columns(count, size), size)
    assert span.shape == (count, size)
    # After the second sweep each of at most k subtractions, two products' roundings and the division leave an error vector no longer
    # than UNIT times the row; an inner product of unit rows errs by at most the sum of two such lengths.
    assert np.abs(gram(span) - np.eye(count)).max() < 2 * (count + 4) * UNIT


def test_nearly_parallel_columns_still_give_right_angles():
    """One sweep of Gram-Schmidt leaves errors of UNIT / 2⁻¹⁰ here."""
    base = columns(6, 1000)
    span = orthonormalise([base[0], *(base[0] + np.float32(2**-10) * other for other in base[1:])], 1000)
    assert len(span) == 6
    assert np.abs(gram(span) - np.eye(6)).max() < 2 * (6 + 4) * UNIT


def test_the_first_column_keeps_its_direction():
    first, second = columns(2, 1000)
    span = orthonormalise([first, second], 1000)
    unit = first.astype(np.float64) / np.linalg.norm(first.astype(np.float64))
    # Two divisions and two rounded lengths: four relative errors of UNIT.
    assert (np.abs(span[0] - unit) <= 4 * UNIT * np.abs(unit) * (1 + 2**-20)).all()
    assert dot(span[1], second) > 0


def test_the_span_contains_what_it_was_made_of():
    given = columns(4, 200)
    span = orthonormalise(given, 200).astype(np.float64)
    for column in given:
        rest = column - span.T @ (span @ column)
        assert np.linalg.norm(rest) < 2 * (4 + 4) * UNIT * np.linalg.norm(column.astype(np.float64)) * math.sqrt(4)


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf, -math.inf])
def test_zero_and_non_finite_columns_are_left_out(bad):
    good = columns(2, 10)
    spoilt = good[0].copy()
    spoilt[:] = bad if bad == 0 else spoilt
    spoilt[3] = bad
    assert np.array_equal(orthonormalise([spoilt, good[0], spoilt, good[1]], 10), orthonormalise(good, 10))


def test_dependent_columns_are_left_out():
    one, other = columns(2, 50)
    given = [one, np.float32(-3) * one, other, one + other, one - np.float32(1e-6) * other]
    assert np.array_equal(orthonormalise(given, 50), orthonormalise([one, other], 50))


def test_no_more_rows_than_dimensions():
    assert len(orthonormalise(columns(5, 3), 3)) == 3


def test_no_columns_give_an_empty_span_of_the_right_width():
    assert orthonormalise([], 7).shape == (0, 7)


@pytest.mark.parametrize("length", [1e-30, 1e-10, 1e10, 1e18])
def test_length_of_a_column_does_not_matter(length):
    (column,) = columns(1, 100)
    found = orthonormalise([np.float32(length) * column], 100)
    # Scaling rounds each entry once more.
    assert np.allclose(found, orthonormalise([column], 100), rtol=8 * UNIT, atol=0)


def test_columns_are_not_modified():
    given = columns(3, 20)
    before = [column.tobytes() for column in given]
    orthonormalise(given, 20)
    assert [column.tobytes() for column in given] == before


@pytest.mark.parametrize("size", [0, 1, 2, 3, 7, 1000, 65_537])
def test_dot_is_the_exact_sum_up_to_the_depth_of_halving(size):
    left, right = noise.gaussian(1, 0, size), noise.gaussian(1, 1, size)
    products = left.astype(np.float64) * right  # exact: 24 + 24 bits fit into 53
    depth = math.ceil(math.log2(size)) if size > 1 else 0
    assert abs(dot(left, right) - math.fsum(products)) <= depth * 2**-53 * math.fsum(np.abs(products)) * (1 + 2**-40)


@pytest.mark.parametrize("size", [5, 1000, 4097])
def test_dot_and_span_have_the_same_bits_wherever_the_vectors_lie_in_memory(size):
    left, right = columns(2, size)
    expected, span = dot(left, right), orthonormalise([left, right], size)
    for one, other in zip(elsewhere(left), elsewhere(right), strict=True):
        assert dot(one, other) == expected
        assert orthonormalise([one, other], size).tobytes() == span.tobytes()


def test_dot_adds_upper_to_lower_half_and_nothing_else():
    """2⁵⁴ + 1 = 2⁵⁴ in double precision: every other order of these four terms gives another sum."""
    large = np.float32(2.0**27)
    left = np.array([large, 1, -large, 1], np.float32)
    right = np.array([large, 1, large, 1], np.float32)
    assert dot(left, right) == 2
    assert dot(left[[0, 2, 1, 3]], right[[0, 2, 1, 3]]) == 0


def test_span_matches_its_golden_digest():
    """Pinned, so that a machine or a NumPy that rounds otherwise is noticed before a replica is."""
    assert digest(orthonormalise(columns(5, 4097, seed=7), 4097)).hex() == "cc418e227ccfe28095e49d40b6dc6a1e"


def test_perturbations_match_their_golden_digest():
    span = orthonormalise(columns(2, 1000, seed=7), 1000)
    assert digest(*guided_perturbations(span, 9, [0, 1, 1 << 32], 5, 0.5, 2.0)).hex() == "a48c84b914fe8e31c03faf0037b6b174"


def test_weights_of_the_two_parts_are_the_papers():
    isotropic, guided = blend_weights(4, 100, 0.36, 2.0)
    assert isotropic == pytest.approx(2 * 0.6 / 10, rel=2**-50)
    assert guided == pytest.approx(2 * 0.8 / 2, rel=2**-50)
    assert blend_weights(0, 100, 0.25, 1.0) == (0.05, 0.0)


def test_a_perturbation_is_its_two_parts():
    span = orthonormalise(columns(3, 40), 40)
    isotropic, guided = blend_weights(3, 40, 0.3, 1.5)
    found = list(guided_perturbations(span, 11, [4, 9], 2, 0.3, 1.5))
    for position, index in enumerate([4, 9]):
        chosen = signs(11, 2, position, 3).astype(np.float64)
        expected = isotropic * noise.gaussian(11, index, 40).astype(np.float64) + guided * chosen @ span.astype(np.float64)
        # Three additions, their products and two rounded factors, each relative to the largest partial sum.
        largest = isotropic * np.abs(noise.gaussian(11, index, 40)).max() + 3 * guided
        assert np.abs(found[position] - expected).max() < 8 * UNIT * largest


def test_full_blend_is_scaled_isotropic_noise():
    span = orthonormalise(columns(3, 40), 40)
    (found,) = guided_perturbations(span, 11, [4], 2, 1.0, 3.0)
    assert np.array_equal(found, np.float32(3 / math.sqrt(40)) * noise.gaussian(11, 4, 40))


def test_without_columns_the_isotropic_part_stands_alone():
    (found,) = guided_perturbations(np.zeros((0, 16), np.float32), 11, [4], 2, 0.25, 1.0)
    assert np.array_equal(found, np.float32(0.125) * noise.gaussian(11, 4, 16))


def test_perturbations_of_a_family_use_its_signs_one_after_the_other():
    whole = noise.rademacher(3, 8, 12)
    assert np.array_equal(np.concatenate([signs(3, 8, position, 4) for position in range(3)]), whole)
    assert len(signs(3, 8, 2, 0)) == 0


def test_a_mixture_is_its_signs_times_unit_rows_and_has_length_one():
    basis = [np.float32(length) * row for length, row in zip((1, 0.25, 8), orthonormalise(columns(3, 40), 40), strict=True)]
    found = mixtures(11, 2, 4, basis)
    units = orthonormalise(columns(3, 40), 40).astype(np.float64)
    for position, mixture in enumerate(found):
        expected = signs(11, 2, position, 3).astype(np.float64) @ units / math.sqrt(3)
        # Lengths, quotients and three sums are rounded once each, at the size of a unit row's entry.
        assert np.abs(mixture - expected).max() < 8 * UNIT * np.abs(units).max() * math.sqrt(3)
        assert math.sqrt(dot(mixture, mixture)) == pytest.approx(1, rel=20 * UNIT)


def test_a_mixture_does_not_depend_on_how_many_are_drawn():
    """The cloud rebuilds them one group at a time, a device its own: a shorter draw must be the beginning of a longer one."""
    basis = columns(5, 30)
    assert np.array_equal(mixtures(3, 8, 2, basis), mixtures(3, 8, 6, basis)[:2])


def test_a_row_of_zeros_adds_nothing_to_a_mixture():
    (row,) = columns(1, 16)
    with_zeros = mixtures(3, 8, 1, [row, np.zeros(16, np.float32)])[0]
    assert np.isfinite(with_zeros).all()
    # Two rows: the other one counts 1/√2.
    assert math.sqrt(dot(with_zeros, with_zeros)) == pytest.approx(math.sqrt(0.5), rel=8 * UNIT)


def test_mixtures_match_their_golden_digest():
    assert digest(*mixtures(9, 5, 3, columns(4, 1000, seed=7))).hex() == "209c5f871f9d795f1da44f460d64728e"


@pytest.mark.parametrize("blend", [None, 0.0, 0.25, 1.0])
def test_random_directions_are_of_the_kind_that_the_probes_name(blend):
    """None is isotropic, 0 a mixture of the rows alone, everything else the paper's blend."""
    scales = {"column_scale": 1.0, "random_scale": 1.0, "blend_scale": 2.0}
    probes = Probes(measures_columns=False, num_random=3, grouping=Grouping.DEVICE, blend=blend, **scales)
    rows = orthonormalise(columns(2, 40), 40)
    expected = {
        None: [noise.gaussian(7, probe_index(6, position), 40) for position in range(3)],
        0.0: mixtures(7, 6, 3, list(rows)),
    }
    blended = guided_perturbations(rows, 7, probe_indices(6, 3), 6, blend or 1.0, 2.0)
    found = list(random_directions(7, 6, probes, list(rows), 40))
    assert np.array_equal(found, expected.get(blend) or list(blended))


def test_groups_have_random_directions_of_their_own():
    for blend in (None, 0.0, 0.5):
        probes = Probes(measures_columns=False, num_random=2, grouping=Grouping.DEVICE, column_scale=1.0, random_scale=1.0, blend=blend)
        one, other = (list(random_directions(7, group, probes, columns(8, 40), 40)) for group in (0, 1))
        assert not any(np.array_equal(mine, theirs) for mine in one for theirs in other)


def test_a_digest_of_parts_is_the_digest_of_the_whole():
    one, other = columns(2, 6)
    assert digest_of(iter([one, other])) == digest(one, other)
    assert digest_of([other, one]) != digest(one, other)


@pytest.mark.parametrize("bit", [0, 1, 31, 32 * 99 + 31])
def test_digest_changes_with_one_bit(bit):
    (values,) = columns(1, 100)
    raw = bytearray(values.tobytes())
    raw[bit // 8] ^= 1 << bit % 8
    assert digest(np.frombuffer(bytes(raw), np.float32)) != digest(values)


def test_digest_sees_shape_order_division_and_type():
    one, other = columns(2, 6)
    variants = [
        digest(one),
        digest(one.reshape(2, 3)),
        digest(one, other),
        digest(other, one),
        digest(np.concatenate([one, other])),
        digest(one.astype(np.float64)),
        digest(),
        digest(np.zeros((0, 6), np.float32)),
        digest(np.zeros((0, 5), np.float32)),
    ]
    assert len(set(variants)) == len(variants)
    assert {len(variant) for variant in variants} == {16}


def test_digest_does_not_depend_on_byte_order_or_strides():
    (values,) = columns(1, 12)
    assert digest(values.astype(">f4")) == digest(values)
    assert {digest(other) for other in elsewhere(values)} == {digest(values)}
    matrix = values.reshape(3, 4)
    assert digest(np.asfortranarray(matrix)) == digest(matrix)
