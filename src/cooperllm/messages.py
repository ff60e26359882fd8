"""What crosses a wall. Frozen, small, checked at construction, and free of any engine's types.

    cloud --Plan--> edge --Order--> device --DeviceReport--> edge --EdgeReport--> cloud,  and an Update closes the round.

Between processes the plan travels in an EdgeOrder, with what the edge has missed, and the report in an EdgeAnswer, with what it cost.

Dimension key: k columns of the span, P random probes of one device, n trainable parameters. The underscore in "_k" says that one message
may hold arrays of different k.

Every message that answers another carries the versions of what it was computed from: `model_version` counts the updates in θ,
`guide_version` the guides made. Groups name who shares random directions: probe j of group g in a round with seed s is the noise
(s, g · 2³² + j), so that whoever knows (s, g) can rebuild it.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Annotated

import numpy as np
from jaxtyping import Float32
from msgspec import Meta

from cooperllm.config import MOST_CANDIDATES, MOST_LOCAL_STEPS, MOST_QUERIES, SUPPORTED_BITS, Distribution

FORMAT_VERSION = 10
"""Raised whenever the bytes of a message, the noise or the replay change: peers of another version are refused."""

Count = Annotated[int, Meta(ge=0, lt=1 << 32)]
Positive = Annotated[int, Meta(ge=1, le=1 << 32)]
Sum = Annotated[int, Meta(ge=0, le=1 << 62)]  # of counts that many senders have named
Steps = Annotated[int, Meta(ge=1, le=MOST_LOCAL_STEPS)]
Seed = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Digest = Annotated[bytes, Meta(min_length=16, max_length=16)]
LARGEST_LOSS = 1e6
Loss = Annotated[float, Meta(ge=-LARGEST_LOSS, le=LARGEST_LOSS)]
"""Bounded, so that no sender can make a mean overflow; a device with a larger one has no finite loss worth the name."""
Seconds = Annotated[float, Meta(ge=0, le=1e7)]
Deviation = Annotated[float, Meta(ge=0, le=LARGEST_LOSS)]


class Outcome(Enum):
    """How a device's work ended. A bad device is data, not an exception."""

    OK = "ok"
    NON_FINITE_LOSS = "non-finite loss"
    LOST = "lost"
    LATE = "not waited for"
    MISMATCH = "answers another plan"
    STALE = "of a θ that was given up"
    BEHIND = "does not reach the plan's version"


class StepKind(Enum):
    """What an update does: a step; nothing, its terms may be named again later; a step from moments of zero; or a way back."""

    STEP = "step"
    HOLD = "hold"
    RESTART = "restart"
    ROLLBACK = "rollback"


class Grouping(Enum):
    """Who shares a round's random directions."""

    SHARED = "shared"
    EDGE = "edge"
    DEVICE = "device"


