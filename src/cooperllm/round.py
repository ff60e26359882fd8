"""One round, top to bottom. Read this file first.

    cloud   back-propagates on public data and makes a plan: packed guide, seed, who takes part
    edges   fan the plan out to their devices
    devices measure slopes of their private loss along the agreed directions, with forward passes only
    edges   fold their devices' numbers
    cloud   combines them with its own gradient, steps, and seals an update that every replica replays bit for bit

The rooms know nothing of the link; the link knows nothing of the rooms. Every engine must give the numbers that these functions give with
the loopback link. A round has two halves: where devices may be one round behind (`federation.staleness`), the next one begins before this
one ends, so that devices work while answers travel.
"""

import time
from concurrent.futures import Future
from dataclasses import dataclass

from cooperllm.cloud import Closed, Cloud, Prepared
from cooperllm.config import queries_of_estimates
from cooperllm.tiers import Answers, EdgeTimes, Tiers


@dataclass(frozen=True, kw_only=True, slots=True)
class Begun:
    """A round that is under way.

    Attributes:
        begun_at: When the cloud began to plan, in seconds since 1970.
        asked_at: When the plan left.
        prepared: The plan, and what the cloud keeps to itself.
        answers: What the tiers below come to.
    """

    begun_at: float
    asked_at: float
    prepared: Prepared
    answers: Future[Answers]


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundTimes:
    """When a round was at which tier.

    Attributes:
        begun_at: When the cloud began to plan, in seconds since 1970.
        asked_at: When the plan left.
        answered_at: When the answers had been taken.
        closed_at: When every tier had been told of the step.
        edges: How edges in processes of their own spent the time from `asked_at` on.
    """

    begun_at: float
    asked_at: float
    answered_at: float
    closed_at: float
    edges: tuple[EdgeTimes, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundResult:
    """A finished round and what it cost.

    Attributes:
        closed: The sealed update, the new state and the observed figures.
        public_loss: Loss of the cloud's public batch, or None.
        staleness: Steps that the θ of its plan was behind the one that it stepped from.
        forward_passes: Forward passes of one batch, all devices together.
        queries: Two-point queries of one device.
        answered: Devices that sent a report of this version.
        bytes_down: Bytes to devices.
        bytes_up: Bytes from devices.
        bytes_between: Bytes between cloud and edges, both ways.
        times: When it was at which tier.
    """

    closed: Closed
    public_loss: float | None
    staleness: int
    forward_passes: int
    queries: int
    answered: tuple[int, ...]
    bytes_down: int
    bytes_up: int
    bytes_between: int
    times: RoundTimes


def run_round(cloud: Cloud, tiers: Tiers) -> RoundResult:
    """Runs one round over all tiers: both halves, one after the other; raises what they raise."""
    return end_round(cloud, tiers, begin_round(cloud, tiers))


def begin_round(cloud: Cloud, tiers: Tiers, round_index: int | None = None) -> Begun:
    """Plans a round and asks the tiers below.

    Args:
        cloud: Owner of θ; does not move.
        tiers: Edges and devices, `tiers.py`.
        round_index: Which round, from 0; None for the next one.

    Returns:
        The round, under way.

    Raises:
        DivergenceError: If the public gradient is not finite.
    """
    begun_at = time.time()
    prepared = cloud.plan(round_index)
    asked_at = time.time()
    return Begun(begun_at=begun_at, asked_at=asked_at, prepared=prepared, answers=tiers.ask(prepared.plan, cloud.replica))


def end_round(cloud: Cloud, tiers: Tiers, begun: Begun) -> RoundResult:
    """Waits for the answers, steps, and lets every tier know.

    Args:
        cloud: Owner of θ; moves to the next version.
        tiers: Edges and devices; they remember the update.
        begun: The oldest round under way.

    Returns:
        The round's result.

    Raises:
        QuorumError: If too few devices gave usable reports; nothing has changed then.
    """
    prepared, answers, version = begun.prepared, begun.answers.result(), cloud.replica.model_version
    answered_at = time.time()
    closed = cloud.close(prepared, answers.reports)
    tiers.remember(closed.update)
    return RoundResult(
        closed=closed,
        public_loss=prepared.public_loss,
        staleness=version - prepared.plan.model_version,
        forward_passes=answers.forward_passes,
        queries=_queries(prepared),
        answered=answers.answered,
        bytes_down=answers.bytes_down,
        bytes_up=answers.bytes_up,
        bytes_between=answers.bytes_between,
        times=RoundTimes(
            begun_at=begun.begun_at, asked_at=begun.asked_at, answered_at=answered_at, closed_at=time.time(), edges=answers.edges
        ),
    )


def _queries(prepared: Prepared) -> int:
    """Two forward passes are one query, so each block of an estimate counts as one and two estimates as three."""
    probes, feedback = prepared.plan.probes, prepared.plan.feedback
    columns = len(prepared.public.span) if probes is not None and probes.measures_columns else 0
    random = 0 if probes is None else probes.num_random
    return columns + random + (0 if feedback is None else queries_of_estimates(feedback.num_steps) + len(feedback.blocks))
