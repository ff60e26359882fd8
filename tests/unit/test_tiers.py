"""Tiers in processes of their own: whoever comes back gets exactly what it lacks, and nothing that arrives is believed.

Run: pytest tests/unit/test_tiers.py
"""

import threading
from dataclasses import replace

import numpy as np
import pytest
import sample_messages
from stand_ins import Bowl

from cooperllm.algorithm import noise, replay
from cooperllm.algorithm.guidance import digest
from cooperllm.algorithm.tail import UNKNOWN, Tail
from cooperllm.config import OptimizerConfig, OptimizerKind
from cooperllm.device.host import Host
from cooperllm.edge import Edge, Schedule
from cooperllm.errors import DecodeError, ProtocolError, ReplayMismatchError
from cooperllm.link.codec import decode, encode
from cooperllm.link.loopback import Loopback
from cooperllm.messages import DeviceReport, EdgeAnswer, EdgeOrder, Grouping, Maps, Order, Outcome, Probes, RandomTerm
from cooperllm.tiers import EdgeHost, LocalEdges, Received, RemoteEdges, take_part

SIZE = 256
OPTIMIZER = OptimizerConfig()
START = replay.start(noise.gaussian(1, 0, SIZE), OPTIMIZER)


def history(count):
    replicas, updates = [START], []
    for version in range(count):
        update = sample_messages.update(version, random_terms=(RandomTerm(group=0, coefficients=np.ones(1, np.float32)),))
        sealed, after = replay.seal(replicas[-1], update, OPTIMIZER)
        updates.append(sealed)
        replicas.append(after)
    return updates, replicas


def plan(replica, **changes):
    asked = sample_messages.plan(
        round_index=replica.model_version,
        model_version=replica.model_version,
        theta_hash=replica.state_hash,
        guide_hash=digest(np.zeros((0, SIZE), np.float32)),
        cohort=(0, 1),
        batch_size=2,
        probes=Probes(measures_columns=False, num_random=2, grouping=Grouping.DEVICE, column_scale=0.1, random_scale=0.1),
    )
    return replace(asked, **changes)


def host(latest=None, kept=None):
    return Host({0: Bowl(), 1: Bowl()}, lambda: START, OPTIMIZER, tuple[()], keep=(kept if kept is not None else []).append, latest=latest)


class Fleet:
    """Edges of their own, reached by bytes; some are away."""

    def __init__(self, devices):
        self.devices, self.away, self.orders = devices, set(), []
        self.hosts = {0: self.new(0), 1: self.new(1)}

    def new(self, number):
        return EdgeHost(Edge(number, [number], SIZE), lambda: Loopback(self.devices), OPTIMIZER, Schedule(SIZE, 0, adapts=True))

    def __call__(self, orders):
        self.orders += [(number, decode(data, EdgeOrder)) for number, data in orders.items()]
        data = {number: self.hosts[number].answer(data) for number, data in orders.items() if number not in self.away}
        return Received(data=data, spent={})


def close(tiers, replica, updates):
    """Asks, and hands the next update on."""
    answers = tiers.ask(plan(replica), replica).result()
    tiers.remember(updates[replica.model_version])
    return answers


def test_edges_elsewhere_answer_as_edges_here_do():
    updates, replicas = history(3)
    here = edges_here(host())
    elsewhere = RemoteEdges({0: [0], 1: [1]}, Fleet(host()))
    for replica in replicas[:3]:
        one, other = close(here, replica, updates), close(elsewhere, replica, updates)
        assert encode(one.reports) == encode(other.reports)
        assert (one.answered, one.forward_passes, one.bytes_down, one.bytes_up) == (
            other.answered, other.forward_passes, other.bytes_down, other.bytes_up,
        )  # fmt: skip


def test_an_edge_is_sent_a_snapshot_once_and_then_what_it_has_missed():
    updates, replicas = history(4)
    fleet = Fleet(host())
    tiers = RemoteEdges({0: [0], 1: [1]}, fleet)
    close(tiers, replicas[0], updates)
    fleet.away = {1}
    answers = close(tiers, replicas[1], updates)
    assert [report.edge_id for report in answers.reports] == [0]
    assert answers.answered == (0,)
    fleet.away = set()
    fleet.orders.clear()
    close(tiers, replicas[2], updates)
    sent = {number: ([update.model_version for update in order.updates], order.snapshot) for number, order in fleet.orders}
    assert sent == {0: ([1], None), 1: ([0, 1], None)}