@dataclass(frozen=True, kw_only=True, slots=True)
class Guide:
    """Directions that the cloud learnt from public data, packed for the link.

    Attributes:
        payload: Output of `algorithm.compression.pack`: the columns before orthonormalisation, then the basis of random probes.
        num_columns: How many of the rows are columns; the rest is the basis.
        has_momentum: Whether the server's momentum, which every replica holds, is the first column of the span.
    """

    payload: bytes
    num_columns: Count
    has_momentum: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Maps:
    """The other kind of guide: how gradients reach the layers below the last one, learnt on public text; whole, or what has changed.

    Attributes:
        version: Updates in the θ that they were fitted at.
        base_version: Version of the maps that these are added to; -1 for whole maps.
        num_directions: Directions K of the last hidden state; 0 in a difference, which has those of the whole maps.
        directions: q [K, D], packed; None in a difference.
        num_components: Columns c of each basis; 0 in a difference.
        basis: V [D, c] of each mapped layer, packed as one vector; None in a difference.
        rank: Rows r of each factor.
        factors: A [r, K (1 + 2c)] and B [r, D] of each mapped layer, packed as one vector.
    """

    version: Count
    base_version: Annotated[int, Meta(ge=-1, le=1 << 32)]
    num_directions: Count
    directions: bytes | None
    num_components: Count
    basis: bytes | None
    rank: Count
    factors: bytes

    def __post_init__(self) -> None:
        if {self.base_version == -1, self.basis is not None, self.directions is not None} not in ({True}, {False}):
            raise ValueError(
                f"maps: base version {self.base_version} found; whole maps (-1) have directions and a basis, differences have none"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Feedback:
    """Asks a device for an estimate of its gradient, and how much of it is true.

    Attributes:
        maps_version: Version of the maps to use; -1 when there are none, and layers below the last one get its gradient.
        blocks: Half-open ranges of θ; one two-point slope is measured along the estimate's part in each.
        bits: Bits per entry of the estimate on the link: 1, 2, 4, 8 or 32.
        slope_scale: Half-step μ of those slopes, > 0.
        num_steps: Estimates to make, each on a batch of its own and a step away from the one before; their mean is reported.
        step_size: Size of those steps, > 0.
    """

    maps_version: int
    blocks: tuple[tuple[Count, Count], ...]
    bits: Count
    slope_scale: Annotated[float, Meta(gt=0)]
    num_steps: Steps = 1
    step_size: Annotated[float, Meta(gt=0)] = 0.1

    def __post_init__(self) -> None:
        if self.bits not in SUPPORTED_BITS:
            raise ValueError(f"feedback: {self.bits} bits found, one of {SUPPORTED_BITS} expected")
        edges = [0, *(edge for block in self.blocks for edge in block)]
        if edges != sorted(edges) or any(start == stop for start, stop in self.blocks):
            raise ValueError(f"feedback: blocks {self.blocks} found, ranges in order that share no position expected")


@dataclass(frozen=True, kw_only=True, slots=True)
class Probes:
    """What a device measures: two-point slopes, and nothing else.

    Attributes:
        measures_columns: Whether the slope along every column of the span is measured.
        num_random: Random directions P per device, >= 0.
        grouping: Who shares random directions.
        column_scale: Half-step μ along a unit column, > 0.
        random_scale: Half-step μ along a random direction, > 0.
        blend: Share α of the isotropic part in a guided perturbation, in [0, 1]; None leaves random directions as they are.
        blend_scale: Length β of a guided perturbation, > 0.
        pool_seed: Names the pool that random directions are drawn from, member k being the noise (pool_seed, k); None makes new ones.
        pool_size: Members of the pool.
        num_candidates: Random directions made for each query, of which the one that lies most along the first column is used.
        distribution: Of the entries of isotropic random directions.
    """

    measures_columns: bool
    num_random: Annotated[int, Meta(ge=0, le=MOST_QUERIES)]
    grouping: Grouping
    column_scale: float
    random_scale: float
    blend: float | None = None
    blend_scale: float = 1.0
    pool_seed: Seed | None = None
    pool_size: Positive = 1
    num_candidates: Positive = 1
    distribution: Distribution = Distribution.NORMAL

    def __post_init__(self) -> None:
        if not (self.column_scale > 0 and self.random_scale > 0 and self.blend_scale > 0):
            raise ValueError("probes: every scale must be > 0")
        if self.num_random * self.num_candidates > MOST_CANDIDATES:
            raise ValueError(f"probes: {self.num_random} times {self.num_candidates} candidates found, {MOST_CANDIDATES} at most expected")
        if self.blend is not None and not 0 <= self.blend <= 1:
            raise ValueError(f"probes: blend {self.blend} is outside [0, 1]")


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalTraining:
    """Back-propagation on the device: the upper bound that federated averaging gives, not something a small device can do.

    Attributes:
        num_steps: Local gradient steps.
        learning_rate: Local step size, > 0.
        checkpoints_activations: Whether a layer keeps its input alone and runs again for its backward pass: memory for time.
    """

    num_steps: Steps
    learning_rate: Annotated[float, Meta(gt=0)]
    checkpoints_activations: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Cloud to edges: one round.

    Attributes:
        round_index: From 0.
        model_version: Updates contained in the θ that the round starts from.
        guide_version: Number of the guide, from 0; -1 when the round has none.
        theta_hash: Digest of the replica's state at `model_version`.
        seed: Names the round's random directions and batches.
        cohort: Devices taking part.
        batch_size: Examples per device.
        guide: Packed guide, or None.
        guide_hash: Digest of the decoded span and basis; both empty without a guide.
        num_columns: Columns k of that span.
        probes: Slopes to measure, or None.
        local_training: The alternative to probes, or None.
        feedback: An estimate to make, beside the probes, or None.
        maps: What a receiver lacks of the maps that `feedback` names: whole maps, differences since, or nothing.
        lookahead_rate: Step size of the step that this θ lacks and that devices are to guess, `algorithm.replay`, eq. (5); 0 for none.
        signal_to_noise: How many times its own rounding a two-point slope is to be: devices that round lengthen half-steps for it; >= 0.
    """

    round_index: Count
    model_version: Count
    guide_version: int
    theta_hash: Digest
    seed: Seed
    cohort: tuple[Count, ...]
    batch_size: Positive
    guide: Guide | None
    guide_hash: Digest
    num_columns: Count
    probes: Probes | None = None
    local_training: LocalTraining | None = None
    feedback: Feedback | None = None
    maps: tuple[Maps, ...] = ()
    lookahead_rate: Annotated[float, Meta(ge=0, le=1e6)] = 0.0
    signal_to_noise: Annotated[float, Meta(ge=0)] = 0.0
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """Names random directions that are not the first ones of their group and round: a pool (group 0) or another round, and positions."""

    seed: Seed
    group: Count
    positions: tuple[Count, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomTerm:
    """The part of an update that lies along one group's random directions.

    Attributes:
        group: Who measured along them.
        coefficients: One number per direction, shape [P].
        chosen: Which directions; None means the first P of the group in the update's own round.
    """

    group: Count
    coefficients: Float32[np.ndarray, "_P"]
    chosen: Chosen | None = None

    def __post_init__(self) -> None:
        if self.chosen is not None and len(self.chosen.positions) != len(self.coefficients):
            raise ValueError(f"term: {len(self.chosen.positions)} positions found, {len(self.coefficients)} expected")


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """One step of θ in coordinates that every replica can rebuild: the record of the replay log.

    Attributes:
        round_index: Round it closes.
        model_version: Version it applies to; the result has the next one.
        seed: The round's seed, from which random directions are rebuilt.
        learning_rate: Step size, >= 0.
        guide: Packed guide whose columns the coefficients belong to, or None.
        column_coefficients: One number per column of the span, shape [k].
        random_terms: Parts along random directions.
        dense: A direction in full, packed, or None; for a way back, θ itself, exactly.
        loss: Mean loss of the round's devices at the θ of its plan (with staleness the one before the step's); None where none was asked.
        theta_hash: Digest of the replica's state after the step.
        kind: Whether it moves the replica.
        distribution: Of the entries of the random directions.
    """

    round_index: Count
    model_version: Count
    seed: Seed
    learning_rate: Annotated[float, Meta(ge=0)]
    guide: Guide | None
    column_coefficients: Float32[np.ndarray, "_k"]
    random_terms: tuple[RandomTerm, ...]
    dense: bytes | None
    loss: Loss | None
    theta_hash: Digest
    kind: StepKind = StepKind.STEP
    distribution: Distribution = Distribution.NORMAL


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """A replica's whole state, for whoever cannot replay.

    Attributes:
        model_version: Updates contained.
        theta: Parameters θ, shape [n].
        moments: The server optimiser's vectors, each of shape [n].
    """

    model_version: Count
    theta: Float32[np.ndarray, "_n"]
    moments: tuple[Float32[np.ndarray, "_n"], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """Edge to device: the plan and what the device needs to reach its version, the shorter of a tail of updates and a snapshot.

    Attributes:
        device_id: Addressee.
        group: Whose random directions it probes.
        plan: The round.
        updates: Updates the device has missed, oldest first.
        snapshot: Whole state instead of updates, or None.
    """

    device_id: Count
    group: Count
    plan: Plan
    updates: tuple[Update, ...]
    snapshot: Snapshot | None


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceReport:
    """Device to edge: a few numbers and a weight; never data, never parameters.

    Attributes:
        device_id: Sender.
        round_index: Round it answers.
        model_version: Version of θ the numbers were measured at.
        guide_version: Version of the guide they were measured along.
        num_examples: Private examples behind the numbers: the report's weight.
        outcome: How the work ended; numbers of any outcome but OK are not used.
        loss: Mean loss of a batch at that θ; where there is nothing but slopes, the mean at the points they were measured between. 0 where
            it is not finite.
        column_slopes: Slopes along the span's columns, shape [k].
        random_slopes: Slopes along random (or guided) directions, shape [P].
        column_deviation: Standard deviation that each column slope owes to the device's rounding, 0 where there is none to speak of.
        random_deviation: The same of each random slope.
        estimate: An estimate of the private gradient in full, packed, where the plan asked for one.
        agreement: <g, ê_b> of each block of that estimate, measured as slopes, shape [b].
        energy: |ê_b|² of each block, shape [b].
        forward_passes: Forward passes of one batch that the work took; a backward pass counts as one, or two where all weights are trained.
    """

    device_id: Count
    round_index: Count
    model_version: Count
    guide_version: int
    num_examples: Count
    outcome: Outcome
    loss: Loss
    column_slopes: Float32[np.ndarray, "_k"]
    random_slopes: Float32[np.ndarray, "_P"]
    column_deviation: Deviation
    random_deviation: Deviation
    estimate: bytes | None
    agreement: Float32[np.ndarray, "_b"]
    energy: Float32[np.ndarray, "_b"]
    forward_passes: Count


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomSlopes:
    """Slopes of one group along its own random directions.

    Attributes:
        group: Whose directions.
        num_examples: Examples that the slopes are worth, `algorithm.aggregation`, eq. (3).
        slopes: Weighted mean over the group's devices, shape [P].
    """

    group: Count
    num_examples: Sum
    slopes: Float32[np.ndarray, "_P"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EdgeReport:
    """Edge to cloud: its devices' numbers, folded.

    Attributes:
        edge_id: Sender.
        round_index: Round it answers.
        num_devices: Usable reports folded.
        num_examples: Examples behind them.
        dropped: Reports not used, by outcome.
        loss: Weighted mean of the devices' losses; 0 without a usable report.
        column_slopes: Weighted mean slope along each column, shape [k].
        column_squares: Weighted mean of squared slopes, shape [k]: with the mean it gives the spread between devices.
        random_slopes: One entry per group.
        estimate: Weighted mean of the devices' estimates, packed, or None.
        agreement: Weighted mean of the devices' agreements, shape [b].
        energy: Weighted mean of the devices' energies, shape [b].
        forward_passes: Largest number of forward passes that one device took.
    """

    edge_id: Count
    round_index: Count
    num_devices: Count
    num_examples: Sum
    dropped: dict[Outcome, Count]
    loss: Loss
    column_slopes: Float32[np.ndarray, "_k"]
    column_squares: Float32[np.ndarray, "_k"]
    random_slopes: tuple[RandomSlopes, ...]
    estimate: bytes | None
    agreement: Float32[np.ndarray, "_b"]
    energy: Float32[np.ndarray, "_b"]
    forward_passes: Count


@dataclass(frozen=True, kw_only=True, slots=True)
class Spent:
    """How a node and its link spent their time on one message; the parts follow each other.

    Attributes:
        node: Device or edge.
        begun_s: When the message left, in seconds since its sender began the round.
        received_s: Until the node had all of it, as far as the node knows: from when it heard of the message.
        waited_s: In the node's hand, while it was at work on another one.
        worked_s: At work on it; an edge waits for its devices in this time.
        returned_s: The rest, until the answer was there: its way back, and the way that the node could not see.
    """

    node: Count
    begun_s: Seconds
    received_s: Seconds
    waited_s: Seconds
    worked_s: Seconds
    returned_s: Seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheduled:
    """What an edge has decided for a device, and what it expects of it.

    Attributes:
        bits: Bits per entry of the device's estimate.
        expected: How it will spend its time, from the moment its order leaves.
    """

    bits: Count
    expected: Spent


@dataclass(frozen=True, kw_only=True, slots=True)
class EdgeOrder:
    """Cloud to an edge in a process of its own: the plan and what the edge needs to reach its version.

    Attributes:
        edge_id: Addressee.
        plan: The round.
        updates: Updates the edge has missed, oldest first; beside a snapshot those that its devices may have missed.
        snapshot: Whole state, or None where the updates lead there.
    """

    edge_id: Count
    plan: Plan
    updates: tuple[Update, ...]
    snapshot: Snapshot | None


@dataclass(frozen=True, kw_only=True, slots=True)
class EdgeAnswer:
    """Edge in a process of its own to the cloud.

    Attributes:
        edge_id: Sender.
        model_version: Version of the edge's state, which need not be the plan's; -1 without one.
        report: Its devices' numbers; None where it cannot reach the plan's version.
        answered: Devices that sent a report of this version.
        forward_passes: Forward passes of one batch, all devices together.
        bytes_down: Bytes to devices.
        bytes_up: Bytes from devices.
        spent: How each device spent its time, since the edge began.
        scheduled: What the edge expected of those that it knew something of.
    """

    edge_id: Count
    model_version: Annotated[int, Meta(ge=-1, le=1 << 32)]
    report: EdgeReport | None
    answered: tuple[Count, ...]
    forward_passes: Sum
    bytes_down: Annotated[int, Meta(ge=0)]
    bytes_up: Annotated[int, Meta(ge=0)]
    spent: tuple[Spent, ...] = ()
    scheduled: tuple[Scheduled, ...] = ()
