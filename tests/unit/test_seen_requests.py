"""Which requests of a node are taken: each time once, however they arrive."""

import datetime

from hypothesis import given
from hypothesis import strategies as st

from cooperllm.link.seen_requests import SeenRequests

NOON = datetime.datetime(2026, 11, 21, 12, tzinfo=datetime.UTC)


def after(seconds):
    return NOON + datetime.timedelta(seconds=seconds)


@given(st.lists(st.integers(1, 40), max_size=200), st.integers(1, 8))
def test_no_time_is_taken_twice_however_few_are_remembered(times, kept):
    seen = SeenRequests(NOON, kept)
    taken = [second for second in times if seen.admit(after(second))]
    assert len(set(taken)) == len(taken)
    assert len(seen._times) <= kept


@given(st.permutations(range(1, 9)))
def test_requests_that_overtake_one_another_are_all_taken_while_they_are_remembered(times):
    seen = SeenRequests(NOON, kept=8)
    assert all(seen.admit(after(second)) for second in times)


def test_a_request_that_was_overtaken_by_more_than_are_remembered_is_refused():
    seen = SeenRequests(NOON, kept=2)
    assert [seen.admit(after(second)) for second in (2, 3, 4, 1, 2, 5)] == [True, True, True, False, False, True]


def test_what_was_signed_until_the_beginning_is_refused():
    seen = SeenRequests(NOON)
    assert [seen.admit(after(second)) for second in (-1, 0, 1e-6)] == [False, False, True]