def edges_here(devices):
    return LocalEdges([Edge(0, [0], SIZE), Edge(1, [1], SIZE)], Loopback(devices))


def test_an_edge_without_a_device_of_the_round_is_not_asked_here_or_elsewhere():
    """What it costs follows: one edge's order and report for two, none where no device is asked."""
    fleet = Fleet(host())
    for tiers in (edges_here(host()), RemoteEdges({0: [0], 1: [1]}, fleet)):
        both, one, none = (tiers.ask(plan(START, cohort=cohort), START).result() for cohort in ((0, 1), (1,), ()))
        assert [report.edge_id for report in both.reports] == [0, 1]
        assert [report.edge_id for report in one.reports] == [1]
        assert (one.answered, none.answered, none.reports, none.bytes_between) == ((1,), (), (), 0)
        assert one.bytes_between < both.bytes_between
    assert [number for number, _ in fleet.orders] == [0, 1, 1]


def test_new_maps_go_to_every_edge():
    """They are sent once: an edge without a device of this round would lack them in the next."""
    maps = (Maps(version=0, base_version=-1, num_directions=0, directions=b"", num_components=0, basis=b"", rank=0, factors=b""),)
    assert take_part({0: [0], 1: range(1, 9, 2)}, plan(START, cohort=(0,), maps=maps)) == [0, 1]
    assert take_part({0: [0], 1: range(1, 9, 2)}, plan(START, cohort=(3,))) == [1]


@pytest.mark.parametrize("cohorts", [[(0, 1), (0,), (0,), (0, 1)], [(0,), (0,), (0,), (0, 1)]], ids=["away in between", "new"])
def test_an_edge_that_was_not_asked_for_rounds_catches_up_and_its_devices_get_what_they_would_have(cohorts):
    """One that is asked for the first time has no state: it gets a snapshot, and the updates that its devices start with."""
    updates, replicas = history(4)
    fleet = Fleet(host())
    here, elsewhere = edges_here(host()), RemoteEdges({0: [0], 1: [1]}, fleet)
    for replica, cohort in zip(replicas, cohorts, strict=False):
        one, other = (tiers.ask(plan(replica, cohort=cohort), replica).result() for tiers in (here, elsewhere))
        assert encode(one.reports) == encode(other.reports)
        assert (one.answered, one.bytes_down, one.bytes_up) == (other.answered, other.bytes_down, other.bytes_up)
        assert one.answered == cohort
        here.remember(updates[replica.model_version])
        elsewhere.remember(updates[replica.model_version])
    number, order = fleet.orders[-1]
    is_new = cohorts[0] == (0,)
    assert number == 1
    assert [update.model_version for update in order.updates] == [0, 1, 2]
    assert (order.snapshot is not None) == is_new


def test_edges_here_go_on_after_a_resume_with_the_bytes_of_a_run_that_was_not_stopped():
    updates, replicas = history(4)
    devices, cohorts = host(), [(0, 1), (0,), (0,), (0, 1)]
    tiers = edges_here(devices)
    for replica, cohort in zip(replicas[:3], cohorts, strict=False):
        tiers.ask(plan(replica, cohort=cohort), replica).result()
        tiers.remember(updates[replica.model_version])
    resumed = edges_here(devices)
    for version, cohort in enumerate(cohorts[:3]):
        resumed.remember(updates[version])
        resumed.note_answered(cohort, version)
    last, again = (tiers.ask(plan(replicas[3]), replicas[3]).result() for tiers in (tiers, resumed))
    assert (last.bytes_between, last.bytes_down) == (again.bytes_between, again.bytes_down)


def test_an_edge_that_has_lost_its_memory_is_asked_again_in_the_same_round():
    updates, replicas = history(2)
    fleet = Fleet(host())
    tiers = RemoteEdges({0: [0], 1: [1]}, fleet)
    close(tiers, replicas[0], updates)
    fleet.hosts[1] = fleet.new(1)
    fleet.orders.clear()
    answers = tiers.ask(plan(replicas[1]), replicas[1]).result()
    assert [report.edge_id for report in answers.reports] == [0, 1]
    assert [(number, order.snapshot is not None) for number, order in fleet.orders] == [(0, False), (1, False), (1, True)]


