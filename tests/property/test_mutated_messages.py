"""Whatever is done to a message on its way, each tier answers it, or refuses it in a sentence, and goes on as if it had not come.

Messages of real rounds are changed as bytes (flipped, cut, doubled, spliced) and as values (a number, an array or a part that is another
one, far too large, or missing). A tier that allocates or works without end for one of them does not come to the end of its test.

Run: pytest tests/property/test_mutated_messages.py; COOPERLLM_MUTATIONS=100000 for so many in each of the four tests
"""

import contextlib
import copy
import os
import random
import sys
from collections import Counter
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from stand_ins import MEASURED, SIZE, Bowl, cloud_of

from cooperllm.algorithm import noise, replay
from cooperllm.cloud.judge import misfit
from cooperllm.config import ArmConfig, ArmName, FederationConfig, RunConfig
from cooperllm.device.host import Host
from cooperllm.edge import Edge, Schedule
from cooperllm.errors import CooperLLMError, QuorumError
from cooperllm.link import flower
from cooperllm.link.codec import decode, encode
from cooperllm.link.loopback import Loopback
from cooperllm.messages import DeviceReport, EdgeAnswer, EdgeOrder, EdgeReport, Order
from cooperllm.round import run_round
from cooperllm.tiers import EdgeHost, Received, RemoteEdges

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numbers may be far too large: what comes of them is looked at

MUTATIONS = int(os.environ.get("COOPERLLM_MUTATIONS", "1500"))
EVERY = 50
"""After so many changed messages a good one comes."""

ROUNDS, DEVICES, OPTIMIZER = 6, 8, RunConfig().optimizer
FEDERATION = FederationConfig(num_devices=DEVICES, num_edges=2, devices_per_round=4, min_reports=1, batch_size=4)
ARMS = [MEASURED, ArmConfig(name=ArmName.FEEDBACK), ArmConfig(name=ArmName.FWDLLM), ArmConfig(name=ArmName.PAPER)]
START = replay.start(noise.gaussian(8, 0, SIZE), OPTIMIZER)
EDGE_DEVICES = {0: range(0, DEVICES, 2), 1: range(1, DEVICES, 2)}


def device_host():
    return Host({number: Bowl() for number in range(DEVICES)}, lambda: START, OPTIMIZER, tuple[()])


def edge_host(number, devices):
    return EdgeHost(Edge(number, EDGE_DEVICES[number], SIZE), lambda: Loopback(devices), OPTIMIZER, Schedule(SIZE, 0, adapts=False))


class Recorded:
    """What went by, in order: questions and answers."""

    def __init__(self, inner):
        self.inner, self.asked, self.answered = inner, [], []

    def answer(self, data):
        self.asked.append(data)
        self.answered.append(self.inner.answer(data))
        return self.answered[-1]


class Rounds:
    """Some rounds of an arm over bytes, and everything that was said in them.

    Attributes:
        devices: Orders and reports.
        edges: Orders and answers of each edge.
        cloud: At the end.
        digests: States that the run has been in.
    """

    def __init__(self, arm):
        self.cloud = cloud_of([0, 1, 2] * 4, arm, federation=FEDERATION)
        self.devices = Recorded(device_host())
        self.edges = {number: Recorded(edge_host(number, self.devices)) for number in EDGE_DEVICES}
        self.tiers, self.digests = RemoteEdges(EDGE_DEVICES, self.send), {self.cloud.replica.state_hash}
        self.updates = [run_round(self.cloud, self.tiers).closed.update for _ in range(ROUNDS)]
        self.digests |= {update.theta_hash for update in self.updates}

    def send(self, orders):
        return Received(data={number: self.edges[number].answer(data) for number, data in orders.items()}, spent={})


@pytest.fixture(scope="module")
def rounds():
    return [Rounds(arm) for arm in ARMS]


EXTREMES = [None, True, -1, 0, 1, 255, 1 << 16, (1 << 32) - 1, 1 << 32, (1 << 63) - 1, 1 << 63, float("nan"), float("inf"), -1e308, 1e-308]
EXTREMES += ["", "no such thing", b"", b"\0" * 16, b"\xff" * 40, [], {}, [0] * 40, ["<f4", [1 << 40], b""], ["<f4", [0, 1 << 62], b""]]


