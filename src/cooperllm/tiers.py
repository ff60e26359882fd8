"""The tiers below the cloud, as the cloud sees them: a plan goes in, folded reports come out.

ask_edges        fan a plan out, exchange, fold; devices that turn out to be behind are asked again with what they lack
LocalEdges       edges in the cloud's process, over any link to devices: simulations
EdgeHost         one edge in a process of its own: bytes of an EdgeOrder in, bytes of an EdgeAnswer out
RemoteEdges      such edges, from the cloud's side

Who says that it is behind is asked again with what leads on from the version that it names. By then an order of another round under way may
have led it elsewhere, on or back, so that this leads nowhere: then it gets a snapshot, which is taken from whatever version it has.
"""

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from cooperllm.algorithm import replay
from cooperllm.algorithm.compression import packed_bytes
from cooperllm.algorithm.replay import Replica
from cooperllm.algorithm.tail import UNKNOWN, Tail
from cooperllm.config import OptimizerConfig
from cooperllm.edge import Edge, Schedule
from cooperllm.edge.fold import NO_BITS
from cooperllm.errors import DecodeError, ReplayMismatchError
from cooperllm.link.base import Exchange, Link
from cooperllm.link.codec import decode, encode
from cooperllm.messages import EdgeAnswer, EdgeOrder, EdgeReport, Order, Outcome, Plan, Scheduled, Spent, Update

MOST_ASKED = 3
"""Times that an edge is asked in a round: from what is known of it, from what it says that it has, from anywhere."""