def test_a_device_that_has_lost_its_disk_is_asked_again_in_the_same_round():
    updates, replicas = history(3)
    edge = Edge(0, [0], SIZE)
    tiers = LocalEdges([edge], Loopback(host()))
    close(tiers, replicas[0], updates)
    close(tiers, replicas[1], updates)
    new = LocalEdges([edge], Loopback(host()))
    answers = new.ask(plan(replicas[2]), replicas[2]).result()
    assert answers.answered == (0,)
    assert answers.reports[0].num_devices == 1
    assert answers.reports[0].dropped == {}


def test_a_device_that_stays_behind_is_counted():
    _, replicas = history(3)

    class Forgetful:
        def answer(self, data):
            return host().answer(encode(replace(decode(data, Order), updates=(), snapshot=None)))

    answers = LocalEdges([Edge(0, [0], SIZE)], Loopback(Forgetful())).ask(plan(replicas[2]), replicas[2]).result()
    assert answers.answered == ()
    assert answers.reports[0].dropped == {Outcome.BEHIND: 1}


def test_a_device_keeps_every_state_that_it_reaches_and_goes_on_from_it():
    updates, replicas = history(2)
    kept = []
    device = host(kept=kept)
    order = Order(device_id=0, group=0, plan=plan(replicas[2]), updates=tuple(updates), snapshot=None)
    device.answer(encode(order))
    assert [replica.state_hash for replica in kept] == [replicas[2].state_hash]
    again = host(latest=kept[0])
    report = decode(again.answer(encode(replace(order, updates=()))), DeviceReport)
    assert report.outcome is Outcome.OK


def test_a_device_answers_for_itself_alone():
    with pytest.raises(ProtocolError, match=r"device 7 addressed, \[0, 1\] found here"):
        host().answer(encode(Order(device_id=7, group=0, plan=plan(START), updates=(), snapshot=None)))


def test_an_edge_whose_state_went_wrong_says_so_and_starts_again():
    updates, replicas = history(1)
    edge = Fleet(host()).new(0)
    wrong = replace(replicas[0], theta=replicas[0].theta + np.float32(1))
    order = EdgeOrder(edge_id=0, plan=plan(replicas[0]), updates=(), snapshot=wrong.snapshot())
    with pytest.raises(ReplayMismatchError, match="the edge starts again from a snapshot"):
        edge.answer(encode(order))
    assert decode(edge.answer(encode(replace(order, snapshot=None))), EdgeAnswer).model_version == UNKNOWN
    assert updates


@pytest.mark.parametrize(
    "forged",
    [
        b"",
        b"\xc1",
        encode(EdgeAnswer(edge_id=1, model_version=0, report=None, answered=(), forward_passes=0, bytes_down=0, bytes_up=0)),
    ],
    ids=["nothing", "noise", "another edge's"],
)
def test_an_answer_that_is_none_costs_its_edge_the_round(forged, caplog):
    answers = RemoteEdges({0: [0]}, lambda orders: Received(data=dict.fromkeys(orders, forged), spent={})).ask(plan(START), START).result()
    assert answers.reports == ()
    assert "edge 0 is lost" in caplog.text


def test_no_tail_is_longer_than_a_snapshot():
    """Three updates of 960 bytes, a snapshot of 2048: two of them fit."""
    updates, replicas = history(3)
    tail = Tail({0: 0, 1: 1})
    for update in updates:
        tail.remember(update, 960)
    assert tail.missed(1, replicas[3])[0] == tuple(updates[1:])
    assert tail.missed(0, replicas[3])[1] is not None
    tail.note([0, 1, 99], 3)
    assert tail.versions == {0: 3, 1: 3}


def test_snapshots_of_another_model_are_refused():
    edge = Fleet(host()).new(0)
    small = replay.start(np.zeros(3, np.float32), OPTIMIZER)
    with pytest.raises(DecodeError, match="vectors of lengths"):
        edge.answer(encode(EdgeOrder(edge_id=0, plan=plan(START), updates=(), snapshot=small.snapshot())))


