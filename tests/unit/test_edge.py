"""The edge: devices get what they miss, and only usable reports count.

Run: pytest tests/unit/test_edge.py
"""

from dataclasses import replace

import numpy as np
import pytest
import sample_messages

from cooperllm.algorithm import noise, replay
from cooperllm.algorithm.asked import group_of
from cooperllm.algorithm.compression import pack, pack_vector, packed_bytes, unpack_vector
from cooperllm.config import OptimizerConfig
from cooperllm.device.probe import catch_up
from cooperllm.edge import Edge
from cooperllm.link.codec import encode
from cooperllm.messages import Feedback, Grouping, LocalTraining, Outcome, Probes, RandomTerm

SIZE = 64
OPTIMIZER = OptimizerConfig()
PROBES = Probes(measures_columns=True, num_random=2, grouping=Grouping.DEVICE, column_scale=1.0, random_scale=1.0)


def history(count):
    """Sealed updates and the replica at every version."""
    replicas, updates = [replay.start(noise.gaussian(1, 0, SIZE), OPTIMIZER)], []
    for version in range(count):
        update = sample_messages.update(version, random_terms=(RandomTerm(group=0, coefficients=np.ones(1, np.float32)),))
        sealed, after = replay.seal(replicas[-1], update, OPTIMIZER)
        updates.append(sealed)
        replicas.append(after)
    return updates, replicas


def plan(replica, *, cohort=(0, 1, 2, 3), probes=PROBES, **changes):
    return sample_messages.plan(
        round_index=replica.model_version,
        model_version=replica.model_version,
        theta_hash=replica.state_hash,
        cohort=cohort,
        num_columns=2,
        probes=probes,
        **changes,
    )


def training(replica):
    return plan(replica, probes=None, local_training=LocalTraining(num_steps=1, learning_rate=0.1))


def estimating(replica, bits=8):
    return plan(replica, feedback=Feedback(maps_version=-1, blocks=((0, 8), (8, SIZE)), bits=bits, slope_scale=0.5))


def answer(device_id, asked, **changes):
    numbers = {"column_slopes": np.array([device_id, 1], np.float32), "random_slopes": np.array([device_id, -1], np.float32)}
    return sample_messages.device_report(device_id, asked, **numbers | changes)


def estimate(device_id, asked, **changes):
    """An answer with an estimate of one value everywhere and two blocks."""
    packed = pack_vector(np.full(SIZE, 1 + device_id, np.float32), 8)
    blocks = {"agreement": np.array([device_id, 2], np.float32), "energy": np.array([1, device_id], np.float32)}
    return answer(device_id, asked, **{"estimate": packed} | blocks | changes)


def edge_of(edge_id, device_ids):
    return Edge(edge_id, device_ids, SIZE)


def remembering(edge, updates, num_bytes):
    for update in updates:
        edge.remember(update, num_bytes)
    return edge


def test_only_the_edges_own_devices_of_the_cohort_are_asked_in_order():
    _, (replica,) = history(0)
    orders = edge_of(1, [5, 1, 3]).fan_out(plan(replica, cohort=(9, 3, 0, 1)), replica)
    assert [order.device_id for order in orders] == [1, 3]


def test_a_device_gets_exactly_the_updates_it_has_missed():
    updates, replicas = history(3)
    edge = remembering(edge_of(0, [0, 1]), updates, 100)
    edge.note_version([1], 2)
    first, second = edge.fan_out(plan(replicas[3]), replicas[3])
    assert [update.model_version for update in first.updates] == [0, 1, 2]
    assert [update.model_version for update in second.updates] == [2]
    assert first.snapshot is second.snapshot is None
    for order, known in ((first, 0), (second, 2)):
        assert catch_up(replicas[known], order, OPTIMIZER).state_hash == replicas[3].state_hash


