"""What a deployment's processes read: refused in a sentence where it is wrong, kept whole where it is written.

Run: pytest tests/unit/test_deployment_files.py
"""

import os
import ssl
from pathlib import Path

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from cooperllm.algorithm import noise, replay
from cooperllm.config import FederationConfig, OptimizerConfig, RunConfig
from cooperllm.deployment import process_file
from cooperllm.deployment.enrolment import Places, enroll, read_public_keys
from cooperllm.deployment.settings import CloudSettings, DeviceSettings, EdgeSettings, Job, host_and_port, read_job, read_settings
from cooperllm.deployment.state_file import StateFile
from cooperllm.edge import devices_of
from cooperllm.errors import ConfigError
from cooperllm.link.fleet_node import read_private_key

PLACES = Places(cloud="cloud.lan:9100", edges=("127.0.0.1:9101", "127.0.0.1:9102"))


@pytest.fixture(scope="module")
def enrolled(tmp_path_factory):
    path = tmp_path_factory.mktemp("deployment") / "all"
    enroll(
        path, Job(config=RunConfig(federation=FederationConfig(num_devices=3, num_edges=2, devices_per_round=2)), num_parameters=7), PLACES
    )
    return path


def edited(enrolled, tmp_path, name, old, new):
    file = tmp_path / "changed.toml"
    text = (enrolled / name).read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    return file


def test_what_is_written_is_what_is_read(enrolled):
    cloud = read_settings(enrolled / "cloud" / "cloud.toml", CloudSettings)
    assert cloud.run == (enrolled / "cloud" / "run").resolve()
    assert sorted(read_public_keys(cloud.edges)) == [0, 1]
    edge = read_settings(enrolled / "edge-1" / "edge.toml", EdgeSettings)
    assert (edge.number, edge.cloud, edge.listen) == (1, "cloud.lan:9100", "127.0.0.1:9102")
    device = read_settings(enrolled / "device-2" / "device.toml", DeviceSettings)
    assert (device.number, device.edge, device.memory_mib) == (2, "127.0.0.1:9101", None)
    assert read_job(device.job).num_parameters == 7


def test_every_device_is_enrolled_at_one_edge_with_the_key_that_it_has(enrolled):
    seen = {}
    for number in (0, 1):
        keys = read_public_keys(enrolled / f"edge-{number}" / "devices")
        assert list(keys) == list(devices_of(number, 2, 3))
        seen |= keys
    assert sorted(seen) == [0, 1, 2]
    for number, public in seen.items():
        key = read_private_key(enrolled / f"device-{number}" / "node.key")
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        assert (enrolled / f"edge-{number % 2}" / "devices" / f"{number}.pem").read_bytes() == public
    assert len({*seen.values()}) == 3


@pytest.mark.parametrize(("folder", "kind"), [("cloud", x509.DNSName), ("edge-0", x509.IPAddress)])
def test_a_server_has_a_certificate_for_its_own_host_signed_by_the_authority(enrolled, folder, kind):
    certificate = x509.load_pem_x509_certificate((enrolled / folder / "server.pem").read_bytes())
    authority = x509.load_pem_x509_certificate((enrolled / "authority" / "authority.pem").read_bytes())
    certificate.verify_directly_issued_by(authority)
    (name,) = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert isinstance(name, kind)
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(enrolled / folder / "server.pem", enrolled / folder / "server.key")


@pytest.mark.parametrize(("folder", "number"), [("edge-1", 1), ("device-2", 2)])
def test_a_nodes_certificate_is_for_the_key_that_it_signs_with_and_makes_no_server_of_it(enrolled, folder, number):
    certificate = x509.load_pem_x509_certificate((enrolled / folder / "node.pem").read_bytes())
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate((enrolled / "authority" / "authority.pem").read_bytes()))
    assert certificate.public_key() == read_private_key(enrolled / folder / "node.key").public_key()
    assert list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert certificate.subject.rfc4514_string() == f"CN={folder.partition('-')[0]}-{number}"


def test_every_server_asks_for_certificates_and_every_node_has_one(enrolled):
    for folder, kind in (("cloud", CloudSettings), ("edge-0", EdgeSettings), ("edge-1", EdgeSettings)):
        settings = read_settings(enrolled / folder / f"{folder.partition('-')[0]}.toml", kind)
        assert settings.node_authority.read_bytes() == (enrolled / "authority" / "authority.pem").read_bytes()
    for folder, kind in (("edge-0", EdgeSettings), ("device-0", DeviceSettings)):
        settings = read_settings(enrolled / folder / f"{folder.partition('-')[0]}.toml", kind)
        assert settings.node_certificate == (enrolled / folder / "node.pem").resolve()


def test_private_keys_are_nobody_elses_to_read(enrolled):
    keys = list(enrolled.rglob("*.key"))
    assert len(keys) == 1 + 3 + 2 + 3
    assert all(file.stat().st_mode & 0o077 == 0 for file in keys)