_ANYWAY = nullcontext()
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class EdgeTimes:
    """How an edge and its devices spent a round.

    Attributes:
        own: The edge, since the cloud asked.
        devices: Its devices that answered, since the edge began.
        scheduled: What the edge expected of them.
    """

    own: Spent
    devices: tuple[Spent, ...]
    scheduled: tuple[Scheduled, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """What the tiers below the cloud have come to in a round.

    Attributes:
        reports: One per edge that answered.
        answered: Devices that sent a report of this version.
        forward_passes: Forward passes of one batch, all devices together.
        bytes_down: Bytes to devices.
        bytes_up: Bytes from devices.
        bytes_between: Bytes between cloud and edges, both ways.
        edges: How edges in processes of their own spent the round.
    """

    reports: tuple[EdgeReport, ...]
    answered: tuple[int, ...]
    forward_passes: int
    bytes_down: int
    bytes_up: int
    bytes_between: int
    edges: tuple[EdgeTimes, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Received:
    """What edges answered, by their numbers, and how they spent their time; who is lost is missing in both."""

    data: Mapping[int, bytes]
    spent: Mapping[int, Spent]


@runtime_checkable
class Tiers(Protocol):
    """Edges with their devices, wherever they are."""

    def ask(self, plan: Plan, replica: Replica) -> Future[Answers]:
        """Sends a plan to the edges with a device of its cohort and collects what comes back, now or while others are asked.

        Who is lost is counted, not raised.
        """
        ...

    def remember(self, update: Update) -> None:
        """Takes the update that closes a round."""
        ...


def take_part(devices: Mapping[int, Collection[int]], plan: Plan) -> list[int]:
    """Says which edges a round needs; the others catch up when they are needed.

    Args:
        devices: Of each edge, by its number.
        plan: The round.

    Returns:
        Numbers of the edges with a device of the cohort, in their order. New maps go to all: their devices will ask for them.
    """
    cohort = set(plan.cohort)
    return [number for number, own in devices.items() if plan.maps or not cohort.isdisjoint(own)]


def ask_edges(
    edges: Sequence[Edge],
    plan: Plan,
    replica: Replica,
    link: Link,
    alone: AbstractContextManager[object] = _ANYWAY,
    bits: Mapping[int, int] = NO_BITS,
) -> tuple[Answers, tuple[Spent, ...]]:
    """Carries a plan to the devices of edges in this process and folds what they report.

    Args:
        edges: Each with its own devices.
        plan: The round, as it came from the cloud.
        replica: The edges' state at the plan's version.
        link: How orders reach devices.
        alone: Held while the edges are touched, but not while devices are waited for.
        bits: Bits per entry of some devices' estimates, where they are not the plan's.

    Returns:
        One report per edge, where nothing has gone between cloud and edges; and how devices in processes of their own spent the round.
    """
    begun = time.monotonic()
    with alone:
        orders = {edge.edge_id: edge.fan_out(plan, replica, bits) for edge in edges}
    exchange = latest = link.exchange([order for edge_orders in orders.values() for order in edge_orders])
    for from_anywhere in (False, True):
        with alone:
            again = _again(edges, plan, replica, latest, bits, from_anywhere=from_anywhere)
        if not again:
            break
        later_s = time.monotonic() - begun
        latest = link.exchange(again)
        exchange = _joined(exchange, latest, later_s)
    by_device = {report.device_id: report for report in exchange.reports}
    reports: list[EdgeReport] = []
    with alone:
        for edge in edges:
            asked = [order.device_id for order in orders[edge.edge_id]]
            answered = [by_device[device_id] for device_id in asked if device_id in by_device]
            late = len(set(asked) & set(exchange.late) - set(by_device))
            reports.append(edge.fold(plan, answered, lost=len(asked) - len(answered) - late, late=late))
    current = [report for report in exchange.reports if report.model_version == plan.model_version and report.outcome is not Outcome.BEHIND]
    answers = Answers(
        reports=tuple(reports),
        answered=tuple(sorted(report.device_id for report in current)),
        forward_passes=sum(report.forward_passes for report in exchange.reports),
        bytes_down=exchange.bytes_down,
        bytes_up=exchange.bytes_up,
        bytes_between=0,
    )
    return answers, exchange.spent


def _again(
    edges: Sequence[Edge], plan: Plan, replica: Replica, before: Exchange, bits: Mapping[int, int], *, from_anywhere: bool = False
) -> list[Order]:
    """Orders for devices that have said which version they really have: one that has come back with an empty disk, say.

    With `from_anywhere` they get what leads to the plan's version from any other one.
    """
    behind = [report for report in before.reports if report.outcome is Outcome.BEHIND]
    again: list[Order] = []
    for edge in edges if behind else ():
        for report in behind:
            edge.fall_back(report.device_id, UNKNOWN if from_anywhere else report.model_version)
        again += [order for order in edge.fan_out(plan, replica, bits) if order.device_id in {report.device_id for report in behind}]
    return again


def _joined(first: Exchange, second: Exchange, later_s: float) -> Exchange:
    replaced = {report.device_id for report in second.reports}
    spent = {one.node: one for one in (*first.spent, *(_later(one, later_s) for one in second.spent))}
    return Exchange(
        reports=[*(report for report in first.reports if report.device_id not in replaced), *second.reports],
        bytes_down=first.bytes_down + second.bytes_down,
        bytes_up=first.bytes_up + second.bytes_up,
        lost=first.lost,
        late=first.late,
        spent=tuple(spent.values()),
    )


def _later(spent: Spent, seconds: float) -> Spent:
    return replace(spent, begun_s=spent.begun_s + seconds)


class LocalEdges:
    """Edges in the cloud's process; messages between them are encoded and decoded all the same, so that bytes are counted."""

    def __init__(self, edges: Sequence[Edge], link: Link) -> None:
        self._edges, self._link = {edge.edge_id: edge for edge in edges}, link
        self._tail = Tail(dict.fromkeys(self._edges, 0))

    def ask(self, plan: Plan, replica: Replica) -> Future[Answers]:
        """Sends a plan to the edges with a device of its cohort and collects what comes back."""
        future = Future[Answers]()
        future.set_result(self._asked(plan, replica))
        return future

    def _asked(self, plan: Plan, replica: Replica) -> Answers:
        asked = take_part({number: edge.device_ids for number, edge in self._edges.items()}, plan)
        orders = [encode(_edge_order(number, plan, replica, self._tail)) for number in asked]
        self._tail.note(asked, plan.model_version)
        arrived = decode(encode(plan), Plan)  # all edges see the same bytes
        found, _ = ask_edges([self._edges[number] for number in asked], arrived, replica, self._link)
        reports = [encode(report) for report in found.reports]
        return Answers(
            reports=tuple(decode(report, EdgeReport) for report in reports),
            answered=found.answered,
            forward_passes=found.forward_passes,
            bytes_down=found.bytes_down,
            bytes_up=found.bytes_up,
            bytes_between=sum(map(len, (*orders, *reports))),
        )

    def remember(self, update: Update) -> None:
        """Keeps the update for edges and devices: it travels with the next plan that needs it."""
        num_bytes = len(encode(update))
        self._tail.remember(update, num_bytes)
        for edge in self._edges.values():
            edge.remember(update, num_bytes)

    def note_answered(self, device_ids: Sequence[int], model_version: int) -> None:
        """Records what a round of before has led devices and their edges to, for a run that is resumed."""
        for number, edge in self._edges.items():
            if not set(device_ids).isdisjoint(edge.device_ids):
                edge.note_version(device_ids, model_version)
                self._tail.note([number], model_version)


def _edge_order(number: int, plan: Plan, replica: Replica, tail: Tail) -> EdgeOrder:
    updates, snapshot = tail.missed(number, replica)
    return EdgeOrder(edge_id=number, plan=plan, updates=updates, snapshot=snapshot)


class EdgeHost:
    """One edge in a process of its own; it may be asked for the next round while it waits for devices."""

    def __init__(self, edge: Edge, links: Callable[[], Link], optimizer: OptimizerConfig, schedule: Schedule) -> None:
        """Takes the edge.

        Args:
            edge: With the devices that it serves.
            links: Makes the link of one round to them.
            optimizer: The run's optimiser.
            schedule: What is known of its devices.
        """
        self._edge, self._links, self._optimizer, self._schedule = edge, links, optimizer, schedule
        self._replica: Replica | None = None
        self._alone = threading.Lock()

    def answer(self, data: bytes) -> bytes:
        """Decodes an order of the cloud, brings the edge to its version, asks the devices, and encodes the answer."""
        order = decode(data, EdgeOrder)
        plan = order.plan
        with self._alone:
            replica = self._catch_up(order)
        if replica is None or replica.model_version != plan.model_version:
            version = UNKNOWN if replica is None else replica.model_version
            behind = EdgeAnswer(
                edge_id=self._edge.edge_id, model_version=version, report=None, answered=(), forward_passes=0, bytes_down=0, bytes_up=0
            )
            return encode(behind)
        if replica.state_hash != plan.theta_hash:
            self._replica = None
            raise ReplayMismatchError(
                f"round {plan.round_index}: edge {self._edge.edge_id} has {replica.state_hash.hex()}, the plan starts from "
                f"{plan.theta_hash.hex()}; the edge starts again from a snapshot"
            )
        with self._alone:
            scheduled = self._schedule.of(plan)
        bits = {device: one.bits for device, one in scheduled.items()}
        found, spent = ask_edges([self._edge], plan, replica, self._links(), self._alone, bits)
        asked_bits = 0 if plan.feedback is None else plan.feedback.bits
        with self._alone:
            for one in spent if asked_bits else ():
                self._schedule.note(one, packed_bytes(1, self._edge.num_parameters, bits.get(one.node, asked_bits)))
        return encode(
            EdgeAnswer(
                edge_id=self._edge.edge_id,
                model_version=replica.model_version,
                report=found.reports[0],
                answered=found.answered,
                forward_passes=found.forward_passes,
                bytes_down=found.bytes_down,
                bytes_up=found.bytes_up,
                spent=spent,
                scheduled=tuple(scheduled.values()),
            )
        )

    def _catch_up(self, order: EdgeOrder) -> Replica | None:
        """Replays what has come; devices get the same updates from here. A cloud that has come back may be a step behind its edges."""
        version = order.plan.model_version
        if self._replica is None or self._replica.model_version > version:
            num_moments = replay.NUM_MOMENTS[self._optimizer.kind]
            self._replica = None if order.snapshot is None else replay.restore(order.snapshot, self._edge.num_parameters, num_moments)
        if self._replica is not None:
            self._replica = replay.catch_up(self._replica, order.updates, order.snapshot, version, self._optimizer)
            for update in order.updates:
                self._edge.remember(update, len(encode(update)))
        return self._replica


Send = Callable[[Mapping[int, bytes]], Received]
"""Carries bytes to nodes by number and brings back what they answered."""


class RemoteEdges:
    """Edges in processes of their own, from the cloud's side. None is waited for for ever; one that comes back gets what it has missed."""

    def __init__(self, devices: Mapping[int, Collection[int]], send: Send) -> None:
        """Takes the edges.

        Args:
            devices: Of each edge, by its number.
            send: Carries orders; called by a thread for each round under way.
        """
        self._devices, self._tail, self._send = devices, Tail(dict.fromkeys(devices, UNKNOWN)), send
        self._alone = threading.Lock()

    def ask(self, plan: Plan, replica: Replica) -> Future[Answers]:
        """Sends a plan to the edges with a device of its cohort and collects what comes back; who is lost costs its devices this round."""
        with self._alone:  # here, not in the thread, so that each order starts from what the one before leads to
            orders = self._orders(take_part(self._devices, plan), plan, replica)
        future = Future[Answers]()
        threading.Thread(target=self._asked, args=(future, orders, plan, replica), name=f"round {plan.round_index}", daemon=True).start()
        return future

    def remember(self, update: Update) -> None:
        """Keeps the update: it travels with the next plan that needs it."""
        with self._alone:
            self._tail.remember(update, len(encode(update)))

    def _asked(self, future: Future[Answers], orders: Mapping[int, bytes], plan: Plan, replica: Replica) -> None:
        try:
            future.set_result(self._answers(orders, plan, replica))
        except BaseException as error:  # noqa: BLE001 -- whoever waits for the answers raises it
            future.set_exception(error)

    def _answers(self, orders: Mapping[int, bytes], plan: Plan, replica: Replica) -> Answers:
        begun, num_bytes = time.monotonic(), 0
        found, behind, times = list[EdgeAnswer](), list[EdgeAnswer](), dict[int, Spent]()
        for attempt in range(MOST_ASKED):
            later_s = time.monotonic() - begun
            answers, spent, more_bytes = self._exchanged(orders)
            times |= {edge_id: _later(one, later_s) for edge_id, one in spent.items()}
            num_bytes += more_bytes
            found += [answer for answer in answers if answer.report is not None]
            behind = [answer for answer in answers if answer.report is None]
            with self._alone:  # at once, so that no order leaves between what is no longer expected and what is known
                self._tail.settle(orders, plan.model_version)
                self._tail.note([answer.edge_id for answer in answers if answer.report is not None], plan.model_version)
                for answer in behind:
                    self._tail.fall_back(answer.edge_id, answer.model_version if attempt == 0 else UNKNOWN)
                if not behind or attempt == MOST_ASKED - 1:
                    break
                orders = self._orders([answer.edge_id for answer in behind], plan, replica)
        for answer in behind:
            _log.warning("edge %d is lost: version %d found, %d expected", answer.edge_id, answer.model_version, plan.model_version)
        return Answers(
            reports=tuple(answer.report for answer in found if answer.report is not None),
            answered=tuple(sorted(device for answer in found for device in answer.answered)),
            forward_passes=sum(answer.forward_passes for answer in found),
            bytes_down=sum(answer.bytes_down for answer in found),
            bytes_up=sum(answer.bytes_up for answer in found),
            bytes_between=num_bytes,
            edges=tuple(
                EdgeTimes(own=times[answer.edge_id], devices=answer.spent, scheduled=answer.scheduled)
                for answer in found
                if answer.edge_id in times
            ),
        )

    def _orders(self, edge_ids: Collection[int], plan: Plan, replica: Replica) -> dict[int, bytes]:
        orders: dict[int, bytes] = {}
        for edge_id in edge_ids:
            orders[edge_id] = encode(_edge_order(edge_id, plan, replica, self._tail))
        self._tail.expect(orders, plan.model_version)
        return orders

    def _exchanged(self, orders: Mapping[int, bytes]) -> tuple[list[EdgeAnswer], dict[int, Spent], int]:
        received = self._send(orders) if orders else Received(data={}, spent={})
        answers = [found for edge_id, data in sorted(received.data.items()) if (found := _read(data, edge_id)) is not None]
        return answers, dict(received.spent), sum(map(len, (*orders.values(), *received.data.values())))


def _read(data: bytes, edge_id: int) -> EdgeAnswer | None:
    try:
        answer = decode(data, EdgeAnswer)
    except DecodeError as error:
        _log.warning("edge %d is lost: %s", edge_id, error)
        return None
    if answer.edge_id != edge_id or (answer.report is not None and answer.report.edge_id != edge_id):
        _log.warning("edge %d is lost: it answers for edge %d", edge_id, answer.edge_id)
        return None
    return answer
