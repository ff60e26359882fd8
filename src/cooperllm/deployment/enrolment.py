"""Keys, certificates and a directory for each process of a deployment.

    authority/   the certificate that signs all others, and its key: keep it, and keep it away from the others
    cloud/       cloud.toml, the run, its certificate, edges/NUMBER.pem
    edge-0/      edge.toml, job.json, its key, its certificates as a node and as a server, devices/NUMBER.pem
    device-0/    device.toml, job.json, its key and certificate
    package/     what every device needs of the model

A directory is copied to its host and started there. A node is let in by the public key that its server has a file of; to lock it out,
delete that file and start the server again.
"""

import datetime
import ipaddress
import os
import shlex
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cooperllm.deployment.settings import DeviceSettings, EdgeSettings, Job, host_and_port, read_settings
from cooperllm.edge import devices_of
from cooperllm.errors import ConfigError
from cooperllm.link.fleet_node import read_private_key
from cooperllm.link.supernode import sign

VALID_DAYS = 825
QUIETLY = ("env", "FLWR_TELEMETRY_ENABLED=0", "FLWR_DISABLE_UPDATE_CHECK=1")
"""A SuperNode tells its makers that it was started, and asks them for a newer one, unless it is told not to."""

CURVE = ec.SECP384R1


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """Where a deployment's servers are found.

    Attributes:
        cloud: HOST:PORT of the cloud.
        edges: HOST:PORT of each edge.
    """

    cloud: str
    edges: tuple[str, ...]


def enroll(directory: Path, job: Job, places: Places) -> None:
    """Writes the directories of all processes but the run, the package and the devices' texts.

    Args:
        directory: A missing or empty directory.
        job: The run's settings; its federation says how many devices there are, dealt out to the edges in turn.
        places: Where the servers will be.

    Raises:
        ConfigError: If the directory is taken or an address is none.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"{directory}: found something there, expected a missing or empty directory; choose another or remove it")
    hosts = {place: host_and_port(place, "place")[0] for place in (places.cloud, *places.edges)}
    authority = _Authority()
    _write(directory / "authority" / "authority.pem", authority.certificate_pem)
    _write(directory / "authority" / "authority.key", _private_pem(authority.key), is_secret=True)
    cloud = directory / "cloud"
    _write(cloud / "authority.pem", authority.certificate_pem)
    authority.certify_server(cloud, hosts[places.cloud])
    _write(cloud / "cloud.toml", CLOUD.format(listen=places.cloud).encode())
    for number, place in enumerate(places.edges):
        edge = directory / f"edge-{number}"
        _write(cloud / "edges" / f"{number}.pem", authority.certify_node(edge))
        authority.certify_server(edge, hosts[place])
        _write(edge / "authority.pem", authority.certificate_pem)
        _write(edge / "job.json", msgspec.json.encode(job))
        _write(edge / "edge.toml", EDGE.format(number=number, cloud=places.cloud, listen=place).encode())
        for device_id in devices_of(number, len(places.edges), job.config.federation.num_devices):
            device = directory / f"device-{device_id}"
            _write(edge / "devices" / f"{device_id}.pem", authority.certify_node(device))
            _write(device / "authority.pem", authority.certificate_pem)
            _write(device / "job.json", msgspec.json.encode(job))
            _write(device / "device.toml", DEVICE.format(number=device_id, edge=place).encode())


def admit_supernodes(directory: Path) -> list[str]:
    """Lets the devices of a deployment run on Flower's official SuperNode, and its edges ask for no certificates.

    Args:
        directory: Of all processes, as `enroll` has written it.

    Returns:
        For each device the line for a shell that starts it so.

    Raises:
        ConfigError: If there is no edge or no device, one is in plain text, or this was done before.
    """
    edges = {file: read_settings(file, EdgeSettings) for file in sorted(directory.resolve().glob("edge-*/edge.toml"))}
    devices = {file: read_settings(file, DeviceSettings) for file in sorted(directory.resolve().glob("device-*/device.toml"))}
    if not edges or not devices:
        raise ConfigError(f"{directory}: found {len(edges)} edges and {len(devices)} devices, expected what `cooperllm enroll` has written")
    for file, settings in (edges | devices).items():
        if settings.insecure:
            raise ConfigError(f"{file}: found insecure = true, expected TLS: a SuperNode signs nothing in plain text")
        if isinstance(settings, EdgeSettings) and settings.supernode is not None:
            raise ConfigError(
                f"{file}: found supernode, expected none: to sign anew take the line out, and give devices their new supernode.yaml"
            )
    signature, trusted = sign(int(time.time()))
    for file in edges:
        kept = [line for line in file.read_text(encoding="utf8").splitlines() if not line.startswith("node_authority")]
        _write(file.with_name("supernode.json"), signature)
        _write(file, "\n".join([*kept, SUPERNODE]).encode())
    for file, settings in devices.items():
        key = _private_pem(read_private_key(settings.key), serialization.PrivateFormat.OpenSSH)
        _write(file.with_name("supernode.key"), key, is_secret=True)
        _write(file.with_name("supernode.yaml"), trusted)
    return [f"cd {shlex.quote(str(file.parent))} && {_supernode_command(file, settings)}" for file, settings in devices.items()]


def _supernode_command(file: Path, settings: DeviceSettings) -> str:
    """A line that is good wherever the device's directory is copied to, there."""
    given = {
        "superlink": settings.edge,
        "root-certificates": os.path.relpath(settings.authority or "", file.parent),
        "auth-supernode-private-key": "supernode.key",
        "trusted-entities": "supernode.yaml",
        "node-config": f'settings="{file.name}"',
    }
    return shlex.join([*QUIETLY, "flower-supernode", *(word for name, value in given.items() for word in (f"--{name}", value))])