@pytest.mark.parametrize(
    ("name", "old", "new", "sentence"),
    [
        ("device-0/device.toml", "number = 0", "number = -1", r"Expected `int` >= 0"),
        ("device-0/device.toml", "# memory_mib = 160 ", "memory_mb = 160 ", r"unknown field `memory_mb`"),
        ("device-0/device.toml", 'authority = "authority.pem"', "", "found no authority, expected a file; without one say insecure = true"),
        ("device-0/device.toml", 'edge = "127.0.0.1:9101"', 'edge = "127.0.0.1"', "edge: found '127.0.0.1', expected HOST:PORT"),
        ("edge-0/edge.toml", 'key = "node.key"', "key = 3", "Expected `str`|found 3"),
        ("edge-0/edge.toml", 'certificate = "server.pem"', 'certificate = "server.pem"\ninsecure = true', "found insecure = true beside"),
        (
            "device-0/device.toml",
            'authority = "authority.pem"',
            "insecure = true",
            "found insecure = true beside node_certificate, expected one of both",
        ),
        ("cloud/cloud.toml", "run = ", "run ", "changed.toml"),
    ],
)
def test_settings_that_will_not_do_are_refused_in_a_sentence(enrolled, tmp_path, name, old, new, sentence):
    kind = {"cloud": CloudSettings, "edge-0": EdgeSettings, "device-0": DeviceSettings}[name.partition("/")[0]]
    with pytest.raises(ConfigError, match=sentence):
        read_settings(edited(enrolled, tmp_path, name, old, new), kind)


@pytest.mark.parametrize(("host", "is_allowed"), [("127.0.0.1", True), ("localhost", True), ("10.0.0.7", False), ("edge.lan", False)])
def test_plain_text_needs_a_word_and_stays_on_the_machine(tmp_path, host, is_allowed):
    file = tmp_path / "cloud.toml"
    file.write_text(f'run = "run"\nlisten = "{host}:9100"\nedges = "edges"\ninsecure = true\n')
    if is_allowed:
        assert read_settings(file, CloudSettings).certificate is None
    else:
        with pytest.raises(ConfigError, match="plain text stays here"):
            read_settings(file, CloudSettings)


@pytest.mark.parametrize("text", ["", "here", ":1", "here:", "here:99999", "here:x"])
def test_an_address_is_a_host_and_a_port(text):
    with pytest.raises(ConfigError, match=f"listen: found '{text}', expected HOST:PORT"):
        host_and_port(text, "listen")


def test_nothing_is_written_over_something(enrolled):
    with pytest.raises(ConfigError, match="found something there"):
        enroll(enrolled, Job(config=RunConfig(), num_parameters=7), PLACES)


def test_keys_that_are_none_are_refused_in_a_sentence(tmp_path):
    with pytest.raises(ConfigError, match=r"found no NUMBER.pem"):
        read_public_keys(tmp_path)
    (tmp_path / "3.pem").write_text("nothing")
    with pytest.raises(ConfigError, match="found no public key in PEM"):
        read_public_keys(tmp_path)
    (tmp_path / "3.pem").rename(tmp_path / "mine.pem")
    with pytest.raises(ConfigError, match="expected the node's number"):
        read_public_keys(tmp_path)
    with pytest.raises(ConfigError, match="found no private key in PEM"):
        read_private_key(tmp_path / "mine.pem")


START = replay.start(noise.gaussian(1, 0, 5), OptimizerConfig())


def test_a_replica_comes_back_from_disk_as_it_was(tmp_path):
    kept = StateFile(tmp_path / "state" / "replica.bin")
    assert kept.read(START) is None
    later = replay.step(START, np.ones(5, np.float32), 0.1, OptimizerConfig())
    kept.write(later)
    found = kept.read(START)
    assert found is not None
    assert (found.model_version, found.state_hash) == (1, later.state_hash)
    assert [file.name for file in (tmp_path / "state").iterdir()] == ["replica.bin"]


@pytest.mark.parametrize("place", range(0, 60, 7))
def test_a_damaged_replica_is_not_used(tmp_path, place, caplog):
    kept = StateFile(tmp_path / "replica.bin")
    kept.write(START)
    data = bytearray((tmp_path / "replica.bin").read_bytes())
    data[place] ^= 1
    (tmp_path / "replica.bin").write_bytes(data)
    assert kept.read(START) is None
    assert "starting from version 0" in caplog.text


def test_a_replica_of_another_run_is_not_used(tmp_path):
    kept = StateFile(tmp_path / "replica.bin")
    kept.write(replay.start(np.zeros(6, np.float32), OptimizerConfig()))
    assert kept.read(START) is None


def test_a_disk_that_takes_nothing_is_a_warning(tmp_path: Path, caplog):
    (tmp_path / "state").write_text("a file in the place of a directory")
    StateFile(tmp_path / "state" / "replica.bin").write(START)
    assert "not written" in caplog.text


def test_a_number_that_was_left_behind_is_no_process(tmp_path):
    """Whoever has that number now is somebody else: here this very test."""
    settings = tmp_path / "device.toml"
    settings.write_text("")
    (tmp_path / "device.pid").write_text(f"{os.getpid()}\n")
    (tmp_path / "device.lock").touch()
    for path in (settings, tmp_path):
        with pytest.raises(ConfigError, match="found no process that runs with settings from here"):
            process_file.stop(path)


def test_a_second_process_with_the_same_settings_is_refused_and_a_later_one_is_not(tmp_path):
    settings = tmp_path / "device.toml"
    with process_file.running(settings):
        assert (tmp_path / "device.pid").read_text() == f"{os.getpid()}\n"
        with pytest.raises(ConfigError, match="found a process that runs with these settings"), process_file.running(settings):
            pass
    with process_file.running(settings):
        pass
    assert not (tmp_path / "device.pid").exists()
