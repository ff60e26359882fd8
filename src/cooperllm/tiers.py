"""The tiers below the cloud, as the cloud sees them: a plan goes in, folded reports come out.

ask_edges        fan a plan out, exchange, fold; devices that turn out to be behind are asked once more with what they lack
LocalEdges       edges in the cloud's process, over any link to devices: simulations
EdgeHost         one edge in a process of its own: bytes of an EdgeOrder in, bytes of an EdgeAnswer out
RemoteEdges      such edges, from the cloud's side
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from cooperllm.algorithm import replay
from cooperllm.algorithm.replay import Replica
from cooperllm.algorithm.tail import UNKNOWN, Tail
from cooperllm.config import OptimizerConfig
from cooperllm.edge import Edge
from cooperllm.errors import DecodeError, ReplayMismatchError
from cooperllm.link.base import Exchange, Link
from cooperllm.link.codec import decode, encode
from cooperllm.messages import EdgeAnswer, EdgeOrder, EdgeReport, Order, Outcome, Plan, Update

_log = logging.getLogger(__name__)


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
    """

    reports: tuple[EdgeReport, ...]
    answered: tuple[int, ...]
    forward_passes: int
    bytes_down: int
    bytes_up: int
    bytes_between: int


@runtime_checkable
class Tiers(Protocol):
    """Edges with their devices, wherever they are."""

    def ask(self, plan: Plan, replica: Replica) -> Answers:
        """Sends a plan to every edge and collects what comes back; who is lost is counted, not raised."""
        ...

    def remember(self, update: Update) -> int:
        """Takes the update that closes a round, and returns the bytes that it takes to the edges now."""
        ...


def ask_edges(edges: Sequence[Edge], plan: Plan, replica: Replica, link: Link) -> Answers:
    """Carries a plan to the devices of edges in this process and folds what they report.

    Args:
        edges: Each with its own devices.
        plan: The round, as it came from the cloud.
        replica: The edges' state at the plan's version.
        link: How orders reach devices.

    Returns:
        One report per edge; nothing has gone between cloud and edges.
    """
    orders = {edge.edge_id: edge.fan_out(plan, replica) for edge in edges}
    exchange = link.exchange([order for edge_orders in orders.values() for order in edge_orders])
    exchange = _second_try(edges, plan, replica, link, exchange)
    by_device = {report.device_id: report for report in exchange.reports}
    reports: list[EdgeReport] = []
    for edge in edges:
        asked = [order.device_id for order in orders[edge.edge_id]]
        answered = [by_device[device_id] for device_id in asked if device_id in by_device]
        reports.append(edge.fold(plan, answered, lost=len(asked) - len(answered)))
    current = [report for report in exchange.reports if report.model_version == plan.model_version and report.outcome is not Outcome.BEHIND]
    return Answers(
        reports=tuple(reports),
        answered=tuple(sorted(report.device_id for report in current)),
        forward_passes=sum(report.forward_passes for report in exchange.reports),
        bytes_down=exchange.bytes_down,
        bytes_up=exchange.bytes_up,
        bytes_between=0,
    )


def _second_try(edges: Sequence[Edge], plan: Plan, replica: Replica, link: Link, first: Exchange) -> Exchange:
    """Asks devices again that have said which version they really have: one that has come back with an empty disk, say."""
    behind = [report for report in first.reports if report.outcome is Outcome.BEHIND]
    again: list[Order] = []
    for edge in edges:
        for report in behind:
            edge.note_version([report.device_id], report.model_version)
        again += [order for order in edge.fan_out(plan, replica) if order.device_id in {report.device_id for report in behind}]
    if not again:
        return first
    second = link.exchange(again)
    replaced = {report.device_id for report in second.reports}
    return Exchange(
        reports=[*(report for report in first.reports if report.device_id not in replaced), *second.reports],
        bytes_down=first.bytes_down + second.bytes_down,
        bytes_up=first.bytes_up + second.bytes_up,
        lost=first.lost,
    )