def test_the_shorter_of_updates_and_snapshot_is_sent():
    """θ and one moment of 64 float32 are 512 bytes: two updates of 256 bytes are no longer than that, of 257 they are."""
    updates, replicas = history(2)
    (order,) = remembering(edge_of(0, [0]), updates, 256).fan_out(plan(replicas[2]), replicas[2])
    assert (len(order.updates), order.snapshot) == (2, None)
    (order,) = remembering(edge_of(0, [0]), updates, 257).fan_out(plan(replicas[2]), replicas[2])
    assert order.updates == ()
    assert catch_up(replicas[0], order, OPTIMIZER).state_hash == replicas[2].state_hash


def test_a_device_that_answered_gets_only_what_came_after():
    updates, replicas = history(2)
    edge = remembering(edge_of(0, [0, 1]), updates[:1], 100)
    asked = plan(replicas[1])
    edge.fold(asked, [answer(0, asked)], lost=1)
    edge.remember(updates[1], 100)
    answered, lost = edge.fan_out(plan(replicas[2]), replicas[2])
    assert [update.model_version for update in answered.updates] == [1]
    assert [update.model_version for update in lost.updates] == [0, 1]


def test_a_device_that_answered_another_version_is_not_taken_to_have_this_one():
    """Its report shows that it computed at version 0: it still lacks the first update."""
    updates, replicas = history(2)
    edge = remembering(edge_of(0, [0]), updates[:1], 100)
    stale, asked = plan(replicas[0]), plan(replicas[1])
    edge.fold(asked, [answer(0, stale)])
    edge.remember(updates[1], 100)
    (order,) = edge.fan_out(plan(replicas[2]), replicas[2])
    assert [update.model_version for update in order.updates] == [0, 1]


def test_fold_is_the_weighted_mean_of_usable_reports():
    _, (replica,) = history(0)
    asked = plan(replica)
    found = edge_of(7, range(4)).fold(asked, [answer(2, asked, num_examples=3, forward_passes=12), answer(0, asked, num_examples=1)])
    assert (found.edge_id, found.num_devices, found.num_examples, found.dropped, found.forward_passes) == (7, 2, 4, {}, 12)
    assert found.column_slopes.tolist() == [1.5, 1]
    assert found.column_squares.tolist() == [3, 1]
    assert [(group.group, group.num_examples, group.slopes.tolist()) for group in found.random_slopes] == [(0, 1, [0, -1]), (2, 3, [2, -1])]
    assert found.estimate is None


def test_estimates_are_averaged_where_the_plan_asked_for_training():
    _, (replica,) = history(0)
    asked = training(replica)
    reports = [
        sample_messages.device_report(i, asked, estimate=pack_vector(np.full(SIZE, i, np.float32), 32), num_examples=1 + i) for i in (0, 3)
    ]
    found = edge_of(0, range(4)).fold(asked, reports)
    # Sent exactly: nothing is rounded but the mean.
    assert unpack_vector(found.estimate, SIZE).tolist() == [float(np.float32(3 * 4 / 5))] * SIZE
    assert found.random_slopes == ()
    assert len(found.agreement) == len(found.energy) == 0


