"""The seam between the rooms and whatever carries their messages."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from cooperllm.messages import DeviceReport, Order, Spent


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """What came back from the devices of a round.

    Attributes:
        reports: Usable or not, in any order.
        bytes_down: Bytes that the devices received.
        bytes_up: Bytes that they sent.
        lost: Devices that were asked and did not answer.
        late: Those of them that were not waited for, because enough others had answered.
        spent: How those that answered spent their time; nothing where they are in this process.
    """

    reports: Sequence[DeviceReport]
    bytes_down: int
    bytes_up: int
    lost: Sequence[int]
    late: tuple[int, ...] = ()
    spent: tuple[Spent, ...] = ()


@runtime_checkable
class Link(Protocol):
    """Carries orders to devices and reports back."""

    def exchange(self, orders: Sequence[Order]) -> Exchange:
        """Sends every order and waits for the answers; a lost device is named, not raised."""
        ...


@runtime_checkable
class Devices(Protocol):
    """The devices of one process: bytes in, bytes out."""

    def answer(self, data: bytes) -> bytes:
        """Handles one encoded order and returns the encoded report."""
        ...
