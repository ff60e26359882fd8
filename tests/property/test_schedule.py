"""Schedules for any rates: nobody gets more bits than asked for, nobody fewer than pays, and what is not known changes nothing.

Run: pytest tests/property/test_schedule.py
"""

from dataclasses import replace

import pytest
import sample_messages
from hypothesis import given
from hypothesis import strategies as st

from cooperllm.algorithm.compression import packed_bytes
from cooperllm.edge.schedule import ADDED_ENERGY, Pace, Schedule, bits_of_devices, period_s
from cooperllm.messages import Feedback, Spent

SIZE = 25_346
SECONDS = st.floats(0, 1e4)
PACE = st.builds(Pace, received_s=SECONDS, worked_s=SECONDS, returned_s=SECONDS, num_bytes=st.integers(0, 10**8))
PACES = st.dictionaries(st.integers(0, 50), PACE, min_size=1, max_size=8)
BITS, STALENESS = st.sampled_from([1, 2, 4, 8, 32]), st.sampled_from([0, 1])


def spent(node, received_s=0.1, worked_s=1.0, returned_s=0.2):
    return Spent(node=node, begun_s=0.0, received_s=received_s, waited_s=0.0, worked_s=worked_s, returned_s=returned_s)


def plan(bits=4, cohort=(0, 1, 2)):
    return sample_messages.plan(cohort=cohort, feedback=Feedback(maps_version=-1, blocks=(), bits=bits, slope_scale=0.1))


@given(PACES, BITS, STALENESS, st.integers(1, 100))
def test_every_device_gets_bits_that_exist_and_no_more_than_were_asked_for(paces, most, staleness, averaged):
    found = bits_of_devices(paces, SIZE, most, staleness, averaged)
    assert found.keys() == paces.keys()
    assert all(bits in ADDED_ENERGY and bits <= most for bits in found.values())


@given(PACES, STALENESS, st.integers(1, 100))
def test_fewer_bits_are_only_taken_where_the_device_itself_comes_round_sooner(paces, staleness, averaged):
    for device, bits in bits_of_devices(paces, SIZE, 8, staleness, averaged).items():
        if bits < 8:
            sooner, later = (period_s(paces[device], packed_bytes(1, SIZE, one), staleness) for one in (bits, 8))
            assert sooner < later


@given(PACE, PACE, STALENESS, st.integers(1, 100), st.floats(1, 100))
def test_a_slower_link_never_gets_more_bits(pace, other, staleness, averaged, factor):
    """Most devices stay as they are, so that the median does."""
    others = dict.fromkeys(range(1, 6), other)
    slower = replace(pace, returned_s=pace.returned_s * factor)
    before, after = (bits_of_devices(others | {0: one}, SIZE, 8, staleness, averaged)[0] for one in (pace, slower))
    assert after <= before


@given(PACES, STALENESS)
def test_who_waits_for_work_and_not_for_the_link_keeps_its_bits(paces, staleness):
    quick = {device: replace(pace, returned_s=0.0) for device, pace in paces.items()}
    assert set(bits_of_devices(quick, SIZE, 4, staleness, 5).values()) == {4}


def test_a_link_that_drops_is_believed_after_two_rounds_and_an_outlier_never():
    """100 to 2 Mbit/s: an answer of 13 kB takes fifty times as long, and half a second of it is not hidden by a second of work."""
    schedule = Schedule(SIZE, 1, adapts=True)
    for device in range(3):
        for _ in range(3):
            schedule.note(spent(device, returned_s=0.08), 13_000)
    assert {one.bits for one in schedule.of(plan()).values()} == {4}
    schedule.note(spent(2, returned_s=4.0), 13_000)
    assert schedule.of(plan())[2].bits == 4, "once may be an accident"
    schedule.note(spent(2, returned_s=4.0), 13_000)
    assert schedule.of(plan())[2].bits < 4
    assert {device: one.bits for device, one in schedule.of(plan()).items() if device != 2} == {0: 4, 1: 4}
    for _ in range(2):
        schedule.note(spent(2, returned_s=0.05), 3_600)
    assert schedule.of(plan())[2].bits == 4, "a link that is well again gets its bits back"


def test_without_adaptation_bits_are_the_plans_and_expectations_are_still_told():
    schedule = Schedule(SIZE, 0, adapts=False)
    schedule.note(spent(0, returned_s=60.0), 13_000)
    found = schedule.of(plan())
    assert {device: one.bits for device, one in found.items()} == {0: 4}
    assert found[0].expected.returned_s == pytest.approx(60, rel=0.02)


def test_a_round_without_estimates_or_with_strangers_only_has_no_schedule():
    schedule = Schedule(SIZE, 0, adapts=True)
    schedule.note(spent(7), 13_000)
    assert schedule.of(plan()) == {}
    assert schedule.of(sample_messages.plan(cohort=(7,))) == {}