def test_rounds_under_way_together_send_no_update_twice():
    """With staleness the next order leaves before the answers to the last one are back; it starts from what that one leads to."""
    updates, replicas = history(4)
    fleet, asked, answered = Fleet(host()), threading.Semaphore(0), [threading.Event() for _ in range(4)]

    def send(orders):
        received = fleet(orders)
        asked.release()
        assert answered[decode(orders[0], EdgeOrder).plan.round_index].wait(timeout=60)
        return received

    tiers = RemoteEdges({0: [0], 1: [1]}, send)
    under_way = []
    for round_index, version in enumerate([0, 0, 1, 2]):
        under_way.append(tiers.ask(plan(replicas[version], round_index=round_index), replicas[version]))
        assert asked.acquire(timeout=60)
        if round_index > 0:
            answered[round_index - 1].set()
            assert [report.num_devices for report in under_way[round_index - 1].result().reports] == [1, 1]
            tiers.remember(updates[round_index - 1])
    answered[3].set()
    assert len(under_way[3].result().reports) == 2
    sent = [[update.model_version for update in order.updates] for number, order in fleet.orders if number == 0]
    assert sent == [[], [], [0], [1]]
    assert [order.snapshot is not None for number, order in fleet.orders if number == 0] == [True, False, False, False]


def test_word_of_an_earlier_round_that_comes_last_takes_nothing_back():
    """Two rounds under way may end in either order."""
    updates, replicas = history(3)
    tail = Tail({0: 0})
    for update in updates[:2]:
        tail.remember(update, 10)
    tail.note([0], 2)
    tail.note([0], 1)
    assert tail.missed(0, replicas[2]) == ((), None)
    tail.fall_back(0, 1)
    assert tail.missed(0, replicas[2]) == ((updates[1],), None)


def test_an_edge_that_has_answered_is_known_to_while_another_is_asked_again():
    """The round goes on for the other one; an order that leaves meanwhile starts from what the first one said."""
    updates, replicas = history(3)
    fleet, asked_again, go_on = Fleet(host()), threading.Event(), threading.Event()

    def send(orders):
        if set(orders) == {1}:
            asked_again.set()
            go_on.wait(timeout=60)
        return fleet(orders)

    tiers = RemoteEdges({0: [0], 1: [1]}, send)
    close(tiers, replicas[0], updates)
    fleet.hosts[1] = fleet.new(1)  # an edge with an empty disk
    first = tiers.ask(plan(replicas[1]), replicas[1])
    assert asked_again.wait(timeout=60)
    tiers.remember(updates[1])
    second = tiers.ask(plan(replicas[2]), replicas[2])
    go_on.set()
    assert len(first.result().reports) == len(second.result().reports) == 2
    assert {order.plan.round_index: len(order.updates) for number, order in fleet.orders if number == 0} == {0: 0, 1: 1, 2: 1}


def test_edge_and_device_that_are_ahead_of_a_cloud_that_came_back_follow_it():
    """It begins the round that it had under way again, at the version it was begun at."""
    updates, replicas = history(3)
    devices = host()
    fleet = Fleet(devices)
    tiers = RemoteEdges({0: [0], 1: [1]}, fleet)
    for replica in replicas[:3]:
        close(tiers, replica, updates)
    back = RemoteEdges({0: [0], 1: [1]}, fleet)
    answers = back.ask(plan(replicas[1], round_index=2), replicas[1]).result()
    assert answers.answered == (0, 1)
    assert [report.num_devices for report in answers.reports] == [1, 1]


class Overtaken(Loopback):
    """A link on which, where a device is asked again, the order of the next round arrives first."""

    def __init__(self, devices, overtaking):
        super().__init__(devices)
        self._devices, self._overtaking, self.versions_sent = devices, overtaking, []

    def exchange(self, orders):
        self.versions_sent += [["snapshot"] if order.snapshot else [update.model_version for update in order.updates] for order in orders]
        if self.versions_sent == [[2], [1, 2]]:
            assert decode(self._devices.answer(encode(self._overtaking)), DeviceReport).outcome is Outcome.OK
        return super().exchange(orders)