def test_estimates_agreements_and_energies_are_averaged_where_the_plan_asked_for_feedback():
    _, (replica,) = history(0)
    asked = estimating(replica)
    found = edge_of(0, range(4)).fold(asked, [estimate(3, asked, num_examples=3), estimate(1, asked, num_examples=1)])
    assert found.num_devices == 2
    # (3 · 4 + 1 · 2) / 4 = 3.5 everywhere; device and edge each lose a share of 1e-4 of the energy, (δ/2)² = 3e-4 at most.
    assert np.linalg.norm(unpack_vector(found.estimate, SIZE) - 3.5) <= 2 * 0.0175 * 3.5 * np.sqrt(SIZE)
    assert found.agreement.tolist() == [(3 * 3 + 1) / 4, 2]
    assert found.energy.tolist() == [1, (3 * 3 + 1) / 4]


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 32])
def test_a_mean_travels_with_eight_bits_or_with_those_of_estimates_where_they_have_more(bits):
    _, (replica,) = history(0)
    asked = estimating(replica, bits)
    found = edge_of(0, range(4)).fold(asked, [estimate(0, asked)])
    assert len(found.estimate) == packed_bytes(1, SIZE, max(8, bits))


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({"outcome": Outcome.NON_FINITE_LOSS}, Outcome.NON_FINITE_LOSS),
        ({"outcome": Outcome.MISMATCH}, Outcome.MISMATCH),
        ({"round_index": 1}, Outcome.MISMATCH),
        ({"model_version": 1}, Outcome.MISMATCH),
        ({"guide_version": 0}, Outcome.MISMATCH),
        ({"model_version": 1, "outcome": Outcome.NON_FINITE_LOSS}, Outcome.MISMATCH),
        ({"num_examples": 0}, Outcome.MISMATCH),
        ({"random_slopes": np.zeros(1, np.float32)}, Outcome.MISMATCH),
        ({"column_slopes": np.zeros(3, np.float32)}, Outcome.MISMATCH),
        ({"column_slopes": np.zeros(1, np.float32)}, Outcome.MISMATCH),
        ({"column_slopes": np.array([np.nan, 1], np.float32)}, Outcome.NON_FINITE_LOSS),
        ({"random_slopes": np.array([np.inf, 1], np.float32)}, Outcome.NON_FINITE_LOSS),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value.name,
)
def test_an_unusable_report_is_counted_under_its_outcome_and_changes_no_number(changes, outcome):
    """Whatever a device says of itself: one bad report must not stop a round or reach θ."""
    _, (replica,) = history(0)
    asked = plan(replica)
    good = [answer(0, asked), answer(1, asked)]
    found = edge_of(0, range(4)).fold(asked, [*good, answer(2, asked, **changes)])
    assert found.dropped == {outcome: 1}
    assert encode(replace(found, dropped={})) == encode(edge_of(0, range(4)).fold(asked, good))


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({"estimate": None}, Outcome.MISMATCH),
        ({"estimate": b""}, Outcome.MISMATCH),
        ({"estimate": pack(np.ones((1, SIZE), np.float32), 8)[:-1]}, Outcome.MISMATCH),
        ({"estimate": pack_vector(np.ones(SIZE - 1, np.float32), 8)}, Outcome.MISMATCH),
        ({"estimate": pack(np.ones((2, SIZE), np.float32), 8)}, Outcome.MISMATCH),
        ({"estimate": pack(np.ones((0, SIZE), np.float32), 8)}, Outcome.MISMATCH),
        ({"estimate": pack_vector(np.full(SIZE, np.nan, np.float32), 8)}, Outcome.MISMATCH),
        ({"agreement": np.zeros(1, np.float32)}, Outcome.MISMATCH),
        ({"energy": np.zeros(3, np.float32)}, Outcome.MISMATCH),
        ({"agreement": np.array([np.nan, 1], np.float32)}, Outcome.NON_FINITE_LOSS),
        ({"energy": np.array([np.inf, 1], np.float32)}, Outcome.NON_FINITE_LOSS),
        ({"random_slopes": np.zeros(1, np.float32)}, Outcome.MISMATCH),
    ],
    ids=str,
)
def test_an_unusable_estimate_is_counted_and_changes_no_number(changes, outcome):
    """A sender of bytes that are no estimate must not stop the round for the others."""
    _, (replica,) = history(0)
    asked = estimating(replica)
    good = [estimate(0, asked), estimate(1, asked)]
    found = edge_of(0, range(4)).fold(asked, [*good, estimate(2, asked, **changes)])
    assert found.dropped == {outcome: 1}
    assert encode(replace(found, dropped={})) == encode(edge_of(0, range(4)).fold(asked, good))


def test_training_without_a_result_is_counted_as_a_mismatch():
    _, (replica,) = history(0)
    asked = training(replica)
    assert edge_of(0, range(4)).fold(asked, [sample_messages.device_report(2, asked)]).dropped == {Outcome.MISMATCH: 1}


