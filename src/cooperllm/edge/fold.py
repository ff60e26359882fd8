"""Room 2, the edge: fan a plan out, fold reports in.

column slopes    weighted mean and mean square over the edge's devices, less of those whose rounding drowns them
random slopes    weighted mean over the devices of a group, one entry per group, in the same way
estimates        weighted mean over the edge's devices, rounded without bias: only a sum leaves the edge
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import numpy as np
from jaxtyping import Float32

from cooperllm.algorithm.aggregation import merged, weighted_mean, weighted_number, worth
from cooperllm.algorithm.asked import are_usable, group_of, lengths_of, wants_estimate
from cooperllm.algorithm.compression import EXACT, LARGEST, LARGEST_TO_FOLD, pack_unbiased, unpack_vector
from cooperllm.algorithm.maps import joined, missing
from cooperllm.algorithm.replay import Replica
from cooperllm.algorithm.tail import Tail
from cooperllm.errors import DecodeError
from cooperllm.messages import DeviceReport, EdgeReport, Maps, Order, Outcome, Plan, RandomSlopes, Update

EDGE_ROUNDING = 1 << 33
"""Noise indices from here on round what edges send; those below round what the device of that number sends."""

BITS_OF_MEANS = 8
"""Bits per entry of an edge's mean at least: its rounding has few others to average out against, and its link is no device's."""


NO_BITS: Mapping[int, int] = MappingProxyType({})


class Edge:
    """One edge and its devices.

    It remembers which version each of them has, keeps the updates of the run, and sends a device whatever is shorter: the updates it has
    missed, or a snapshot. Whole maps and the differences since are kept for the devices that do not have them yet.

    Attributes:
        edge_id: Number of the edge.
        device_ids: Devices it serves.
        num_parameters: n, the length of an estimate.
    """

    def __init__(self, edge_id: int, device_ids: Sequence[int], num_parameters: int) -> None:
        self.edge_id = edge_id
        self.device_ids = tuple(device_ids)
        self.num_parameters = num_parameters
        self._maps: tuple[Maps, ...] = ()
        self._maps_versions: dict[int, int] = {}
        self._tail = Tail(dict.fromkeys(self.device_ids, 0))

    def remember(self, update: Update, num_bytes: int) -> None:
        """Keeps an update for devices that will need it.

        Args:
            update: Sealed update of the round that just closed.
            num_bytes: Its length on the link.
        """
        self._tail.remember(update, num_bytes)

    def note_version(self, device_ids: Sequence[int], model_version: int) -> None:
        """Records that devices have reached a version: after every round, and for past rounds when a run is resumed."""
        self._tail.note(device_ids, model_version)

    def fall_back(self, device_id: int, model_version: int) -> None:
        """Records that a device has another version than it was thought to have."""
        self._tail.fall_back(device_id, model_version)

    def fan_out(self, plan: Plan, replica: Replica, bits: Mapping[int, int] = NO_BITS) -> list[Order]:
        """Addresses a plan to the edge's devices of the round's cohort.

        Args:
            plan: The round, as the cloud sent it.
            replica: The edge's own state at the plan's version.
            bits: Bits per entry of some devices' estimates, where they are not the plan's.

        Returns:
            One order per device, in the order of device numbers. The packed guide is shared, not copied.

        Raises:
            ProtocolError: If a difference of maps came without what it is a difference to.
        """
        self._maps = joined(self._maps, plan.maps)
        chosen = sorted(set(plan.cohort) & set(self.device_ids))
        orders = [self._order(device_id, _with_bits(plan, bits.get(device_id)), replica) for device_id in chosen]
        self._tail.expect(chosen, plan.model_version)
        return orders

    def fold(self, plan: Plan, reports: Sequence[DeviceReport], lost: int = 0, late: int = 0) -> EdgeReport:
        """Averages the usable reports of the edge's devices; the order of arrival does not matter.

        Args:
            plan: The round.
            reports: What came back, in any order.
            lost: Devices that were asked and did not answer.
            late: Those that were not waited for.

        Returns:
            The edge's report; with no usable report its numbers are empty and its weight is 0.
        """
        ordered = sorted(reports, key=lambda report: report.device_id)
        self._tail.settle(plan.cohort, plan.model_version)
        for report in ordered:
            if report.outcome is Outcome.BEHIND:
                self.fall_back(report.device_id, report.model_version)
            elif report.model_version == plan.model_version:
                self.note_version([report.device_id], report.model_version)
        judged = [(report, *_judge(report, plan, self.num_parameters)) for report in ordered]
        usable = [report for report, outcome, _ in judged if outcome is Outcome.OK]
        if plan.feedback is not None:
            self._maps_versions |= dict.fromkeys((report.device_id for report in usable), plan.feedback.maps_version)
        dropped = Counter(outcome for _, outcome, _ in judged if outcome is not Outcome.OK)
        dropped[Outcome.LOST] += lost
        dropped[Outcome.LATE] += late
        weights = [report.num_examples for report in usable]
        of_columns = worth(weights, [r.column_deviation for r in usable], [r.column_slopes for r in usable])
        of_random = worth(weights, [r.random_deviation for r in usable], [r.random_slopes for r in usable])
        nothing = np.zeros(0, np.float32)
        estimates = [estimate for _, outcome, estimate in judged if outcome is Outcome.OK and estimate is not None]
        bits = EXACT if plan.feedback is None else max(plan.feedback.bits, BITS_OF_MEANS)
        return EdgeReport(
            edge_id=self.edge_id,
            round_index=plan.round_index,
            num_devices=len(usable),
            num_examples=sum(weights),
            dropped={outcome: count for outcome, count in dropped.items() if count},
            loss=weighted_number([r.loss for r in usable], weights),
            column_slopes=weighted_mean([r.column_slopes for r in usable], of_columns) if usable else nothing,
            column_squares=weighted_mean([r.column_slopes**2 for r in usable], of_columns) if usable else nothing,
            random_slopes=merged([
                RandomSlopes(group=group_of(plan, self.edge_id, report.device_id), num_examples=examples, slopes=report.random_slopes)
                for report, examples in zip(usable, of_random, strict=True)
                if len(report.random_slopes)
            ]),
            estimate=pack_unbiased(weighted_mean(estimates, weights), bits, plan.seed, EDGE_ROUNDING | self.edge_id) if estimates else None,
            agreement=weighted_mean([r.agreement for r in usable], weights) if usable else nothing,
            energy=weighted_mean([r.energy for r in usable], weights) if usable else nothing,
            forward_passes=max((report.forward_passes for report in reports), default=0),
        )

    def _order(self, device_id: int, plan: Plan, replica: Replica) -> Order:
        updates, snapshot = self._tail.missed(device_id, replica)
        has_maps = plan.feedback is not None and plan.feedback.maps_version >= 0
        return Order(
            device_id=device_id,
            group=group_of(plan, self.edge_id, device_id),
            plan=replace(plan, maps=missing(self._maps, self._maps_versions.get(device_id, -1)) if has_maps else ()),
            updates=updates,
            snapshot=snapshot,
        )


def _with_bits(plan: Plan, bits: int | None) -> Plan:
    return plan if bits is None or plan.feedback is None else replace(plan, feedback=replace(plan.feedback, bits=bits))


def devices_of(edge: int, num_edges: int, num_devices: int) -> range:
    """Deals devices out to edges in turn, in simulations as in deployments.

    Args:
        edge: Number of an edge.
        num_edges: How many there are.
        num_devices: How many devices.

    Returns:
        The edge's devices.

    Example:
        >>> list(devices_of(1, 2, 5))
        [1, 3]
    """
    return range(edge, num_devices, num_edges)


def _judge(report: DeviceReport, plan: Plan, num_parameters: int) -> tuple[Outcome, Float32[np.ndarray, "n"] | None]:
    """A report counts only if it answers this very plan; its estimate is decoded on the way."""
    if report.outcome is Outcome.BEHIND:
        return Outcome.BEHIND, None
    answers = (report.round_index, report.model_version, report.guide_version)
    if answers != (plan.round_index, plan.model_version, plan.guide_version):
        return Outcome.MISMATCH, None
    if report.outcome is not Outcome.OK:
        return report.outcome, None
    columns, random, blocks = lengths_of(plan)
    lengths = tuple(map(len, (report.column_slopes, report.random_slopes, report.agreement, report.energy)))
    has_what_was_asked = lengths == (columns, random, blocks, blocks) and wants_estimate(plan) == (report.estimate is not None)
    if not has_what_was_asked or report.num_examples == 0:
        return Outcome.MISMATCH, None
    try:
        estimate = None if report.estimate is None else unpack_vector(report.estimate, num_parameters, LARGEST_TO_FOLD)
    except DecodeError:
        return Outcome.MISMATCH, None
    is_usable = are_usable(report.column_slopes, report.random_slopes) and are_usable(report.agreement, report.energy, largest=LARGEST)
    return (Outcome.OK if is_usable else Outcome.NON_FINITE_LOSS), estimate