def test_a_device_that_another_round_leads_on_between_two_orders_of_one_takes_part_all_the_same():
    """What it has said that it has is not true any more when it is asked again."""
    updates, replicas = history(4)
    edge = Edge(0, [0], SIZE)
    for update in updates:
        edge.remember(update, len(encode(update)))
    edge.note_version([0], 2)  # it has been led back to version 1 since
    overtaking = Order(device_id=0, group=0, plan=plan(replicas[4]), updates=tuple(updates[1:4]), snapshot=None)
    link = Overtaken(host(latest=replicas[1]), overtaking)
    answers = LocalEdges([edge], link).ask(plan(replicas[3]), replicas[3]).result()
    assert answers.answered == (0,)
    assert answers.reports[0].dropped == {}
    assert link.versions_sent == [[2], [1, 2], ["snapshot"]]
    link.versions_sent.clear()
    LocalEdges([edge], link).ask(plan(replicas[3]), replicas[3]).result()
    assert link.versions_sent == [[]], "the edge knows where the device is"


def test_an_edge_that_another_round_leads_on_between_two_orders_of_one_takes_part_all_the_same():
    """Two rounds that a cloud begins again after a kill may arrive in either order: the edge goes on, and back, and lacks the next ones."""
    updates, replicas = history(4)
    fleet, sent = Fleet(host()), []
    overtaking = EdgeOrder(edge_id=0, plan=plan(replicas[4]), updates=tuple(updates[1:]), snapshot=None)

    def send(orders):
        order = decode(orders[0], EdgeOrder)
        sent.append(["snapshot"] if order.snapshot else [update.model_version for update in order.updates])
        if sent == [[2], [1, 2]]:
            assert decode(fleet.hosts[0].answer(encode(overtaking)), EdgeAnswer).report is not None
        return fleet(orders)

    tiers = RemoteEdges({0: [0]}, send)
    for replica in replicas[:3]:
        close(tiers, replica, updates)
    back = EdgeOrder(edge_id=0, plan=plan(replicas[1]), updates=(), snapshot=replicas[1].snapshot())
    fleet.hosts[0].answer(encode(back))
    sent.clear()
    answers = tiers.ask(plan(replicas[3]), replicas[3]).result()
    assert answers.answered == (0,)
    assert [report.num_devices for report in answers.reports] == [1]
    assert sent == [[2], [1, 2], ["snapshot"]]
    sent.clear()
    tiers.ask(plan(replicas[3]), replicas[3]).result()
    assert sent == [[]], "the cloud knows where the edge is"


def test_an_edge_that_stays_behind_is_lost_and_named(caplog):
    behind = EdgeAnswer(edge_id=0, model_version=2, report=None, answered=(), forward_passes=0, bytes_down=0, bytes_up=0)
    _, replicas = history(3)
    tiers = RemoteEdges({0: [0]}, lambda orders: Received(data=dict.fromkeys(orders, encode(behind)), spent={}))
    assert tiers.ask(plan(replicas[3]), replicas[3]).result().reports == ()
    assert "edge 0 is lost: version 2 found, 3 expected" in caplog.text


def test_a_theta_that_was_moved_in_place_by_a_wrong_step_is_given_up():
    """It is not the state of any version, whatever its number says; the next order finds a device at its beginning."""
    sgd = OptimizerConfig(kind=OptimizerKind.SGD)

    def start():
        return replay.start(np.linspace(-1, 1, SIZE, dtype=np.float32), sgd)

    term = RandomTerm(group=0, coefficients=np.ones(1, np.float32))
    right, after = replay.seal(start(), sample_messages.update(0, random_terms=(term,)), sgd)
    wrong = replace(right, random_terms=(replace(term, coefficients=np.full(1, 2, np.float32)),))
    device = Host({0: Bowl()}, start, sgd, tuple[()], in_place=True)

    def order(replica, *updates):
        return encode(Order(device_id=0, group=0, plan=plan(replica), updates=updates, snapshot=None))

    device.answer(order(start()))
    with pytest.raises(ReplayMismatchError):
        device.answer(order(after, wrong))
    found = [decode(device.answer(order(after, right)), DeviceReport) for _ in range(2)]
    assert [one.outcome for one in found] == [Outcome.OK] * 2
    fresh = Host({0: Bowl()}, start, sgd, tuple[()])
    assert found[0].random_slopes.tobytes() == decode(fresh.answer(order(after, right)), DeviceReport).random_slopes.tobytes()
    assert decode(device.answer(order(start())), DeviceReport).outcome is Outcome.OK, "a cloud that begins anew finds version 0"