class LocalEdges:
    """Edges in the cloud's process; messages between them are encoded and decoded all the same, so that bytes are counted."""

    def __init__(self, edges: Sequence[Edge], link: Link) -> None:
        self._edges, self._link = edges, link

    def ask(self, plan: Plan, replica: Replica) -> Answers:
        """Sends a plan to every edge and collects what comes back."""
        packed = encode(plan)
        found = ask_edges(self._edges, decode(packed, Plan), replica, self._link)  # all edges see the same bytes
        reports = [encode(report) for report in found.reports]
        return Answers(
            reports=tuple(decode(report, EdgeReport) for report in reports),
            answered=found.answered,
            forward_passes=found.forward_passes,
            bytes_down=found.bytes_down,
            bytes_up=found.bytes_up,
            bytes_between=len(self._edges) * len(packed) + sum(map(len, reports)),
        )

    def remember(self, update: Update) -> int:
        """Hands the update to every edge."""
        num_bytes = len(encode(update))
        for edge in self._edges:
            edge.remember(update, num_bytes)
        return len(self._edges) * num_bytes


class EdgeHost:
    """One edge in a process of its own."""

    def __init__(self, edge: Edge, link: Link, optimizer: OptimizerConfig) -> None:
        self._edge, self._link, self._optimizer = edge, link, optimizer
        self._replica: Replica | None = None

    def answer(self, data: bytes) -> bytes:
        """Decodes an order of the cloud, brings the edge to its version, asks the devices, and encodes the answer."""
        order = decode(data, EdgeOrder)
        plan = order.plan
        self._catch_up(order)
        replica = self._replica
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
        found = ask_edges([self._edge], plan, replica, self._link)
        return encode(
            EdgeAnswer(
                edge_id=self._edge.edge_id,
                model_version=replica.model_version,
                report=found.reports[0],
                answered=found.answered,
                forward_passes=found.forward_passes,
                bytes_down=found.bytes_down,
                bytes_up=found.bytes_up,
            )
        )

    def _catch_up(self, order: EdgeOrder) -> None:
        """Replays what has come; devices get the same updates from here."""
        if self._replica is None:
            if order.snapshot is None:
                return
            self._replica = replay.restore(order.snapshot, self._edge.num_parameters)
        self._replica = replay.catch_up(self._replica, order.updates, order.snapshot, order.plan.model_version, self._optimizer)
        for update in order.updates:
            self._edge.remember(update, len(encode(update)))


Send = Callable[[Mapping[int, bytes]], Mapping[int, bytes]]
"""Carries bytes to nodes by number and brings back what they answered; who is lost is missing."""


class RemoteEdges:
    """Edges in processes of their own, from the cloud's side. None is waited for for ever; one that comes back gets what it has missed."""

    def __init__(self, edge_ids: Sequence[int], send: Send) -> None:
        self._tail, self._send = Tail(dict.fromkeys(edge_ids, UNKNOWN)), send

    def ask(self, plan: Plan, replica: Replica) -> Answers:
        """Sends a plan to every edge and collects what comes back; an edge that is lost costs its devices this round."""
        answers, num_bytes = self._ask(self._tail.versions, plan, replica)
        behind = [answer.edge_id for answer in answers if answer.report is None]
        for answer in answers:
            self._tail.note([answer.edge_id], answer.model_version)
        second, more_bytes = self._ask(behind, plan, replica)
        found = [answer for answer in (*answers, *second) if answer.report is not None]
        self._tail.note([answer.edge_id for answer in found], plan.model_version)
        return Answers(
            reports=tuple(answer.report for answer in found if answer.report is not None),
            answered=tuple(sorted(device for answer in found for device in answer.answered)),
            forward_passes=sum(answer.forward_passes for answer in found),
            bytes_down=sum(answer.bytes_down for answer in found),
            bytes_up=sum(answer.bytes_up for answer in found),
            bytes_between=num_bytes + more_bytes,
        )

    def remember(self, update: Update) -> int:
        """Keeps the update: it travels with the next plan."""
        self._tail.remember(update, len(encode(update)))
        return 0

    def _ask(self, edge_ids: Sequence[int] | Mapping[int, int], plan: Plan, replica: Replica) -> tuple[list[EdgeAnswer], int]:
        orders: dict[int, bytes] = {}
        for edge_id in edge_ids:
            updates, snapshot = self._tail.missed(edge_id, replica)
            orders[edge_id] = encode(EdgeOrder(edge_id=edge_id, plan=plan, updates=updates, snapshot=snapshot))
        received = self._send(orders) if orders else {}
        answers = [found for edge_id, data in sorted(received.items()) if (found := _read(data, edge_id)) is not None]
        return answers, sum(map(len, orders.values())) + sum(map(len, received.values()))


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