def test_an_estimate_that_nobody_asked_for_is_a_mismatch():
    """A device may not put a vector of its own choice into a round of slopes."""
    _, (replica,) = history(0)
    asked = plan(replica)
    sent = {"estimate": pack_vector(np.ones(SIZE, np.float32), 8)}
    assert edge_of(0, range(4)).fold(asked, [answer(2, asked, **sent)]).dropped == {Outcome.MISMATCH: 1}
    sent = {"agreement": np.ones(1, np.float32), "energy": np.ones(1, np.float32)}
    assert edge_of(0, range(4)).fold(asked, [answer(2, asked, **sent)]).dropped == {Outcome.MISMATCH: 1}


def test_lost_devices_are_counted_beside_the_others():
    _, (replica,) = history(0)
    asked = plan(replica)
    found = edge_of(0, range(6)).fold(
        asked, [answer(0, asked), answer(1, asked, outcome=Outcome.LOST), answer(2, asked, round_index=9)], lost=3
    )
    assert found.dropped == {Outcome.LOST: 4, Outcome.MISMATCH: 1}
    assert found.num_devices == 1


def test_no_usable_report_weighs_nothing():
    _, (replica,) = history(0)
    asked = plan(replica)
    found = edge_of(0, range(4)).fold(asked, [answer(0, asked, outcome=Outcome.NON_FINITE_LOSS)], lost=2)
    assert (found.num_devices, found.num_examples) == (0, 0)
    assert (
        len(found.column_slopes) == len(found.column_squares) == len(found.random_slopes) == len(found.agreement) == len(found.energy) == 0
    )
    assert found.estimate is None
    assert found.dropped == {Outcome.NON_FINITE_LOSS: 1, Outcome.LOST: 2}


@pytest.mark.parametrize(("grouping", "expected"), [(Grouping.SHARED, 0), (Grouping.EDGE, 4), (Grouping.DEVICE, 17)])
def test_group_says_who_shares_directions(grouping, expected):
    _, (replica,) = history(0)
    asked = plan(replica, probes=replace(PROBES, grouping=grouping))
    assert group_of(asked, edge_id=4, device_id=17) == expected
    (order,) = edge_of(4, [17]).fan_out(replace(asked, cohort=(17,)), replica)
    assert order.group == expected


def test_a_plan_without_probes_has_one_group():
    _, (replica,) = history(0)
    assert group_of(training(replica), edge_id=4, device_id=17) == 0


def test_devices_of_one_group_are_folded_into_one_entry():
    _, (replica,) = history(0)
    asked = plan(replica, probes=replace(PROBES, grouping=Grouping.EDGE))
    (group,) = edge_of(4, range(4)).fold(asked, [answer(0, asked, num_examples=1), answer(3, asked, num_examples=2)]).random_slopes
    assert (group.group, group.num_examples, group.slopes.tolist()) == (4, 3, [2, -1])


def test_slopes_that_a_device_says_are_mostly_rounding_move_the_mean_little():
    """Two devices of four examples: worth 4, and 1 of them where the rounding's square is a hundred times the signal's."""
    _, replicas = history(0)
    asked, edge = plan(replicas[0]), Edge(0, [0, 1], SIZE)
    sound = answer(0, asked, column_slopes=np.array([1, 1], np.float32), random_slopes=np.array([1, 1], np.float32))
    drowned = answer(
        1, asked, column_slopes=np.array([9, 9], np.float32), random_slopes=np.array([9, 9], np.float32), column_deviation=90.0
    )
    folded = edge.fold(asked, [sound, drowned])
    np.testing.assert_allclose(folded.column_slopes, (4 * 1 + 1 * 9) / 5)
    assert [entry.num_examples for entry in folded.random_slopes] == [4, 4]
    assert folded.num_examples == 8
    drowned = replace(drowned, random_deviation=90.0)
    assert [entry.num_examples for entry in edge.fold(asked, [sound, drowned]).random_slopes] == [4, 1]
