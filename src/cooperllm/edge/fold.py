"""Room 2, the edge: fan a plan out, fold reports in.

column slopes    weighted mean and mean square over the edge's devices
random slopes    weighted mean over the devices of a group, one entry per group
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from cooperllm.algorithm.aggregation import weighted_mean
from cooperllm.algorithm.replay import Replica
from cooperllm.messages import DeviceReport, EdgeReport, Grouping, Order, Outcome, Plan, RandomSlopes, Update


class Edge:
    """One edge and its devices.

    It remembers which version each of them has, keeps the updates of the run, and sends a device whatever is shorter: the updates it has
    missed, or a snapshot.

    Attributes:
        edge_id: Number of the edge.
        device_ids: Devices it serves.
    """

    def __init__(self, edge_id: int, device_ids: Sequence[int]) -> None:
        self.edge_id = edge_id
        self.device_ids = tuple(device_ids)
        self._versions = dict.fromkeys(self.device_ids, 0)
        self._updates: list[Update] = []
        self._lengths: list[int] = []

    def remember(self, update: Update, num_bytes: int) -> None:
        """Keeps an update for devices that will need it.

        Args:
            update: Sealed update of the round that just closed.
            num_bytes: Its length on the link.
        """
        self._updates.append(update)
        self._lengths.append(num_bytes)

    def note_version(self, device_ids: Sequence[int], model_version: int) -> None:
        """Records that devices have reached a version: after every round, and for past rounds when a run is resumed."""
        for device_id in set(device_ids) & set(self.device_ids):
            self._versions[device_id] = model_version

    def fan_out(self, plan: Plan, replica: Replica) -> list[Order]:
        """Addresses a plan to the edge's devices of the round's cohort.

        Args:
            plan: The round, as the cloud sent it.
            replica: The edge's own state at the plan's version.

        Returns:
            One order per device, in the order of device numbers. The packed guide is shared, not copied.
        """
        chosen = sorted(set(plan.cohort) & set(self.device_ids))
        return [self._order(device_id, plan, replica) for device_id in chosen]

    def fold(self, plan: Plan, reports: Sequence[DeviceReport], lost: int = 0) -> EdgeReport:
        """Averages the usable reports of the edge's devices; the order of arrival does not matter.

        Args:
            plan: The round.
            reports: What came back, in any order.
            lost: Devices that were asked and did not answer.

        Returns:
            The edge's report; with no usable report its numbers are empty and its weight is 0.
        """
        ordered = sorted(reports, key=lambda report: report.device_id)
        self.note_version([report.device_id for report in ordered if report.model_version == plan.model_version], plan.model_version)
        judged = [(report, _judge(report, plan)) for report in ordered]
        usable = [report for report, outcome in judged if outcome is Outcome.OK]
        dropped = Counter(outcome for _, outcome in judged if outcome is not Outcome.OK)
        dropped[Outcome.LOST] += lost
        weights = [report.num_examples for report in usable]
        nothing = np.zeros(0, np.float32)
        estimates = [report.estimate for report in usable if report.estimate is not None]
        return EdgeReport(
            edge_id=self.edge_id,
            round_index=plan.round_index,
            num_devices=len(usable),
            num_examples=sum(weights),
            dropped={outcome: count for outcome, count in dropped.items() if count},
            column_slopes=weighted_mean([r.column_slopes for r in usable], weights) if usable else nothing,
            column_squares=weighted_mean([r.column_slopes**2 for r in usable], weights) if usable else nothing,
            random_slopes=_by_group(plan, self.edge_id, usable),
            estimate=weighted_mean(estimates, weights) if estimates else None,
            forward_passes=max((report.forward_passes for report in reports), default=0),
        )

    def _order(self, device_id: int, plan: Plan, replica: Replica) -> Order:
        missed = slice(self._versions[device_id], plan.model_version)
        snapshot_bytes = replica.theta.nbytes * (1 + len(replica.moments))
        needs_snapshot = sum(self._lengths[missed]) > snapshot_bytes
        return Order(
            device_id=device_id,
            group=group_of(plan, self.edge_id, device_id),
            plan=plan,
            updates=() if needs_snapshot else tuple(self._updates[missed]),
            snapshot=replica.snapshot() if needs_snapshot else None,
        )


def group_of(plan: Plan, edge_id: int, device_id: int) -> int:
    """Says whose random directions a device probes.

    Args:
        plan: Names the grouping.
        edge_id: The device's edge.
        device_id: The device.

    Returns:
        Number of the group.
    """
    if plan.probes is None or plan.probes.grouping is Grouping.SHARED:
        return 0
    return edge_id if plan.probes.grouping is Grouping.EDGE else device_id


def _judge(report: DeviceReport, plan: Plan) -> Outcome:
    """A report counts only if it answers this very plan."""
    answers = (report.round_index, report.model_version, report.guide_version)
    if answers != (plan.round_index, plan.model_version, plan.guide_version):
        return Outcome.MISMATCH
    if report.outcome is not Outcome.OK:
        return report.outcome
    probes = plan.probes
    expected = (plan.num_columns if probes.measures_columns else 0, probes.num_random) if probes is not None else (0, 0)
    if (len(report.column_slopes), len(report.random_slopes)) != expected or report.num_examples == 0:
        return Outcome.MISMATCH
    numbers = (report.column_slopes, report.random_slopes, *([] if report.estimate is None else [report.estimate]))
    return Outcome.OK if all(np.isfinite(values).all() for values in numbers) else Outcome.NON_FINITE_LOSS


def _by_group(plan: Plan, edge_id: int, usable: Sequence[DeviceReport]) -> tuple[RandomSlopes, ...]:
    groups: dict[int, list[DeviceReport]] = {}
    for report in usable:
        groups.setdefault(group_of(plan, edge_id, report.device_id), []).append(report)
    return tuple(
        RandomSlopes(
            group=group,
            num_examples=sum(report.num_examples for report in members),
            slopes=weighted_mean([report.random_slopes for report in members], [report.num_examples for report in members]),
        )
        for group, members in sorted(groups.items())
        if len(members[0].random_slopes)
    )
