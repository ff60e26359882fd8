"""The edge's controller: how many bits each device's estimate gets, from what its link and its work were seen to take.

    u_i(b) = u_i (B(b) + H) / (B(b_i) + H)                            (1)  seconds that an answer of b bits an entry travels
    T_i(b) = max( w_i, (r_i + w_i + u_i(b)) / (1 + s) )               (2)  seconds from one answer of a device to its next
    f(b)   = 1 + 2 v(b) / D                                           (3)  rounds that rounding costs, as a factor
    b_i    = argmin_b  f(b) max( T_i(b), median_j T_j(b_least) )      (4)

r, w and u are the medians of what was last seen of a device: receiving an order, working on it, returning an answer of B bytes and H bytes
around it. With staleness s = 1 one answer travels while the next is worked on, and bits are only taken from a device whose link is
slower than its processor. No device gets fewer bits than make it as fast as most: it would not shorten the round. v(b) is what unbiased
rounding adds to an estimate's energy, D the devices whose estimates are averaged. The 2 fits what one bit was seen to cost.

The median of three takes a link that has changed for what it is after two rounds, and an outlier for what it is at once.

References:
    benchmarks/results/compression_minilm_x86_64_2026-11-21.md, v and the factor of eq. (3): 1.2 times the rounds at one bit, five devices.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from cooperllm.algorithm.compression import packed_bytes
from cooperllm.messages import Plan, Scheduled, Spent

ADDED_ENERGY = {1: 0.572, 2: 0.135, 4: 0.012, 8: 0.0001}
"""v(b) of eq. (3): 1 / κ - 1 with the energy κ that the codec keeps of normal entries."""

BYTES_AROUND = 2_500
"""H of eq. (1): signed requests, TLS and headers around one answer, counted on the wire (benchmarks/results/scale_x86_64_2026-11-21.md)."""

SEEN = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """What a device and its link are expected to take.

    Attributes:
        received_s: Receiving an order, r.
        worked_s: Working on it, w.
        returned_s: Returning an answer, u.
        num_bytes: Length of that answer, B, >= 0.
    """

    received_s: float
    worked_s: float
    returned_s: float
    num_bytes: int

    def returned_with(self, num_bytes: int) -> float:
        """Seconds that an answer of another length would travel, eq. (1)."""
        return self.returned_s * (num_bytes + BYTES_AROUND) / (self.num_bytes + BYTES_AROUND)


def period_s(pace: Pace, num_bytes: int, staleness: int) -> float:
    """Seconds from one answer of a device to its next, eq. (2).

    Args:
        pace: Of the device.
        num_bytes: Length of its answers.
        staleness: Rounds that it may be behind, 0 or 1.

    Returns:
        Seconds.

    Example:
        >>> pace = Pace(received_s=1.0, worked_s=2.0, returned_s=3.0, num_bytes=100)
        >>> period_s(pace, 100, 0), period_s(pace, 100, 1)
        (6.0, 3.0)
    """
    return max(pace.worked_s, (pace.received_s + pace.worked_s + pace.returned_with(num_bytes)) / (1 + staleness))


def bits_of_devices(paces: Mapping[int, Pace], num_parameters: int, most_bits: int, staleness: int, num_averaged: int) -> dict[int, int]:
    """Chooses the bits of every device's estimate, eq. (4).

    Args:
        paces: Of the devices that something is known of.
        num_parameters: n, >= 1.
        most_bits: Bits that the plan asks for; nobody gets more.
        staleness: Rounds that devices may be behind, 0 or 1.
        num_averaged: Devices D of the whole round, >= 1.

    Returns:
        Bits of each of them; of two choices that are as good the one with more bits.

    Example:
        >>> fast = Pace(received_s=0.1, worked_s=1.0, returned_s=0.1, num_bytes=13_000)
        >>> slow = Pace(received_s=0.5, worked_s=1.0, returned_s=9.0, num_bytes=13_000)
        >>> bits_of_devices({0: fast, 1: fast, 2: slow}, 25_000, 4, 0, 5)
        {0: 4, 1: 4, 2: 1}
    """
    lengths = {bits: packed_bytes(1, num_parameters, bits) for bits in ADDED_ENERGY if bits <= most_bits}
    if not lengths or not paces:
        return {}
    least_s = median(period_s(pace, lengths[min(lengths)], staleness) for pace in paces.values())

    def cost(pace: Pace, bits: int) -> float:
        return (1 + 2 * ADDED_ENERGY[bits] / num_averaged) * max(period_s(pace, lengths[bits], staleness), least_s)

    return {device: min(lengths, key=lambda bits: (cost(pace, bits), -bits)) for device, pace in paces.items()}


class Schedule:
    """What an edge has seen of its devices, and what it makes of that."""

    def __init__(self, num_parameters: int, staleness: int, *, adapts: bool) -> None:
        """Begins with nothing seen.

        Args:
            num_parameters: n.
            staleness: Rounds that devices may be behind.
            adapts: Whether bits follow; otherwise they are the plan's, and what is expected is still told.
        """
        self._num_parameters, self._staleness, self._adapts = num_parameters, staleness, adapts
        self._seen: dict[int, deque[Pace]] = {}

    def note(self, spent: Spent, num_bytes: int) -> None:
        """Keeps what a device's answer took.

        Args:
            spent: Of the device.
            num_bytes: Length of its estimate.
        """
        seen = Pace(received_s=spent.received_s, worked_s=spent.worked_s, returned_s=spent.returned_s, num_bytes=num_bytes)
        self._seen.setdefault(spent.node, deque(maxlen=SEEN)).append(seen)

    def of(self, plan: Plan) -> dict[int, Scheduled]:
        """Schedules a round.

        Args:
            plan: The round.

        Returns:
            Bits of each device of the cohort that something is known of, and how it is expected to spend its time; nothing where devices
            send no estimates.
        """
        if plan.feedback is None:
            return {}
        paces = {device: _usual(seen) for device, seen in self._seen.items() if device in plan.cohort}
        most_bits, size = plan.feedback.bits, self._num_parameters
        bits = bits_of_devices(paces, size, most_bits, self._staleness, len(plan.cohort)) if self._adapts else {}
        return {device: _scheduled(device, pace, bits.get(device, most_bits), size) for device, pace in paces.items()}


def _usual(seen: "deque[Pace]") -> Pace:
    """The median of each part; answers are scaled to the length of the latest one, eq. (1)."""
    latest = seen[-1]
    return Pace(
        received_s=median(pace.received_s for pace in seen),
        worked_s=median(pace.worked_s for pace in seen),
        returned_s=median(pace.returned_with(latest.num_bytes) for pace in seen),
        num_bytes=latest.num_bytes,
    )


def _scheduled(device: int, pace: Pace, bits: int, size: int) -> Scheduled:
    expected = Spent(
        node=device,
        begun_s=0.0,
        received_s=pace.received_s,
        waited_s=0.0,
        worked_s=pace.worked_s,
        returned_s=pace.returned_with(packed_bytes(1, size, bits)),
    )
    return Scheduled(bits=bits, expected=expected)