def places(value, path=()):
    """Every part of a message as plain values."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from places(part, (*path, key))


def part_at(value, path):
    for key in path:
        value = value[key]
    return value


def with_another_value(drawn, data, other):
    """Puts an extreme, a part of another message or a changed array in some place; takes a field away; or gives it another name."""
    value, others = (msgspec.msgpack.decode(one) for one in (data, other))
    for _ in range(drawn.choice((1, 1, 1, 2, 4))):
        *above, key = drawn.choice(list(places(value)))
        parent = part_at(value, above)
        kind = drawn.randrange(5)
        if kind == 0:
            del parent[key]
        elif kind == 1 and isinstance(parent[key], bytes) and parent[key]:
            changed = bytearray(parent[key])
            changed[drawn.randrange(len(changed))] = drawn.randrange(256)
            parent[key] = bytes(changed)
        elif kind == 2:
            of_others = list(places(others))
            parent[key] = copy.deepcopy(part_at(others, (*above, key) if (*above, key) in of_others else drawn.choice(of_others)))
        elif kind == 3 and isinstance(parent[key], int):
            parent[key] += drawn.choice((-1, 1))
        else:
            parent[key] = copy.deepcopy(drawn.choice(EXTREMES))
        if not isinstance(value, dict) or not value:
            break
    return msgspec.msgpack.encode(value)


def with_other_bytes(drawn, data, other):
    changed, place = bytearray(data), drawn.randrange(len(data))
    kind = drawn.randrange(5)
    if kind == 0:
        for _ in range(drawn.randrange(1, 5)):
            changed[drawn.randrange(len(changed))] ^= 1 << drawn.randrange(8)
    elif kind == 1:
        del changed[place : place + drawn.randrange(1, 40)]
    elif kind == 2:
        changed[place:place] = changed[drawn.randrange(len(data)) :][: drawn.randrange(1, 40)]
    elif kind == 3:
        changed[place:place] = drawn.choice((
            b"\xce\xff\xff\xff\xff",
            b"\xdd\xff\xff\xff\xff",
            b"\xc6\xff\xff\xff\xff",
            b"\xdf\x7f\xff\xff\xff",
        ))
    else:
        changed = changed[:place] + other[drawn.randrange(len(other)) :]
    return bytes(changed)


def changed(drawn, data, other):
    return drawn.choice((with_another_value, with_other_bytes))(drawn, data, other)


def mutations(good, seed):
    """Changed messages, a share of all for each arm."""
    drawn = random.Random(seed)
    for _ in range(MUTATIONS // len(ARMS)):
        yield changed(drawn, drawn.choice(good), drawn.choice(good))


def told(seen, capsys, tier):
    """Says what became of them, with pytest -s or without."""
    with capsys.disabled():
        sys.stdout.write(f"\n{tier}: {', '.join(f'{count} {what}' for what, count in seen.most_common())}\n")


def test_a_device_answers_or_refuses_and_has_no_state_but_the_clouds(rounds, capsys):
    seen = Counter()
    for number, run in enumerate(rounds):
        kept = []
        host = Host({one: Bowl() for one in range(DEVICES)}, lambda: START, OPTIMIZER, tuple[()], keep=kept.append)
        for count, data in enumerate(mutations(run.devices.asked, number)):
            if count % EVERY == 0:
                place = count // EVERY % len(run.devices.asked)
                assert host.answer(complete(run, place)) == run.devices.answered[place]
            try:
                answer = decode(host.answer(data), DeviceReport)
                seen[answer.outcome.value] += 1
            except CooperLLMError as error:
                seen[type(error).__name__] += 1
        assert {replica.state_hash for replica in kept} <= run.digests
    told(seen, capsys, "devices")


def complete(run, place):
    """A good order with all updates since the beginning: whoever it meets can answer it."""
    order = decode(run.devices.asked[place], Order)
    return encode(replace(order, updates=tuple(run.updates[: order.plan.model_version]), snapshot=None))


def test_an_edge_answers_or_refuses_and_serves_the_cloud_afterwards(rounds, capsys):
    """It may hold a state that a changed message has brought until it looks at it: then it says so once, and takes a snapshot."""
    seen = Counter()
    for number, run in enumerate(rounds):
        asked = run.edges[0].asked
        host = edge_host(0, device_host())
        for count, data in enumerate(mutations(asked, number)):
            if count % EVERY == 0:
                assert serves(host, run)
            try:
                answer = decode(host.answer(data), EdgeAnswer)
                seen["behind" if answer.report is None else "answered"] += 1
            except CooperLLMError as error:
                seen[type(error).__name__] += 1
    told(seen, capsys, "edges, from the cloud")


def serves(host, run):
    """Whether an edge answers the last order with a snapshot, at the second attempt at the latest."""
    order, replica = decode(run.edges[0].asked[-1], EdgeOrder), START
    for update in run.updates[: order.plan.model_version]:
        replica = replay.apply(replica, update, OPTIMIZER)
    whole = encode(replace(order, updates=(), snapshot=replica.snapshot()))
    for _ in range(2):
        with contextlib.suppress(CooperLLMError):
            if decode(host.answer(whole), EdgeAnswer).report is not None:
                return True
    return False


class Changed:
    """Devices that say, changed, what devices have said in the same round."""

    def __init__(self, run, seed):
        self._drawn, self._reports = random.Random(seed), [decode(data, DeviceReport) for data in run.devices.answered]

    def answer(self, data):
        order = decode(data, Order)
        said = [report for report in self._reports if report.round_index == order.plan.round_index]
        good = encode(replace(self._drawn.choice(said), device_id=order.device_id))
        return changed(self._drawn, good, encode(self._drawn.choice(self._reports)))


def test_an_edge_folds_what_is_left_of_changed_reports_into_finite_numbers(rounds, capsys):
    """Over Flower's messages: what is no report is a device that is lost to the round."""
    seen = Counter()
    for number, run in enumerate(rounds):
        plans = [decode(data, Order).plan for data in run.devices.asked]
        edge, drawn = Edge(0, range(DEVICES), SIZE), random.Random(number)

        def drive(link, edge=edge, drawn=drawn, plans=plans):
            for _ in range(MUTATIONS // len(ARMS) // DEVICES):
                plan = replace(drawn.choice(plans), cohort=tuple(range(DEVICES)))
                exchange = link.exchange([Order(device_id=one, group=0, plan=plan, updates=(), snapshot=None) for one in plan.cohort])
                folded = edge.fold(plan, exchange.reports, lost=len(exchange.lost))
                assert decode(encode(folded), EdgeReport).num_devices + sum(folded.dropped.values()) == DEVICES
                assert misfit(folded, plan, SIZE) is None
                seen.update({outcome.value: count for outcome, count in folded.dropped.items()} | {"folded": folded.num_devices})

        flower.run_in_process(lambda run=run, number=number: Changed(run, number), DEVICES, drive)
    told(seen, capsys, "edges, from devices")


def test_a_cloud_steps_or_does_without_whatever_edges_answer(rounds, capsys):
    """What an edge says is either folded or dropped and counted; θ stays finite, and nothing but a missing quorum is raised."""
    seen = Counter()
    for number, run in enumerate(rounds):
        drawn, everything = random.Random(number), [data for edge in run.edges.values() for data in edge.answered]
        good = {(answer.edge_id, answer.report.round_index): data for data in everything if (answer := decode(data, EdgeAnswer)).report}

        def send(orders, drawn=drawn, everything=everything, good=good):
            expected = {one: good.get((one, decode(data, EdgeOrder).plan.round_index), everything[0]) for one, data in orders.items()}
            return Received(data={one: changed(drawn, data, drawn.choice(everything)) for one, data in expected.items()}, spent={})

        for count in range(MUTATIONS // len(ARMS) // len(EDGE_DEVICES)):
            if count % ROUNDS == 0:
                cloud = cloud_of([0, 1, 2] * 4, ARMS[number], federation=FEDERATION)
            try:
                closed = run_round(cloud, RemoteEdges(EDGE_DEVICES, send)).closed
                seen.update({outcome.value: dropped for outcome, dropped in closed.dropped.items()} | {"folded": closed.num_reports})
            except QuorumError:
                seen["no quorum"] += 1
            assert np.isfinite(cloud.replica.theta).all()
    told(seen, capsys, "cloud")