def read_public_keys(directory: Path) -> dict[int, bytes]:
    """Reads who may come in.

    Args:
        directory: Files NUMBER.pem.

    Returns:
        Public keys by number, at least one.

    Raises:
        ConfigError: If there is none, or a file is no public key.
    """
    keys: dict[int, bytes] = {}
    for file in sorted(directory.glob("*.pem")):
        if not file.stem.isdigit():
            raise ConfigError(f"{file}: found {file.stem!r}, expected the node's number as the name")
        try:
            key = serialization.load_pem_public_key(file.read_bytes())
        except ValueError as error:
            raise ConfigError(f"{file}: found no public key in PEM; `cooperllm enroll` writes one") from error
        keys[int(file.stem)] = _public_pem(key)
    if not keys:
        raise ConfigError(f"{directory}: found no NUMBER.pem, expected the public key of at least one node; `cooperllm enroll` writes them")
    return keys


class _Authority:
    """Signs certificates, once: a server's is good for no node, and a node's for no server."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(CURVE())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "CooperLLM authority")])
        may_sign = x509.BasicConstraints(ca=True, path_length=0)
        unsigned = _certificate(self._name, self._name, self.key.public_key()).add_extension(may_sign, critical=True)
        certificate = unsigned.sign(self.key, HASH)
        self.certificate_pem = certificate.public_bytes(serialization.Encoding.PEM)

    def certify_server(self, directory: Path, host: str) -> None:
        """Writes a server's key and certificate for a name or number."""
        try:
            alternative: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(host))
        except ValueError:
            alternative = x509.DNSName(host)
        self._certify(directory / "server", host, ExtendedKeyUsageOID.SERVER_AUTH, x509.SubjectAlternativeName([alternative]))

    def certify_node(self, directory: Path) -> bytes:
        """Writes a node's key, which it signs its requests with, and the certificate for it; returns the public key."""
        return self._certify(directory / "node", directory.name, ExtendedKeyUsageOID.CLIENT_AUTH)

    def _certify(self, stem: Path, name: str, usage: x509.ObjectIdentifier, *extensions: x509.ExtensionType) -> bytes:
        key, subject = ec.generate_private_key(CURVE()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])
        unsigned = (
            _certificate(subject, self._name, key.public_key())
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        )
        for extension in extensions:
            unsigned = unsigned.add_extension(extension, critical=False)
        _write(stem.with_suffix(".pem"), unsigned.sign(self.key, HASH).public_bytes(serialization.Encoding.PEM))
        _write(stem.with_suffix(".key"), _private_pem(key), is_secret=True)
        return _public_pem(key.public_key())


HASH = hashes.SHA384()


def _certificate(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509
        .CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=VALID_DAYS))
    )


def _private_pem(key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat = serialization.PrivateFormat.PKCS8) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def _public_pem(key: PublicKeyTypes) -> bytes:
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _write(file: Path, content: bytes, *, is_secret: bool = False) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600 if is_secret else 0o644)
    with os.fdopen(handle, "wb") as stream:
        stream.write(content)


CLOUD = """# The cloud. Start it with: cooperllm cloud cloud.toml
run = "run"                       # run directory: settings, replay log, figures
listen = "{listen}"        # for the edges
edges = "edges"                   # NUMBER.pem: the public key of every edge that may come in
certificate = "server.pem"        # what the cloud shows; leave both out and say insecure = true for plain text on one machine
certificate_key = "server.key"
node_authority = "authority.pem"  # whose signature an edge's certificate must carry; leave it out to let edges in by their keys alone
# round_timeout_s = 900           # an edge that has not answered by then is lost to the round
"""

EDGE = """# Edge {number}. Start it with: cooperllm edge edge.toml
number = {number}
job = "job.json"                  # the run's settings
cloud = "{cloud}"         # where the cloud listens
key = "node.key"                  # this edge's key towards the cloud
node_certificate = "node.pem"     # the certificate for it, which the cloud wants to see
authority = "authority.pem"       # whose signature the cloud's certificate carries
listen = "{listen}"        # for the devices
devices = "devices"               # NUMBER.pem: the public key of every device that may come in
certificate = "server.pem"        # what the edge shows its devices
certificate_key = "server.key"
node_authority = "authority.pem"  # whose signature a device's certificate must carry; leave it out to let devices in by their keys alone
# round_timeout_s = 600           # a device that has not answered by then is lost to the round; less than the cloud's
"""

SUPERNODE = """\
supernode = "supernode.json"      # devices may run on Flower's official SuperNode, which shows no certificate: there is no node_authority
"""

DEVICE = """# Device {number}. Start it with: cooperllm device device.toml
number = {number}
job = "job.json"                  # the run's settings
edge = "{edge}"          # where its edge listens
key = "node.key"                  # this device's key
node_certificate = "node.pem"     # the certificate for it, which its edge wants to see
authority = "authority.pem"       # whose signature the edge's certificate carries
package = "../package"            # what `cooperllm package` has written
data = "texts.jsonl"              # private texts, one a line: {{"text": "...", "label": 0}}; they never leave this machine
state = "state"                   # what survives a restart
# memory_mib = 160                # bound for the whole process; settings that fit are found by measuring, once
# threads = 1
"""
