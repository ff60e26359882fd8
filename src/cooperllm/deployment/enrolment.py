"""Keys, certificates and a directory for each process of a deployment.

    authority/   the certificate that signs the servers' ones, and its key: keep it, and keep it away from the others
    cloud/       cloud.toml, the run, its certificate, edges/NUMBER.pem
    edge-0/      edge.toml, job.json, its key and certificate, devices/NUMBER.pem
    device-0/    device.toml, job.json, its key
    package/     what every device needs of the model

A directory is copied to its host and started there. A node is let in by the public key that its server has a file of; to lock it out,
delete that file and start the server again.
"""

import datetime
import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cooperllm.deployment.settings import Job, host_and_port
from cooperllm.edge import devices_of
from cooperllm.errors import ConfigError

VALID_DAYS = 825
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
    authority.certify(cloud, hosts[places.cloud])
    _write(cloud / "cloud.toml", CLOUD.format(listen=places.cloud).encode())
    for number, place in enumerate(places.edges):
        edge = directory / f"edge-{number}"
        _write(cloud / "edges" / f"{number}.pem", _new_key(edge))
        authority.certify(edge, hosts[place])
        _write(edge / "authority.pem", authority.certificate_pem)
        _write(edge / "job.json", msgspec.json.encode(job))
        _write(edge / "edge.toml", EDGE.format(number=number, cloud=places.cloud, listen=place).encode())
        for device_id in devices_of(number, len(places.edges), job.config.federation.num_devices):
            device = directory / f"device-{device_id}"
            _write(edge / "devices" / f"{device_id}.pem", _new_key(device))
            _write(device / "authority.pem", authority.certificate_pem)
            _write(device / "job.json", msgspec.json.encode(job))
            _write(device / "device.toml", DEVICE.format(number=device_id, edge=place).encode())


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
    """Signs the servers' certificates, once."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(CURVE())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "CooperLLM authority")])
        may_sign = x509.BasicConstraints(ca=True, path_length=0)
        unsigned = _certificate(self._name, self._name, self.key.public_key()).add_extension(may_sign, critical=True)
        certificate = unsigned.sign(self.key, HASH)
        self.certificate_pem = certificate.public_bytes(serialization.Encoding.PEM)

    def certify(self, directory: Path, host: str) -> None:
        """Writes a server's key and certificate for a name or number."""
        key = ec.generate_private_key(CURVE())
        try:
            alternative: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(host))
        except ValueError:
            alternative = x509.DNSName(host)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host[:64])])
        certificate = (
            _certificate(subject, self._name, key.public_key())
            .add_extension(x509.SubjectAlternativeName([alternative]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .sign(self.key, HASH)
        )
        _write(directory / "server.pem", certificate.public_bytes(serialization.Encoding.PEM))
        _write(directory / "server.key", _private_pem(key), is_secret=True)


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


def _new_key(directory: Path) -> bytes:
    """Writes a node's private key and returns the public one."""
    key = ec.generate_private_key(CURVE())
    _write(directory / "node.key", _private_pem(key), is_secret=True)
    return _public_pem(key.public_key())


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


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
# round_timeout_s = 900           # an edge that has not answered by then is lost to the round
"""

EDGE = """# Edge {number}. Start it with: cooperllm edge edge.toml
number = {number}
job = "job.json"                  # the run's settings
cloud = "{cloud}"         # where the cloud listens
key = "node.key"                  # this edge's key towards the cloud
authority = "authority.pem"       # whose signature the cloud's certificate carries
listen = "{listen}"        # for the devices
devices = "devices"               # NUMBER.pem: the public key of every device that may come in
certificate = "server.pem"        # what the edge shows its devices
certificate_key = "server.key"
# round_timeout_s = 600           # a device that has not answered by then is lost to the round; less than the cloud's
"""

DEVICE = """# Device {number}. Start it with: cooperllm device device.toml
number = {number}
job = "job.json"                  # the run's settings
edge = "{edge}"          # where its edge listens
key = "node.key"                  # this device's key
authority = "authority.pem"       # whose signature the edge's certificate carries
package = "../package"            # what `cooperllm package` has written
data = "texts.jsonl"              # private texts, one a line: {{"text": "...", "label": 0}}; they never leave this machine
state = "state"                   # what survives a restart
# memory_mib = 160                # bound for the whole process; settings that fit are found by measuring, once
# threads = 1
"""
