"""What a process of each tier reads at its start: one TOML file, whose paths are relative to it, and the job that all tiers share."""

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from cooperllm.config import RunConfig
from cooperllm.errors import ConfigError

Settings = TypeVar("Settings", "CloudSettings", "EdgeSettings", "DeviceSettings")
Positive = Annotated[float, Meta(gt=0)]
Number = Annotated[int, Meta(ge=0, le=1 << 32)]


class CloudSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of `cooperllm cloud`.

    Attributes:
        run: Run directory.
        listen: HOST:PORT for the edges.
        edges: Directory with the public key of every edge, NUMBER.pem.
        certificate: What the cloud shows; None only in plain text.
        certificate_key: Its private key.
        node_authority: Certificate that every edge's own is signed by; None asks edges for no certificate.
        insecure: Plain text, on this machine alone.
        round_timeout_s: Seconds after which an edge that has not answered is lost to the round.
    """

    run: Path
    listen: str
    edges: Path
    certificate: Path | None = None
    certificate_key: Path | None = None
    node_authority: Path | None = None
    insecure: bool = False
    round_timeout_s: Positive = 900.0


class EdgeSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of `cooperllm edge`.

    Attributes:
        number: Of this edge, from 0.
        job: The job's file.
        cloud: HOST:PORT of the cloud.
        key: This edge's private key towards the cloud.
        node_certificate: The certificate for that key, where the cloud wants to see one.
        authority: Certificate that the cloud's is signed by; None only in plain text.
        listen: HOST:PORT for the devices.
        devices: Directory with the public key of every device, NUMBER.pem.
        certificate: What the edge shows its devices; None only in plain text.
        certificate_key: Its private key.
        node_authority: Certificate that every device's own is signed by; None asks devices for no certificate.
        supernode: The signature of what devices on Flower's official SuperNode are told to start; None lets none of them work.
        insecure: Plain text, on this machine alone.
        round_timeout_s: Seconds after which a device that has not answered is lost to the round; less than the cloud's.
    """

    number: Number
    job: Path
    cloud: str
    key: Path
    node_certificate: Path | None = None
    authority: Path | None = None
    listen: str
    devices: Path
    certificate: Path | None = None
    certificate_key: Path | None = None
    node_authority: Path | None = None
    supernode: Path | None = None
    insecure: bool = False
    round_timeout_s: Positive = 600.0


class DeviceSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of `cooperllm device`.

    Attributes:
        number: Of this device, from 0.
        job: The job's file.
        edge: HOST:PORT of its edge.
        key: This device's private key.
        node_certificate: The certificate for that key, where the edge wants to see one.
        authority: Certificate that the edge's is signed by; None only in plain text.
        package: Directory of the device package.
        data: Private texts, a JSON object a line: text, label (a number or a class's name), and text2 for pairs.
        state: Directory for what survives a restart.
        insecure: Plain text, on this machine alone.
        memory_mib: Memory of the whole process; None takes the settings that suit a device of which nothing is known.
        cache_mib: The most that states of frozen layers may take on disk, where a memory limit puts them there.
        threads: Threads of one operator.
    """

    number: Number
    job: Path
    edge: str
    key: Path
    node_certificate: Path | None = None
    authority: Path | None = None
    package: Path
    data: Path
    state: Path
    insecure: bool = False
    memory_mib: Positive | None = None
    cache_mib: Annotated[float, Meta(ge=0)] = 256.0
    threads: Annotated[int, Meta(ge=1, le=1024)] = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What edges and devices know of a run from the beginning.

    Attributes:
        config: Its settings.
        num_parameters: n.
    """

    config: RunConfig
    num_parameters: Annotated[int, Meta(ge=1, le=1 << 40)]


def read_settings(file: Path, kind: type[Settings]) -> Settings:
    """Reads the settings of a process.

    Args:
        file: TOML.
        kind: Which.

    Returns:
        The settings, with absolute paths.

    Raises:
        ConfigError: If the file is missing, a value is unknown or outside its domain, or security was left out without a word.
    """
    try:
        found = msgspec.toml.decode(file.read_bytes(), type=kind, dec_hook=_to_path)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror}); `cooperllm enroll` writes one for each tier") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: {error}") from error
    root = file.resolve().parent
    paths = {name: root / value for name in kind.__struct_fields__ if isinstance(value := getattr(found, name), Path)}
    settings = msgspec.structs.replace(found, **paths)
    _check_security(file, settings)
    return settings


def read_job(file: Path) -> Job:
    """Reads the job.

    Args:
        file: JSON.

    Returns:
        The job.

    Raises:
        ConfigError: If it is missing or not of this release.
    """
    try:
        return msgspec.json.decode(file.read_bytes(), type=Job)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror}); `cooperllm enroll` writes it") from error
    except msgspec.DecodeError as error:
        raise ConfigError(f"{file}: {error}; enroll with the release that all tiers run") from error


def host_and_port(text: str, where: str) -> tuple[str, int]:
    """Splits an address.

    Args:
        text: HOST:PORT.
        where: What it is the value of.

    Returns:
        (host, port).

    Raises:
        ConfigError: If it is anything else.

    Example:
        >>> host_and_port("127.0.0.1:9100", "listen")
        ('127.0.0.1', 9100)
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"{where}: found {text!r}, expected HOST:PORT")
    return host.strip("[]"), int(port)


def _to_path(kind: type, value: object) -> Path:
    if kind is not Path or not isinstance(value, str):
        raise ValueError(f"found {value!r}, expected the name of a file")
    return Path(value)


def _check_security(file: Path, settings: CloudSettings | EdgeSettings | DeviceSettings) -> None:
    """Plain text needs a word, and does not leave the machine."""
    addresses = {name: getattr(settings, name) for name in ("listen", "cloud", "edge") if isinstance(getattr(settings, name, None), str)}
    hosts = {name: host_and_port(address, f"{file}: {name}")[0] for name, address in addresses.items()}
    wanted = [name for name in ("certificate", "certificate_key", "authority") if name in settings.__struct_fields__]
    missing = [name for name in wanted if getattr(settings, name) is None]
    if missing and not settings.insecure:
        raise ConfigError(f"{file}: found no {missing[0]}, expected a file; without one say insecure = true, which stays on this machine")
    given = {name for name in (*wanted, "node_authority", "node_certificate") if getattr(settings, name, None) is not None}
    if settings.insecure and given:
        raise ConfigError(f"{file}: found insecure = true beside {', '.join(sorted(given))}, expected one of both")
    if getattr(settings, "supernode", None) is not None and (settings.insecure or "node_authority" in given):
        raise ConfigError(
            f"{file}: found supernode beside {'insecure' if settings.insecure else 'node_authority'}, expected one of both: Flower's "
            "official SuperNode signs nothing in plain text and shows no certificate"
        )
    for name, host in hosts.items():
        if settings.insecure and not is_loopback(host):
            raise ConfigError(f"{file}: found insecure = true and {name} = {addresses[name]!r}, expected 127.0.0.1: plain text stays here")


def is_loopback(host: str) -> bool:
    """Tells whether a host is this machine and nobody else's way in.

    Args:
        host: Name or number.

    Returns:
        Whether it is a loopback address.

    Example:
        >>> is_loopback("127.0.0.1"), is_loopback("0.0.0.0")
        (True, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
