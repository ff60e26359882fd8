"""Every tier in one process, no engine: the reference link. Messages are encoded and decoded all the same, so that bytes are counted."""

from collections.abc import Sequence

from cooperllm.link.base import Devices, Exchange
from cooperllm.link.codec import decode, encode
from cooperllm.messages import DeviceReport, Order


class Loopback:
    """Asks devices one after the other."""

    def __init__(self, devices: Devices) -> None:
        self._devices = devices

    def exchange(self, orders: Sequence[Order]) -> Exchange:
        """Sends every order and collects every report."""
        sent = [encode(order) for order in orders]
        received = [self._devices.answer(data) for data in sent]
        return Exchange(
            reports=[decode(data, DeviceReport) for data in received],
            bytes_down=sum(map(len, sent)),
            bytes_up=sum(map(len, received)),
            lost=(),
        )
