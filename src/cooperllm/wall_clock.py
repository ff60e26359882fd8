"""How long a round would take on real devices, modelled from what was counted.

    T = F / s + 8 B_down / (10⁶ d) + 8 B_up / (10⁶ u) + 2 ℓ        (1)

F forward passes of one batch on a device and B bytes on its link, both as the mean over the devices asked, which work side by side; s
passes a second, d and u Mbit a second, ℓ the latency of one way. A round that asks devices nothing takes no time: the work of cloud and
edges is not modelled.
"""

from dataclasses import dataclass, fields

from cooperllm.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceClock:
    """The speed of one device and its link.

    Attributes:
        forward_passes_per_s: Forward passes of one batch a second, > 0; a backward pass counts as one, as two where all is trained.
        downlink_mbit_per_s: Speed to the device, > 0.
        uplink_mbit_per_s: Speed from the device, > 0.
        latency_s: Latency of one way, >= 0.
    """

    forward_passes_per_s: float = 5.0
    downlink_mbit_per_s: float = 20.0
    uplink_mbit_per_s: float = 5.0
    latency_s: float = 0.05

    def __post_init__(self) -> None:
        for name in ("forward_passes_per_s", "downlink_mbit_per_s", "uplink_mbit_per_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"clock.{name}: found {getattr(self, name)!r}, expected > 0")
        if not self.latency_s >= 0:
            raise ConfigError(f"clock.latency_s: found {self.latency_s!r}, expected >= 0")


DEFAULT_CLOCK = DeviceClock()


def round_seconds(clock: DeviceClock, *, forward_passes: float, bytes_down: float, bytes_up: float) -> float:
    """Models the wall clock of one round, eq. (1).

    Args:
        clock: Speeds.
        forward_passes: Forward passes of one batch on a device, >= 0.
        bytes_down: Bytes to a device, >= 0.
        bytes_up: Bytes from a device, >= 0.

    Returns:
        Seconds; 0 for a round that asks devices nothing.

    Example:
        >>> round_seconds(DeviceClock(), forward_passes=10, bytes_down=250_000, bytes_up=0)  # 2 s + 0.1 s + 2 x 0.05 s
        2.2
    """
    if not (forward_passes or bytes_down or bytes_up):
        return 0.0
    sending = 8e-6 * (bytes_down / clock.downlink_mbit_per_s + bytes_up / clock.uplink_mbit_per_s)
    return forward_passes / clock.forward_passes_per_s + sending + 2 * clock.latency_s


def clock_from(text: str) -> DeviceClock:
    """Reads speeds from a command line.

    Args:
        text: Comma-separated NAME=VALUE with the names of `DeviceClock`; what is left out keeps its default.

    Returns:
        The speeds.

    Raises:
        ConfigError: If a name is unknown or a value is no number in its domain.

    Example:
        >>> clock_from("uplink_mbit_per_s=1,latency_s=0.2").latency_s
        0.2
    """
    known = [field.name for field in fields(DeviceClock)]
    values: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        name, _, value = (piece.strip() for piece in part.partition("="))
        try:
            values[name] = float(value)
        except ValueError as error:
            raise ConfigError(f"clock: found {part!r}, expected NAME=VALUE with a number, NAME one of {', '.join(known)}") from error
        if name not in known:
            raise ConfigError(f"clock: found {name!r}, expected one of {', '.join(known)}")
    return DeviceClock(**values)
